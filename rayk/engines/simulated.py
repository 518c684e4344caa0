"""The simulated engine: it returns signals of the real size after the time that a real teacher would take.

It loads a tokenizer and a model configuration but no weights, and computes almost nothing, so one machine can simulate
a cluster: the number of replicas that a student requires, the network traffic, autoscaling. Its signals are valid but
carry no information.
"""

import asyncio
from collections.abc import Sequence

import numpy as np
import torch

from rayk.config import SimulatedEngineConfig
from rayk.config.support import Logprob, Support, TopK
from rayk.engines.base import EngineInfo, GeneratedSequence, Prompt, SamplingParameters
from rayk.engines.checks import check_request, tokenize_prompts
from rayk.errors import InputError
from rayk.models import Head, load_model_config, load_tokenizer, max_positions, real_vocab_size, tokenizer_fingerprint
from rayk.signals.batch import SignalBatch
from rayk.signals.sequence import TokenSequence


class SimulatedEngine:
    """Implements `rayk.engines.base.Engine`. It computes one request at a time, at the given tokens per second; the
    simulated network latencies of concurrent requests overlap."""

    def __init__(
        self, model: str, settings: SimulatedEngineConfig, *, trust_remote_code: bool = False,
        vocab_size: int | None = None,
    ):  # fmt: skip
        self.settings = settings
        self.tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
        architecture = load_model_config(model, trust_remote_code=trust_remote_code).get_text_config()
        self.info = EngineInfo(
            model=model,
            vocab_size=min(
                vocab_size or architecture.vocab_size, architecture.vocab_size, real_vocab_size(self.tokenizer)
            ),
            max_tokens=max_positions(architecture),
            tokenizer_fingerprint=tokenizer_fingerprint(self.tokenizer),
            dtype="none",
            device="none",
            supports=("topk", "logprob"),
            engine="simulated",
        )
        self._computing = asyncio.Lock()

    async def score(self, sequences: Sequence[TokenSequence], support: Support) -> SignalBatch:
        check_request(self.info, sequences, support)
        await self._wait(sum(map(len, sequences)) / self.settings.tokens_per_second)
        counts = torch.tensor([sequence.counted_tokens for sequence in sequences])
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
        tokens = int(offsets[-1])
        logprobs = torch.full((tokens,), -2.0)
        if isinstance(support, Logprob):
            return SignalBatch(support, offsets, logprobs, self.info.vocab_size)
        assert isinstance(support, TopK)
        first = torch.arange(tokens)[:, None] * 7919  # different ids at every position, as from a real teacher
        ids = (first + torch.arange(support.k)) % self.info.vocab_size
        # A geometric distribution: each token gets half of the remaining probability.
        ladder = -(torch.arange(support.k) + 1.0) * float(np.log(2))
        tails = torch.full((tokens, len(support.temperatures)), float(ladder[-1]))
        return SignalBatch(support, offsets, logprobs, self.info.vocab_size, ids, ladder.expand(tokens, -1), tails)

    async def generate(
        self, prompts: Sequence[Prompt], parameters: SamplingParameters, seeds: Sequence[int]
    ) -> list[GeneratedSequence]:
        rows = tokenize_prompts(self.info, self.tokenizer, prompts, parameters)
        length = parameters.max_new_tokens
        await self._wait(length * len(rows) / self.settings.generated_tokens_per_second)
        ids = [np.random.default_rng(seed).integers(0, self.info.vocab_size, length, np.int32) for seed in seeds]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        logprobs = np.full(length, -2.0, np.float32)
        return [GeneratedSequence(row, logprobs, "length", text) for row, text in zip(ids, texts, strict=True)]

    def head(self) -> Head:
        raise InputError("engine kind 'simulated' has no weights, so it returns no hidden states; use 'topk'.")

    async def warm_up(self) -> None:
        await asyncio.sleep(self.settings.start_seconds)

    async def check_health(self) -> None:
        """Do nothing, because this engine cannot fail."""

    async def _wait(self, seconds: float) -> None:
        await asyncio.sleep(self.settings.latency_seconds)
        async with self._computing:
            await asyncio.sleep(seconds)
