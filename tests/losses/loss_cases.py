"""Random students and teachers, and signals cut from dense logits."""

from collections.abc import Callable

import torch
from torch import Tensor

from rayk.config.support import TopK
from rayk.models import Head
from rayk.signals.batch import SignalBatch


def random_logits(tokens: int, vocab: int, seed: int = 0, scale: float = 2.0, dtype=torch.float64) -> Tensor:
    return (
        torch.randn(tokens, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype) * scale
    )


def signals_of(
    logits: Tensor, k: int, targets: Tensor | None = None, temperatures: tuple[float, ...] = (1.0,), ids=None
) -> SignalBatch:
    """The signals of a teacher with these logits, without rounding, in the dtype of the logits."""
    log_p = logits.log_softmax(1)
    ids = log_p.topk(k).indices if ids is None else ids
    tails = [
        (log_p / temperature).scatter(1, ids, -torch.inf).logsumexp(1)
        if ids.shape[1] < logits.shape[1]
        else torch.full((len(logits),), -torch.inf, dtype=logits.dtype)
        for temperature in temperatures
    ]
    targets = torch.zeros(len(logits), dtype=torch.long) if targets is None else targets
    return SignalBatch(
        TopK(ids.shape[1], temperatures),
        torch.tensor([0, len(logits)]),
        log_p.gather(1, targets[:, None])[:, 0],
        logits.shape[1],
        ids,
        log_p.gather(1, ids),
        torch.stack(tails, 1),
    )


def random_head(vocab: int, width: int, seed: int = 0, dtype=torch.float64, **parts) -> Head:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.randn(vocab, generator=generator, dtype=torch.float64).to(dtype) if parts.pop("bias", False) else None
    return Head(weight.requires_grad_(), None if bias is None else bias.requires_grad_(), **parts)


def gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """d Σ loss(at) / d at."""
    leaf = at.detach().clone().requires_grad_()
    loss(leaf).sum().backward()
    assert leaf.grad is not None
    return leaf.grad
