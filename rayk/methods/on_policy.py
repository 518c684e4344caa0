"""On-policy distillation: the student generates completions, and matches the teacher's distribution at each of their
tokens (generalized knowledge distillation, GKD; Agarwal et al. 2024, arXiv 2306.13649, §3.1).

    L = (1/N) Σ_t T^s·D(p_T ‖ q_T)(y_<t, x),   y ~ q(·|x) with probability λ, else from the data or the teacher

p is the teacher, q the student, N the number of counted tokens of all rows (the paper takes the mean over sequences of
their means: `normalize: sequences`). No gradient flows through the sampling. λ is `student_fraction`, drawn for each
row (TRL draws once per batch). With λ = 0 and the data's rows this is `logit_kd`; with forward KL and λ in between it
is ImitKD (Lin et al. 2020). Rows that the student did not generate can also learn from their own tokens, with weight α
(`hard_label_weight`) as in `logit_kd`.

Reverse KL and Jensen–Shannon weigh tokens where the student has mass. Support `requested` therefore contains the
student's most likely ids as well as the teacher's, and `hidden` the whole vocabulary.

With `form: policy` the loss is a policy gradient (Thinking Machines, 2025) whose reward is log p(y_t) − log q(y_t) of
each token alone. Its expected gradient, given the prefix, is the gradient of reverse KL; its variance is higher. A task
reward of whole completions can be added (`rayk.methods.reward`), as GKD (§3.2) and tinker-cookbook do.

With `adaptive`, λ is DistiLLM's φ (`rayk.rollouts.adaptive`): a row gets a new completion with probability φ·(1 −
progress), and one from the replay buffer with probability φ·progress. Until the buffer is full, completions are new.
"""

import math
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
from rayk.methods.base import Experience, Loss, OnPolicyMethod, Student, Workers
from rayk.methods.decoupled import weigh_tokens
from rayk.methods.limits import check_rewards, exceeds_ratio_limit
from rayk.methods.matching import soft_loss
from rayk.methods.reward import COLUMN, TaskReward
from rayk.rollouts import Policy, Rollout, with_completion, with_requested_ids
from rayk.rollouts.adaptive import AdaptiveSchedule, ReplayBuffer
from rayk.signals.sequence import TokenSequence
from rayk.teachers import Scorer, Teacher, split_by_teacher


class OnPolicy(OnPolicyMethod):
    """On-policy distillation; see the module's docstring. Settings: `rayk.config.OnPolicyConfig`."""

    kind = "on_policy"
    summary = "the student matches the teacher's distribution at every token that the student generated"
    paper = "Agarwal et al. 2024 (GKD); Lin et al. 2020 (ImitKD)"
    needs = "as logit_kd, for new rows at every step; or requested: 4·(k + m) + 8 bytes a token (6·(k + m) + 8)"

    def __init__(self, settings: OnPolicyConfig, teacher: Scorer | None, policy: Policy | None = None):
        super().__init__(settings, teacher, policy)
        self._schedule = settings.adaptive and AdaptiveSchedule(settings.adaptive, settings.student_fraction)
        self._replay = settings.adaptive and ReplayBuffer(settings.adaptive.replay_capacity)
        self._reward = settings.reward and TaskReward(settings.reward)
        self.uses_dropout = settings.form != "policy"
        self._replaying = False
        """Whether the replay buffer was full at the start of the step."""

    @property
    def distance(self) -> str:
        if self.settings.form == "policy":
            return "log_ratio"
        divergence = self.settings.divergence
        return "loss" if divergence.reads_targets else divergence.name.rpartition(":")[2]

    def groups(self, batch: Batch, seeds: Sequence[int], progress: float) -> list[list[int]]:
        """Split the student's rows as the policy batches them; all other rows join the first group."""
        self._replaying = bool(self._replay and self._replay.is_full)
        generated = [row for row, seed in enumerate(seeds) if self._source(_draws(seed), progress) == "student"]
        batches = self.policy.groups([batch.sequences[row] for row in generated])
        groups = [[generated[place] for place in group] for group in batches]
        others = sorted(set(range(batch.rows)) - set(generated))
        return [others + (groups[0] if groups else []), *groups[1:]]

    async def sample(self, batch: Batch, seeds: Sequence[int], progress: float) -> Batch:
        """Draw the source of each row's completion, generate the new completions, and add the ids to request."""
        draws = [_draws(seed) for seed in seeds]
        rows_of: dict[str, list[int]] = {}
        for row, draw in enumerate(draws):
            rows_of.setdefault(self._source(draw, progress), []).append(row)
        rows = list(batch.sequences)
        replayed = {row: self._replay.at(draws[row][2]) for row in rows_of.get("replay", []) if self._replay}
        by_student, by_teacher = await gather(
            [
                self._generate_by_student(rows, seeds, rows_of.get("student", [])),
                self._generate_by_teacher(rows, seeds, rows_of.get("teacher", [])),
            ]
        )
        for row, sequence in {**replayed, **by_student, **by_teacher}.items():
            rows[row] = sequence
        if self.settings.first_share < 1:
            rows = [_count_first(row, self.settings.first_share) if isinstance(row, Rollout) else row for row in rows]
        if self.settings.form == "policy":
            logprobs = await self.policy.logprobs(rows)
            rows = [replace(_rollout(row), logprobs=values) for row, values in zip(rows, logprobs, strict=True)]
        if self._reward:
            rows = [self._reward.score(_rollout(row)) for row in rows]
        rows = await with_requested_ids(self.policy, rows, self.settings.support, self.settings.requested_ids)
        return collate(rows, batch.pad_id)

    async def prepare(self, batch: Batch) -> Experience:
        assert self.teacher is not None
        signals = await self.teacher.ascore(batch, self.settings.support)
        columns = {}
        if self.settings.form == "policy":
            logprobs = torch.from_numpy(np.concatenate([_rollout(row).logprobs for row in batch.sequences]))
            check_rewards(signals.target_logprobs - logprobs, batch, self.settings.reward_limit)
            columns["rollout_logprobs"] = logprobs
        return Experience(batch, signals, columns)

    def synchronize(self, experience: Experience, workers: Workers, step: int) -> Experience:
        if self._reward:
            return self._reward.add_advantages(experience, workers)
        return weigh_tokens(self.settings, experience, workers, step)

    def loss(self, student: Student, experience: Experience) -> Loss:
        if self.settings.form == "policy":
            return self._policy_gradient(student, experience)
        soft, terms = soft_loss(self.settings, student, experience)
        if not self.settings.hard_label_weight:
            return Loss(soft, terms)
        batch = experience.batch
        is_own = torch.tensor([isinstance(row, Rollout) for row in batch.sequences], device=soft.device)
        is_own = is_own.repeat_interleave(batch.offsets.diff().to(soft.device))
        alpha = torch.where(is_own, 0.0, self.settings.hard_label_weight)
        return Loss(alpha * terms["cross_entropy"] + (1 - alpha) * soft, terms)

    def _policy_gradient(self, student: Student, experience: Experience) -> Loss:
        batch, signals = experience.batch, experience.signals
        assert signals is not None
        rollout_logprobs, teacher_logprobs = experience.columns["rollout_logprobs"], signals.target_logprobs
        # Padding columns are never sampled, so they are not part of q (see `rayk.methods.minillm`).
        head = student.head.truncate(signals.vocab_size)
        cross_entropy = linear_cross_entropy(student.hidden(batch), head, batch.targets)
        per_token = log_ratio_policy_loss(
            -cross_entropy, rollout_logprobs, teacher_logprobs, clip=self.settings.ratio_clip,
            rewards=experience.columns.get(COLUMN),
        )  # fmt: skip
        exploded = exceeds_ratio_limit(-cross_entropy, rollout_logprobs, self.settings.ratio_limit)
        terms = {"cross_entropy": cross_entropy, "log_ratio": rollout_logprobs - teacher_logprobs}
        return Loss(per_token, terms, exploded)

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

    def _source(self, draw: np.ndarray, progress: float) -> str:
        """Return where the completion of a row comes from: 'student', 'replay' (an old rollout), 'teacher' or
        'data'."""
        fraction = fresh = self.settings.student_fraction
        if self._schedule and self._replay:
            fraction = self._schedule.fraction
            fresh = fraction * (1 - progress) if self._replaying else fraction
        if draw[0] < fraction:
            return "student" if draw[0] < fresh else "replay"
        return "teacher" if draw[1] < self.settings.teacher_written else "data"

    async def _generate_by_student(
        self, rows: list[TokenSequence], seeds: Sequence[int], chosen: list[int]
    ) -> dict[int, TokenSequence]:
        if not chosen:
            return {}
        rollouts = await self.policy.generate(
            [_example(rows[row]) for row in chosen], self.policy.parameters, [seeds[row] for row in chosen]
        )
        if self._replay:
            self._replay.add(rollouts)
        return dict(zip(chosen, rollouts, strict=True))

    async def _generate_by_teacher(
        self, rows: list[TokenSequence], seeds: Sequence[int], chosen: list[int]
    ) -> dict[int, TokenSequence]:
        if not chosen:
            return {}
        assert self.teacher is not None
        prompts = [_example(rows[row]) for row in chosen]

        async def generate(teacher: Teacher, places: list[int]) -> dict[int, TokenSequence]:
            # A teacher with a prompt of its own writes after that prompt; the student learns the same completion after
            # its own one.
            read = [_example(prompts[place].view(teacher.settings.name)) for place in places]
            completions = await teacher.agenerate(
                [prompt.prompt_ids for prompt in read], self.policy.parameters,
                [seeds[chosen[place]] for place in places],
            )  # fmt: skip
            return {
                chosen[place]: with_completion(prompts[place], completion.token_ids)
                for place, completion in zip(places, completions, strict=True)
            }

        parts = await gather(generate(*part) for part in split_by_teacher(self.teacher, prompts))
        return {row: sequence for part in parts for row, sequence in part.items()}


def _draws(seed: int) -> np.ndarray:
    """Return three uniform random numbers in [0, 1) for a row, from another random stream than its tokens."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 1]))).random(3)


def _count_first(rollout: Rollout, share: float) -> Rollout:
    """Return the rollout with only the first `share` of its counted tokens counted, at least one."""
    places = np.flatnonzero(rollout.counted)
    kept = places[: math.ceil(share * len(places))]
    counted = np.zeros_like(rollout.counted)
    counted[kept] = True
    return replace(rollout, counted=counted, logprobs=rollout.logprobs[: len(kept)])


def _rollout(row: TokenSequence) -> Rollout:
    assert isinstance(row, Rollout)
    return row


def _example(row: TokenSequence) -> Example:
    assert isinstance(row, Example)
    return row
