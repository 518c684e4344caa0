"""The signal cache: bytes per entry with the index, the error of storing signals, and the speed of reading them.

    python -m tests.benchmarks.speed.cache

An entry is one pair (id, log-prob) of a top-64 signal. Logits are random, so the ids cannot be compressed as well as a
language model's. Errors are relative to float32, of distributions reduced to k tokens and the rest. How to read it:
lower is better for bytes and errors, higher for tokens/s; each line prints its goal.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

from rayk.environment import set_threading

set_threading()

import numpy as np  # noqa: E402
import torch  # noqa: E402

from rayk.config import CacheConfig  # noqa: E402
from rayk.config.support import TopK  # noqa: E402
from rayk.engines.base import EngineInfo  # noqa: E402
from rayk.engines.reduce import reduce_logits  # noqa: E402
from rayk.signals.batch import SignalBatch, concatenate  # noqa: E402
from rayk.signals.sequence import TokenSequence  # noqa: E402
from rayk.signals.wire import decode, encode  # noqa: E402
from rayk.teachers.cache import SignalCache  # noqa: E402
from tests.benchmarks.machine import machine  # noqa: E402

K = 64
TEACHER = EngineInfo("benchmark", 0, 4096, "", "float32", "cpu", ("topk",), weights_fingerprint="benchmark")


def make_rows(count: int, length: int, seed: int = 0) -> list[TokenSequence]:
    """Make rows of `length` counted tokens each."""
    random = np.random.default_rng(seed)
    flags = np.arange(length + 1) > 0
    return [TokenSequence(random.integers(0, 30_000, length + 1).astype(np.int32), flags) for _ in range(count)]


def receive_signals(logits: torch.Tensor, length: int) -> SignalBatch:
    """Return the signals of `logits` as a client receives them, encoded and decoded."""
    tokens, vocab_size = logits.shape
    columns = reduce_logits(logits.clone(), torch.arange(tokens), TopK(K), vocab_size)
    offsets = torch.arange(0, tokens + 1, length)
    return decode(encode(SignalBatch(TopK(K), offsets, vocab_size=vocab_size, **columns)))


def measure(vocab_size: int, spread: float, length: int, tokens: int = 1024) -> tuple[float, float, float]:
    """Return the bytes per entry on disk, and the forward and reverse KL in nats that storing adds."""
    logits = torch.randn(tokens, vocab_size, generator=torch.Generator().manual_seed(0)) * spread
    rows = make_rows(tokens // length, length)
    with tempfile.TemporaryDirectory() as folder, SignalCache(CacheConfig(path=folder)) as cache:
        back = concatenate(cache.add(TEACHER, rows, receive_signals(logits, length)))
        cache.flush()
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
    assert back.ids is not None
    exact = logits.double().log_softmax(1)
    rest = exact.scatter(1, back.ids, -torch.inf).logsumexp(1, keepdim=True)
    p = torch.cat([exact.gather(1, back.ids), rest], dim=1)
    log_q, log_tail = back.at_temperature()
    q = torch.cat([log_q, log_tail[:, None]], dim=1).double()
    forward, reverse = ((a.exp() * (a - b)).sum(1).mean().item() for a, b in ((p, q), (q, p)))
    return size / (tokens * K), forward, reverse


def measure_speed(rows: int, length: int, runs: int) -> None:
    """Print tokens per second of writing, and of reading batches of 32 rows in random order with a newly opened cache.

    The files are in the system's page cache.
    """
    logits = torch.randn(32 * length, 32_000, generator=torch.Generator().manual_seed(0)) * 3
    signals = receive_signals(logits, length)
    sequences = make_rows(rows, length)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        with SignalCache(CacheConfig(path=folder)) as cache:
            for start in range(0, rows, 32):
                cache.add(TEACHER, sequences[start : start + 32], signals)
        written = rows * length / (time.perf_counter() - began)
        speeds = []
        for run in range(runs):
            order = np.random.default_rng(run).permutation(rows)
            began = time.perf_counter()
            reader = SignalCache(CacheConfig(path=folder))
            for start in range(0, rows, 32):
                found = reader.find(TEACHER, [sequences[row] for row in order[start : start + 32]], TopK(K))
                concatenate([found[row] for row in range(32)])
            speeds.append(rows * length / (time.perf_counter() - began))
    print(
        f"\n{rows} rows of {length} tokens: written at {written:,.0f} tokens/s, "
        f"read at {sorted(speeds)[runs // 2]:,.0f} (median of {runs}), one thread"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    torch.set_num_threads(1)
    print(f"{machine()}, load before {os.getloadavg()[0]:.1f}")
    print(f"\nk={K}; goal at V <= 65,536: 2.5 bytes an entry and 1e-3 nats")
    for vocab_size in (32_000, 65_536, 128_000):
        for name, spread in (("flat", 0.02), ("moderate", 2.0), ("peaked", 8.0), ("one-hot", 60.0)):
            sizes = []
            for length in (32, 128, 512):
                size, forward, reverse = measure(vocab_size, spread, length)
                sizes.append(f"{size:.2f}")
            print(
                f"  V={vocab_size:7,} {name:9} {' / '.join(sizes)} bytes an entry in rows of 32 / 128 / 512 tokens, "
                f"forward KL {forward:8.1e}, reverse KL {reverse:8.1e}"
            )
    measure_speed(rows=1024, length=128, runs=runs)


if __name__ == "__main__":
    main()
