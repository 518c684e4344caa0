"""Policies: the student as one that writes. What it wrote is a `Rollout`, token for token as it was sampled."""

import asyncio
import copy
from collections.abc import Iterator
from collections.abc import Sequence as Ordered
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from rayk.config import RolloutConfig
from rayk.data.batches import collate, micro_batches, pad_id_of
from rayk.data.examples import Example
from rayk.engines.base import SamplingParameters
from rayk.engines.transformers import generate
from rayk.models import DTYPES, CausalLM, final_hidden, head_of, real_vocab_size
from rayk.sequences import Sequence

_CHUNK_ELEMENTS = 1 << 23
_REPEATED_TOKENS = 4


@dataclass(frozen=True, eq=False)
class Rollout(Example):
    """A prompt and what a policy wrote after it, never tokenised again.

    Attributes:
        input_ids: int32 [length], the prompt's ids, then the completion's with its end token where it wrote one.
        counted: bool [length], the completion.
        logprobs: float32 [counted tokens], nats, under the policy at temperature 1 without truncation.
        finish_reason: 'stop' (it wrote an end token) or 'length' (it was cut).
        version: optimiser steps behind the weights that wrote it.
    """

    logprobs: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    finish_reason: str = "stop"
    version: int = 0

    @property
    def completion_ids(self) -> np.ndarray:
        """int32 [counted tokens]."""
        return self.input_ids[self.prompt_tokens :]


def completed(prompt: Example, completion_ids: np.ndarray) -> Example:
    """`prompt`'s row with another completion, of which every token counts."""
    ids = np.concatenate([prompt.prompt_ids, completion_ids]).astype(np.int32)
    counted = np.arange(len(ids)) >= prompt.prompt_tokens
    return Example(ids, counted, None, prompt.prompt_tokens, prompt.where, prompt.fields)


class Policy(Protocol):
    """The student as one that writes. Used by one step at a time (`VersionGate`)."""

    parameters: SamplingParameters
    """How completions are sampled, where the method has no reason to do otherwise."""

    async def generate(
        self, prompts: Ordered[Example], parameters: SamplingParameters, seeds: Ordered[int]
    ) -> list[Rollout]:
        """One completion a row, in order, after the row's prompt; equal seeds and weights, equal text."""
        ...

    async def top_ids(self, sequences: Ordered[Sequence], k: int) -> list[np.ndarray]:
        """The policy's `k` likeliest ids (fewer of a smaller vocabulary) at each counted position of each sequence,
        int32 [counted tokens, k]."""
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
        self.parameters = SamplingParameters(
            settings.max_new_tokens, settings.temperature, settings.top_p, settings.top_k
        )
        self.version = version
        self._learner = learner
        # The copy's parameters go on requiring gradients: only such are cast just once by an autocast.
        self._model = learner if settings.max_staleness == 0 else copy.deepcopy(learner).eval()
        self._tokenizer = tokenizer
        self._vocab_size = min(head_of(learner).vocab_size, real_vocab_size(tokenizer))
        self._batch_tokens = batch_tokens
        self._compute_dtype = DTYPES[precision]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="policy")

    async def generate(
        self, prompts: Ordered[Example], parameters: SamplingParameters, seeds: Ordered[int]
    ) -> list[Rollout]:
        """See `Policy`."""
        return await self._run(self._generate, prompts, parameters, seeds)

    async def top_ids(self, sequences: Ordered[Sequence], k: int) -> list[np.ndarray]:
        """See `Policy`."""
        return await self._run(self._top_ids, sequences, min(k, self._vocab_size))

    def update(self, version: int) -> None:
        """See `Policy`; nobody may be generating."""
        if self._model is not self._learner:
            self._model.load_state_dict(self._learner.state_dict())
        self.version = version

    async def _run(self, work, *arguments):
        def quietly():
            with self._quiet():
                return work(*arguments)

        return await asyncio.get_running_loop().run_in_executor(self._thread, quietly)

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Without gradients or dropout; the model that learns goes on learning afterwards."""
        training = self._model.training
        self._model.eval()
        device = self._model.device.type
        try:
            # Not inference mode: buffers that a forward makes would be of no use to the backward of a later step.
            with torch.no_grad(), torch.autocast(device, self._compute_dtype, self._compute_dtype != torch.float32):
                yield
        finally:
            self._model.train(training)

    def _generate(
        self, prompts: Ordered[Example], parameters: SamplingParameters, seeds: Ordered[int]
    ) -> list[Rollout]:
        rollouts: dict[int, Rollout] = {}
        lengths = [prompt.prompt_tokens + parameters.max_new_tokens for prompt in prompts]
        for rows in micro_batches(lengths, self._batch_tokens):
            ids = [prompts[row].prompt_ids for row in rows]
            written = generate(
                self._model, self._vocab_size, self._tokenizer, ids, parameters, [seeds[row] for row in rows]
            )
            for row, each in zip(rows, written, strict=True):
                whole = completed(prompts[row], each.token_ids)
                rollouts[row] = Rollout(
                    **vars(whole), logprobs=each.logprobs, finish_reason=each.finish_reason, version=self.version
                )
        return [rollouts[row] for row in range(len(prompts))]

    def _top_ids(self, sequences: Ordered[Sequence], k: int) -> list[np.ndarray]:
        head, found = head_of(self._model), dict[int, np.ndarray]()
        chunk = max(1, _CHUNK_ELEMENTS // head.vocab_size)
        for rows in micro_batches([len(sequence) for sequence in sequences], self._batch_tokens):
            batch = collate([sequences[row] for row in rows], pad_id_of(self._tokenizer)).to(self._model.device)
            hidden = batch.counted(final_hidden(self._model, batch.input_ids, batch.attention_mask))
            ids = [head.logits(part)[:, : self._vocab_size].topk(k, dim=1).indices for part in hidden.split(chunk)]
            cuts = batch.offsets[1:-1].tolist()
            found |= zip(rows, np.split(torch.cat(ids).int().cpu().numpy(), cuts), strict=True)
        return [found[row] for row in range(len(sequences))]


def summarise(rollouts: Ordered[Rollout], version: int) -> dict[str, float]:
    """Sums over `rollouts`, for the metrics of the step that learns from them at `version`: their number, completion
    tokens, how many wrote an end token, shares of repeated 4-grams, and staleness."""
    return {
        "rollouts": len(rollouts),
        "rollout_tokens": sum(len(rollout.completion_ids) for rollout in rollouts),
        "rollout_stopped": sum(rollout.finish_reason == "stop" for rollout in rollouts),
        "rollout_repetition": sum(repetition(rollout.completion_ids) for rollout in rollouts),
        "rollout_staleness": sum(version - rollout.version for rollout in rollouts),
    }


def repetition(ids: np.ndarray, n: int = _REPEATED_TOKENS) -> float:
    """The share of the n-grams of token ids [tokens] that repeat an earlier one; 0 where there is none."""
    grams = [tuple(ids[start : start + n].tolist()) for start in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
