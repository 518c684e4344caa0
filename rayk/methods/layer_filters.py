"""Task-aware filters of layers (TED, Liang et al. 2023, arXiv 2210.01351, §3).

A filter f_k maps the states of a layer to the teacher's width. In the first stage the filters of both models learn,
with the models frozen, to predict the next token from each layer alone:

    L = (1/N) Σ_t (1/K) Σ_k [ −log softmax(H·n_k(f_k^T(h_k^T)))_{y_t} − log softmax(H·n_k'(f_k^S(h_k^S)))_{y_t} ]

The paper trains a head of its own on each filter. For a language model that is a matrix of vocabulary · width per
layer; here a head is a trained RMS norm n_k and the teacher's own head H, frozen, as in the tuned lens (Belrose et al.
2023, arXiv 2303.08112). The norms are not used afterwards.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rayk.losses import linear_cross_entropy
from rayk.models import Head


class Filters(nn.Module):
    """The filters of `count` pairs of layers, and the norms of their heads.

    Args:
        kind: `linear` or `mlp`.
    """

    def __init__(self, count: int, student_width: int, teacher_width: int, kind: str):
        super().__init__()
        self.student = nn.ModuleList(_make_filter(kind, student_width, teacher_width) for _ in range(count))
        self.teacher = nn.ModuleList(_make_filter(kind, teacher_width, teacher_width) for _ in range(count))
        self.student_norms = nn.ModuleList(nn.RMSNorm(teacher_width) for _ in range(count))
        self.teacher_norms = nn.ModuleList(nn.RMSNorm(teacher_width) for _ in range(count))

    def student_states(self, states: Sequence[Tensor]) -> list[Tensor]:
        """Return the filtered states of the student's layers."""
        return [layer_filter(each.float()) for layer_filter, each in zip(self.student, states, strict=True)]

    @torch.no_grad()
    def teacher_states(self, states: Sequence[Tensor]) -> list[Tensor]:
        """Return the filtered states of the teacher's layers, without gradient."""
        return [layer_filter(each) for layer_filter, each in zip(self.teacher, states, strict=True)]

    def task_losses(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], head: Head, targets: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return the mean cross-entropies of the layers of student and teacher at each counted token, [tokens] each.

        Args:
            student, teacher: states of the layers, [tokens, width] each.
            head: the teacher's head.
            dtype: the type of the product with the head.
        """

        def mean_loss(states: Sequence[Tensor], filters: nn.ModuleList, norms: nn.ModuleList) -> Tensor:
            losses = [
                linear_cross_entropy(norm(layer_filter(each.detach().float())).to(dtype), head, targets)
                for each, layer_filter, norm in zip(states, filters, norms, strict=True)
            ]
            return torch.stack(losses).mean(dim=0)

        of_student = mean_loss(student, self.student, self.student_norms)
        return of_student, mean_loss(teacher, self.teacher, self.teacher_norms)


def _make_filter(kind: str, width: int, teacher_width: int) -> nn.Module:
    """Return a filter. A linear one between equal widths starts as the identity."""
    if kind == "mlp":
        return nn.Sequential(nn.Linear(width, teacher_width), nn.GELU(), nn.Linear(teacher_width, teacher_width))
    linear = nn.Linear(width, teacher_width)
    if width == teacher_width:
        nn.init.eye_(linear.weight)
        nn.init.zeros_(linear.bias)
    return linear
