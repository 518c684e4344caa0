"""Policies: the student as one that writes. What it wrote is a `Rollout`, token for token as it was sampled."""

import asyncio
import copy
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Ordered
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rayk.config import RolloutConfig
from rayk.data.batches import Batch, collate, micro_batches, pad_id_of
from rayk.data.examples import Example
from rayk.engines.base import SamplingParameters
from rayk.engines.transformers import end_ids, generate
from rayk.losses import importance_log_weights, linear_cross_entropy
from rayk.models import DTYPES, CausalLM, final_hidden, head_of, real_vocab_size
from rayk.rollouts.teacher_mixed import MixedRollout, Verify, sample_teacher_mixed
from rayk.sequences import Sequence
from rayk.speculative import MixedSampling
from rayk.support import Requested, Support

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


def completed(prompt: Example, completion_ids: np.ndarray) -> Example:
    """`prompt`'s row with another completion, of which every token counts."""
    ids = np.concatenate([prompt.prompt_ids, completion_ids]).astype(np.int32)
    counted = np.arange(len(ids)) >= prompt.prompt_tokens
    return Example(ids, counted, None, prompt.prompt_tokens, prompt.where, prompt.fields)


class Policy(Protocol):
    """The student as one that writes. Used by one step at a time (`VersionGate`)."""

    parameters: SamplingParameters
    """How completions are sampled, where the method has no reason to do otherwise."""

    def groups(self, prompts: Ordered[Sequence]) -> list[list[int]]:
        """The rows it writes at a time, each row in one group."""
        ...

    async def generate(
        self, prompts: Ordered[Example], parameters: SamplingParameters, seeds: Ordered[int]
    ) -> list[Rollout]:
        """One completion a row, in order, after the row's prompt; equal seeds and weights, equal text."""
        ...

    async def generate_mixed(
        self, prompts: Ordered[Example], verify: Verify, sampling: MixedSampling, seeds: Ordered[int]
    ) -> list[Rollout]:
        """As `generate`, every token drawn from teacher and policy mixed (`rayk.rollouts.teacher_mixed`)."""
        ...

    async def top_ids(self, sequences: Ordered[Sequence], k: int) -> list[np.ndarray]:
        """The policy's `k` likeliest ids (fewer of a smaller vocabulary) at each counted position of each sequence,
        int32 [counted tokens, k]."""
        ...

    async def logprobs(self, sequences: Ordered[Sequence]) -> list[np.ndarray]:
        """log q of each sequence's counted tokens among the real ones, float32 [counted tokens], as a training step
        computes it; what a sampler says differs from that by rounding."""
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

    def groups(self, prompts: Ordered[Sequence]) -> list[list[int]]:
        """See `Policy`."""
        return self._groups(prompts, self.parameters.max_new_tokens)

    async def generate(
        self, prompts: Ordered[Example], parameters: SamplingParameters, seeds: Ordered[int]
    ) -> list[Rollout]:
        """See `Policy`."""
        return await self._run(self._generate, prompts, parameters, seeds)

    async def generate_mixed(
        self, prompts: Ordered[Example], verify: Verify, sampling: MixedSampling, seeds: Ordered[int]
    ) -> list[Rollout]:
        """See `Policy`."""
        with self._evaluating():
            written = await sample_teacher_mixed(
                self._model, verify, [prompt.prompt_ids for prompt in prompts], seeds, sampling,
                vocab_size=self._vocab_size, ends=end_ids(self._model, self._tokenizer), computing=self._autocast,
            )  # fmt: skip

        def log_weights(each: MixedRollout) -> np.ndarray:
            student, teacher = torch.from_numpy(each.student_logprobs), torch.from_numpy(each.teacher_logprobs)
            return importance_log_weights(student, teacher, sampling.alpha).numpy()

        return [
            Rollout(
                **vars(completed(prompt, each.token_ids)), logprobs=each.student_logprobs, version=self.version,
                finish_reason=each.finish_reason, log_weights=log_weights(each), teacher_calls=each.calls,
                acceptance=each.acceptance,
            )
            for prompt, each in zip(prompts, written, strict=True)
        ]  # fmt: skip

    async def top_ids(self, sequences: Ordered[Sequence], k: int) -> list[np.ndarray]:
        """See `Policy`."""

        def likeliest(hidden: Tensor, batch: Batch) -> Tensor:
            head = head_of(self._model)
            parts = hidden.split(max(1, _CHUNK_ELEMENTS // head.vocab_size))
            kept = min(k, self._vocab_size)
            return torch.cat(
                [head.logits(part)[:, : self._vocab_size].topk(kept, dim=1).indices for part in parts]
            ).int()

        return await self._run(self._of_positions, sequences, likeliest)

    async def logprobs(self, sequences: Ordered[Sequence]) -> list[np.ndarray]:
        """See `Policy`."""
        return await self._run(self._of_positions, sequences, self._target_logprobs)

    def update(self, version: int) -> None:
        """See `Policy`; nobody may be generating."""
        if self._model is not self._learner:
            self._model.load_state_dict(self._learner.state_dict())
        self.version = version

    async def _run(self, work, *arguments):
        def quietly():
            # Not inference mode: buffers that a forward makes would be of no use to the backward of a later step.
            with self._evaluating(), torch.no_grad(), self._autocast():
                return work(*arguments)

        return await asyncio.get_running_loop().run_in_executor(self._thread, quietly)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Without dropout; the model that learns goes on learning afterwards."""
        training = self._model.training
        self._model.eval()
        try:
            yield
        finally:
            self._model.train(training)

    def _autocast(self) -> AbstractContextManager[Any]:
        """Products as in training; holds for the thread it is entered on."""
        return torch.autocast(self._model.device.type, self._compute_dtype, self._compute_dtype != torch.float32)

    def _generate(
        self, prompts: Ordered[Example], parameters: SamplingParameters, seeds: Ordered[int]
    ) -> list[Rollout]:
        rollouts: dict[int, Rollout] = {}
        for rows in self._groups(prompts, parameters.max_new_tokens):
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

    def _groups(self, prompts: Ordered[Sequence], new_tokens: int) -> list[list[int]]:
        lengths = [prompt.prompt_tokens + new_tokens for prompt in prompts if isinstance(prompt, Example)]
        return micro_batches(lengths, self._batch_tokens)

    def _of_positions(self, sequences: Ordered[Sequence], read: Callable[[Tensor, Batch], Tensor]) -> list[np.ndarray]:
        """What `read` makes of the hidden states at each sequence's counted positions, [counted tokens, ...] each."""
        found = dict[int, np.ndarray]()
        for rows in micro_batches([len(sequence) for sequence in sequences], self._batch_tokens):
            batch = collate([sequences[row] for row in rows], pad_id_of(self._tokenizer)).to(self._model.device)
            hidden = batch.counted(final_hidden(self._model, batch.input_ids, batch.attention_mask))
            values = read(hidden.to(self._compute_dtype), batch).cpu().numpy()
            found |= zip(rows, np.split(values, batch.offsets[1:-1].tolist()), strict=True)
        return [found[row] for row in range(len(sequences))]

    def _target_logprobs(self, hidden: Tensor, batch: Batch) -> Tensor:
        return -linear_cross_entropy(hidden, head_of(self._model).first(self._vocab_size), batch.targets)


async def with_own_ids(policy: Policy, rows: list[Sequence], support: Support, count: int) -> list[Sequence]:
    """`rows`, and, where `support` has the teacher asked about named ids, the policy's `count` likeliest at each
    counted position."""
    if not isinstance(support, Requested):
        return rows
    ids = await policy.top_ids(rows, count)
    return [replace(row, requested=each) for row, each in zip(rows, ids, strict=True)]


def summarise(rollouts: Ordered[Rollout], version: int) -> dict[str, float]:
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
