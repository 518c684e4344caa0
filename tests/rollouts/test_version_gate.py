"""Each step samples with exactly the version it requires, at any speed of learner and samplers."""

import asyncio
import random

import pytest

from rayk.rollouts import VersionGate


async def run_steps(steps: int, max_staleness: int, seed: int, first: int = 0, sampled: int = 0) -> dict[int, int]:
    """Return the version with which each step sampled; the learner and the samplers have random speeds."""
    generator = random.Random(seed)
    gate = VersionGate(first, first + sampled, steps - 1, max_staleness)
    versions: dict[int, int] = {}
    busy = 0

    async def sample(step: int) -> None:
        nonlocal busy
        await asyncio.sleep(generator.random() / 1000)
        async with gate.turn(step):
            busy += 1
            assert busy == 1
            versions[step] = gate.version
            await asyncio.sleep(generator.random() / 1000)
            assert versions[step] == gate.version
            busy -= 1

    tasks = {step: asyncio.create_task(sample(step)) for step in range(first + sampled, steps)}
    for step in range(first, steps):
        if step in tasks:
            await tasks[step]
        await asyncio.sleep(generator.random() / 1000)
        await gate.wait_for_samplers()
        await gate.advance()
    return versions


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("max_staleness", [0, 1, 2, 5])
def test_every_step_samples_with_its_version(max_staleness, seed):
    versions = asyncio.run(run_steps(8, max_staleness, seed))
    assert versions == {step: max(0, step - max_staleness) for step in range(8)}


def test_resumed_run_keeps_the_versions():
    versions = asyncio.run(run_steps(9, 2, seed=0, first=4, sampled=2))
    assert versions == {step: step - 2 for step in range(6, 9)}


def test_failed_step_ends_its_turn():
    async def main() -> int:
        gate = VersionGate(0, 0, 1, 1)
        with pytest.raises(RuntimeError):
            async with gate.turn(0):
                raise RuntimeError
        async with gate.turn(1):
            pass
        await gate.wait_for_samplers()
        return gate.version

    assert asyncio.run(asyncio.wait_for(main(), 10)) == 0
