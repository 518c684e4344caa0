"""`rayk status` describes a run at each stage from the files in its directory."""

import json
import re
import time

import pytest

from rayk.commands.status import follow, status
from rayk.errors import InputError
from rayk.synthesis.store import CompletionStore, StoredCompletion
from tests.checkpoints import write_checkpoint
from tests.report.test_report import make_run


def ended(folder, seconds_ago):
    """Add the time at which each step ended, half a second apart."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row["ended_at"] = time.time() - seconds_ago - 0.5 * (rows[-1]["step"] - row["step"])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_an_unfinished_run(tmp_path):
    folder = make_run(tmp_path / "kd", kd=True, steps=45, finished=False)
    ended(folder, seconds_ago=180)
    write_checkpoint(str(folder / "checkpoints"), 40)
    [text] = status(folder)
    assert text["run"] == "kd (logit_kd)"
    assert text["state"].startswith("unfinished; the last step ended 3 min ")
    assert text["step"] == "45 of 60 (75%)"
    assert text["remaining"] == "about 7.5 s of steps"
    assert text["loss"] == f"{sum(9 / step for step in range(26, 46)) / 20:.4f}, mean of 20 steps"
    assert text["speed"] == "2,000 tokens/s, 20% waiting for the teacher"
    assert text["measured"] == "at step 40: loss 1.525, forward KL 0.3250, reverse KL 0.4250"
    assert text["checkpoint"] == "step 40; --resume continues from there"


def test_a_finished_run_and_one_without_a_step(tmp_path):
    [text] = status(make_run(tmp_path / "done"))
    assert text["state"] == "finished after 60 steps in 1 min 15 s"
    assert text["measured"] == "accuracy 50.0%, loss 1.500, forward KL 0.3000, reverse KL 0.4000"
    [text] = status(make_run(tmp_path / "begun", steps=0, finished=False))
    assert text["state"] == "no step yet"


def test_total_steps_of_a_run_in_epochs_follow_from_the_steps_so_far(tmp_path):
    folder = make_run(tmp_path / "epochs", steps=10, finished=False)
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("steps: 60", "steps: null").replace("epochs: null", "epochs: 3"))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row | {"epoch": row["step"] / 10} for row in rows]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert status(folder)[0]["step"] == "10 of 30 (33%)"


def test_rows_that_are_being_generated(tmp_path):
    with CompletionStore(tmp_path / "synthesis") as store:
        store.claim({}, set(), set())
        for number in range(3):
            store.add(StoredCompletion(str(number), "text", None, None, "stop", None), {})
        store.flush()
        [text] = status(tmp_path)
    assert re.fullmatch(r"being generated; 3 completions so far, the last \d.* ago", text["rows"])
    with pytest.raises(InputError, match="is no run directory of rayk"):
        status(tmp_path / "nowhere")


def test_each_round_that_has_started(tmp_path):
    (tmp_path / "rounds").mkdir()
    make_run(tmp_path / "rounds" / "01", name="self-round-1")
    make_run(tmp_path / "rounds" / "02", name="self-round-2", steps=3, finished=False)
    first, second = status(tmp_path)
    assert first["state"].startswith("finished") and second["step"] == "3 of 60 (5%)"


def test_a_followed_run_is_shown_when_it_has_made_progress_and_at_its_end(tmp_path):
    folder = make_run(tmp_path / "kd", kd=True, steps=2, finished=False)
    whole = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(whole.splitlines(keepends=True)[0])
    states = follow(folder, interval=0.01)
    assert next(states)[0]["step"] == "1 of 60 (2%)"
    (folder / "metrics.jsonl").write_text(whole)
    assert next(states)[0]["step"] == "2 of 60 (3%)"
    finished = make_run(tmp_path / "done", kd=True, steps=2)
    (finished / "summary.json").rename(folder / "summary.json")
    assert [section["state"] for [section] in states] == ["finished after 2 steps in 1 min 15 s"]
