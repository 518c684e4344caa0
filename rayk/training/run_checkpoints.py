"""Save and restore the state of all ranks: the learner, the method, rows generated ahead, and the best evaluation."""

import functools
import json
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from threading import Thread
from typing import Any

from torch import Tensor

from rayk.errors import InputError, RaykError, RunFailed
from rayk.methods import Method
from rayk.storage.places import first_line
from rayk.storage.tensor_files import DamagedFile, Digest, TensorFile
from rayk.storage.values import join_tensors, split_tensors
from rayk.training import checkpoint_v1
from rayk.training.best import BestEvaluation
from rayk.training.checkpoint import CheckpointStore, FileDigest, Manifest
from rayk.training.experiences import ExperienceSource
from rayk.training.learner import Learner
from rayk.training.learner_state import (
    StatePart,
    StateSource,
    copy_part,
    load_optimizer,
    load_tensors,
    load_weights,
    open_shards,
    optimizer_state,
    trained_weights,
)
from rayk.training.ranks import Ranks

_VALUES = "values"
"""Key of the JSON values in the metadata of a file with values."""


class RunCheckpoints:
    """The checkpoints of a run, as its training loop uses them.

    Every rank copies its part of the state to the CPU and writes it in a thread while training continues; when all
    ranks' files are complete, rank 0 writes the manifest.

    Args:
        keep: number of latest checkpoints to keep.
        base: the fingerprint of the frozen weights (`Manifest.base`).
        kind: `method.kind`.
        tensors: returns further tensors of the state, by name; they are restored in place.

    Attributes:
        saved_step: the step of the checkpoint that was saved or restored last.
        attempt: the name of this group of workers in the store; "" before `restore`.
    """

    def __init__(
        self, store: CheckpointStore, keep: int, ranks: Ranks, learner: Learner, method: Method,
        experiences: ExperienceSource, best: BestEvaluation, base: str, kind: str,
        tensors: Callable[[], dict[str, Tensor]] = dict,
    ):  # fmt: skip
        self._store, self._keep, self._ranks, self._base, self._kind = store, keep, ranks, base, kind
        self._learner, self._method, self._experiences, self._best = learner, method, experiences, best
        self._tensors = tensors
        self.saved_step = 0
        self.attempt = ""
        self._writing: Future[None] | None = None
        self._writer_ranks: Ranks = ranks
        """The ranks in the threads that write."""

    @property
    def location(self) -> str:
        return self._store.location

    @property
    def restarts(self) -> int:
        """The number of attempts before this one."""
        return max(0, int(self.attempt.partition("-")[0] or 1) - 1)

    def restore(self) -> tuple[int, bool]:
        """Begin a new attempt, and load the newest intact checkpoint, if there is one. A collective, before all others
        of this object.

        Returns:
            Its step, and whether the step was evaluated; (0, True) without one.

        Raises:
            AllRanksStop: the store cannot be used, or the checkpoint belongs to another student or method.
        """
        self._begin_attempt()
        self._writer_ranks = self._ranks.for_another_thread()
        step, measured = 0, True
        for candidate in reversed(self._ranks.gather(self._store.steps())[0]):
            if (manifest := self._intact(candidate)) is not None:
                self._ranks.run(functools.partial(self._load, manifest))
                step, measured = candidate, manifest.measured
                break
        self._on_first_rank(lambda: self._store.begin_from(self.attempt, step))
        self.saved_step = step
        return step, measured

    def save(self, step: int, *, is_evaluated: bool) -> None:
        """Copy the state of all ranks after `step` steps, and begin to write it. A collective.

        Args:
            is_evaluated: false if the evaluation after `step` is due, but failed.

        Raises:
            AllRanksStop: the checkpoint before could not be written, or the method's state cannot be stored.
        """
        self.wait()
        self.saved_step = step
        state: dict[str, Tensor] = {}
        numbers: dict[str, float] = {}
        values: list[StatePart] = []

        def collect() -> None:
            state.update(trained_weights(self._learner.module))
            tensors, found = optimizer_state(self._learner.module, self._learner.optimizer)
            state.update(tensors | self._tensors())
            numbers.update(found)
            values.append(self._values(step))

        self._ranks.run(collect)
        part = copy_part(state, self._ranks.rank, self._ranks.gather)
        manifest = Manifest(
            step=step, attempt=self.attempt, world=self._ranks.world, files={}, base=self._base, method=self._kind,
            measured=is_evaluated, best=self._best.state_dict(), numbers=numbers,
        )  # fmt: skip
        kept_step = self._best.step
        self._writing = _start(lambda: self._write(manifest, part, values.pop(), kept_step))

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is complete. A collective.

        Raises:
            AllRanksStop: it could not be written.
        """
        if self._writing is not None:
            problem, self._writing = self._writing.exception(), None
            self._ranks.agree(problem)

    def check_newest(self) -> None:
        """Check that no newer attempt has begun.

        Raises:
            Overtaken: one has.
        """
        self._store.check_newest(self.attempt)

    def check(self) -> None:
        """Check, without waiting, that writing has not failed.

        Raises:
            RunFailed: it has, on some rank.
        """
        if self._writing is not None and self._writing.done():
            self._writing.result()

    def load_best(self) -> None:
        """Load the weights of the best evaluation. A collective.

        Raises:
            AllRanksStop: its checkpoint is missing or damaged.
        """
        assert self._best.step is not None
        manifest = self._intact(self._best.step)

        def load() -> None:
            if manifest is None:
                raise RunFailed(
                    f"The checkpoint of step {self._best.step}, the best evaluation, is missing or damaged in "
                    f"'{self.location}'; to save the student of the last step, resume with evaluation.keep_best null."
                )
            with ExitStack() as stack:
                load_weights(self._learner.module, self._source(manifest, stack))

        self._ranks.run(load)

    def _begin_attempt(self) -> None:
        attempts: list[str] = []

        def register() -> None:
            try:
                attempts.append(self._store.register())
            except OSError as error:
                raise InputError(
                    f"The checkpoints cannot be written to '{self.location}': {first_line(error)}"
                ) from error

        self._on_first_rank(register)
        self.attempt = self._ranks.gather("".join(attempts))[0]

        def check_shared() -> None:
            if not self._store.has_attempt(self.attempt):
                raise RunFailed(
                    f"The workers do not all see the same files in '{self.location}'; the output directory (or "
                    "training.checkpoints) must be one that all nodes share."
                )

        self._ranks.run(check_shared)

    def _on_first_rank(self, work: Callable[[], None]) -> None:
        self._ranks.run(work if self._ranks.rank == 0 else lambda: None)

    def _intact(self, step: int) -> Manifest | None:
        """Return the manifest of a step whose files all match their checksums, else None. A collective: every rank
        reads its share of the files."""
        manifest = self._store.manifest(step)
        share = sorted(manifest.files)[self._ranks.rank :: self._ranks.world] if manifest else []
        is_intact = manifest is not None and self._store.has_files(manifest, share)
        return manifest if all(self._ranks.gather(is_intact)) else None

    def _load(self, manifest: Manifest) -> None:
        if manifest.method not in ("", self._kind):
            raise InputError(
                f"The checkpoint of step {manifest.step} in '{self.location}' was written with method.kind "
                f"'{manifest.method}', and this run has '{self._kind}'; use another output."
            )
        try:
            with ExitStack() as stack:
                source = self._source(manifest, stack)
                load_weights(self._learner.module, source)
                load_optimizer(self._learner.module, self._learner.optimizer, source, manifest.numbers)
                load_tensors(self._tensors(), source)
            methods, rollouts = self._read_values(manifest)
        except DamagedFile as error:
            raise RunFailed(
                f"The checkpoint of step {manifest.step} in '{self.location}' cannot be read: {error}."
            ) from error
        except RaykError as error:
            raise RaykError(
                f"The checkpoint of step {manifest.step} in '{self.location}' belongs to another student: {error}; "
                "use another output."
            ) from error
        self._method.load_state_dict(methods[self._ranks.rank % len(methods)])
        self._experiences.load_state(manifest.step, rollouts)
        self._best.load_state_dict(manifest.best, self._store.steps())

    def _source(self, manifest: Manifest, stack: ExitStack) -> StateSource:
        """Return the stored state; its files are open until `stack` is closed."""
        if not manifest.attempt:
            return checkpoint_v1.read_state(self._store, manifest, self._learner.module, self._learner.optimizer)
        return open_shards(self._store, manifest, stack)

    def _values(self, step: int) -> StatePart:
        """Return what this rank stores beside the learner's state: the method's state, and rows generated ahead."""
        try:
            values, tensors = split_tensors(
                {"method": self._method.state_dict(), "rollouts": self._experiences.state(step)},
                f"values-{self._ranks.rank}.",
            )
        except TypeError as error:
            raise InputError(
                f"The state of method '{self._kind}' cannot be stored: {error}. `state_dict` may return tensors, "
                "numbers, texts, bytes, and lists, tuples, sets and dicts of these."
            ) from error
        return StatePart(list(tensors.items()), {"format": "pt", _VALUES: json.dumps(values)})

    def _read_values(self, manifest: Manifest) -> tuple[list[Any], list[Any]]:
        """Return the method's states, one per worker, and the rows generated ahead by all workers."""
        if not manifest.attempt:
            return checkpoint_v1.read_values(self._store, manifest)
        methods, rollouts = [], []
        for name in manifest.named(".values-"):
            with self._store.open_file(manifest, name) as file:
                values = _join(file)
            methods.append(values["method"])
            rollouts += values["rollouts"]
        return methods, rollouts

    def _write(self, manifest: Manifest, part: StatePart, values: StatePart, kept_step: int | None) -> None:
        """Write this rank's files, and on rank 0 the manifest; runs in a thread on every rank."""
        files: list[tuple[str, Digest]] = []

        def write_files() -> None:
            self._store.check_newest(manifest.attempt)
            for kind, content in (("shard", part), ("values", values)):
                name = f"{kind}-{self._ranks.rank:05d}"
                files.append(
                    self._store.write_file(manifest.attempt, manifest.step, name, content.tensors, content.metadata)
                )

        self._agree(manifest.step, write_files)
        for name, digest in [file for found in self._writer_ranks.gather(files) for file in found]:
            manifest.files[name] = FileDigest(bytes=digest.bytes, crc32=digest.crc32)
        is_first = self._ranks.rank == 0
        self._agree(
            manifest.step, lambda: self._store.write_manifest(manifest, self._keep, kept_step) if is_first else None
        )

    def _agree(self, step: int, work: Callable[[], None]) -> None:
        """Do a part of writing, which fails on every rank if it fails on one.

        Raises:
            RunFailed: it failed.
        """
        problem: RunFailed | None = None
        try:
            work()
        except RunFailed as error:
            problem = error
        except (RaykError, OSError, ValueError) as error:
            problem = RunFailed(f"The checkpoint of step {step} could not be written: {first_line(error)}.")
        problems = [found for found in self._writer_ranks.gather(problem) if found is not None]
        if problems:
            raise problems[0]


def _join(file: TensorFile) -> Any:
    tensors = {name: file.read(name) for name in file.tensors}
    try:
        values = join_tensors(json.loads(file.metadata[_VALUES]), tensors)
        return {"method": values["method"], "rollouts": list(values["rollouts"])}
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFile("its values are damaged") from error


def _start(work: Callable[[], None]) -> Future[None]:
    """Run `work` in a daemon thread, which does not keep a process alive that ends after an error."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            work()
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, name="rayk-checkpoint", daemon=True).start()
    return future
