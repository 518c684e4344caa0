"""What teacher-mixed sampling asks of the teacher, beside sampling with both models in step, token by token.

    python -m tests.benchmarks.speed.teacher_mixed

First how often it calls the teacher, where both models in step call once a token: that depends on the models and α
alone. Then how long a batch takes with a teacher so many milliseconds away (each call waits as long before the engine
computes). In step, one call a token carries the whole batch, and either model keeps its keys and values. Both models
run in this process, so the teacher's computing is in all times. The student is the teacher with noise on its head, as
much as makes the mean total variation that is printed. The limit is that of endless drafts, α·TV.
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
from rayk.models.kv_cache import Batch, KeyValues  # noqa: E402
from rayk.rollouts.teacher_mixed import MixedRollout, sample_teacher_mixed  # noqa: E402
from tests.benchmarks.machine import machine  # noqa: E402
from tests.engines.reference import prompts_of  # noqa: E402
from tests.tiny import tiny_model, tiny_tokenizer  # noqa: E402

ALPHA, PROMPT, NEW_TOKENS, END = 0.2, 20, 200, 1
NOISES, TIMED_NOISE = (0.1, 0.2, 0.3, 0.45), 0.3
AWAY_MS = (0, 5, 50)
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
    model, engine = made(folder, SMALL)
    for noise in NOISES:
        rollouts = asyncio.run(drafted(noisy(model, noise), engine, sequences))
        tokens = sum(len(one.token_ids) for one in rollouts)
        calls, kept, rejected, capped = (
            sum(getattr(one, name) for one in rollouts) for name in ("calls", "kept", "rejected", "capped")
        )
        rate = rejected / (kept + rejected)
        print(
            f"  TV {rate / ALPHA:.2f}: {calls / tokens:.3f} calls a token (limit {rate:.3f}) over {tokens:,} tokens, "
            f"{capped} capped",
            flush=True,
        )


def take_time(folder: str, sequences: int, rounds: int) -> None:
    model, engine = made(folder, TIMED)
    student, teacher = noisy(model, TIMED_NOISE), load_model(folder)
    for away in AWAY_MS:
        ours, theirs = [], []
        for _ in range(rounds):
            began = time.perf_counter()
            rollouts = asyncio.run(drafted(student, engine, sequences, away / 1000))
            ours.append(sum(len(one.token_ids) for one in rollouts) / (time.perf_counter() - began))
            began = time.perf_counter()
            tokens = in_step(student, teacher, engine.info.vocab_size, sequences, away / 1000)
            theirs.append(tokens / (time.perf_counter() - began))
        mine, other = statistics.median(ours), statistics.median(theirs)
        print(
            f"  {away} ms away: {mine:,.0f} tokens/s, in step {other:,.0f}: {mine / other:.1f} times (medians of "
            f"{rounds})",
            flush=True,
        )


def made(folder: str, size: dict[str, int]) -> tuple[CausalLM, TransformersEngine]:
    """A model and an engine with its weights."""
    model = tiny_model(folder, seed=1, peaked=3.0, tokenizer=tiny_tokenizer(), **size)
    return model, TransformersEngine(folder)


@torch.no_grad()
def noisy(model: CausalLM, noise: float) -> CausalLM:
    student = copy.deepcopy(model)
    head = student.lm_head.weight
    head += noise * head.std() * torch.randn(head.shape, generator=torch.Generator().manual_seed(0))
    return student


async def drafted(
    student: CausalLM, engine: TransformersEngine, sequences: int, away_seconds: float = 0.0
) -> list[MixedRollout]:
    async def verify(drafts: list[Draft]) -> list[Verdict]:
        await asyncio.sleep(away_seconds)
        return await engine.verify(drafts)

    return await sample_teacher_mixed(
        student, verify, prompts_of(*repeat(PROMPT, sequences)), range(sequences), MixedSampling(ALPHA, NEW_TOKENS),
        vocab_size=engine.info.vocab_size, ends=[END],
    )  # fmt: skip


@torch.no_grad()
def in_step(student: CausalLM, teacher: CausalLM, vocab_size: int, sequences: int, away_seconds: float) -> int:
    """As LMOps samples: both models read each token, and the next is drawn from their mixture. The tokens written."""
    prompts: Sequence[np.ndarray] = prompts_of(*repeat(PROMPT, sequences))
    unread = torch.from_numpy(np.stack(prompts).astype(int))
    batches = [(model, Batch(model, [KeyValues()] * sequences)) for model in (student, teacher)]
    going, tokens = torch.ones(sequences, dtype=torch.bool), 0
    random = torch.Generator().manual_seed(0)
    for _ in range(NEW_TOKENS):
        time.sleep(away_seconds)
        q, p = (
            get_head(model).logits(batch.read(unread)[:, -1])[:, :vocab_size].softmax(1) for model, batch in batches
        )
        unread = torch.multinomial(ALPHA * p + (1 - ALPHA) * q, 1, generator=random)
        tokens += int(going.sum())
        going &= unread[:, 0] != END
        if not going.any():
            break
    return tokens


if __name__ == "__main__":
    main()
