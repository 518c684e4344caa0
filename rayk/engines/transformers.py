"""The transformers engine: any causal LM that `AutoModelForCausalLM` loads, in this process.

To score sequences, the body runs on whole sequences, but the head only at counted tokens and on a limited number of
them at a time, so the logits of a whole batch are never in memory together.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rayk.config import TransformersEngineConfig
from rayk.config.support import Hidden, Support, TopK
from rayk.engines.base import EngineInfo, GeneratedSequence, Prompt, SamplingParameters
from rayk.engines.batching import MicroBatcher
from rayk.engines.checks import (
    check_drafts,
    check_padding,
    check_request,
    generated_ids,
    probe_sequence,
    tokenize_prompts,
)
from rayk.engines.generation import generate
from rayk.engines.reduce import reduce_logits, stack_position_inputs
from rayk.engines.speculative import Draft, Verdict
from rayk.engines.verification import Verifier
from rayk.models import (
    DTYPES,
    Head,
    final_hidden,
    get_head,
    load_model,
    load_tokenizer,
    max_positions,
    pick_device,
    real_vocab_size,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from rayk.signals.batch import SignalBatch, concatenate
from rayk.signals.sequence import TokenSequence

LOGITS_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}
"""Memory for the logits that are computed at the same time, by kind of device."""
_PREFIX_CACHE_BYTES = {"cpu": 1 << 30, "cuda": 4 << 30}


class TransformersEngine:
    """Implements `rayk.engines.base.VerifyingEngine`."""

    def __init__(
        self, model: str, settings: TransformersEngineConfig | None = None, *, trust_remote_code: bool = False,
        vocab_size: int | None = None,
    ):  # fmt: skip
        """
        Args:
            vocab_size: number of leading ids that signals are over; None: all real tokens.
        """
        settings = settings or TransformersEngineConfig()
        self.device = pick_device(settings.device)
        self.tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
        self.model = load_model(
            model, dtype=settings.dtype, device=self.device, trust_remote_code=trust_remote_code
        ).requires_grad_(False)
        self._head = get_head(self.model)
        self._tokens = min(self._head.vocab_size, real_vocab_size(self.tokenizer))
        self._fatal: Exception | None = None
        self._batcher = MicroBatcher(self._run, settings.batch_tokens)
        self.info = EngineInfo(
            model=model,
            vocab_size=min(self._tokens, vocab_size or self._tokens),
            max_tokens=max_positions(self.model.config),
            tokenizer_fingerprint=tokenizer_fingerprint(self.tokenizer),
            dtype=str(self.model.dtype).removeprefix("torch."),
            device=self.device,
            supports=("topk", "requested", "sampled", "hidden", "logprob"),
            hidden_size=self._head.weight.shape[1],
            weights_fingerprint=weights_fingerprint(model, getattr(self.model.config, "_commit_hash", None)),
            can_verify=True,
        )
        self._verifier = Verifier(
            self.model, self._head, self.info.vocab_size,
            chunk=self._chunk, cache_bytes=_PREFIX_CACHE_BYTES["cpu" if self.device == "cpu" else "cuda"],
        )  # fmt: skip

    async def score(self, sequences: Sequence[TokenSequence], support: Support) -> SignalBatch:
        check_request(self.info, sequences, support)
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
        await asyncio.to_thread(self._check_padding)

    async def check_health(self) -> None:
        if self._fatal is not None:
            raise RuntimeError(f"The device failed: {self._fatal}")

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

    @torch.inference_mode()
    def _check_padding(self) -> None:
        if self._head.vocab_size > self._tokens:
            ids = torch.from_numpy(probe_sequence(self.info).input_ids.astype(np.int64))[None].to(self.model.device)
            logits = self._head.logits(final_hidden(self.model, ids, torch.ones_like(ids))[0])
            check_padding(self.info.model, logits.log_softmax(1), self._tokens)

    @property
    def _chunk(self) -> int:
        """Number of positions whose logits are in memory at the same time."""
        return max(16, LOGITS_BYTES["cpu" if self.device == "cpu" else "cuda"] // (4 * self._head.vocab_size))

    def _score(self, sequences: list[TokenSequence], support: Support) -> SignalBatch:
        longest = max(map(len, sequences))
        ids = torch.zeros(len(sequences), longest, dtype=torch.long)
        counted = torch.zeros(len(sequences), longest, dtype=torch.bool)
        mask = torch.zeros(len(sequences), longest, dtype=torch.long)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.from_numpy(sequence.input_ids.astype(np.int64))
            counted[row, : len(sequence)] = torch.from_numpy(np.array(sequence.counted))
            mask[row, : len(sequence)] = 1
        device = self.model.device
        hidden = final_hidden(self.model, ids.to(device), mask.to(device))
        rows, columns = counted.nonzero(as_tuple=True)
        hidden = hidden[rows.to(device), columns.to(device) - 1]
        targets = ids[rows, columns].to(device)
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
        if isinstance(support, Hidden):
            signal["hidden"] = hidden.to(DTYPES[support.dtype]).cpu()
        return SignalBatch(support, offsets, vocab_size=self.info.vocab_size, **signal)
