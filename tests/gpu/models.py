"""The transformers engine: signals against dense logits, and generation."""

import asyncio
import tempfile

import numpy as np
import torch

from rayk.config.engines import TransformersEngineConfig
from rayk.config.support import Hidden, Logprob, TopK
from rayk.engines.base import GeneratedSequence, SamplingParameters
from rayk.engines.transformers import TransformersEngine
from rayk.signals.batch import SignalBatch
from rayk.signals.sequence import TokenSequence
from tests.gpu.scale import Scale, ensure, relative
from tests.tiny import tiny_tokenizer

SUPPORTS = (TopK(4), Logprob(), Hidden(dtype="float32"))


def engine(scale: Scale, folder: str, dtype: str = "float32") -> TransformersEngine:
    model = scale.model()
    model.set_attn_implementation("sdpa")
    model.save_pretrained(folder)
    tiny_tokenizer(folder)
    return TransformersEngine(folder, TransformersEngineConfig(dtype=dtype, device=scale.device))


def rows(scale: Scale) -> list[TokenSequence]:
    random = np.random.default_rng(0)
    return [
        TokenSequence(random.integers(4, 340, length).astype(np.int32), np.arange(length) >= 3)
        for length in (9, 40, 21)
    ]


def engine_scores_as_dense_logits(scale: Scale) -> str:
    with tempfile.TemporaryDirectory() as folder:
        teacher, sequences = engine(scale, folder), rows(scale)
        model, worst = scale.model().double(), []

        async def score_all() -> list[SignalBatch]:
            return [await teacher.score(sequences, support) for support in SUPPORTS]

        for signals in asyncio.run(score_all()):
            expected = []
            for row in sequences:
                ids = torch.tensor(row.input_ids, device=scale.device).long()[None]
                with torch.no_grad():
                    # The engine's distribution is over the tokenizer's tokens and a rest.
                    log_p = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
                targets = log_p[:-1].gather(1, ids[0, 1:, None])[:, 0]
                expected.append(targets[torch.tensor(row.counted[1:], device=scale.device)])
            worst.append(relative(signals.target_logprobs, torch.cat(expected).cpu()))
    return ensure(max(worst), 5e-3, "difference of the actual tokens' log-probs")


def engine_generates(scale: Scale) -> str:
    with tempfile.TemporaryDirectory() as folder:
        teacher = engine(scale, folder, "bfloat16")
        sampling = SamplingParameters(max_new_tokens=8, temperature=1.0)
        prompts = [row.input_ids for row in rows(scale)]

        async def generate_twice() -> list[list[GeneratedSequence]]:
            return [await teacher.generate(prompts, sampling, [1, 2, 3]) for _ in range(2)]

        first, again = asyncio.run(generate_twice())
    tokens = [len(answer.token_ids) for answer in first]
    assert all(1 <= count <= 8 for count in tokens)
    assert all((one.token_ids == other.token_ids).all() for one, other in zip(first, again, strict=True))
    assert all(np.isfinite(answer.logprobs).all() for answer in first)
    return f"{sum(tokens)} tokens, the same twice"


CHECKS = [engine_scores_as_dense_logits, engine_generates]
