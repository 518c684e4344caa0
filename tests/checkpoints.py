"""Checkpoints of a small module, without a run around it."""

import json
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rayk.storage.values import join_tensors
from rayk.training.checkpoint import CheckpointStore, FileDigest, Manifest
from rayk.training.ranks import Ranks
from rayk.training.run_checkpoints import RunCheckpoints


def process_ranks() -> Ranks:
    """Return the ranks of torch's own process group; without one, a single rank."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return Ranks(rank, world, world)


class Layers(nn.Module):
    """Blocks of different shapes, a frozen one, a tied weight and a buffer."""

    def __init__(self, seed: int, width: int = 6):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(7, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        nn.init.eye_(self.frozen.weight)
        nn.init.zeros_(self.frozen.bias)
        self.head = nn.Linear(width, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.full((2,), float(seed)))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        for block in self.blocks:
            hidden = torch.tanh(block(hidden))
        return self.head(self.frozen(hidden))


class SmallRun:
    """A module with its optimizer, and a method and rows with a state, beside their `RunCheckpoints`."""

    def __init__(self, location: str, seed: int = 0, keep: int = 5, module: nn.Module | None = None, kind: str = "a"):
        self.module = Layers(seed) if module is None else module
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.01, fused=True)
        self.ranks = process_ranks()
        self.method_state: Any = {"seen": self.ranks.rank, "average": torch.ones(2), ("key", 1): [b"bytes", None]}
        self.rows: list[Any] = [{"step": 9, "place": self.ranks.rank, "row": {"ids": torch.arange(3)}}]
        self.best = SimpleNamespace(
            step=None, state_dict=lambda: {"step": None}, load_state_dict=lambda state, steps: None
        )
        self.checkpoints = RunCheckpoints(
            CheckpointStore(location), keep, self.ranks,
            SimpleNamespace(module=self.module, optimizer=self.optimizer),  # type: ignore[arg-type]
            SimpleNamespace(state_dict=lambda: self.method_state, load_state_dict=self._load_method),  # type: ignore[arg-type]
            SimpleNamespace(state=lambda step: self.rows, load_state=self._load_rows),  # type: ignore[arg-type]
            self.best, "", kind,  # type: ignore[arg-type]
        )  # fmt: skip

    def _load_method(self, state: Any) -> None:
        self.method_state = state

    def _load_rows(self, step: int, rows: list[Any]) -> None:
        self.rows = rows

    def train(self, steps: int = 1) -> None:
        for step in range(steps):
            self.module(torch.arange(7) + 0 * step).logsumexp(-1).sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def save(self, step: int) -> None:
        self.checkpoints.save(step, is_evaluated=True)
        self.checkpoints.wait()


def write_checkpoint(location: str, step: int) -> None:
    """Write a checkpoint that has the files of one rank and no state in them."""
    store = CheckpointStore(location)
    attempt = store.register()
    files = {}
    for kind in ("shard", "values"):
        name, digest = store.write_file(attempt, step, f"{kind}-00000", [], {"DCP_SHARDING_INFO": "{}"})
        files[name] = FileDigest(bytes=digest.bytes, crc32=digest.crc32)
    store.write_manifest(Manifest(step=step, attempt=attempt, files=files), keep=5)


def saved_weights(location: str, step: int | None = None) -> dict[str, Tensor]:
    """Return the weights in a run's checkpoint (None: the newest) by their names in `LossModule`, for one worker."""
    store = CheckpointStore(location)
    manifest = store.manifest(store.steps()[-1] if step is None else step)
    assert manifest is not None
    [name] = manifest.named(".shard-")
    with store.open_file(manifest, name) as file:
        return {name.removeprefix("model."): file.read(name) for name in file.tensors if name.startswith("model.")}


def saved_method_state(location: str) -> Any:
    """Return the method's state in the newest checkpoint of a run with one worker."""
    store = CheckpointStore(location)
    [name] = (manifest := next(store.manifests())).named(".values-")
    with store.open_file(manifest, name) as file:
        values, tensors = json.loads(file.metadata["values"]), {name: file.read(name) for name in file.tensors}
    return join_tensors(values, tensors)["method"]
