"""`rayk status`: show the progress of a run from the files in its directory; the run may be on another machine."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from rayk.config.secrets import hide
from rayk.errors import InputError
from rayk.report.run_directory import Run, duration, explain_odd_values, read_runs, wait_seconds
from rayk.storage.places import first_line
from rayk.training.checkpoint import CheckpointStore

FOLLOW_SECONDS = 5.0
"""Interval at which `follow` looks at the run directory."""
_RECENT_STEPS = 20
_MEASURED = {
    "accuracy": ("accuracy", "{:.1%}"),
    "loss": ("loss", "{:.3f}"),
    "forward_kl": ("forward KL", "{:.4f}"),
    "reverse_kl": ("reverse KL", "{:.4f}"),
}


def status(folder: Path) -> list[dict[str, str]]:
    """Return the state of the run in `folder` as texts by name; for a run with rounds, one dict per started round.

    Raises:
        InputError: `folder` is no run directory.
    """
    if not (folder / "config.yaml").exists() and (folder / "synthesis").is_dir():
        return [{"run": str(folder), "rows": _unfinished_rows(folder / "synthesis")}]
    with explain_odd_values([folder]):
        return [_describe(run) for run in read_runs([folder])]


def follow(folder: Path, interval: float = FOLLOW_SECONDS) -> Iterator[list[dict[str, str]]]:
    """Yield the state of the run in `folder` as `status` does, now and whenever it has made progress, until it is
    finished."""
    last: list[dict[str, str]] = []
    while True:
        is_finished = (folder / "summary.json").exists()
        sections = status(folder)
        # without times, which pass while the run waits
        progress = [{name: text.partition(", the last")[0] for name, text in section.items() if name != "state"}
                    for section in sections]  # fmt: skip
        if is_finished or progress != last:
            yield sections
        if is_finished:
            return
        last = progress
        time.sleep(interval)


def _describe(run: Run) -> dict[str, str]:
    parts = {"run": f"{run.label} ({run.method})", "rows": _rows(run)}
    total, done = _total_steps(run), run.steps
    if run.summary is not None:
        return parts | {
            "state": f"finished after {done:,} steps in {duration(run.summary['seconds'])}",
            "measured": _measures(run.metrics),
            "teachers": _teachers(run, run.rows),
            "student": str(run.path / "model"),
        }
    if not run.rows:
        return parts | {"state": "no step yet"}
    recent = run.rows[-_RECENT_STEPS:]
    parts["state"] = f"unfinished; the last step ended {_ago(run.rows[-1].get('ended_at'))}"
    parts["step"] = f"{done:,}" + (f" of {total:,} ({done / total:.0%})" if total else "")
    if total:
        seconds = statistics.mean(row["step_seconds"] for row in recent)
        parts["remaining"] = f"about {duration((total - done) * seconds)} of steps"
    parts["loss"] = f"{statistics.mean(row['loss'] for row in recent):.4f}, mean of {len(recent)} steps"
    parts["speed"] = _speed(recent)
    parts["teachers"] = _teachers(run, recent)
    if run.metrics:
        parts["measured"] = f"at step {run.metrics['step']:,.0f}: {_measures(run.metrics)}"
    return parts | {"checkpoint": _checkpoint(run)}


def _rows(run: Run) -> str:
    if run.synthesis is not None:
        return f"{run.synthesis['kept']:,} of {run.synthesis['candidates']:,} generated rows kept"
    return _unfinished_rows(run.path / "synthesis") if (run.path / "synthesis").is_dir() else ""


def _unfinished_rows(folder: Path) -> str:
    """Describe an unfinished synthesis by the completions on disk; those since the last flush are not counted."""
    found = sorted((folder / "completions").glob("part-*.parquet"))
    try:
        count = sum(parquet.read_metadata(path).num_rows for path in found)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"'{folder}' cannot be read: {error}") from error
    text = f"being generated; {count:,} completions so far"
    return text + (f", the last {_ago(max(path.stat().st_mtime for path in found))}" if found else "")


def _total_steps(run: Run) -> int | None:
    """Return the configured number of steps; None if it is not known yet."""
    training: Mapping[str, Any] = run.config.get("training") or {}
    if training.get("steps"):
        return int(training["steps"])
    last = run.rows[-1] if run.rows else {}
    return round(training["epochs"] * last["step"] / last["epoch"]) if training.get("epochs") and last else None


def _speed(rows: list[dict[str, Any]]) -> str:
    seconds = sum(row["step_seconds"] for row in rows)
    text = f"{sum(row['tokens'] for row in rows) / seconds:,.0f} tokens/s"
    teacher, rollouts = (waited / seconds for waited in wait_seconds(rows))
    text += f", {teacher:.0%} waiting for the teacher"
    return text + (f", {rollouts:.0%} for rollouts" if rollouts else "")


def _teachers(run: Run, rows: list[dict[str, Any]]) -> str:
    """Describe each of several teachers: its mean loss, its share of the tokens and of the time in which it scored."""
    texts = []
    for name in run.routed_teachers:
        parts = []
        scored = [row for row in rows if row.get(f"teacher/{name}/tokens")]
        if scored:
            tokens = sum(row[f"teacher/{name}/tokens"] for row in scored)
            loss = sum(row[f"teacher/{name}/loss"] * row[f"teacher/{name}/tokens"] for row in scored) / tokens
            parts += [f"loss {loss:.4f}", f"{tokens / sum(row['counted_tokens'] for row in rows):.0%} of the tokens"]
        seconds = [row[f"teacher/{name}/score_seconds"] for row in rows if f"teacher/{name}/score_seconds" in row]
        if seconds:
            share = sum(seconds) / sum(row["step_seconds"] for row in rows)
            parts.append(f"scoring {share:.0%} of the time")
        texts.append(f"{name}: {', '.join(parts)}")
    return "; ".join(texts)


def _measures(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {form.format(metrics[key])}" for key, (name, form) in _MEASURED.items() if key in metrics)


def _checkpoint(run: Run) -> str:
    place = (run.config.get("training") or {}).get("checkpoints") or str(run.path / "checkpoints")
    try:
        steps = CheckpointStore(place).steps()
    except (OSError, ValueError) as error:
        return f"{hide(place)} cannot be read: {first_line(error)}"
    return f"step {steps[-1]:,}; --resume continues from there" if steps else "none yet"


def _ago(timestamp: float | None, now: Callable[[], float] = time.time) -> str:
    return "some time ago" if timestamp is None else f"{duration(max(0.0, now() - timestamp))} ago"
