"""The vLLM engine: batched inference with a paged KV cache by vLLM's `AsyncLLM`, in vLLM's own processes.

For a prompt's positions vLLM returns the likeliest tokens at temperature 1 and nothing about the rest of the
vocabulary. A signal's tail is therefore 1 minus the sum of the returned probabilities, and there is no tail at other
temperatures. Support `hidden` has neither limit; it requires a second engine that returns final hidden states.
"""

import asyncio
import os
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayk.config import VLLMEngineConfig
from rayk.config.support import Hidden, Logprob, Requested, Support, TopK
from rayk.engines.base import EngineInfo, GeneratedSequence, Prompt, SamplingParameters
from rayk.engines.batching import gather
from rayk.engines.checks import (
    check_padding,
    check_request,
    generated_ids,
    logprob_mismatch,
    probe_sequence,
    tokenize_prompts,
)
from rayk.engines.vllm_process import start_vllm_engine, vllm_errors
from rayk.engines.vllm_worker import write_safetensors
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

# float32's spacing at 1. vLLM's log-probs are float32, so a smaller difference between their sum and 1 is rounding.
LEAST_TAIL = 2.0**-23
# Number of tokens requested in addition to k if the embedding is padded, because padding may be among the likeliest.
_SPARE = 8
_HEAD_ROWS = 512
_PADDING_PROBE = 8
_HIGHEST_SEED = 2**63 - 1


class VLLMEngine:
    """Implements `rayk.engines.base.Engine`. All calls must come from one event loop.

    Attributes:
        floored_tails: number of positions whose tail was below 2^-23, the resolution of float32 log-probs, and was set
            to 2^-23.
    """

    def __init__(
        self, model: str, settings: VLLMEngineConfig | None = None, *, trust_remote_code: bool = False,
        vocab_size: int | None = None,
    ):  # fmt: skip
        """
        Args:
            vocab_size: number of leading ids that signals are over; None: all real tokens.
        """
        settings = settings or VLLMEngineConfig()
        self.floored_tails = 0
        tokenizer = settings.arguments.get("tokenizer", model)
        self.tokenizer = load_tokenizer(tokenizer, trust_remote_code=trust_remote_code)
        self._engine = start_vllm_engine(model, settings, trust_remote_code=trust_remote_code)
        config = self._engine.vllm_config
        self._columns = config.model_config.get_vocab_size()
        self._tokens = min(self._columns, real_vocab_size(self.tokenizer))
        supports = ["topk", "logprob"]
        if config.use_v2_model_runner:
            supports.append("requested")
        self._pooling: Any = None
        if settings.hidden:
            supports.append("hidden")
            self._pooling = start_vllm_engine(model, settings, trust_remote_code=trust_remote_code, hidden=True)
            head = load_head(model, dtype=config.model_config.dtype, trust_remote_code=trust_remote_code)
            self._head = head.to(pick_device())
        self.info = EngineInfo(
            model=model,
            vocab_size=min(self._tokens, vocab_size or self._tokens),
            # To score a sequence, vLLM must also generate a token after it.
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
        score_one = self._score_hidden if isinstance(support, Hidden) else self._score_by_logprobs
        return concatenate(await gather(score_one(sequence, support) for sequence in sequences))

    def head(self) -> Head:
        if self._pooling is None:
            raise InputError(f"The engine of {self.info.model} returns no hidden states; set 'engine.hidden: true'.")
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
        """Replace the weights of the model by `weights`. The engine must have been started with `WORKER_EXTENSION` and
        must have no requests in flight.

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
            await self._engine.collective_rpc("load_weights_file", args=(path,))
            if not await self._engine.reset_prefix_cache(reset_running_requests=True):
                raise RuntimeError("vLLM did not reset its prefix cache after the weights were replaced.")

    async def warm_up(self) -> None:
        reference = (await self.score([probe_sequence(self.info)], TopK(1))).target_logprobs
        await self._check_padding()
        if self._pooling is not None:
            computed = (await self.score([probe_sequence(self.info)], Hidden())).target_logprobs
            if difference := logprob_mismatch(computed, reference, self.info.dtype):
                raise InputError(
                    f"vLLM's hidden states of {self.info.model} and its head do not reproduce vLLM's log-probs (they "
                    f"differ by up to {difference:.2g} nats); leave 'engine.hidden' out, and please report the "
                    "architecture."
                )

    async def _check_padding(self) -> None:
        if self._columns > self._tokens:
            probe = probe_sequence(self.info, _PADDING_PROBE)
            _, ids, logprobs = await self._request_logprobs(probe, self._columns, None)
            by_id = np.full((len(ids), self._columns), -np.inf, np.float32)
            np.put_along_axis(by_id, ids, logprobs, axis=1)
            check_padding(self.info.model, torch.from_numpy(by_id), self._tokens)

    async def check_health(self) -> None:
        if self._engine.errored or (self._pooling is not None and self._pooling.errored):
            raise EngineDied(f"vLLM's process for {self.info.model} has ended.")

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
                "vLLM returns log-probs at temperature 1 only, not "
                f"{', '.join(f'{t:g}' for t in support.temperatures)}; use engine kind 'transformers', or support "
                "'hidden'."
            )

    async def _score_by_logprobs(self, sequence: TokenSequence, support: Support) -> SignalBatch:
        """Return one sequence's signals, computed from vLLM's log-probs of the likeliest and the requested tokens."""
        k = support.k if isinstance(support, TopK | Requested) else 0
        requested = sequence.requested if isinstance(support, Requested) else None
        width = min(k + (0 if requested is None else requested.shape[1]), self.info.vocab_size)
        padding = self._columns - self.info.vocab_size if width else 0
        for spare in sorted({min(_SPARE, padding), padding}):
            targets, ids, logprobs = await self._request_logprobs(sequence, width + spare, requested)
            ids = np.where(ids < self.info.vocab_size, ids, -1)
            if not spare or ((ids[:, -(width + spare) :] >= 0).sum(1) >= width).all():
                break
        if spare or requested is not None:
            ids, logprobs = top_distinct(ids, logprobs, width)
        signal: dict[str, Any] = {"target_logprobs": torch.from_numpy(targets)}
        if not isinstance(support, Logprob):
            signal["ids"], signal["logprobs"] = torch.from_numpy(ids), torch.from_numpy(logprobs)
            signal["log_tails"] = torch.from_numpy(self._log_tails(logprobs))[:, None]
        return SignalBatch(support, torch.tensor([0, len(targets)]), vocab_size=self.info.vocab_size, **signal)

    async def _request_logprobs(
        self, sequence: TokenSequence, width: int, requested: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Request log-probs at the counted tokens: those of the actual tokens [tokens], then ids and log-probs
        [tokens, m + width] of the `requested` ids and the `width` likeliest."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        m = 0 if requested is None else requested.shape[1]
        at = np.flatnonzero(sequence.counted) - 1
        if not len(at):
            return np.zeros(0, np.float32), np.zeros((0, m + width), int), np.zeros((0, m + width), np.float32)
        parameters = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=width, detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        if requested is not None and m:
            rows = np.full((len(sequence) - 1 - at[0], m), -1, np.int32)
            rows[at - at[0]] = requested
            parameters.prompt_logprob_token_ids, parameters.prompt_logprob_start = rows, int(at[0])
        outputs = self._engine.generate(_tokens_prompt(sequence.input_ids), parameters, uuid.uuid4().hex)
        output = await self._last_output(outputs)
        ids, logprobs = (np.concatenate([part[i].numpy() for part in output.prompt_logprobs]) for i in (0, 1))
        # vLLM has returned log-probs of wrong tokens before (its PRs 44106 and 53520).
        if ids.shape != (len(sequence) - 1, width + 1) or (ids[:, 0] != sequence.input_ids[1:]).any():
            raise RuntimeError(
                "vLLM's prompt_logprobs do not belong to the tokens that were sent; leave speculative decoding out of "
                "'engine.arguments', and please report this with vLLM's version."
            )
        ids, logprobs = ids[at].astype(int), logprobs[at].astype(np.float32)
        targets, ids, logprobs = logprobs[:, 0], ids[:, 1:], logprobs[:, 1:]
        if requested is not None and m:
            if (scores := output.prompt_token_id_logprobs) is None:
                raise RuntimeError(
                    "vLLM returned no log-probs of the requested ids, because it preempted the request; lower "
                    "'in_flight'."
                )
            ids = np.concatenate([requested, ids], axis=1)
            logprobs = np.concatenate([scores[at - at[0]], logprobs], axis=1)
        return targets.copy(), ids, logprobs

    def _log_tails(self, logprobs: np.ndarray) -> np.ndarray:
        """Return log(1 − Σ p), float32 [tokens], of `logprobs` [tokens, k]."""
        if logprobs.shape[1] == self._columns:
            return np.full(len(logprobs), -np.inf, np.float32)
        tails = -np.expm1(np.logaddexp.reduce(logprobs.astype(np.float64), axis=1))
        self.floored_tails += int((tails < LEAST_TAIL).sum())
        return np.log(np.maximum(tails, LEAST_TAIL)).astype(np.float32)

    async def _score_hidden(self, sequence: TokenSequence, support: Support) -> SignalBatch:
        """Return one sequence's final hidden states, and the actual tokens' log-probs computed from them."""
        assert isinstance(support, Hidden)
        from vllm import PoolingParams

        at = np.flatnonzero(sequence.counted) - 1
        states = torch.zeros(0, self.info.hidden_size)
        if len(at):
            parameters = PoolingParams(task="token_embed", use_activation=False)
            outputs = self._pooling.encode(_tokens_prompt(sequence.input_ids), parameters, uuid.uuid4().hex)
            states = (await self._last_output(outputs)).outputs.data[at]
        targets = torch.from_numpy(sequence.targets.astype(np.int64))
        logprobs = await asyncio.to_thread(_target_logprobs, self._head, states, targets)
        return SignalBatch(
            support, torch.tensor([0, len(at)]), logprobs, self.info.vocab_size, hidden=states.to(DTYPES[support.dtype])
        )

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


def top_distinct(ids: np.ndarray, logprobs: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the `width` likeliest distinct ids of each row and their log-probs, likeliest first; -1 means no id.

    Args:
        ids, logprobs: [tokens, columns]; each row has at least `width` distinct ids.
    """

    def reorder(order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.take_along_axis(ids, order, axis=1), np.take_along_axis(logprobs, order, axis=1)

    by_id = ids.argsort(axis=1, kind="stable")
    ordered, _ = reorder(by_id)
    is_duplicate = np.zeros(ids.shape, bool)
    np.put_along_axis(is_duplicate, by_id[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    ids, logprobs = reorder((is_duplicate | (ids < 0)).argsort(axis=1, kind="stable")[:, :width])
    return reorder((-logprobs).argsort(axis=1, kind="stable"))


def _tokens_prompt(ids: np.ndarray) -> Any:
    return {"prompt_token_ids": np.asarray(ids).tolist()}


def _target_logprobs(head: Head, states: Tensor, targets: Tensor) -> Tensor:
    """Return log p of `targets` [tokens] under `head` at `states` [tokens, width], float32 [tokens] on the CPU."""
    parts = []
    for chunk, chunk_targets in zip(states.split(_HEAD_ROWS), targets.split(_HEAD_ROWS), strict=True):
        logits = head.logits(chunk.to(head.weight.device, head.weight.dtype))
        parts.append((logits.gather(1, chunk_targets[:, None].to(logits.device))[:, 0] - logits.logsumexp(1)).cpu())
    return torch.cat(parts)
