"""Seeded generation with a transformers model: the same tokens for the same seed, in any batch."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayk.engines.base import GeneratedSequence, SamplingParameters
from rayk.engines.row_groups import generation_groups
from rayk.models.ends import end_token_ids


def generate(
    model, vocab_size: int, tokenizer, prompts: Sequence[np.ndarray], parameters: SamplingParameters,
    seeds: Sequence[int], is_cancelled: Callable[[], bool] = lambda: False,
) -> list[GeneratedSequence]:  # fmt: skip
    """Continue `prompts` (token ids) in one left-padded batch, or in several if the model requires it; see
    `Engine.generate`.

    Args:
        vocab_size: the number of real tokens; the embedding's padding after them is never sampled.
        is_cancelled: called after each token; once it returns true, all rows are truncated there.
    """
    groups = generation_groups(model, [len(prompt) for prompt in prompts], parameters.max_new_tokens)
    generated: dict[int, GeneratedSequence] = {}
    for group in groups:
        group_prompts, group_seeds = [prompts[row] for row in group.rows], [seeds[row] for row in group.rows]
        results = _generate_batch(
            model, vocab_size, tokenizer, group_prompts, parameters, group_seeds, is_cancelled, group.use_cache
        )
        generated |= zip(group.rows, results, strict=True)
    return [generated[row] for row in range(len(prompts))]


def _generate_batch(
    model, vocab_size: int, tokenizer, prompts: Sequence[np.ndarray], parameters: SamplingParameters,
    seeds: Sequence[int], is_cancelled: Callable[[], bool], use_cache: bool,
) -> list[GeneratedSequence]:  # fmt: skip
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.from_numpy(np.asarray(prompt, np.int64))
        mask[row, longest - len(prompt) :] = 1
    model_settings = model.generation_config
    eos_ids = list(parameters.end_token_ids or end_token_ids(model_settings, tokenizer))
    settings = GenerationConfig(
        max_new_tokens=parameters.max_new_tokens, do_sample=False, num_beams=1, eos_token_id=eos_ids or None,
        pad_token_id=eos_ids[0] if eos_ids else 0, use_cache=use_cache,
    )  # fmt: skip
    sampler = _SeededSampler(parameters, seeds, vocab_size)
    stops = _StopStrings(parameters.stop, tokenizer, longest) if parameters.stop else None
    # transformers would add penalties, suppressed tokens and more from the model's own settings.
    model.generation_config = GenerationConfig()
    try:
        output = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=settings,
            logits_processor=LogitsProcessorList([sampler]),
            stopping_criteria=StoppingCriteriaList([_Cancellation(is_cancelled), *([stops] if stops else [])]),
        )[:, longest:].cpu()
    finally:
        model.generation_config = model_settings
    logprobs = torch.stack(sampler.logprobs, dim=1).cpu().numpy()
    generated = []
    for row, (row_ids, row_logprobs) in enumerate(zip(output.numpy(), logprobs, strict=True)):
        ends = (np.flatnonzero(np.isin(row_ids, eos_ids)) + 1)[:1].tolist()  # the batch pads rows that stop early
        if stops and row in stops.lengths:
            ends.append(stops.lengths[row])
        length = min(ends, default=len(row_ids))
        completion = row_ids[:length].astype(np.int32)
        text = tokenizer.decode(completion, skip_special_tokens=True)
        generated.append(
            GeneratedSequence(completion, row_logprobs[:length].astype(np.float32), "stop" if ends else "length", text)
        )
    return generated


class _SeededSampler:
    """Logits processor that samples each row's next token with the row's own random stream.

    Only the sampled token keeps a finite score, so the greedy step of transformers' generation loop selects it;
    caching, stopping and padding remain transformers' own. A row's samples depend on its seed and the step only, not on
    the other rows of its batch.
    """

    def __init__(self, parameters: SamplingParameters, seeds: Sequence[int], vocab_size: int):
        from transformers import TopKLogitsWarper, TopPLogitsWarper

        self._temperature = parameters.temperature
        self._vocab_size = vocab_size
        self._streams = [np.random.Generator(np.random.Philox(seed)) for seed in seeds]
        self._warpers: list[Any] = []
        if parameters.top_k:
            self._warpers.append(TopKLogitsWarper(parameters.top_k))
        if parameters.top_p < 1:
            self._warpers.append(TopPLogitsWarper(parameters.top_p))
        self.logprobs: list[Tensor] = []
        """Per step, float32 [rows], the sampled tokens' log-probs at temperature 1."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # The embedding's padding is never sampled, but counts in the normalizer as in `reduce_logits`.
        logprobs = scores.float().log_softmax(-1)[:, : self._vocab_size]
        if self._temperature == 0:
            chosen = logprobs.argmax(-1, keepdim=True)
        else:
            warped = logprobs / self._temperature
            for warper in self._warpers:
                warped = warper(input_ids, warped)
            cumulative = warped.double().softmax(-1).cumsum(-1)
            # In float64 the product stays below the last cumulative value, so the index is that of a possible token.
            coins = cumulative.new_tensor([[stream.random()] for stream in self._streams])
            chosen = torch.searchsorted(cumulative, coins * cumulative[:, -1:], right=True)
            chosen = chosen.clamp(max=self._vocab_size - 1)
        self.logprobs.append(logprobs.gather(1, chosen)[:, 0])
        return torch.full_like(scores, float("-inf")).scatter(1, chosen, 0.0)


class _StopStrings:
    """Stopping criterion that ends a row once its completion contains one of the stop strings.

    transformers' own criterion also searches the prompt, so a stop string that begins there would end the row.

    Attributes:
        lengths: for each row with a stop string, the number of tokens up to the one that completes it.
    """

    def __init__(self, stops: tuple[str, ...], tokenizer, prompt_length: int):
        self._stops = stops
        self._decode = tokenizer.batch_decode
        self._start = prompt_length
        self._window = 1 + max(len(stop.encode()) for stop in stops)  # a token is at least one byte
        self.lengths: dict[int, int] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor, **_) -> Tensor:
        generated = input_ids.shape[1] - self._start
        texts = self._decode(input_ids[:, -min(generated, self._window) :])
        for row, text in enumerate(texts):
            if row not in self.lengths and any(stop in text for stop in self._stops):
                self.lengths[row] = generated
        return torch.tensor([row in self.lengths for row in range(len(texts))], device=input_ids.device)


class _Cancellation:
    """Stopping criterion that ends all rows once the requests are cancelled."""

    def __init__(self, is_cancelled: Callable[[], bool]):
        self._is_cancelled = is_cancelled

    def __call__(self, input_ids: Tensor, scores: Tensor, **_) -> Tensor:
        return torch.full((len(input_ids),), self._is_cancelled(), device=input_ids.device)
