"""Demonstrations found by a learned retriever, by BM25 and at random, on a task where what helps is known.

    python -m tests.benchmarks.retriever [--seeds 3]

A row's input is four fillers and a key word, its output the word that its key's family goes by. Each of the 8
families has 40 keys, each key stands in one row, and which word a family goes by is drawn anew for every seed. So a
demonstration tells the answer where it is of the row's own family, and else says nothing; but no two rows share more
than fillers, by which BM25 must go. The teacher was trained on the same families with words drawn for each text: what
it knows of a row it has from the demonstrations before it.

Right after the retriever is trained the run is over but for one step; k = 2. Printed is what `summary.json` says of
held-out rows, and in how many of them a row of the family is among the two.
"""

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from rayk.cluster import start_ray
from rayk.config import TeacherConfig, parse_config
from rayk.environment import set_threading
from rayk.run import distill
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


def train_teacher(folder: Path, steps: int, batch: int = 96) -> None:
    """A model that answers by the demonstrations before a row, one or two, of which half the time one is of the row's
    family. It begins with the embeddings of a family's keys near each other, and has only the answering to learn."""
    words = tokenizer()
    place = words.get_vocab()
    torch.manual_seed(0)
    settings = AutoConfig.for_model(
        "gpt2", vocab_size=len(VOCABULARY), n_embd=64, n_layer=3, n_head=4, n_positions=64, pad_token_id=0,
        eos_token_id=1, bos_token_id=2, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(settings)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight.normal_(std=0.5)
        for keys in KEY_WORDS:
            ids = [place[key] for key in keys]
            embedding[ids] = 0.2 * embedding[ids] + 0.5 * torch.randn(embedding.shape[1])
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    draw = random.Random(0)
    for step in range(1, steps + 1):
        texts, due = [], []
        shown = 1 + step % 2
        for _ in range(batch):
            names = draw.sample(NAMES, FAMILIES)
            of_shown = draw.sample(range(FAMILIES), shown)
            family = draw.choice(of_shown) if draw.random() < 0.5 else draw.randrange(FAMILIES)
            solved = ([*asked(draw.choice(KEY_WORDS[each]), draw), IS, names[each], THEN] for each in of_shown)
            text = [word for row in solved for word in row]
            texts.append([*text, *asked(draw.choice(KEY_WORDS[family]), draw), IS, names[family]])
            due.append([place[names[family]], place[EOS]])
        ids = torch.tensor([[place[word] for word in text] for text in texts])
        logits = model(input_ids=ids).logits[:, -2:]
        loss = F.cross_entropy(logits.flatten(0, 1), torch.tensor(due).flatten(), reduction="none")
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % (steps // 10) == 0:
            print(f"teacher, step {step}: loss {loss.view(-1, 2)[:, 0].mean().item():.3f} a name", flush=True)
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
    parser.add_argument("--teacher-steps", type=int, default=2000)
    given = parser.parse_args()
    set_threading()
    print(machine())
    start_ray(num_cpus=4)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_teacher(folder / "teacher", given.teacher_steps)
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
