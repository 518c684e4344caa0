"""The vLLM engine: batched inference with a paged KV cache by vLLM's `AsyncLLM`, in vLLM's own processes.

Signals are computed in vLLM's workers (`rayk.engines.vllm_scorer`). Their log-probs are already rounded to float16, as
in the wire format.
"""

import asyncio
import os
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayk.config import VLLMEngineConfig
from rayk.config.support import Requested, Support, TopK
from rayk.engines.base import EngineInfo, GeneratedSequence, Prompt, SamplingParameters
from rayk.engines.batching import gather
from rayk.engines.checks import (
    check_request,
    generated_ids,
    probe_sequence,
    tokenize_prompts,
)
from rayk.engines.packed_columns import row_bytes, unpack_columns
from rayk.engines.padding import check_mass, ids_without_token
from rayk.engines.vllm_process import kill_vllm_processes, start_vllm_engine, vllm_errors
from rayk.engines.vllm_task import ScoringTask
from rayk.engines.vllm_worker import write_safetensors
from rayk.errors import EngineDied, InputError
from rayk.models import (
    Head,
    load_head,
    load_tokenizer,
    real_vocab_size,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from rayk.signals.batch import SignalBatch
from rayk.signals.sequence import TokenSequence

_PADDING_PROBE = 8
_HIGHEST_SEED = 2**63 - 1


class VLLMEngine:
    """Implements `rayk.engines.base.Engine`. All calls must come from one event loop."""

    def __init__(
        self, model: str, settings: VLLMEngineConfig | None = None, *, trust_remote_code: bool = False,
        vocab_size: int | None = None,
    ):  # fmt: skip
        """
        Args:
            vocab_size: number of leading ids that signals are over; None: all real tokens.
        """
        settings = settings or VLLMEngineConfig()
        tokenizer = settings.arguments.get("tokenizer", model)
        self.tokenizer = load_tokenizer(tokenizer, trust_remote_code=trust_remote_code)
        self._trust_remote_code = trust_remote_code
        self._head: Head | None = None
        self._scoring: asyncio.Task[None] | None = None
        self._ping: asyncio.Task[None] | None = None
        self._pinged_at, self._stall_seconds = 0.0, settings.stall_seconds
        self._engine = start_vllm_engine(model, settings, trust_remote_code=trust_remote_code)
        config = self._engine.vllm_config
        self._columns = config.model_config.get_vocab_size()
        self._tokens = min(self._columns, real_vocab_size(self.tokenizer))
        self.info = EngineInfo(
            model=model,
            vocab_size=min(self._tokens, vocab_size or self._tokens),
            # To score a sequence, vLLM must also generate a token after it.
            max_tokens=config.model_config.max_model_len - 1,
            tokenizer_fingerprint=tokenizer_fingerprint(self.tokenizer),
            dtype=str(config.model_config.dtype).removeprefix("torch."),
            device=config.device_config.device_type,
            supports=("topk", "requested", "sampled", "hidden", "logprob"),
            hidden_size=config.model_config.get_hidden_size(),
            engine="vllm",
            weights_fingerprint=weights_fingerprint(
                model, getattr(config.model_config.hf_config, "_commit_hash", None)
            ),
        )

    async def score(self, sequences: Sequence[TokenSequence], support: Support) -> SignalBatch:
        check_request(self.info, sequences, support)
        return await self._score(sequences, support, self.info.vocab_size)

    async def _score(self, sequences: Sequence[TokenSequence], support: Support, vocab_size: int) -> SignalBatch:
        await self._start_scoring()
        counted = [sequence for sequence in sequences if sequence.counted_tokens]
        packed = await gather(
            self._request_signal(sequence, ScoringTask.from_sequence(sequence, support, vocab_size))
            for sequence in counted
        )
        requested = sequences[0].requested if isinstance(support, Requested) else None
        asked = 0 if requested is None else requested.shape[1]
        nothing = torch.empty(0, row_bytes(support, vocab_size, asked, self.info.hidden_size), dtype=torch.uint8)
        columns: dict[str, Any] = unpack_columns(
            torch.cat([nothing, *packed]), support, vocab_size, asked, self.info.hidden_size
        )
        offsets = torch.tensor([0, *np.cumsum([sequence.counted_tokens for sequence in sequences])])
        return SignalBatch(support, offsets, vocab_size=vocab_size, **columns)

    def head(self) -> Head:
        if self._head is None:
            dtype = getattr(torch, self.info.dtype)
            self._head = load_head(self.info.model, dtype=dtype, trust_remote_code=self._trust_remote_code)
        return self._head

    async def generate(
        self, prompts: Sequence[Prompt], parameters: SamplingParameters, seeds: Sequence[int]
    ) -> list[GeneratedSequence]:
        rows = tokenize_prompts(self.info, self.tokenizer, prompts, parameters, self._tokens)
        limit = generated_ids(self.info, prompts, self._tokens)
        if not (parameters.temperature == 0 or 0.01 <= parameters.temperature <= 2):
            raise InputError(
                f"vLLM samples at temperatures from 0.01 to 2, or 0 for greedy, not {parameters.temperature:g}."
            )
        return await gather(
            self._generate_one(prompt, parameters, seed, limit) for prompt, seed in zip(rows, seeds, strict=True)
        )

    async def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Replace the weights of the model by `weights`. The engine must have no requests in flight.

        Args:
            weights: all tensors of a checkpoint under their names in it, on the CPU.

        Raises:
            RuntimeError: vLLM cannot load them; do not use the engine afterwards.
        """
        # A file in memory, which the kernel deletes when this process ends for any reason. vLLM's processes on the same
        # machine open it by its number. They would accept the tensors themselves only as pickles.
        with open(os.memfd_create("rayk-weights"), "wb") as file, vllm_errors(self.info.model):
            await asyncio.to_thread(write_safetensors, file, weights)
            path = f"/proc/{os.getpid()}/fd/{file.fileno()}"
            await self._call_workers("load_weights_file", path)
            if not await self._engine.reset_prefix_cache(reset_running_requests=True):
                raise RuntimeError("vLLM did not reset its prefix cache after the weights were replaced.")

    async def warm_up(self) -> None:
        await self.score([probe_sequence(self.info)], TopK(1))
        if len(missing := ids_without_token(self.tokenizer, self._columns)):
            probe, every = probe_sequence(self.info, _PADDING_PROBE), TopK(self._columns)
            signals = await self._score([probe], every, self._columns)
            assert signals.ids is not None and signals.logprobs is not None
            by_id = torch.empty_like(signals.logprobs).scatter_(1, signals.ids, signals.logprobs)
            check_mass(self.info.model, by_id, missing)

    async def check_health(self) -> None:
        if self._engine.errored:
            raise EngineDied(f"vLLM's process for {self.info.model} has ended.")
        if self._ping is None or self._ping.done():
            self._ping, self._pinged_at = asyncio.create_task(self._call_workers("ping")), time.monotonic()
            self._ping.add_done_callback(lambda ping: ping.cancelled() or ping.exception())  # so that it is retrieved
        elif (silent := time.monotonic() - self._pinged_at) > self._stall_seconds:
            kill_vllm_processes()  # requests fail, and are repeated at another replica
            raise EngineDied(f"vLLM's processes for {self.info.model} have not reacted for {silent:.0f} s.")

    def close(self) -> None:
        """Stop vLLM's processes."""
        self._engine.shutdown()

    async def _start_scoring(self) -> None:
        """Attach the scorer to vLLM's workers, once."""
        if self._scoring is None:
            self._scoring = asyncio.create_task(self._call_workers("start_scoring"))
        await asyncio.shield(self._scoring)

    async def _call_workers(self, method: str, *arguments: Any) -> None:
        """Call a method of `rayk.engines.vllm_worker.WorkerExtension` in every worker."""
        with vllm_errors(self.info.model):
            await self._engine.collective_rpc(method, args=arguments)

    async def _request_signal(self, sequence: TokenSequence, task: ScoringTask) -> Tensor:
        """Return one sequence's signal, packed, uint8 [counted tokens, bytes]."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(
            max_tokens=1, temperature=0.0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args=task.to_arguments(), skip_reading_prefix_cache=True,
        )  # fmt: skip
        outputs = self._engine.generate(_tokens_prompt(sequence.input_ids), parameters, uuid.uuid4().hex)
        packed = (await self._last_output(outputs)).prompt_token_id_logprobs
        if packed is None or len(packed) != len(task.positions):
            raise RuntimeError(
                "vLLM returned no signal for a sequence, because it preempted the request; lower 'in_flight'."
            )
        return torch.from_numpy(packed)

    async def _generate_one(
        self, prompt: np.ndarray, parameters: SamplingParameters, seed: int, limit: int
    ) -> GeneratedSequence:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            max_tokens=parameters.max_new_tokens, temperature=parameters.temperature, top_p=parameters.top_p,
            top_k=parameters.top_k, stop_token_ids=list(parameters.end_token_ids) or None,
            ignore_eos=bool(parameters.end_token_ids), seed=int(seed) & _HIGHEST_SEED, logprobs=0, flat_logprobs=True,
            stop=list(parameters.stop), include_stop_str_in_output=True, skip_special_tokens=False,
            detokenize=bool(parameters.stop), output_kind=RequestOutputKind.FINAL_ONLY,
            # Padding is never sampled. vLLM computes the log-probs before it applies this bias.
            logit_bias=dict.fromkeys(range(limit, self._columns), float("-inf")) or None,
        )  # fmt: skip
        output = await self._last_output(self._engine.generate(_tokens_prompt(prompt), sampling, uuid.uuid4().hex))
        [completion] = output.outputs
        if completion.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM aborted a completion: {completion.finish_reason}.")
        return GeneratedSequence(
            np.asarray(completion.token_ids, np.int32), np.asarray(completion.logprobs.logprobs, np.float32),
            completion.finish_reason, self.tokenizer.decode(completion.token_ids, skip_special_tokens=True),
        )  # fmt: skip

    async def _last_output(self, outputs: AsyncIterator[Any]) -> Any:
        """Return the last of a request's outputs."""
        with vllm_errors(self.info.model):
            async for output in outputs:
                last = output
            return last


def _tokens_prompt(ids: np.ndarray) -> Any:
    return {"prompt_token_ids": np.asarray(ids).tolist()}
