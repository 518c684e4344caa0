"""One run, or one round of several: inputs checked, teachers up, student trained, measured and reported."""

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rayk.config import RunConfig, ServedRollouts, StudentConfig, with_absolute_paths
from rayk.errors import InputError
from rayk.evaluation.evaluate import Evaluation, evaluate_teacher
from rayk.methods import METHODS
from rayk.report.report import write_report
from rayk.report.run_directory import read_lines
from rayk.retrieval import found_retriever, learned_retriever, retriever_summary
from rayk.rollouts import serve_policy
from rayk.run.applications import (
    connect_attached_teachers,
    policy_application,
    required_cpus,
    serve_teachers,
    teacher_applications,
)
from rayk.run.directory import check_base_weights, claim_directory, claim_training_rows, has_training_rows
from rayk.run.inputs import Inputs, read_inputs, read_synthesis_prompts, with_synthesized_rows
from rayk.run.progress import ProgressListener, follow_metrics
from rayk.run.training_rows import FIRST_ROUND, RoundInfo, synthesize_training_rows
from rayk.serving.cluster import start_ray
from rayk.teachers import Teacher, build_scorer
from rayk.teachers.cache import SignalCache, open_cache
from rayk.training import Job, Outcome, evaluate_remotely, steps_of_epochs, train


@dataclass(frozen=True)
class Result:
    """A finished run: its folder, and what `summary.json` says."""

    output: Path
    summary: dict[str, Any]

    @property
    def model(self) -> Path:
        """The student with its tokenizer, for `AutoModelForCausalLM.from_pretrained`."""
        return self.output / "model"


def run_once(config: RunConfig, listener: ProgressListener, *, resume: bool, round_info: RoundInfo = FIRST_ROUND) -> Result:
    """Run `config`, whose paths are absolute, to the end; see `rayk.run.distill`."""
    listener.stage("Reading data and models")
    with ExitStack() as stack:
        cache = stack.enter_context(open_cache(config.cache))
        attached = connect_attached_teachers(config)
        inputs = read_inputs(config, attached, training=config.synthesis is None)
        prompts = read_synthesis_prompts(config) if config.synthesis else []
        claim_directory(config, resume)
        if config.teachers or config.training.workers:
            start_ray(required_cpus(config))
        running: dict[str, Teacher] = {}
        if config.synthesis is not None:
            running = synthesize_training_rows(
                config, prompts, stack, cache, listener, settled=has_training_rows(config), round_info=round_info
            )
            config = with_synthesized_rows(config)
            inputs = read_inputs(config, attached)
        assert inputs.train is not None
        claim_training_rows(config, inputs.train.fingerprint)
        base = check_base_weights(config)
        if config.retriever is None:
            _rank(inputs, listener)
        teachers = running | _others_up(config, running, stack, cache, listener)
        if config.retriever is not None:
            _rank(inputs, listener, _learned_retriever(config, inputs, teachers, listener))
        began = time.time()
        teacher_evaluation = None
        if config.evaluation_teacher and inputs.evaluation is not None:
            listener.stage("Measuring the teacher")
            teacher_evaluation = _measured(config, teachers, inputs)
        if isinstance(config.rollouts, ServedRollouts):
            listener.stage("Bringing up the student's policy on Ray Serve")
        policy = stack.enter_context(serve_policy(config, policy_application(config), inputs.tokenizer_name))
        total = config.training.steps or steps_of_epochs(config.training, len(inputs.train))
        listener.stage(f"Training {config.name}: {config.method.kind}, {total} steps")
        job = Job(
            config, inputs.tokenizer_name, teacher_applications(config), inputs.train.table,
            evaluation_table=None if inputs.evaluation is None else inputs.evaluation.table,
            pretraining_table=None if inputs.pretraining is None else inputs.pretraining.table,
            policy=policy, views=inputs.views, base=base,
        )  # fmt: skip
        with follow_metrics(config.output_path, total, listener):
            outcome = train(job)
    summary = summarise(config, inputs, outcome, teacher_evaluation, time.time() - began)
    write_json(config.output_path / "summary.json", summary)
    write_report([config.output_path], config.output_path / "report.html")
    return Result(config.output_path, summary)


def _others_up(
    config: RunConfig, running: Mapping[str, Teacher], stack: ExitStack, cache: SignalCache | None, listener: ProgressListener
) -> dict[str, Teacher]:
    """The teachers of training that are not running yet, up until `stack` closes."""
    others = [each.name for each in config.training_teachers if each.name not in running]
    if new := [each.name for each in config.teachers if each.name in others and not each.attach]:
        listener.stage(f"Bringing up {', '.join(new)} on Ray Serve")
    return serve_teachers(config, teacher_applications(config), stack, cache, others)


def _learned_retriever(config: RunConfig, inputs: Inputs, teachers: Mapping[str, Teacher], listener: ProgressListener) -> str:
    assert inputs.train is not None and inputs.views.demonstrations is not None
    scorer = teachers[config.retriever_teacher]
    return learned_retriever(
        config, inputs.views.demonstrations, inputs.train, scorer, listener.stage, listener.progress
    )


def evaluate_model(config: RunConfig, model: str | None = None, listener: ProgressListener | None = None) -> dict[str, Any]:
    """Measure a model on the config's evaluation rows; by default the student this config has trained.

    Returns:
        A summary as `summary.json` holds it, as far as it applies.

    Raises:
        InputError: there are no evaluation rows or there is no such model.
    """
    config, listener = with_absolute_paths(config), listener or ProgressListener()
    if config.data.evaluation is None:
        raise InputError("data.evaluation is missing; set it to the rows to measure on.")
    measured = model or str(config.output_path / "model")
    if model is None and not Path(measured).is_dir():
        raise InputError(f"There is no trained student in '{measured}'; run the config first, or give --model.")
    config = config.model_copy(update={"student": StudentConfig(model=measured)})
    with ExitStack() as stack:
        inputs = read_inputs(config, connect_attached_teachers(config), training=False)
        assert inputs.evaluation is not None
        retriever = found_retriever(config)
        start_ray(required_cpus(config))
        listener.stage("Bringing up teachers" if config.teachers else "No teacher to compare with")
        applications = teacher_applications(config)
        teachers = serve_teachers(config, applications, stack, stack.enter_context(open_cache(config.cache)))
        listener.stage(f"Measuring {measured}")
        _rank(inputs, listener, retriever)
        job = Job(
            config, inputs.tokenizer_name, applications, None, inputs.evaluation.table,
            views=inputs.views,
        )  # fmt: skip
        evaluation = evaluate_remotely(job)
        teacher = _measured(config, teachers, inputs) if config.evaluation_teacher else None
    return {
        "name": Path(measured).name if model else config.name,
        "student": evaluation.metrics,
        "teacher": teacher.metrics if teacher else {},
    }


def _rank(inputs: Inputs, listener: ProgressListener, retriever: str | None = None) -> None:
    """Compute each row's nearest demonstrations, where the run shows such."""
    if (demonstrations := inputs.views.demonstrations) is not None:
        listener.stage("Choosing demonstrations")
        for table in (inputs.train, inputs.evaluation):
            demonstrations.rank_nearest(table or (), retriever)


def _measured(config: RunConfig, teachers: Mapping[str, Teacher], inputs: Inputs) -> Evaluation:
    assert inputs.evaluation is not None
    teacher = build_scorer(config, teachers)
    assert teacher is not None
    return evaluate_teacher(
        teacher, config.evaluation, list(inputs.evaluation), inputs.tokenizer, views=inputs.views
    )


def summarise(
    config: RunConfig, inputs: Inputs, outcome: Outcome, teacher: Evaluation | None, seconds: float
) -> dict[str, Any]:
    """What a run came to, for `summary.json`."""
    assert inputs.train is not None and outcome.size is not None
    student = outcome.evaluation
    theirs = {answer.where: answer.text for answer in teacher.answers} if teacher else {}
    places = {example.where: place for place, example in enumerate(inputs.evaluation or ())}
    answers = sorted(student.answers if student else [], key=lambda answer: places[answer.where])
    return {
        "name": config.name,
        "method": config.method.kind,
        "about": METHODS[config.method.kind].summary,
        "seconds": seconds,
        **training_speed(read_lines(config.output_path / "metrics.jsonl")),
        "rows": {
            "train": len(inputs.train),
            "evaluation": len(inputs.evaluation) if inputs.evaluation else 0,
            "skipped": inputs.train.skipped,
        },
        "parameters": asdict(outcome.size),
        "student": student.metrics if student else {},
        "teacher": teacher.metrics if teacher else {},
        "retriever": retriever_summary(config),
        "samples": [
            {**asdict(answer), "teacher": theirs.get(answer.where)} for answer in answers[: config.evaluation.samples]
        ],
        "machine": {"cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()},
    }


def training_speed(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What the steps of a run, as `metrics.jsonl` has them, took."""
    spent = sum(row["step_seconds"] for row in rows) or 1.0
    return {
        "steps": len(rows),
        "training_seconds": spent,
        "tokens_per_second": sum(row["tokens"] for row in rows) / spent,
        "teacher_wait_share": sum(row["teacher_wait_seconds"] for row in rows) / spent,
    }


def write_json(path: Path, values: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(values, indent=2, ensure_ascii=False), encoding="utf-8")
    part.replace(path)
