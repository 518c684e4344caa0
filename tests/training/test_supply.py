"""Rows sampled ahead come back from a checkpoint whole, or are written anew."""

import numpy as np
import pytest

from rayk.config import DataConfig, DataSource
from rayk.data.batches import BatchSampler
from rayk.data.tokenizing import tokenize
from rayk.models import load_tokenizer
from rayk.rollouts import Rollout
from rayk.rollouts.packed_rows import pack_row
from rayk.training.supply import Supply
from tests.runs import write_rows


@pytest.fixture
def kept(tmp_path, tiny_student):
    """A supply, and what a checkpoint after 6 steps holds of two later ones, place by place."""
    source = DataSource(path=str(write_rows(tmp_path / "rows.jsonl", 12)))
    table = tokenize(source, DataConfig(train=source), load_tokenizer(tiny_student))
    supply = object.__new__(Supply)
    supply._table, supply._sampler = table, BatchSampler(table.lengths, 4, 0, 10)
    supply._rank, supply._world, supply._pad_id, supply._sampled = 0, 1, 0, {}
    rows = []
    for step in (6, 7):
        for place, origin in enumerate(supply._sampler.rows(step)):
            written = Rollout(**vars(table[int(origin)]), logprobs=np.zeros(3, np.float32), version=6)
            rows.append({"step": step, "place": place, "row": pack_row(written)})
    return supply, rows


def test_whole_steps_are_taken_up(kept):
    supply, rows = kept
    supply.load_state(6, rows)
    assert sorted(supply._sampled) == [6, 7]
    assert all(isinstance(row, Rollout) and row.version == 6 for row in supply._sampled[7].sequences)


@pytest.mark.parametrize("lost", range(4))
def test_a_step_of_which_a_worker_had_nothing_yet_is_written_anew(kept, lost):
    supply, rows = kept
    supply.load_state(6, [each for each in rows if (each["step"], each["place"]) != (7, lost)])
    assert sorted(supply._sampled) == [6]
