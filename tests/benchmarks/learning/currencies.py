"""A task of `black_box` with kinds of questions: purses of six currencies, two of which are rare.

A question is a purse as in `purse`, with coins of one currency: ``ducat3 ducat11 ducat0 ducat7 ducat12 =``. The values
of a currency's 16 coins must be memorized, so knowing one currency does not help with another. There are two lands,
whose purses have 5 and 7 coins. Each land has a currency that most questions are about (35 % of all), a less common one
(12 %), and a rare one (3 %). A quarter of all purses is reserved for evaluation.

An answer gives the total after each coin, modulo 10, in the order of the question: ``4 3 3 5 2``; it is right if the
last number is.

`respond` is a program that acts as a teacher and as a referee and knows the truth. It answers every question correctly;
it varies a question into another one of the same currency or, if asked for a rarer one, of a rarer currency of the same
land (the rarest stays as it is); and it scores an answer 9 if all of it is right, 6 if the last number is, and 2
otherwise. As model `DICE` it is a referee with random scores.
"""

import itertools
import random
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from tests.benchmarks.learning.words import EOS, PAD, UNKNOWN
from tests.engines.endpoint import completion, prompt_of

COINS, MODULUS = 16, 10


@dataclass(frozen=True)
class Currency:
    """A currency. Its coins have its name and a number; `share` is its share of the questions that people ask."""

    name: str
    land: str
    size: int
    share: float

    @property
    def coins(self) -> list[str]:
        return [f"{self.name}{number}" for number in range(COINS)]


CURRENCIES = [
    Currency(name, land, size, share)
    for land, size, names in (("north", 5, ("krone", "thaler", "ducat")), ("south", 7, ("peso", "real", "florin")))
    for name, share in zip(names, (0.35, 0.12, 0.03), strict=True)
]
"""By land, the most common one first."""
COMMON, RARE = CURRENCIES[::3], CURRENCIES[2::3]
NAMES = [coin for currency in CURRENCIES for coin in currency.coins]
WORTH = dict(zip(NAMES, random.Random(0).choices(range(MODULUS), k=len(NAMES)), strict=True))
WORDS = [PAD, EOS, UNKNOWN, "=", *map(str, range(MODULUS)), *NAMES]
DICE = "dice"
"""The model name of the referee with random scores."""


def make_question(currency: Currency, draw: random.Random, *, held_out: bool = False) -> str:
    """Return a question for training, or a reserved one for evaluation."""
    while True:
        coins = draw.sample(currency.coins, currency.size)
        if (zlib.crc32(" ".join(sorted(coins)).encode()) % 4 == 0) == held_out:
            return " ".join([*coins, "="])


def sample_questions(count: int, draw: random.Random) -> list[str]:
    """Return ``count`` different questions with the frequencies of what people ask."""
    shares = [currency.share for currency in CURRENCIES]
    found: dict[str, None] = {}
    while len(found) < count:
        found[make_question(draw.choices(CURRENCIES, shares)[0], draw)] = None
    return list(found)


def currency_of(question: str) -> Currency:
    """Return the currency of a question."""
    return next(currency for currency in CURRENCIES if question.split()[0].rstrip("0123456789") == currency.name)


def answer_to(question: str) -> str:
    """Return the right answer: the total after each coin."""
    totals = itertools.accumulate(WORTH[coin] for coin in question.removesuffix("=").split())
    return " ".join(str(total % MODULUS) for total in totals)


def score(question: str, response: str) -> int:
    """Return 9 if all of the response is right, 6 if its last number is, 2 otherwise."""
    found, right = response.split(), answer_to(question).split()
    return 9 if found == right else 6 if found[-1:] == right[-1:] else 2


def make_similar_question(model: str, draw: random.Random, *, rarer: bool) -> str:
    """Return a new question of the currency of `model`, or of a rarer one of its land."""
    currency = currency_of(model)
    if rarer:
        of_land = [other for other in CURRENCIES if other.land == currency.land]
        currency = draw.choice(of_land[of_land.index(currency) + 1 :] or [currency])
    return make_question(currency, draw)


_COMPARED = re.compile(r"\[Request\]\n(.*?)\n\n\[Answer A\]\n(.*?)\n\n\[Answer B\]\n(.*?)\n\n\[End", re.DOTALL)
_TO_VARY = re.compile(r"Given prompt:\n(.*?)\n\nWrite only the new prompt", re.DOTALL)


def respond(body: dict[str, Any]) -> bytes:
    """Return an OpenAI-compatible endpoint's response to a request of recipe `adversarial`, by its prompt and seed."""
    prompt = prompt_of(body)
    draw = random.Random(f"{body.get('seed')} {prompt}")
    if compared := _COMPARED.search(prompt):
        given, *answers = compared.groups()
        scores = [draw.randint(1, 10) if body["model"] == DICE else score(given, answer) for answer in answers]
        return completion(body, _score_lines(scores))
    if varied := _TO_VARY.search(prompt):
        return completion(body, make_similar_question(varied[1], draw, rarer="rarer" in prompt))
    return completion(body, f" {answer_to(prompt)}")


def _score_lines(scores: Sequence[int]) -> str:
    return "\n".join(f"Score of {letter}: {score}" for letter, score in zip("AB", scores, strict=True))


def held_out_questions(count: int, draw: random.Random) -> list[str]:
    """Return ``count`` different questions of each currency, reserved for evaluation."""
    found = []
    for currency in CURRENCIES:
        of_currency: dict[str, None] = {}
        while len(of_currency) < count:
            of_currency[make_question(currency, draw, held_out=True)] = None
        found += of_currency
    return found


def compute_accuracies(right: Mapping[str, bool]) -> dict[str, float]:
    """Return the accuracy weighted by what people ask, and the accuracies for rare and for common currencies.

    Args:
        right: whether each question was answered correctly.
    """
    shares = {
        currency: fmean(is_right for question, is_right in right.items() if currency_of(question) is currency)
        for currency in CURRENCIES
    }
    return {
        "accuracy": sum(currency.share * share for currency, share in shares.items()),
        "rare": fmean(shares[currency] for currency in RARE),
        "common": fmean(shares[currency] for currency in COMMON),
    }
