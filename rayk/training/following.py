"""The weights of teachers that follow the student: computed on the training workers, published after their updates.

    θ_T ← d·θ_T + (1−d)·θ    after every n-th optimizer step

θ are the student's trained parameters, θ_T the teacher's, d is `ema` and n is `every` (mean teacher, Tarvainen and
Valpola 2017, arXiv 1703.01780). Buffers are copied. Before training, θ_T = θ.
"""

import asyncio
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from rayk.models import CausalLM
from rayk.serving.event_loop import run_in_background, wait_for
from rayk.serving.weights import trainable_state_dict
from rayk.teachers import Teacher
from rayk.teachers.following import FollowingTeacher, use_weights_after

_PREFIX = "teacher."


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


class FollowingTeachers:
    """The teachers of a run that follow the student, on one worker.

    Args:
        publishes: whether this worker sends the weights; true on one worker.
        max_staleness: steps by which training may be ahead of the weights that score a step (`rollouts.max_staleness`).
    """

    def __init__(self, teachers: Iterable[Teacher], model: CausalLM, *, publishes: bool, max_staleness: int):
        self._teachers = [teacher for teacher in teachers if isinstance(teacher, FollowingTeacher)]
        self._weights = {
            teacher.settings.name: FollowingWeights(model, teacher.settings.ema, teacher.settings.every)
            for teacher in self._teachers
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
        """Return the version of the teachers' weights for `step` (of several, the oldest), and its age in steps."""
        if not self._teachers:
            return {}
        version = min(teacher.version_after(self._steps_for(step)) for teacher in self._teachers)
        return {"teacher_version": version, "teacher_staleness": step - version}

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
        tensors: Mapping[str, Tensor] = self._weights[teacher.settings.name].tensors
        teacher.publish(teacher.version_after(steps), tensors, publishes=self._publishes)

    async def _note_trained(self, steps: int) -> None:
        async with self._changed:
            self._trained = steps
            self._changed.notify_all()
