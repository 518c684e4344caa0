"""The checkpoints of one run in a folder on any file system that pyarrow knows (local, shared, s3://, gs://).

Layout, for two workers in the third attempt of a run:

    attempts/000003-5f0c93a1                  attempt 3 exists: all older ones must stop writing
    attempts/000003-5f0c93a1.from-00000100    it has continued from step 100
    step-00000200/000003-5f0c93a1.shard-00000.safetensors     weights and optimizer state of rank 0
    step-00000200/000003-5f0c93a1.values-00000.safetensors    state of rank 0's method, rows generated ahead
    step-00000200/…00001…                                     the same of rank 1
    step-00000200/000003-5f0c93a1.manifest.json               written last: names and checksums of all files

A checkpoint without a manifest, or with files that do not match it, is ignored. An attempt is one group of training
workers. If two groups write at the same time, such as after a network failure, the older one is fenced off: it writes
no manifest once a newer attempt is registered, and a manifest that it still wrote does not count if its step is after
the one from which the newer attempt has continued. No two attempts write to the same file.

Ray Train's record of checkpoints is one file that is rewritten in place, can be read by the same Ray version only, and
does not exist in local mode.
"""

import contextlib
import re
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pyarrow import fs
from pydantic import BaseModel, Field
from torch import Tensor

from rayk.config.secrets import hide
from rayk.errors import Overtaken
from rayk.storage.places import file_names, open_place
from rayk.storage.tensor_files import Digest, TensorFile, read_digest, write_tensors

_ATTEMPTS = "attempts"
_ATTEMPT = r"(\d{6,}-[0-9a-f]{8})"
_ATTEMPT_FILE = re.compile(rf"^{_ATTEMPTS}/{_ATTEMPT}(?:\.from-(\d{{8,}}))?$")
_STEP_FILE = re.compile(rf"^step-(\d{{8,}})/(?:{_ATTEMPT}\.)?([^/]+)$")
_MANIFEST = "manifest.json"


class FileDigest(BaseModel):
    """Size and checksum of a file, in a manifest."""

    bytes: int = Field(ge=0)
    crc32: int


class Manifest(BaseModel):
    """The facts about a complete checkpoint after `step` steps. Schedule, data order and random streams depend on the
    seed and the step only, so they need no state."""

    step: int = Field(ge=0)
    attempt: str = Field("", pattern=rf"^({_ATTEMPT})?$")
    """The attempt that wrote it; "" for the format of rayk 0.1 (`rayk.training.checkpoint_v1`)."""
    world: int = Field(1, ge=1)
    """The number of workers that wrote it."""
    files: dict[str, FileDigest]
    base: str = ""
    """The fingerprint of the frozen weights; "" if there are none, or if it is unknown."""
    method: str = ""
    """`method.kind`; "" in the format of rayk 0.1."""
    measured: bool = True
    """False if the evaluation after `step` failed; a resumed run evaluates before it trains, because the method may
    depend on the metrics."""
    best: dict[str, Any] = Field(default_factory=dict)
    """The state of `BestEvaluation`."""
    numbers: dict[str, float] = Field(default_factory=dict)
    """The parts of the optimizer's state that are no tensors."""

    def named(self, part: str) -> list[str]:
        """Return the names of the files whose name contains `part`."""
        return sorted(name for name in self.files if part in name)


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        location: a folder, or a URI that pyarrow knows.

    Attributes:
        location: the same, for people: without the credentials in it.
    """

    def __init__(self, location: str):
        self.location = hide(location)
        self._fs, self._folder = open_place(location)

    def register(self) -> str:
        """Begin a new attempt, which fences off all earlier ones; return its name.

        Raises:
            OSError: the store cannot be written.
        """
        number = max((int(name.partition("-")[0]) for name in self._attempts()), default=0) + 1
        attempt = f"{number:06d}-{uuid.uuid4().hex[:8]}"
        self._write(f"{_ATTEMPTS}/{attempt}", b"")
        return attempt

    def has_attempt(self, attempt: str) -> bool:
        """Return whether this process sees the files of `attempt`."""
        return attempt in self._attempts()

    def begin_from(self, attempt: str, step: int) -> None:
        """Note that `attempt` has continued from `step`, so that later steps of earlier attempts do not count."""
        self._write(f"{_ATTEMPTS}/{attempt}.from-{step:08d}", b"")

    def check_newest(self, attempt: str) -> None:
        """Check that `attempt` may still write.

        Raises:
            Overtaken: a newer attempt exists.
        """
        if max(self._attempts(), default=attempt) > attempt:
            raise Overtaken(
                f"Another process has continued this run and now writes its checkpoints in '{self.location}', so this "
                "one stops."
            )

    def write_file(
        self, attempt: str, step: int, name: str, tensors: list[tuple[str, Tensor]], metadata: Mapping[str, str]
    ) -> tuple[str, Digest]:  # fmt: skip
        """Write one file of a checkpoint, and empty `tensors`; return its full name and digest."""
        full_name = f"{attempt}.{name}.safetensors"
        folder = self._step_folder(step)
        self._create(folder)
        return full_name, write_tensors(self._fs, f"{self._folder}/{folder}/{full_name}", tensors, metadata)

    def write_manifest(self, manifest: Manifest, keep: int, kept_step: int | None = None) -> None:
        """Complete a checkpoint whose files are written, then delete all but the newest `keep` and that of
        `kept_step`.

        Raises:
            Overtaken: a newer attempt exists.
            OSError: the store cannot be written.
        """
        self.check_newest(manifest.attempt)
        path = f"{self._step_folder(manifest.step)}/{manifest.attempt}.{_MANIFEST}"
        self._write(path, manifest.model_dump_json().encode())
        self.check_newest(manifest.attempt)  # before anything that a newer attempt may be reading is deleted
        self._prune(manifest.attempt, keep, kept_step)

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints that have a manifest, ascending."""
        return sorted(self._complete())

    def manifest(self, step: int) -> Manifest | None:
        """Return the manifest of a step; None if it is missing or damaged."""
        return self._read_manifest(step, self._complete().get(step))

    def manifests(self) -> Iterator[Manifest]:
        """Yield the manifests of all checkpoints, the newest first, without damaged ones."""
        for step, attempt in sorted(self._complete().items(), reverse=True):
            if (manifest := self._read_manifest(step, attempt)) is not None:
                yield manifest

    def base(self) -> str:
        """Return `Manifest.base` of the newest checkpoint; "" if there is none."""
        return next((manifest.base for manifest in self.manifests()), "")

    def has_files(self, manifest: Manifest, names: Iterable[str]) -> bool:
        """Return whether these files of a checkpoint exist and match their checksums, for which they are read."""
        try:
            return all(self._digest(manifest, name) == manifest.files[name] for name in names)
        except (OSError, KeyError):
            return False

    def read_bytes(self, manifest: Manifest, name: str) -> bytes:
        """Return the content of a file of a checkpoint."""
        with self._fs.open_input_stream(f"{self._folder}/{self._step_folder(manifest.step)}/{name}") as stream:
            return stream.read()

    @contextlib.contextmanager
    def open_file(self, manifest: Manifest, name: str) -> Iterator[TensorFile]:
        """Open a file of a checkpoint.

        Raises:
            DamagedFile: it is none that `write_file` has written.
        """
        with self._fs.open_input_file(f"{self._folder}/{self._step_folder(manifest.step)}/{name}") as file:
            yield TensorFile(file)

    def _digest(self, manifest: Manifest, name: str) -> FileDigest:
        size, crc = read_digest(self._fs, f"{self._folder}/{self._step_folder(manifest.step)}/{name}")
        return FileDigest(bytes=size, crc32=crc)

    def _read_manifest(self, step: int, attempt: str | None) -> Manifest | None:
        """Return a manifest; None if it is missing or damaged."""
        if attempt is None:
            return None
        name = f"{attempt}.{_MANIFEST}" if attempt else _MANIFEST
        try:
            with self._fs.open_input_stream(f"{self._folder}/{self._step_folder(step)}/{name}") as stream:
                manifest = Manifest.model_validate_json(stream.read())
        except (FileNotFoundError, ValueError):
            return None
        names_fit = all(_STEP_FILE.match(f"{self._step_folder(step)}/{file}") for file in manifest.files)
        is_of_this = (manifest.step, manifest.attempt) == (step, attempt)
        return manifest if is_of_this and manifest.files and names_fit else None

    def _complete(self) -> dict[int, str]:
        """Return, for each step with a checkpoint that counts, the attempt that wrote the newest one."""
        names = self._names()
        starts = [(match[1], int(match[2])) for name in names if (match := _ATTEMPT_FILE.match(name)) and match[2]]
        complete: dict[int, str] = {}
        for name in names:
            match = _STEP_FILE.match(name)
            if match is None or match[3] != _MANIFEST:
                continue
            step, attempt = int(match[1]), match[2] or ""
            if all(step <= start for later, start in starts if later > attempt):
                complete[step] = max(attempt, complete.get(step, ""))
        return complete

    def _attempts(self) -> set[str]:
        return {match[1] for name in self._names(_ATTEMPTS) if (match := _ATTEMPT_FILE.match(name))}

    def _prune(self, attempt: str, keep: int, kept_step: int | None) -> None:
        """Delete what earlier attempts and earlier steps have left, except for the checkpoints to keep."""
        complete = self._complete()
        kept = {step: complete[step] for step in [*sorted(complete)[-keep:], kept_step] if step in complete}
        files: dict[int, list[tuple[str, str]]] = defaultdict(list)
        for name in self._names():
            if match := _STEP_FILE.match(name):
                files[int(match[1])].append((match[2] or "", name))
        for step, found in files.items():
            obsolete = [
                name for owner, name in found if owner <= attempt and not (step in kept and owner >= kept[step])
            ]
            # The manifest is deleted first, so that a half-deleted checkpoint is ignored.
            for name in sorted(obsolete, key=lambda name: not name.endswith(_MANIFEST)):
                self._fs.delete_file(f"{self._folder}/{name}")
            if len(obsolete) == len(found):
                self._delete_folder(f"{self._folder}/{self._step_folder(step)}")

    def _names(self, below: str = "") -> list[str]:
        """Return the names of all files in the store, or in one of its folders, relative to the store."""
        names = file_names(self._fs, f"{self._folder}/{below}".rstrip("/"))
        return [f"{below}/{name}".lstrip("/") for name in names]

    def _write(self, name: str, data: bytes) -> None:
        """Write a small file whole: object stores do, and elsewhere it is renamed."""
        path = f"{self._folder}/{name}"
        self._create(name.rpartition("/")[0])
        is_local = isinstance(self._fs, fs.LocalFileSystem)
        with self._fs.open_output_stream(f"{path}.part" if is_local else path) as stream:
            stream.write(data)
        if is_local:
            self._fs.move(f"{path}.part", path)

    def _create(self, folder: str) -> None:
        if isinstance(self._fs, fs.LocalFileSystem):
            self._fs.create_dir(f"{self._folder}/{folder}", recursive=True)

    def _delete_folder(self, path: str) -> None:
        if self._fs.get_file_info(path).type == fs.FileType.Directory:
            self._fs.delete_dir(path)

    def _step_folder(self, step: int) -> str:
        return f"step-{step:08d}"
