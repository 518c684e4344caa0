"""Exact teacher-mixed sampling by speculative verification: the messages between student and teacher, and the rules by
which a drafted token is accepted or replaced.

MiniLLM (arXiv 2306.08543, §2.2) draws every token from p̃ = αp + (1−α)q, p the teacher's next-token distribution and q
the student's. Instead of one joint step of both models per token, the student drafts several tokens from q and the
teacher verifies them in one call, as in speculative decoding (Leviathan et al., arXiv 2211.17192), which is α = 1:

1. x ~ q is drafted. It is accepted if its coin u < p̃(x)/q(x) = (1−α) + α·p(x)/q(x).
2. At the first rejected token, try candidates y ~ p one after the other and accept y with probability
   (1 − q(y)/p(y))₊, each by a coin of its own. The tokens drafted after the rejected one are discarded.

Proof that the token at a position has the law p̃, given the tokens before it. A token x results from step 1 with
probability q(x)·min(1, p̃(x)/q(x)) = min(q(x), p̃(x)), so step 1 fails with probability 1 − Σ min(q, p̃) = Σ (p̃−q)₊ =
α·Σ (p−q)₊ = α·TV, since p̃ − q = α(p − q). A candidate is y *and* accepted with probability p(y)·(1 − q(y)/p(y))₊ =
(p(y) − q(y))₊; candidates and their coins are independent of each other, of x and of u, so the first accepted one is y
with probability (p(y) − q(y))₊/TV. In total: min(q, p̃) + α·TV·(p−q)₊/TV = min(q, p̃) + (p̃−q)₊ = p̃. ∎

All random numbers are a function of the sequence's seed and the position, in four separate streams: drafted tokens,
their coins, candidates, and the candidates' coins. A token is then a function of the tokens before it and of its own
position's numbers, which no earlier position has used. The number of tokens per draft, the number of candidates per
verdict and the other sequences of a batch change the number of calls, never the tokens. A position that is drafted
again after a rejection may therefore use its numbers again. But two decisions at one position must not use the same
number: coins shared with candidates, or a candidate tried twice, would bias the result.

If p and q are equal up to rounding, a token can be rejected although Σ (p−q)₊ is almost zero, and no candidate would
ever be accepted. After n candidates, x is used and counted (`Continuation.capped`). This changes the law by at most
α·TV·(1−TV)ⁿ ≤ α/(e·n) in total variation: 2e-5 at the defaults, for the worst possible TV.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from torch import Tensor

from rayk.engines.drawing import draw_ids
from rayk.errors import InputError

_NUMBERS_PER_BLOCK = 4  # random numbers that Philox computes for one counter value


class Stream(IntEnum):
    """The independent streams of random numbers, one per kind of decision."""

    DRAFTS = 0
    """Sample drafted tokens; one number per position."""
    COINS = 1
    """Accept or reject drafted tokens; one number per position."""
    CANDIDATES = 2
    """Sample the teacher's candidates; many numbers per position."""
    CANDIDATE_COINS = 3
    """Accept or reject candidates; many numbers per position."""


def draw_uniforms(stream: Stream, seed: int, count: int, *, start: int, position: int = 0) -> np.ndarray:
    """Return the uniform random numbers with indices `start` to `start + count - 1` of a stream, float64 [count] in
    [0, 1).

    The key of Philox is (seed, stream), and its counter is (start, position), so that no two uses overlap.

    Args:
        position: the position whose part of the stream is used; 0 for streams with one number per position, whose
            `start` is the position.
    """
    key = np.array([seed, stream], np.uint64)
    counter = np.array([start // _NUMBERS_PER_BLOCK, position, 0, 0], np.uint64)
    skipped = start % _NUMBERS_PER_BLOCK
    return np.random.Generator(np.random.Philox(key=key, counter=counter)).random(skipped + count)[skipped:]


def sample_ids(logprobs: Tensor, numbers: Tensor) -> Tensor:
    """Sample ids, int64 [rows, n], from the distributions `logprobs` [rows, vocab] by inversion of the uniform
    `numbers`, float64 [rows, n]. Ids of probability 0 are never sampled."""
    return draw_ids(logprobs.exp(), numbers)


@dataclass(frozen=True)
class MixedSampling:
    """Parameters of sampling from αp + (1−α)q. The temperature is 1 and nothing is truncated, because the bound
    w ≤ 1/(1−α) on MiniLLM's weights requires it.

    Attributes:
        alpha: the teacher's share α; 0.2 in MiniLLM.
        max_new_tokens: longest completion, EOS included.
        candidates: number of the teacher's candidates that are sent with a rejection; each further call for the same
            position doubles it.
        max_candidates: number of rejected candidates at one position after which the drafted token is used.

    Raises:
        InputError: a number is out of its range.
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
    """A request to the teacher to verify the last tokens of a sequence, and to send candidates for the first rejected
    one. Without drafted tokens, only candidates for the token after `input_ids` are requested.

    Attributes:
        input_ids: int32 [length], the whole sequence, drafted tokens last.
        logprobs: float32 [drafted], log q of the drafted tokens, in nats.
        coins: float64 [drafted], in [0, 1).
        alpha: the teacher's share.
        seed: the sequence's seed, 0 to 2^64 − 1, from which its candidates are sampled.
        candidates: number of candidates to send for the first rejected position.
        tried: number of that position's candidates that were sent before and are not sent again.

    Raises:
        ValueError: log-probs and coins differ in number, or no token is before the first drafted one.
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
        """Number of drafted tokens."""
        return len(self.logprobs)

    @property
    def start(self) -> int:
        """The position of the first drafted token."""
        return len(self.input_ids) - self.drafted

    def count_accepted(self, teacher_logprobs: np.ndarray) -> int:
        """Return the number of accepted drafted tokens, given log p of each, [drafted]."""
        with np.errstate(invalid="ignore"):
            # If p > q, the token is accepted with any coin, so the ratio is capped at 1, which avoids an overflow.
            ratio = np.exp(np.minimum(teacher_logprobs.astype(np.float64) - self.logprobs, 0.0))
        rejected = np.flatnonzero(~(self.coins < (1 - self.alpha) + self.alpha * ratio))
        return int(rejected[0]) if len(rejected) else self.drafted

    def candidate_numbers(self, accepted: int) -> np.ndarray:
        """Return the uniform numbers by which candidates are sampled after `accepted` tokens, float64 [candidates]."""
        position = self.start + accepted
        return draw_uniforms(Stream.CANDIDATES, self.seed, self.candidates, start=self.tried, position=position)


@dataclass(frozen=True, eq=False)
class Verdict:
    """The teacher's answer to a draft.

    Attributes:
        accepted: number of accepted drafted tokens, counted from the first.
        logprobs: float32 [min(accepted + 1, drafted)], log p of the accepted tokens and of the rejected one, in nats.
        candidates: int32 [m], samples from p for the rejected position; empty if all drafted tokens are accepted.
        candidate_logprobs: float32 [m], log p of the candidates.
    """

    accepted: int
    logprobs: np.ndarray
    candidates: np.ndarray
    candidate_logprobs: np.ndarray


def first_accepted(student_logprobs: np.ndarray, teacher_logprobs: np.ndarray, coins: np.ndarray) -> int | None:
    """Return the index of the first accepted candidate, coin < 1 − q(y)/p(y); None if all are rejected.

    Args:
        student_logprobs, teacher_logprobs: log q and log p of the candidates, [m], nats.
        coins: float64 [m].
    """
    with np.errstate(over="ignore"):
        chance = -np.expm1(student_logprobs.astype(np.float64) - teacher_logprobs)
    accepted = np.flatnonzero(coins < chance)
    return int(accepted[0]) if len(accepted) else None


def importance_weights(student_logprobs: np.ndarray, teacher_logprobs: np.ndarray, alpha: float) -> np.ndarray:
    """Return MiniLLM's importance weight w = q/p̃ = 1/((1−α) + α·p/q) of each token; it is at most 1/(1−α)."""
    difference = teacher_logprobs.astype(np.float64) - student_logprobs
    return (1 / ((1 - alpha) + alpha * np.exp(np.minimum(difference, 700.0)))).astype(np.float32)


@dataclass(eq=False)
class Continuation:
    """The completion of one prompt sampled from p̃, draft by draft.

    Repeat until `finish_reason` is set: call `propose` with drafted tokens, send `next_draft()` to the teacher, and
    pass its verdict to `apply_verdict`. While `is_pending` is true, send `next_draft()` again without `propose`.

    Attributes:
        token_ids, student_logprobs, teacher_logprobs: the tokens decided so far; log q and log p in nats.
        finish_reason: 'stop' after a token of `ends`, 'length' after `max_new_tokens`, else empty.
        calls: number of verdicts.
        accepted, rejected: numbers of drafted tokens that were accepted and rejected.
        capped: number of rejected tokens that were used nevertheless, because no candidate was accepted.
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
    _rejected: tuple[int, float, float] | None = None  # a token without a replacement so far, its log q and log p
    _tried: int = 0

    @property
    def position(self) -> int:
        """Position of the next token."""
        return len(self.prompt) + len(self.token_ids)

    @property
    def remaining_tokens(self) -> int:
        """Number of tokens until `max_new_tokens`."""
        return self.sampling.max_new_tokens - len(self.token_ids)

    @property
    def is_pending(self) -> bool:
        """Whether a draft waits for a verdict."""
        return self._draft is not None

    def sequence(self, drafted: Sequence[int] = ()) -> np.ndarray:
        """Return prompt, decided tokens and `drafted`, int32 [length]."""
        return np.concatenate([self.prompt, np.asarray([*self.token_ids, *drafted], np.int32)]).astype(np.int32)

    def propose(self, token_ids: Sequence[int], logprobs: Sequence[float]) -> None:
        """Draft `token_ids`, sampled from q with the numbers of stream `DRAFTS`; `logprobs` are their log q."""
        coins = draw_uniforms(Stream.COINS, self.seed, len(token_ids), start=self.position)
        self._draft = Draft(
            self.sequence(token_ids), np.asarray(logprobs, np.float32), coins, self.sampling.alpha, self.seed,
            self.sampling.candidates,
        )  # fmt: skip

    def next_draft(self) -> Draft:
        """Return the next request to the teacher: the draft, or after a rejection a request for more candidates."""
        assert self._draft is not None
        if self._rejected is None:
            return self._draft
        nothing, more = np.zeros(0), min(self._tried + self.sampling.candidates, self._remaining_candidates)
        return Draft(self.sequence(), nothing, nothing, self.sampling.alpha, self.seed, more, self._tried)

    def apply_verdict(self, verdict: Verdict, student_logprobs_at: Callable[[int, np.ndarray], np.ndarray]) -> None:
        """Apply the teacher's verdict on `next_draft()`.

        Args:
            student_logprobs_at: returns log q [m] of ids [m] at a position of the pending draft.
        """
        assert self._draft is not None
        self.calls += 1
        if self._rejected is None:
            self._accept(self._draft, verdict)
        if self._rejected is not None:
            self._replace(verdict, student_logprobs_at)
        if self._rejected is None:
            self._draft = None

    def _accept(self, draft: Draft, verdict: Verdict) -> None:
        tokens = draft.input_ids[draft.start :].tolist()
        decided = list(zip(tokens, draft.logprobs.tolist(), verdict.logprobs.tolist(), strict=False))
        for token in decided[: verdict.accepted]:
            self._append(*token)
        self.accepted += verdict.accepted
        if verdict.accepted < draft.drafted:
            self.rejected += 1
            self._rejected = decided[verdict.accepted]

    def _replace(self, verdict: Verdict, student_logprobs_at: Callable[[int, np.ndarray], np.ndarray]) -> None:
        assert self._rejected is not None
        count = len(verdict.candidates)
        coins = draw_uniforms(Stream.CANDIDATE_COINS, self.seed, count, start=self._tried, position=self.position)
        student = student_logprobs_at(self.position, verdict.candidates)
        index = first_accepted(student, verdict.candidate_logprobs, coins)
        self._tried += count
        if index is not None:
            chosen = int(verdict.candidates[index]), float(student[index]), float(verdict.candidate_logprobs[index])
        elif self._remaining_candidates <= 0:
            self.capped += 1
            chosen = self._rejected
        else:
            return
        self._append(*chosen)
        self._rejected, self._tried = None, 0

    @property
    def _remaining_candidates(self) -> int:
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
    """Return the expected number of tokens that one call decides: Σ_{i<γ} (1−r)^i = (1 − (1−r)^γ)/r, if a drafted token
    is rejected with probability r = α·TV. The i-th token is decided if all tokens before it were accepted."""
    if rejection_rate == 0:
        return float(drafted)
    return -math.expm1(drafted * math.log1p(-rejection_rate)) / rejection_rate if rejection_rate < 1 else 1.0


class DraftLength:
    """Chooses the number of tokens to draft that gives the most tokens per time at the observed acceptance rate.

    To draft γ tokens and have them verified takes about as long as γ + c steps of the student, where c is the cost of a
    call, so the chosen γ maximizes `expected_tokens_per_call` / (γ + c). The sampled tokens do not depend on γ.
    """

    # Counts before the first observation: MiniLLM's α = 0.2 at a total variation of 0.3, which gives γ = 16.
    _PRIOR_TOKENS, _PRIOR_REJECTED = 50, 3

    def __init__(self, call_cost: float = 11.0, longest: int = 64):
        self._call_cost = call_cost
        self._longest = longest
        self._accepted, self._rejected = 0, 0

    def observe(self, accepted: int, rejected: int) -> None:
        """Record numbers of accepted and rejected drafted tokens."""
        self._accepted += accepted
        self._rejected += rejected

    @property
    def rejection_rate(self) -> float:
        """Estimated probability that a drafted token is rejected."""
        tested = self._accepted + self._rejected + self._PRIOR_TOKENS
        return (self._rejected + self._PRIOR_REJECTED) / tested

    @property
    def tokens(self) -> int:
        """Number of tokens to draft next."""
        rate = self.rejection_rate
        return max(range(1, self._longest + 1), key=lambda n: expected_tokens_per_call(rate, n) / (n + self._call_cost))
