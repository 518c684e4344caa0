"""Word-level (logit) knowledge distillation: the student matches the teacher's next-token distribution at every
counted position of the data (Hinton et al. 2015, arXiv 1503.02531; Kim & Rush 2016 §3.1; Sanh et al. 2019).

    L = (1/N) Σ_t [ α·(−log q(y_t)) + (1−α)·T^s·D(p_T ‖ q_T)_t ],   s = 2 with `temperature_squared`, else 0

p is the teacher, q the student; the temperature T is used in the divergence D only. With support `topk`, D is taken
between the distributions over the k tokens and one tail bucket: for an f-divergence a lower bound of the full value,
which it reaches as k grows to the vocabulary size. With `hidden`, D is the exact divergence over the vocabulary; with
`sampled`, an unbiased estimate of forward KL.

With `soft_reduction: batchmean` D is multiplied by the mean number of counted tokens of the step's rows, as in the code
of BabyLlama (arXiv 2308.02019), which divides its sum over the tokens by the number of rows.
"""

from dataclasses import replace

import torch

from rayk.data.batches import Batch
from rayk.methods.base import Experience, Loss, Method, Student, Workers
from rayk.methods.decoupled import weigh_tokens
from rayk.methods.matching import soft_loss

_ROW_TOKENS = "row_tokens"
"""The column with the mean number of counted tokens of a row in the step."""


class LogitKD(Method):
    """Logit distillation; see the module's docstring. Settings: `rayk.config.LogitKDConfig`."""

    kind = "logit_kd"
    summary = "the student matches the teacher's distribution at every counted token"
    paper = "Hinton et al. 2015; Kim & Rush 2016 §3.1"
    needs = (
        "topk: 4·k + 8 bytes a token (6·k + 8 beyond 65,536 tokens of vocabulary); or hidden: 2·width + 4, exact; or "
        "sampled: about 45 (70), forward KL only"
    )

    async def prepare(self, batch: Batch) -> Experience:
        assert self.teacher is not None
        return Experience(batch, await self.teacher.ascore(batch, self.settings.support))

    def synchronize(self, experience: Experience, workers: Workers, step: int) -> Experience:
        experience = weigh_tokens(self.settings, experience, workers, step)
        if self.settings.soft_reduction == "mean":
            return experience
        tokens, rows = workers.sums([float(experience.count), float(experience.batch.rows)])
        weight = torch.full((experience.count,), tokens / max(rows, 1.0))
        return replace(experience, columns={**experience.columns, _ROW_TOKENS: weight})

    def loss(self, student: Student, experience: Experience) -> Loss:
        soft, terms = soft_loss(self.settings, student, experience)
        if _ROW_TOKENS in experience.columns:
            soft = soft * experience.columns[_ROW_TOKENS]
        alpha = self.settings.hard_label_weight
        # A gradient for the cross-entropy, even of 0, would make the backward pass compute all logits again.
        return Loss(alpha * terms["cross_entropy"] + (1 - alpha) * soft if alpha else soft, terms)
