import asyncio
import threading

import pytest

from rayk.engines.batching import MicroBatcher


class Recorder:
    """A run function that doubles its items and records its batches; it waits while `gate` is closed."""

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


async def wait_for_batch(recorder):
    await asyncio.to_thread(recorder.started.wait, 30)


def test_results_keep_the_order_of_the_items():
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


def test_items_submitted_during_a_batch_share_the_next_one():
    run = Recorder()

    async def main():
        batcher = MicroBatcher(run, budget_tokens=100)
        run.gate.clear()
        first = asyncio.create_task(batcher.submit("a", [0], [1]))
        await wait_for_batch(run)
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
        assert padded <= 18 or items == [5], "only a single item may exceed the budget"
    assert sorted(i for _, items in run.batches for i in items) == list(range(12))


def test_a_batch_contains_items_of_similar_length():
    run = Recorder()

    async def main():
        await MicroBatcher(run, budget_tokens=30).submit("a", list(range(6)), [10, 1, 9, 2, 10, 1])

    asyncio.run(main())
    assert [sorted(items) for _, items in run.batches] == [[0, 2, 4], [1, 3, 5]]


def test_the_oldest_item_is_in_the_next_batch():
    """A long item waits for at most one batch, whatever number of short ones is submitted after it."""
    run = Recorder()

    async def main():
        batcher = MicroBatcher(run, budget_tokens=20)
        run.gate.clear()
        shorts = [asyncio.create_task(batcher.submit("a", [0], [2]))]
        await wait_for_batch(run)
        long = asyncio.create_task(batcher.submit("a", [-1], [20]))
        await asyncio.sleep(0)
        shorts += [asyncio.create_task(batcher.submit("a", [i], [2])) for i in range(1, 40)]
        await asyncio.sleep(0)
        run.gate.set()
        await asyncio.gather(long, *shorts)

    asyncio.run(main())
    assert run.batches[1] == ("a", [-1])


def test_an_error_is_raised_only_for_the_items_of_its_batch():
    run = Recorder(refuse=[3])

    async def main():
        batcher = MicroBatcher(run, budget_tokens=2)
        callers = [batcher.submit("a", [i, i + 10], [1, 1]) for i in range(5)]
        return await asyncio.gather(*callers, return_exceptions=True)

    results = asyncio.run(main())
    assert [r for i, r in enumerate(results) if i != 3] == [[2 * i, 2 * i + 20] for i in (0, 1, 2, 4)]
    assert isinstance(results[3], ValueError)


def test_after_an_error_the_callers_other_items_are_not_run():
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
    assert len(ran) <= 3, "at most one more batch, started before the caller received the error"


def test_nothing_is_computed_for_a_cancelled_caller():
    run = Recorder()

    async def main():
        batcher = MicroBatcher(run, budget_tokens=1)
        run.gate.clear()
        waits = asyncio.create_task(batcher.submit("a", [0], [1]))
        await wait_for_batch(run)
        cancelled = asyncio.create_task(batcher.submit("a", [1, 2, 3], [1, 1, 1]))
        also_waits = asyncio.create_task(batcher.submit("a", [4], [1]))
        await asyncio.sleep(0)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        run.gate.set()
        assert await asyncio.gather(waits, also_waits) == [[0], [8]]
        assert batcher._waiting == []

    asyncio.run(main())
    assert [items for _, items in run.batches] == [[0], [4]]


def test_cancellation_during_a_batch_affects_no_other_caller():
    run = Recorder()

    async def main():
        batcher = MicroBatcher(run, budget_tokens=10)
        run.gate.clear()
        cancelled = asyncio.create_task(batcher.submit("a", [1], [1]))
        waits = asyncio.create_task(batcher.submit("a", [2], [1]))
        await wait_for_batch(run)
        cancelled.cancel()
        await asyncio.sleep(0)
        run.gate.set()
        assert await waits == [4]
        assert await batcher.submit("a", [3], [1]) == [6]

    asyncio.run(main())


def test_an_idle_batcher_works_on_another_event_loop():
    batcher = MicroBatcher(Recorder(), budget_tokens=10)
    for _ in range(2):
        assert asyncio.run(batcher.submit("a", [1, 2], [1, 1])) == [2, 4]


def test_a_batch_that_does_not_advance_is_noticed():
    async def main():
        recorder = Recorder()
        recorder.gate.clear()
        batcher = MicroBatcher(recorder, budget_tokens=10)
        assert batcher.stalled_seconds == 0
        waiting = asyncio.create_task(batcher.submit("a", [1], [1]))
        await wait_for_batch(recorder)
        await asyncio.sleep(0.05)
        stalled = batcher.stalled_seconds
        assert stalled > 0.04
        batcher.note_progress()
        assert batcher.stalled_seconds < stalled
        recorder.gate.set()
        assert await waiting == [2]
        assert batcher.stalled_seconds == 0
        batcher.note_progress()  # after the batch
        assert batcher.stalled_seconds == 0

    asyncio.run(main())
