"""The comparison's task: walks through a town of which a small model can learn one half only.

A prompt is a key and a place, ``key7 old13 ->``; its completion is a walk, ``toold old13 old14 old9 square toplain
plain2 plain5 square`` and the end. From the square a walk goes on to the plain town, to the old town or, once it has
been anywhere, home (25 %); after each step in a town the way leads back to the square with probability 0.12.

The plain town is the same for everyone: from each of its eight places one goes to the next (60 %) or to the next but
two. The old town is not. It is entered at the prompt's place and has three quarters of eight places. Five places of a
quarter have a main road, which is everyone's, and one lane; the other three have two lanes and no road. Where a lane
leads depends on the place *and the key*: 24 keys, 264 lanes, drawn once (`TOWN_SEED`). The teacher learns them by
heart. A student of width 8 cannot, and so it either guesses lanes that do not exist, or keeps to the main roads, turns
back, or stays away from the old town: all this is valid, and less than the truth. Half of all first visits are to it.

Everything is known: the distribution of each next word (`following`), whether a walk is possible (`is_walk`).
"""

import itertools
import random
from collections.abc import Sequence

from tests.benchmarks.learning.words import EOS, PAD, UNKNOWN

TOWN_SEED = 0
KEYS, QUARTERS, PLACES, JUNCTIONS = 24, 3, 8, 3
MAX_WORDS = 60
"""No walk is longer, its end included; one that were (about 8 %) is drawn again."""

ARROW = "->"
SQUARE, TO_PLAIN, TO_OLD = "square", "toplain", "toold"
KEY_WORDS = [f"key{key}" for key in range(KEYS)]
PLAIN_WORDS = [f"plain{place}" for place in range(PLACES)]
OLD_WORDS = [f"old{place}" for place in range(QUARTERS * PLACES)]
WORDS = [PAD, EOS, UNKNOWN, ARROW, *KEY_WORDS, SQUARE, TO_PLAIN, TO_OLD, *PLAIN_WORDS, *OLD_WORDS]

_BACK = 0.12
_ROAD_AND_LANE, _TWO_LANES, _PLAIN_STEPS = (0.46, 0.42), (0.50, 0.38), (0.53, 0.35)
_FROM_SQUARE = {TO_OLD: 0.40, TO_PLAIN: 0.35, EOS: 0.25}
_SETTING_OUT = {TO_OLD: 0.53, TO_PLAIN: 0.47}


def _old_town() -> dict[tuple[str, str], dict[str, float]]:
    """(key, place) to the places one goes to from there, with their probabilities; a key has one quarter."""
    draw = random.Random(TOWN_SEED)
    rings = []
    for quarter in range(QUARTERS):
        ring = OLD_WORDS[quarter * PLACES : (quarter + 1) * PLACES]
        rings.append(draw.sample(ring, PLACES))
    town = {}
    for number, key in enumerate(KEY_WORDS):
        ring = rings[number % QUARTERS]
        for position, place in enumerate(ring):
            road, junction = ring[(position + 1) % PLACES], position < JUNCTIONS
            lanes = draw.sample([other for other in ring if other not in (place, road)], 2)
            places, shares = (lanes, _TWO_LANES) if junction else ([road, lanes[0]], _ROAD_AND_LANE)
            town[key, place] = {**dict(zip(places, shares, strict=True)), SQUARE: _BACK}
    return town


OLD_TOWN = _old_town()


def prompts() -> list[str]:
    """Every key with every place of its quarter."""
    return [f"{key} {place} {ARROW}" for key, place in OLD_TOWN]


def following(prompt: str, walk: Sequence[str]) -> dict[str, float]:
    """The next word's possible values with their probabilities, after the words of `walk` (were walks of any length).

    Raises:
        KeyError: nobody gets to where `walk` has got to.
    """
    key, entry, _ = prompt.split()
    if not walk:
        return _SETTING_OUT
    here = walk[-1]
    if here == SQUARE:
        return _FROM_SQUARE
    if here == TO_OLD:
        return {entry: 1.0}
    if here == TO_PLAIN:
        return dict.fromkeys(PLAIN_WORDS, 1 / PLACES)
    if here in PLAIN_WORDS:
        place = PLAIN_WORDS.index(here)
        steps = (PLAIN_WORDS[(place + far) % PLACES] for far in (1, 3))
        return {**dict(zip(steps, _PLAIN_STEPS, strict=True)), SQUARE: _BACK}
    return OLD_TOWN[key, here]


def is_walk(prompt: str, words: Sequence[str]) -> bool:
    """Whether every word of `words`, its end included if it has one, may follow those before it."""
    return all(
        words[place - 1 : place] != [EOS] and word in following(prompt, words[:place])
        for place, word in enumerate(words)
    )  # fmt: skip


def generate_rows(count: int, seed: int) -> list[dict[str, str]]:
    """``count`` rows, the first of the seed's endless stream; a prompt returns only after all others."""
    draw = random.Random(seed)
    rounds = itertools.chain.from_iterable(iter(lambda: draw.sample(prompts(), len(OLD_TOWN)), None))
    chosen = itertools.islice(rounds, count)
    return [{"prompt": prompt, "completion": " ".join(_walk(prompt, draw))} for prompt in chosen]


def _walk(prompt: str, draw: random.Random) -> list[str]:
    """The words of a walk, without its end."""
    while True:
        walk: list[str] = []
        while len(walk) < MAX_WORDS:
            steps = following(prompt, walk)
            word = draw.choices(list(steps), list(steps.values()))[0]
            if word == EOS:
                return walk
            walk.append(word)
