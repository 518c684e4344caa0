"""Losses of four papers as a user's own code: two divergences and two methods, which a config names by path.

method: { divergence: "tests.examples.paper_losses:logit_matching", kind: logit_kd, support: { kind: hidden } }
method: { kind: custom, path: "tests.examples.paper_losses:TaiLr", support: null, options: { gamma: 0.1 } }
method: { kind: custom, path: "tests.examples.paper_losses:FDistill", rollouts: true, completions: true }
"""

import numpy as np
import torch

from rayk import Experience, Loss, Method, OnPolicyMethod
from rayk.data.batches import collate
from rayk.losses import linear_cross_entropy, linear_divergence
from rayk.rollouts import Rollout


def logit_matching(log_p, log_q):
    """Mean squared difference of centered logits (Ba & Caruana 2014, arXiv 1312.6184): log-probs are logits minus a
    constant, which centering removes. Needs the whole vocabulary (support `hidden`)."""
    centered_p, centered_q = (log - log.mean(-1, keepdim=True) for log in (log_p, log_q))
    return (centered_p - centered_q).square().mean(-1)


def entropy_aware(log_p, log_q, threshold=1.0):
    """Reverse KL, and forward KL beside it where the teacher's entropy exceeds `threshold` nats (Jin et al. 2026, arXiv
    2603.07079): many continuations are right there, and reverse KL alone would choose one of them."""
    p, q = log_p.exp(), log_q.exp()
    forward, reverse = (p * (log_p - log_q)).sum(-1), (q * (log_q - log_p)).sum(-1)
    is_open = -(p * log_p).sum(-1) > threshold
    return reverse + is_open * forward


class TaiLr(Method):
    """Cross-entropy that gives less weight to tokens that the student finds unlikely (Ji et al. 2023, arXiv
    2302.13344): −w·log q(y_t), w = q / (γ + (1 − γ)·q), at least `least_weight`, without a gradient."""

    async def prepare(self, batch):
        return Experience(batch)

    def loss(self, student, experience):
        batch, gamma = experience.batch, self.settings.options.get("gamma", 0.1)
        cross_entropy = linear_cross_entropy(student.hidden(batch), student.head, batch.targets)
        q = (-cross_entropy.detach()).exp()
        weight = (q / (gamma + (1 - gamma) * q)).clamp(min=self.settings.options.get("least_weight", 0.0))
        return Loss(weight * cross_entropy, {"cross_entropy": cross_entropy, "weight": weight})


class FDistill(OnPolicyMethod):
    """f-distill with Jensen–Shannon divergence (Wen et al. 2023, arXiv 2307.15190): KL(p‖m) on the teacher's
    completions and KL(q‖m) on the student's, m = (p + q) / 2.

    The rows are the teacher's completions (`synthesis: {kind: responses}`); the student replaces half of them.
    """

    async def sample(self, batch, seeds, progress):
        draws = [np.random.default_rng([seed, 1]).random() for seed in seeds]
        chosen = [row for row, draw in enumerate(draws) if draw < self.settings.options.get("student_share", 0.5)]
        rows = list(batch.sequences)
        generated = await self.policy.generate(
            [rows[row] for row in chosen], self.policy.parameters, [seeds[row] for row in chosen]
        )
        for row, rollout in zip(chosen, generated, strict=True):
            rows[row] = rollout
        return collate(rows, batch.pad_id)

    async def prepare(self, batch):
        return Experience(batch, await self.teacher.ascore(batch, self.settings.support))

    def loss(self, student, experience):
        batch, hidden = experience.batch, student.hidden(experience.batch)
        of_teacher, of_student = (
            linear_divergence(hidden, student.head, experience.signals, name, alpha=0.5)
            for name in ("skew_forward_kl", "skew_reverse_kl")
        )
        by_student = torch.tensor([isinstance(row, Rollout) for row in batch.sequences], device=hidden.device)
        by_student = by_student.repeat_interleave(batch.offsets.diff().to(hidden.device))
        return Loss(torch.where(by_student, of_student, of_teacher))
