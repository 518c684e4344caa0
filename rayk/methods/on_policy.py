"""On-policy distillation: the student writes, the teacher says at each of its tokens what it would have written, and
the student matches that (generalised knowledge distillation, GKD; Agarwal et al. 2024, arXiv 2306.13649, §3.1).

    L = (1/N) Σ_t T^s·D(p_T ‖ q_T)(y_<t, x),   y ~ q(·|x) with probability λ, else from the data or the teacher

p is the teacher, q the student, N the counted tokens of all rows (the paper takes the mean over sequences of each one's
mean). No gradient goes through the sampling. λ is `student_fraction`, drawn row by row (TRL draws once a batch). With
the data's rows alone (λ = 0) this is `logit_kd`; with forward KL and λ in between it is ImitKD (Lin et al. 2020).

Reverse KL and Jensen–Shannon put their weight where the student has mass: support `requested` asks the teacher about
the student's likeliest ids as well as its own (ALGORITHMS §22), `hidden` about all.

With `form: policy` the loss is a policy gradient instead (Thinking Machines, 2025): each token's reward is log p(y_t) −
log q(y_t), seen by itself. Its expected gradient, given the prefix, is reverse KL's; its noise is not.

With `adaptive`, λ is DistiLLM's φ (`rayk.rollouts.adaptive`): with probability φ·(1 − progress) the student writes a
new completion, else, with probability φ in all, one from its buffer is learned from again; until the buffer is full it
always writes a new one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from rayk.config import OnPolicyConfig
from rayk.data.batches import Batch, collate
from rayk.data.examples import Example
from rayk.engines.batching import gather
from rayk.losses import linear_cross_entropy, log_ratio_policy_loss
from rayk.methods.base import Experience, Loss, Method, Student
from rayk.methods.limits import check_rewards, ratio_exploded
from rayk.methods.matching import soft_loss
from rayk.rollouts import Policy, Rollout, completed, with_own_ids
from rayk.rollouts.adaptive import AdaptiveSchedule, ReplayBuffer
from rayk.signals.sequence import TokenSequence
from rayk.teachers import Scorer, Teacher


class OnPolicy(Method):
    """See the module's docstring; the settings are `rayk.config.OnPolicyConfig`."""

    kind = "on_policy"
    summary = "the student matches the teacher's distribution at every token the student itself wrote"
    paper = "Agarwal et al. 2024 (GKD); Lin et al. 2020 (ImitKD)"
    needs = "as logit_kd, of new rows at every step; or requested: 4·(k + m) + 8 bytes a token (6·(k + m) + 8)"

    def __init__(self, settings: OnPolicyConfig, teacher: Scorer | None, policy: Policy | None = None, **parts: Any):
        super().__init__(settings, teacher, policy, **parts)
        self._schedule = settings.adaptive and AdaptiveSchedule(settings.adaptive, settings.student_fraction)
        self._replay = settings.adaptive and ReplayBuffer(settings.adaptive.replay_capacity)
        self._replaying = False
        """Whether the buffer was full as the step began; what the step itself adds does not count."""

    def groups(self, batch: Batch, seeds: Sequence[int], progress: float) -> list[list[int]]:
        """As the policy writes them; rows that it does not write go first."""
        assert self.policy is not None
        self._replaying = bool(self._replay and self._replay.full)
        own = [row for row, seed in enumerate(seeds) if self._writer(_lots(seed), progress) == "student"]
        written = self.policy.groups([batch.sequences[row] for row in own])
        groups = [[own[place] for place in group] for group in written]
        others = sorted(set(range(batch.rows)) - set(own))
        return [others + (groups[0] if groups else []), *groups[1:]]

    async def sample(self, batch: Batch, seeds: Sequence[int], progress: float) -> Batch:
        """Have student and teacher write the rows whose lot it is; name the ids to ask about."""
        assert self.policy is not None
        lots = [_lots(seed) for seed in seeds]
        rows_of: dict[str, list[int]] = {}
        for row, lot in enumerate(lots):
            rows_of.setdefault(self._writer(lot, progress), []).append(row)
        rows = list(batch.sequences)
        replayed = {row: self._replay.at(lots[row][2]) for row in rows_of.get("replay", []) if self._replay}
        written = await gather(
            [
                self._written_by_student(rows, seeds, rows_of.get("student", [])),
                self._written_by_teacher(rows, seeds, rows_of.get("teacher", [])),
            ]
        )
        for row, sequence in {**replayed, **written[0], **written[1]}.items():
            rows[row] = sequence
        if self.settings.form == "policy":
            logprobs = await self.policy.logprobs(rows)
            rows = [replace(_rollout(row), logprobs=own) for row, own in zip(rows, logprobs, strict=True)]
        rows = await with_own_ids(self.policy, rows, self.settings.support, self.settings.requested_ids)
        return collate(rows, batch.pad_id)

    async def prepare(self, batch: Batch) -> Experience:
        assert self.teacher is not None
        signals = await self.teacher.ascore(batch, self.settings.support)
        columns = {}
        if self.settings.form == "policy":
            own = torch.from_numpy(np.concatenate([_rollout(row).logprobs for row in batch.sequences]))
            check_rewards(signals.target_logprobs - own, batch, self.settings.reward_limit)
            columns["rollout_logprobs"] = own
        return Experience(batch, signals, columns)

    def loss(self, student: Student, experience: Experience) -> Loss:
        if self.settings.form == "policy":
            return self._policy_gradient(student, experience)
        return Loss(*soft_loss(self.settings, student, experience))

    def _policy_gradient(self, student: Student, experience: Experience) -> Loss:
        batch, signals = experience.batch, experience.signals
        assert signals is not None
        own, theirs = experience.columns["rollout_logprobs"], signals.target_logprobs
        # Padding is never drawn, so it is no part of q (see `rayk.methods.minillm`).
        head = student.head.first(signals.vocab_size)
        cross_entropy = linear_cross_entropy(student.hidden(batch), head, batch.targets)
        per_token = log_ratio_policy_loss(-cross_entropy, own, theirs, clip=self.settings.ratio_clip)
        exploded = ratio_exploded(-cross_entropy, own, self.settings.ratio_limit)
        return Loss(per_token, {"cross_entropy": cross_entropy, "log_ratio": own - theirs}, exploded)

    def on_evaluation(self, metrics: Mapping[str, float]) -> None:
        if self._schedule:
            self._schedule.on_evaluation(metrics["loss"])

    def state_dict(self) -> dict[str, Any]:
        if not self._schedule or not self._replay:
            return {}
        return {"schedule": self._schedule.state_dict(), "replay": self._replay.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._schedule and self._replay:
            self._schedule.load_state_dict(state["schedule"])
            self._replay.load_state_dict(state["replay"])

    def _writer(self, lot: np.ndarray, progress: float) -> str:
        """Who writes the row that drew `lot`: 'student', 'replay' (the student, once), 'teacher', or 'data'."""
        fraction = fresh = self.settings.student_fraction
        if self._schedule and self._replay:
            fraction = self._schedule.fraction
            fresh = fraction * (1 - progress) if self._replaying else fraction
        if lot[0] < fraction:
            return "student" if lot[0] < fresh else "replay"
        return "teacher" if lot[1] < self.settings.teacher_written else "data"

    async def _written_by_student(
        self, rows: list[TokenSequence], seeds: Sequence[int], chosen: list[int]
    ) -> dict[int, TokenSequence]:
        if not chosen:
            return {}
        assert self.policy is not None
        rollouts = await self.policy.generate(
            [_example(rows[row]) for row in chosen], self.policy.parameters, [seeds[row] for row in chosen]
        )
        if self._replay:
            self._replay.add(rollouts)
        return dict(zip(chosen, rollouts, strict=True))

    async def _written_by_teacher(
        self, rows: list[TokenSequence], seeds: Sequence[int], chosen: list[int]
    ) -> dict[int, TokenSequence]:
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


def _lots(seed: int) -> np.ndarray:
    """A row's lots, [3] in [0, 1); not of the stream of the row's own tokens, whose seed it is."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 1]))).random(3)


def _rollout(row: TokenSequence) -> Rollout:
    assert isinstance(row, Rollout)
    return row


def _example(row: TokenSequence) -> Example:
    assert isinstance(row, Example)
    return row
