"""Teacher-mixed sampling with drafts, against running both models token by token: teacher calls and throughput.

    python -m tests.benchmarks.speed.teacher_mixed

First the number of teacher calls per token, which depends on the models and α only (token by token it is 1). Then the
throughput with a latency of some milliseconds before each call. Token by token, one call serves the whole batch, and
both models keep their key-value caches. Both models run in this process, so all times contain the teacher's
computation. The student is the teacher with noise on its head; the noise determines the printed mean total variation
(TV). The limit for infinitely long drafts is α·TV calls per token. How to read it: calls per token, lower is better;
"times" is the throughput with drafts over that token by token.
"""

import argparse
import asyncio
import copy
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import repeat

import numpy as np

from rayk.environment import set_threading

set_threading()

import torch  # noqa: E402

from rayk.engines.speculative import Draft, MixedSampling, Verdict  # noqa: E402
from rayk.engines.transformers import TransformersEngine  # noqa: E402
from rayk.models import CausalLM, get_head, load_model  # noqa: E402
from rayk.models.kv_cache import CachedBatch, KeyValues  # noqa: E402
from rayk.rollouts.teacher_mixed import MixedRollout, sample_teacher_mixed  # noqa: E402
from tests.benchmarks.machine import machine  # noqa: E402
from tests.engines.reference import prompts_of  # noqa: E402
from tests.tiny import tiny_model, tiny_tokenizer  # noqa: E402

ALPHA, PROMPT, NEW_TOKENS, END = 0.2, 20, 200, 1
NOISES, TIMED_NOISE = (0.1, 0.2, 0.3, 0.45), 0.3
LATENCIES_MS = (0, 5, 50)
SMALL, TIMED = {"hidden": 32, "layers": 2}, {"hidden": 256, "layers": 4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine()}; {given.sequences} sequences of {NEW_TOKENS} tokens at most, alpha {ALPHA}")
    print("goal at a TV of 0.2 to 0.4: 0.15 calls a token")
    with tempfile.TemporaryDirectory() as folder:
        count_calls(folder, given.sequences)
    with tempfile.TemporaryDirectory() as folder:
        take_time(folder, given.sequences, given.rounds)


def count_calls(folder: str, sequences: int) -> None:
    model, engine = make_model_and_engine(folder, SMALL)
    for noise in NOISES:
        rollouts = asyncio.run(sample_with_drafts(add_noise(model, noise), engine, sequences))
        tokens = sum(len(rollout.token_ids) for rollout in rollouts)
        calls, kept, rejected, capped = (
            sum(getattr(rollout, name) for rollout in rollouts) for name in ("calls", "accepted", "rejected", "capped")
        )
        rate = rejected / (kept + rejected)
        print(
            f"  TV {rate / ALPHA:.2f}: {calls / tokens:.3f} calls a token (limit {rate:.3f}) over {tokens:,} tokens, "
            f"{capped} capped",
            flush=True,
        )


def take_time(folder: str, sequences: int, rounds: int) -> None:
    model, engine = make_model_and_engine(folder, TIMED)
    student, teacher = add_noise(model, TIMED_NOISE), load_model(folder)
    for latency in LATENCIES_MS:
        with_drafts, token_by_token = [], []
        for _ in range(rounds):
            began = time.perf_counter()
            rollouts = asyncio.run(sample_with_drafts(student, engine, sequences, latency / 1000))
            with_drafts.append(sum(len(rollout.token_ids) for rollout in rollouts) / (time.perf_counter() - began))
            began = time.perf_counter()
            tokens = sample_token_by_token(student, teacher, engine.info.vocab_size, sequences, latency / 1000)
            token_by_token.append(tokens / (time.perf_counter() - began))
        ours, other = statistics.median(with_drafts), statistics.median(token_by_token)
        print(
            f"  {latency} ms away: {ours:,.0f} tokens/s, in step {other:,.0f}: {ours / other:.1f} times (medians of "
            f"{rounds})",
            flush=True,
        )


def make_model_and_engine(folder: str, size: dict[str, int]) -> tuple[CausalLM, TransformersEngine]:
    """Return a tiny model and an engine with the same weights."""
    model = tiny_model(folder, seed=1, peaked=3.0, tokenizer=tiny_tokenizer(), **size)
    return model, TransformersEngine(folder)


@torch.no_grad()
def add_noise(model: CausalLM, noise: float) -> CausalLM:
    student = copy.deepcopy(model)
    head = student.lm_head.weight
    head += noise * head.std() * torch.randn(head.shape, generator=torch.Generator().manual_seed(0))
    return student


async def sample_with_drafts(
    student: CausalLM, engine: TransformersEngine, sequences: int, latency_seconds: float = 0.0
) -> list[MixedRollout]:
    async def verify(drafts: list[Draft]) -> list[Verdict]:
        await asyncio.sleep(latency_seconds)
        return await engine.verify(drafts)

    return await sample_teacher_mixed(
        student, verify, prompts_of(*repeat(PROMPT, sequences)), range(sequences), MixedSampling(ALPHA, NEW_TOKENS),
        vocab_size=engine.info.vocab_size, eos_token_ids=[END],
    )  # fmt: skip


@torch.no_grad()
def sample_token_by_token(
    student: CausalLM, teacher: CausalLM, vocab_size: int, sequences: int, latency_seconds: float
) -> int:
    """Sample as LMOps does: both models read each token, and the next is drawn from their mixture.

    Returns:
        the number of sampled tokens.
    """
    prompts: Sequence[np.ndarray] = prompts_of(*repeat(PROMPT, sequences))
    unread = torch.from_numpy(np.stack(prompts).astype(int))
    batches = [(model, CachedBatch(model, [KeyValues()] * sequences)) for model in (student, teacher)]
    going, tokens = torch.ones(sequences, dtype=torch.bool), 0
    random = torch.Generator().manual_seed(0)
    for _ in range(NEW_TOKENS):
        time.sleep(latency_seconds)
        q, p = (
            get_head(model).logits(batch.forward(unread)[:, -1])[:, :vocab_size].softmax(1) for model, batch in batches
        )
        unread = torch.multinomial(ALPHA * p + (1 - ALPHA) * q, 1, generator=random)
        tokens += int(going.sum())
        going &= unread[:, 0] != END
        if not going.any():
            break
    return tokens


if __name__ == "__main__":
    main()
