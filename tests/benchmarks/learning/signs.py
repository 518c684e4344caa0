"""A family of tasks of `black_box` that can only be solved from demonstrations: the name of a sign.

A sign has a color and a shape, ``red ring``; two of the four shapes are round. A task has one word for round signs and
one for the others. With the words drawn from ten that makes 90 tasks. Each village has one task; only its solved signs,
all right, show which word is for which. The pairs of words in `NEW_PAIRS` occur together in no training row. In the
rows that people label, some words are the wrong one of the two.

The truth is known: the word (`name_of`).
"""

import itertools
import random
from collections.abc import Iterable
from typing import Any

from tests.benchmarks.learning.words import EOS, PAD, UNKNOWN

COLORS = ("red", "blue", "green", "white", "black", "brown", "pink", "gray")
ROUND, ANGULAR = ("ring", "moon"), ("star", "square")
NAMES = ("dax", "wug", "fep", "toma", "blick", "zav", "kiki", "bouba", "lorp", "nim")
WORDS = [PAD, EOS, UNKNOWN, *COLORS, *ROUND, *ANGULAR, *NAMES]

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"

Task = tuple[str, str]
"""The word for round signs, and the word for the others."""

_PAIRS = random.Random(0).sample(list(itertools.combinations(NAMES, 2)), 45)
NEW_PAIRS, TRAINING_PAIRS = _PAIRS[:15], _PAIRS[15:]


def tasks(pairs: Iterable[tuple[str, str]]) -> list[Task]:
    """Return both tasks of each pair of words, so that the words alone do not reveal the task."""
    return [task for one, other in pairs for task in ((one, other), (other, one))]


def name_of(task: Task, sign: str) -> str:
    """Return the task's word for a sign."""
    return task[sign.split()[1] in ANGULAR]


def sample_signs(count: int, draw: random.Random) -> list[str]:
    """Return ``count`` different signs."""
    return draw.sample([" ".join(sign) for sign in itertools.product(COLORS, ROUND + ANGULAR)], count)


def make_village(
    name: str, task: Task, draw: random.Random, *, shots: int, rows: int, wrong: float = 0.0
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return solved signs, all right, and rows about other signs, a share of them wrong, in MetaICL's format."""
    solved = []
    for place, sign in enumerate(sample_signs(shots + rows, draw)):
        word = name_of(task, sign)
        if place >= shots and draw.random() < wrong:
            (word,) = set(task) - {word}
        solved.append({"task": name, "input": sign, "output": word, "options": sorted(task)})
    return solved[:shots], solved[shots:]


def make_conversation(task: Task, count: int, draw: random.Random) -> list[dict[str, str]]:
    """Return ``count`` solved signs as messages: words count, signs do not.

    `CHAT_TEMPLATE` renders them like demonstrations.
    """
    return [
        {"role": role, "content": content}
        for sign in sample_signs(count, draw)
        for role, content in (("user", sign), ("assistant", name_of(task, sign)))
    ]
