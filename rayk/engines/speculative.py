"""Exact teacher-mixed sampling by speculative verification (ALGORITHMS §21): what student and teacher tell each other,
and the rules by which a token is kept.

MiniLLM (arXiv 2306.08543, §2.2) draws every token from p̃ = αp + (1−α)q, p the teacher's next-token distribution and q
the student's. Instead of one joint step of both models a token, the student drafts several tokens from q and the
teacher verifies them in one call, as in speculative decoding (Leviathan et al., arXiv 2211.17192), which is α = 1:

1. x ~ q is drafted. It is kept if its coin u < p̃(x)/q(x) = (1−α) + α·p(x)/q(x).
2. At the first drafted token that is not kept, go through candidates y ~ p and take y with probability
   (1 − q(y)/p(y))₊, each by a coin of its own. What was drafted after it is discarded.

Proof that the token at a position has the law p̃, given the tokens before it. A token x comes out of step 1 with
probability q(x)·min(1, p̃(x)/q(x)) = min(q(x), p̃(x)), so step 1 fails with probability 1 − Σ min(q, p̃) = Σ (p̃−q)₊ =
α·Σ (p−q)₊ = α·TV, since p̃ − q = α(p − q). A candidate is y *and* taken with probability p(y)·(1 − q(y)/p(y))₊ =
(p(y) − q(y))₊; candidates and their coins are independent of each other, of x and of u, so the first one taken is y
with probability (p(y) − q(y))₊/TV. In all: min(q, p̃) + α·TV·(p−q)₊/TV = min(q, p̃) + (p̃−q)₊ = p̃. ∎

All randomness is a function of the sequence's seed and the position, in streams apart: drafted tokens, their coins,
candidates, theirs.
A token is then a function of the tokens before it and of its own position's numbers, which nothing before it has used.
How many tokens are drafted at a time, how many candidates come in an answer and who shares a batch change the number of
calls, never the tokens; a position drafted again after a rejection may therefore use its numbers again. What must not
happen is that two decisions at one position use one number: coins shared with candidates, or a candidate tried twice,
bias the result.

Where p ≈ q to rounding, a rejection can happen though Σ (p−q)₊ is all but zero, and no candidate would ever be taken.
After n of them x is kept and counted (`Continuation.capped`). That moves the law by at most α·TV·(1−TV)ⁿ ≤ α/(e·n) in
total variation: 2e-5 at the defaults, at the worst TV there is.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from rayk.errors import InputError

_NUMBERS_A_BLOCK = 4  # that Philox makes of one count


class Stream(IntEnum):
    """What a random number decides. Streams are independent of each other."""

    DRAFTS = 0
    """Drafted tokens, a number a position."""
    COINS = 1
    """Whether a drafted token is kept, a number a position."""
    CANDIDATES = 2
    """The teacher's candidates, numbers of each position's own."""
    CANDIDATE_COINS = 3
    """Whether a candidate is taken, numbers of each position's own."""


def draw_uniforms(stream: Stream, seed: int, count: int, *, start: int, position: int = 0) -> np.ndarray:
    """Numbers `start` to `start + count` of a stream, or of those that a `position` has of its own; float64 [count] in
    [0, 1).

    Philox is keyed by (seed, stream), and its counter starts at (start, position): no two uses overlap.
    """
    key = np.array([seed, stream], np.uint64)
    counter = np.array([start // _NUMBERS_A_BLOCK, position, 0, 0], np.uint64)
    skipped = start % _NUMBERS_A_BLOCK
    return np.random.Generator(np.random.Philox(key=key, counter=counter)).random(skipped + count)[skipped:]


def sample_ids(logprobs: Tensor, numbers: Tensor) -> Tensor:
    """Ids int64 [rows, n] drawn from the distributions `logprobs` [rows, vocab], by inversion of uniform `numbers`,
    float64 [rows, n]. Never one of probability 0."""
    cumulative = logprobs.double().exp().cumsum(1)
    drawn = torch.searchsorted(cumulative, numbers * cumulative[:, -1:], right=True)
    return drawn.clamp(max=logprobs.shape[1] - 1)


@dataclass(frozen=True)
class MixedSampling:
    """How to sample from αp + (1−α)q. Temperature is 1 and nothing is truncated, else the bound w ≤ 1/(1−α) on
    MiniLLM's weights would not hold.

    Attributes:
        alpha: the teacher's share α; 0.2 in MiniLLM.
        max_new_tokens: longest continuation, EOS included.
        candidates: the teacher's draws that come with a rejection; twice as many with each further call for them.
        max_candidates: after so many draws at one position none of which was taken, the drafted token stays.

    Raises:
        InputError: a number out of its range.
    """

    alpha: float = 0.2
    max_new_tokens: int = 256
    candidates: int = 8
    max_candidates: int = 4088  # 8 + 16 + … + 2048

    def __post_init__(self) -> None:
        if not (0 <= self.alpha <= 1 and self.max_new_tokens >= 1 and 1 <= self.candidates <= self.max_candidates):
            raise InputError(
                "Teacher-mixed sampling needs 0 <= alpha <= 1, max_new_tokens >= 1 and 1 <= candidates <= "
                f"max_candidates, not {self}."
            )


@dataclass(frozen=True, eq=False)
class Draft:
    """One question to the teacher: are the last tokens of this sequence kept, and which come instead?

    Without drafted tokens it asks only for candidates for the token after `input_ids`.

    Attributes:
        input_ids: int32 [length], the whole sequence so far, drafted tokens last.
        logprobs: float32 [drafted], log q of the drafted tokens, in nats.
        coins: float64 [drafted], in [0, 1).
        alpha: the teacher's share.
        seed: the sequence's own, 0 to 2^64 − 1; its candidates follow from it.
        candidates: how many draws of the teacher's to send at the first rejected position.
        tried: how many of that position's draws have been sent before; they are not sent again.

    Raises:
        ValueError: log-probs and coins of different number, or no token before the first drafted one.
    """

    input_ids: np.ndarray
    logprobs: np.ndarray
    coins: np.ndarray
    alpha: float
    seed: int
    candidates: int
    tried: int = 0

    def __post_init__(self) -> None:
        if self.logprobs.shape != self.coins.shape or len(self.logprobs) >= len(self.input_ids):
            raise ValueError(
                f"a draft needs a log-prob and a coin for each drafted token and a token before them, not "
                f"{len(self.logprobs)} log-probs and {len(self.coins)} coins in a sequence of {len(self.input_ids)}"
            )

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def drafted(self) -> int:
        """How many of the last tokens are to be verified."""
        return len(self.logprobs)

    @property
    def start(self) -> int:
        """The position of the first drafted token."""
        return len(self.input_ids) - self.drafted

    def count_accepted(self, teacher_logprobs: np.ndarray) -> int:
        """How many drafted tokens are kept, given log p of each of them [drafted]."""
        with np.errstate(invalid="ignore"):
            # Where p > q a token is kept whatever its coin, so the ratio need not be computed above 1, nor overflow.
            ratio = np.exp(np.minimum(teacher_logprobs.astype(np.float64) - self.logprobs, 0.0))
        rejected = np.flatnonzero(~(self.coins < (1 - self.alpha) + self.alpha * ratio))
        return int(rejected[0]) if len(rejected) else self.drafted

    def candidate_numbers(self, kept: int) -> np.ndarray:
        """The uniform numbers its candidates are drawn by, float64 [candidates], where `kept` tokens are kept."""
        return draw_uniforms(
            Stream.CANDIDATES, self.seed, self.candidates, start=self.tried, position=self.start + kept
        )


@dataclass(frozen=True, eq=False)
class Verdict:
    """The teacher's answer to a draft.

    Attributes:
        kept: how many drafted tokens are kept, counted from the first.
        logprobs: float32 [min(kept + 1, drafted)], log p of the kept tokens, then of the one that is not, in nats.
        candidates: int32 [m], draws from p for the first position not kept; none where every drafted token is kept.
        candidate_logprobs: float32 [m], log p of the candidates.
    """

    accepted: int
    logprobs: np.ndarray
    candidates: np.ndarray
    candidate_logprobs: np.ndarray


def first_accepted(student_logprobs: np.ndarray, teacher_logprobs: np.ndarray, coins: np.ndarray) -> int | None:
    """The place of the first candidate that is taken: coin < 1 − q(y)/p(y). None: none of them.

    Args:
        student_logprobs, teacher_logprobs: log q and log p of the candidates, [m], nats.
        coins: float64 [m].
    """
    with np.errstate(over="ignore"):
        chance = -np.expm1(student_logprobs.astype(np.float64) - teacher_logprobs)
    taken = np.flatnonzero(coins < chance)
    return int(taken[0]) if len(taken) else None


def importance_weights(student_logprobs: np.ndarray, teacher_logprobs: np.ndarray, alpha: float) -> np.ndarray:
    """w = q/p̃ = 1/((1−α) + α·p/q) of each token, MiniLLM's importance weight; at most 1/(1−α)."""
    difference = teacher_logprobs.astype(np.float64) - student_logprobs
    return (1 / ((1 - alpha) + alpha * np.exp(np.minimum(difference, 700.0)))).astype(np.float32)


@dataclass(eq=False)
class Continuation:
    """A prompt being continued from p̃, draft by draft: `propose` tokens, send `next_draft()`, `settle` the answer; until
    `finish_reason` is there. After `settle` the draft may still be `open`: then ask again without proposing.

    Attributes:
        token_ids, student_logprobs, teacher_logprobs: what is settled so far; log q and log p in nats.
        finish_reason: 'stop' after a token of `ends`, 'length' after `max_new_tokens`, empty before.
        calls: questions settled.
        kept, rejected: drafted tokens that were tested, by what became of them.
        capped: rejected tokens that stayed because no candidate was ever taken.
    """

    prompt: np.ndarray
    seed: int
    sampling: MixedSampling
    ends: frozenset[int] = frozenset()
    token_ids: list[int] = field(default_factory=list)
    student_logprobs: list[float] = field(default_factory=list)
    teacher_logprobs: list[float] = field(default_factory=list)
    finish_reason: str = ""
    calls: int = 0
    accepted: int = 0
    rejected: int = 0
    capped: int = 0
    _draft: Draft | None = None
    _rejected: tuple[int, float, float] | None = None  # a token that no candidate has replaced yet, its log q and log p
    _tried: int = 0

    @property
    def position(self) -> int:
        """Where the next token goes."""
        return len(self.prompt) + len(self.token_ids)

    @property
    def remaining_tokens(self) -> int:
        """How many tokens may still come."""
        return self.sampling.max_new_tokens - len(self.token_ids)

    @property
    def is_pending(self) -> bool:
        """Whether a draft waits to be settled."""
        return self._draft is not None

    def sequence(self, drafted: Sequence[int] = ()) -> np.ndarray:
        """Prompt, settled tokens and `drafted`, int32 [length]."""
        return np.concatenate([self.prompt, np.asarray([*self.token_ids, *drafted], np.int32)]).astype(np.int32)

    def propose(self, token_ids: Sequence[int], logprobs: Sequence[float]) -> None:
        """Draft `token_ids`, drawn from q by the numbers of stream `DRAFTS`, with their log q."""
        coins = draw_uniforms(Stream.COINS, self.seed, len(token_ids), start=self.position)
        self._draft = Draft(
            self.sequence(token_ids), np.asarray(logprobs, np.float32), coins, self.sampling.alpha, self.seed,
            self.sampling.candidates,
        )  # fmt: skip

    def next_draft(self) -> Draft:
        """What to ask the teacher now: the draft, or for more candidates where it was rejected."""
        assert self._draft is not None
        if self._rejected is None:
            return self._draft
        nothing, more = np.zeros(0), min(self._tried + self.sampling.candidates, self._left)
        return Draft(self.sequence(), nothing, nothing, self.sampling.alpha, self.seed, more, self._tried)

    def apply_verdict(self, verdict: Verdict, student_logprobs_at: Callable[[int, np.ndarray], np.ndarray]) -> None:
        """Take in the teacher's answer to `next_draft()`.

        Args:
            student_logprobs_at: log q [m] of ids [m] at a position of the sequence, one that is in the open draft.
        """
        assert self._draft is not None
        self.calls += 1
        if self._rejected is None:
            self._keep(self._draft, verdict)
        if self._rejected is not None:
            self._replace(verdict, student_logprobs_at)
        if self._rejected is None:
            self._draft = None

    def _keep(self, draft: Draft, verdict: Verdict) -> None:
        tokens = draft.input_ids[draft.start :].tolist()
        answers = list(zip(tokens, draft.logprobs.tolist(), verdict.logprobs.tolist(), strict=False))
        for answer in answers[: verdict.accepted]:
            self._append(*answer)
        self.accepted += verdict.accepted
        if verdict.accepted < draft.drafted:
            self.rejected += 1
            self._rejected = answers[verdict.accepted]

    def _replace(self, verdict: Verdict, student_logprobs_at: Callable[[int, np.ndarray], np.ndarray]) -> None:
        assert self._rejected is not None
        count = len(verdict.candidates)
        coins = draw_uniforms(Stream.CANDIDATE_COINS, self.seed, count, start=self._tried, position=self.position)
        student = student_logprobs_at(self.position, verdict.candidates)
        taken = first_accepted(student, verdict.candidate_logprobs, coins)
        self._tried += count
        if taken is not None:
            chosen = int(verdict.candidates[taken]), float(student[taken]), float(verdict.candidate_logprobs[taken])
        elif self._left <= 0:
            self.capped += 1
            chosen = self._rejected
        else:
            return
        self._append(*chosen)
        self._rejected, self._tried = None, 0

    @property
    def _left(self) -> int:
        return self.sampling.max_candidates - self._tried

    def _append(self, token: int, student_logprob: float, teacher_logprob: float) -> None:
        self.token_ids.append(token)
        self.student_logprobs.append(student_logprob)
        self.teacher_logprobs.append(teacher_logprob)
        if token in self.ends:
            self.finish_reason = "stop"
        elif self.remaining_tokens == 0:
            self.finish_reason = "length"


def expected_tokens_per_call(rejection_rate: float, drafted: int) -> float:
    """Expected tokens that one call settles: Σ_{i<γ} (1−r)^i = (1 − (1−r)^γ)/r, where a drafted token is rejected with
    probability r = α·TV. The i-th one comes out, drafted or replaced, where all before it were kept."""
    if rejection_rate == 0:
        return float(drafted)
    return -math.expm1(drafted * math.log1p(-rejection_rate)) / rejection_rate if rejection_rate < 1 else 1.0


class DraftLength:
    """How many tokens to draft before the next call: most tokens for the time, by the acceptance seen so far.

    Drafting γ tokens and having them verified takes about γ + c of the student's steps, c being what a call costs; so
    γ maximises `expected_tokens_per_call` / (γ + c). Which tokens come out does not depend on it.
    """

    # Before anything is seen: MiniLLM's α = 0.2 at a total variation of 0.3, which makes γ = 16.
    _PRIOR_TOKENS, _PRIOR_REJECTED = 50, 3

    def __init__(self, call_cost: float = 11.0, longest: int = 64):
        self._call_cost = call_cost
        self._longest = longest
        self._accepted, self._rejected = 0, 0

    def observe(self, accepted: int, rejected: int) -> None:
        """So many more drafted tokens were kept, so many were not."""
        self._accepted += accepted
        self._rejected += rejected

    @property
    def rejection_rate(self) -> float:
        tested = self._accepted + self._rejected + self._PRIOR_TOKENS
        return (self._rejected + self._PRIOR_REJECTED) / tested

    @property
    def tokens(self) -> int:
        rate = self.rejection_rate
        return max(range(1, self._longest + 1), key=lambda n: expected_tokens_per_call(rate, n) / (n + self._call_cost))
