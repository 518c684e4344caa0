"""Policies: the student as one that writes. What it wrote is a `Rollout`, token for token as it was sampled."""

import asyncio
import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from rayk.config import RolloutConfig
from rayk.config.support import Requested, Support
from rayk.data.batches import micro_batches
from rayk.data.examples import Example
from rayk.engines.base import GeneratedSequence, SamplingParameters
from rayk.engines.speculative import MixedSampling
from rayk.losses import importance_log_weights
from rayk.models import CausalLM
from rayk.rollouts.policy_model import PolicyModel
from rayk.rollouts.teacher_mixed import MixedRollout, Verify, sample_teacher_mixed
from rayk.serving.weights import trainable_state_dict
from rayk.signals.sequence import TokenSequence

_REPEATED_TOKENS = 4
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Rollout(Example):
    """A prompt and what a policy wrote after it, never tokenised again.

    Attributes:
        input_ids: int32 [length], the prompt's ids, then the completion's with its end token where it wrote one.
        counted: bool [length], the completion.
        logprobs: float32 [counted tokens], nats, under the policy at temperature 1 without truncation.
        finish_reason: 'stop' (it wrote an end token) or 'length' (it was cut).
        version: optimiser steps behind the weights that wrote it.
        log_weights: float32 [counted tokens], log q/p̃ of each, p̃ the mixture it was drawn from; None where the policy
            wrote alone.
        teacher_calls: how often the teacher was asked while it was written.
        acceptance: of the tokens the policy proposed to the teacher, the share that stayed; 1 where it wrote alone.
    """

    logprobs: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    finish_reason: str = "stop"
    version: int = 0
    log_weights: np.ndarray | None = None
    teacher_calls: int = 0
    acceptance: float = 1.0

    @property
    def completion_ids(self) -> np.ndarray:
        """int32 [counted tokens]."""
        return self.input_ids[self.prompt_tokens :]


def with_completion(prompt: Example, completion_ids: np.ndarray) -> Example:
    """`prompt`'s row with another completion, of which every token counts."""
    ids = np.concatenate([prompt.prompt_ids, completion_ids]).astype(np.int32)
    counted = np.arange(len(ids)) >= prompt.prompt_tokens
    return Example(ids, counted, None, prompt.prompt_tokens, prompt.where, prompt.fields, contexts=prompt.contexts)


class Policy(Protocol):
    """The student as one that writes. Used by one step at a time (`VersionGate`)."""

    parameters: SamplingParameters
    """How completions are sampled, where the method has no reason to do otherwise."""

    def groups(self, prompts: Sequence[TokenSequence]) -> list[list[int]]:
        """The rows it writes at a time, each row in one group."""
        ...

    async def generate(
        self, prompts: Sequence[Example], parameters: SamplingParameters, seeds: Sequence[int]
    ) -> list[Rollout]:
        """One completion a row, in order, after the row's prompt; equal seeds and weights, equal text."""
        ...

    async def generate_mixed(
        self, prompts: Sequence[Example], verify: Verify, sampling: MixedSampling, seeds: Sequence[int]
    ) -> list[Rollout]:
        """As `generate`, every token drawn from teacher and policy mixed (`rayk.rollouts.teacher_mixed`)."""
        ...

    async def top_ids(self, sequences: Sequence[TokenSequence], k: int) -> list[np.ndarray]:
        """The policy's `k` likeliest ids (fewer of a smaller vocabulary) at each counted position of each sequence,
        int32 [counted tokens, k]."""
        ...

    async def logprobs(self, sequences: Sequence[TokenSequence]) -> list[np.ndarray]:
        """log q of each sequence's counted tokens among the real ones, float32 [counted tokens], as a training step
        computes it; what a sampler says differs from that by rounding."""
        ...

    def begin(self, attempt: str) -> None:
        """Called on every worker before its first `update`, with a name that no earlier group of workers of the run
        had: what those wrote, or asked for, under a version is not this group's."""
        ...

    def update(self, version: int) -> None:
        """Take over the learner's weights, which `version` optimiser steps have made."""
        ...


class WorkerPolicy:
    """The policy in the training worker: the model that learns, or, where it may be stale, a copy that generates while
    that one trains."""

    def __init__(
        self, learner: CausalLM, tokenizer: Any, settings: RolloutConfig, *, batch_tokens: int,
        precision: str = "float32", version: int = 0,
    ):  # fmt: skip
        """
        Args:
            learner: the model that learns.
            batch_tokens: padded tokens, prompt and completion, generated together.
            precision: what the products run in, as in training.
            version: optimiser steps behind the learner's weights.
        """
        self.parameters = parameters_of(settings)
        self.version = version
        self._learner = learner
        self._writer = PolicyModel(learner if settings.max_staleness == 0 else _copied(learner), tokenizer, precision)
        self._batch_tokens = batch_tokens
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="policy")

    def groups(self, prompts: Sequence[TokenSequence]) -> list[list[int]]:
        """See `Policy`."""
        return micro_batches(maximum_lengths(prompts, self.parameters), self._batch_tokens)

    async def generate(
        self, prompts: Sequence[Example], parameters: SamplingParameters, seeds: Sequence[int]
    ) -> list[Rollout]:
        """See `Policy`."""
        left = threading.Event()

        def write(rows: list[int]) -> list[GeneratedSequence]:
            ids = [prompts[row].prompt_ids for row in rows]
            return self._writer.generate(ids, parameters, [seeds[row] for row in rows], left.is_set)

        lengths = maximum_lengths(prompts, parameters)
        try:
            return to_rollouts(prompts, await self._in_batches(lengths, write), self.version)
        finally:
            left.set()  # whoever was waiting has gone, and a thread can only end by itself

    async def generate_mixed(
        self, prompts: Sequence[Example], verify: Verify, sampling: MixedSampling, seeds: Sequence[int]
    ) -> list[Rollout]:
        """See `Policy`."""
        with self._writer.evaluating():
            written = await sample_teacher_mixed(
                self._writer.model, verify, [prompt.prompt_ids for prompt in prompts], seeds, sampling,
                vocab_size=self._writer.vocab_size, ends=self._writer.ends, computing=self._writer.autocast,
            )  # fmt: skip

        def log_weights(each: MixedRollout) -> np.ndarray:
            student, teacher = torch.from_numpy(each.student_logprobs), torch.from_numpy(each.teacher_logprobs)
            return importance_log_weights(student, teacher, sampling.alpha).numpy()

        return [
            Rollout(
                **vars(with_completion(prompt, each.token_ids)), logprobs=each.student_logprobs, version=self.version,
                finish_reason=each.finish_reason, log_weights=log_weights(each), teacher_calls=each.calls,
                acceptance=each.acceptance,
            )
            for prompt, each in zip(prompts, written, strict=True)
        ]  # fmt: skip

    async def top_ids(self, sequences: Sequence[TokenSequence], k: int) -> list[np.ndarray]:
        """See `Policy`."""
        lengths = [len(sequence) for sequence in sequences]
        return await self._in_batches(lengths, lambda rows: self._writer.top_ids([sequences[row] for row in rows], k))

    async def logprobs(self, sequences: Sequence[TokenSequence]) -> list[np.ndarray]:
        """See `Policy`."""
        lengths = [len(sequence) for sequence in sequences]
        return await self._in_batches(lengths, lambda rows: self._writer.logprobs([sequences[row] for row in rows]))

    def begin(self, attempt: str) -> None:
        """See `Policy`; these weights are nobody else's."""

    def update(self, version: int) -> None:
        """See `Policy`; nobody may be generating."""
        if self._writer.model is not self._learner:
            self._writer.model.load_state_dict(trainable_state_dict(self._learner), strict=False)
        self.version = version

    async def _in_batches(self, lengths: list[int], work: Callable[[list[int]], list[T]]) -> list[T]:
        """What `work` makes of rows of such lengths, a batch at a time on the policy's thread; in order."""

        def quietly() -> list[T]:
            found = dict[int, T]()
            with self._writer.computing():
                for rows in micro_batches(lengths, self._batch_tokens):
                    found |= zip(rows, work(rows), strict=True)
            return [found[row] for row in range(len(lengths))]

        return await asyncio.get_running_loop().run_in_executor(self._thread, quietly)


def _copied(learner: CausalLM) -> CausalLM:
    """`learner` as it is now, for generation; what is frozen is shared. What learns goes on requiring gradients in the
    copy: only such parameters are cast just once by an autocast."""
    frozen = {id(each): each for each in learner.parameters() if not each.requires_grad}
    return copy.deepcopy(learner, frozen).eval()


def parameters_of(settings: RolloutConfig) -> SamplingParameters:
    """How the run's settings have completions sampled."""
    return SamplingParameters(settings.max_new_tokens, settings.temperature, settings.top_p, settings.top_k)


def maximum_lengths(prompts: Sequence[TokenSequence], parameters: SamplingParameters) -> list[int]:
    """How long each prompt and what is written after it may become, in tokens."""
    return [each.prompt_tokens + parameters.max_new_tokens for each in prompts if isinstance(each, Example)]


def to_rollouts(prompts: Sequence[Example], written: Sequence[GeneratedSequence], version: int) -> list[Rollout]:
    """What the policy wrote after each prompt, as it is learned from."""
    return [
        Rollout(
            **vars(with_completion(prompt, each.token_ids)), logprobs=each.logprobs, finish_reason=each.finish_reason,
            version=version,
        )
        for prompt, each in zip(prompts, written, strict=True)
    ]  # fmt: skip


async def with_requested_ids(
    policy: Policy, rows: list[TokenSequence], support: Support, count: int
) -> list[TokenSequence]:
    """`rows`, and, where `support` has the teacher asked about named ids, the policy's `count` likeliest at each
    counted position."""
    if not isinstance(support, Requested):
        return rows
    ids = await policy.top_ids(rows, count)
    return [replace(row, requested=each) for row, each in zip(rows, ids, strict=True)]


def summarize_rollouts(rollouts: Sequence[Rollout], version: int) -> dict[str, float]:
    """Sums over `rollouts`, for the metrics of the step that learns from them at `version`: their number, completion
    tokens, how many wrote an end token, shares of repeated 4-grams, staleness, the teacher's part in them."""
    return {
        "rollouts": len(rollouts),
        "rollout_tokens": sum(len(rollout.completion_ids) for rollout in rollouts),
        "rollout_stopped": sum(rollout.finish_reason == "stop" for rollout in rollouts),
        "rollout_repetition": sum(repetition(rollout.completion_ids) for rollout in rollouts),
        "rollout_staleness": sum(version - rollout.version for rollout in rollouts),
        "rollout_teacher_calls": sum(rollout.teacher_calls for rollout in rollouts),
        "rollout_acceptance": sum(rollout.acceptance for rollout in rollouts),
    }


def repetition(ids: np.ndarray, n: int = _REPEATED_TOKENS) -> float:
    """The share of the n-grams of token ids [tokens] that repeat an earlier one; 0 where there is none."""
    grams = [tuple(ids[start : start + n].tolist()) for start in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
