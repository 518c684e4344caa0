"""The black-box comparison's family of tasks that must be read from demonstrations: what a sign is called.

A sign has a colour and a shape, ``red ring``, eight of each. A task calls it by one of two words, by its shape alone:
four shapes are called the one word, four the other. That makes 35 rules, and with the words drawn from ten a task is a
rule and an ordered pair of them. Which shapes go together and what they are called can be read from demonstrations
only; the rules of `HELD_OUT` are in no training row of anyone.

Everything is known: the word (`called`), and what somebody who knew the family, but not the task, could answer after
given demonstrations (`best_guess`).
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.benchmarks.words import EOS, PAD, UNKNOWN

COLOURS = ("red", "blue", "green", "white", "black", "brown", "pink", "grey")
SHAPES = ("ring", "star", "cross", "arrow", "square", "moon", "heart", "cloud")
CALLED = ("dax", "wug", "fep", "toma", "blick", "zav", "kiki", "bouba", "lorp", "nim")
WORDS = [PAD, EOS, UNKNOWN, *COLOURS, *SHAPES, *CALLED]

Rule = frozenset[str]
"""The shapes that go with the first one."""

RULES: list[Rule] = [frozenset({SHAPES[0], *others}) for others in itertools.combinations(SHAPES[1:], 3)]
HELD_OUT = random.Random(0).sample(RULES, 10)
LEARNED = [rule for rule in RULES if rule not in HELD_OUT]


@dataclass(frozen=True)
class Task:
    """`words`: what signs are called whose shape is in the rule, and the others."""

    rule: Rule
    words: tuple[str, str]

    @property
    def name(self) -> str:
        return f"{'+'.join(sorted(self.rule))} {'/'.join(self.words)}"


def tasks(count: int, rules: Sequence[Rule], draw: random.Random) -> list[Task]:
    """``count`` different tasks by `rules`, as many by each as can be."""
    chosen: dict[Task, None] = {}
    while len(chosen) < count:
        for rule in draw.sample(list(rules), min(len(rules), count - len(chosen))):
            one, other = draw.sample(CALLED, 2)
            chosen[Task(rule, (one, other))] = None
    return list(chosen)


def called(task: Task, sign: str) -> str:
    """What the task calls a sign."""
    return task.words[sign.split()[1] not in task.rule]


def signs(count: int, draw: random.Random) -> list[str]:
    """``count`` different ones."""
    return draw.sample([" ".join(each) for each in itertools.product(COLOURS, SHAPES)], count)


def task_rows(task: Task, count: int, draw: random.Random) -> list[dict[str, Any]]:
    """Rows in MetaICL's form."""
    return [
        {"task": task.name, "input": sign, "output": called(task, sign), "options": sorted(task.words)}
        for sign in signs(count, draw)
    ]


def text(task: Task, count: int, draw: random.Random) -> str:
    """``count`` solved signs one after the other, laid out as demonstrations are."""
    return " ".join(f"{sign} {called(task, sign)}" for sign in signs(count, draw))


def pairs(count: int, draw: random.Random) -> str:
    """``count`` words in pairs of no meaning, of which six come again and again. It teaches to look back for
    what followed a word; an order that is repeated as a whole would only teach how far back to look."""
    words = draw.sample(WORDS[3:], 12)
    return " ".join(f"{words[place]} {words[place + 6]}" for place in draw.choices(range(6), k=count // 2))


def best_guess(shown: Sequence[tuple[str, str]], sign: str, words: Sequence[str]) -> str:
    """What `sign` is most likely called after solved ones, by whoever knows the family: the word most of those tasks of
    `words` give it that call all of `shown` so; of equals the first."""
    every = [Task(rule, (one, other)) for rule in RULES for one, other in itertools.permutations(words, 2)]
    possible = [task for task in every if all(called(task, each) == word for each, word in shown)]
    votes = [called(task, sign) for task in possible]
    return max(words, key=votes.count)
