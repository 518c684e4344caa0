"""Rollouts from αp + (1−α)q, the student drafting and the teacher verifying (MiniLLM's teacher-mixed sampling, arXiv
2306.08543 §2.2; how and why it is exact: `rayk.engines.speculative`).

Some sequences are drafted while others are being verified, so neither side waits for the other. Of a drafted position
the student keeps log q of the token, the final hidden state and the log-normaliser: what it takes to evaluate q at the
teacher's candidates, at a hidden state's width a position instead of a vocabulary's.
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
from rayk.models.kv_cache import Batch, KeyValues, can_continue

Verify = Callable[[list[Draft]], Awaitable[list[Verdict]]]
"""Asks a teacher: `rayk.teachers.Teacher.averify`, or an engine's `verify`."""

_LANES = 2  # one drafts while the other's drafts are being verified


@dataclass(frozen=True, eq=False)
class MixedRollout:
    """One sequence sampled from αp + (1−α)q, and what it cost. p and q are distributions among the vocabulary's real
    tokens, at temperature 1.

    Attributes:
        token_ids: int32 [tokens], EOS included where it ended so.
        student_logprobs: float32 [tokens], log q under the student that drafted, in nats.
        teacher_logprobs: float32 [tokens], log p, in nats.
        weights: float32 [tokens], the one-step weight w = q/(αp + (1−α)q), at most 1/(1−α).
        finish_reason: 'stop' or 'length'.
        calls: drafts of this sequence that the teacher was asked about.
        kept, rejected: drafted tokens that were tested, by what became of them.
        capped: rejected tokens that stayed, because none of `MixedSampling.max_candidates` draws was taken.
    """

    token_ids: np.ndarray
    student_logprobs: np.ndarray
    teacher_logprobs: np.ndarray
    weights: np.ndarray
    finish_reason: str
    calls: int
    kept: int
    rejected: int
    capped: int

    @property
    def calls_per_token(self) -> float:
        """Teacher calls a token; sampling with both models in step takes 1."""
        return self.calls / len(self.token_ids)

    @property
    def acceptance(self) -> float:
        """Share of the tested drafted tokens that were kept; 1 − α·TV on average."""
        return self.kept / (self.kept + self.rejected)


async def sample_teacher_mixed(
    model: CausalLM, verify: Verify, prompts: Sequence[np.ndarray], seeds: Sequence[int], sampling: MixedSampling, *,
    vocab_size: int, ends: Collection[int] = (), batch_size: int = 64, draft_length: DraftLength | None = None,
    computing: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> list[MixedRollout]:  # fmt: skip
    """Continue `prompts` from αp + (1−α)q; a rollout each, in order.

    A rollout follows from the models, its prompt and its seed. Who shares its batch, how long drafts are and which
    replica answers change nothing but rounding.

    Args:
        model: the student, in eval mode, not to be changed meanwhile.
        verify: asks the teacher.
        prompts: int32 [length] each, at least one token.
        seeds: one a prompt, 0 to 2^64 − 1; equal seeds share their random numbers.
        vocab_size: the real tokens that both models know (`EngineInfo.vocab_size`); padding is never drawn.
        ends: token ids that end a sequence.
        batch_size: how many sequences are drafted at a time; as many again are being verified.
        draft_length: how many tokens are drafted at a time; by default as suits the acceptance.
        computing: entered, on the thread that computes, whenever the student does: its autocast.

    Raises:
        InputError: a student that cannot draft, an empty prompt, no room for `max_new_tokens`.
        UnusableSignal: the teacher's log-probs are NaN; the error names the prompts.
        RaykError: the student's are.
    """
    _check(model, prompts, sampling, vocab_size)
    drafter = _Drafter(model, vocab_size, frozenset(ends))
    rows = [
        _Row(place, Continuation(np.asarray(prompt, np.int32), int(seed), sampling, frozenset(ends)))
        for place, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    ]
    turn = asyncio.Lock()

    def student(work: Callable[..., None], *arguments: Any) -> None:
        # Not inference mode: buffers that a forward makes would be of no use to the backward of a later step.
        with torch.no_grad(), computing():
            work(*arguments)

    # Lanes share nothing, so that whose answer comes first does not decide who is computed with whom.
    async def lane(waiting: deque[_Row], length: DraftLength) -> None:
        mine: list[_Row] = []
        while mine or waiting:
            while waiting and len(mine) < batch_size:
                mine.append(waiting.popleft())
            fresh = [row for row in mine if not row.text.is_pending]
            if fresh:
                async with turn:
                    await asyncio.to_thread(student, drafter.draft, fresh, length.tokens)
            verdicts = await verify([row.text.next_draft() for row in mine])
            before = _tested(mine)
            async with turn:
                await asyncio.to_thread(student, drafter.settle, mine, verdicts)
            length.observe(*(_tested(mine) - before))
            mine = [row for row in mine if not row.text.finish_reason]

    lanes = [deque(rows[start::_LANES]) for start in range(_LANES)]
    await gather(lane(waiting, copy(draft_length or DraftLength())) for waiting in lanes)
    return [_rollout(row.text) for row in rows]


@dataclass(eq=False)
class _Row:
    """A sequence being continued. After drafting: what evaluates q at the drafted positions, from `start` on."""

    place: int
    text: Continuation
    past: KeyValues = field(default_factory=KeyValues)
    start: int = 0
    hidden: Tensor | None = None
    """[drafted, width]"""
    normalisers: Tensor | None = None
    """float32 [drafted], logsumexp over the real tokens' logits."""


class _Drafter:
    """The student's side of a round."""

    def __init__(self, model: CausalLM, vocab_size: int, ends: frozenset[int]):
        self._model = model
        self._head = get_head(model)
        self._vocab_size = vocab_size
        self._ends = torch.tensor(sorted(ends), dtype=torch.long, device=model.device)

    def draft(self, rows: list[_Row], tokens: int) -> None:
        """Propose up to `tokens` more tokens of each row, to an end token at most."""
        device = self._model.device
        lengths = torch.tensor([min(tokens, row.text.remaining_tokens) for row in rows], device=device)
        numbers = torch.from_numpy(
            np.stack([draw_uniforms(Stream.DRAFTS, row.text.seed, tokens, start=row.text.position) for row in rows])
        ).to(device)
        batch, last = self._begin(rows)
        going = torch.ones(len(rows), dtype=torch.bool, device=device)
        drafted = torch.zeros_like(lengths)
        steps: list[tuple[Tensor, ...]] = []
        while True:
            logits = self._head.logits(last)[:, : self._vocab_size]
            normalisers = logits.logsumexp(1)
            logprobs = logits - normalisers[:, None]
            chosen = sample_ids(logprobs, numbers[:, len(steps), None])
            steps.append((chosen[:, 0], logprobs.gather(1, chosen)[:, 0], last, normalisers))
            drafted += going
            going = going & (drafted < lengths) & ~torch.isin(chosen[:, 0], self._ends)
            if not going.any():
                break
            last = batch.read(chosen, going.long())[:, 0]
        ids, logprobs, hidden, normalisers = (torch.stack(column, dim=1) for column in zip(*steps, strict=True))
        if not logprobs.isfinite().all():
            raise RaykError("The student's log-probs are NaN while it drafts; lower the learning rate or look for what "
                            "broke its weights.")  # fmt: skip
        columns = zip(rows, drafted.tolist(), ids.tolist(), logprobs.tolist(), batch.key_values(), strict=True)
        for place, (row, count, own_ids, own_logprobs, past) in enumerate(columns):
            row.start, row.past = row.text.position, past
            row.hidden, row.normalisers = hidden[place], normalisers[place]
            row.text.propose(own_ids[:count], own_logprobs[:count])

    def _begin(self, rows: list[_Row]) -> tuple[Batch, Tensor]:
        """The rows as a batch that has read all of their tokens, and its last states [rows, width]. What is unread is
        the last token, or a whole prompt."""
        unread = [torch.from_numpy(row.text.sequence()[len(row.past) :].astype(int)) for row in rows]
        device = self._model.device
        counts = torch.tensor(list(map(len, unread)), device=device)
        batch = Batch(self._model, [row.past for row in rows])
        hidden = batch.read(pad_sequence(unread, batch_first=True).to(device), counts)
        if len(set(map(len, unread))) > 1:
            batch = Batch(self._model, batch.key_values())
        return batch, hidden[torch.arange(len(rows), device=device), counts - 1]

    def settle(self, rows: list[_Row], verdicts: list[Verdict]) -> None:
        """Take the verdicts in, and roll back what was read of discarded tokens."""
        if broken := [row.place for row, verdict in zip(rows, verdicts, strict=True) if _unusable(verdict)]:
            raise UnusableSignal(f"The teacher's log-probs after prompt {broken[0]} are NaN.", broken)
        for row, verdict in zip(rows, verdicts, strict=True):
            row.text.apply_verdict(verdict, partial(self._logprobs_at, row))
            if not row.text.is_pending:
                row.past = row.past.truncate(row.text.position - 1)
                row.hidden = row.normalisers = None

    def _logprobs_at(self, row: _Row, position: int, ids: np.ndarray) -> np.ndarray:
        """log q of `ids` [m] at a drafted position."""
        assert row.hidden is not None and row.normalisers is not None
        place = position - row.start
        head = self._head.select(torch.from_numpy(ids.astype(int)).to(row.hidden.device))
        return (head.logits(row.hidden[place, None])[0] - row.normalisers[place]).cpu().numpy()


def _tested(rows: list[_Row]) -> np.ndarray:
    """How many drafted tokens of `rows` were kept, how many rejected."""
    return np.array([sum(row.text.accepted for row in rows), sum(row.text.rejected for row in rows)])


def _unusable(verdict: Verdict) -> bool:
    return bool(np.isnan(verdict.logprobs).any() or np.isnan(verdict.candidate_logprobs).any())


def _rollout(text: Continuation) -> MixedRollout:
    student, teacher = (np.asarray(each, np.float32) for each in (text.student_logprobs, text.teacher_logprobs))
    return MixedRollout(
        np.asarray(text.token_ids, np.int32), student, teacher, importance_weights(student, teacher, text.sampling.alpha),
        text.finish_reason, text.calls, text.accepted, text.rejected, text.capped,
    )  # fmt: skip


def _check(model: CausalLM, prompts: Sequence[np.ndarray], sampling: MixedSampling, vocab_size: int) -> None:
    name = type(model).__name__
    if not can_continue(model):
        raise InputError(
            f"{name} cannot take back tokens it has read, which teacher-mixed sampling needs; choose a student with "
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
                f"{name} takes 1 to {longest} tokens in all."
            )
