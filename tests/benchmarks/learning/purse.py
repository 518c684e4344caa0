"""A task of `black_box` with calculations: the total value of the coins in a purse, modulo 10.

A question is five different coins out of sixteen, ``coin3 coin11 coin0 coin7 coin12``. The value of a coin, 0 to 9, is
stated nowhere (`WORTH`, drawn once), so a model must memorize it. A working takes the coins in any order and gives the
total after each, ``coin7 4 coin0 9 coin3 9 coin12 2 coin11 5``; the last number is the answer. So a question has 120
sound workings, each step of which is one of 160 entries of a table, while its answer alone is a function of all five
coins at once.

The truth is known: the answer (`answer_to`), and whether a working is sound (`is_sound`). A working with the right
answer may be unsound: two wrong steps can cancel out, or a coin of value 0 may be missing.
"""

import itertools
import random

from tests.benchmarks.learning.words import EOS, PAD, UNKNOWN

COINS, IN_A_PURSE, MODULUS = 16, 5, 10
NAMES = [f"coin{number}" for number in range(COINS)]
WORTH = dict(zip(NAMES, random.Random(0).choices(range(MODULUS), k=COINS), strict=True))

_ASKING = ["Q", ":", "A", "Let", "'", "s", "think", "step", "by", ".", "Therefore", ",", "the", "answer", "is"]
"""The words of `chain_of_thought`'s default templates."""
WORDS = [PAD, EOS, UNKNOWN, *_ASKING, "###", "-->", *map(str, range(MODULUS)), *NAMES]

_PURSES = list(itertools.combinations(NAMES, IN_A_PURSE))
random.Random(1).shuffle(_PURSES)
_TEACHER_PURSES = 2500
"""The first purses are for the teacher, all others for the students."""


def sample_questions(count: int, draw: random.Random, *, for_teacher: bool = False) -> list[str]:
    """Return ``count`` questions about different purses, from the teacher's part or from the other one."""
    purses = draw.sample(_PURSES[:_TEACHER_PURSES] if for_teacher else _PURSES[_TEACHER_PURSES:], count)
    return [" ".join(draw.sample(purse, IN_A_PURSE)) for purse in purses]


def answer_to(question: str) -> str:
    """Return the right answer."""
    return str(sum(WORTH[coin] for coin in question.split()) % MODULUS)


def make_working(question: str, draw: random.Random, slips: float = 0.0) -> str:
    """Return a working in random order; each step is wrong with probability `slips`, and later steps build on it."""
    total, words = 0, []
    for coin in draw.sample(question.split(), IN_A_PURSE):
        total = (total + WORTH[coin]) % MODULUS
        if draw.random() < slips:
            total = (total + draw.randrange(1, MODULUS)) % MODULUS
        words += [coin, str(total)]
    return " ".join(words)


def is_sound(question: str, rationale: str) -> bool:
    """Return whether `rationale` takes each coin of the question once and every number in it is right."""
    words = rationale.split()
    coins, numbers = words[::2], words[1::2]
    if sorted(coins) != sorted(question.split()):
        return False
    totals = itertools.accumulate(WORTH[coin] for coin in coins)
    return numbers == [str(total % MODULUS) for total in totals]
