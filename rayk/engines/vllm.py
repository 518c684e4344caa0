"""The vLLM engine: batched, paged inference by vLLM's `AsyncLLM`, which computes in processes of its own.

Of a prompt's positions vLLM tells the likeliest tokens at temperature 1, and nothing of the rest of the vocabulary. So
a signal's tail is what the listed probabilities leave of 1, and there is no tail at other temperatures. Support
`hidden` has neither limit; it takes a second engine that gives final hidden states.
"""

import asyncio
import json
import os
import textwrap
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from rayk.config import VLLMEngineConfig
from rayk.config.support import Hidden, Logprob, Requested, Support, TopK
from rayk.engines.base import EngineInfo, GeneratedSequence, Prompt, SamplingParameters
from rayk.engines.batching import gather
from rayk.engines.checks import check_request, tokenize_prompts
from rayk.errors import EngineDied, InputError
from rayk.models import (
    DTYPES,
    Head,
    load_head,
    load_tokenizer,
    pick_device,
    real_vocab_size,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from rayk.signals.batch import SignalBatch, concatenate
from rayk.signals.sequence import TokenSequence

# One part of a machine, not all of it: replicas and students share its cores and memory.
_CPU_ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
_CPU_CACHE_BYTES = 1 << 30
# float32's spacing at 1. vLLM's log-probs are float32, so what their sum leaves of 1 is rounding below this.
_LEAST_TAIL = 2.0**-23
# Listed beyond k where the embedding is padded, since padding may be among the likeliest; rarely it is more than these.
_SPARE = 8
_HEAD_ROWS = 512
_HIGHEST_SEED = 2**63 - 1
_SAFETENSORS = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
WORKER_EXTENSION = "rayk.engines.vllm_worker.WeightUpdateExtension"
"""For vLLM's argument `worker_extension_cls`: `VLLMEngine.load_weights` needs it."""


class VLLMEngine:
    """See `rayk.engines.base.Engine`. To be used on one event loop.

    Attributes:
        floored_tails: at how many positions the tail was below what float32 log-probs can tell, 2^-23, and set to it.
    """

    def __init__(self, model: str, settings: VLLMEngineConfig | None = None, *, trust_remote_code: bool = False):
        settings = settings or VLLMEngineConfig()
        self.floored_tails = 0
        own = settings.arguments.get("tokenizer", model)
        self.tokenizer = load_tokenizer(own, trust_remote_code=trust_remote_code)
        self._engine = _start(model, settings, trust_remote_code)
        config = self._engine.vllm_config
        self._columns = config.model_config.get_vocab_size()
        supports = ["topk", "logprob"]
        if config.use_v2_model_runner:
            supports.append("requested")
        self._pooling: Any = None
        if settings.hidden:
            supports.append("hidden")
            self._pooling = _start(model, settings, trust_remote_code, hidden=True)
            head = load_head(model, dtype=config.model_config.dtype, trust_remote_code=trust_remote_code)
            self._head = head.to(pick_device())
        self.info = EngineInfo(
            model=model,
            vocab_size=min(self._columns, real_vocab_size(self.tokenizer)),
            # To score a sequence vLLM must also write a token after it.
            max_tokens=config.model_config.max_model_len - 1,
            tokenizer_fingerprint=tokenizer_fingerprint(self.tokenizer),
            dtype=str(config.model_config.dtype).removeprefix("torch."),
            device=config.device_config.device_type,
            supports=tuple(supports),
            hidden_size=self._head.weight.shape[1] if settings.hidden else 0,
            engine="vllm",
            weights_fingerprint=weights_fingerprint(
                model, getattr(config.model_config.hf_config, "_commit_hash", None)
            ),
        )

    async def score(self, sequences: Sequence[TokenSequence], support: Support) -> SignalBatch:
        self._check(sequences, support)
        one = self._hidden if isinstance(support, Hidden) else self._listed
        return concatenate(await gather(one(sequence, support) for sequence in sequences))

    def head(self) -> Head:
        if self._pooling is None:
            raise InputError(f"The engine of {self.info.model} gives no hidden states; set 'engine.hidden: true'.")
        return self._head

    async def generate(
        self, prompts: Sequence[Prompt], parameters: SamplingParameters, seeds: Sequence[int]
    ) -> list[GeneratedSequence]:
        rows = tokenize_prompts(self.info, self.tokenizer, prompts, parameters)
        if not (parameters.temperature == 0 or 0.01 <= parameters.temperature <= 2):
            raise InputError(
                f"vLLM samples at temperatures from 0.01 to 2, or 0 for greedy, not {parameters.temperature:g}."
            )
        return await gather(self._continued(prompt, parameters, seed) for prompt, seed in zip(rows, seeds, strict=True))

    async def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Compute with `weights` from now on. The engine must have been started with `WORKER_EXTENSION`, and nobody may
        be asking it for anything.

        Args:
            weights: all of a checkpoint's tensors under their names there, on the CPU.

        Raises:
            RuntimeError: vLLM cannot load them; what it computes afterwards is nothing to rely on.
        """
        # A file in memory, which goes with this process whatever ends it. vLLM's processes, on the same machine, open
        # it by its number; the tensors themselves they would take as pickles alone.
        with open(os.memfd_create("rayk-weights"), "wb") as file, self._telling():
            await asyncio.to_thread(_write, file, weights)
            path = f"/proc/{os.getpid()}/fd/{file.fileno()}"
            await self._engine.collective_rpc("load_weights_file", args=(path,))
            if not await self._engine.reset_prefix_cache(reset_running_requests=True):
                raise RuntimeError("vLLM did not forget what it had computed with the weights before.")

    async def warm_up(self) -> None:
        listed = (await self.score([probe(self.info)], TopK(1))).target_logprobs
        if self._pooling is not None:
            own = (await self.score([probe(self.info)], Hidden())).target_logprobs
            if off := logprob_mismatch(own, listed, self.info.dtype):
                raise InputError(
                    f"The hidden states vLLM gives of {self.info.model} and its head do not make its log-probs (off by "
                    f"up to {off:.2g} nats); leave 'engine.hidden' out, and please report the architecture."
                )

    async def check_health(self) -> None:
        if self._engine.errored or (self._pooling is not None and self._pooling.errored):
            raise EngineDied(f"vLLM's process for {self.info.model} is gone.")

    def close(self) -> None:
        """Stop vLLM's processes."""
        self._engine.shutdown()
        if self._pooling is not None:
            self._pooling.shutdown()

    def _check(self, sequences: Sequence[TokenSequence], support: Support) -> None:
        if isinstance(support, Requested) and "requested" not in self.info.supports:
            raise InputError(
                "Support 'requested' needs vLLM's V2 model runner, which needs a GPU; use engine kind 'transformers'."
            )
        if isinstance(support, Hidden) and self._pooling is None:
            self.head()
        check_request(self.info, sequences, support)
        if isinstance(support, TopK | Requested) and set(support.temperatures) != {1.0}:
            raise InputError(
                f"vLLM tells log-probs at temperature 1 only, not {', '.join(f'{t:g}' for t in support.temperatures)}; "
                "use engine kind 'transformers', or support 'hidden'."
            )

    async def _listed(self, sequence: TokenSequence, support: Support) -> SignalBatch:
        """One sequence's signals from vLLM's lists of likeliest tokens."""
        k = support.k if isinstance(support, TopK | Requested) else 0
        asked = sequence.requested if isinstance(support, Requested) else None
        width = min(k + (0 if asked is None else asked.shape[1]), self.info.vocab_size)
        padding = self._columns - self.info.vocab_size if width else 0
        for spare in sorted({min(_SPARE, padding), padding}):
            targets, ids, logprobs = await self._ask(sequence, width + spare, asked)
            ids = np.where(ids < self.info.vocab_size, ids, -1)
            if not spare or ((ids[:, -(width + spare) :] >= 0).sum(1) >= width).all():
                break
        if spare or asked is not None:
            ids, logprobs = top_distinct(ids, logprobs, width)
        found: dict[str, Any] = {"target_logprobs": torch.from_numpy(targets)}
        if not isinstance(support, Logprob):
            found["ids"], found["logprobs"] = torch.from_numpy(ids), torch.from_numpy(logprobs)
            found["log_tails"] = torch.from_numpy(self._log_tails(logprobs))[:, None]
        return SignalBatch(support, torch.tensor([0, len(targets)]), vocab_size=self.info.vocab_size, **found)

    async def _ask(
        self, sequence: TokenSequence, width: int, asked: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """At the counted positions: log p of the actual token [tokens], then ids and log-probs [tokens, m + width] of
        those `asked` for and the `width` likeliest."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        named = 0 if asked is None else asked.shape[1]
        at = np.flatnonzero(sequence.counted) - 1
        if not len(at):
            return np.zeros(0, np.float32), np.zeros((0, named + width), int), np.zeros((0, named + width), np.float32)
        parameters = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=width, detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        if asked is not None and named:
            rows = np.full((len(sequence) - 1 - at[0], named), -1, np.int32)
            rows[at - at[0]] = asked
            parameters.prompt_logprob_token_ids, parameters.prompt_logprob_start = rows, int(at[0])
        output = await self._last(self._engine.generate(_prompt(sequence.input_ids), parameters, uuid.uuid4().hex))
        ids, logprobs = (np.concatenate([part[i].numpy() for part in output.prompt_logprobs]) for i in (0, 1))
        # vLLM has answered for wrong tokens before (its PRs 44106 and 53520).
        if ids.shape != (len(sequence) - 1, width + 1) or (ids[:, 0] != sequence.input_ids[1:]).any():
            raise RuntimeError(
                "vLLM's prompt_logprobs are not those of the tokens it was given; leave speculative decoding out of "
                "'engine.arguments', and please report this with vLLM's version."
            )
        ids, logprobs = ids[at].astype(int), logprobs[at].astype(np.float32)
        targets, ids, logprobs = logprobs[:, 0], ids[:, 1:], logprobs[:, 1:]
        if asked is not None and named:
            if (scores := output.prompt_token_id_logprobs) is None:
                raise RuntimeError(
                    "vLLM left the requested ids unanswered; lower 'in_flight', so that it preempts none."
                )
            ids = np.concatenate([asked, ids], axis=1)
            logprobs = np.concatenate([scores[at - at[0]], logprobs], axis=1)
        return targets.copy(), ids, logprobs

    def _log_tails(self, logprobs: np.ndarray) -> np.ndarray:
        """float32 [tokens]: log of what the probabilities of `logprobs` [tokens, k] leave of 1."""
        if logprobs.shape[1] == self._columns:
            return np.full(len(logprobs), -np.inf, np.float32)
        tails = -np.expm1(np.logaddexp.reduce(logprobs.astype(np.float64), axis=1))
        self.floored_tails += int((tails < _LEAST_TAIL).sum())
        return np.log(np.maximum(tails, _LEAST_TAIL)).astype(np.float32)

    async def _hidden(self, sequence: TokenSequence, support: Support) -> SignalBatch:
        """One sequence's final hidden states, and the actual tokens' log-probs that the head makes of them."""
        assert isinstance(support, Hidden)
        from vllm import PoolingParams

        at = np.flatnonzero(sequence.counted) - 1
        states = torch.zeros(0, self.info.hidden_size)
        if len(at):
            parameters = PoolingParams(task="token_embed", use_activation=False)
            asking = self._pooling.encode(_prompt(sequence.input_ids), parameters, uuid.uuid4().hex)
            states = (await self._last(asking)).outputs.data[at]
        targets = torch.from_numpy(sequence.targets.astype(np.int64))
        logprobs = await asyncio.to_thread(_logprobs_of, self._head, states, targets)
        return SignalBatch(
            support, torch.tensor([0, len(at)]), logprobs, self.info.vocab_size, hidden=states.to(DTYPES[support.dtype])
        )

    async def _continued(self, prompt: np.ndarray, parameters: SamplingParameters, seed: int) -> GeneratedSequence:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            max_tokens=parameters.max_new_tokens, temperature=parameters.temperature, top_p=parameters.top_p,
            top_k=parameters.top_k, seed=int(seed) & _HIGHEST_SEED, logprobs=0, flat_logprobs=True,
            stop=list(parameters.stop), include_stop_str_in_output=True, skip_special_tokens=False,
            detokenize=bool(parameters.stop), output_kind=RequestOutputKind.FINAL_ONLY,
            # Never a padding id. The log-probs are taken before this.
            logit_bias=dict.fromkeys(range(self.info.vocab_size, self._columns), float("-inf")) or None,
        )  # fmt: skip
        output = await self._last(self._engine.generate(_prompt(prompt), sampling, uuid.uuid4().hex))
        [written] = output.outputs
        if written.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM gave a continuation up: {written.finish_reason}.")
        return GeneratedSequence(
            np.asarray(written.token_ids, np.int32), np.asarray(written.logprobs.logprobs, np.float32),
            written.finish_reason, self.tokenizer.decode(written.token_ids, skip_special_tokens=True),
        )  # fmt: skip

    async def _last(self, outputs: AsyncIterator[Any]) -> Any:
        """The last of a request's outputs."""
        with self._telling():
            async for output in outputs:
                last = output
            return last

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Errors as rayk's own, since vLLM's cannot be read where it is missing."""
        from vllm.exceptions import VLLMError
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            yield
        except EngineDeadError as error:
            raise EngineDied(f"vLLM's process for {self.info.model} is gone.") from error
        except VLLMError as error:
            raise RuntimeError(f"vLLM failed: {error.__cause__ or error}") from error
        except Exception as error:
            if type(error) is not Exception:
                raise
            raise RuntimeError(f"vLLM failed: {error}") from error  # what a call of its workers came to


def _write(file: BinaryIO, weights: Mapping[str, Tensor]) -> None:
    """Into an open file, as safetensors, whose own `save_file` makes another file and gives that the name."""
    header, end = {}, 0
    for name, tensor in weights.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _SAFETENSORS[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [begin, end]}
    described = json.dumps(header).encode()
    described += b" " * (-len(described) % 8)
    file.write(len(described).to_bytes(8, "little") + described)
    for tensor in weights.values():
        file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    file.flush()


def probe(info: EngineInfo) -> TokenSequence:
    """Some tokens that every model can read."""
    length = min(64, info.max_tokens)
    return TokenSequence(np.arange(length, dtype=np.int32) % info.vocab_size, np.arange(length) > 0)


def logprob_mismatch(own: Tensor, others: Tensor, dtype: str) -> float:
    """How far log-probs of the same tokens, computed in two ways in `dtype`, are apart at most; 0 where rounding may
    account for it."""
    off, allowed = (own - others).abs(), 1e-2 if dtype == "float32" else 0.3
    return float(off.max()) if bool((off > allowed + 0.02 * others.abs()).any()) else 0.0


def top_distinct(ids: np.ndarray, logprobs: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `width` different ids of each row, likeliest first; -1 is none.

    Args:
        ids, logprobs: [tokens, columns], each row with `width` different ids or more.
    """

    def take(order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.take_along_axis(ids, order, axis=1), np.take_along_axis(logprobs, order, axis=1)

    by_id = ids.argsort(axis=1, kind="stable")
    ordered, _ = take(by_id)
    left_out = np.zeros(ids.shape, bool)
    np.put_along_axis(left_out, by_id[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    ids, logprobs = take((left_out | (ids < 0)).argsort(axis=1, kind="stable")[:, :width])
    return take((-logprobs).argsort(axis=1, kind="stable"))


def _prompt(ids: np.ndarray) -> Any:
    return {"prompt_token_ids": np.asarray(ids).tolist()}


def _start(model: str, settings: VLLMEngineConfig, trust_remote_code: bool, hidden: bool = False) -> Any:
    """An `AsyncLLM`: one that generates, or one that gives hidden states."""
    if not torch.cuda.is_available():
        for name, value in _CPU_ENVIRONMENT.items():
            os.environ.setdefault(name, value)  # before vLLM is loaded
    try:
        from vllm.config import PoolerConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "vllm":
            raise
        raise InputError("engine kind 'vllm' needs the vllm package: pip install 'rayk[vllm]'") from error
    arguments: dict[str, Any] = {
        "model": model, "dtype": settings.dtype, "trust_remote_code": trust_remote_code, "max_logprobs": -1,
        "disable_log_stats": True, "tensor_parallel_size": settings.tensor_parallel_size,
        "max_model_len": settings.max_model_len, "gpu_memory_utilization": settings.gpu_memory_utilization,
    }  # fmt: skip
    if settings.across_nodes:
        arguments["distributed_executor_backend"] = "ray"  # in the placement group that this process is in
    elif settings.tensor_parallel_size > 1:
        arguments["distributed_executor_backend"] = "mp"  # Ray has given this process the GPUs already
    if current_platform.is_cpu():
        # A seeded request whose prompt is read in parts ends the engine: "CPU Generator does not use offset".
        arguments["enable_chunked_prefill"] = False
        if settings.gpu_memory_utilization is None:
            arguments["kv_cache_memory_bytes"] = _CPU_CACHE_BYTES
    arguments = {name: value for name, value in arguments.items() if value is not None} | settings.arguments
    if hidden:
        pooler = PoolerConfig(task="token_embed", pooling_type="ALL", use_activation=False)
        arguments |= {"runner": "pooling", "convert": "embed", "pooler_config": pooler}
    try:
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
    except (TypeError, ValueError) as error:
        reason = textwrap.shorten(str(error), 500, placeholder=" …")
        raise InputError(f"vLLM does not start '{model}' as 'engine' says: {reason}") from error
    _keep_tensors(engine)
    return engine


class _Parts(list[Any]):
    """A prompt's log-probs as they came: (ids, log-probs, ranks) of each part of the prompt, tensors."""


def _keep_tensors(engine: Any) -> None:
    """Leave prompt log-probs the tensors they are when they reach this process. vLLM's front end would make Python
    numbers of them, one by one, on the loop that all requests share."""
    processor = engine.output_processor
    process_outputs = processor.process_outputs

    def with_tensors(outputs: list[Any], *arguments: Any, **options: Any) -> Any:
        for output in outputs:
            part, request = output.new_prompt_logprobs_tensors, processor.request_states.get(output.request_id)
            if part is not None and request is not None:
                output.new_prompt_logprobs_tensors = None
                held = request.logprobs_processor
                if not isinstance(held.prompt_logprobs, _Parts):
                    held.prompt_logprobs = _Parts()
                held.prompt_logprobs.append(part)
        return process_outputs(outputs, *arguments, **options)

    processor.process_outputs = with_tensors


def _logprobs_of(head: Head, states: Tensor, targets: Tensor) -> Tensor:
    """float32 [tokens] on the CPU: log p of `targets` [tokens] under `head` on `states` [tokens, width]."""
    parts = []
    for some, chosen in zip(states.split(_HEAD_ROWS), targets.split(_HEAD_ROWS), strict=True):
        logits = head.logits(some.to(head.weight.device, head.weight.dtype))
        parts.append((logits.gather(1, chosen[:, None].to(logits.device))[:, 0] - logits.logsumexp(1)).cpu())
    return torch.cat(parts)
