"""MiniLLM: reverse KL between whole completions, by policy gradients (Gu et al. 2024, arXiv 2306.08543, §2.2).

    L = (1/N) Σ_t [ w_t·KL(q‖p | y_<t)  −  clip(w_t·q(y_t)/q_rollout(y_t))·R_{t+1} ] + c·L_PT,   y ~ p̃ = αp + (1−α)q

p is the teacher, q the student, R_{t+1} the mean of log p(y_s) − log q(y_s) over the tokens s > t, w = q/p̃. The first
part, which one token decides, is exact over the support; the second says what a token does to those after it. Without
`single_step` there is the second part alone, and a token's own reward belongs to it: R_t, s ≥ t (the paper's Eq. 2).
Both are written in `rayk.losses`, where their tests hold them against full enumeration. Completions are drawn from p̃
exactly: the student drafts and the teacher verifies (`rayk.rollouts.teacher_mixed`).

L_PT is a loss on plain text, (1−r)·cross-entropy + r·KL(p‖q), so that the student forgets less (`pretraining`).
`form: lmops` is what the authors' code runs instead of what the paper says (ALGORITHMS §1).
"""

from collections.abc import Callable, Iterator, Sequence
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
from rayk.methods.base import Experience, Loss, Method, Student
from rayk.methods.limits import check_rewards, ratio_exploded
from rayk.methods.matching import with_masses
from rayk.rollouts import Rollout, with_own_ids
from rayk.signals.sequence import TokenSequence
from rayk.teachers import Teacher

_PRETRAINING_K = 64  # where the support would name ids, which plain text does not


@dataclass(frozen=True)
class _Form:
    """What the paper and the authors' code do differently."""

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


class MiniLLM(Method):
    """See the module's docstring; the settings are `rayk.config.MiniLLMConfig`."""

    settings: MiniLLMConfig
    kind = "minillm"
    summary = "policy gradients of reverse KL over completions that student and teacher write together"
    paper = "Gu et al. 2024 §2.2"
    needs = "as on_policy, and about .1 calls a token to verify what the student drafts (engine kind transformers)"

    @property
    def fewest_rows(self) -> int:
        return self.settings.minibatches

    def groups(self, batch: Batch, seeds: Sequence[int], progress: float) -> list[list[int]]:
        """As the policy writes them; all at once where the teacher writes with it, which takes many rows a call."""
        assert self.policy is not None
        if self.settings.teacher_share:
            return super().groups(batch, seeds, progress)
        return self.policy.groups(batch.sequences)

    async def sample(self, batch: Batch, seeds: Sequence[int], progress: float) -> Batch:
        """Have student and teacher write every row's completion."""
        assert self.policy is not None
        settings, parameters = self.settings, self.policy.parameters
        prompts = [row for row in batch.sequences if isinstance(row, Example)]
        if settings.teacher_share:
            assert isinstance(self.teacher, Teacher)
            sampling = MixedSampling(settings.teacher_share, parameters.max_new_tokens)
            rollouts = await self.policy.generate_mixed(prompts, self.teacher.averify, sampling, seeds)
        else:
            rollouts = await self.policy.generate(prompts, parameters, seeds)
        # The ratio of the loss is between two of the same computation, so that it is 1 before the student has moved.
        logprobs = await self.policy.logprobs(rollouts)
        rows: list[TokenSequence] = [replace(row, logprobs=each) for row, each in zip(rollouts, logprobs, strict=True)]
        rows = await with_own_ids(self.policy, rows, settings.support, settings.requested_ids)
        return collate(rows, batch.pad_id)

    async def prepare(self, batch: Batch) -> Experience:
        rollouts = [row for row in batch.sequences if isinstance(row, Rollout)]
        return await (self._of_rollouts(batch, rollouts) if rollouts else self._of_rows(batch))

    async def _of_rollouts(self, batch: Batch, rollouts: list[Rollout]) -> Experience:
        assert self.teacher is not None
        form = _FORMS[self.settings.form]
        signals = await self.teacher.ascore(batch, self.settings.support)
        logprobs = _joined([row.logprobs for row in rollouts])
        rewards = token_rewards(logprobs, signals.target_logprobs, scaling=form.reward_scaling, clip=form.reward_clip)
        check_rewards(rewards, batch, self.settings.reward_limit)
        returns = returns_to_go(
            _in_rows(rewards, batch), batch.counted_mask,
            # What the single-step part does not say of a token, its own reward must.
            include_current=form.include_current or not self.settings.single_step,
            discount=form.discount, length_norm=self.settings.length_norm,
        )  # fmt: skip
        log_weights = torch.zeros_like(logprobs)
        if all(row.log_weights is not None for row in rollouts):
            log_weights = _joined([row.log_weights for row in rollouts if row.log_weights is not None])
        columns = {
            "rollout_logprobs": logprobs, "log_weights": log_weights, "rewards": rewards,
            "returns": returns[batch.counted_mask],
        }  # fmt: skip
        return Experience(batch, signals, columns=columns)

    async def _of_rows(self, batch: Batch) -> Experience:
        """Plain text. The teacher is asked for what `topk` or `hidden` say, since plain text names no ids."""
        settings = self.settings.pretraining
        assert self.teacher is not None and settings is not None
        if not settings.teacher_share:
            return Experience(batch)
        support = self.settings.support
        if isinstance(support, Requested | Logprob):
            support = TopK(max(support.k, _PRETRAINING_K) if isinstance(support, Requested) else _PRETRAINING_K)
        return Experience(batch, await self.teacher.ascore(batch, support))

    def together(self, experience: Experience, sums: Callable[[list[float]], list[float]]) -> Experience:
        """Whiten the returns, by their moments over all workers."""
        if not _FORMS[self.settings.form].whitened:
            return experience
        returns = experience.columns["returns"]
        moments = moment_sums(returns, torch.ones_like(returns, dtype=torch.bool))
        whole = torch.tensor(sums(moments.tolist()), dtype=torch.float64)
        return replace(experience, columns={**experience.columns, "returns": whiten(returns, whole)})

    def updates(self, experience: Experience, seed: int) -> Iterator[Experience]:
        """The inner epochs' minibatches."""
        random = np.random.default_rng(seed)
        text = experience.beside
        for _ in range(self.settings.inner_epochs):
            parts = [self._minibatches(random, each) for each in (experience, text) if each is not None]
            for own, *beside in zip(*parts, strict=True):
                yield replace(own, beside=beside[0] if beside else None)

    def _minibatches(self, random: np.random.Generator, experience: Experience) -> list[Experience]:
        rows = np.array_split(random.permutation(experience.batch.rows), self.settings.minibatches)
        return [experience.select(sorted(each.tolist())) for each in rows]

    def loss(self, student: Student, experience: Experience) -> Loss:
        return self._of_completions(student, experience) if experience.columns else self._of_text(student, experience)

    def _of_text(self, student: Student, experience: Experience) -> Loss:
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

    def _of_completions(self, student: Student, experience: Experience) -> Loss:
        settings, batch, columns = self.settings, experience.batch, experience.columns
        assert experience.signals is not None
        # Padding is never drawn. As a part of q it would reward a student for moving mass to where nobody looks.
        head = student.head.first(experience.signals.vocab_size)
        reverse_kl: Tensor | None = None
        terms: dict[str, Tensor] = {}
        if settings.single_step:
            reverse_kl, cross_entropy, masses = with_masses("reverse_kl", student, head, experience)
            terms |= {"reverse_kl": reverse_kl, **masses}
        else:
            cross_entropy = linear_cross_entropy(student.hidden(batch), head, batch.targets)
        long_term = policy_loss(
            -cross_entropy, columns["rollout_logprobs"], columns["returns"], log_weights=columns["log_weights"],
            clip=settings.ratio_clip,
        )  # fmt: skip
        per_token = long_term
        if reverse_kl is not None:
            weights = columns["log_weights"].exp() if _FORMS[settings.form].weighted_single_step else 1.0
            per_token = long_term + weights * reverse_kl
        terms |= {"long_term": long_term, "reward": columns["rewards"], "weight": columns["log_weights"].exp()}
        # The ratio as the loss has it: what the teacher proposed may become far likelier without harm.
        written = columns["rollout_logprobs"] - columns["log_weights"]
        exploded = ratio_exploded(-cross_entropy, written, settings.ratio_limit)
        return Loss(per_token, terms, exploded)


def _joined(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts))


def _in_rows(values: Tensor, batch: Batch) -> Tensor:
    """One value a counted token [tokens] where the token stands, [rows, length]."""
    return torch.zeros(batch.counted_mask.shape, dtype=values.dtype).masked_scatter(batch.counted_mask, values)
