"""`rayk plan --gpu` from config.json files alone: sizes of published models, rates, and the preset for 32 GPUs."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rayk.cli import app
from rayk.config import load_config
from rayk.errors import InputError
from rayk.models.size import measure_size
from rayk.run.capacity import Efficiency, estimate_capacity
from rayk.run.devices import find_device
from tests.tiny import tiny_model

PRESET = Path(__file__).parents[2] / "jobs/qwen3_235b.yaml"
# The sizes in the published config.json of Qwen/Qwen3-8B and Qwen/Qwen3-235B-A22B-FP8.
QWEN3 = {"vocab_size": 151936, "hidden_size": 4096, "head_dim": 128, "max_position_embeddings": 40960,
         "tie_word_embeddings": False, "hidden_act": "silu"}  # fmt: skip
QWEN3_8B = QWEN3 | {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_hidden_layers": 36, "intermediate_size": 12288,
    "num_attention_heads": 32, "num_key_value_heads": 8, "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN3_235B = QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_hidden_layers": 94,
    "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_experts": 128, "num_experts_per_tok": 8,
    "num_attention_heads": 64, "num_key_value_heads": 4, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "norm_topk_prob": True, "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128],
                            "activation_scheme": "dynamic"},
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders `teacher` and `student` with nothing but a config.json."""
    folder = tmp_path_factory.mktemp("published")
    for name, config in (("teacher", QWEN3_235B), ("student", QWEN3_8B)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    return folder


def preset(models, *changes):
    changed = [f"teachers.0.model={models / 'teacher'}", f"student.model={models / 'student'}", *changes]
    return load_config(PRESET, list(changed))


@pytest.mark.slow
def test_sizes_of_published_models(models):
    teacher, student = measure_size(str(models / "teacher")), measure_size(str(models / "student"))
    assert teacher.parameters == pytest.approx(235.1e9, rel=0.002) and teacher.active == pytest.approx(22.2e9, rel=0.01)
    assert teacher.is_mixture and teacher.weight_bytes == teacher.parameters  # one byte each
    assert student.parameters == student.active == 8_190_735_360
    assert student.weight_bytes == 2 * student.parameters and student.embedding == 151936 * 4096


def test_size_of_a_tied_model_counts_its_head(tmp_path):
    model = tiny_model(tmp_path, tie=True, hidden=32)
    size = measure_size(str(tmp_path))
    assert size.parameters == sum(parameter.numel() for parameter in model.parameters())
    products = size.parameters - sum(p.numel() for p in model.parameters() if p.ndim < 2)
    assert size.forward_flops(0) == pytest.approx(2 * products, rel=0.01)
    assert size.forward_flops(100) - size.forward_flops(0) == 2 * 2 * 100 * 32


def test_rates_scale_with_gpus_and_efficiency(models):
    config, device = preset(models), find_device("h100")
    base = estimate_capacity(config, device, 32, tokens=1e9)
    half = estimate_capacity(config, device, 32, tokens=1e9, efficiency=Efficiency(mixture=0.075, training=0.2))
    assert half.replica_rate == pytest.approx(base.replica_rate / 2)
    assert half.student_rate == pytest.approx(base.student_rate / 2)
    more = estimate_capacity(preset(models, "training.workers=8"), device, 32, tokens=1e9)
    assert more.student_rate == pytest.approx(base.student_rate / 2) and more.waiting_share < base.waiting_share
    adapter = estimate_capacity(preset(models, "student.lora.r=16"), device, 32, tokens=1e9)
    assert adapter.student_rate == pytest.approx(base.student_rate * 4 / 3)  # 2 + 1 instead of 3 + 1 passes
    assert base.cache_seconds == pytest.approx(1e9 / (4 * base.replica_rate))
    assert base.cache_bytes == pytest.approx(1e9 * (64 * 6 + 8))


def test_a_slow_memory_bounds_the_rate(models):
    config = preset(models)
    fast, device = find_device("h100"), find_device("h100-pcie")
    slow = type(device)("slow", 80, device.teraflops, 10)
    rate = estimate_capacity(config, slow, 32, tokens=1e9).replica_rate
    assert rate == pytest.approx(8192 * 8 * 10e9 / measure_size(str(models / "teacher")).weight_bytes)
    assert rate < estimate_capacity(config, fast, 32, tokens=1e9).replica_rate


@pytest.mark.parametrize(("changes", "gpus", "message"), [
    (["teachers.0.engine.tensor_parallel_size=2"], 32, "235 GB of weights, but a replica's 2 GPUs.*at least 4 GPUs"),
    ([], 16, "needs 32 GPUs .16 workers, and 2 replicas of 8., but --gpus is 16"),
])  # fmt: skip
def test_what_cannot_run_is_refused(models, changes, gpus, message):
    config = preset(models, *changes)
    with pytest.raises(InputError, match=message):
        estimate_capacity(config, find_device("h100"), gpus, tokens=1e9)


def test_unknown_gpu_is_refused_with_the_closest():
    with pytest.raises(InputError, match="--gpu 'h1000' is not known; did you mean 'h100'"):
        find_device("h1000")


@pytest.mark.slow
def test_plan_of_the_preset_prints_each_figure_with_its_origin(models, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    changes = [f"teachers.0.model={models / 'teacher'}", f"student.model={models / 'student'}"]
    command = ["plan", str(PRESET), *(word for change in changes for word in ("--set", change))]
    result = CliRunner().invoke(app, [*command, "--gpu", "h100", "--gpus", "32", "--tokens", "5e8"])
    assert result.exit_code == 0, result.output
    lines = {line.split("  ")[0]: line for line in result.output.splitlines()}
    assert "235.1 billion parameters, of which a token uses 22." in lines["teacher"]
    assert lines["teacher"].rstrip().endswith("config.json")
    assert "estimated: 15% of the peak" in lines["one replica scores"]
    assert "500,000,000 tokens, 2 epoch(s)" in lines["training rows"]
    assert lines["training rows"].rstrip().endswith("given")
    assert "shorter than beside the student" in lines["training from the cache"]
    assert lines["memory: optimizer"].rstrip().endswith("computed")
    assert not list(tmp_path.iterdir())  # a plan writes nothing
