"""How long a client waits, on a clock that the tests set."""

import pytest

from rayk.serving import patience
from rayk.serving.patience import Patience


class Clock:
    now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(patience, "time", clock)
    return clock


def test_only_time_without_an_answer_counts(clock):
    waiting, began = Patience(30), clock.now
    clock.now += 20
    assert waiting.remaining(began) == 10
    waiting.note_answer("score", 5)  # to another request
    assert waiting.remaining(began) == 30
    clock.now += 31
    assert waiting.remaining(began) == -1
    assert waiting.remaining(clock.now) == 30


def test_the_time_in_which_a_replica_loads_does_not_count_up_to_twice_the_first_load(clock):
    waiting, began = Patience(30, load_seconds=50), clock.now
    clock.now += 30
    for _ in range(100):
        assert waiting.remaining(began) == 0
        assert waiting.note_loading()
        assert waiting.note_loading()  # by another request at the same time
        assert waiting.remaining(began) == 1
        clock.now += 1
    assert not waiting.note_loading()
    waiting.note_answer("score", 5)
    assert waiting.remaining(began) == 30
    clock.now += 31
    assert waiting.note_loading()
    assert not Patience(30).note_loading()


def test_another_replica_is_asked_after_thrice_the_slowest_answer_but_in_time(clock):
    waiting = Patience(300)
    assert waiting.ask_again_seconds("score") == 100
    waiting.note_answer("score", 0.1)
    assert waiting.ask_again_seconds("score") == 10
    waiting.note_answer("score", 7)
    assert waiting.ask_again_seconds("score") == 21
    assert waiting.ask_again_seconds("generate") == 100
    waiting.note_answer("score", 70)
    assert waiting.ask_again_seconds("score") == 100
    assert Patience(9).ask_again_seconds("score") == 3
