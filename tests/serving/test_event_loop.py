"""An interrupted wait for background work ends after the work has cleaned up."""

import asyncio
import signal
import threading

import pytest

from rayk.serving.event_loop import run_until_complete


def test_interrupted_wait_lets_the_work_clean_up():
    cleaned_up = []

    async def work():
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.2)
            cleaned_up.append(True)

    main_thread = threading.main_thread().ident
    threading.Timer(0.2, lambda: signal.pthread_kill(main_thread, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        run_until_complete(work())
    assert cleaned_up == [True]


def test_results_and_errors_are_passed_on():
    async def work(value):
        await asyncio.sleep(0)
        return 1 / value

    assert run_until_complete(work(2)) == 0.5
    with pytest.raises(ZeroDivisionError):
        run_until_complete(work(0))
