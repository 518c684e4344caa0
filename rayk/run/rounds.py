"""A run's rounds: rows written with the student of the round before, and that student trained on them, so often.

Each round is a run directory of its own, `OUTPUT/rounds/01` and so on, made by the code of a single run
(`rayk.run.once`) with settings of its own: the student is the model that the round before has left. So a run that was
killed goes on inside its round by what that round's directory holds. OUTPUT itself gets the last round's model, all
rounds' steps one after the other in `metrics.jsonl`, and a report that compares them.
"""

import json
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rayk.config import RunConfig, load_config, parse_config
from rayk.errors import InputError
from rayk.report.report import write_report
from rayk.report.run_directory import read_lines
from rayk.run.directory import ROUNDS, check, claim, located, write_config
from rayk.run.inputs import prompts_written_for, written_rows
from rayk.run.once import Result, run_once, speed_of, write_json
from rayk.run.serving import cpus_needed
from rayk.run.watching import Watcher
from rayk.run.writing import FIRST, RoundOf, write_rows
from rayk.serving.cluster import start_ray
from rayk.synthesis import Store


def distill(
    config: RunConfig | str | os.PathLike, *, output: str | None = None, resume: bool = False,
    watcher: Watcher | None = None,
) -> Result:  # fmt: skip
    """Run `config` (a `RunConfig` or the path of its YAML file) to the end.

    Args:
        output: the run directory, instead of the config's.
        resume: go on with the run in that directory, if there is one; also with more `rounds` than it had.
        watcher: is told how the run goes.

    Raises:
        InputError: the settings, data or models are wrong, or the directory holds another run.
        TeacherUnavailable: a teacher did not answer in time; the last step is checkpointed.
        RunFailed: training broke down (the latest checkpoint stands), or no training row could be synthesised.
    """
    if not isinstance(config, RunConfig):
        config = load_config(config, output=output)
    config, watcher = located(config, output), watcher or Watcher()
    if config.rounds == 1:
        return run_once(config, watcher, resume=resume)
    check(config, resume)
    _check_number(config)
    for number in range(config.rounds):
        settings, round_of = round_config(config, number)
        if _finished(settings):
            claim(settings, resume)
            continue
        watcher.stage(f"Round {number + 1} of {config.rounds}")
        run_once(settings, watcher, resume=resume, round_of=round_of)
        write_config(config)
        _gather_steps(config)
    return _finish(config)


def synthesize(config: RunConfig, output: str | None = None, watcher: Watcher | None = None) -> dict[str, Any]:
    """Only have `config`'s training rows written, into `<output>/synthesis`; what is there is not asked for again. With
    `rounds`, those of the round that is next.

    Returns:
        The summary, as `synthesis/summary.json` holds it.

    Raises:
        InputError: there is no `synthesis`, or the settings, data or models are wrong.
        RunFailed, TeacherUnavailable: as `distill`.
    """
    config, watcher = located(config, output), watcher or Watcher()
    if config.synthesis is None:
        raise InputError("synthesis is missing; set synthesis.kind to what a teacher is to write.")
    config, round_of = next_round(config)
    watcher.stage("Reading data and models")
    prompts = prompts_written_for(config)
    with ExitStack() as stack:
        start_ray(cpus_needed(config))
        write_rows(config, prompts, stack, None, watcher, settled=False, round_of=round_of)
        summary = Store(written_rows(config).parent).summary
    assert summary is not None
    return summary


def next_round(config: RunConfig) -> tuple[RunConfig, RoundOf]:
    """The settings of the first round that is not finished (the last one, where all are), and which it is; `config`
    itself, whose paths are absolute, where it has no rounds."""
    if config.rounds == 1:
        return config, FIRST
    rounds = [round_config(config, number) for number in range(config.rounds)]
    return next((each for each in rounds if not _finished(each[0])), rounds[-1])


def round_config(config: RunConfig, number: int) -> tuple[RunConfig, RoundOf]:
    """The settings of round `number`, from 0, as a run of its own."""
    values = config.model_dump(mode="json")
    values |= {"rounds": 1, "name": f"{config.name}-round-{number + 1}", "output": str(_folder(config, number))}
    if config.training.checkpoints:
        values["training"]["checkpoints"] = f"{config.training.checkpoints.rstrip('/')}/{number + 1:02d}"
    if number == 0:
        return parse_config(values), FIRST
    before = _folder(config, number - 1)
    values["student"] |= {"model": str(before / "model"), "config": None}
    return parse_config(values), RoundOf(number, before / "synthesis")


def _folder(config: RunConfig, number: int) -> Path:
    return config.output_path / ROUNDS / f"{number + 1:02d}"


def _finished(config: RunConfig) -> bool:
    return (config.output_path / "summary.json").exists()


def _check_number(config: RunConfig) -> None:
    if _folder(config, config.rounds).exists():
        raise InputError(
            f"rounds is {config.rounds}, but the run in '{config.output_path}' has begun with round "
            f"{config.rounds + 1}; give it as many, or another --output."
        )


def _gather_steps(config: RunConfig) -> None:
    """Write all rounds' steps so far into the run's own `metrics.jsonl`, counted through."""
    rows: list[dict[str, Any]] = []
    for number in range(config.rounds):
        steps = read_lines(_folder(config, number) / "metrics.jsonl")
        rows += [row | {"step": len(rows) + row["step"], "round": number + 1} for row in steps]
    part = config.output_path / "metrics.jsonl.part"
    part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    part.replace(config.output_path / "metrics.jsonl")


def _finish(config: RunConfig) -> Result:
    """Give the run directory what the rounds came to."""
    folders = [_folder(config, number) for number in range(config.rounds)]
    model, unfinished = config.output_path / "model", config.output_path / "model.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(folders[-1] / "model", unfinished)
    shutil.rmtree(model, ignore_errors=True)
    unfinished.rename(model)
    _gather_steps(config)
    summaries = [json.loads((folder / "summary.json").read_text(encoding="utf-8")) for folder in folders]
    summary = {
        **summaries[-1],
        "name": config.name,
        "seconds": sum(each["seconds"] for each in summaries),
        **speed_of(read_lines(config.output_path / "metrics.jsonl")),
        "rounds": summaries,
    }
    write_json(config.output_path / "summary.json", summary)
    write_report([config.output_path], config.output_path / "report.html")
    return Result(config.output_path, summary)
