"""Deduplication of instructions with ROUGE-L F >= 0.7: `RougeIndex` against a pairwise loop over rouge-score.

    python -m tests.benchmarks.speed.dedupe [--count 5000] [--large 50000] [--sample 100] [--whole]

A grammar of tasks, subjects, audiences and constraints generates the instructions, with word frequencies as uneven as
in real ones; three in ten are an earlier instruction with a few words changed. The loop compares each instruction with
every kept one, as Self-Instruct's code does: once as in that code (both texts tokenized in every comparison), and once
with stored tokens, which is the best that a pairwise loop can do with that library. The loop runs for a sample of
instructions spread over the list, and its time is scaled up; `--whole` runs all of it. Both must make the same
decisions. How to read it: "times as long" is the speed-up of `RougeIndex`.
"""

import argparse
import os
import random
import resource
import time

from rouge_score import rouge_scorer, scoring

from rayk.environment import set_threading

set_threading()

from rayk.text import RougeIndex  # noqa: E402
from rayk.text.words import words  # noqa: E402
from tests.benchmarks.machine import machine  # noqa: E402

THRESHOLD = 0.7
CHANGED_SHARE = 0.3

TASKS = """Write a short story about|Explain|Summarize the main ideas of
Compare and contrast two views of|List the benefits of|Give three practical tips for dealing with
Describe the history of|Create a quiz on|Draft an email concerning|Translate a paragraph on
Classify the following statements about|Suggest improvements to|Write a poem inspired by
What are the most common mistakes in|Identify the key challenges of|Outline a lesson plan for teaching
Generate a list of questions about|Rewrite the given passage on|Calculate the yearly cost of
Design an experiment to test|Find the odd one out among these examples of|Argue for or against
Tell me how to prepare for|Provide a step by step guide to|Edit this text for clarity; it deals with
How would you explain|Given a customer review of|Come up with a catchy slogan for
Predict what will happen next in a discussion of|Brainstorm names for"""
KINDS = """renewable small local modern ancient digital public private urban rural northern tropical medieval
electric organic personal national seasonal artificial natural classical popular military industrial domestic
commercial marine royal folk open hidden rare cheap luxury wooden mobile remote collaborative experimental
traditional volunteer regional quiet antique portable frozen solar"""
THINGS = """energy markets|libraries|gardens|orchestras|bridges|novels|startups|schools|hospitals|rivers
recipes|vaccines|volcanoes|poems|maps|bicycles|museums|contracts|languages|computers|elections|trains
forests|bakeries|satellites|markets|puzzles|festivals|budgets|wolves|friendships|theorems|paintings
harbours|games|newspapers|kitchens|shoes|courts|deserts|insects|robots|stadiums|songs|farms|churches
interviews|glaciers|coins|clocks|factories|villages|dialects|batteries|films|airports|cathedrals
holidays|microscopes|tunnels|dances|podcasts|spices|fisheries|earthquakes|telescopes|uniforms|protests
lighthouses|fossils|comets|pensions|proverbs|queues|archives"""
AUDIENCES = """| for a ten year old child| for busy parents| to a new colleague| in simple language
 for an audience of experts| for tourists| as if you were a lawyer| for my grandmother
 to high school students| for people on a tight budget| from the point of view of a sailor"""
CONSTRAINTS = """|. Keep it under one hundred words.|. Use at least two examples.
. Do not use any adjectives.|, and give your reasons.|. Answer with a numbered list.
. Make it rhyme.|. Mention one thing that most people get wrong.| and explain each step.|?
. Begin with a question.|, then state which one you prefer.|. Include a short title.
. Write in a formal tone."""


def options(text: str) -> list[str]:
    """Split the grammar's choices; the first ones are drawn most often."""
    return [option for line in text.split("\n") for option in line.split("|")]


def generate_instructions(count: int, seed: int = 0) -> list[str]:
    """Generate `count` instructions, deterministically from `seed`."""
    draw = random.Random(seed)
    kinds, parts = KINDS.split(), [options(text) for text in (TASKS, THINGS, AUDIENCES, CONSTRAINTS)]

    def choose(among: list[str]) -> str:
        return draw.choices(among, [1 / (rank + 3) for rank in range(len(among))])[0]

    def write() -> str:
        task, thing, audience, constraint = map(choose, parts)
        subject = f"{draw.choice(kinds)} {thing}"
        if draw.random() < 0.6:
            relation = draw.choice(["and", "in", "without", "near", "after"])
            subject += f" {relation} {draw.choice(kinds)} {choose(parts[1])}"
        if draw.random() < 0.5:
            subject += f" {draw.choice(['of', 'from', 'before', 'since'])} {draw.randrange(1000, 2030)}"
        return f"{task} {subject}{audience}{constraint}"

    def change(text: str) -> str:
        changed = text.split()
        for _ in range(draw.randint(1, 4)):
            changed[draw.randrange(len(changed))] = draw.choice(kinds)
        return " ".join(changed)

    texts: list[str] = []
    while len(texts) < count:
        texts.append(change(draw.choice(texts)) if texts and draw.random() < CHANGED_SHARE else write())
    return texts


def time_index(texts: list[str]) -> tuple[list[bool], float]:
    """Return for each text whether `RougeIndex` keeps it, and the seconds that took."""
    begun = time.perf_counter()
    index, kept = RougeIndex(THRESHOLD), []
    for text in texts:
        kept.append(index.find(text) is None)
        if kept[-1]:
            index.add(text)
    return kept, time.perf_counter() - begun


def f_measure_of_tokens(first: list[str], second: list[str]) -> float:
    """Return rouge-score's ROUGE-L F of two lists of tokens."""
    score: scoring.Score = rouge_scorer._score_lcs(first, second)
    return score.fmeasure


def time_loop(texts: list[str], kept: list[bool], places: list[int], tokens_kept: bool) -> float:
    """Return the seconds that the pairwise loop needs for the texts at `places`; assert that it decides as `kept`."""
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    tokens = [words(text) for text in texts]
    begun = time.perf_counter()
    for place in places:
        pool = [earlier for earlier in range(place) if kept[earlier]]
        if tokens_kept:
            scores = [f_measure_of_tokens(tokens[place], tokens[earlier]) for earlier in pool]
        else:
            scores = [scorer.score(texts[place], texts[earlier])["rougeL"].fmeasure for earlier in pool]
        # Rounded, because some 7/10 are 0.7000000000000001 or 0.6999999999999998 in floating point.
        assert (round(max(scores, default=0.0), 9) < THRESHOLD) == kept[place], texts[place]
    return time.perf_counter() - begun


def count_comparisons(kept: list[bool], places: list[int]) -> int:
    """Return the number of pairs that the loop compares for the texts at `places`."""
    before = [0]
    for is_kept in kept:
        before.append(before[-1] + is_kept)
    return sum(before[place] for place in places)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--large", type=int, default=50_000)
    parser.add_argument("--sample", type=int, default=100, help="number of instructions that the loop runs for")
    parser.add_argument("--whole", action="store_true", help="run the loop for every instruction")
    given = parser.parse_args()
    print(f"{machine()}, load before {os.getloadavg()[0]:.1f}")
    texts = generate_instructions(given.count)
    lengths = sorted(len(words(text)) for text in texts)
    kept, seconds = time_index(texts)
    print(f"{given.count:,} instructions of {lengths[0]} to {lengths[-1]} words (median {lengths[len(lengths) // 2]}), "
          f"{sum(kept):,} kept; one process each")  # fmt: skip
    print(f"  RougeIndex                                     {seconds:9.2f} s", flush=True)
    every = list(range(given.count))
    places = every if given.whole else every[given.sample // 2 :: max(1, given.count // given.sample)]
    scale = count_comparisons(kept, every) / count_comparisons(kept, places)
    how = "measured whole" if given.whole else f"{len(places)} instructions measured, times {scale:.1f}"
    for name, tokens_kept in (("rouge-score, pairwise, tokens kept", True), ("rouge-score, pairwise", False)):
        spent = time_loop(texts, kept, places, tokens_kept) * scale
        print(f"  {name:46} {spent:9.2f} s ({how}): {spent / seconds:,.0f} times as long; same decisions", flush=True)
    if given.large:
        kept, seconds = time_index(generate_instructions(given.large))
        gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"{given.large:,} instructions, {sum(kept):,} kept: RougeIndex {seconds:.1f} s; process {gigabytes:.2f} GiB"
        )


if __name__ == "__main__":
    main()
