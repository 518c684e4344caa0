"""Losses against float64, products of bfloat16 heads, and the memory of the chunked loss."""

import torch

from rayk.config.support import TopK
from rayk.losses import forward_kl, linear_cross_entropy, linear_divergence, token_mean
from rayk.models import Head
from rayk.signals.batch import SignalBatch
from tests.gpu.scale import Scale, Skip, ensure, peak_bytes, relative

NAMES = ("forward_kl", "reverse_kl", "jensen_shannon", "total_variation", "skew_forward_kl", "adaptive_kl")


def inputs(scale: Scale, tokens: int, dtype: torch.dtype = torch.float32, k: int = 8):
    """Return hidden states, a head's weight and top-k signals."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, scale.width, device=scale.device, dtype=dtype)
    weight = torch.randn(scale.vocab_size, scale.width, device=scale.device, dtype=dtype) * scale.width**-0.5
    teacher = torch.randn(tokens, scale.vocab_size, device=scale.device).mul_(2).log_softmax(1)
    logprobs, ids = teacher.topk(k)
    tails = torch.log1p(-logprobs.exp().sum(1, keepdim=True))
    offsets = torch.tensor([0, tokens], device=scale.device)
    signals = SignalBatch(TopK(k), offsets, logprobs[:, 0].contiguous(), scale.vocab_size, ids, logprobs, tails)
    return hidden.requires_grad_(), weight.requires_grad_(), signals


def chunked_losses_equal_float64(scale: Scale) -> str:
    worst = {}
    for name in NAMES:
        hidden, weight, signals = inputs(scale, 64)
        linear_divergence(hidden, Head(weight), signals, name, chunk_tokens=24).sum().backward()
        exact = hidden.detach().double().requires_grad_()
        wide = weight.detach().double().requires_grad_()
        double = SignalBatch(
            signals.support, signals.offsets, signals.target_logprobs.double(), signals.vocab_size, signals.ids,
            signals.logprobs.double(), signals.log_tails.double(),
        )  # fmt: skip
        linear_divergence(exact, Head(wide), double, name, chunk_tokens=24).sum().backward()
        worst[name] = max(relative(hidden.grad, exact.grad), relative(weight.grad, wide.grad))
    name = max(worst, key=worst.get)
    return ensure(worst[name], 5e-3 if scale.is_gpu else 1e-4, f"largest difference of gradients ({name})")


def cross_entropy_equals_float64(scale: Scale) -> str:
    hidden, weight, _ = inputs(scale, 64)
    targets = torch.randint(scale.vocab_size, (64,), device=scale.device)
    found = linear_cross_entropy(hidden, Head(weight), targets)
    logits = hidden.detach().double() @ weight.detach().double().t()
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return ensure(relative(found.detach(), expected), 1e-3 if scale.is_gpu else 1e-5, "difference")


def bfloat16_heads_return_float32_sums(scale: Scale) -> str:
    hidden, weight, _ = inputs(scale, 64, torch.bfloat16)
    logits = Head(weight).logits(hidden).detach()
    exact = hidden.detach().double() @ weight.detach().double().t()
    assert logits.dtype == torch.float32
    # A CPU rounds the sums to bfloat16 (`linear_float32`), a GPU must not.
    return ensure(relative(logits, exact), 1e-5 if scale.is_gpu else 1e-2, "difference")


def chunked_loss_needs_less_memory_than_dense(scale: Scale) -> str:
    if not scale.is_gpu:
        raise Skip("tests.benchmarks.speed.loss measures it on CPUs")
    hidden, weight, signals = inputs(scale, scale.tokens, torch.bfloat16)
    weight.grad, hidden.grad = torch.zeros_like(weight), torch.zeros_like(hidden)

    def dense() -> None:
        token_mean(forward_kl(Head(weight).logits(hidden), signals), len(hidden)).backward()

    def chunked() -> None:
        token_mean(linear_divergence(hidden, Head(weight), signals), len(hidden)).backward()

    chunked(), dense()  # workspaces of the first products
    small, large = peak_bytes(chunked), peak_bytes(dense)
    return ensure(small / large, 0.5, f"{small / 1e9:.2f} GB of {large / 1e9:.2f} GB, share")


CHECKS = [
    chunked_losses_equal_float64, cross_entropy_equals_float64, bfloat16_heads_return_float32_sums,
    chunked_loss_needs_less_memory_than_dense,
]  # fmt: skip
