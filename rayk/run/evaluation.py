"""Measurements on evaluation rows: of the teacher during a run, and of any model by `rayk evaluate`."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rayk.config import RunConfig, StudentConfig
from rayk.config.loading import with_absolute_paths
from rayk.config.paths import absolute_path, is_local_path, path_exists
from rayk.errors import InputError
from rayk.evaluation.evaluate import Evaluation, evaluate_teacher
from rayk.models import load_tokenizer, tokenizer_fingerprint
from rayk.retrieval import find_retriever
from rayk.run.applications import connect_attached_teachers, required_cpus, serve_teachers, teacher_applications
from rayk.run.directory import with_pinned_date
from rayk.run.inputs import Inputs, read_inputs
from rayk.run.progress import ProgressListener
from rayk.run.summary import sample_answers
from rayk.serving.cluster import start_ray
from rayk.teachers import Teacher, build_scorer
from rayk.teachers.cache import open_cache
from rayk.training import Job, evaluate_remotely


def evaluate_model(
    config: RunConfig, model: str | None = None, listener: ProgressListener | None = None
) -> dict[str, Any]:
    """Measure a model on the config's evaluation rows; by default the student that the config has trained.

    Returns:
        The entries of `summary.json` that apply: name, student, teacher, samples.

    Raises:
        InputError: there are no evaluation rows, or there is no such model.
    """
    config, listener = with_pinned_date(with_absolute_paths(config)), listener or ProgressListener()
    if config.data.evaluation is None:
        raise InputError("data.evaluation is missing; set it to the rows to measure on.")
    path = model or str(config.output_path / "model")
    if model is not None and is_local_path(model) and not path_exists(model):
        raise InputError(f"The model '{absolute_path(model)}' does not exist; check the path.")
    if model is None and not Path(path).is_dir():
        raise InputError(f"There is no trained student in '{path}'; run the config first, or give --model.")
    tokenizer = None if model is None else tokenizer_for(model, config.student)
    config = config.model_copy(update={"student": measured_student(config.student, path, tokenizer)})
    with ExitStack() as stack:
        inputs = read_inputs(config, connect_attached_teachers(config), training=False)
        assert inputs.evaluation is not None
        config = inputs.complete(config)
        retriever = find_retriever(config)
        start_ray(required_cpus(config))
        listener.stage("Starting teachers" if config.teachers else "No teacher to compare with")
        applications = teacher_applications(config)
        teachers = serve_teachers(config, applications, stack, stack.enter_context(open_cache(config.cache)))
        listener.stage(f"Measuring {path}")
        rank_demonstrations(inputs, listener, retriever)
        job = Job(config, inputs.tokenizer_name, applications, None, inputs.evaluation.table, views=inputs.views)
        evaluation = evaluate_remotely(job)
        teacher = measure_teacher(config, teachers, inputs) if config.compares_teacher else None
    return {
        "name": Path(path).name if model else config.name,
        "student": evaluation.metrics,
        "teacher": teacher.metrics if teacher else {},
        "samples": sample_answers(config, inputs, evaluation, teacher),
    }


def measured_student(student: StudentConfig, model: str, tokenizer: str | None) -> StudentConfig:
    """Return the student's settings for a saved model, whose weights and shape are complete: adapters are merged, and
    layers are cut out."""
    changes = {"model": model, "config": None, "tokenizer": tokenizer, "lora": None, "layers": None}
    return student.model_copy(update=changes)


def tokenizer_for(model: str, student: StudentConfig) -> str | None:
    """Return the config's tokenizer, which the student is trained with, if it has the token ids of `model`, or if
    `model` has no tokenizer; None for the model's own."""
    configured = student.tokenizer or student.model
    try:
        own = load_tokenizer(model, trust_remote_code=student.trust_remote_code)
    except InputError:
        return configured
    if student.tokenizer is None:
        return None
    tokenizer = load_tokenizer(student.tokenizer, trust_remote_code=student.trust_remote_code)
    return configured if tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(own) else None


def measure_teacher(config: RunConfig, teachers: Mapping[str, Teacher], inputs: Inputs) -> Evaluation:
    """Measure the teacher, or the ensemble, on the evaluation rows."""
    assert inputs.evaluation is not None
    teacher = build_scorer(config, teachers)
    assert teacher is not None
    return evaluate_teacher(teacher, config.evaluation, list(inputs.evaluation), inputs.tokenizer, views=inputs.views)


def rank_demonstrations(inputs: Inputs, listener: ProgressListener, retriever: str | None = None) -> None:
    """Rank the demonstrations by their similarity to each row, if the run shows any."""
    if (pool := inputs.views.demonstrations) is not None:
        listener.stage("Choosing demonstrations")
        for table in (inputs.train, inputs.evaluation):
            pool.rank_nearest(table or (), retriever)
