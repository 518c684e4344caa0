"""A route scores each row with the row's own teacher, whatever the support."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch

from rayk.config import RouteConfig, parse_config
from rayk.config.support import Hidden, Logprob, Requested, Sampled, TopK
from rayk.data.examples import Example
from rayk.errors import InputError, UnusableSignal
from rayk.signals.batch import concatenate
from rayk.teachers import Ensemble, Route
from tests.teachers.helpers import EngineScorer, random_sequences

ROUTE = RouteConfig(field="domain", teachers={"math": "one", "code": "two"}, default="both")


@pytest.fixture(scope="module")
def teachers(tiny_teacher, second):
    one, two = EngineScorer(tiny_teacher), EngineScorer(second)
    return {"one": one, "two": two, "both": Ensemble([one, two], [1, 1], "logits")}


def example(sequence, **fields):
    requested = np.tile(np.arange(20, 23, dtype=np.int32), (sequence.counted_tokens, 1))
    return Example(sequence.input_ids, sequence.counted, requested, 0, "rows.jsonl, line 7", fields)


def rows_of(*domains):
    return [example(one, domain=name) for one, name in zip(random_sequences(len(domains)), domains, strict=True)]


@pytest.mark.parametrize(
    "support", [TopK(5, (1.0, 2.0)), Requested(4), Sampled(6), Hidden("float32"), Logprob()], ids=lambda one: one.kind
)
def test_signals_are_those_of_the_rows_own_teacher(teachers, support):
    rows = rows_of("math", "code", "code", "math")
    signals = asyncio.run(Route(ROUTE, teachers).ascore(rows, support))
    alone = [
        asyncio.run(teachers["two" if i in (1, 2) else "one"].ascore([row], support)) for i, row in enumerate(rows)
    ]
    assert signals.support == support and len(signals) == 4
    for name in ("target_logprobs", "logprobs", "log_tails", "entropies"):
        if getattr(signals, name) is not None:
            expected = torch.cat([getattr(one, name) for one in alone])
            torch.testing.assert_close(getattr(signals, name), expected, atol=1e-4, rtol=1e-4)
    if isinstance(support, Hidden):
        torch.testing.assert_close(signals.logits(), torch.cat([one.logits() for one in alone]), atol=1e-4, rtol=1e-4)
        assert len(signals.heads) == 2 and signals.hidden.shape[1] == 32
    else:
        assert signals.ids is None or torch.equal(signals.ids, concatenate(alone).ids)


@pytest.mark.parametrize("support", [TopK(5), Hidden("float32")], ids=lambda one: one.kind)
def test_an_ensemble_is_routed_to_as_well_and_its_signals_do_not_depend_on_other_rows(teachers, support):
    rows, route = rows_of("math", None, "other", "code"), Route(ROUTE, teachers)
    mixed = asyncio.run(route.ascore(rows, support)).select([1, 2])
    alone = asyncio.run(route.ascore(rows[1:3], support))
    if isinstance(support, TopK):
        assert mixed.support == alone.support == support and torch.equal(mixed.ids, alone.ids)
        torch.testing.assert_close(mixed.logprobs, alone.logprobs, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(mixed.log_tails, alone.log_tails, atol=1e-4, rtol=1e-4)
    else:
        torch.testing.assert_close(mixed.logits(), alone.logits(), atol=1e-4, rtol=1e-4)


def test_unusable_rows_are_named_by_their_place_in_the_batch(teachers):
    class Faulty:
        vocab_size = 300

        async def ascore(self, batch, support=None):
            raise UnusableSignal("The second row is unusable.", [1])

    route = Route(ROUTE, teachers | {"two": Faulty()})
    with pytest.raises(UnusableSignal) as caught:
        asyncio.run(route.ascore(rows_of("code", "math", "math", "code"), TopK(5)))
    assert caught.value.rows == [3]


def test_a_row_without_a_teacher_is_named_with_the_field(teachers):
    route = Route(ROUTE.model_copy(update={"default": None}), teachers)
    with pytest.raises(InputError, match="rows.jsonl, line 7 has no value in the field 'domain', by which route.field"):
        asyncio.run(route.ascore([replace(rows_of("math")[0], fields={})], TopK(5)))
    with pytest.raises(InputError, match="rows.jsonl, line 7 has 'poetry' in its field 'domain', which chooses no"):
        asyncio.run(route.ascore(rows_of("poetry"), TopK(5)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"kind": "logit_kd", "normalize": "teachers"}, "route": None}, "but this run has no 'route'"),
        ({"method": {"kind": "supervised", "normalize": "teachers"}}, "but method 'supervised' queries no teacher"),
        (
            {"method": {"kind": "on_policy", "teacher_written": 1, "student_fraction": 0}, "ensemble": {},
             "route": {"field": "f", "teachers": {"a": "one"}, "default": "ensemble"}},
            "method.teacher_written needs one teacher that generates for each row",
        ),
        ({"method": {"kind": "minillm"}, "ensemble": {}, "route": None}, "method.teacher_share needs one teacher that"),
        ({"route": {"field": "f", "teachers": {"a": "one"}, "default": "three"}}, "route.default: 'three' is none of"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_a_route_are_refused(changes, message):
    values = {
        "teachers": [{"name": "one", "model": "m"}, {"name": "two", "model": "m"}],
        "route": {"field": "f", "teachers": {"a": "one", "b": "two"}}, "method": {"kind": "logit_kd"},
        "student": {"model": "m"}, "data": {"train": {"path": "p"}},
    }  # fmt: skip
    with pytest.raises(InputError) as caught:
        parse_config(values | changes)
    assert message in str(caught.value)
