"""Two ranks write their parts of a state, and any number of ranks reads it, sharded or not."""

import errno
import json
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.checkpoint import HuggingFaceStorageReader, load
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from rayk.training.checkpoint import CheckpointStore
from rayk.training.ranks import AllRanksStop
from tests.checkpoints import Layers, SmallRun

pytestmark = pytest.mark.slow

STATES = ("whole", "sharded")


def make(folder, state, seed=0):
    """A run whose module all ranks hold, as under DDP, or of which each holds a part, as under FSDP2."""
    module = Layers(seed)
    if state == "sharded":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in module.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)
    return SmallRun(str(folder), seed, module=module)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def content(run):
    """Weights and optimizer state, whole. A collective for a sharded module."""
    tensors = {name: whole(tensor.detach()) for name, tensor in run.module.state_dict().items()}
    names = {parameter: name for name, parameter in run.module.named_parameters()}
    for parameter, state in run.optimizer.state.items():
        tensors |= {f"{names[parameter]}.{part}": whole(value) for part, value in state.items()}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def write_and_read(rank, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for state in STATES:
        run = make(folder / state, state)
        assert run.checkpoints.restore() == (0, True)
        run.train(2)
        run.save(2)
        run.train()
        before = content(run)
        run.checkpoints.save(3, is_evaluated=False)
        run.train()  # while the files are written
        run.checkpoints.wait()
        if rank == 0:
            torch.save(before, folder / f"{state}.pt")
        for other in STATES:
            again = make(folder / state, other, seed=1)
            assert again.checkpoints.restore() == (3, False)
            assert_equal(content(again), before)
            assert again.method_state["seen"] == rank
            assert [row["place"] for row in again.rows] == [0, 1]
            again.train()
            after, expected = content(again), content(run)
            assert all(torch.allclose(after[name], expected[name], atol=1e-6) for name in expected)
    disagree(rank, folder)
    dist.destroy_process_group()


def disagree(rank, folder):
    """Failures on one rank alone are those of both."""
    [shard] = (folder / "whole" / "step-00000003").glob("*.shard-00001.safetensors")
    dist.barrier()
    if rank == 0:
        shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    dist.barrier()
    run = make(folder / "whole", "whole", seed=1)
    assert run.checkpoints.restore() == (2, True)
    run.train()
    if rank == 1:

        def full(*arguments):
            raise OSError(errno.ENOSPC, "No space left on device")

        run.checkpoints._store.write_file = full
    run.checkpoints.save(4, is_evaluated=True)
    with pytest.raises(AllRanksStop, match=r"^The checkpoint of step 4 could not be written: .*No space left"):
        run.checkpoints.wait()
    assert run.checkpoints._store.steps() == [2]  # what followed the step from which this attempt continued is void
    if rank == 1:
        run.method_state = {"random": torch.Generator()}
    with pytest.raises(AllRanksStop, match="The state of method 'a' cannot be stored: it contains a Generator"):
        run.checkpoints.save(5, is_evaluated=True)


def test_any_ranks_read_what_two_ranks_wrote(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(write_and_read, (port, tmp_path), nprocs=2)
    run = SmallRun(str(tmp_path / "sharded"), seed=1)
    assert run.checkpoints.restore() == (3, False)
    assert_equal(content(run), torch.load(tmp_path / "sharded.pt"))
    assert_parts(tmp_path)
    assert_readable_by_torch(tmp_path / "sharded" / "step-00000003", torch.load(tmp_path / "sharded.pt"))


def assert_parts(folder):
    """Both ranks write a part, no tensor twice, and no frozen one."""
    for state in STATES:
        store = CheckpointStore(str(folder / state))
        manifest = store.manifest(2)
        sizes = [manifest.files[name].bytes for name in manifest.named(".shard-")]
        assert max(sizes) < 3 * min(sizes)  # tensors are not cut for it
        numbers, names = 0, set()
        for name in manifest.named(".shard-"):
            with store.open_file(manifest, name) as file:
                numbers += sum(tensor.shape.numel() for tensor in map(file.read, file.tensors))
                names |= file.tensors.keys()
        weights = [p for p in Layers(0).parameters() if p.requires_grad]
        assert numbers == 3 * sum(p.numel() for p in weights) + len(weights) + 2  # two moments, a step each, the buffer
        assert not any("frozen" in name or "head" in name for name in names)


def assert_readable_by_torch(folder: Path, expected):
    """The files are those of torch's own writer, so that its reader and tools read them."""
    state = {f"model.{name}": torch.zeros_like(expected[name]) for name in ("embedding.weight", "blocks.1.bias")}
    load(state, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    assert all(torch.equal(tensor, expected[name.removeprefix("model.")]) for name, tensor in state.items())
    assert json.loads(next(folder.glob("*.manifest.json")).read_text())["world"] == 2
