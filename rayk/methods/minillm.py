"""MiniLLM: reverse KL between whole completions, by policy gradients (Gu et al. 2024, arXiv 2306.08543, §2.2).

    L = (1/N) Σ_t [ w_t·KL(q‖p | y_<t)  −  clip(w_t·q(y_t)/q_rollout(y_t))·R_{t+1} ] + c·L_PT,   y ~ p̃ = αp + (1−α)q

p is the teacher, q the student, R_{t+1} the mean of log p(y_s) − log q(y_s) over the tokens s > t, and w = q/p̃. The
first (single-step) part is the effect of one token, exact over the support; the second (long) part is its effect on
later tokens. Without `single_step` only the second part remains, with the token's own reward: R_t, s ≥ t (the paper's
Eq. 2). The tests of `rayk.losses.policy_gradient` check both by full enumeration. Completions are sampled from p̃
exactly: the student drafts and the teacher verifies (`rayk.rollouts.teacher_mixed`).

L_PT is a loss on plain text, (1−r)·cross-entropy + r·KL(p‖q), so that the student forgets less (`pretraining`).
`form: lmops` computes what the authors' code computes where it differs from the paper (`_FORMS`, README.md).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rayk.config import MiniLLMConfig
from rayk.config.support import Logprob, Requested, TopK
from rayk.data.batches import Batch, collate
from rayk.data.examples import Example
from rayk.engines.speculative import MixedSampling
from rayk.losses import (
    linear_cross_entropy,
    linear_divergence,
    moment_sums,
    policy_loss,
    returns_to_go,
    token_rewards,
    whiten,
)
from rayk.methods.base import Experience, Loss, OnPolicyMethod, Student, Workers
from rayk.methods.limits import check_rewards, exceeds_ratio_limit
from rayk.methods.matching import compared_tokens, match_teacher
from rayk.rollouts import Rollout, with_requested_ids
from rayk.signals.sequence import TokenSequence
from rayk.teachers import split_by_teacher

_PRETRAINING_K = 64  # ids per token of plain text if the method's support needs a rollout


@dataclass(frozen=True)
class _Form:
    """Differences between the paper and the authors' code."""

    discount: float
    include_current: bool
    reward_scaling: float
    reward_clip: float | None
    whitened: bool
    weighted_single_step: bool


_FORMS = {
    "paper": _Form(1.0, False, 1.0, None, False, True),
    "lmops": _Form(0.95, True, 0.5, 100.0, True, False),
}


@dataclass(frozen=True)
class PlainText(Experience):
    """Pre-training text, for L_PT."""


class MiniLLM(OnPolicyMethod):
    """MiniLLM; see the module's docstring. Settings: `rayk.config.MiniLLMConfig`."""

    settings: MiniLLMConfig
    kind = "minillm"
    uses_dropout = False  # as in LMOps; the ratios to the rollouts' log-probs are 1 before an update
    summary = "policy gradients of reverse KL over completions that student and teacher sample together"
    paper = "Gu et al. 2024 §2.2"
    needs = "as on_policy, and about 0.1 calls a token to verify the student's drafts (engine kind transformers)"

    @property
    def minimum_rows(self) -> int:
        return self.settings.minibatches

    @property
    def distance(self) -> str:
        return "reverse_kl" if self.settings.single_step else "loss"

    def groups(self, batch: Batch, seeds: Sequence[int], progress: float) -> list[list[int]]:
        """Return one group for each teacher if teachers sample too, because one verifies many rows in a call."""
        if self.settings.teacher_share:
            assert self.teacher is not None
            return [rows for _, rows in split_by_teacher(self.teacher, batch.sequences)]
        return super().groups(batch, seeds, progress)

    async def sample(self, batch: Batch, seeds: Sequence[int], progress: float) -> Batch:
        """Generate every row's completion by student and teacher together."""
        settings, parameters = self.settings, self.policy.parameters
        prompts = [row for row in batch.sequences if isinstance(row, Example)]
        if settings.teacher_share:
            rollouts = await self._generate_mixed(prompts, seeds)
        else:
            rollouts = await self.policy.generate(prompts, parameters, seeds)
        # Numerator and denominator of the loss's ratio come from the same computation, so that it starts at exactly 1.
        logprobs = await self.policy.logprobs(rollouts)
        rows: list[TokenSequence] = [replace(row, logprobs=own) for row, own in zip(rollouts, logprobs, strict=True)]
        rows = await with_requested_ids(self.policy, rows, settings.support, settings.requested_ids)
        return collate(rows, batch.pad_id)

    async def _generate_mixed(self, prompts: list[Example], seeds: Sequence[int]) -> list[Rollout]:
        """Sample each completion from the mixture of the student and the row's own teacher, teacher by teacher."""
        assert self.teacher is not None
        sampling = MixedSampling(self.settings.teacher_share, self.policy.parameters.max_new_tokens)
        found: dict[int, Rollout] = {}
        for teacher, rows in split_by_teacher(self.teacher, prompts):
            rollouts = await self.policy.generate_mixed(
                [prompts[row] for row in rows], teacher.averify, sampling, [seeds[row] for row in rows]
            )
            found |= zip(rows, rollouts, strict=True)
        return [found[row] for row in range(len(prompts))]

    async def prepare(self, batch: Batch) -> Experience:
        assert self.teacher is not None
        form = _FORMS[self.settings.form]
        rollouts = [row for row in batch.sequences if isinstance(row, Rollout)]
        signals = await self.teacher.ascore(batch, self.settings.support)
        logprobs = _concatenate([row.logprobs for row in rollouts])
        rewards = token_rewards(logprobs, signals.target_logprobs, scaling=form.reward_scaling, clip=form.reward_clip)
        check_rewards(rewards, batch, self.settings.reward_limit)
        returns = returns_to_go(
            _to_rows(rewards, batch), batch.counted_mask,
            # Without the single-step part, a token's own reward belongs to its return.
            include_current=form.include_current or not self.settings.single_step,
            discount=form.discount, length_norm=self.settings.length_norm,
        )  # fmt: skip
        log_weights = torch.zeros_like(logprobs)
        if all(row.log_weights is not None for row in rollouts):
            log_weights = _concatenate([row.log_weights for row in rollouts if row.log_weights is not None])
        columns = {
            "rollout_logprobs": logprobs, "log_weights": log_weights, "rewards": rewards,
            "returns": returns[batch.counted_mask],
        }  # fmt: skip
        return Experience(batch, signals, columns=columns)

    async def prepare_auxiliary(self, batch: Batch) -> Experience:
        """Return plain text with the teacher's signals, of support `topk` if the method's support needs rollouts."""
        settings = self.settings.pretraining
        assert self.teacher is not None and settings is not None
        if not settings.teacher_share:
            return PlainText(batch)
        support = self.settings.support
        if isinstance(support, Requested | Logprob):
            support = TopK(max(support.k, _PRETRAINING_K) if isinstance(support, Requested) else _PRETRAINING_K)
        return PlainText(batch, await self.teacher.ascore(batch, support))

    def synchronize(self, experience: Experience, workers: Workers, step: int) -> Experience:
        """Whiten the returns with their moments over all workers."""
        if not _FORMS[self.settings.form].whitened:
            return experience
        returns = experience.columns["returns"]
        moments = moment_sums(returns, torch.ones_like(returns, dtype=torch.bool))
        global_moments = torch.tensor(workers.sums(moments.tolist()), dtype=torch.float64)
        return replace(experience, columns={**experience.columns, "returns": whiten(returns, global_moments)})

    def updates(self, experience: Experience, seed: int) -> Iterator[Experience]:
        """Return the minibatches of all inner epochs."""
        random = np.random.default_rng(seed)
        text = experience.auxiliary
        for _ in range(self.settings.inner_epochs):
            parts = [self._split_minibatches(random, part) for part in (experience, text) if part is not None]
            for rollouts, *texts in zip(*parts, strict=True):
                yield replace(rollouts, auxiliary=texts[0] if texts else None)

    def _split_minibatches(self, random: np.random.Generator, experience: Experience) -> list[Experience]:
        parts = np.array_split(random.permutation(experience.batch.rows), self.settings.minibatches)
        return [experience.select(sorted(rows.tolist())) for rows in parts]

    def loss(self, student: Student, experience: Experience) -> Loss:
        if isinstance(experience, PlainText):
            return self._text_loss(student, experience)
        return self._rollout_loss(student, experience)

    def _text_loss(self, student: Student, experience: Experience) -> Loss:
        settings, batch, hidden = self.settings.pretraining, experience.batch, student.hidden(experience.batch)
        assert settings is not None
        if experience.signals is None:
            per_token = linear_cross_entropy(hidden, student.head, batch.targets)
        else:
            forward_kl, cross_entropy = linear_divergence(
                hidden, student.head, experience.signals, divergence="forward_kl", targets=batch.targets
            )
            per_token = (1 - settings.teacher_share) * cross_entropy + settings.teacher_share * forward_kl
        return Loss(settings.weight * per_token, {"pretraining": per_token})

    def _rollout_loss(self, student: Student, experience: Experience) -> Loss:
        settings, batch, columns = self.settings, experience.batch, experience.columns
        assert experience.signals is not None
        # Padding columns are never sampled. If they were part of q, the student could reduce the loss by moving mass
        # there.
        head = student.head.truncate(experience.signals.vocab_size)
        reverse_kl: Tensor | None = None
        terms: dict[str, Tensor] = {}
        if settings.single_step:
            match = match_teacher("reverse_kl", student, head, experience, compared=compared_tokens(settings))
            reverse_kl, cross_entropy = match.divergence, match.cross_entropy
            terms |= {"reverse_kl": reverse_kl, **match.terms}
        else:
            cross_entropy = linear_cross_entropy(student.hidden(batch), head, batch.targets)
        assert cross_entropy is not None
        long_term = policy_loss(
            -cross_entropy, columns["rollout_logprobs"], columns["returns"], log_weights=columns["log_weights"],
            clip=settings.ratio_clip,
        )  # fmt: skip
        per_token = long_term
        if reverse_kl is not None:
            weights = columns["log_weights"].exp() if _FORMS[settings.form].weighted_single_step else 1.0
            per_token = long_term + weights * reverse_kl
        terms |= {"long_term": long_term, "reward": columns["rewards"], "weight": columns["log_weights"].exp()}
        # The ratio includes the weight, as in the loss: a token from the teacher may become far more likely without
        # harm.
        sampled = columns["rollout_logprobs"] - columns["log_weights"]
        exploded = exceeds_ratio_limit(-cross_entropy, sampled, settings.ratio_limit)
        return Loss(per_token, terms, exploded)


def _concatenate(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts))


def _to_rows(values: Tensor, batch: Batch) -> Tensor:
    """Place the values of the counted tokens [tokens] at their positions, [rows, length]; 0 elsewhere."""
    return torch.zeros(batch.counted_mask.shape, dtype=values.dtype).masked_scatter(batch.counted_mask, values)
