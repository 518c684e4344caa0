"""The chunked loss against dense logits: extra memory and time of both passes .

python -m tests.benchmarks.speed.loss
"""

import argparse
import multiprocessing
import resource
import sys

import torch

from rayk.config.support import TopK
from rayk.losses import forward_kl, linear_divergence, token_mean
from rayk.models import Head
from rayk.signals.batch import SignalBatch
from tests.benchmarks.machine import machine, median_seconds


def inputs(tokens: int, width: int, vocab_size: int, k: int = 64):
    """Hidden states, a head and a teacher's signals, random."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = (torch.randn(vocab_size, width) * width**-0.5).requires_grad_()
    ids = torch.stack([torch.randperm(vocab_size)[:k] for _ in range(64)]).repeat(tokens // 64, 1)
    logprobs = (torch.randn(tokens, k) * 2).log_softmax(1) - 0.1
    tails = torch.log1p(-logprobs.exp().sum(1, keepdim=True))
    signals = SignalBatch(TopK(k), torch.tensor([0, tokens]), logprobs[:, 0], vocab_size, ids, logprobs, tails)
    return hidden, weight, signals


def dense(hidden, weight, signals) -> None:
    token_mean(forward_kl(Head(weight).logits(hidden), signals), len(hidden)).backward()


def chunked(hidden, weight, signals) -> None:
    token_mean(linear_divergence(hidden, Head(weight), signals), len(hidden)).backward()


def extra_bytes(form: str, tokens: int, width: int, vocab_size: int) -> int:
    """Peak memory of one loss and its gradients beyond inputs and weight gradient, in a process of its own."""
    hidden, weight, signals = inputs(tokens, width, vocab_size)
    weight.grad, hidden.grad = torch.zeros_like(weight), torch.zeros_like(hidden)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    globals()[form](hidden, weight, signals)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # The gradient that autograd hands to `weight.grad` is one more [vocab, width]; it is no part of the loss.
    return (after - before) * 1024 - weight.numel() * 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=128_256)
    sizes = parser.parse_args()
    print(machine())
    context = multiprocessing.get_context("spawn")
    extra = {}
    for form in ("dense", "chunked"):
        with context.Pool(1) as pool:
            extra[form] = pool.apply(extra_bytes, (form, sizes.tokens, sizes.width, sizes.vocab))
    logits = sizes.tokens * sizes.vocab * 4
    print(f"forward KL on top-64 signals, {sizes.tokens} positions, V={sizes.vocab}, width {sizes.width}, float32")
    print(f"  dense logits alone          {logits / 2**20:8.0f} MiB")
    for form, size in extra.items():
        print(f"  extra memory, {form:8}      {size / 2**20:8.0f} MiB = {size / logits:.3f} of the dense logits")
    print(f"  chunked / dense             {extra['chunked'] / extra['dense']:.3f}")
    tokens = min(sizes.tokens, 1024)
    given = inputs(tokens, sizes.width, sizes.vocab)
    slow, fast = median_seconds(lambda: dense(*given), lambda: chunked(*given), runs=5)
    print(f"  time, {tokens} positions: dense {slow:.2f} s, chunked {fast:.2f} s, ratio {slow / fast:.2f}")


if __name__ == "__main__":
    sys.exit(main())
