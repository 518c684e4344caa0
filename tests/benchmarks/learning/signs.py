"""The black-box comparison's family of tasks that must be read from demonstrations: what a sign is called.

A sign has a colour and a shape, ``red ring``, and two of the four shapes are round. A task has a word for signs that
are round and one for those that are not. With the words drawn from ten that makes 90 tasks. Each village has one, and
has had a few of its signs named with care; which word is for which can be read from those only. The pairs of words in
`NEW` come together in no training row of anyone. People who write many rows take the wrong one of the two words now and
then.

The truth is known: the word (`called`).
"""

import itertools
import random
from collections.abc import Iterable
from typing import Any

from tests.benchmarks.learning.words import EOS, PAD, UNKNOWN

COLOURS = ("red", "blue", "green", "white", "black", "brown", "pink", "grey")
ROUND, ANGULAR = ("ring", "moon"), ("star", "square")
CALLED = ("dax", "wug", "fep", "toma", "blick", "zav", "kiki", "bouba", "lorp", "nim")
WORDS = [PAD, EOS, UNKNOWN, *COLOURS, *ROUND, *ANGULAR, *CALLED]

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"

Task = tuple[str, str]
"""What round signs are called, and the others."""

_PAIRS = random.Random(0).sample(list(itertools.combinations(CALLED, 2)), 45)
NEW, LEARNED = _PAIRS[:15], _PAIRS[15:]


def tasks(pairs: Iterable[tuple[str, str]]) -> list[Task]:
    """Both tasks that two words can be for, so that the words alone do not say which it is."""
    return [task for one, other in pairs for task in ((one, other), (other, one))]


def called(task: Task, sign: str) -> str:
    """What the task calls a sign."""
    return task[sign.split()[1] in ANGULAR]


def signs(count: int, draw: random.Random) -> list[str]:
    """``count`` different ones."""
    return draw.sample([" ".join(each) for each in itertools.product(COLOURS, ROUND + ANGULAR)], count)


def village(
    name: str, task: Task, draw: random.Random, *, shots: int, rows: int, wrong: float = 0.0
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Solved signs to be shown, all right, and rows about other signs, of which a share is wrong; in MetaICL's form."""
    solved = []
    for place, sign in enumerate(signs(shots + rows, draw)):
        word = called(task, sign)
        if place >= shots and draw.random() < wrong:
            (word,) = set(task) - {word}
        solved.append({"task": name, "input": sign, "output": word, "options": sorted(task)})
    return solved[:shots], solved[shots:]


def conversation(task: Task, count: int, draw: random.Random) -> list[dict[str, str]]:
    """``count`` solved signs one after the other as messages, so that words count and signs do not; written by
    `CHAT_TEMPLATE` they read as demonstrations do."""
    return [
        {"role": role, "content": content}
        for sign in signs(count, draw)
        for role, content in (("user", sign), ("assistant", called(task, sign)))
    ]
