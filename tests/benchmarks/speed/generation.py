"""Generation by the transformers engine and by worker policies, against transformers' own `generate`.

    python -m tests.benchmarks.speed.generation [--runs 5]

Models with random weights of the race's student (11M parameters, V=32,000) and of SmolLM2's 10-layer cut (64M,
V=49,152); prompts of 40 to 120 tokens, 64 new tokens, temperature 1. Rows "full" never end early. Rows that "end" have
as many end tokens as give a mean length of about 27 tokens. Both sides take turns in one process; medians. How to read
it: milliseconds per token of the longest row; the ratio is transformers' time divided by rayk's. The sides sample with
different random numbers, so the lengths of rows that end differ a little.
"""

import argparse

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from rayk.engines.base import SamplingParameters
from rayk.engines.generation import generate
from rayk.models import CausalLM
from tests.benchmarks.machine import machine, median_seconds
from tests.tiny import tiny_tokenizer

NEW_TOKENS = 64
MODELS = {
    "11M": {"vocab_size": 32_000, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4,
            "num_attention_heads": 8},
    "64M": {"vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 10,
            "num_attention_heads": 9, "num_key_value_heads": 3},
}  # fmt: skip


def make_model(size: dict[str, int]) -> CausalLM:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", tie_word_embeddings=True, max_position_embeddings=1024, **size)
    return AutoModelForCausalLM.from_config(config).eval()


def generate_by_transformers(model: CausalLM, prompts: list[np.ndarray], end_ids: list[int]) -> None:
    longest = max(map(len, prompts))
    ids, mask = torch.zeros(2, len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.from_numpy(prompt)
        mask[row, longest - len(prompt) :] = 1
    settings = GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=end_ids,
        pad_token_id=0,
    )  # fmt: skip
    model.generate(ids, attention_mask=mask, generation_config=settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    print(machine())
    print(f"{'model':<8}{'rows':>6}  {'':<6}{'transformers':>14}{'rayk':>8}  ratio")
    random, tokenizer = np.random.default_rng(0), tiny_tokenizer()
    for name, size in MODELS.items():
        model, vocab = make_model(size), size["vocab_size"]
        for rows, ends in ((8, 0), (32, 0), (32, vocab // 30)):
            prompts = [random.integers(2, vocab // 2, random.integers(40, 120)) for _ in range(rows)]
            end_ids = list(range(vocab - max(1, ends), vocab))
            # A single end token has a probability of 1 in the size of the vocabulary.
            parameters = SamplingParameters(NEW_TOKENS, end_token_ids=tuple(end_ids))
            theirs, ours = median_seconds(
                lambda model=model, prompts=prompts, end_ids=end_ids: generate_by_transformers(model, prompts, end_ids),
                lambda model=model, vocab=vocab, prompts=prompts, parameters=parameters: generate(
                    model, vocab, tokenizer, prompts, parameters, range(len(prompts))
                ),
                runs=runs,
            )
            milliseconds = f"{1000 * theirs / NEW_TOKENS:>14.1f}{1000 * ours / NEW_TOKENS:>8.1f}"
            print(f"{name:<8}{rows:>6}  {'end' if ends else 'full':<6}{milliseconds}  {theirs / ours:.2f}", flush=True)


if __name__ == "__main__":
    main()
