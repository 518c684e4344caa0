"""Checkpoints: files first, manifest last. What has no manifest, or does not match it, does not exist.

Ray Train's own checkpoint bookkeeping is one file written in place, readable only by the same Ray version, and absent
in its local mode; a run directory should outlive all three. So files go to `step-NNNNNNNN/` on any file system that
pyarrow knows (local, shared, s3://, gs://).
"""

import io
import json
import re
import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
from pyarrow import fs
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

_MANIFEST = "manifest.json"
_STEP_MANIFEST = re.compile(rf"/step-(\d{{8,}})/{re.escape(_MANIFEST)}$")


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to go on after `step` steps. Schedule, data order and random streams are functions of the
    run's seed and the step, so the step restores them."""

    step: int
    model: dict[str, Tensor]
    """What training changes of the student and of the method's modules; what is frozen is where it came from."""
    optimizer: dict[str, Any]
    method: list[dict[str, Any]]
    """The method's state, one entry a worker."""
    rollouts: list[dict[str, Any]] = field(default_factory=list)
    """Rows already written for later steps (`rayk.training.supply`), of all workers."""
    base: str = ""
    """The fingerprint of what is frozen; "" where nothing is, or nothing tells."""
    measured: bool = True
    """False where the evaluation after `step` failed: it is still to be made, for the method may learn from it."""


class CheckpointStore:
    """The checkpoints of one run, under one folder or URI."""

    def __init__(self, place: str):
        self.place = place
        self._fs: fs.FileSystem
        self._folder: str
        self._fs, self._folder = fs.FileSystem.from_uri(place) if "://" in place else (fs.LocalFileSystem(), place)

    def save(self, checkpoint: Checkpoint, keep: int) -> None:
        """Write one, then delete all but the newest `keep`."""
        folder = f"{self._folder}/step-{checkpoint.step:08d}"
        self._delete(folder)  # a torn one of the same step
        self._fs.create_dir(folder, recursive=True)
        files = {
            "model.safetensors": save_tensors({name: t.detach().contiguous() for name, t in checkpoint.model.items()}),
            "optimizer.pt": _pack(checkpoint.optimizer),
            "method.pt": _pack(checkpoint.method),
            "rollouts.pt": _pack(checkpoint.rollouts),
        }
        for name, data in files.items():
            self._write(f"{folder}/{name}", data)
        sums = {name: _sums(data) for name, data in files.items()}
        manifest = {
            "step": checkpoint.step, "files": sums, "base": checkpoint.base, "measured": checkpoint.measured,
        }  # fmt: skip
        self._write(f"{folder}/{_MANIFEST}.part", json.dumps(manifest).encode())
        self._fs.move(f"{folder}/{_MANIFEST}.part", f"{folder}/{_MANIFEST}")
        for step in self.steps()[:-keep]:
            # The manifest goes first, so that a half-deleted checkpoint is none.
            self._fs.delete_file(f"{self._folder}/step-{step:08d}/{_MANIFEST}")
            self._delete(f"{self._folder}/step-{step:08d}")

    def steps(self) -> list[int]:
        """Steps that have a manifest, ascending."""
        selector = fs.FileSelector(self._folder, allow_not_found=True, recursive=True)
        found = (_STEP_MANIFEST.search(info.path) for info in self._fs.get_file_info(selector))
        return sorted(int(match[1]) for match in found if match)

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole."""
        for step in reversed(self.steps()):
            files = self._read_whole(step)
            if files is not None:
                manifest = self._manifest(step)
                return Checkpoint(
                    step,
                    load_tensors(files["model.safetensors"]),
                    _unpack(files["optimizer.pt"]),
                    _unpack(files["method.pt"]),
                    _unpack(files["rollouts.pt"]),
                    manifest["base"],
                    manifest["measured"],
                )
        return None

    def base(self) -> str:
        """`Checkpoint.base` of the newest; "" without any."""
        return next((manifest["base"] for step in reversed(self.steps()) if (manifest := self._manifest(step))), "")

    def _manifest(self, step: int) -> dict[str, Any]:
        """Empty where it is damaged or gone."""
        try:
            return {
                "base": "",
                "measured": True,
                **json.loads(self._read(f"{self._folder}/step-{step:08d}/{_MANIFEST}")),
            }
        except (FileNotFoundError, ValueError):
            return {}

    def _read_whole(self, step: int) -> dict[str, bytes] | None:
        manifest = self._manifest(step)
        try:
            files = {name: self._read(f"{self._folder}/step-{step:08d}/{name}") for name in manifest["files"]}
        except (FileNotFoundError, KeyError):
            return None
        sums = {name: _sums(data) for name, data in files.items()}
        return files if sums == manifest["files"] else None

    def _read(self, path: str) -> bytes:
        with self._fs.open_input_stream(path) as stream:
            return stream.read()

    def _write(self, path: str, data: bytes) -> None:
        with self._fs.open_output_stream(path) as stream:
            stream.write(data)

    def _delete(self, folder: str) -> None:
        if self._fs.get_file_info(folder).type == fs.FileType.Directory:
            self._fs.delete_dir(folder)


def _sums(data: bytes) -> dict[str, int]:
    return {"bytes": len(data), "crc32": zlib.crc32(data)}


def _pack(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpack(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
