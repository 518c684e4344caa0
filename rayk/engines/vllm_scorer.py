"""Compute signals inside vLLM's workers, from the hidden states of an ordinary step.

vLLM schedules a request for signals like any other: its prompt is read in batches with others, in parts if it is long.
After each step the scorer takes the hidden states at the counted tokens only, computes their logits, and reduces them
to a signal. Under tensor parallelism each worker does so for its own columns of the head, and k numbers a position are
exchanged instead of logits. A signal returns with the request's output, in the field that vLLM has for the log-probs of
given ids of a prompt (`prompt_token_id_logprobs`); vLLM passes that tensor on without looking at it.

vLLM has two model runners, and `attach_scorer` calls the scorer from either. The names that it uses are not a public
interface, so each is checked when the engine starts. Read in vLLM 0.32.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayk.config.support import Hidden, Sampled, Support
from rayk.engines.packed_columns import pack_columns
from rayk.engines.reduce import HeadShard, draw_coins, logits_rows, reduce_logits, reduce_sharded_logits
from rayk.engines.vllm_task import ScoringTask


@dataclass(frozen=True)
class PromptPart:
    """The part of a prompt that one step has read.

    Attributes:
        start, end: positions in the prompt.
        row: row of the step's hidden states that belongs to position `start`.
        is_last: whether the prompt ends with this part.
    """

    request: str
    start: int
    end: int
    row: int
    is_last: bool


@dataclass
class _Progress:
    """A task and the rows of its signal that have been computed, uint8 [positions, bytes] each."""

    task: ScoringTask
    done: int = 0
    parts: list[Tensor] = field(default_factory=list)


class Scorer:
    """The signals of the requests of one worker."""

    def __init__(self, model: Any):
        """
        Args:
            model: vLLM's model in this worker.
        """
        self._logits = _Logits(model)
        self._open: dict[str, _Progress] = {}

    def add(self, request: str, arguments: dict[str, Any] | None) -> bool:
        """Take the task in a request's `extra_args`, if there is one; return whether there is."""
        if request not in self._open and (task := ScoringTask.from_arguments(arguments)) is not None:
            self._open[request] = _Progress(task)
        return request in self._open

    def remove(self, request: str) -> None:
        """Forget a request that has ended."""
        self._open.pop(request, None)

    def keep_only(self, requests: Iterable[str]) -> None:
        """Forget all other requests."""
        for request in self._open.keys() - set(requests):
            del self._open[request]

    @torch.inference_mode()
    def score_step(self, hidden: Tensor, parts: Iterable[PromptPart]) -> dict[str, Tensor]:
        """Compute the signals at the positions that one step has read.

        Args:
            hidden: final hidden states of the step, [rows, width].

        Returns:
            The signals of prompts that end with this step, uint8 [counted tokens, bytes] (`pack_columns`). A signal has
            fewer rows if vLLM did not compute some hidden states, because it had cached them.
        """
        groups: dict[Any, list[tuple[PromptPart, _Progress, slice]]] = defaultdict(list)
        last = []
        for part in parts:
            if (progress := self._open.get(part.request)) is None:
                continue
            task = progress.task
            if part.start == 0:  # also after a preemption, which starts a prompt again
                progress.done, progress.parts = 0, []
            span = slice(*np.searchsorted(task.positions, (part.start, part.end)).tolist())
            if span.stop > span.start and span.start == progress.done:
                requested = 0 if task.requested is None else task.requested.shape[1]
                groups[task.support, task.vocab_size, requested].append((part, progress, span))
                progress.done = span.stop
            if part.is_last:
                last.append(part.request)
        for (support, vocab_size, _), members in groups.items():
            self._score_group(hidden, support, vocab_size, members)
        finished = {request: self._open.pop(request).parts for request in last}
        return {
            request: torch.cat(rows) if rows else torch.empty(0, 0, dtype=torch.uint8)
            for request, rows in finished.items()
        }

    def _score_group(
        self, hidden: Tensor, support: Support, vocab_size: int, members: list[tuple[PromptPart, _Progress, slice]]
    ) -> None:
        """Append rows to the signals of requests with the same support."""
        device = hidden.device
        rows = np.concatenate([p.task.positions[span] - part.start + part.row for part, p, span in members])
        targets = torch.from_numpy(np.concatenate([p.task.targets[span] for _, p, span in members])).to(device)
        states = hidden[torch.from_numpy(rows).to(device)]
        inputs = _stack_inputs(support, members)
        inputs = None if inputs is None else inputs.to(device)
        packed = []
        size = self._logits.rows(device.type)
        for start in range(0, len(states), size):
            at = slice(start, start + size)
            columns = self._reduce(states[at], targets[at], support, vocab_size, None if inputs is None else inputs[at])
            packed.append(pack_columns(columns, support, vocab_size))
        counts = [span.stop - span.start for _, _, span in members]
        for (_, progress, _), signal in zip(members, torch.cat(packed).split(counts), strict=True):
            progress.parts.append(signal)

    def _reduce(
        self, states: Tensor, targets: Tensor, support: Support, vocab_size: int, inputs: Tensor | None
    ) -> dict[str, Tensor]:
        logits, shard = self._logits.compute(states, whole=isinstance(support, Sampled))
        if shard is None:
            columns = reduce_logits(logits, targets, support, vocab_size, inputs)
        else:
            columns = reduce_sharded_logits(logits, shard, targets, support, vocab_size, inputs)
        return columns | {"hidden": states} if isinstance(support, Hidden) else columns


class _Logits:
    """The logits of vLLM's model, of this worker's columns of the head where that is possible."""

    def __init__(self, model: Any):
        from vllm.model_executor.layers.logits_processor import LogitsProcessor
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        self._model = model
        self._processors = [module for module in model.modules() if isinstance(module, LogitsProcessor)]
        self._is_sharded = any(
            module.tp_size > 1 for module in model.modules() if isinstance(module, VocabParallelEmbedding)
        )
        self._columns = 0

    def rows(self, device: str) -> int:
        """Return the number of positions whose logits are computed at the same time."""
        return logits_rows(device, self._columns or 1 << 17)

    def compute(self, states: Tensor, *, whole: bool) -> tuple[Tensor, HeadShard | None]:
        """Return the logits of `states`, float32 [tokens, columns], and the shard they are; None: all columns.

        Args:
            whole: return all columns in each worker.
        """
        heads: list[Any] = []
        if self._is_sharded and not whole:
            for processor in self._processors:
                processor.forward = _without_gathering(processor, heads)
        try:
            logits = self._model.compute_logits(states).float()
        finally:
            if self._is_sharded and not whole:
                for processor in self._processors:
                    del processor.forward
        self._columns = logits.shape[1]
        if not heads:
            return logits, None
        indices = heads[0].shard_indices
        logits[:, indices.num_org_elements :] = float("-inf")  # padding, and tokens that LoRA adds
        return logits, HeadShard(indices.org_vocab_start_index, _gather)


def _gather(tensor: Tensor) -> Tensor:
    """Concatenate the workers' tensors [tokens, n], float32 or int64, to [tokens, workers · n]."""
    from vllm.distributed import tensor_model_parallel_all_gather

    # vLLM's collectives for CPUs with AVX-512 take no integers, but do not change the bits of other numbers.
    numbers = tensor.contiguous().view(torch.float32)
    return tensor_model_parallel_all_gather(numbers, dim=-1).view(tensor.dtype)


def _without_gathering(processor: Any, heads: list[Any]) -> Any:
    """Return the `forward` of a `LogitsProcessor` that returns this worker's columns and records the head."""
    forward = processor.forward

    def forward_own_columns(head: Any, hidden_states: Tensor, embedding_bias: Tensor | None = None) -> Tensor:
        heads.append(head)
        return forward(head, hidden_states, embedding_bias, skip_gather=True)

    return forward_own_columns


def _stack_inputs(support: Support, members: list[tuple[PromptPart, _Progress, slice]]) -> Tensor | None:
    """Return the inputs of `reduce_logits` at each position of the members."""
    if isinstance(support, Sampled):
        coins = [draw_coins(p.task.seed, len(p.task.positions), support)[span] for _, p, span in members]
        return torch.from_numpy(np.concatenate(coins))
    requested = [p.task.requested[span] for _, p, span in members if p.task.requested is not None]
    return torch.from_numpy(np.concatenate(requested)) if requested else None


def attach_scorer(runner: Any) -> None:
    """Let vLLM's model runner compute and return the signals that requests ask for.

    Raises:
        RuntimeError: this version of vLLM has another model runner.
    """
    try:
        if hasattr(runner, "prompt_logprobs_worker"):
            if (worker := runner.prompt_logprobs_worker) is not None:  # None before the last pipeline stage
                _attach_to_v2(worker, Scorer(runner.get_model()))
        else:
            _attach_to_v1(runner, Scorer(runner.get_model()))
    except (AttributeError, ImportError) as error:
        from vllm import __version__

        raise RuntimeError(
            f"vLLM {__version__} has another model runner than rayk knows ({error}); install vLLM 0.32 or 0.33, or use "
            "engine kind 'transformers'."
        ) from error


def _attach_to_v1(runner: Any, scorer: Scorer) -> None:
    """Attach to `vllm.v1.worker.gpu_model_runner.GPUModelRunner`, which also computes on a CPU."""
    get_prompt_logprobs, sample_tokens = runner._get_prompt_logprobs_dict, runner.sample_tokens
    requests, starts = runner.requests, runner.query_start_loc
    finished: dict[str, Tensor] = {}

    def score_and_get_prompt_logprobs(hidden_states: Tensor, num_scheduled_tokens: dict[str, int]) -> Any:
        parts = []
        for name, tokens in num_scheduled_tokens.items():
            request = requests[name]
            parameters, start = request.sampling_params, request.num_computed_tokens
            if parameters is not None and start < request.num_prompt_tokens and scorer.add(name, parameters.extra_args):
                end = start + tokens
                row = int(starts.np[runner.input_batch.req_id_to_index[name]])
                parts.append(PromptPart(name, start, end, row, end >= request.num_prompt_tokens))
        if parts:
            signals = scorer.score_step(hidden_states, parts)
            finished.update((name, signal.cpu()) for name, signal in signals.items())
        scorer.keep_only(requests)
        return get_prompt_logprobs(hidden_states, num_scheduled_tokens)

    def sample_and_return_signals(*arguments: Any, **options: Any) -> Any:
        finished.clear()
        output = sample_tokens(*arguments, **options)
        if finished:
            # With asynchronous scheduling the output is wrapped.
            getattr(output, "_model_runner_output", output).prompt_token_id_logprobs_dict = dict(finished)
        return output

    runner._get_prompt_logprobs_dict, runner.sample_tokens = score_and_get_prompt_logprobs, sample_and_return_signals


def _attach_to_v2(worker: Any, scorer: Scorer) -> None:
    """Attach to `vllm.v1.worker.gpu.sample.prompt_logprob.PromptLogprobsWorker`. vLLM copies the signals to the CPU
    while the next step runs."""
    add_request, remove_request = worker.add_request, worker.remove_request
    compute = worker.compute_prompt_token_id_logprobs

    def add(req_id: str, req_idx: int, sampling_params: Any) -> None:
        add_request(req_id, req_idx, sampling_params)
        scorer.add(req_id, sampling_params.extra_args)

    def remove(req_id: str) -> None:
        remove_request(req_id)
        scorer.remove(req_id)

    def score_and_compute(logits_fn: Any, hidden_states: Tensor, input_batch: Any, prompt_lens: np.ndarray) -> Any:
        parts = []
        for i, name in enumerate(input_batch.req_ids):
            length = int(prompt_lens[input_batch.idx_mapping_np[i]])
            start = int(input_batch.num_computed_prefill_tokens_np[i])
            # Otherwise the prompt has been read before a preemption, and its signal returned.
            if start < length and length >= input_batch.prefill_len_np[i]:
                end = start + int(input_batch.num_scheduled_tokens[i])
                parts.append(PromptPart(name, start, end, int(input_batch.query_start_loc_np[i]), end >= length))
        signals = scorer.score_step(hidden_states, parts)
        return signals | compute(logits_fn, hidden_states, input_batch, prompt_lens)

    worker.add_request, worker.remove_request = add, remove
    worker.compute_prompt_token_id_logprobs = score_and_compute
