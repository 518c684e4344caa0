"""Sample rollouts from αp + (1−α)q: the student drafts and the teacher verifies (MiniLLM's teacher-mixed sampling,
arXiv 2306.08543 §2.2; `rayk.engines.speculative` describes the algorithm and shows that it is exact).

Some sequences are drafted while others are verified, so neither side waits for the other. For each drafted position the
student stores the token's log q, the final hidden state and the log-normalizer. With these it computes q of the
teacher's candidates; the memory per position is the hidden size instead of the vocabulary size.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rayk.engines.batching import gather
from rayk.engines.speculative import (
    Continuation,
    Draft,
    DraftLength,
    MixedSampling,
    Stream,
    Verdict,
    draw_uniforms,
    importance_weights,
    sample_ids,
)
from rayk.errors import InputError, RaykError, UnusableSignal
from rayk.models import CausalLM, get_head, max_positions
from rayk.models.head import get_decoding_head
from rayk.models.kv_cache import CachedBatch, KeyValues, can_continue

Verify = Callable[[list[Draft]], Awaitable[list[Verdict]]]
"""Lets a teacher verify drafts: `rayk.teachers.Teacher.averify`, or an engine's `verify`."""

_LANES = 2  # one lane drafts while the teacher verifies the drafts of the other


@dataclass(frozen=True, eq=False)
class MixedRollout:
    """A sequence sampled from αp + (1−α)q, and its cost.

    p and q are distributions over the real vocabulary, at temperature 1.

    Attributes:
        token_ids: int32 [tokens], including the end token if there is one.
        student_logprobs: float32 [tokens], log q under the student that drafted, in nats.
        teacher_logprobs: float32 [tokens], log p, in nats.
        weights: float32 [tokens], the one-step weight w = q/(αp + (1−α)q), at most 1/(1−α).
        finish_reason: 'stop' or 'length'.
        calls: number of drafts of this sequence that were sent to the teacher.
        accepted, rejected: numbers of drafted tokens that the teacher accepted and rejected.
        capped: number of rejected tokens that remain because none of `MixedSampling.max_candidates` candidates was
            accepted.
    """

    token_ids: np.ndarray
    student_logprobs: np.ndarray
    teacher_logprobs: np.ndarray
    weights: np.ndarray
    finish_reason: str
    calls: int
    accepted: int
    rejected: int
    capped: int

    @property
    def acceptance(self) -> float:
        """Accepted share of the drafted tokens; 1 − α·TV on average."""
        return self.accepted / (self.accepted + self.rejected)


async def sample_teacher_mixed(
    model: CausalLM, verify: Verify, prompts: Sequence[np.ndarray], seeds: Sequence[int], sampling: MixedSampling, *,
    vocab_size: int, eos_token_ids: Collection[int] = (), batch_size: int = 64,
    draft_length: DraftLength | None = None, student_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> list[MixedRollout]:  # fmt: skip
    """Continue `prompts` with samples from αp + (1−α)q; return one rollout per prompt, in order.

    A rollout depends on the models, its prompt and its seed only. The composition of batches, the draft lengths and the
    choice of replicas change nothing but rounding.

    Args:
        model: the student, in eval mode; it must not change during the call.
        verify: sends drafts to the teacher and returns its verdicts.
        prompts: int32 [length] each, at least one token.
        seeds: one per prompt, 0 to 2^64 − 1; equal seeds share their random numbers.
        vocab_size: number of tokens that both models know (`EngineInfo.vocab_size`); padding is never sampled.
        eos_token_ids: ids of the tokens that end a sequence.
        batch_size: number of sequences that are drafted at a time; the same number is being verified.
        draft_length: number of tokens per draft; by default it adapts to the acceptance.
        student_context: returns a context manager for the student's computations, such as autocast; it is entered on
            the thread that computes.

    Raises:
        InputError: the student cannot draft, a prompt is empty, or there is no room for `max_new_tokens`.
        UnusableSignal: the teacher's log-probs are NaN; the error names the prompts.
        RaykError: the student's log-probs are NaN.
    """
    _check(model, prompts, sampling, vocab_size)
    with torch.no_grad(), student_context():
        drafter = _Drafter(model, vocab_size, frozenset(eos_token_ids))
    rows = [
        _Row(number, Continuation(np.asarray(prompt, np.int32), int(seed), sampling, frozenset(eos_token_ids)))
        for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    ]
    student_lock = asyncio.Lock()

    def run_student(work: Callable[..., None], *arguments: Any) -> None:
        # Not inference mode: buffers created in a forward could not be used in a later step's backward.
        with torch.no_grad(), student_context():
            work(*arguments)

    # Each row stays in one lane, so the order of the teacher's answers does not change the composition of batches.
    async def run_lane(waiting: deque[_Row], length: DraftLength) -> None:
        active: list[_Row] = []
        while active or waiting:
            while waiting and len(active) < batch_size:
                active.append(waiting.popleft())
            undrafted = [row for row in active if not row.continuation.is_pending]
            if undrafted:
                async with student_lock:
                    await asyncio.to_thread(run_student, drafter.draft, undrafted, length.tokens)
            verdicts = await verify([row.continuation.next_draft() for row in active])
            before = _count_tested(active)
            async with student_lock:
                await asyncio.to_thread(run_student, drafter.apply_verdicts, active, verdicts)
            length.observe(*(_count_tested(active) - before))
            active = [row for row in active if not row.continuation.finish_reason]

    lanes = [deque(rows[start::_LANES]) for start in range(_LANES)]
    await gather(run_lane(waiting, copy(draft_length or DraftLength())) for waiting in lanes)
    return [_to_rollout(row.continuation) for row in rows]


@dataclass(eq=False)
class _Row:
    """A sequence in progress. After a draft it contains the student's states at the drafted positions, from `start` on,
    from which q is computed."""

    number: int
    continuation: Continuation
    past: KeyValues = field(default_factory=KeyValues)
    start: int = 0
    hidden: Tensor | None = None
    """[drafted, width]"""
    normalizers: Tensor | None = None
    """float32 [drafted], logsumexp over the real vocabulary's logits."""


class _Drafter:
    """The student's part of a round: draft, and apply the teacher's verdicts."""

    def __init__(self, model: CausalLM, vocab_size: int, eos_token_ids: frozenset[int]):
        self._model = model
        self._head = get_decoding_head(model)
        self._vocab_size = vocab_size
        self._eos_token_ids = torch.tensor(sorted(eos_token_ids), dtype=torch.long, device=model.device)

    def draft(self, rows: list[_Row], tokens: int) -> None:
        """Draft up to `tokens` tokens of each row; a row stops at an end token."""
        device = self._model.device
        continuations = [row.continuation for row in rows]
        lengths = torch.tensor([min(tokens, one.remaining_tokens) for one in continuations], device=device)
        numbers = torch.from_numpy(
            np.stack([draw_uniforms(Stream.DRAFTS, one.seed, tokens, start=one.position) for one in continuations])
        ).to(device)
        batch, last = self._read_rows(rows, tokens)
        drafting = torch.ones(len(rows), dtype=torch.bool, device=device)
        drafted = torch.zeros_like(lengths)
        steps: list[tuple[Tensor, ...]] = []
        while True:
            logits = self._head.logits(last)[:, : self._vocab_size]
            normalizers = logits.logsumexp(1)
            logprobs = logits - normalizers[:, None]
            chosen = sample_ids(logprobs, numbers[:, len(steps), None])
            steps.append((chosen[:, 0], logprobs.gather(1, chosen)[:, 0], last, normalizers))
            drafted += drafting
            drafting = drafting & (drafted < lengths) & ~torch.isin(chosen[:, 0], self._eos_token_ids)
            if not drafting.any():
                break
            last = batch.forward(chosen, drafting.long())[:, 0]
        ids, logprobs, hidden, normalizers = (torch.stack(column, dim=1) for column in zip(*steps, strict=True))
        if not logprobs.isfinite().all():
            raise RaykError("The student's log-probs are NaN while it drafts; lower the learning rate, or check its "
                            "weights.")  # fmt: skip
        columns = zip(rows, drafted.tolist(), ids.tolist(), logprobs.tolist(), batch.key_values(), strict=True)
        for number, (row, count, row_ids, row_logprobs, past) in enumerate(columns):
            row.start, row.past = row.continuation.position, past
            row.hidden, row.normalizers = hidden[number], normalizers[number]
            row.continuation.propose(row_ids[:count], row_logprobs[:count])

    def _read_rows(self, rows: list[_Row], tokens: int) -> tuple[CachedBatch, Tensor]:
        """Return a batch with the keys and values of all tokens of the rows and room for `tokens` more, and its last
        hidden states [rows, width].

        Computes the tokens that the KV caches of the rows do not contain yet: a whole prompt before the first draft,
        then the last token.
        """
        unread = [torch.from_numpy(row.continuation.sequence()[len(row.past) :].astype(int)) for row in rows]
        device = self._model.device
        counts = torch.tensor(list(map(len, unread)), device=device)
        batch = CachedBatch(self._model, [row.past for row in rows], room=tokens)
        hidden = batch.forward(pad_sequence(unread, batch_first=True).to(device), counts)
        if len(set(map(len, unread))) > 1:
            batch = CachedBatch(self._model, batch.key_values(), room=tokens)
        return batch, hidden[torch.arange(len(rows), device=device), counts - 1]

    def apply_verdicts(self, rows: list[_Row], verdicts: list[Verdict]) -> None:
        """Apply the verdicts, and remove discarded tokens from the KV cache."""
        if unusable := [row.number for row, verdict in zip(rows, verdicts, strict=True) if _has_nan(verdict)]:
            raise UnusableSignal(f"The teacher's log-probs after prompt {unusable[0]} are NaN.", unusable)
        for row, verdict in zip(rows, verdicts, strict=True):
            row.continuation.apply_verdict(verdict, partial(self._logprobs_at, row))
            if not row.continuation.is_pending:
                row.past = row.past.truncate(row.continuation.position - 1)
                row.hidden = row.normalizers = None

    def _logprobs_at(self, row: _Row, position: int, ids: np.ndarray) -> np.ndarray:
        """Return log q of `ids` [m] at a drafted position."""
        assert row.hidden is not None and row.normalizers is not None
        place = position - row.start
        head = self._head.select(torch.from_numpy(ids.astype(int)).to(row.hidden.device))
        return (head.logits(row.hidden[place, None])[0] - row.normalizers[place]).cpu().numpy()


def _count_tested(rows: list[_Row]) -> np.ndarray:
    """Return the numbers of accepted and of rejected drafted tokens of `rows`."""
    return np.array([sum(row.continuation.accepted for row in rows), sum(row.continuation.rejected for row in rows)])


def _has_nan(verdict: Verdict) -> bool:
    return bool(np.isnan(verdict.logprobs).any() or np.isnan(verdict.candidate_logprobs).any())


def _to_rollout(continuation: Continuation) -> MixedRollout:
    student, teacher = (
        np.asarray(values, np.float32) for values in (continuation.student_logprobs, continuation.teacher_logprobs)
    )
    weights = importance_weights(student, teacher, continuation.sampling.alpha)
    return MixedRollout(
        np.asarray(continuation.token_ids, np.int32), student, teacher, weights, continuation.finish_reason,
        continuation.calls, continuation.accepted, continuation.rejected, continuation.capped,
    )  # fmt: skip


def _check(model: CausalLM, prompts: Sequence[np.ndarray], sampling: MixedSampling, vocab_size: int) -> None:
    name = type(model).__name__
    if not can_continue(model):
        raise InputError(
            f"{name} cannot remove tokens from its cache, which teacher-mixed sampling requires; choose a student with "
            "attention layers only, or sample from the student alone."
        )
    if model.training:
        raise InputError("The student is in training mode, in which dropout changes q; call eval() before sampling.")
    if vocab_size > get_head(model).vocab_size:
        raise InputError(
            f"The teacher has {vocab_size} tokens, but {name} only {get_head(model).vocab_size}; student and teacher "
            "must share a tokenizer."
        )
    longest = max_positions(model.config)
    for prompt in prompts:
        if not 1 <= len(prompt) <= longest - sampling.max_new_tokens:
            raise InputError(
                f"A prompt of {len(prompt)} tokens cannot be continued by max_new_tokens ({sampling.max_new_tokens}): "
                f"{name} takes 1 to {longest} tokens in total."
            )
