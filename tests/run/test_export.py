"""`rayk export` writes from a checkpoint, in any format, the model folder that the run itself writes."""

import json
import shutil
import zlib

import pytest
from safetensors.torch import load_file, save

from rayk.config import parse_config
from rayk.errors import InputError
from rayk.run import distill, export_model
from rayk.training.checkpoint import CheckpointStore, FileDigest, Manifest
from tests.checkpoints import saved_weights
from tests.runs import settings
from tests.tiny import tiny_model, tiny_tokenizer

STUDENTS = {"whole": {}, "LoRA": {"lora": {"r": 2}}}


@pytest.fixture(scope="module", params=STUDENTS)
def finished(request, tmp_path_factory):
    """The directory of a finished run with checkpoints of steps 2 and 4; its rows no longer exist."""
    folder = tmp_path_factory.mktemp("finished")
    tokenizer = tiny_tokenizer(folder / "student")
    model = tiny_model(seed=2, hidden=16, layers=1, tie=True, tokenizer=tokenizer).bfloat16()
    model.save_pretrained(folder / "student")
    values = settings(folder, str(folder / "student"), steps=4, checkpoint_every_steps=2)
    values["student"] |= STUDENTS[request.param]
    values["data"]["chat_template"] = True  # completions end with <|end|>, which is not the model's own end
    result = distill(parse_config(values))
    (folder / "rows.jsonl").rename(folder / "kept.jsonl")
    return result.output


@pytest.fixture
def moved(finished, tmp_path):
    """A copy of the run elsewhere, without its model."""
    copy = tmp_path / "moved"
    shutil.copytree(finished, copy, ignore=shutil.ignore_patterns("model", "adapter", "export"))
    return copy


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_model(run, exported):
    assert files(exported) == files(run / "model")
    adapter = exported.with_name(f"{exported.name}-adapter")
    assert (files(adapter) if adapter.exists() else None) == (
        files(run / "adapter") if (run / "adapter").exists() else None
    )
    assert json.loads((exported / "generation_config.json").read_text())["eos_token_id"] == [1, 3]


def test_newest_checkpoint_gives_the_model_of_the_run(finished, moved):
    written = export_model(moved)
    assert (written.step, written.model) == (4, str(moved / "export" / "step-00000004"))
    assert_same_model(finished, moved / "export" / "step-00000004")


def test_earlier_checkpoint_gives_its_own_weights(finished, tmp_path):
    assert export_model(finished, str(tmp_path / "two"), 2).step == 2
    two, four = load_file(tmp_path / "two" / "model.safetensors"), load_file(finished / "model" / "model.safetensors")
    assert two.keys() == four.keys()
    changed = {name for name, tensor in two.items() if not tensor.equal(four[name])}
    trained = saved_weights(str(finished / "checkpoints"), 2)
    if any(".lora_" in name for name in trained):
        assert changed
        return
    assert changed == two.keys()
    assert all(two[name].equal(trained[f"student.model.{name}"].bfloat16()) for name in two)


def test_shards_of_two_workers_are_joined(finished, moved, tmp_path):
    store = CheckpointStore(str(moved / "checkpoints"))
    attempt = store.register()
    weights = {f"model.{name}": tensor for name, tensor in saved_weights(store.location, 4).items()}
    digests = {}
    for rank in range(2):
        parts, offsets = [], {}
        for name, tensor in weights.items():
            first, second = tensor.tensor_split(2)
            part = (first, second)[rank]
            offsets[name] = {"saved_offsets": [len(first) * rank] + [0] * (tensor.ndim - 1)}
            parts.append((name, part.contiguous()))
        metadata = {"DCP_SHARDING_INFO": json.dumps(offsets)}
        name, digest = store.write_file(attempt, 5, f"shard-{rank:05d}", parts, metadata)
        digests[name] = FileDigest(bytes=digest.bytes, crc32=digest.crc32)
    store.write_manifest(Manifest(step=5, attempt=attempt, world=2, files=digests), keep=9)
    assert export_model(moved, str(tmp_path / "joined")).step == 5
    assert_same_model(finished, tmp_path / "joined")


def test_checkpoint_and_directory_of_rayk_0_1(finished, moved, tmp_path):
    data = save(saved_weights(str(finished / "checkpoints"), 4))
    shutil.rmtree(moved / "checkpoints")
    (moved / "model.json").unlink()
    folder = moved / "checkpoints" / "step-00000004"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(data)
    digest = {"bytes": len(data), "crc32": zlib.crc32(data)}
    (folder / "manifest.json").write_text(json.dumps({"step": 4, "files": {"model.safetensors": digest}}))
    rows = finished.parent / "rows.jsonl"
    shutil.copyfile(finished.parent / "kept.jsonl", rows)  # from which it follows what ends a completion
    export_model(moved, str(tmp_path / "old"))
    rows.unlink()
    assert_same_model(finished, tmp_path / "old")


def refused(folder, *arguments):
    with pytest.raises(InputError) as caught:
        export_model(folder, *arguments)
    return str(caught.value)


def test_unusable_directories_and_steps_are_refused(finished, moved, tmp_path):
    assert refused(tmp_path / "none").endswith("it does not exist; give the output folder of a run.")
    assert "it has no config.yaml" in refused(tmp_path)
    assert refused(moved, None, 3).endswith("There is no checkpoint of step 3 in "
                                            f"'{moved}/checkpoints'; there are those of: 2, 4.")  # fmt: skip
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes").touch()
    assert "exists already" in refused(moved, str(tmp_path / "taken"))
    [shard] = (moved / "checkpoints" / "step-00000004").glob("*.shard-*")
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    assert "The checkpoint of step 4" in refused(moved, None, 4)
    assert export_model(moved, str(tmp_path / "before")).step == 2
    shutil.rmtree(moved / "checkpoints")
    assert "There is no checkpoint" in refused(moved)
    (moved / "config.yaml").write_text("name: [")
    assert "is not YAML" in refused(moved)


def test_the_best_evaluation_is_exported_by_default(finished, moved, tmp_path):
    [path] = (moved / "checkpoints" / "step-00000004").glob("*.manifest.json")
    manifest = json.loads(path.read_text())
    path.write_text(
        json.dumps(manifest | {"best": {"metric": "loss", "lower": True, "step": 2, "value": 1.0, "since": 1}})
    )
    assert export_model(moved, str(tmp_path / "best")).step == 2
