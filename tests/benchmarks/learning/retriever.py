"""Demonstrations found by a learned retriever, by BM25 and at random, on a task where what helps is known.

    python -m tests.benchmarks.learning.retriever [--seeds 3]

A row's input is four fillers and a key word, its output the word that its key's family goes by. Each of the 8
families has 40 keys, each key stands in one row, and which word a family goes by is drawn anew for every seed. So a
demonstration tells the answer where it is of the row's own family, and else says nothing; but no two rows share more
than fillers, by which BM25 must go. The teacher knows the families, but not their words: what it knows of an answer it
has from the demonstrations before it.

Right after the retriever is trained the run is over but for one step; k = 2. Printed is what `summary.json` says of
held-out rows: mean log-prob of the answer and its end, which is 0 at best and about -1.4 where the answer is a guess.
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


def tokenizer() -> PreTrainedTokenizerFast:
    """A token a word."""
    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=PAD, eos_token=EOS, bos_token=BOS)


def rows(seed: int) -> list[dict[str, str]]:
    """A row for each key."""
    draw = random.Random(seed)
    names = draw.sample(NAMES, FAMILIES)
    found = [
        {"prompt": " ".join(asked(key, draw)), "completion": names[family], "family": str(family)}
        for family, keys in enumerate(KEY_WORDS)
        for key in keys
    ]
    draw.shuffle(found)
    return found


def asked(key: str, draw: random.Random) -> list[str]:
    """Fillers and a key."""
    return [*draw.sample(FILLER_WORDS, SHOWN_FILLERS), key]


def make_teacher(folder: Path) -> None:
    """A GPT-2 whose weights are set, not trained. Its first layer tells each word of a row the family of the row's key;
    its second has "=" look for a name that was told the same family, and looks at "=" itself where there is none."""
    words = tokenizer()
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
        embedding[:, other] = 1.0  # every word has two ones, so that the layers' norms scale all alike
        for family, keys in enumerate(KEY_WORDS):
            for each in keys:
                embedding[place[each], [first["family"] + family, key, *other]] = torch.tensor([1.0, 1.0, 0.0, 0.0])
        for number, each in enumerate(NAMES):
            embedding[place[each], [first["name"] + number, name, *other]] = torch.tensor([1.0, 1.0, 0.0, 0.0])
            head[place[each], [first["answer"] + number, equals]] = torch.tensor([2.0, 4.0])
        embedding[place[IS], [equals, other[0]]] = torch.tensor([1.0, 0.0])
        head[place[EOS], name] = 12.0
        for number in range(rows):
            model.transformer.wpe.weight[number * ROW_WORDS : (number + 1) * ROW_WORDS, first["row"] + number] = 1.0
        for layer, matched, kinds, moved in (
            (0, "row", {key: 1.0}, ("family", "told")),
            (1, "told", {name: 1.0, equals: 0.5}, ("name", "answer")),
        ):
            attention = model.transformer.h[layer].attn
            query, looked_for, value = attention.c_attn.weight.split(width, dim=1)
            bias = attention.c_attn.bias
            for number in range(sizes[matched]):
                query[first[matched] + number, number] = 8.0
                looked_for[first[matched] + number, number] = 8.0
            bias[width - 1] = 24.0  # of the query, for what a word is whoever asks
            for kind, weight in kinds.items():
                looked_for[kind, width - 1] = 8.0 * weight
            for number in range(sizes[moved[0]]):
                value[first[moved[0]] + number, number] = 1.0
                attention.c_proj.weight[number, first[moved[1]] + number] = 1.0
    model.save_pretrained(folder)
    words.save_pretrained(folder)


def learned(folder: Path, models_in: Path, seed: int, variant: str) -> dict[str, Any]:
    """The retriever's summary, with the share of held-out rows that are shown one of their family."""
    given = rows(seed)
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
        tiny_encoder(folder / "encoder", tokenizer=tokenizer(), hidden=64)
        with serve_teacher(TeacherConfig(name="families", model=str(folder / "teacher"))):
            for variant in VARIANTS:
                gains = []
                for seed in range(given.seeds):
                    summary = learned(folder / f"{variant} {seed}", folder, seed, variant)
                    figures = summary["held_out"]["mean_logprob"]
                    gains.append(figures["learned"] - figures["bm25"])
                    first = summary["rounds"][0]["mean_logprob"]
                    print(f"{variant}, seed {seed}:", *(f"{what} {value:.3f}" for what, value in figures.items()),
                          f"(after round 1 {first:.3f}), {summary['held_out']['rows']} rows", flush=True)  # fmt: skip
                half = stats.t.ppf(0.975, len(gains) - 1) * statistics.stdev(gains) / len(gains) ** 0.5
                print(f"{variant}: learned over BM25 {statistics.mean(gains):+.3f} ± {half:.3f} nats a token (95 %)")


if __name__ == "__main__":
    main()
