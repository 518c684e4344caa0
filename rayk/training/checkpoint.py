"""Checkpoints: files first, manifest last. A checkpoint without a manifest, or with files that do not match it, is
ignored.

Ray Train's record of checkpoints is one file that is rewritten in place, can be read by the same Ray version only, and
does not exist in local mode. Checkpoints here are folders `step-NNNNNNNN` on any file system that pyarrow knows (local,
shared, s3://, gs://).
"""

import io
import json
import re
import zlib
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from pyarrow import fs
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from rayk.config.paths import is_uri

_MANIFEST = "manifest.json"
_STEP_MANIFEST = re.compile(rf"/step-(\d{{8,}})/{re.escape(_MANIFEST)}$")


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after `step` steps. Schedule, data order and random streams depend on the seed and the step
    only, so they need no state."""

    step: int
    model: dict[str, Tensor]
    """The trainable weights of the student and of the method's modules, without frozen ones."""
    optimizer: dict[str, Any]
    method: list[dict[str, Any]]
    """The method's state, one entry per worker."""
    rollouts: list[dict[str, Any]] = field(default_factory=list)
    """Rows already generated for later steps, of all workers (`ExperienceSource.state`)."""
    base: str = ""
    """The fingerprint of the frozen weights; "" if there are none, or if it is unknown."""
    measured: bool = True
    """False if the evaluation after `step` failed; a resumed run evaluates before it trains, because the method may
    depend on the metrics."""
    best: dict[str, Any] = field(default_factory=dict)
    """The state of `BestEvaluation`."""


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        location: a folder, or a URI that pyarrow knows.
    """

    def __init__(self, location: str):
        self.location = location
        self._fs: fs.FileSystem
        self._folder: str
        self._fs, self._folder = (
            fs.FileSystem.from_uri(location) if is_uri(location) else (fs.LocalFileSystem(), location)
        )

    def save(self, checkpoint: Checkpoint, keep: int, kept_step: int | None = None) -> None:
        """Write a checkpoint, then delete all but the newest `keep` and that of `kept_step`."""
        folder = f"{self._folder}/step-{checkpoint.step:08d}"
        self._delete(folder)  # an incomplete checkpoint of the same step
        self._fs.create_dir(folder, recursive=True)
        files = {
            "model.safetensors": save_tensors({name: t.detach().contiguous() for name, t in checkpoint.model.items()}),
            "optimizer.pt": _pack(checkpoint.optimizer),
            "method.pt": _pack(checkpoint.method),
            "rollouts.pt": _pack(checkpoint.rollouts),
        }
        for name, data in files.items():
            self._write(f"{folder}/{name}", data)
        checksums = {name: _checksums(data) for name, data in files.items()}
        manifest = {
            "step": checkpoint.step, "files": checksums, "base": checkpoint.base, "measured": checkpoint.measured,
            "best": checkpoint.best,
        }  # fmt: skip
        self._write(f"{folder}/{_MANIFEST}.part", json.dumps(manifest).encode())
        self._fs.move(f"{folder}/{_MANIFEST}.part", f"{folder}/{_MANIFEST}")
        for step in self.steps()[:-keep]:
            if step == kept_step:
                continue
            # The manifest is deleted first, so that a half-deleted checkpoint is ignored.
            self._fs.delete_file(f"{self._folder}/step-{step:08d}/{_MANIFEST}")
            self._delete(f"{self._folder}/step-{step:08d}")

    def steps(self) -> list[int]:
        """Return the steps whose checkpoints have a manifest, ascending."""
        selector = fs.FileSelector(self._folder, allow_not_found=True, recursive=True)
        found = (_STEP_MANIFEST.search(info.path) for info in self._fs.get_file_info(selector))
        return sorted(int(match[1]) for match in found if match)

    def latest(self) -> Checkpoint | None:
        """Return the newest complete checkpoint; None if there is none."""
        for step in reversed(self.steps()):
            files = self._read_files(step)
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
                    manifest["best"],
                )
        return None

    def model(self, step: int) -> dict[str, Tensor] | None:
        """Return the trainable weights of a step; None if its checkpoint is missing or damaged."""
        files = self._read_files(step, only=("model.safetensors",))
        return None if files is None else load_tensors(files["model.safetensors"])

    def base(self) -> str:
        """Return `Checkpoint.base` of the newest checkpoint; "" if there is none."""
        return next((manifest["base"] for step in reversed(self.steps()) if (manifest := self._manifest(step))), "")

    def _manifest(self, step: int) -> dict[str, Any]:
        """Return the manifest of a step, {} if it is damaged or missing."""
        try:
            return {
                "base": "",
                "measured": True,
                "best": {},
                **json.loads(self._read(f"{self._folder}/step-{step:08d}/{_MANIFEST}")),
            }
        except (FileNotFoundError, ValueError):
            return {}

    def _read_files(self, step: int, only: Collection[str] | None = None) -> dict[str, bytes] | None:
        """Return the files of a checkpoint, or `only` some; None if it is incomplete or one of them is damaged."""
        expected = self._manifest(step).get("files", {})
        names = expected if only is None else only
        try:
            files = {name: self._read(f"{self._folder}/step-{step:08d}/{name}") for name in names}
        except FileNotFoundError:
            return None
        return files if files and all(_checksums(data) == expected.get(name) for name, data in files.items()) else None

    def _read(self, path: str) -> bytes:
        with self._fs.open_input_stream(path) as stream:
            return stream.read()

    def _write(self, path: str, data: bytes) -> None:
        with self._fs.open_output_stream(path) as stream:
            stream.write(data)

    def _delete(self, folder: str) -> None:
        if self._fs.get_file_info(folder).type == fs.FileType.Directory:
            self._fs.delete_dir(folder)


def _checksums(data: bytes) -> dict[str, int]:
    return {"bytes": len(data), "crc32": zlib.crc32(data)}


def _pack(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpack(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
