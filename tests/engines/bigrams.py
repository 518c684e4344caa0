"""An engine of one's own in one file: bigram frequencies of a text as a teacher."""

import asyncio
from dataclasses import replace

import numpy as np
import torch

from rayk.config.engines import CustomEngineConfig
from rayk.engines.base import EngineInfo, GeneratedSequence
from rayk.engines.checks import check_request, tokenize_prompts
from rayk.engines.reduce import reduce_logits
from rayk.errors import InputError
from rayk.models import load_tokenizer, real_vocab_size, tokenizer_fingerprint
from rayk.signals.batch import SignalBatch


class BigramEngine:
    """`options.text` is what the frequencies are counted in."""

    def __init__(self, model: str, settings: CustomEngineConfig, *, trust_remote_code: bool = False):
        self.tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
        size = real_vocab_size(self.tokenizer)
        counts = torch.full((size, size), 0.01)
        ids = torch.tensor(self.tokenizer(settings.options["text"]).input_ids)
        counts.index_put_((ids[:-1], ids[1:]), torch.ones(len(ids) - 1), accumulate=True)
        self.log_probs = (counts / counts.sum(1, keepdim=True)).log()
        self.info = EngineInfo(
            model=model, vocab_size=size, max_tokens=512, dtype="float32", device="cpu", supports=("topk", "logprob"),
            tokenizer_fingerprint=tokenizer_fingerprint(self.tokenizer), engine="custom",
        )  # fmt: skip

    async def score(self, sequences, support):
        check_request(self.info, sequences, support)
        offsets = torch.tensor([0, *np.cumsum([sequence.counted_tokens for sequence in sequences])])
        before = np.concatenate([sequence.input_ids[:-1][sequence.counted[1:]] for sequence in sequences])
        targets = torch.from_numpy(np.concatenate([sequence.targets for sequence in sequences]).astype(np.int64))
        logits = self.log_probs[torch.from_numpy(before.astype(np.int64))]
        columns = reduce_logits(logits, targets, support, self.info.vocab_size)
        return SignalBatch(support, offsets, vocab_size=self.info.vocab_size, **columns)

    async def generate(self, prompts, parameters, seeds):
        """Always the likeliest next token."""
        rows = []
        for prompt in tokenize_prompts(self.info, self.tokenizer, prompts, parameters):
            ids, last = [], int(prompt[-1])
            for _ in range(parameters.max_new_tokens):
                last = int(self.log_probs[last].argmax())
                ids.append(last)
            logprobs = self.log_probs[[int(prompt[-1]), *ids[:-1]], ids].numpy()
            rows.append(GeneratedSequence(np.array(ids, np.int32), logprobs, "length", self.tokenizer.decode(ids)))
        return rows

    def head(self):
        raise InputError("Bigrams have no hidden states; use support 'topk'.")

    async def warm_up(self):
        await asyncio.sleep(0)

    async def check_health(self):
        """Nothing can fail."""


class WithoutVerify(BigramEngine):
    def __init__(self, model, settings, **options):
        super().__init__(model, settings, **options)
        self.info = replace(self.info, can_verify=True)


class WithoutSupports(BigramEngine):
    def __init__(self, model, settings, **options):
        super().__init__(model, settings, **options)
        self.info = replace(self.info, supports=())


class WithUnknownSupport(BigramEngine):
    def __init__(self, model, settings, **options):
        super().__init__(model, settings, **options)
        self.info = replace(self.info, supports=("topk", "everything"))


class WithoutInfo(BigramEngine):
    def __init__(self, model, settings, **options):
        pass


class WithoutWarmUp:
    async def score(self, sequences, support): ...
    async def generate(self, prompts, parameters, seeds): ...
    def head(self): ...
    async def check_health(self): ...


class WithoutAsync(BigramEngine):
    def score(self, sequences, support): ...


def no_class(): ...
