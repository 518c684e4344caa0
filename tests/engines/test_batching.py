import asyncio
import threading

import pytest

from rayk.engines.batching import MicroBatcher


class Recorder:
    """A run function that doubles its items and keeps the batches it was given; `gate` holds it up."""

    def __init__(self, refuse=()):
        self.batches = []
        self.gate = threading.Event()
        self.gate.set()
        self.started = threading.Event()
        self.refuse = refuse

    def __call__(self, key, items):
        self.batches.append((key, items))
        self.started.set()
        assert self.gate.wait(30)
        if any(item in self.refuse for item in items):
            raise ValueError(f"{items} refused")
        return [2 * item for item in items]


async def begun(recorder):
    await asyncio.to_thread(recorder.started.wait, 30)


def test_results_come_in_the_order_asked():
    async def main():
        batcher = MicroBatcher(Recorder(), budget_tokens=10)
        lengths = [7, 1, 5, 3, 9, 2, 2, 8]
        assert await batcher.submit("a", list(range(8)), lengths) == [2 * i for i in range(8)]
        assert await batcher.submit("a", [], []) == []

    asyncio.run(main())


def test_concurrent_callers_share_a_batch():
    run = Recorder()

    async def main():
        batcher = MicroBatcher(run, budget_tokens=100)
        results = await asyncio.gather(*(batcher.submit("a", [i], [10]) for i in range(6)))
        assert results == [[2 * i] for i in range(6)]

    asyncio.run(main())
    assert run.batches == [("a", [0, 1, 2, 3, 4, 5])]


def test_those_who_come_during_a_batch_share_the_next():
    run = Recorder()

    async def main():
        batcher = MicroBatcher(run, budget_tokens=100)
        run.gate.clear()
        first = asyncio.create_task(batcher.submit("a", [0], [1]))
        await begun(run)
        rest = [asyncio.create_task(batcher.submit("a", [i], [1])) for i in range(1, 5)]
        await asyncio.sleep(0)
        run.gate.set()
        assert await asyncio.gather(first, *rest) == [[2 * i] for i in range(5)]

    asyncio.run(main())
    assert [items for _, items in run.batches] == [[0], [1, 2, 3, 4]]


def test_keys_do_not_mix():
    run = Recorder()

    async def main():
        batcher = MicroBatcher(run, budget_tokens=100)
        await asyncio.gather(*(batcher.submit("ab"[i % 2], [i], [1]) for i in range(6)))

    asyncio.run(main())
    assert run.batches == [("a", [0, 2, 4]), ("b", [1, 3, 5])]


def test_padded_tokens_stay_within_the_budget():
    lengths = [9, 3, 3, 8, 2, 30, 1, 7, 9, 4, 4, 4]
    run = Recorder()

    async def main():
        await MicroBatcher(run, budget_tokens=18).submit("a", list(range(12)), lengths)

    asyncio.run(main())
    for _, items in run.batches:
        padded = max(lengths[i] for i in items) * len(items)
        assert padded <= 18 or items == [5], "only what is too long by itself goes over, and alone"
    assert sorted(i for _, items in run.batches for i in items) == list(range(12))


def test_a_batch_holds_what_is_near_in_length():
    run = Recorder()

    async def main():
        await MicroBatcher(run, budget_tokens=30).submit("a", list(range(6)), [10, 1, 9, 2, 10, 1])

    asyncio.run(main())
    assert [sorted(items) for _, items in run.batches] == [[0, 2, 4], [1, 3, 5]]


def test_the_oldest_never_starves():
    """A long item waits at most one batch, however many short ones keep coming."""
    run = Recorder()

    async def main():
        batcher = MicroBatcher(run, budget_tokens=20)
        run.gate.clear()
        shorts = [asyncio.create_task(batcher.submit("a", [0], [2]))]
        await begun(run)
        long = asyncio.create_task(batcher.submit("a", [-1], [20]))
        await asyncio.sleep(0)
        shorts += [asyncio.create_task(batcher.submit("a", [i], [2])) for i in range(1, 40)]
        await asyncio.sleep(0)
        run.gate.set()
        await asyncio.gather(long, *shorts)

    asyncio.run(main())
    assert run.batches[1] == ("a", [-1])


def test_an_error_reaches_only_those_in_its_batch():
    run = Recorder(refuse=[3])

    async def main():
        batcher = MicroBatcher(run, budget_tokens=2)
        callers = [batcher.submit("a", [i, i + 10], [1, 1]) for i in range(5)]
        return await asyncio.gather(*callers, return_exceptions=True)

    results = asyncio.run(main())
    assert [r for i, r in enumerate(results) if i != 3] == [[2 * i, 2 * i + 20] for i in (0, 1, 2, 4)]
    assert isinstance(results[3], ValueError)


def test_after_an_error_the_askers_other_items_are_not_run():
    run = Recorder(refuse=[0])

    async def main():
        batcher = MicroBatcher(run, budget_tokens=1)
        with pytest.raises(ValueError, match="refused"):
            await batcher.submit("a", [0, 1, 2, 3, 4], [1] * 5)
        assert await batcher.submit("a", [5], [1]) == [10]

    asyncio.run(main())
    ran = [items for _, items in run.batches]
    assert ran[0] == [0]
    assert ran[-1] == [5]
    assert len(ran) <= 3, "at most one more batch, that which began while the asker was being told"


def test_a_caller_that_leaves_costs_nothing():
    run = Recorder()

    async def main():
        batcher = MicroBatcher(run, budget_tokens=1)
        run.gate.clear()
        stays = asyncio.create_task(batcher.submit("a", [0], [1]))
        await begun(run)
        leaves = asyncio.create_task(batcher.submit("a", [1, 2, 3], [1, 1, 1]))
        also_stays = asyncio.create_task(batcher.submit("a", [4], [1]))
        await asyncio.sleep(0)
        leaves.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaves
        run.gate.set()
        assert await asyncio.gather(stays, also_stays) == [[0], [8]]
        assert batcher._waiting == []

    asyncio.run(main())
    assert [items for _, items in run.batches] == [[0], [4]]


def test_leaving_during_ones_own_batch_harms_no_companion():
    run = Recorder()

    async def main():
        batcher = MicroBatcher(run, budget_tokens=10)
        run.gate.clear()
        leaves = asyncio.create_task(batcher.submit("a", [1], [1]))
        stays = asyncio.create_task(batcher.submit("a", [2], [1]))
        await begun(run)
        leaves.cancel()
        await asyncio.sleep(0)
        run.gate.set()
        assert await stays == [4]
        assert await batcher.submit("a", [3], [1]) == [6]

    asyncio.run(main())


def test_an_idle_batcher_works_again_on_another_event_loop():
    batcher = MicroBatcher(Recorder(), budget_tokens=10)
    for _ in range(2):
        assert asyncio.run(batcher.submit("a", [1, 2], [1, 1])) == [2, 4]
