"""The built-in task of `rayk quickstart`: translation into an invented language with varying word endings.

A prompt is a five-word English sentence, `old fox hears red king ->`. Its translation has one word for each of its
words, a stem with one of three endings: `velo tara sulen rudo moso`. The usual ending depends on the word *and its
neighbors*, and speakers vary: the usual ending has probability 0.7, the second 0.2 and the third 0.1, independently at
every word. The order of endings is drawn once from `LANGUAGE_SEED` for all 350 contexts (word before, word, word
after). It defines the language and does not depend on a row's seed.

A row's `completion` is sampled from one speaker; its `answer` is the most probable ending at every word, the greedy
translation of a perfect model. In a completion three words in ten are not the usual ones, so a supervised student gets
noisy gradients, learns slowly, and memorizes the noise of repeated rows. The teacher was trained on many more sentences
and returns all three probabilities at every position, so a student that matches them has targets without noise from the
same rows in the same steps. With four times the steps on new rows the supervised student reaches the same result.
"""

import itertools
import json
import random
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

Split = Literal["train", "evaluation"]

LANGUAGE_SEED = 0
ENDINGS = ("a", "o", "en")
ENDING_PROBABILITIES = (0.7, 0.2, 0.1)
ADJECTIVES = {"old": "vel", "red": "rud", "small": "pik", "wild": "dor", "quiet": "lun"}
NOUNS = {"fox": "tar", "king": "mos", "bird": "fil", "boat": "nav", "cloud": "hem"}
VERBS = {"sees": "vid", "finds": "kel", "hears": "sul", "follows": "gan"}
STEMS = ADJECTIVES | NOUNS | VERBS
EVALUATION_PROMPTS, TRAIN_PROMPTS = 500, 2000
"""Sizes of the two splits, 2,500 sentences together; no sentence is in both."""

ARROW, PAD, EOS, UNKNOWN = "->", "<pad>", "<eos>", "<unk>"
WORDS = [PAD, EOS, UNKNOWN, ARROW, *STEMS, *(stem + ending for stem in STEMS.values() for ending in ENDINGS)]

# Models and training of the quickstart: AdamW, linear warmup, then cosine decay to zero. The teacher trains one epoch,
# both students train eight. The learning rate is the best of 1e-3, 2e-3 and 4e-3 for the supervised student.
_LLAMA = {
    "vocab_size": len(WORDS),
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": WORDS.index(PAD),
    "eos_token_id": WORDS.index(EOS),
    "bos_token_id": None,
    "tie_word_embeddings": False,
}
TEACHER_MODEL = _LLAMA | {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
STUDENT_MODEL = _LLAMA | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
_OPTIMIZER = {"learning_rate": 2e-3, "weight_decay": 0.01, "warmup_steps": 50, "max_gradient_norm": 1.0}
TEACHER_TRAINING: dict[str, Any] = _OPTIMIZER | {"rows": 64_000, "steps": 500, "batch_size": 128}
STUDENT_TRAINING: dict[str, Any] = _OPTIMIZER | {"rows": 2000, "steps": 500, "batch_size": 32}


def _language() -> dict[tuple[str, str, str], list[str]]:
    """Map each context (word before, word, word after; "" at the ends) to its three translations, most usual first."""
    draw = random.Random(LANGUAGE_SEED)
    contexts = [
        *itertools.product([""], ADJECTIVES, NOUNS),
        *itertools.product(ADJECTIVES, NOUNS, VERBS),
        *itertools.product(NOUNS, VERBS, ADJECTIVES),
        *itertools.product(VERBS, ADJECTIVES, NOUNS),
        *itertools.product(ADJECTIVES, NOUNS, [""]),
    ]
    return {context: [STEMS[context[1]] + ending for ending in draw.sample(ENDINGS, 3)] for context in contexts}


LANGUAGE = _language()


def true_distribution(prompt: str) -> list[dict[str, float]]:
    """Return the possible words at each position of the translation with their probabilities, most probable first."""
    words = ["", *prompt.removesuffix(ARROW).split(), ""]
    contexts = zip(words, words[1:], words[2:], strict=False)
    return [dict(zip(LANGUAGE[context], ENDING_PROBABILITIES, strict=True)) for context in contexts]


def prompts(split: Split) -> list[str]:
    """Return the prompts of a split."""
    sentences = itertools.product(ADJECTIVES, NOUNS, VERBS, ADJECTIVES, NOUNS)
    all_prompts = [" ".join((*words, ARROW)) for words in sentences]
    random.Random(LANGUAGE_SEED).shuffle(all_prompts)
    return all_prompts[:EVALUATION_PROMPTS] if split == "evaluation" else all_prompts[EVALUATION_PROMPTS:]


def generate_rows(count: int, seed: int, split: Split = "train") -> list[dict[str, str]]:
    """Return the first `count` rows of the seed's infinite stream; each pass has every sentence of the split once."""
    draw = random.Random(f"{seed}-{split}")
    sentences = prompts(split)
    rows: list[dict[str, str]] = []
    while len(rows) < count:
        draw.shuffle(sentences)
        rows += [_row(prompt, draw) for prompt in sentences[: count - len(rows)]]
    return rows


def _row(prompt: str, draw: random.Random) -> dict[str, str]:
    words = true_distribution(prompt)
    sampled = [draw.choices(list(word), list(word.values()))[0] for word in words]
    most_probable = [next(iter(word)) for word in words]
    return {"prompt": prompt, "completion": " ".join(sampled), "answer": " ".join(most_probable)}


def write_rows(path: Path, count: int, seed: int, split: Split = "train") -> None:
    """Write the rows of `generate_rows` as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in generate_rows(count, seed, split)), encoding="utf-8")


def task_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word and no special tokens; a prompt's arrow separates its completion."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN)
