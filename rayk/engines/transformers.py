"""The transformers engine: any causal LM that `AutoModelForCausalLM` loads, scoring and generating in this process.

Scoring runs the body over whole sequences but the head only where a position counts, a chunk of positions at a time,
so no [positions, vocab] block of a batch is ever whole.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayk.config import TransformersEngineConfig
from rayk.config.support import Hidden, Requested, Sampled, Support, TopK
from rayk.engines.base import EngineInfo, GeneratedSequence, Prompt, SamplingParameters
from rayk.engines.batching import MicroBatcher
from rayk.engines.checks import check_drafts, check_request, tokenize_prompts
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
from rayk.signals.batch import SignalBatch, concatenate, fill_distinct
from rayk.signals.sequence import TokenSequence

_CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}
_VERIFIED_BYTES = {"cpu": 1 << 30, "cuda": 4 << 30}  # for keys and values of sequences being drafted


class TransformersEngine:
    """See `rayk.engines.base.Engine`."""

    def __init__(
        self, model: str, settings: TransformersEngineConfig | None = None, *, trust_remote_code: bool = False
    ):
        settings = settings or TransformersEngineConfig()
        self.device = pick_device(settings.device)
        self.tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
        self.model = load_model(
            model, dtype=settings.dtype, device=self.device, trust_remote_code=trust_remote_code
        ).requires_grad_(False)
        self._head = get_head(self.model)
        self._fatal: Exception | None = None
        self._batcher = MicroBatcher(self._run, settings.batch_tokens)
        self.info = EngineInfo(
            model=model,
            vocab_size=min(self._head.vocab_size, real_vocab_size(self.tokenizer)),
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
            chunk=self._chunk, cache_bytes=_VERIFIED_BYTES["cpu" if self.device == "cpu" else "cuda"],
        )  # fmt: skip

    async def score(self, sequences: Sequence[TokenSequence], support: Support) -> SignalBatch:
        check_request(self.info, sequences, support)
        results = await self._batcher.submit(("score", support), sequences, [len(s) for s in sequences])
        batches = list({id(batch): batch for batch, _ in results}.values())
        starts = dict(zip(map(id, batches), np.cumsum([0, *map(len, batches)]), strict=False))
        return concatenate(batches).select([starts[id(batch)] + row for batch, row in results])

    async def generate(
        self, prompts: Sequence[Prompt], parameters: SamplingParameters, seeds: Sequence[int]
    ) -> list[GeneratedSequence]:
        rows = tokenize_prompts(self.info, self.tokenizer, prompts, parameters)
        lengths = [len(row) + parameters.max_new_tokens for row in rows]
        return await self._batcher.submit(("generate", parameters), list(zip(rows, seeds, strict=True)), lengths)

    async def verify(self, drafts: Sequence[Draft]) -> list[Verdict]:
        check_drafts(self.info, drafts)
        return await self._batcher.submit(("verify", None), drafts, [len(draft) for draft in drafts])

    async def warm_up(self) -> None:
        length = min(64, self.info.max_tokens)
        await self.score([TokenSequence(np.zeros(length, np.int32), np.arange(length) > 0)], TopK(1))

    async def check_health(self) -> None:
        if self._fatal is not None:
            raise RuntimeError(f"The device failed: {self._fatal}")

    @torch.inference_mode()
    def _run(self, key, items: list) -> list:
        kind, parameters = key
        try:
            if kind == "generate":
                prompts, seeds = zip(*items, strict=True)
                return generate(self.model, self.info.vocab_size, self.tokenizer, prompts, parameters, seeds)
            if kind == "verify":
                return self._verifier.verify(items)
            signals = self._score(items, parameters)
        except torch.AcceleratorError as error:
            self._fatal = error  # a CUDA context does not recover: the health check has the replica replaced
            raise
        return [(signals, row) for row in range(len(items))]

    def head(self) -> Head:
        return self._head

    @property
    def _chunk(self) -> int:
        """For how many positions at a time there are logits."""
        return max(16, _CHUNK_BYTES["cpu" if self.device == "cpu" else "cuda"] // (4 * self._head.vocab_size))

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
        asked = None if (own := _asked(sequences, support)) is None else own.to(device)
        parts = []
        for start in range(0, max(1, len(hidden)), self._chunk):
            at = slice(start, start + self._chunk)
            logits = self._head.logits(hidden[at])
            parts.append(
                reduce_logits(logits, targets[at], support, self.info.vocab_size, None if asked is None else asked[at])
            )
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), counted.sum(1).cumsum(0)])
        found: dict[str, Any] = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
        if isinstance(support, Hidden):
            found["hidden"] = hidden.to(DTYPES[support.dtype]).cpu()
        return SignalBatch(support, offsets, vocab_size=self.info.vocab_size, **found)


def _asked(sequences: list[TokenSequence], support: Support) -> Tensor | None:
    """What is asked of each counted position: its requested ids, int64 [tokens, m], or its coins, [tokens, draws]."""
    if isinstance(support, Requested):
        return torch.from_numpy(np.concatenate([s.requested for s in sequences if s.requested is not None]).astype(int))
    if isinstance(support, Sampled):
        return torch.from_numpy(np.concatenate([_coins(sequence, support) for sequence in sequences]))
    return None


def _coins(sequence: TokenSequence, support: Sampled) -> np.ndarray:
    """Uniform numbers [counted tokens, draws] that follow from the seed and the sequence alone."""
    own = hashlib.blake2b(sequence.input_ids.astype("<i4").tobytes() + np.packbits(sequence.counted).tobytes())
    stream = np.random.Philox(np.random.SeedSequence([support.seed, int.from_bytes(own.digest()[:8], "little")]))
    return np.random.Generator(stream).random((sequence.counted_tokens, support.draws))


def reduce_logits(
    logits: Tensor, targets: Tensor, support: Support, vocab_size: int, asked: Tensor | None = None
) -> dict[str, Tensor]:
    """What `support` keeps of float32 logits [tokens, columns], which are overwritten: columns of a `SignalBatch`.

    Only the first `vocab_size` columns are tokens, and only they are named. The rest is the embedding's padding: it
    counts in the normaliser and the tail, as it does in a student of the same padding.

    Args:
        asked: for `requested` the ids, int64 [tokens, m], -1 for none; for `sampled` uniform numbers [tokens, draws].
    """
    target_logits = logits.gather(1, targets[:, None])[:, 0]
    real = logits[:, :vocab_size]
    if isinstance(support, TopK):
        ids = real.topk(support.k).indices
    elif isinstance(support, Requested):
        assert asked is not None
        likeliest = real.argmax(1, keepdim=True)
        named = torch.where(asked < 0, likeliest, asked)
        width = min(support.k + asked.shape[1], vocab_size)
        ids = real.scatter(1, named, float("inf")).topk(width).indices
        ids = ids.gather(1, real.gather(1, ids).argsort(dim=1, descending=True))
    else:
        normaliser = logits.logsumexp(1)
        columns = {"target_logprobs": target_logits - normaliser}
        if isinstance(support, Sampled):
            assert asked is not None
            columns |= _drawn(logits, normaliser, support, vocab_size, asked)
        return columns
    values = logits.gather(1, ids)
    unselected = logits.scatter_(1, ids, float("-inf"))
    tail = unselected.logsumexp(1)
    normaliser = torch.logaddexp(values.logsumexp(1), tail)
    tails = [(tail if t == 1.0 else (unselected / t).logsumexp(1)) - normaliser / t for t in support.temperatures]
    return {
        "target_logprobs": target_logits - normaliser,
        "ids": ids,
        "logprobs": values - normaliser[:, None],
        "log_tails": torch.stack(tails, dim=1),
    }


def _drawn(logits: Tensor, normaliser: Tensor, support: Sampled, vocab_size: int, coins: Tensor) -> dict[str, Tensor]:
    """Different ids among the draws from p^τ, their weights (count/draws · p/proposal), and the entropy of p.

    p and the proposal are those among the real tokens, so padding is never drawn.
    """
    logprobs = logits - normaliser[:, None]
    entropies = -torch.where(logprobs.isneginf(), 0.0, logprobs.exp() * logprobs).sum(1)
    real = logprobs[:, :vocab_size].double()
    proposal = (support.tau * real).log_softmax(1)
    cumulative = proposal.exp().cumsum(1)
    draws = torch.searchsorted(cumulative, coins * cumulative[:, -1:], right=True).clamp(max=vocab_size - 1)
    draws = draws.sort(1).values
    group = torch.cat([torch.zeros_like(draws[:, :1]), (draws[:, 1:] != draws[:, :-1]).long()], dim=1).cumsum(1)
    counts = torch.zeros_like(draws).scatter_add_(1, group, torch.ones_like(draws))
    ids = torch.zeros_like(draws).scatter_(1, group, draws)
    weights = counts.double() / support.draws
    if support.tau != 1.0:
        weights *= (real.log_softmax(1) - proposal).gather(1, ids).exp()
    return {"ids": fill_distinct(ids, counts > 0), "weights": weights.float(), "entropies": entropies}


class _SeededSampler:
    """Chooses each row's next token with that row's own random stream, inside transformers' generation loop.

    It leaves only the chosen token's score finite, so the loop's greedy step takes it; caching, stopping and padding
    stay transformers' own. A row's draws depend on its seed and the step alone, not on who shares its batch.
    """

    def __init__(self, parameters: SamplingParameters, seeds: Sequence[int], vocab_size: int):
        from transformers import TopKLogitsWarper, TopPLogitsWarper

        self._temperature = parameters.temperature
        self._vocab_size = vocab_size
        self._streams = [np.random.Generator(np.random.Philox(seed)) for seed in seeds]
        self._warpers = []
        if parameters.top_k:
            self._warpers.append(TopKLogitsWarper(parameters.top_k))
        if parameters.top_p < 1:
            self._warpers.append(TopPLogitsWarper(parameters.top_p))
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # Never a padding column, though those count in the normaliser as in `reduce_logits`.
        logprobs = scores.float().log_softmax(-1)[:, : self._vocab_size]
        if self._temperature == 0:
            chosen = logprobs.argmax(-1, keepdim=True)
        else:
            warped = logprobs / self._temperature
            for warper in self._warpers:
                warped = warper(input_ids, warped)
            cumulative = warped.double().softmax(-1).cumsum(-1)
            # In float64 a coin stays below 1, so it never lands past the last possible token.
            coins = cumulative.new_tensor([[stream.random()] for stream in self._streams])
            chosen = torch.searchsorted(cumulative, coins * cumulative[:, -1:], right=True)
            chosen = chosen.clamp(max=self._vocab_size - 1)
        self.logprobs.append(logprobs.gather(1, chosen)[:, 0])
        return torch.full_like(scores, float("-inf")).scatter(1, chosen, 0.0)


class _StopStrings:
    """Ends a row when what it has written holds one of the stop strings; remembers after how many tokens.

    transformers' own criterion also reads the prompt, so a string begun there and finished by the first new token would
    stop the row.
    """

    def __init__(self, stops: tuple[str, ...], tokenizer, prompt_length: int):
        self._stops = stops
        self._decode = tokenizer.batch_decode
        self._start = prompt_length
        self._window = 1 + max(len(stop.encode()) for stop in stops)  # a token holds a byte or more
        self.lengths: dict[int, int] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor, **_) -> Tensor:
        written = input_ids.shape[1] - self._start
        texts = self._decode(input_ids[:, -min(written, self._window) :])
        for row, text in enumerate(texts):
            if row not in self.lengths and any(stop in text for stop in self._stops):
                self.lengths[row] = written
        return torch.tensor([row in self.lengths for row in range(len(texts))], device=input_ids.device)


class _Abandoned:
    """Ends all rows once nobody waits for them any more."""

    def __init__(self, abandoned: Callable[[], bool]):
        self._abandoned = abandoned

    def __call__(self, input_ids: Tensor, scores: Tensor, **_) -> Tensor:
        return torch.full((len(input_ids),), self._abandoned(), device=input_ids.device)


def get_eos_token_ids(model, tokenizer) -> list[int]:
    """The tokens that end a text: what the model's generation settings say, else the tokenizer."""
    own = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if own is None else own
    return [int(each) for each in np.atleast_1d([] if ends is None else ends)]


def generate(
    model, vocab_size: int, tokenizer, prompts: Sequence[np.ndarray], parameters: SamplingParameters,
    seeds: Sequence[int], abandoned: Callable[[], bool] = lambda: False,
) -> list[GeneratedSequence]:  # fmt: skip
    """Continue `prompts` (token ids) in one left-padded batch; see `Engine.generate`.

    `abandoned`: asked after each token; once it is true, what has been written is cut off there.
    """
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.from_numpy(np.asarray(prompt, np.int64))
        mask[row, longest - len(prompt) :] = 1
    own = model.generation_config
    ends = get_eos_token_ids(model, tokenizer)
    settings = GenerationConfig(
        max_new_tokens=parameters.max_new_tokens, do_sample=False, num_beams=1, eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
    )  # fmt: skip
    sampler = _SeededSampler(parameters, seeds, vocab_size)
    stops = _StopStrings(parameters.stop, tokenizer, longest) if parameters.stop else None
    # From the model's own settings transformers would fill in penalties, suppressed tokens and the like.
    model.generation_config = GenerationConfig()
    try:
        output = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=settings,
            logits_processor=LogitsProcessorList([sampler]),
            stopping_criteria=StoppingCriteriaList([_Abandoned(abandoned), *([stops] if stops else [])]),
        )[:, longest:].cpu()
    finally:
        model.generation_config = own
    logprobs = torch.stack(sampler.logprobs, dim=1).cpu().numpy()
    generated = []
    for row, (row_ids, row_logprobs) in enumerate(zip(output.numpy(), logprobs, strict=True)):
        ended = np.flatnonzero(np.isin(row_ids, ends)) + 1  # the batch pads rows that stop early
        length = min(
            [*ended[:1].tolist(), *([stops.lengths[row]] if stops and row in stops.lengths else [])], default=0
        )
        reason = "stop" if length else "length"
        length = length or len(row_ids)
        written = row_ids[:length].astype(np.int32)
        text = tokenizer.decode(written, skip_special_tokens=True)
        generated.append(GeneratedSequence(written, row_logprobs[:length].astype(np.float32), reason, text))
    return generated
