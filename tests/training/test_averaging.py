"""Means over tokens, sequences and teachers, and means by group, are those of a dense computation, however a step is
cut into micro-batches and workers."""

import numpy as np
import pytest
import torch

from rayk.config import RouteConfig
from rayk.data.batches import collate
from rayk.data.examples import Example
from rayk.methods import Experience
from rayk.training.averaging import Averaging, Quarters, TeacherGroups
from rayk.training.ranks import Ranks

ROUTE = RouteConfig(field="domain", teachers={"a": "math", "b": "code", "c": "idle"})
DOMAINS, LENGTHS = "abaab", (1, 6, 4, 0, 9)


def make_experience():
    """Rows of two of the three teachers, the fourth without a counted token, with a value per token as their column."""
    rows = []
    for domain, length in zip(DOMAINS, LENGTHS, strict=True):
        ids = np.arange(3 + length, dtype=np.int32)
        rows.append(Example(ids, ids >= 3, None, 3, fields={"domain": domain}))
    values = torch.randn(sum(LENGTHS), generator=torch.Generator().manual_seed(0))
    return Experience(collate(rows, 0), columns={"value": values})


def by_row():
    return list(make_experience().columns["value"].double().split(list(LENGTHS)))


def of_teacher(*domains):
    return torch.cat([part for part, domain in zip(by_row(), DOMAINS, strict=True) if domain in domains])


DENSE = {
    "tokens": torch.cat(by_row()).mean(),
    "sequences": torch.stack([part.mean() for part in by_row() if len(part)]).mean(),
    "teachers": (of_teacher("a").mean() + of_teacher("b").mean()) / 2,
}


class Worker(Ranks):
    """A worker whose sums are replaced by the known sums over all workers, as an all-reduce returns them."""

    def __init__(self, totals):
        super().__init__(0, 1, 1)
        self.totals = totals

    def sums(self, values):
        self.own = values
        return self.totals or values


def averages(normalization):
    return Averaging(normalization, TeacherGroups(ROUTE), [Quarters("value")])


@pytest.mark.parametrize("normalization", DENSE)
@pytest.mark.parametrize("shares", [[[0, 1, 2, 3, 4]], [[3, 0], [1, 4, 2]]], ids=["one worker", "two workers"])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_micro_batches_of_all_workers_add_up_to_the_dense_mean(normalization, shares, size):
    experience, averaging = make_experience(), averages(normalization)
    counted = []
    for share in shares:
        averaging.count(experience.select(share), None, worker := Worker(None))
        counted.append(worker.own)
    totals = [sum(each) for each in zip(*counted, strict=True)]
    loss, sums = torch.zeros(()), dict[str, torch.Tensor]()
    for share in shares:
        part = experience.select(share)
        [whole] = averaging.count(part, None, Worker(totals))
        for start in range(0, len(share), size):
            micro_batch = part.select(list(range(len(share)))[start : start + size])
            values = micro_batch.columns["value"]
            loss = loss + whole.of(micro_batch).share(values)
            for name, total in whole.of(micro_batch).sums({"value": values}).items():
                sums[name] = sums.get(name, torch.zeros(())) + total
    assert loss.item() == pytest.approx(DENSE[normalization].item(), rel=1e-5)
    means = {name: mean for name, (mean, _) in whole.means({name: float(s) for name, s in sums.items()}).items()}
    places = [torch.arange(len(part)) * 4 // max(len(part), 1) for part in by_row()]
    quarters = [torch.cat([part[place == q] for part, place in zip(by_row(), places, strict=True)]) for q in range(4)]
    expected = {
        "value": DENSE[normalization],
        "teacher/math/value": of_teacher("a").mean(),
        "teacher/code/value": of_teacher("b").mean(),
        **{f"distance_quarter_{q + 1}": part.mean() for q, part in enumerate(quarters)},
    }
    assert means == {name: pytest.approx(value.item(), rel=1e-5) for name, value in expected.items()}


def test_quarters_of_a_row():
    experience = make_experience()
    found = Quarters("loss").of_tokens(experience).split(list(LENGTHS))
    assert [part.tolist() for part in found] == [[0], [0, 0, 1, 2, 2, 3], [0, 1, 2, 3], [], [0, 0, 0, 1, 1, 2, 2, 3, 3]]


def test_an_auxiliary_experience_is_averaged_over_its_own_tokens():
    experience = make_experience()
    text = experience.select([1, 2])
    _, whole = averages("teachers").count(experience, text, Ranks(0, 1, 1))
    values = text.columns["value"]
    assert whole.of(text).share(values).item() == pytest.approx(values.mean().item())
    assert list(whole.of(text).sums({"loss": values})) == ["loss"]
