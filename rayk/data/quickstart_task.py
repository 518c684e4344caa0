"""The built-in task of ``rayk quickstart``: translating into an invented language whose word endings vary.

A prompt is a five-word English sentence, ``old fox hears red king ->``; its translation renders every word by one
stem with one of three endings, ``velo tara sulen rudo moso``. Which ending is usual depends on the word *and on its
neighbours*, and speakers do not all agree: the usual ending is said with probability 0.7, the second with 0.2, the
third with 0.1, independently at every word. The orders are drawn once, from ``LANGUAGE_SEED``, for all 350 contexts
(word before, word, word after); they are the language and do not change with a row's seed.

A row's ``completion`` is what one speaker happened to say, its ``answer`` what is usual: the mode at every word, and
so the greedy translation of a perfect reader. One completion does not tell usage from chance: three words in ten are
not the usual ones. From such targets a supervised student learns slowly, its gradients being mostly noise, and where
rows come back it learns their accidents too. The teacher has read far more sentences and gives all three probabilities
at every position, so the student that matches them has noiseless targets from the same rows in the same steps. Nothing
is held back from the supervised student: with four times the steps, on fresh rows, it reaches the same end.
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
"""All 2,500 sentences, each in one split for good."""

ARROW, PAD, EOS, UNKNOWN = "->", "<pad>", "<eos>", "<unk>"
WORDS = [PAD, EOS, UNKNOWN, ARROW, *STEMS, *(stem + ending for stem in STEMS.values() for ending in ENDINGS)]

# What the quickstart builds and how it trains: AdamW, linear warm-up, then cosine to zero. The teacher reads every row
# once, both students read theirs eight times. The learning rate is the supervised student's best of 1e-3, 2e-3, 4e-3.
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
    """Every context (word before, word, word after) to its renderings, the usual one first; "" is no word."""
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
    """For each of the translation's words, its renderings with their probabilities, the usual one first."""
    words = ["", *prompt.removesuffix(ARROW).split(), ""]
    contexts = zip(words, words[1:], words[2:], strict=False)
    return [dict(zip(LANGUAGE[context], ENDING_PROBABILITIES, strict=True)) for context in contexts]


def prompts(split: Split) -> list[str]:
    """The split's sentences; no sentence is in both."""
    sentences = itertools.product(ADJECTIVES, NOUNS, VERBS, ADJECTIVES, NOUNS)
    everything = [" ".join((*words, ARROW)) for words in sentences]
    random.Random(LANGUAGE_SEED).shuffle(everything)
    return everything[:EVALUATION_PROMPTS] if split == "evaluation" else everything[EVALUATION_PROMPTS:]


def generate_rows(count: int, seed: int, split: Split = "train") -> list[dict[str, str]]:
    """``count`` rows, the first of the seed's endless stream; a sentence returns only after all others of its split."""
    draw = random.Random(f"{seed}-{split}")
    sentences = prompts(split)
    rows: list[dict[str, str]] = []
    while len(rows) < count:
        draw.shuffle(sentences)
        rows += [_row(prompt, draw) for prompt in sentences[: count - len(rows)]]
    return rows


def _row(prompt: str, draw: random.Random) -> dict[str, str]:
    words = true_distribution(prompt)
    said = [draw.choices(list(word), list(word.values()))[0] for word in words]
    usual = [next(iter(word)) for word in words]
    return {"prompt": prompt, "completion": " ".join(said), "answer": " ".join(usual)}


def write_rows(path: Path, count: int, seed: int, split: Split = "train") -> None:
    """Write ``generate_rows`` as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in generate_rows(count, seed, split)), encoding="utf-8")


def task_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; ``encode`` adds no special tokens. The arrow parts prompt and completion without a space."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN)
