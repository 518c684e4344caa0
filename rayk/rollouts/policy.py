"""Policies: the student when it generates rollouts. A `Rollout` contains the sampled token ids; text is not tokenized
again."""

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
from rayk.models.packing import adopt_attention
from rayk.models.shards import whole_tensor
from rayk.models.structure import assign_state, copy_structure, gather_state
from rayk.rollouts.policy_model import PolicyModel
from rayk.rollouts.teacher_mixed import MixedRollout, Verify, sample_teacher_mixed
from rayk.serving.weights import trainable_state_dict
from rayk.signals.sequence import TokenSequence

_REPEATED_TOKENS = 4
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Rollout(Example):
    """A prompt with a sampled completion, its log-probs and weight version.

    Attributes:
        input_ids: int32 [length], the prompt's ids, then the completion's, including its end token.
        counted: bool [length], the completion; with a tool (`rayk.rollouts.turns`), its turns without the answers.
        logprobs: float32 [counted tokens], nats, under the policy at temperature 1 without truncation.
        finish_reason: 'stop' (ends with an end token) or 'length' (truncated).
        version: weight version of the policy, in optimizer steps.
        log_weights: float32 [counted tokens], log q/p̃ of each token, where p̃ is the teacher-student mixture that it
            was sampled from; None if the policy sampled alone.
        teacher_calls: number of teacher calls while sampling.
        acceptance: share of the policy's proposed tokens that the teacher accepted; 1 if the policy sampled alone.
        text: the completion, or its last turn, without special tokens; "" if the policy did not sample alone.
        reward: the completion's task reward; None without one.
        turns: number of the policy's turns.
    """

    logprobs: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    finish_reason: str = "stop"
    version: int = 0
    log_weights: np.ndarray | None = None
    teacher_calls: int = 0
    acceptance: float = 1.0
    text: str = ""
    reward: float | None = None
    turns: int = 1

    @property
    def completion_ids(self) -> np.ndarray:
        """All ids after the prompt, int32 [tokens]."""
        return self.input_ids[self.prompt_tokens :]


def with_completion(prompt: Example, completion_ids: np.ndarray) -> Example:
    """Return `prompt`'s row with another completion; all tokens of the completion are counted."""
    ids = np.concatenate([prompt.prompt_ids, completion_ids]).astype(np.int32)
    counted = np.arange(len(ids)) >= prompt.prompt_tokens
    return Example(ids, counted, None, prompt.prompt_tokens, prompt.where, prompt.fields, contexts=prompt.contexts)


class Policy(Protocol):
    """The student when it generates rollouts. Only one step at a time uses it (`VersionGate`)."""

    parameters: SamplingParameters
    """Sampling parameters of the run's settings; a method may use others."""
    uses_learner: bool
    """Whether the learner itself generates, so that its weights must be on every worker meanwhile."""

    def groups(self, prompts: Sequence[TokenSequence]) -> list[list[int]]:
        """Group the indices of `prompts` by the batches in which the policy generates; each index is in one group."""
        ...

    async def generate(
        self, prompts: Sequence[Example], parameters: SamplingParameters, seeds: Sequence[int]
    ) -> list[Rollout]:
        """Return one completion per row, in order. The same seeds and weights give the same completions."""
        ...

    async def generate_mixed(
        self, prompts: Sequence[Example], verify: Verify, sampling: MixedSampling, seeds: Sequence[int]
    ) -> list[Rollout]:
        """Like `generate`, with each token sampled from the mixture of teacher and policy
        (`rayk.rollouts.teacher_mixed`)."""
        ...

    async def top_ids(self, sequences: Sequence[TokenSequence], k: int) -> list[np.ndarray]:
        """Return the policy's `k` most likely ids (fewer if the vocabulary is smaller) at each counted token, int32
        [counted tokens, k] per sequence."""
        ...

    async def logprobs(self, sequences: Sequence[TokenSequence]) -> list[np.ndarray]:
        """Return log q of each sequence's counted tokens over the real vocabulary, float32 [counted tokens].

        They are computed as in a training step; a sampler's log-probs differ from them by rounding.
        """
        ...

    def begin(self, attempt: str) -> None:
        """Start an attempt, on every worker before its first `update`; weights of earlier attempts are dropped.

        Args:
            attempt: a name that no earlier group of workers of the run had.
        """
        ...

    def update(self, version: int) -> None:
        """Load the learner's weights, of `version` optimizer steps. A collective if these are sharded."""
        ...

    def wait(self) -> None:
        """Wait until nothing that was cancelled still uses the learner."""
        ...


class WorkerPolicy:
    """Policy in the training worker: the learner itself, or, if rollouts may be stale, a copy that generates while the
    learner trains."""

    def __init__(
        self, learner: CausalLM, tokenizer: Any, settings: RolloutConfig, *, batch_tokens: int,
        generated_tokens: int | None = None, precision: str = "float32", version: int = 0,
        vocab_size: int | None = None, is_sharded: bool = False,
    ):  # fmt: skip
        """
        Args:
            learner: the model that is trained; if it will be sharded, it is not yet.
            batch_tokens: padded tokens of a batch whose log-probs are computed.
            generated_tokens: padded tokens, prompts and longest completions, of a batch that is generated; by default
                `batch_tokens`.
            precision: dtype of matrix products, as in training.
            version: the learner's weight version.
            vocab_size: number of leading ids that completions may contain; None: all real tokens.
            is_sharded: whether the learner's weights are divided among the workers.
        """
        self.parameters = sampling_parameters(settings)
        self.version = version
        self._learner = learner
        self.uses_learner = settings.max_staleness == 0
        copy_learner = copy_structure if is_sharded else _copy_model
        model = learner if self.uses_learner else copy_learner(learner).eval()
        self._model = PolicyModel(model, tokenizer, precision, vocab_size)
        self._batch_tokens, self._generated_tokens = batch_tokens, generated_tokens or batch_tokens
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="policy")

    def groups(self, prompts: Sequence[TokenSequence]) -> list[list[int]]:
        """See `Policy`."""
        return micro_batches(maximum_lengths(prompts, self.parameters), self._generated_tokens)

    async def generate(
        self, prompts: Sequence[Example], parameters: SamplingParameters, seeds: Sequence[int]
    ) -> list[Rollout]:
        """See `Policy`."""
        cancelled = threading.Event()

        def generate_rows(rows: list[int]) -> list[GeneratedSequence]:
            ids = [prompts[row].prompt_ids for row in rows]
            return self._model.generate(ids, parameters, [seeds[row] for row in rows], cancelled.is_set)

        lengths = maximum_lengths(prompts, parameters)
        try:
            generated = await self._in_batches(lengths, generate_rows, self._generated_tokens)
            return to_rollouts(prompts, generated, self.version)
        finally:
            cancelled.set()  # a cancelled caller does not wait for the thread, which must end by itself

    async def generate_mixed(
        self, prompts: Sequence[Example], verify: Verify, sampling: MixedSampling, seeds: Sequence[int]
    ) -> list[Rollout]:
        """See `Policy`."""
        with self._model.eval_mode():
            sequences = await sample_teacher_mixed(
                self._model.model, verify, [prompt.prompt_ids for prompt in prompts], seeds, sampling,
                vocab_size=self._model.vocab_size, eos_token_ids=self._model.eos_token_ids,
                student_context=self._model.autocast,
            )  # fmt: skip

        def log_weights(sequence: MixedRollout) -> np.ndarray:
            student, teacher = torch.from_numpy(sequence.student_logprobs), torch.from_numpy(sequence.teacher_logprobs)
            return importance_log_weights(student, teacher, sampling.alpha).numpy()

        return [
            Rollout(
                **vars(with_completion(prompt, one.token_ids)), logprobs=one.student_logprobs, version=self.version,
                finish_reason=one.finish_reason, log_weights=log_weights(one), teacher_calls=one.calls,
                acceptance=one.acceptance,
            )
            for prompt, one in zip(prompts, sequences, strict=True)
        ]  # fmt: skip

    async def top_ids(self, sequences: Sequence[TokenSequence], k: int) -> list[np.ndarray]:
        """See `Policy`."""
        return await self._read(sequences, lambda some: self._model.top_ids(some, k))

    async def logprobs(self, sequences: Sequence[TokenSequence]) -> list[np.ndarray]:
        """See `Policy`."""
        return await self._read(sequences, self._model.logprobs)

    def begin(self, attempt: str) -> None:
        """See `Policy`. Do nothing, because the weights do not leave the worker."""

    def update(self, version: int) -> None:
        """See `Policy`. Must not be called during generation."""
        model: Any = self._model.model
        if not self.uses_learner and model.device.type == "meta":
            device = next(self._learner.buffers(), torch.empty(0)).device
            assign_state(model, gather_state(self._learner, device, keep=True))
            adopt_attention(model, self._learner.config._attn_implementation)
            model.generation_config = self._learner.generation_config
        elif not self.uses_learner:
            state = {name: whole_tensor(t.detach()) for name, t in trainable_state_dict(self._learner).items()}
            model.load_state_dict(state, strict=False)
        self.version = version

    def wait(self) -> None:
        """See `Policy`."""
        self._thread.submit(lambda: None).result()

    async def _read(
        self, sequences: Sequence[TokenSequence], work: Callable[[list[TokenSequence]], list[T]]
    ) -> list[T]:
        lengths = [len(sequence) for sequence in sequences]
        return await self._in_batches(lengths, lambda rows: work([sequences[row] for row in rows]), self._batch_tokens)

    async def _in_batches(self, lengths: list[int], work: Callable[[list[int]], list[T]], batch_tokens: int) -> list[T]:
        """Run `work` on batches of rows with these lengths and at most `batch_tokens` padded tokens, on the policy's
        thread; return its results in order."""

        def run() -> list[T]:
            results = dict[int, T]()
            with self._model.inference_context():
                for rows in micro_batches(lengths, batch_tokens):
                    results |= zip(rows, work(rows), strict=True)
            return [results[row] for row in range(len(lengths))]

        return await asyncio.get_running_loop().run_in_executor(self._thread, run)


def _copy_model(learner: CausalLM) -> CausalLM:
    """Return a copy of `learner` for generation that shares its frozen parameters.

    Trainable parameters require gradients in the copy, too: autocast caches the casts of such parameters only.
    """
    frozen = {id(parameter): parameter for parameter in learner.parameters() if not parameter.requires_grad}
    return copy.deepcopy(learner, frozen).eval()


def sampling_parameters(settings: RolloutConfig) -> SamplingParameters:
    """Return the sampling parameters of a run's settings."""
    return SamplingParameters(settings.max_new_tokens, settings.temperature, settings.top_p, settings.top_k)


def maximum_lengths(prompts: Sequence[TokenSequence], parameters: SamplingParameters) -> list[int]:
    """Return the largest length of each prompt with its completion, in tokens."""
    return [prompt.prompt_tokens + parameters.max_new_tokens for prompt in prompts if isinstance(prompt, Example)]


def to_rollouts(prompts: Sequence[Example], generated: Sequence[GeneratedSequence], version: int) -> list[Rollout]:
    """Combine prompts and generated sequences into rollouts of weight version `version`."""
    return [
        Rollout(
            **vars(with_completion(prompt, one.token_ids)), logprobs=one.logprobs, finish_reason=one.finish_reason,
            version=version, text=one.text,
        )
        for prompt, one in zip(prompts, generated, strict=True)
    ]  # fmt: skip


async def with_requested_ids(
    policy: Policy, rows: list[TokenSequence], support: Support, count: int
) -> list[TokenSequence]:
    """Return `rows`, with the policy's `count` most likely ids at each counted token if `support` is `requested`."""
    if not isinstance(support, Requested):
        return rows
    top_ids = await policy.top_ids(rows, count)
    return [replace(row, requested=ids) for row, ids in zip(rows, top_ids, strict=True)]


def summarize_rollouts(rollouts: Sequence[Rollout], version: int) -> dict[str, float]:
    """Return sums over `rollouts` for the metrics of a training step.

    Args:
        version: the learner's weight version; staleness is measured against it.
    """
    return {
        "rollouts": len(rollouts),
        "rollout_tokens": sum(len(rollout.completion_ids) for rollout in rollouts),
        "rollout_stopped": sum(rollout.finish_reason == "stop" for rollout in rollouts),
        "rollout_repetition": sum(repetition(rollout.completion_ids) for rollout in rollouts),
        "rollout_staleness": sum(version - rollout.version for rollout in rollouts),
        "rollout_teacher_calls": sum(rollout.teacher_calls for rollout in rollouts),
        "rollout_acceptance": sum(rollout.acceptance for rollout in rollouts),
        "rollout_turns": sum(rollout.turns for rollout in rollouts),
        "rollout_reward": sum(rollout.reward or 0.0 for rollout in rollouts),
    }


def repetition(ids: np.ndarray, n: int = _REPEATED_TOKENS) -> float:
    """Return the share of n-grams of token ids [tokens] that repeat an earlier one; 0 if there are no n-grams."""
    grams = [tuple(ids[start : start + n].tolist()) for start in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
