"""On-policy distillation: the student writes, the teacher says at each of its tokens what it would have written, and
the student matches that (generalised knowledge distillation, GKD; Agarwal et al. 2024, arXiv 2306.13649, §3.1).

    L = (1/N) Σ_t T^s·D(p_T ‖ q_T)(y_<t, x),   y ~ q(·|x) with probability λ, else from the data or the teacher

p is the teacher, q the student, N the counted tokens of all rows (the paper takes the mean over sequences of each one's
mean). No gradient goes through the sampling. λ is `student_fraction`, drawn row by row (TRL draws once a batch). With
the data's rows alone (λ = 0) this is `logit_kd`; with forward KL and λ in between it is ImitKD (Lin et al. 2020).

Reverse KL and Jensen–Shannon put their weight where the student has mass: support `requested` asks the teacher about
the student's likeliest ids as well as its own (ALGORITHMS §22), `hidden` about all.
"""

import asyncio
from collections.abc import Sequence as Ordered
from dataclasses import replace

import numpy as np

from rayk.data.batches import Batch, collate
from rayk.data.examples import Example
from rayk.losses import linear_divergence
from rayk.methods.base import Experience, Loss, Method, Student
from rayk.rollouts import completed
from rayk.sequences import Sequence
from rayk.support import Requested
from rayk.teachers import Teacher


class OnPolicy(Method):
    """See the module's docstring; the settings are `rayk.config.OnPolicyConfig`."""

    kind = "on_policy"
    summary = "the student matches the teacher's distribution at every token the student itself wrote"
    paper = "Agarwal et al. 2024 (GKD); Lin et al. 2020 (ImitKD)"
    needs = "as logit_kd, of new rows at every step; or requested: 4·(k + m) + 8 bytes a token (6·(k + m) + 8)"

    async def sample(self, batch: Batch, seeds: Ordered[int]) -> Batch:
        """Have student and teacher write the rows whose lot it is; name the ids to ask about."""
        assert self.policy is not None
        writers = [self._writer(seed) for seed in seeds]
        rows = list(batch.sequences)
        written = await asyncio.gather(
            self._written_by_student(rows, seeds, [row for row, writer in enumerate(writers) if writer == "student"]),
            self._written_by_teacher(rows, seeds, [row for row, writer in enumerate(writers) if writer == "teacher"]),
        )
        for found in written:
            for row, sequence in found.items():
                rows[row] = sequence
        if isinstance(self.settings.support, Requested):
            ids = await self.policy.top_ids(rows, self.settings.requested_ids)
            rows = [replace(row, requested=each) for row, each in zip(rows, ids, strict=True)]
        return collate(rows, batch.pad_id)

    async def prepare(self, batch: Batch) -> Experience:
        assert self.teacher is not None
        return Experience(batch, await self.teacher.ascore(batch, self.settings.support))

    def loss(self, student: Student, experience: Experience) -> Loss:
        settings, batch = self.settings, experience.batch
        assert experience.signals is not None
        divergence, cross_entropy = linear_divergence(
            student.hidden(batch),
            student.head,
            experience.signals,
            divergence=settings.divergence.name,
            temperature=settings.temperature,
            targets=batch.targets,
            **settings.divergence.options,
        )
        soft = divergence * settings.temperature**2 if settings.temperature_squared else divergence
        return Loss(soft, {"cross_entropy": cross_entropy, settings.divergence.name: divergence})

    def _writer(self, seed: int) -> str:
        """Who writes the row of this seed: 'student', 'teacher', or 'data'."""
        # Not the stream of the row's own tokens, whose seed it is.
        lots = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 1]))).random(2)
        if lots[0] < self.settings.student_fraction:
            return "student"
        return "teacher" if lots[1] < self.settings.teacher_written else "data"

    async def _written_by_student(
        self, rows: list[Sequence], seeds: Ordered[int], chosen: list[int]
    ) -> dict[int, Sequence]:
        if not chosen:
            return {}
        assert self.policy is not None
        rollouts = await self.policy.generate(
            [_example(rows[row]) for row in chosen], self.policy.parameters, [seeds[row] for row in chosen]
        )
        return dict(zip(chosen, rollouts, strict=True))

    async def _written_by_teacher(
        self, rows: list[Sequence], seeds: Ordered[int], chosen: list[int]
    ) -> dict[int, Sequence]:
        if not chosen:
            return {}
        assert self.policy is not None
        assert isinstance(self.teacher, Teacher)
        prompts = [_example(rows[row]) for row in chosen]
        completions = await self.teacher.agenerate(
            [prompt.prompt_ids for prompt in prompts], self.policy.parameters, [seeds[row] for row in chosen]
        )
        return {
            row: completed(prompt, completion.token_ids)
            for row, prompt, completion in zip(chosen, prompts, completions, strict=True)
        }


def _example(row: Sequence) -> Example:
    assert isinstance(row, Example)
    return row
