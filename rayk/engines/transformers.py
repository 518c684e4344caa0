"""The transformers engine: any causal LM that `AutoModelForCausalLM` loads, in this process.

To score sequences, the body runs on whole sequences, but the head only at counted tokens and on a limited number of
them at a time, so the logits of a whole batch are never in memory together.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayk.config import TransformersEngineConfig
from rayk.config.support import Layers, Support, TopK, final_dtype
from rayk.engines.base import EngineInfo, GeneratedSequence, Prompt, SamplingParameters
from rayk.engines.batching import MicroBatcher
from rayk.engines.checks import (
    check_drafts,
    check_request,
    generated_ids,
    tokenize_prompts,
)
from rayk.engines.generation import generate
from rayk.engines.padding import check_padding
from rayk.engines.reduce import logits_rows, reduce_logits, stack_position_inputs
from rayk.engines.speculative import Draft, Verdict
from rayk.engines.verification import Verifier
from rayk.models import (
    DTYPES,
    CausalLM,
    Head,
    get_head,
    load_model,
    load_tokenizer,
    max_positions,
    pick_device,
    real_vocab_size,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from rayk.models.body import get_body
from rayk.models.layer_states import attention_widths, layer_numbers, layer_states
from rayk.signals.batch import SignalBatch, concatenate
from rayk.signals.layer_states import compress_states
from rayk.signals.sequence import TokenSequence

_PREFIX_CACHE_BYTES = {"cpu": 1 << 30, "cuda": 4 << 30}


class TransformersEngine:
    """Implements `rayk.engines.base.VerifyingEngine`."""

    def __init__(
        self, model: str, settings: TransformersEngineConfig | None = None, *, trust_remote_code: bool = False,
        vocab_size: int | None = None, loaded: tuple[CausalLM, Any] | None = None,
    ):  # fmt: skip
        """
        Args:
            vocab_size: number of leading ids that signals are over; None: all real tokens.
            loaded: a model, on its device and in its type, and its tokenizer, instead of those of the folder or hub id
                `model`, which is then only a name. Its weights may be replaced while the engine computes nothing.
        """
        settings = settings or TransformersEngineConfig()
        self.device = pick_device(settings.device)
        if loaded is not None:
            self.model, self.tokenizer = loaded
        else:
            self.tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
            self.model = load_model(
                model, dtype=settings.dtype, device=self.device, trust_remote_code=trust_remote_code,
                device_map=settings.device_map,
            ).requires_grad_(False)  # fmt: skip
        self._head = get_head(self.model)
        self._tokens = min(self._head.vocab_size, real_vocab_size(self.tokenizer))
        self._fatal: Exception | None = None
        self._stall_seconds = settings.stall_seconds
        self._batcher = MicroBatcher(self._run, settings.batch_tokens)
        get_body(self.model).register_forward_pre_hook(lambda *_: self._batcher.note_progress())
        self.info = EngineInfo(
            model=model,
            vocab_size=min(self._tokens, vocab_size or self._tokens),
            max_tokens=max_positions(self.model.config),
            tokenizer_fingerprint=tokenizer_fingerprint(self.tokenizer),
            dtype=str(self.model.dtype).removeprefix("torch."),
            device=self.device,
            supports=("topk", "requested", "sampled", "hidden", "logprob", "layers"),
            hidden_size=self._head.weight.shape[1],
            attention_widths=attention_widths(self.model.config),
            # A loaded model's weights may change, which keys of caches and of attention caches do not know.
            weights_fingerprint=""
            if loaded
            else weights_fingerprint(model, getattr(self.model.config, "_commit_hash", None)),
            can_verify=loaded is None,
        )
        self._verifier = Verifier(
            self.model, self._head, self.info.vocab_size,
            chunk=self._chunk, cache_bytes=_PREFIX_CACHE_BYTES["cpu" if self.device == "cpu" else "cuda"],
        )  # fmt: skip

    async def score(self, sequences: Sequence[TokenSequence], support: Support) -> SignalBatch:
        check_request(self.info, sequences, support)
        self._layer_numbers(support)  # raises before the request joins others in a batch
        results = await self._batcher.submit(("score", support, 0), sequences, [len(s) for s in sequences])
        batches = list({id(batch): batch for batch, _ in results}.values())
        starts = dict(zip(map(id, batches), np.cumsum([0, *map(len, batches)]), strict=False))
        return concatenate(batches).select([starts[id(batch)] + row for batch, row in results])

    async def generate(
        self, prompts: Sequence[Prompt], parameters: SamplingParameters, seeds: Sequence[int]
    ) -> list[GeneratedSequence]:
        rows = tokenize_prompts(self.info, self.tokenizer, prompts, parameters, self._tokens)
        lengths = [len(row) + parameters.max_new_tokens for row in rows]
        limit = generated_ids(self.info, prompts, self._tokens)
        return await self._batcher.submit(("generate", parameters, limit), list(zip(rows, seeds, strict=True)), lengths)

    async def verify(self, drafts: Sequence[Draft]) -> list[Verdict]:
        check_drafts(self.info, drafts)
        return await self._batcher.submit(("verify", None, 0), drafts, [len(draft) for draft in drafts])

    async def warm_up(self) -> None:
        length = min(64, self.info.max_tokens)
        await self.score([TokenSequence(np.zeros(length, np.int32), np.arange(length) > 0)], TopK(1))
        await asyncio.to_thread(check_padding, self.model, self.tokenizer, self.info.model)

    async def check_health(self) -> None:
        if self._fatal is not None:
            raise RuntimeError(f"The device failed: {self._fatal}")
        if (stalled := self._batcher.stalled_seconds) > self._stall_seconds:
            raise RuntimeError(f"The model has computed one forward pass for {stalled:.0f} s.")

    def head(self) -> Head:
        return self._head

    @torch.inference_mode()
    def _run(self, key, items: list) -> list:
        kind, parameters, limit = key
        try:
            if kind == "generate":
                prompts, seeds = zip(*items, strict=True)
                return generate(self.model, limit, self.tokenizer, prompts, parameters, seeds)
            if kind == "verify":
                return self._verifier.verify(items)
            signals = self._score(items, parameters)
        except torch.AcceleratorError as error:
            self._fatal = error  # a CUDA context does not recover; the failed health check replaces the replica
            raise
        return [(signals, row) for row in range(len(items))]

    @property
    def _chunk(self) -> int:
        """Number of positions whose logits are in memory at the same time."""
        return logits_rows(self.device, self._head.vocab_size)

    def _layer_numbers(self, support: Support) -> list[int]:
        """Return the numbers of the layers whose states a signal of this support contains; none for other supports.

        Raises:
            InputError: the model lacks one.
        """
        return layer_numbers(support.layers, self.model.config, self.info.model) if isinstance(support, Layers) else []

    def _counted_states(self, ids: Tensor, mask: Tensor, counted: Tensor, support: Support) -> list[Tensor]:
        """Return the final hidden states that predict the counted tokens, and those of the support's layers, [tokens,
        width] each, on the device of the head."""
        device = self._head.weight.device
        rows, columns = (place.to(device) for place in counted.nonzero(as_tuple=True))
        final, states = layer_states(
            self.model, ids.to(self.model.device), mask.to(self.model.device), self._layer_numbers(support),
            support.part if isinstance(support, Layers) else "output",
        )  # fmt: skip
        return [each.to(device)[rows, columns - 1] for each in (final, *states)]

    def _score(self, sequences: list[TokenSequence], support: Support) -> SignalBatch:
        longest = max(map(len, sequences))
        ids = torch.zeros(len(sequences), longest, dtype=torch.long)
        counted = torch.zeros(len(sequences), longest, dtype=torch.bool)
        mask = torch.zeros(len(sequences), longest, dtype=torch.long)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.from_numpy(sequence.input_ids.astype(np.int64))
            counted[row, : len(sequence)] = torch.from_numpy(np.array(sequence.counted))
            mask[row, : len(sequence)] = 1
        hidden, *layers = self._counted_states(ids, mask, counted, support)
        device = self._head.weight.device
        targets = ids[counted].to(device)
        inputs = stack_position_inputs(sequences, support)
        inputs = None if inputs is None else inputs.to(device)
        parts = []
        for start in range(0, max(1, len(hidden)), self._chunk):
            at = slice(start, start + self._chunk)
            logits = self._head.logits(hidden[at])
            chunk_inputs = None if inputs is None else inputs[at]
            parts.append(reduce_logits(logits, targets[at], support, self.info.vocab_size, chunk_inputs))
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), counted.sum(1).cumsum(0)])
        signal: dict[str, Any] = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
        if (dtype := final_dtype(support)) is not None:
            signal["hidden"] = hidden.to(DTYPES[dtype]).cpu()
        if isinstance(support, Layers):
            stored, scales = compress_states(torch.stack(layers, dim=1), support.dtype)
            signal |= {"layers": stored.cpu(), "layer_scales": None if scales is None else scales.cpu()}
        return SignalBatch(support, offsets, vocab_size=self.info.vocab_size, **signal)
