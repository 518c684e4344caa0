"""Checks that all engines share: whether a request is valid, and whether two computations of log-probs agree."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from rayk.config.support import Requested, Sampled, Support, TopK
from rayk.engines.base import EngineInfo, Prompt, SamplingParameters
from rayk.engines.speculative import Draft
from rayk.errors import InputError
from rayk.signals.sequence import TokenSequence


def check_request(info: EngineInfo, sequences: Sequence[TokenSequence], support: Support) -> None:
    """Check that this model can score `sequences` with `support`.

    Raises:
        InputError: the model does not return this support, k or the number of draws exceeds the vocabulary, or a
            sequence is too long or has ids out of range.
    """
    if support.kind not in info.supports:
        raise InputError(f"{info.model} cannot return support '{support.kind}', only {', '.join(info.supports)}.")
    if isinstance(support, TopK) and support.k > info.vocab_size:
        raise InputError(f"support.k is {support.k}, but {info.model} has a vocabulary of {info.vocab_size}; lower k.")
    if isinstance(support, Sampled) and support.draws > info.vocab_size:
        raise InputError(
            f"support.draws is {support.draws}, but {info.model} has a vocabulary of {info.vocab_size}; lower draws."
        )
    for sequence in sequences:
        if isinstance(support, Requested):
            _check_requested(info, sequence, sequences[0])
        if len(sequence) > info.max_tokens:
            raise InputError(
                f"A sequence of {len(sequence)} tokens is longer than the limit of {info.model} ({info.max_tokens}); "
                "lower data.max_tokens."
            )
        _check_ids(info, sequence.input_ids)


def _check_requested(info: EngineInfo, sequence: TokenSequence, first: TokenSequence) -> None:
    if sequence.requested is None or first.requested is None:
        raise InputError("Support 'requested' needs the ids: give every sequence 'requested' [counted tokens, m].")
    if sequence.requested.shape[1] != first.requested.shape[1]:
        raise InputError(
            f"The sequences of one request have {first.requested.shape[1]} and {sequence.requested.shape[1]} requested "
            "ids per position; give all the same number, with -1 for no id."
        )
    if sequence.requested.size and not -1 <= sequence.requested.min() <= sequence.requested.max() < info.vocab_size:
        raise InputError(
            f"A requested id is outside the vocabulary of {info.model}, which has {info.vocab_size} tokens; give ids "
            "of real tokens, or -1 for no id."
        )


def tokenize_prompts(
    info: EngineInfo, tokenizer: Any, prompts: Sequence[Prompt], parameters: SamplingParameters,
    tokens: int | None = None,
) -> list[np.ndarray]:  # fmt: skip
    """Return the prompts' token ids, and check that this model can continue them.

    Args:
        tokens: number of the model's real tokens, if `info.vocab_size` may be smaller.

    Raises:
        InputError: a prompt is empty, has ids out of range, or leaves no room for `max_new_tokens`.
    """
    rows = [np.asarray(tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt) for prompt in prompts]
    for prompt in rows:
        if len(prompt) == 0:
            raise InputError("An empty prompt cannot be continued; give it at least one token.")
        if len(prompt) + parameters.max_new_tokens > info.max_tokens:
            raise InputError(
                f"A prompt of {len(prompt)} tokens plus max_new_tokens ({parameters.max_new_tokens}) exceeds the limit "
                f"of {info.model} ({info.max_tokens}); lower max_new_tokens or shorten the prompts."
            )
        _check_ids(info, prompt, tokens)
    return rows


def generated_ids(info: EngineInfo, prompts: Sequence[Prompt], tokens: int) -> int:
    """Return the number of leading ids that completions of these prompts may contain: after a text, all `tokens` of the
    model; after token ids, which are a student's, only those that the student has."""
    return tokens if all(isinstance(prompt, str) for prompt in prompts) else info.vocab_size


def check_can_verify(info: EngineInfo) -> None:
    """Check that the teacher's engine can verify drafts, which teacher-mixed sampling requires.

    Raises:
        InputError: the engine cannot verify drafts.
    """
    if not info.can_verify:
        raise InputError(
            f"engine kind '{info.engine}' of {info.model} cannot verify drafts, which teacher-mixed sampling needs; "
            "use engine kind 'transformers', or sample from the student alone."
        )


def check_drafts(info: EngineInfo, drafts: Sequence[Draft]) -> None:
    """Check that this model can verify `drafts`.

    Raises:
        InputError: the engine cannot verify, or a sequence is too long or has ids out of range.
    """
    check_can_verify(info)
    for draft in drafts:
        if len(draft) > info.max_tokens:
            raise InputError(
                f"A draft of {len(draft)} tokens, prompt included, is longer than the limit of {info.model} "
                f"({info.max_tokens}); lower max_new_tokens or shorten the prompts."
            )
        _check_ids(info, draft.input_ids)


def _check_ids(info: EngineInfo, ids: np.ndarray, tokens: int | None = None) -> None:
    tokens = info.vocab_size if tokens is None else tokens
    if len(ids) and not 0 <= ids.min() <= ids.max() < tokens:
        wrong = int(ids.min() if ids.min() < 0 else ids.max())
        raise InputError(
            f"Token id {wrong} is outside the vocabulary of {info.model}, which has {tokens} tokens; student and "
            "teacher must share a tokenizer."
        )


def probe_sequence(info: EngineInfo, tokens: int = 64) -> TokenSequence:
    """Return a short sequence that every model can score."""
    length = min(tokens, info.max_tokens)
    return TokenSequence(np.arange(length, dtype=np.int32) % info.vocab_size, np.arange(length) > 0)


def logprob_mismatch(logprobs: Tensor, reference: Tensor, dtype: str) -> float:
    """Return the largest difference in nats between two computations of the same log-probs in `dtype`; 0 if all
    differences can be due to rounding."""
    difference, allowed = (logprobs - reference).abs(), 1e-2 if dtype == "float32" else 0.3
    return float(difference.max()) if bool((difference > allowed + 0.02 * reference.abs()).any()) else 0.0
