"""The weights of teachers that follow a student: computed on the training workers, published after their updates.

    θ_T ← d·θ_T + (1−d)·θ    after every n-th optimizer step

θ are the trained parameters of this run's student, θ_T the teacher's, d is `ema` and n is `every` (mean teacher,
Tarvainen and Valpola 2017, arXiv 1703.01780). Buffers are copied. Before training, θ_T = θ.

A teacher that is the student of another run has the weights of that run's newest checkpoint instead (codistillation,
Anil et al. 2018, arXiv 1804.03235).
"""

import asyncio
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn

from rayk.config import StudentConfig, TeacherConfig, load_config
from rayk.config.paths import RUN_CONFIG
from rayk.errors import InputError, RunFailed
from rayk.models import CausalLM, load_model
from rayk.models.student import plan_model
from rayk.serving.event_loop import run_in_background, wait_for
from rayk.serving.weights import trainable_state_dict
from rayk.storage.tensor_files import DamagedFile
from rayk.teachers import Teacher
from rayk.teachers.following import FollowingTeacher, use_weights_after
from rayk.training.checkpoint import CheckpointStore, Manifest
from rayk.training.learner_state import open_shards, read_student

_PREFIX = "teacher."
_TRIES = 3
_KEPT_VERSIONS = 64


class FollowingWeights:
    """θ_T for one teacher, on the student's device; no copy if it always equals θ.

    Args:
        model: the student.
        decay: d.
        every: n.
    """

    def __init__(self, model: CausalLM, decay: float, every: int):
        self._model, self._decay, self._every = model, decay, every
        is_equal = not decay and every == 1
        self._copies = None if is_equal else {name: t.detach().clone() for name, t in self._student().items()}

    @torch.no_grad()
    def update(self, steps: int) -> bool:
        """Follow the student after `steps` optimizer steps; return whether this was an update."""
        if steps % self._every:
            return False
        student = self._student()
        for name, copied in self.state.items():
            if self._decay and isinstance(student[name], nn.Parameter):
                copied.lerp_(student[name], 1 - self._decay)
            else:
                copied.copy_(student[name])
        return True

    def read(self, _version: int) -> Mapping[str, Tensor]:
        """Return the weights for the newest version of the teacher."""
        return self.tensors

    def metrics(self, _version: int) -> dict[str, int]:
        """Return nothing: `FollowingTeachers.metrics` describes the version."""
        return {}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The current weights, by their names in `trainable_state_dict`."""
        return self._student() if self._copies is None else self._copies

    @property
    def state(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint must contain in addition to the student's."""
        return self._copies or {}

    def _student(self) -> dict[str, Tensor]:
        return trainable_state_dict(self._model)


class OtherRunWeights:
    """The weights of another run's student: of its newest checkpoint, or of `model` before its first one.

    Args:
        settings: the teacher, with `follows: {run: …}`.
        reads: whether this worker reads the weights.
    """

    def __init__(self, settings: TeacherConfig, *, reads: bool):
        assert settings.followed_run is not None
        self._settings, self._reads = settings, reads
        self._folder = Path(settings.followed_run)
        self._read: tuple[str, int] | None = None
        self._steps: dict[int, int] = {}

    def update(self, steps: int) -> bool:
        """Return whether a newer checkpoint is looked for after `steps` optimizer steps of this run."""
        return steps % self._settings.every == 0

    def read(self, version: int) -> Mapping[str, Tensor] | None:
        """Read the weights for a version of the teacher; return None if they are those of the version before.

        Raises:
            InputError: the other run trains an adapter, has rounds, or trains another model than the teacher's.
            RunFailed: its newest checkpoint cannot be read.
        """
        if not self._reads:
            return {}
        store = self._open_store()
        for _ in range(_TRIES):
            try:
                manifest = next(store.manifests(), None) if store is not None else None
                found = (manifest.attempt, manifest.step) if manifest is not None else ("", 0)
                # A checkpoint that has disappeared, or whose run starts anew, leaves the teacher as it is.
                if found == self._read or (manifest is None and self._read is not None):
                    self._note(version, self._steps[max(self._steps)])
                    return None
                tensors = self._initial() if manifest is None or store is None else self._stored(store, manifest)
            except (OSError, DamagedFile):  # deleted meanwhile, because the other run has written newer ones
                continue
            self._read = found
            self._note(version, found[1])
            return tensors
        raise RunFailed(
            f"Teacher '{self._settings.name}': the newest checkpoint of the run in '{self._folder}' cannot be read."
        )

    @property
    def state(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint of this run must contain: none."""
        return {}

    def metrics(self, version: int) -> dict[str, int]:
        """Return the step of the checkpoint that a version of the teacher has, on the worker that reads; 0: the weights
        before training."""
        return {"other_run_step": self._steps[version]} if self._reads else {}

    def _note(self, version: int, step: int) -> None:
        self._steps[version] = step
        while len(self._steps) > _KEPT_VERSIONS:
            del self._steps[min(self._steps)]

    def _open_store(self) -> CheckpointStore | None:
        """Return the other run's checkpoints; None if it has not started yet."""
        file = self._folder / RUN_CONFIG
        if not file.is_file():
            return None
        config = load_config(file, output=str(self._folder))
        if config.student.lora is not None or config.rounds > 1:
            kind = "trains an adapter" if config.student.lora is not None else "has rounds"
            raise InputError(
                f"Teacher '{self._settings.name}': the run in '{self._folder}' {kind}, which cannot be followed."
            )
        return CheckpointStore(config.checkpoints)

    def _initial(self) -> Mapping[str, Tensor]:
        assert self._settings.model is not None
        return trainable_state_dict(
            load_model(self._settings.model, trust_remote_code=self._settings.trust_remote_code)
        )

    def _stored(self, store: CheckpointStore, manifest: Manifest) -> Mapping[str, Tensor]:
        with ExitStack() as stack:
            tensors = read_student(open_shards(store, manifest, stack))
        if self._read is None or not self._read[1]:  # the first checkpoint that is read
            self._check_shapes(tensors)
        return tensors

    def _check_shapes(self, tensors: Mapping[str, Tensor]) -> None:
        """Check that `tensors` are weights for the teacher's `model`, which the replicas have loaded."""
        settings = self._settings
        model = plan_model(
            StudentConfig(model=settings.model, trust_remote_code=settings.trust_remote_code), tokenizer=None
        )
        expected = {name: tuple(tensor.shape) for name, tensor in trainable_state_dict(model).items()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if different := sorted(name for name in expected | found if expected.get(name) != found.get(name)):
            name = different[0]
            raise InputError(
                f"Teacher '{settings.name}': the run in '{self._folder}' trains another model than the teacher's "
                f"'{settings.model}': {len(different)} tensors have another name or shape, such as {name}, which is "
                f"{found.get(name, 'missing')} there and {expected.get(name, 'missing')} in the teacher. Set 'model' "
                "to the model that the other run trains."
            )


def _make_weights(settings: TeacherConfig, model: CausalLM, *, reads: bool) -> FollowingWeights | OtherRunWeights:
    if settings.followed_run is not None:
        return OtherRunWeights(settings, reads=reads)
    return FollowingWeights(model, settings.ema, settings.every)


class FollowingTeachers:
    """The teachers of a run that follow a student, on one worker.

    Args:
        publishes: whether this worker sends the weights; true on one worker.
        max_staleness: steps by which training may be ahead of the weights that score a step (`rollouts.max_staleness`).
    """

    def __init__(self, teachers: Iterable[Teacher], model: CausalLM, *, publishes: bool, max_staleness: int):
        self._teachers = [teacher for teacher in teachers if isinstance(teacher, FollowingTeacher)]
        self._weights = {
            teacher.settings.name: _make_weights(teacher.settings, model, reads=publishes) for teacher in self._teachers
        }
        self._publishes, self._max_staleness = publishes, max_staleness
        self._first = self._trained = 0
        self._changed = asyncio.Condition()

    def __bool__(self) -> bool:
        return bool(self._teachers)

    def begin(self, attempt: str, steps: int) -> None:
        """Publish the weights with which an attempt starts after `steps` optimizer steps."""
        self._first = self._trained = steps
        for teacher in self._teachers:
            teacher.begin(attempt, publishes=self._publishes)
            self._publish(teacher, steps)

    def update(self, steps: int) -> None:
        """Follow the student after `steps` optimizer steps, and publish the teachers' new weights."""
        # Weights first: if publishing fails, the checkpoint of this step contains all of them.
        for teacher in [each for each in self._teachers if self._weights[each.settings.name].update(steps)]:
            self._publish(teacher, steps)
        wait_for(run_in_background(self._note_trained(steps)))

    async def use_weights_of(self, step: int) -> None:
        """Wait until the teachers' weights for `step` (from 0) are known, and request signals of this task with them.

        They are those after `step` − `max_staleness` optimizer steps, as for rollouts, or those with which the attempt
        started.
        """
        if not self._teachers:
            return
        steps = self._steps_for(step)
        needed = max(teacher.version_after(steps) for teacher in self._teachers)
        async with self._changed:
            await self._changed.wait_for(lambda: self._trained >= needed)
        use_weights_after(steps)

    def metrics(self, step: int) -> dict[str, int]:
        """Return the version of the teachers' weights for `step` (of several, the oldest), and its age in steps; of
        students of other runs also the step of their checkpoint, on the worker that publishes."""
        if not self._teachers:
            return {}
        versions = {teacher.settings.name: teacher.version_after(self._steps_for(step)) for teacher in self._teachers}
        oldest = min(versions.values())
        found = {"teacher_version": oldest, "teacher_staleness": step - oldest}
        for name, weights in self._weights.items():
            for key, value in weights.metrics(versions[name]).items():
                found[key] = min(value, found.get(key, value))
        return found

    @property
    def state(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint."""
        return {
            f"{_PREFIX}{name}.{key}": tensor
            for name, weights in self._weights.items()
            for key, tensor in weights.state.items()
        }

    def _steps_for(self, step: int) -> int:
        return max(self._first, step - self._max_staleness)

    def _publish(self, teacher: FollowingTeacher, steps: int) -> None:
        version = teacher.version_after(steps)
        tensors = self._weights[teacher.settings.name].read(version)
        teacher.publish(version, tensors, publishes=self._publishes)

    async def _note_trained(self, steps: int) -> None:
        async with self._changed:
            self._trained = steps
            self._changed.notify_all()
