"""The black-box comparison's world of reckoning: what the coins in a purse come to, modulo 10.

A question is five different coins of sixteen, ``coin3 coin11 coin0 coin7 coin12``. What a coin is worth, 0 to 9, is
nowhere said (`WORTH`, drawn once): whoever reckons must know it by heart. A working takes the coins in any order and
says after each what they come to so far, ``coin7 4 coin0 9 coin3 9 coin12 2 coin11 5``; the last number is the answer.
So a question has 120 sound workings, each step of which is one of 160 entries of a table, while its answer alone is a
function of all five coins at once.

Everything is known: the answer (`answer_to`) and whether a working is sound (`is_sound`), which one with the right
answer need not be: two wrong steps may make up for each other, or a coin worth nothing be left out.
"""

import itertools
import random

from tests.benchmarks.learning.words import EOS, PAD, UNKNOWN

COINS, IN_A_PURSE, MODULUS = 16, 5, 10
NAMES = [f"coin{number}" for number in range(COINS)]
WORTH = dict(zip(NAMES, random.Random(0).choices(range(MODULUS), k=COINS), strict=True))

_ASKING = ["Q", ":", "A", "Let", "'", "s", "think", "step", "by", ".", "Therefore", ",", "the", "answer", "is"]
"""What `chain_of_thought` asks with by default, word by word."""
WORDS = [PAD, EOS, UNKNOWN, *_ASKING, "###", "-->", *map(str, range(MODULUS)), *NAMES]

_PURSES = list(itertools.combinations(NAMES, IN_A_PURSE))
random.Random(1).shuffle(_PURSES)
_TEACHERS = 2500
"""The first so many purses are the teacher's, all others its students'."""


def questions(count: int, draw: random.Random, *, teachers: bool = False) -> list[str]:
    """``count`` questions of different purses, the teacher's or those it never learned from."""
    purses = draw.sample(_PURSES[:_TEACHERS] if teachers else _PURSES[_TEACHERS:], count)
    return [" ".join(draw.sample(purse, IN_A_PURSE)) for purse in purses]


def answer_to(question: str) -> str:
    """The right answer."""
    return str(sum(WORTH[coin] for coin in question.split()) % MODULUS)


def working(question: str, draw: random.Random, slips: float = 0.0) -> str:
    """A working in an order drawn at random. Whoever writes it slips at each step with probability `slips`, writes
    another number, and goes on from that."""
    total, words = 0, []
    for coin in draw.sample(question.split(), IN_A_PURSE):
        total = (total + WORTH[coin]) % MODULUS
        if draw.random() < slips:
            total = (total + draw.randrange(1, MODULUS)) % MODULUS
        words += [coin, str(total)]
    return " ".join(words)


def is_sound(question: str, rationale: str) -> bool:
    """Whether `rationale` takes each coin of the question once, and every number in it is right."""
    words = rationale.split()
    coins, numbers = words[::2], words[1::2]
    if sorted(coins) != sorted(question.split()):
        return False
    totals = itertools.accumulate(WORTH[coin] for coin in coins)
    return numbers == [str(total % MODULUS) for total in totals]
