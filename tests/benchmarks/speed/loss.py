"""The chunked loss against dense logits: extra memory and time of forward and backward.

    python -m tests.benchmarks.speed.loss [--tokens 4096] [--width 256] [--vocab 128256]

Each form runs once in a new process for its peak memory; times are medians of 5. How to read it: fractions of the dense
logits' size, lower is better.
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


def make_inputs(tokens: int, width: int, vocab_size: int, k: int = 64):
    """Return random hidden states, head weights and teacher signals."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = (torch.randn(vocab_size, width) * width**-0.5).requires_grad_()
    ids = torch.stack([torch.randperm(vocab_size)[:k] for _ in range(64)]).repeat(tokens // 64, 1)
    logprobs = (torch.randn(tokens, k) * 2).log_softmax(1) - 0.1
    tails = torch.log1p(-logprobs.exp().sum(1, keepdim=True))
    signals = SignalBatch(TopK(k), torch.tensor([0, tokens]), logprobs[:, 0], vocab_size, ids, logprobs, tails)
    return hidden, weight, signals


def dense_loss(hidden, weight, signals) -> None:
    token_mean(forward_kl(Head(weight).logits(hidden), signals), len(hidden)).backward()


def chunked_loss(hidden, weight, signals) -> None:
    token_mean(linear_divergence(hidden, Head(weight), signals), len(hidden)).backward()


FORMS = {"dense": dense_loss, "chunked": chunked_loss}


def extra_bytes(form: str, tokens: int, width: int, vocab_size: int) -> int:
    """Return the peak memory of one loss and its gradients, without inputs and weight gradient; for a new process."""
    hidden, weight, signals = make_inputs(tokens, width, vocab_size)
    weight.grad, hidden.grad = torch.zeros_like(weight), torch.zeros_like(hidden)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    FORMS[form](hidden, weight, signals)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Autograd allocates one more [vocab, width] before it adds to `weight.grad`; that is not part of the loss.
    return (after - before) * 1024 - weight.numel() * 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=128_256)
    sizes = parser.parse_args()
    print(machine())
    context = multiprocessing.get_context("spawn")
    extra = {}
    for form in FORMS:
        with context.Pool(1) as pool:
            extra[form] = pool.apply(extra_bytes, (form, sizes.tokens, sizes.width, sizes.vocab))
    logits = sizes.tokens * sizes.vocab * 4
    print(f"forward KL on top-64 signals, {sizes.tokens} positions, V={sizes.vocab}, width {sizes.width}, float32")
    print(f"  dense logits alone          {logits / 2**20:8.0f} MiB")
    for form, size in extra.items():
        print(f"  extra memory, {form:8}      {size / 2**20:8.0f} MiB = {size / logits:.3f} of the dense logits")
    print(f"  chunked / dense             {extra['chunked'] / extra['dense']:.3f}")
    tokens = min(sizes.tokens, 1024)
    given = make_inputs(tokens, sizes.width, sizes.vocab)
    slow, fast = median_seconds(lambda: dense_loss(*given), lambda: chunked_loss(*given), runs=5)
    print(f"  time, {tokens} positions: dense {slow:.2f} s, chunked {fast:.2f} s, ratio {slow / fast:.2f}")


if __name__ == "__main__":
    sys.exit(main())
