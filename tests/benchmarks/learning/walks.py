"""The task of `comparison`: walks through a town, half of which a small model cannot learn.

A prompt is a key and a place, ``key7 old13 ->``; its completion is a walk, ``toold old13 old14 old9 square toplain
plain2 plain5 square``, and EOS. From the square a walk goes to the plain town, to the old town or, after the first
visit, home (25 %); after each step in a town it returns to the square with probability 0.12.

The plain town is the same for all prompts: from each of its eight places one goes to the next (60 %) or to the next but
two. The old town is different. It is entered at the prompt's place and has three quarters of eight places. Five places
of a quarter have a main road, the same for all prompts, and one lane; the other three have two lanes and no road. Where
a lane leads depends on the place *and the key*: 24 keys, 264 lanes, drawn once (`TOWN_SEED`). The teacher memorizes
them. A student of width 8 cannot: it either guesses lanes that do not exist, or keeps to the main roads, turns back, or
avoids the old town, which is valid and less than the truth. Half of all first visits are to the old town.

The truth is known: the distribution of each next word (`next_words`), and whether a walk is possible (`is_walk`).
"""

import itertools
import random
from collections.abc import Sequence

from tests.benchmarks.learning.words import EOS, PAD, UNKNOWN

TOWN_SEED = 0
KEYS, QUARTERS, PLACES, JUNCTIONS = 24, 3, 8, 3
MAX_WORDS = 60
"""The longest walk, its EOS included; longer ones (about 8 %) are drawn again."""

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
    """Return the next places and their probabilities for each (key, place); a key has one quarter."""
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


def all_prompts() -> list[str]:
    """Return a prompt for each key and each place of its quarter."""
    return [f"{key} {place} {ARROW}" for key, place in OLD_TOWN]


def next_words(prompt: str, walk: Sequence[str]) -> dict[str, float]:
    """Return the possible next words after `walk` with their probabilities, without the limit on a walk's length.

    Raises:
        KeyError: `walk` is not possible.
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
    """Return whether every word of `words`, including EOS if present, is possible after the words before it."""
    return all(
        words[place - 1 : place] != [EOS] and word in next_words(prompt, words[:place])
        for place, word in enumerate(words)
    )  # fmt: skip


def generate_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Return the first ``count`` rows of the seed's stream; a prompt repeats only after all others."""
    draw = random.Random(seed)
    rounds = itertools.chain.from_iterable(iter(lambda: draw.sample(all_prompts(), len(OLD_TOWN)), None))
    chosen = itertools.islice(rounds, count)
    return [{"prompt": prompt, "completion": " ".join(_walk(prompt, draw))} for prompt in chosen]


def _walk(prompt: str, draw: random.Random) -> list[str]:
    """Return the words of a random walk, without EOS."""
    while True:
        walk: list[str] = []
        while len(walk) < MAX_WORDS:
            steps = next_words(prompt, walk)
            word = draw.choices(list(steps), list(steps.values()))[0]
            if word == EOS:
                return walk
            walk.append(word)
