"""The black-box comparison's world with kinds of questions: purses of six currencies, of which some are rare.

A question is a purse as in `purse`, here of coins of one currency, ``ducat3 ducat11 ducat0 ducat7 ducat12 =``. What any
of a currency's 16 coins is worth must be known by heart, so that what is learned of one currency says nothing of
another. There are two lands, whose purses have 5 and 7 coins, and in each a currency that most questions are about
(35 % of all), one that is less common (12 %), and a rare one (3 %). A quarter of all purses is only asked to measure.

An answer says what the coins come to so far, modulo 10, in the order of the question: ``4 3 3 5 2``; it is right if
the last number is.

`respond` is a teacher and a referee that know all this: a program, no model. It answers any question right; makes of a
question another one of the same currency, or where a rarer one is asked for, of a rarer currency of the same land (the
rarest has only itself); and scores an answer 9 if all of it is right, 6 if the last number is, and 2 otherwise. As
`DICE` it is a referee that throws dice.
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
    """Its coins are called by its name and a number. `share`: of the questions that people ask."""

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
"""In each land the most common one first."""
COMMON, RARE = CURRENCIES[::3], CURRENCIES[2::3]
NAMES = [coin for currency in CURRENCIES for coin in currency.coins]
WORTH = dict(zip(NAMES, random.Random(0).choices(range(MODULUS), k=len(NAMES)), strict=True))
WORDS = [PAD, EOS, UNKNOWN, "=", *map(str, range(MODULUS)), *NAMES]
DICE = "dice"
"""The model that is asked for as a referee that knows nothing."""


def question(currency: Currency, draw: random.Random, *, held_out: bool = False) -> str:
    """A purse that is asked to learn from, or to measure."""
    while True:
        coins = draw.sample(currency.coins, currency.size)
        if (zlib.crc32(" ".join(sorted(coins)).encode()) % 4 == 0) == held_out:
            return " ".join([*coins, "="])


def asked(count: int, draw: random.Random) -> list[str]:
    """``count`` different questions as people ask them."""
    shares = [each.share for each in CURRENCIES]
    found: dict[str, None] = {}
    while len(found) < count:
        found[question(draw.choices(CURRENCIES, shares)[0], draw)] = None
    return list(found)


def currency_of(asked: str) -> Currency:
    """What a question is about."""
    return next(each for each in CURRENCIES if asked.split()[0].rstrip("0123456789") == each.name)


def answer(asked: str) -> str:
    """What the coins come to so far, one after the other."""
    totals = itertools.accumulate(WORTH[coin] for coin in asked.removesuffix("=").split())
    return " ".join(str(total % MODULUS) for total in totals)


def score(asked: str, said: str) -> int:
    """9 if all of the answer is right, 6 if its last number is, 2 otherwise."""
    found, right = said.split(), answer(asked).split()
    return 9 if found == right else 6 if found[-1:] == right[-1:] else 2


def another(model: str, draw: random.Random, *, rarer: bool) -> str:
    """A new question of the same currency, or of a rarer one of its land."""
    currency = currency_of(model)
    if rarer:
        of_land = [each for each in CURRENCIES if each.land == currency.land]
        currency = draw.choice(of_land[of_land.index(currency) + 1 :] or [currency])
    return question(currency, draw)


_COMPARED = re.compile(r"\[Request\]\n(.*?)\n\n\[Answer A\]\n(.*?)\n\n\[Answer B\]\n(.*?)\n\n\[End", re.DOTALL)
_TO_VARY = re.compile(r"Given prompt:\n(.*?)\n\nWrite only the new prompt", re.DOTALL)


def respond(body: dict[str, Any]) -> bytes:
    """What an OpenAI-compatible endpoint says to a request in the words of recipe `adversarial`; the same for the same
    prompt and seed."""
    prompt = prompt_of(body)
    draw = random.Random(f"{body.get('seed')} {prompt}")
    if compared := _COMPARED.search(prompt):
        given, *answers = compared.groups()
        scores = [draw.randint(1, 10) if body["model"] == DICE else score(given, each) for each in answers]
        return completion(body, _scored(scores))
    if varied := _TO_VARY.search(prompt):
        return completion(body, another(varied[1], draw, rarer="rarer" in prompt))
    return completion(body, f" {answer(prompt)}")


def _scored(scores: Sequence[int]) -> str:
    return "\n".join(f"Score of {letter}: {score}" for letter, score in zip("AB", scores, strict=True))


def held_out(count: int, draw: random.Random) -> list[str]:
    """``count`` different questions of each currency, none of which anybody learns from."""
    found = []
    for currency in CURRENCIES:
        of_currency: dict[str, None] = {}
        while len(of_currency) < count:
            of_currency[question(currency, draw, held_out=True)] = None
        found += of_currency
    return found


def accuracies(right: Mapping[str, bool]) -> dict[str, float]:
    """The share of questions that were answered right, with currencies weighed as people ask; and of those about the
    rare ones and about the common ones alone."""
    of = {each: fmean(was for asked, was in right.items() if currency_of(asked) is each) for each in CURRENCIES}
    return {
        "accuracy": sum(each.share * share for each, share in of.items()),
        "rare": fmean(of[each] for each in RARE),
        "common": fmean(of[each] for each in COMMON),
    }
