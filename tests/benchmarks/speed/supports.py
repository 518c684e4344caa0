"""Supports `hidden` and `topk` compared: bytes per token, and seconds of the student's loss.

    python -m tests.benchmarks.speed.supports [--sizes 256x32000,1024x128000]

The size of hidden states (float16) grows with the teacher's width d. They give the loss the whole distribution, but the
loss must apply the teacher's head at every position. The size of `topk` grows with k only. Teacher and student both
have width d. The loss is forward KL by `linear_divergence`, forward and backward to hidden states and head, on the same
positions. How to read it: the last line prints from which k on `hidden` is smaller, and how much slower its loss is.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import replace

from rayk.environment import set_threading

set_threading()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from rayk.config.support import Hidden, Support, TopK  # noqa: E402
from rayk.engines.reduce import reduce_logits  # noqa: E402
from rayk.losses import linear_divergence, token_mean  # noqa: E402
from rayk.models import Head  # noqa: E402
from rayk.signals.batch import SignalBatch  # noqa: E402
from rayk.signals.wire import decode, encode  # noqa: E402
from tests.benchmarks.machine import machine, median_seconds  # noqa: E402

FEW, MANY = 16, 64
SUPPORTS: tuple[Support, ...] = (Hidden(), TopK(FEW), TopK(MANY))


def make_states_and_head(tokens: int, width: int, vocab_size: int) -> tuple[Tensor, Head]:
    """Return random final hidden states [tokens, width], and a head whose logits have standard deviation 2."""
    return torch.randn(tokens, width), Head(2 * width**-0.5 * torch.randn(vocab_size, width))


def receive_signals(states: Tensor, head: Head, support: Support) -> tuple[SignalBatch, float]:
    """Return what a client receives from a teacher with these hidden states, and its encoded bytes per token."""
    tokens, vocab_size = len(states), head.vocab_size
    targets = torch.randint(vocab_size, (tokens,), generator=torch.Generator().manual_seed(1))
    pieces = zip(states.split(64), targets.split(64), strict=True)
    parts = [reduce_logits(head.logits(piece), target, support, vocab_size) for piece, target in pieces]
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if isinstance(support, Hidden):
        columns["hidden"] = states.half()
    wire = encode(SignalBatch(support, torch.tensor([0, tokens]), vocab_size=vocab_size, **columns))
    received = decode(wire)
    return (replace(received, head=head) if isinstance(support, Hidden) else received), len(wire) / tokens


def make_loss(states: Tensor, head: Head, signals: SignalBatch) -> Callable[[], None]:
    """Return a function that computes one loss and its gradients to the student's `states` and `head`."""
    states.requires_grad_(), head.weight.requires_grad_()

    def work() -> None:
        states.grad = head.weight.grad = None
        token_mean(linear_divergence(states, head, signals), len(states)).backward()

    return work


def compare(tokens: int, width: int, vocab_size: int, runs: int) -> tuple[float, float]:
    """Print a line; return the k at which `topk` is as large as `hidden`, and the ratio of their loss times."""
    torch.manual_seed(0)
    teacher, student = (make_states_and_head(tokens, width, vocab_size) for _ in range(2))
    with torch.no_grad():
        signals, sizes = zip(*(receive_signals(*teacher, support) for support in SUPPORTS), strict=True)
    seconds = median_seconds(*(make_loss(*student, signal) for signal in signals), runs=runs)
    hidden, few, many = sizes
    equal = FEW + (hidden - few) * (MANY - FEW) / (many - few)  # bytes grow linearly with k
    slower = seconds[0] / seconds[2]
    columns = zip(("hidden", f"topk {FEW}", f"topk {MANY}"), sizes, seconds, strict=True)
    text = "; ".join(f"{name} {size:5,.0f} bytes, {1e3 * spent / tokens:6.2f} ms" for name, size, spent in columns)
    print(f"  d={width:5,} V={vocab_size:7,} a token: {text}", flush=True)
    return equal, slower


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="256x32000,1024x32000,1024x128000", help="WIDTHxVOCABULARY, ...")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    print(f"{machine()}, load before {os.getloadavg()[0]:.1f}")
    print(f"{given.tokens} positions, float32 student; loss forward and backward, medians of {given.runs} runs in turn")
    sizes = [tuple(map(int, size.split("x"))) for size in given.sizes.split(",")]
    crossings = [compare(given.tokens, width, vocab_size, given.runs) for width, vocab_size in sizes]
    equal = ", ".join(
        f"{k:,.0f} (d={width:,}, V={vocab_size:,})"
        for (width, vocab_size), (k, _) in zip(sizes, crossings, strict=True)
    )
    slower = ", ".join(f"{times:.1f}" for _, times in crossings)
    print(f"`hidden` is the smaller on the wire above k = {equal}; its loss takes {slower} times that of topk {MANY}")


if __name__ == "__main__":
    main()
