"""Runs of one or several rounds. Each round synthesizes rows and trains on them, starting from the previous student.

Each round is a separate run (`rayk.run.pipeline`) in `OUTPUT/rounds/01` and so on, and its student is the model of
the round before. A killed run therefore continues inside its round, from that round's directory. OUTPUT itself gets
the model of the last round, the steps of all rounds in one `metrics.jsonl`, and a report that compares the rounds.
"""

import json
import os
import shutil
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rayk.config import RunConfig, load_config, parse_config, with_absolute_paths
from rayk.config.paths import place_below
from rayk.errors import InputError
from rayk.report.report import write_report
from rayk.report.run_directory import read_lines
from rayk.run.applications import required_cpus
from rayk.run.directory import ROUNDS, check_directory, claim_directory, with_pinned_date, write_config
from rayk.run.model_copy import save_copy
from rayk.run.pipeline import Result, run_once
from rayk.run.progress import LeaseHolder, ProgressListener
from rayk.run.summary import training_speed, write_json
from rayk.run.synthesis_inputs import read_synthesis_prompts, synthesized_rows_path
from rayk.run.training_rows import FIRST_ROUND, RoundInfo, synthesize_training_rows
from rayk.serving.cluster import start_ray
from rayk.storage.atomic import replace_folder, write_whole
from rayk.storage.lease import hold_lease
from rayk.synthesis import CompletionStore


def distill(
    config: RunConfig | str | os.PathLike, *, output: str | None = None, resume: bool = False,
    listener: ProgressListener | None = None, watcher: ProgressListener | None = None,
) -> Result:  # fmt: skip
    """Run `config` (a `RunConfig` or the path of its YAML file) to the end.

    Args:
        output: the run directory, instead of the config's.
        resume: continue the run in that directory, if it contains one; `rounds` may be larger than before.
        listener: receives the progress.
        watcher: deprecated name of `listener`.

    Raises:
        InputError: the settings, data or models are wrong, or the directory contains another run or belongs to
            another process, which is still running.
        TeacherUnavailable: a teacher did not respond in time; the last step is checkpointed.
        RunFailed: training failed (the latest checkpoint is kept), or no training row could be synthesized.
    """
    if watcher is not None:
        message = "distill(watcher=…) is now distill(listener=…); the old name will be removed in the next release."
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        listener = watcher
    if not isinstance(config, RunConfig):
        config = load_config(config, output=output)
    config, listener = with_pinned_date(with_absolute_paths(config, output)), listener or ProgressListener()
    check_directory(config, resume)
    with hold_lease(config.output_path, listener.stage) as lease:
        listener = LeaseHolder(listener, lease)
        if config.rounds == 1:
            return run_once(config, listener, resume=resume)
        return _run_rounds(config, listener, resume)


def _run_rounds(config: RunConfig, listener: ProgressListener, resume: bool) -> Result:
    check_directory(config, resume)
    _check_rounds(config)
    for number in range(config.rounds):
        settings, round_info = round_config(config, number)
        if _is_finished(settings):
            claim_directory(settings, resume)
            continue
        listener.stage(f"Round {number + 1} of {config.rounds}")
        run_once(settings, listener, resume=resume, round_info=round_info)
        write_config(config)
        _gather_steps(config)
    return _finish_run(config)


def synthesize(
    config: RunConfig, output: str | None = None, listener: ProgressListener | None = None
) -> dict[str, Any]:
    """Synthesize the training rows of `config` (with `rounds`, of the next round) in `OUTPUT/synthesis`.

    Existing completions are not requested again.

    Returns:
        The content of `synthesis/summary.json`.

    Raises:
        InputError: there is no `synthesis`, or the settings, data or models are wrong.
        RunFailed, TeacherUnavailable: as in `distill`.
    """
    config, listener = with_pinned_date(with_absolute_paths(config, output)), listener or ProgressListener()
    if config.synthesis is None:
        raise InputError("synthesis is missing; set synthesis.kind to the way in which rows are generated.")
    config, round_info = next_round(config)
    with ExitStack() as stack:
        lease = stack.enter_context(hold_lease(config.output_path, listener.stage))
        listener = LeaseHolder(listener, lease)
        listener.stage("Reading data and models")
        prompts = read_synthesis_prompts(config)
        start_ray(required_cpus(config))
        synthesize_training_rows(config, prompts, stack, None, listener, settled=False, round_info=round_info)
        summary = CompletionStore(synthesized_rows_path(config).parent).summary
    assert summary is not None
    return summary


def next_round(config: RunConfig) -> tuple[RunConfig, RoundInfo]:
    """Return the settings and number of the first unfinished round, or of the last one if all are finished.

    For a run without rounds these are `config` itself and the first round. Paths in `config` must be absolute.
    """
    if config.rounds == 1:
        return config, FIRST_ROUND
    rounds = [round_config(config, number) for number in range(config.rounds)]
    return next((entry for entry in rounds if not _is_finished(entry[0])), rounds[-1])


def round_config(config: RunConfig, number: int) -> tuple[RunConfig, RoundInfo]:
    """Return the settings of round `number` (from 0) as those of a separate run, and the round's info."""
    values = config.model_dump(mode="json")
    values["student"]["save_to"] = None  # the model of the last round is copied
    values |= {"rounds": 1, "name": f"{config.name}-round-{number + 1}", "output": str(_folder(config, number))}
    if config.training.checkpoints:
        values["training"]["checkpoints"] = place_below(config.training.checkpoints, f"{number + 1:02d}")
    if number == 0:
        return parse_config(values), FIRST_ROUND
    before = _folder(config, number - 1)
    values["student"] |= {"model": str(before / "model"), "config": None, "layers": None}
    return parse_config(values), RoundInfo(number, before / "synthesis")


def _folder(config: RunConfig, number: int) -> Path:
    return config.output_path / ROUNDS / f"{number + 1:02d}"


def _is_finished(config: RunConfig) -> bool:
    return (config.output_path / "summary.json").exists()


def _check_rounds(config: RunConfig) -> None:
    if _folder(config, config.rounds).exists():
        raise InputError(
            f"rounds is {config.rounds}, but the run in '{config.output_path}' has already started round "
            f"{config.rounds + 1}; raise rounds, or give another --output."
        )


def _gather_steps(config: RunConfig) -> None:
    """Write the steps of all rounds to the run's own `metrics.jsonl`, numbered consecutively."""
    rows: list[dict[str, Any]] = []
    for number in range(config.rounds):
        steps = read_lines(_folder(config, number) / "metrics.jsonl")
        rows += [row | {"step": len(rows) + row["step"], "round": number + 1} for row in steps]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    write_whole(config.output_path / "metrics.jsonl", lines.encode())


def _finish_run(config: RunConfig) -> Result:
    """Write the model, metrics, summary and report of the whole run."""
    folders = [_folder(config, number) for number in range(config.rounds)]
    with replace_folder(config.output_path / "model") as model:
        shutil.copytree(folders[-1] / "model", model, dirs_exist_ok=True)
    _gather_steps(config)
    summaries = [json.loads((folder / "summary.json").read_text(encoding="utf-8")) for folder in folders]
    summary = {
        **summaries[-1],
        "name": config.name,
        "student_before": summaries[0].get("student_before", {}),
        "seconds": sum(summary["seconds"] for summary in summaries),
        **training_speed(read_lines(config.output_path / "metrics.jsonl")),
        "rounds": summaries,
    }
    write_json(config.output_path / "summary.json", summary)
    write_report([config.output_path], config.output_path / "report.html")
    save_copy(config)
    return Result(config.output_path, summary)
