"""Supervised fine-tuning: cross-entropy on the tokens of the data, L = −(1/N) Σ_t log q(y_t | y_<t, x).

On completions that a teacher generated, this is sequence-level distillation (SeqKD, Kim & Rush 2016, arXiv 1606.07947).
"""

from rayk.data.batches import Batch
from rayk.losses import linear_cross_entropy
from rayk.methods.base import Experience, Loss, Method, Student


class Supervised(Method):
    """Supervised fine-tuning; see the module's docstring."""

    kind = "supervised"
    summary = "cross-entropy on the tokens of the data"
    paper = "Kim & Rush 2016 (as SeqKD, on a teacher's completions)"
    needs = "no teacher"

    async def prepare(self, batch: Batch) -> Experience:
        return Experience(batch)

    def loss(self, student: Student, experience: Experience) -> Loss:
        batch = experience.batch
        cross_entropy = linear_cross_entropy(student.hidden(batch), student.head, batch.targets)
        return Loss(cross_entropy, {"cross_entropy": cross_entropy})
