"""Estimated memory of a worker: against measured memory, by setting, and what is said if it does not suffice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from rayk.config import RunConfig
from rayk.errors import InputError
from rayk.run import distill
from rayk.run.devices import DeviceMemory, parse_bytes, worker_memory
from rayk.run.inputs import read_inputs
from rayk.run.memory import estimate_memory
from rayk.run.verdict import check_memory, memory_verdict
from tests.runs import write_rows
from tests.tiny import tiny_model, tiny_tokenizer

LIBRARY_BUFFERS = 60e6
"""Bytes that the kernels of a CPU may allocate beside tensors: 10 MB were measured with AVX2, 50 MB with AVX-512."""


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    tiny_model(folder, vocab_size=2048, hidden=64, layers=4, tokenizer=tiny_tokenizer())
    return folder


def settings(folder, /, **sections):
    base = {
        "student": {"model": str(folder)}, "data": {"train": {"path": "rows.jsonl"}, "max_tokens": 256},
        "method": {"kind": "supervised"}, "training": {"batch_size": 64, "micro_batch_tokens": 2048},
    }  # fmt: skip
    merged = {name: values | sections.pop(name, {}) for name, values in base.items()}
    return RunConfig(**merged, **sections)


def parts(folder, /, **sections):
    return {part.name: part.bytes for part in estimate_memory(settings(folder, **sections), device="cpu").parts}


@pytest.mark.long
@pytest.mark.slow
def test_estimate_is_close_to_the_measured_peak(tmp_path):
    """Tensors and resident memory of training steps, full and LoRA, float32 and bfloat16, with and without
    recomputation."""
    command = [sys.executable, "-m", "tests.run.measure_memory", str(tmp_path)]
    # Large tensors get pages of their own, which are returned to the system when they are freed.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(4 << 20)}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, timeout=550, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    records = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(records) == 5
    for record in records:
        assert record["tensors"] < record["estimated"] < 1.4 * record["tensors"], record
        assert 0.85 * record["estimated"] < record["resident"] < 1.15 * record["estimated"] + LIBRARY_BUFFERS, record
    measured = {record["case"]: record["tensors"] for record in records}
    assert measured["LoRA bfloat16"] < measured["LoRA float32"] < measured["full recomputed"] < measured["full float32"]


def test_state_is_sixteen_bytes_a_trained_weight(student):
    whole = parts(student)
    assert whole["gradients"] == whole["weights"] and whole["optimizer"] == 2 * whole["weights"]
    assert parts(student, training={"optimizer": "adamw_8bit"})["optimizer"] == whole["weights"] / 2
    adapter = parts(student, student={"lora": {"r": 4}, "dtype": "bfloat16"})
    assert adapter["weights"] < 0.6 * whole["weights"] and adapter["optimizer"] < 0.2 * whole["optimizer"]


def test_activations_follow_micro_batches_and_recomputation(student):
    whole = parts(student)
    half = parts(student, training={"micro_batch_tokens": 1024})
    assert half["activations"] == pytest.approx(whole["activations"] / 2, rel=0.01)
    recomputed = parts(student, student={"gradient_checkpointing": True})
    assert "activations" not in recomputed
    assert 4 * 2048 * 64 * 4 < recomputed["activations, recomputed"] < whole["activations"]
    assert "weights in bfloat16" in parts(student, training={"precision": "bfloat16"})


def test_shards_divide_the_state_and_gathered_weights_depend_on_reshard(student):
    whole = parts(student)
    last = parts(student, training={"workers": 4, "sharding": "fsdp"})
    always = parts(student, training={"workers": 4, "sharding": "fsdp", "reshard": "always"})
    for name in ("weights", "gradients", "optimizer"):
        assert last[name] == always[name] == whole[name] / 4
    assert last["gathered weights"] == whole["weights"] > always["gathered weights"] > 0
    two = parts(student, training={"workers": 4, "sharding": "hsdp", "shards": 2})
    assert two["optimizer"] == whole["optimizer"] / 2


def test_head_of_a_teacher_and_rollouts_are_counted(student):
    teachers = [{"model": str(student)}]
    method = {"kind": "on_policy", "support": {"kind": "hidden", "dtype": "float32"}}
    found = parts(student, teachers=teachers, method=method)
    assert found["head of teacher 'teacher'"] == 4 * 64 * (2048 + 2048)
    assert found["keys and values of rollouts"] == 2 * 32_768 * 4 * 2 * 16 * 4


def test_gradients_and_activations_exist_together_in_several_micro_batches_only(student):
    several = estimate_memory(settings(student), device="cpu")
    single = estimate_memory(settings(student, training={"batch_size": 4}), device="cpu")
    assert several.repeats and not single.repeats and single.tokens == 1024
    assert several.peak == pytest.approx(sum(part.bytes for part in several.parts))
    assert single.peak < sum(part.bytes for part in single.parts)


def test_what_certainly_does_not_fit_is_wrong_and_what_may_not_is_a_note(student):
    estimate = estimate_memory(settings(student), device="cpu")
    assert 0 < estimate.certain < estimate.peak

    def state(size):
        return memory_verdict(estimate, DeviceMemory("cpu", size, "given"))

    assert state(0.99 * estimate.certain)[0] == "wrong" and "student.lora" in state(0.99 * estimate.certain)[1]
    assert state(0.99 * estimate.peak)[0] == "note" and "micro_batch_tokens" in state(0.99 * estimate.peak)[1]
    assert state(1.01 * estimate.peak)[0] == "ok"


@pytest.mark.parametrize(("text", "size"), [("80GB", 80e9), ("80", 80e9), ("512 MiB", 512 * 2**20), ("1.5t", 1.5e12)])
def test_sizes_are_parsed(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["0GB", "many", "-1GB", "80XB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(InputError, match=r"--device-memory .* is no size; give one such as 80GB"):
        parse_bytes(text)


def test_workers_share_the_memory_of_a_machine(student):
    resources = {"num_gpus": 0}
    one = worker_memory(settings(student, training={"resources": resources}))
    four = worker_memory(settings(student, training={"resources": resources, "workers": 4}))
    assert one.kind == "cpu" and four.bytes == one.bytes / 4 and "divided by 4 workers" in four.source
    assert worker_memory(settings(student), "80GB") == DeviceMemory("cuda", 80e9, "given")


def test_published_weights_are_in_the_memory_of_the_host(student):
    teachers, method = [{"model": str(student)}], {"kind": "on_policy"}
    config = settings(student, teachers=teachers, method=method, rollouts={"kind": "served"})
    gpu, cpu = estimate_memory(config), estimate_memory(config, device="cpu")
    [published] = [part for part in gpu.parts if part.name == "published weights"]
    trained = next(part.bytes for part in gpu.parts if part.name == "weights") / 4
    assert published.bytes == 8 * trained and published.phase == "host"
    assert "published weights" in {part.name for part in cpu.parts if part.phase == "always"}


def test_run_that_cannot_fit_is_refused_before_it_starts(student, tmp_path, monkeypatch):
    write_rows(tmp_path / "rows.jsonl")
    config = settings(student, data={"train": {"path": str(tmp_path / "rows.jsonl")}}, output=str(tmp_path / "run"))
    estimate = estimate_memory(config, device="cpu")

    def have(size):
        monkeypatch.setattr("os.sysconf", lambda name: int(size) if name == "SC_PHYS_PAGES" else 1)

    monkeypatch.setattr("ray.is_initialized", lambda: False)  # other tests of this process may have started a cluster
    have(0.99 * estimate.certain)
    with pytest.raises(InputError, match=r"^A worker needs .* but has .*this machine's memory"):
        distill(config)
    assert not (tmp_path / "run").exists()
    inputs = read_inputs(config, {})
    have(1.01 * estimate.certain)
    assert check_memory(config, inputs).startswith("A worker is estimated to need")
    have(1e12)
    assert check_memory(config, inputs) is None
    have(1)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert check_memory(config, inputs) is None  # its workers run on other machines


def test_memory_of_a_gpu_is_read_without_using_it(student, tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H200, 143771'\necho 'NVIDIA L4, 23034'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    found = worker_memory(settings(student))
    assert (found.kind, found.bytes) == ("cuda", 143771 * 2**20) and found.source.startswith("NVIDIA H200")
    assert worker_memory(settings(student, training={"resources": {"num_gpus": 0.5}})).bytes == found.bytes / 2


def test_experts_without_fake_results_are_estimated_without_a_log(tmp_path, caplog):
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.for_model("mixtral", vocab_size=64, intermediate_size=32, num_local_experts=2, **size)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert parts(tmp_path)["activations"] > 0
    assert not caplog.records
