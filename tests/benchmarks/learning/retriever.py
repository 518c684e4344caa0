"""Demonstrations found by a learned retriever, by BM25 and at random, on a task where the helpful ones are known.

    python -m tests.benchmarks.learning.retriever [--seeds 3]

A row's input is four filler words and a key word; its output is the word of the key's family. Each of the 8 families
has 40 keys, each key occurs in one row, and each seed draws new words for the families. So a demonstration reveals the
answer if it is of the row's own family, and nothing otherwise; but rows share only filler words, which mislead BM25.
The teacher knows the families but not their words: what it knows about an answer comes from the demonstrations.

The run ends one step after the retriever is trained; k = 2. How to read it: the mean log-prob of answer and EOS of
held-out rows from `summary.json`, which is 0 at best and about -1.4 for a guess.
"""

import argparse
import itertools
import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from rayk.config import TeacherConfig, parse_config
from rayk.environment import set_threading
from rayk.run import distill
from rayk.serving.cluster import start_ray
from rayk.teachers import serve_teacher
from tests.benchmarks.machine import machine
from tests.tiny import BOS, EOS, PAD, tiny_encoder

FAMILIES, KEYS, FILLERS, WORDS, SHOWN_FILLERS = 8, 40, 60, 16, 4
KEY_WORDS = [[f"key{family}x{number}" for number in range(KEYS)] for family in range(FAMILIES)]
FILLER_WORDS = [f"filler{number}" for number in range(FILLERS)]
NAMES = [f"name{number}" for number in range(WORDS)]
IS, THEN = "=", ";"
VOCABULARY = [PAD, EOS, BOS, "<unk>", IS, THEN, *(key for keys in KEY_WORDS for key in keys), *FILLER_WORDS, *NAMES]
K = 2
ROW_WORDS, SHOWN_ROWS = SHOWN_FILLERS + 4, K + 1
VARIANTS: dict[str, dict[str, Any]] = {"with a reward model": {}, "from the teacher's scores": {"reward_model": None}}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word."""
    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=PAD, eos_token=EOS, bos_token=BOS)


def make_rows(seed: int) -> list[dict[str, str]]:
    """Return one row for each key, with words for the families drawn by `seed`."""
    draw = random.Random(seed)
    names = draw.sample(NAMES, FAMILIES)
    found = [
        {"prompt": " ".join(make_input(key, draw)), "completion": names[family], "family": str(family)}
        for family, keys in enumerate(KEY_WORDS)
        for key in keys
    ]
    draw.shuffle(found)
    return found


def make_input(key: str, draw: random.Random) -> list[str]:
    """Return the words of an input: fillers and a key."""
    return [*draw.sample(FILLER_WORDS, SHOWN_FILLERS), key]


def make_teacher(folder: Path) -> None:
    """Save a GPT-2 with constructed weights.

    Its first layer copies the family of the row's key to each word of the row. In its second layer "=" attends to a
    name with the same family, or to itself if there is none.
    """
    words = make_tokenizer()
    place = words.get_vocab()
    rows = SHOWN_ROWS
    sizes = {"family": FAMILIES, "name": WORDS, "row": rows, "told": FAMILIES, "answer": WORDS, "kind": 5}
    first = dict(zip(sizes, itertools.accumulate(sizes.values(), initial=0), strict=False))
    width = sum(sizes.values())
    key, equals, name, *other = range(first["kind"], width)
    settings = AutoConfig.for_model(
        "gpt2", vocab_size=len(VOCABULARY), n_embd=width, n_layer=2, n_head=1, n_positions=rows * ROW_WORDS,
        pad_token_id=0, eos_token_id=1, bos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(settings)
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            parameter.fill_(1.0 if ".ln_" in part and part.endswith("weight") else 0.0)
        embedding, head = model.transformer.wte.weight, model.lm_head.weight
        embedding[:, other] = 1.0  # every word has two ones, so that the norms scale all words alike
        for family, keys in enumerate(KEY_WORDS):
            for word in keys:
                embedding[place[word], [first["family"] + family, key, *other]] = torch.tensor([1.0, 1.0, 0.0, 0.0])
        for number, word in enumerate(NAMES):
            embedding[place[word], [first["name"] + number, name, *other]] = torch.tensor([1.0, 1.0, 0.0, 0.0])
            head[place[word], [first["answer"] + number, equals]] = torch.tensor([2.0, 4.0])
        embedding[place[IS], [equals, other[0]]] = torch.tensor([1.0, 0.0])
        head[place[EOS], name] = 12.0
        for number in range(rows):
            model.transformer.wpe.weight[number * ROW_WORDS : (number + 1) * ROW_WORDS, first["row"] + number] = 1.0
        for layer, matched, kinds, moved in (
            (0, "row", {key: 1.0}, ("family", "told")),
            (1, "told", {name: 1.0, equals: 0.5}, ("name", "answer")),
        ):
            attention = model.transformer.h[layer].attn
            query, match_key, value = attention.c_attn.weight.split(width, dim=1)
            bias = attention.c_attn.bias
            for number in range(sizes[matched]):
                query[first[matched] + number, number] = 8.0
                match_key[first[matched] + number, number] = 8.0
            bias[width - 1] = 24.0  # of the query: matches a kind of word for every query
            for kind, weight in kinds.items():
                match_key[kind, width - 1] = 8.0 * weight
            for number in range(sizes[moved[0]]):
                value[first[moved[0]] + number, number] = 1.0
                attention.c_proj.weight[number, first[moved[1]] + number] = 1.0
    model.save_pretrained(folder)
    words.save_pretrained(folder)


def train_retriever(folder: Path, models_in: Path, seed: int, variant: str) -> dict[str, Any]:
    """Train a retriever; return its summary, with the share of held-out rows that see one of their family."""
    given = make_rows(seed)
    folder.mkdir(parents=True)
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in given))
    encoder = str(models_in / "encoder")
    reward = {"model": encoder, "steps": 600, "batch_size": 16, "learning_rate": 1e-3, "warmup_steps": 60}
    retriever = {
        "encoder": encoder, "max_tokens": 32, "reward_model": reward, "steps": 600, "batch_size": 32,
        "learning_rate": 1e-3, "warmup_steps": 60, "temperature": 0.05,
    } | VARIANTS[variant]  # fmt: skip
    demonstrations = {
        "k": K, "choice": "learned", "retriever": retriever, "separator": f" {THEN} ", "output_separator": f" {IS} ",
    }  # fmt: skip
    config = parse_config({
        "name": "retriever", "output": str(folder / "run"), "seed": seed,
        "teachers": [{"name": "families", "attach": True}], "student": {"model": str(models_in / "teacher")},
        "data": {"train": {"path": str(data)}, "max_tokens": 64},
        "method": {"kind": "in_context", "targets": "tokens", "text_weight": 0.0, "demonstrations": demonstrations},
        "training": {"workers": 0, "steps": 1}, "tracking": {"tensorboard": False},
    })  # fmt: skip
    return distill(config).summary["retriever"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    set_threading()
    print(machine())
    start_ray(num_cpus=4)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_teacher(folder / "teacher")
        tiny_encoder(folder / "encoder", tokenizer=make_tokenizer(), hidden=64)
        with serve_teacher(TeacherConfig(name="families", model=str(folder / "teacher"))):
            for variant in VARIANTS:
                gains = []
                for seed in range(given.seeds):
                    summary = train_retriever(folder / f"{variant} {seed}", folder, seed, variant)
                    figures = summary["held_out"]["mean_logprob"]
                    gains.append(figures["learned"] - figures["bm25"])
                    first = summary["rounds"][0]["mean_logprob"]
                    print(f"{variant}, seed {seed}:", *(f"{what} {value:.3f}" for what, value in figures.items()),
                          f"(after round 1 {first:.3f}), {summary['held_out']['rows']} rows", flush=True)  # fmt: skip
                half = stats.t.ppf(0.975, len(gains) - 1) * statistics.stdev(gains) / len(gains) ** 0.5
                print(f"{variant}: learned over BM25 {statistics.mean(gains):+.3f} ± {half:.3f} nats a token (95 %)")


if __name__ == "__main__":
    main()
