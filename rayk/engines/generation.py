"""Seeded generation with a transformers model: the same tokens for the same seed, in any batch.

A model whose rows can join and leave a batch (`can_continue`) generates in a loop of this module: rows that have ended
leave the batch, and keys and values stay where they are. Other models generate in transformers' loop.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from rayk.engines.base import GeneratedSequence, SamplingParameters
from rayk.engines.row_groups import generation_groups
from rayk.engines.sampling import SeededSampler
from rayk.models import CausalLM
from rayk.models.ends import end_token_ids
from rayk.models.head import get_decoding_head
from rayk.models.kv_cache import CachedBatch, KeyValues, can_continue


@torch.no_grad()
def generate(
    model: CausalLM, vocab_size: int, tokenizer, prompts: Sequence[np.ndarray], parameters: SamplingParameters,
    seeds: Sequence[int], is_cancelled: Callable[[], bool] = lambda: False,
) -> list[GeneratedSequence]:  # fmt: skip
    """Continue `prompts` (token ids) in one batch, or in several if the model requires it; see `Engine.generate`.

    Args:
        vocab_size: the number of real tokens; the embedding's padding after them is never sampled.
        is_cancelled: called after each token; once it returns true, all rows are truncated there.
    """
    end_ids = tuple(parameters.end_token_ids or end_token_ids(model.generation_config, tokenizer))
    rows_leave = can_continue(model)
    generated: dict[int, _Completion] = {}
    for group in generation_groups(model, [len(prompt) for prompt in prompts], parameters.max_new_tokens):
        rows = group.rows
        sampler = SeededSampler(parameters, [seeds[row] for row in rows], vocab_size)
        ends = _Ends(end_ids, parameters, tokenizer, is_cancelled)
        group_prompts = [prompts[row] for row in rows]
        if rows_leave:
            completions = _generate(model, group_prompts, sampler, ends)
        else:
            completions = _generate_with_transformers(model, group_prompts, sampler, ends, group.use_cache)
        generated |= zip(rows, completions, strict=True)
    return [generated[row].finish(tokenizer) for row in range(len(prompts))]


@dataclass
class _Completion:
    """The tokens of a row so far.

    Attributes:
        logprobs: log-probs of the tokens at temperature 1, nats.
        reason: why it ended; "length" while it has not.
    """

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    reason: str = "length"

    def finish(self, tokenizer) -> GeneratedSequence:
        ids = np.array(self.ids, np.int32)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        return GeneratedSequence(ids, np.array(self.logprobs, np.float32), self.reason, text)


class _Ends:
    """Decides after each token which rows have ended: by an end token, a stop string, the longest length, or because
    the requests are cancelled."""

    def __init__(
        self, end_ids: tuple[int, ...], parameters: SamplingParameters, tokenizer, is_cancelled: Callable[[], bool]
    ):
        self.end_ids = end_ids
        self.max_new_tokens = parameters.max_new_tokens
        self._stops = parameters.stop
        self._decode = tokenizer.batch_decode
        self._window = 1 + max((len(stop.encode()) for stop in self._stops), default=0)  # a token has at least one byte
        self._is_cancelled = is_cancelled

    def add(self, rows: Sequence[_Completion], ids: Sequence[int], logprobs: Sequence[float]) -> list[bool]:
        """Append each row's next token; return whether each row has ended."""
        for row, token, logprob in zip(rows, ids, logprobs, strict=True):
            row.ids.append(token)
            row.logprobs.append(logprob)
        # transformers' criterion also searches the prompt, so a stop string that begins there would end the row.
        texts = self._decode([row.ids[-self._window :] for row in rows]) if self._stops else [""] * len(rows)
        for row, text in zip(rows, texts, strict=True):
            if row.ids[-1] in self.end_ids or any(stop in text for stop in self._stops):
                row.reason = "stop"
        is_last = len(rows[0].ids) >= self.max_new_tokens or self._is_cancelled()
        return [is_last or row.reason == "stop" for row in rows]


def _generate(model: CausalLM, prompts: Sequence[np.ndarray], sampler: SeededSampler, ends: _Ends) -> list[_Completion]:
    """Generate in one batch, which a row leaves when it has ended."""
    completions = [_Completion() for _ in prompts]
    head = get_decoding_head(model)
    active = completions
    counts = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    batch = CachedBatch(model, [KeyValues()] * len(prompts))
    hidden = batch.forward(_padded(prompts, model.device), counts)
    hidden = hidden[torch.arange(len(prompts), device=hidden.device), counts.to(hidden.device) - 1]
    pasts: list[KeyValues] | None = batch.key_values()  # the prompts' padding must leave the batch
    while True:
        ids, logprobs = sampler.sample(head.logits(hidden))
        ended = ends.add(active, ids.tolist(), logprobs.tolist())
        if all(ended):
            return completions
        rows = [row for row, has_ended in enumerate(ended) if not has_ended]
        if pasts is None and len(rows) < len(active):
            pasts = batch.key_values()
        if pasts is not None:
            batch = CachedBatch(model, [pasts[row] for row in rows], room=ends.max_new_tokens - len(active[0].ids))
            pasts = None
            active, ids = [active[row] for row in rows], ids[rows]
            sampler.keep(rows)
        hidden = batch.forward(ids[:, None].to(model.device))[:, 0]


def _padded(prompts: Sequence[np.ndarray], device: torch.device, *, left: bool = False) -> Tensor:
    """Stack token ids to int64 [rows, longest], with zeros after them, or before them if `left`."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        start = longest - len(prompt) if left else 0
        ids[row, start : start + len(prompt)] = torch.from_numpy(np.asarray(prompt, np.int64))
    return ids.to(device)


def _generate_with_transformers(
    model: CausalLM, prompts: Sequence[np.ndarray], sampler: SeededSampler, ends: _Ends, use_cache: bool
) -> list[_Completion]:
    """Generate in transformers' loop, in one left-padded batch that keeps all rows until the last one has ended."""
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    ids = _padded(prompts, model.device, left=True)
    mask = _padded([np.ones(len(prompt)) for prompt in prompts], model.device, left=True)
    settings = GenerationConfig(
        max_new_tokens=ends.max_new_tokens, do_sample=False, num_beams=1, pad_token_id=0, use_cache=use_cache
    )
    processor = _SamplingProcessor(sampler, ends, len(prompts))
    model_settings = model.generation_config
    # transformers would add penalties, suppressed tokens and more from the model's own settings.
    model.generation_config = GenerationConfig()
    try:
        model.generate(
            ids, attention_mask=mask, generation_config=settings, logits_processor=LogitsProcessorList([processor]),
            stopping_criteria=StoppingCriteriaList([processor.has_ended]),
        )  # fmt: skip
    finally:
        model.generation_config = model_settings
    return processor.completions


class _SamplingProcessor:
    """Logits processor that samples each row's next token.

    Only the sampled token keeps a finite score, so the greedy step of transformers' generation loop selects it; caching
    remains transformers' own.
    """

    def __init__(self, sampler: SeededSampler, ends: _Ends, rows: int):
        self._sampler = sampler
        self._ends = ends
        self._ended = [False] * rows
        self.completions = [_Completion() for _ in range(rows)]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        ids, logprobs = self._sampler.sample(scores)
        rows = [row for row, ended in enumerate(self._ended) if not ended]
        ended = self._ends.add([self.completions[row] for row in rows], ids[rows].tolist(), logprobs[rows].tolist())
        for row, has_ended in zip(rows, ended, strict=True):
            self._ended[row] = has_ended
        return torch.full_like(scores, float("-inf")).scatter(1, ids[:, None], 0.0)

    def has_ended(self, input_ids: Tensor, scores: Tensor, **_) -> Tensor:
        """Stopping criterion: return whether each row has ended, bool [rows]."""
        return torch.tensor(self._ended, device=input_ids.device)
