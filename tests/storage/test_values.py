"""Nested values with tensors survive JSON."""

import json

import pytest
import torch

from rayk.storage.values import join_tensors, split_tensors


def test_values_come_back_as_they_were():
    value = {
        "number": 1, "real": 0.1 + 0.2, "text": "ä", "nothing": None, "truth": True, "infinite": float("inf"),
        "tuple": (1, (2,)), "list": [1, [2]], "set": {1, 2}, "bytes": b"\x00\xff", 3: "a number as key",
        ("pair", 1): {"$": "the tag itself"}, "tensors": [torch.arange(3), {"half": torch.ones(2).bfloat16()}],
    }  # fmt: skip
    plain, tensors = split_tensors(value, "rank-3.")
    assert list(tensors) == ["rank-3.0", "rank-3.1"]
    back = join_tensors(json.loads(json.dumps(plain)), tensors)
    assert torch.equal(back["tensors"][0], value["tensors"][0])
    assert back["tensors"][1]["half"].dtype == torch.bfloat16
    assert {k: v for k, v in back.items() if k != "tensors"} == {k: v for k, v in value.items() if k != "tensors"}
    assert list(back) == list(value)


def test_tensors_are_copied():
    tensor = torch.zeros(2)
    _, tensors = split_tensors(tensor)
    tensor += 1
    assert torch.equal(tensors["0"], torch.zeros(2))


def test_other_values_are_refused():
    with pytest.raises(TypeError, match="it contains a Generator"):
        split_tensors({"random": torch.Generator()})
