"""Checkpoints of rayk 0.1 are still loaded."""

import io
import json
import zlib

import torch
from safetensors.torch import save as save_tensors

from rayk.training.checkpoint import CheckpointStore
from tests.checkpoints import SmallRun


def write_v1(folder, step, run):
    """Write a checkpoint as rayk 0.1 did: whole tensors, the optimizer's in the order of its parameters."""
    folder = folder / f"step-{step:08d}"
    folder.mkdir(parents=True)

    def packed(value):
        torch.save(value, buffer := io.BytesIO())
        return buffer.getvalue()

    trained = {name for name, parameter in run.module.named_parameters() if parameter.requires_grad} | {"scale"}
    weights = {name: tensor for name, tensor in run.module.state_dict().items() if name in trained}
    files = {
        "model.safetensors": save_tensors(weights), "optimizer.pt": packed(run.optimizer.state_dict()),
        "method.pt": packed([{"seen": 5}]), "rollouts.pt": packed([{"step": step}]),
    }  # fmt: skip
    for name, data in files.items():
        (folder / name).write_bytes(data)
    digests = {name: {"bytes": len(data), "crc32": zlib.crc32(data)} for name, data in files.items()}
    manifest = {"step": step, "files": digests, "base": "abc", "measured": False, "best": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_run_of_rayk_0_1_continues(tmp_path):
    old = SmallRun(str(tmp_path / "unused"))
    old.train(2)
    write_v1(tmp_path / "run", 2, old)
    old.train()
    write_v1(tmp_path / "run", 3, old)
    store = CheckpointStore(str(tmp_path / "run"))
    assert (store.steps(), store.base()) == ([2, 3], "abc")
    new = SmallRun(str(tmp_path / "run"), seed=1, keep=1)
    assert new.checkpoints.restore() == (3, False)
    assert (new.method_state, new.rows) == ({"seen": 5}, [{"step": 3}])
    for run in (old, new):
        run.train()
    for name, tensor in old.module.state_dict().items():
        assert torch.equal(tensor, new.module.state_dict()[name]), name
    new.save(4)
    assert store.steps() == [4]  # the old ones are deleted in their turn
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["attempts", "step-00000004"]


def test_damaged_checkpoint_of_rayk_0_1_is_skipped(tmp_path):
    old = SmallRun(str(tmp_path / "unused"))
    old.train()
    for step in (2, 3):
        write_v1(tmp_path / "run", step, old)
    (tmp_path / "run" / "step-00000003" / "optimizer.pt").write_bytes(b"")
    assert SmallRun(str(tmp_path / "run")).checkpoints.restore()[0] == 2
