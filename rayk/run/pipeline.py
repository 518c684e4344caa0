"""One run, or one round of several, from data to the trained, measured and reported student."""

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from rayk.config import RunConfig
from rayk.data.chunks import open_rows
from rayk.report.report import write_report
from rayk.retrieval import train_retriever
from rayk.rollouts import serve_policy
from rayk.run.applications import (
    check_own_cluster,
    connect_attached_teachers,
    describe_shortage,
    policy_application,
    required_cpus,
    serve_teachers,
    teacher_applications,
)
from rayk.run.directory import (
    check_base_weights,
    checkpointed_steps,
    claim_directory,
    claim_training_rows,
    has_training_rows,
)
from rayk.run.evaluation import measure_teacher, rank_demonstrations
from rayk.run.inputs import Inputs, read_inputs
from rayk.run.model_copy import save_copy
from rayk.run.model_facts import ModelFacts
from rayk.run.progress import ProgressListener, follow_metrics
from rayk.run.summary import summarize_run, write_json
from rayk.run.synthesis_inputs import read_synthesis_prompts, with_synthesized_rows
from rayk.run.training_rows import FIRST_ROUND, RoundInfo, synthesize_training_rows
from rayk.run.verdict import check_memory
from rayk.serving.cluster import start_ray
from rayk.teachers import Teacher
from rayk.teachers.cache import SignalCache, open_cache
from rayk.training import Job, Outcome, count_steps, train


@dataclass(frozen=True)
class Result:
    """A finished run: its directory, and the content of its `summary.json`."""

    output: Path
    summary: dict[str, Any]

    @property
    def model(self) -> Path:
        """The folder of the student with its tokenizer, for `AutoModelForCausalLM.from_pretrained`."""
        return self.output / "model"


def run_once(
    config: RunConfig, listener: ProgressListener, *, resume: bool, round_info: RoundInfo = FIRST_ROUND
) -> Result:
    """Run `config` to the end. Its paths must be absolute. Raises the same errors as `rayk.run.distill`."""
    listener.stage("Reading data and models")
    with ExitStack() as stack:
        cache = stack.enter_context(open_cache(config.cache))
        attached = connect_attached_teachers(config)
        inputs = read_inputs(config, attached, training=config.synthesis is None)
        prompts = read_synthesis_prompts(config) if config.synthesis else []
        memory_note = check_memory(config, inputs)
        is_resumed = claim_directory(config, resume)
        beginning = _describe_beginning(config, is_resumed) if resume else ""
        listener.stage(f"The run directory is {config.output_path}{beginning}")
        for note in (*inputs.notes, *filter(None, [memory_note])):
            listener.stage(note)
        config = inputs.complete(config)
        if config.teachers or config.training.workers:
            start_ray(required_cpus(config))
            check_own_cluster(config)
            if shortage := describe_shortage(config, ray.nodes()):
                listener.stage(shortage)
        running: dict[str, Teacher] = {}
        if config.synthesis is not None:
            running = synthesize_training_rows(
                config, prompts, stack, cache, listener, settled=has_training_rows(config), round_info=round_info
            )
            config = with_synthesized_rows(config)
            inputs = read_inputs(config, attached)
            config = inputs.complete(config)
        assert inputs.train is not None
        claim_training_rows(config, inputs.train.fingerprint)
        ModelFacts.of_inputs(inputs).write(config.output_path)
        base = check_base_weights(config)
        if config.retriever is None:  # so that its errors occur before teachers are started
            rank_demonstrations(inputs, listener)
        teachers = running | _serve_other_teachers(config, running, stack, cache, listener)
        if config.retriever is not None:
            rank_demonstrations(inputs, listener, _train_retriever(config, inputs, teachers, listener))
        started = time.time()
        teacher_evaluation = None
        if config.compares_teacher and inputs.evaluation is not None:
            listener.stage("Measuring the teacher")
            teacher_evaluation = measure_teacher(config, teachers, inputs)
        outcome = _train_student(config, inputs, stack, listener, base)
    summary = summarize_run(config, inputs, outcome, teacher_evaluation, time.time() - started)
    write_json(config.output_path / "summary.json", summary)
    write_report([config.output_path], config.output_path / "report.html")
    if config.student.save_to is not None:
        listener.stage("Copying the model to student.save_to")
        save_copy(config)
    return Result(config.output_path, summary)


def _describe_beginning(config: RunConfig, is_resumed: bool) -> str:
    """Return the step at which a run that was started with `--resume` begins, as the end of a sentence on its
    directory."""
    if not is_resumed:
        return ": a new run, because there was none to resume"
    steps = checkpointed_steps(config.checkpoints)
    return f", resumed at step {steps[-1]:,}" if steps else ", resumed before its first checkpoint"


def _serve_other_teachers(
    config: RunConfig, running: Mapping[str, Teacher], stack: ExitStack, cache: SignalCache | None,
    listener: ProgressListener,
) -> dict[str, Teacher]:  # fmt: skip
    """Deploy the teachers of training that are not running yet, until `stack` closes."""
    others = [teacher.name for teacher in config.training_teachers if teacher.name not in running]
    if new := [teacher.name for teacher in config.teachers if teacher.name in others and not teacher.attach]:
        listener.stage(f"Starting {', '.join(new)} on Ray Serve")
    return serve_teachers(config, teacher_applications(config), stack, cache, others)


def _train_retriever(
    config: RunConfig, inputs: Inputs, teachers: Mapping[str, Teacher], listener: ProgressListener
) -> str:
    """Train the retriever of demonstrations, unless it has been trained already; return its folder."""
    pool = inputs.views.demonstrations
    assert inputs.train is not None and pool is not None
    scorer = teachers[config.retriever_teacher]
    return train_retriever(config, pool, inputs.train, scorer, listener.stage, listener.progress)


def _train_student(
    config: RunConfig, inputs: Inputs, stack: ExitStack, listener: ProgressListener, base: str
) -> Outcome:
    """Train the student, and measure it if there are evaluation rows.

    Args:
        base: the fingerprint of the frozen weights below an adapter, "" without one.
    """
    assert inputs.train is not None
    if config.rollouts is not None and config.rollouts.is_served:
        listener.stage("Starting the student's policy on Ray Serve")
    policy = stack.enter_context(
        serve_policy(
            config,
            policy_application(config),
            inputs.tokenizer_name,
            inputs.vocabulary.generated,
            trained_ends=inputs.trained_ends,
        )
    )
    total = count_steps(config, len(open_rows(inputs.train, config.data.train, config.seed)))
    listener.stage(f"Training {config.name}: {config.method.kind}, {total} steps")
    job = Job(
        config, inputs.tokenizer_name, teacher_applications(config), inputs.train.table,
        evaluation_table=None if inputs.evaluation is None else inputs.evaluation.table,
        auxiliary_table=None if inputs.pretraining is None else inputs.pretraining.table,
        policy=policy, views=inputs.views, base=base, generated_ids=inputs.vocabulary.generated,
        trained_ends=inputs.trained_ends, chat_template=inputs.chat_template,
    )  # fmt: skip
    with follow_metrics(config.output_path, total, listener):
        return train(job)
