"""The cost of serving a teacher: the service against direct calls of the engine, and the size and error of signals.

    python -m tests.benchmarks.speed.service

Both sides run the same model on the same rows with the same number of threads, in turn. How to read it: a ratio of 1
means that Ray Serve, encoding and the client cost nothing. CPU seconds are printed too, since the machine may be
shared.
"""

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Callable

from rayk.environment import set_threading

set_threading()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's default of 15 favors the bare engine on a busy machine

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
from tokenizers import Tokenizer, models  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from rayk.config import TeacherConfig, TransformersEngineConfig  # noqa: E402
from rayk.config.support import TopK  # noqa: E402
from rayk.engines.reduce import reduce_logits  # noqa: E402
from rayk.engines.transformers import TransformersEngine  # noqa: E402
from rayk.signals.batch import SignalBatch  # noqa: E402
from rayk.signals.sequence import TokenSequence  # noqa: E402
from rayk.signals.wire import decode, encode  # noqa: E402
from rayk.teachers import Teacher, serve_teacher  # noqa: E402
from tests.benchmarks.machine import machine  # noqa: E402
from tests.teachers.helpers import replica_processes  # noqa: E402
from tests.tiny import tiny_model  # noqa: E402

VOCAB, K, THREADS = 32_000, 64, 1


def make_teacher(folder: str) -> None:
    """Save a llama of width 256 with 4 layers, V=32,000 (18M parameters)."""
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t1", pad_token="t0")
    tiny_model(folder, vocab_size=VOCAB, hidden=256, layers=4, peaked=3.0, tokenizer=tokenizer)


def make_rows(count: int, counted: float) -> list[TokenSequence]:
    """Make rows of 200–400 tokens; the last part of each, a share of `counted`, counts, as completions do."""
    random = np.random.default_rng(0)
    rows = []
    for length in random.integers(200, 401, count):
        flags = np.arange(length) >= max(1, round(length * (1 - counted)))
        rows.append(TokenSequence(random.integers(2, VOCAB, length).astype(np.int32), flags))
    return rows


def request_patterns(engine, teacher: Teacher, rows: list[TokenSequence]) -> dict[str, tuple[Callable, Callable]]:
    """Return functions that request all rows' signals, from the engine and from the service, by the pattern's name."""
    support = TopK(K)
    batches = [rows[i : i + 16] for i in range(0, len(rows), 16)]

    async def concurrently(score) -> None:
        await asyncio.gather(*(score([row], support) for row in rows))

    async def sequentially(pieces: list[list[TokenSequence]]) -> None:
        for piece in pieces:
            await engine.score(piece, support)

    alone = [[row] for row in rows]
    return {
        "1 request in flight": (
            lambda: asyncio.run(sequentially(alone)),
            lambda: [teacher.score(row, support) for row in alone],
        ),
        "64 requests in flight": (
            lambda: asyncio.run(concurrently(engine.score)),
            lambda: asyncio.run(concurrently(teacher.ascore)),
        ),
        "batches of 16 rows, streamed": (
            lambda: asyncio.run(sequentially(batches)),
            lambda: list(teacher.stream(batches, support, prefetch=3)),
        ),
    }


def seconds(work: Callable) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def cpu_seconds(processes: list[psutil.Process]) -> float:
    return sum(process.cpu_times().user + process.cpu_times().system for process in processes)


def compare(name: str, bare: Callable, service: Callable, tokens: int, rounds: int) -> None:
    bare(), service()  # warm-up
    here, replicas = [psutil.Process()], replica_processes("benchmark")
    spent = {"bare": 0.0, "replica": 0.0, "client": 0.0}
    times = []
    for _ in range(rounds):
        before = cpu_seconds(here)
        direct = seconds(bare)
        between, replicas_before = cpu_seconds(here), cpu_seconds(replicas)
        times.append((direct, seconds(service)))
        spent["bare"] += between - before
        spent["replica"] += cpu_seconds(replicas) - replicas_before
        spent["client"] += cpu_seconds(here) - between
    direct, served = (statistics.median(side) for side in zip(*times, strict=True))
    cpu = ", ".join(f"{side} {total / rounds:.2f}" for side, total in spent.items())
    print(
        f"  {name:30} bare engine {tokens / direct:6,.0f} tokens/s, service {tokens / served:6,.0f}: ratio "
        f"{direct / served:.2f}; CPU seconds a pass: {cpu}",
        flush=True,
    )


def measure_service(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        make_teacher(folder)
        settings = TransformersEngineConfig(threads=THREADS)
        engine = TransformersEngine(folder, settings)
        config = TeacherConfig(name="benchmark", model=folder, engine=settings, in_flight=64)
        with serve_teacher(config) as teacher:
            for counted in (1.0, 0.5):
                rows = make_rows(64, counted)
                tokens = sum(len(row) for row in rows)
                print(f"\n64 rows, {tokens:,} tokens, {counted:.0%} counted, k={K}, V={VOCAB:,}; medians of {rounds}")
                for name, (bare, service) in request_patterns(engine, teacher, rows).items():
                    compare(name, bare, service, tokens, rounds)


def measure_signal(vocab_size: int, spread: float, tokens: int = 512) -> tuple[float, float, float]:
    """Return the bytes per token, and the mean forward and reverse KL (nats) that encoding adds.

    Distributions are reduced to k tokens and the rest.
    """
    logits = torch.randn(tokens, vocab_size, generator=torch.Generator().manual_seed(0)) * spread
    exact = logits.double().log_softmax(1)
    columns = reduce_logits(logits, torch.arange(tokens), TopK(K), logits.shape[1])
    signals = SignalBatch(TopK(K), torch.tensor([0, tokens]), vocab_size=vocab_size, **columns)
    wire = encode(signals)
    log_p, log_tail = decode(wire).at_temperature()
    assert signals.ids is not None
    p = torch.cat(
        [exact.gather(1, signals.ids), exact.scatter(1, signals.ids, -torch.inf).logsumexp(1)[:, None]], dim=1
    )
    q = torch.cat([log_p, log_tail[:, None]], dim=1).double()
    forward, reverse = ((a.exp() * (a - b)).sum(1).mean().item() for a, b in ((p, q), (q, p)))
    return len(wire) / tokens, forward, reverse


def measure_signals() -> None:
    print(f"\nSignals at k={K}, rows of 512 counted tokens; the error of the round trip in nats")
    for vocab_size, a_probability in ((32_000, 4), (128_000, 6)):
        for name, spread in (("flat", 0.02), ("moderate", 2.0), ("peaked", 8.0), ("one-hot", 60.0)):
            size, forward, reverse = measure_signal(vocab_size, spread)
            print(
                f"  V={vocab_size:7,} {name:9} {size:6.1f} bytes a token (goal {a_probability * K + 16}), "
                f"forward KL {forward:8.1e}, reverse KL {reverse:8.1e} (goal 1e-3)"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(THREADS)
    print(f"{machine()}, load before {os.getloadavg()[0]:.1f}")
    measure_signals()
    measure_service(rounds)


if __name__ == "__main__":
    main()
