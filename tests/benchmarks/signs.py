"""The black-box comparison's family of tasks that must be read from demonstrations: what a sign is called.

A sign has a colour and a shape, ``red ring``, six of each. A task calls it by one of two words, by its colour or its
shape alone: three values are called the one word, three the other. That makes 20 rules, and with the words drawn from
ten a task is a rule and an ordered pair of them. Which of the two decides, which values go together and what they are
called can be read from demonstrations only; the rules of `HELD_OUT` are in no training row of anyone.

Everything is known: the word (`called`), and what somebody who knew the family, but not the task, could answer after
given demonstrations (`best_guess`).
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from tests.benchmarks.words import EOS, PAD, UNKNOWN

KINDS = (
    ("red", "blue", "green", "white", "black", "brown"),
    ("ring", "star", "cross", "arrow", "square", "moon"),
)
CALLED = ("dax", "wug", "fep", "toma", "blick", "zav", "kiki", "bouba", "lorp", "nim")
WORDS = [PAD, EOS, UNKNOWN, *itertools.chain(*KINDS), *CALLED]

Rule = tuple[int, frozenset[str]]
"""Which of the two decides, and the values that go with its first value."""

RULES: list[Rule] = [
    (kind, frozenset({values[0], *others}))
    for kind, values in enumerate(KINDS)
    for others in itertools.combinations(values[1:], 2)
]
HELD_OUT = random.Random(0).sample(RULES, 6)
LEARNED = [rule for rule in RULES if rule not in HELD_OUT]


@dataclass(frozen=True)
class Task:
    """`words`: what signs are called whose value is in the rule, and the others."""

    rule: Rule
    words: tuple[str, str]

    @property
    def name(self) -> str:
        kind, values = self.rule
        return f"{kind} {'+'.join(sorted(values))} {'/'.join(self.words)}"


def tasks(count: int, rules: Sequence[Rule], draw: random.Random) -> list[Task]:
    """``count`` different tasks by `rules`, as many by each as can be."""
    chosen: dict[Task, None] = {}
    while len(chosen) < count:
        for rule in draw.sample(list(rules), min(len(rules), count - len(chosen))):
            one, other = draw.sample(CALLED, 2)
            chosen[Task(rule, (one, other))] = None
    return list(chosen)


def called(task: Task, sign: str) -> str:
    kind, values = task.rule
    return task.words[sign.split()[kind] not in values]


def signs(count: int, draw: random.Random) -> list[str]:
    """``count`` different ones."""
    return draw.sample([" ".join(each) for each in itertools.product(*KINDS)], count)


def task_rows(task: Task, count: int, draw: random.Random) -> list[dict[str, object]]:
    """Rows in MetaICL's form."""
    return [
        {"task": task.name, "input": sign, "output": called(task, sign), "options": sorted(task.words)}
        for sign in signs(count, draw)
    ]


def text(task: Task, count: int, draw: random.Random, among: int | None = None) -> str:
    """``count`` solved signs one after the other, laid out as demonstrations are; all different, or drawn again and
    again from `among` different ones."""
    shown = signs(count, draw) if among is None else draw.choices(signs(among, draw), k=count)
    return " ".join(f"{sign} {called(task, sign)}" for sign in shown)
