"""Values of a step's row in `metrics.jsonl` for each of several teachers."""

from collections.abc import Mapping

import torch

from rayk.methods import Experience
from rayk.teachers import Teacher
from rayk.training.averaging import TeacherGroups
from rayk.training.ranks import Ranks


class TeacherMetrics:
    """Numbers of tokens, and times of scoring, by teacher; nothing for a single teacher.

    Args:
        teachers: clients of all teachers that run during training, by name.
        groups: the teachers of the run's route; None without a route.
    """

    def __init__(self, teachers: Mapping[str, Teacher], groups: TeacherGroups | None, ranks: Ranks):
        self._teachers = teachers if len(teachers) > 1 else {}
        self._groups, self._ranks = groups, ranks
        self._seconds = dict.fromkeys(self._teachers, 0.0)

    def of_step(self, experience: Experience) -> dict[str, float]:
        """Return the values of a step. A collective.

        `teacher/NAME/tokens` is the number of the step's counted tokens, and
        `teacher/NAME/score_seconds` the time since the last step in which requests for signals were open, those for
        later steps and for evaluations included: the mean over the workers.
        """
        names, local = list[str](), list[float]()
        for name, teacher in self._teachers.items():
            before, self._seconds[name] = self._seconds[name], teacher.scoring.seconds
            names.append(f"teacher/{name}/score_seconds")
            local.append((self._seconds[name] - before) / self._ranks.world)
        if self._groups is not None and experience.has_token_units:
            names += self._groups.metric_names("tokens")
            local += torch.bincount(self._groups.of_tokens(experience), minlength=self._groups.count).tolist()
        return dict(zip(names, self._ranks.sums(local), strict=True)) if names else {}
