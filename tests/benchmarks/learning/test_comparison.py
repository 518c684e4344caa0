"""The tools of `comparison`: the truth of its task, the excess error, the intervals."""

import pytest
import torch
from scipy import stats

from tests.benchmarks.learning import walks
from tests.benchmarks.learning.harness import paired_difference
from tests.benchmarks.learning.measures import excess_error
from tests.benchmarks.learning.words import EOS


@pytest.mark.slow
def test_rows_are_walks_and_changed_rows_are_not():
    rows = walks.generate_rows(400, seed=3)
    assert len({row["prompt"] for row in rows[: len(walks.OLD_TOWN)]}) == len(walks.OLD_TOWN)
    for row in rows[::4]:
        words = [*row["completion"].split(), EOS]
        assert len(words) <= walks.MAX_WORDS and walks.is_walk(row["prompt"], words)
        assert walks.is_walk(row["prompt"], words[:-1]) and not walks.is_walk(row["prompt"], [*words, walks.SQUARE])
        for place in range(len(words)):
            possible = walks.next_words(row["prompt"], words[:place])
            assert sum(possible.values()) == pytest.approx(1)
            for wrong in set(walks.WORDS) - set(possible):
                assert not walks.is_walk(row["prompt"], [*words[:place], wrong])


def test_roads_are_shared_by_all_keys_and_lanes_are_not():
    first_steps = [
        {next(iter(steps)) for (_, here), steps in walks.OLD_TOWN.items() if here == place} for place in walks.OLD_WORDS
    ]
    assert sum(len(steps) == 1 for steps in first_steps) == walks.QUARTERS * (walks.PLACES - walks.JUNCTIONS)
    assert len({tuple(steps) for steps in walks.OLD_TOWN.values()}) > 80


def test_excess_error_is_what_the_students_text_adds():
    reference = torch.tensor([[0.1, 0.1, 0.1, 0.1], [0.1, 0.1, 0.0, 0.0]])
    own = torch.tensor([[0.1, 0.2, 0.4, 0.0], [0.1, 0.2, 0.4, 0.8]])
    assert excess_error(reference, reference, 3) == pytest.approx(0.0)
    assert [excess_error(own, reference, length) for length in (1, 2, 3, 4)] == pytest.approx(
        [0.0, 0.5, 0.7 / 0.25 - 1, 1.1 / 0.3 - 1]
    )


def test_intervals_are_those_of_students_t():
    ours, others = [1.0, 2.0, 4.0, 3.0], [0.5, 2.5, 2.0, 2.0]
    mean, half = paired_difference(ours, others)
    low, high = stats.ttest_rel(ours, others).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((low, high))
