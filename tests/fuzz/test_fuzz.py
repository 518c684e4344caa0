"""Readers answer damaged and hostile inputs with their own errors; `python -m tests.fuzz` tries many more."""

import pytest

from tests.fuzz.run import run_target
from tests.fuzz.targets import TARGETS

INPUTS = 6_000
"""Number of inputs of all targets together."""


@pytest.mark.parametrize("kind", TARGETS, ids=lambda kind: kind.name)
def test_damaged_and_hostile_inputs_are_refused_with_the_readers_own_errors(kind, tmp_path):
    count = run_target(kind, tmp_path, INPUTS * kind.share // sum(target.share for target in TARGETS), seed=1)
    assert not count.misses, str(count)
    assert count.accepted + count.refused > 0
