"""Marks on fields decide which settings are local paths and which may change when a run is resumed."""

import pytest

from rayk.config import RunConfig, difference
from rayk.config.base import LocalPath, Placement, Selection, StoragePath
from rayk.config.marks import map_places, marked_fields


@pytest.mark.parametrize(
    ("mark", "marked", "unmarked"),
    [
        (LocalPath, ["student.model", "teachers.model", "data.train.path", "synthesis.seed_tasks"], ["output", "name"]),
        (StoragePath, ["cache.path", "training.checkpoints"], ["data.train.path"]),
        (
            Placement,
            ["output", "training.workers", "teachers.engine.device", "teachers.replicas", "rollouts.kind", "evaluation",
             "synthesis.student.engine.threads", "student.gradient_checkpointing"],
            ["seed", "method", "training.batch_size", "teachers.engine.dtype", "teachers.model"],
        ),
        (Selection, ["synthesis.filters", "synthesis.keep", "synthesis.threshold"], ["synthesis.samples"]),
    ],
)  # fmt: skip
def test_marks_are_found_at_every_depth(mark, marked, unmarked):
    found = marked_fields(RunConfig, mark)
    assert found.keys() >= set(marked)
    assert not found.keys() & set(unmarked)


def test_texts_are_replaced_at_their_places():
    values = {"a": [{"b": "x", "c": "x"}, {"b": None}], "b": "x"}
    assert map_places(values, {"a.b"}, lambda place, text: f"{place}={text}") == {
        "a": [{"b": "a.b=x", "c": "x"}, {"b": None}], "b": "x",
    }  # fmt: skip


def test_the_first_difference_is_named_without_the_ignored_ones():
    before = {"a": 1, "b": {"c": [{"d": 1, "e": 2}]}}
    now = {"a": 2, "b": {"c": [{"d": 1, "e": 3}]}}
    assert difference(before, now, set()) == "a"
    assert difference(before, now, {"a"}) == "b.c.e"
    assert difference(before, now, {"a", "b.c.e"}) is None
    assert difference(before, {"a": 1}, set()) == "b"
