"""Rows of a step: those that a checkpoint holds, and those that a method returns."""

import asyncio

import numpy as np
import pytest

from rayk.config import DataConfig, DataSource
from rayk.data.batches import BatchSampler, collate
from rayk.data.tokenizing import tokenize
from rayk.data.views import RowViews
from rayk.methods import Experience
from rayk.models import load_tokenizer
from rayk.rollouts import Rollout
from rayk.rollouts.packed_rows import pack_row
from rayk.signals.sequence import TokenSequence
from rayk.training.experiences import ExperienceSource
from tests.runs import write_rows


@pytest.fixture
def stored(tmp_path, tiny_student):
    """A source, and the rows of two later steps in a checkpoint after 6 steps, place by place."""
    data = DataSource(path=str(write_rows(tmp_path / "rows.jsonl", 12)))
    table = tokenize(data, DataConfig(train=data), load_tokenizer(tiny_student))
    source = object.__new__(ExperienceSource)
    source._table, source._sampler = table, BatchSampler(table.lengths, 4, 0, 10)
    source._rank, source._world, source._pad_id, source._sampled = 0, 1, 0, {}
    rows = []
    for step in (6, 7):
        for place, origin in enumerate(source._sampler.rows(step)):
            written = Rollout(**vars(table[int(origin)]), logprobs=np.zeros(3, np.float32), version=6)
            rows.append({"step": step, "place": place, "row": pack_row(written)})
    return source, rows


def test_complete_steps_are_restored(stored):
    source, rows = stored
    source.load_state(6, rows)
    assert sorted(source._sampled) == [6, 7]
    assert all(isinstance(row, Rollout) and row.version == 6 for row in source._sampled[7].sequences)


@pytest.mark.parametrize("lost", range(4))
def test_an_incomplete_step_is_generated_anew(stored, lost):
    source, rows = stored
    source.load_state(6, [row for row in rows if (row["step"], row["place"]) != (7, lost)])
    assert sorted(source._sampled) == [6]


def test_rows_that_are_no_examples_reach_the_method_unchanged():
    source = object.__new__(ExperienceSource)
    source._views = RowViews({"hinted": object()})
    rows = [TokenSequence(np.arange(n, dtype=np.int32), np.arange(n) > 0) for n in (3, 5)]

    async def prepare(batch):
        return Experience(batch, None)

    indices, experience = asyncio.run(source._prepare_usable(collate(rows, 0), prepare))
    assert indices == [0, 1]
    assert list(experience.batch.sequences) == rows
