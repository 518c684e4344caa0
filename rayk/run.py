"""One run from settings to result: inputs checked, teachers up, student trained, measured and reported."""

import hashlib
import json
import os
import platform
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rayk.cluster import start_ray
from rayk.config import RunConfig, ServedRollouts, StudentConfig, difference, load_config, parse_config
from rayk.data.demonstrations import Demonstrator
from rayk.errors import InputError
from rayk.evaluation.evaluate import Evaluation, evaluate_teacher
from rayk.evaluation.report import write_report
from rayk.evaluation.run_directory import Follower, read_lines
from rayk.inputs import (
    Inputs,
    compared_prompts,
    filters_of,
    on_written_rows,
    prompts_written_for,
    read_inputs,
    written_rows,
)
from rayk.methods import METHODS
from rayk.rollouts import serve_policy
from rayk.students import base_fingerprint
from rayk.synthesis import Prompt, Store, fingerprint, synthesise
from rayk.teachers import Teacher, connect_teacher, scorer_of, serve_teacher
from rayk.teachers.cache import SignalCache, opened
from rayk.training import evaluate_remotely, train
from rayk.training.checkpoint import CheckpointStore
from rayk.training.loop import Job, Outcome, steps_of_epochs

# Settings that say where and how fast, not what is learned: they may change between a run and its resumption.
_PLACEMENT = {
    "name", "output", "tracking", "evaluation", "data.evaluation", "student.gradient_checkpointing", "cache.path",
    "cache.max_gigabytes", "synthesis.in_flight",
    *(f"training.{key}" for key in (
        "workers", "resources", "threads", "micro_batch_tokens", "prefetch", "checkpoint_every_steps", "checkpoints",
        "keep_checkpoints", "max_failures", "collective_timeout_seconds",
    )),
    *(f"teachers.{key}" for key in (
        "attach", "replicas", "resources", "call_tokens", "in_flight", "deadline_seconds", "engine.batch_tokens",
        "engine.device", "engine.threads", "engine.tensor_parallel_size", "engine.gpu_memory_utilization",
        "engine.api_key_variable", "engine.concurrency", "engine.requests_per_minute", "engine.tokens_per_minute",
        "engine.attempts", "engine.timeout_seconds", "engine.price_per_million_prompt_tokens",
        "engine.price_per_million_completion_tokens",
    )),
    *(f"rollouts.{key}" for key in (
        "kind", "engine", "replicas", "resources", "in_flight", "deadline_seconds", "timeout_seconds",
    )),
}  # fmt: skip
# Settings that say what is made of a teacher's completions, but change none of them.
_CHOICE = {"rows", "compared"} | {
    f"synthesis.{key}" for key in ("filters", "keep", "scorer", "answer", "student_format", "instructions")
}  # fmt: skip
_NOT_WRITTEN_WITH = ("prompts", "teacher", "seed_tasks")  # told by what is in them, not by where they are


_ROWS = "data.fingerprint"


@dataclass(frozen=True)
class Result:
    """A finished run: its folder, and what `summary.json` says."""

    output: Path
    summary: dict[str, Any]

    @property
    def model(self) -> Path:
        """The student with its tokenizer, for `AutoModelForCausalLM.from_pretrained`."""
        return self.output / "model"


class Watcher:
    """What a run tells whoever watches; the command line draws it."""

    def stage(self, text: str) -> None:
        """A new part of the run begins."""

    def steps(self, rows: Sequence[Mapping[str, Any]], total: int) -> None:
        """Rows of `metrics.jsonl` since the last call; after a worker's death they begin again at the first."""

    def progress(self, done: int, total: int, text: str, unit: str = "row") -> None:
        """So much of the current part is done."""


def distill(
    config: RunConfig | str | os.PathLike, *, output: str | None = None, resume: bool = False,
    watcher: Watcher | None = None,
) -> Result:  # fmt: skip
    """Run `config` (a `RunConfig` or the path of its YAML file) to the end.

    Args:
        output: the run directory, instead of the config's.
        resume: go on with the run in that directory, if there is one.
        watcher: is told how the run goes.

    Raises:
        InputError: the settings, data or models are wrong, or the directory holds another run.
        TeacherUnavailable: a teacher did not answer in time; the last step is checkpointed.
        RunFailed: training broke down (the latest checkpoint stands), or no training row could be synthesised.
    """
    if not isinstance(config, RunConfig):
        config = load_config(config, output=output)
    config = located(config, output)
    watcher = watcher or Watcher()
    watcher.stage("Reading data and models")
    with ExitStack() as stack:
        cache = stack.enter_context(opened(config.cache))
        attached = attached_teachers(config)
        inputs = read_inputs(config, attached, training=config.synthesis is None)
        prompts = prompts_written_for(config) if config.synthesis else []
        claim(config, resume)
        if config.teachers or config.training.workers:
            start_ray(cpus_needed(config))
        running: dict[str, Teacher] = {}
        if config.synthesis is not None:
            settled = (config.output_path / _ROWS).exists()
            running = write_rows(config, prompts, stack, cache, watcher, settled=settled)
            config = on_written_rows(config)
            inputs = read_inputs(config, attached)
        assert inputs.train is not None
        claim_rows(config, inputs.train.fingerprint)
        base = checked_base(config)
        demonstrator = _ranked(inputs, watcher)
        applications = applications_of(config)
        others = [each.name for each in config.training_teachers if each.name not in running]
        if new := [each.name for each in config.teachers if each.name in others and not each.attach]:
            watcher.stage(f"Bringing up {', '.join(new)} on Ray Serve")
        teachers = running | serve_all(config, applications, stack, cache, others)
        began = time.time()
        teacher_evaluation = None
        if config.compared_teacher and inputs.evaluation is not None:
            watcher.stage("Measuring the teacher")
            teacher_evaluation = _measured(config, teachers, inputs)
        if isinstance(config.rollouts, ServedRollouts):
            watcher.stage("Bringing up the student's policy on Ray Serve")
        policy = stack.enter_context(serve_policy(config, policy_application(config), inputs.tokenizer_name))
        total = config.training.steps or steps_of_epochs(config.training, len(inputs.train))
        watcher.stage(f"Training {config.name}: {config.method.kind}, {total} steps")
        job = Job(
            config, inputs.tokenizer_name, applications, inputs.train.table,
            None if inputs.evaluation is None else inputs.evaluation.table,
            None if inputs.pretraining is None else inputs.pretraining.table,
            policy,
            demonstrator,
            base,
        )  # fmt: skip
        with _watching(config.output_path, total, watcher):
            outcome = train(job)
    summary = summarise(config, inputs, outcome, teacher_evaluation, time.time() - began)
    _write_json(config.output_path / "summary.json", summary)
    write_report([config.output_path], config.output_path / "report.html")
    return Result(config.output_path, summary)


def evaluate_model(config: RunConfig, model: str | None = None, watcher: Watcher | None = None) -> dict[str, Any]:
    """Measure a model on the config's evaluation rows; by default the student this config has trained.

    Returns:
        A summary as `summary.json` holds it, as far as it applies.

    Raises:
        InputError: there are no evaluation rows or there is no such model.
    """
    config, watcher = located(config), watcher or Watcher()
    if config.data.evaluation is None:
        raise InputError("data.evaluation is missing; set it to the rows to measure on.")
    measured = model or str(config.output_path / "model")
    if model is None and not Path(measured).is_dir():
        raise InputError(f"There is no trained student in '{measured}'; run the config first, or give --model.")
    config = config.model_copy(update={"student": StudentConfig(model=measured)})
    with ExitStack() as stack:
        inputs = read_inputs(config, attached_teachers(config), training=False)
        assert inputs.evaluation is not None
        start_ray(cpus_needed(config))
        watcher.stage("Bringing up teachers" if config.teachers else "No teacher to compare with")
        applications = applications_of(config)
        teachers = serve_all(config, applications, stack, stack.enter_context(opened(config.cache)))
        watcher.stage(f"Measuring {measured}")
        demonstrator = _ranked(inputs, watcher)
        job = Job(config, inputs.tokenizer_name, applications, None, inputs.evaluation.table, demonstrator=demonstrator)
        evaluation = evaluate_remotely(job)
        teacher = _measured(config, teachers, inputs) if config.compared_teacher else None
    return {
        "name": Path(measured).name if model else config.name,
        "student": evaluation.metrics,
        "teacher": teacher.metrics if teacher else {},
    }


def synthesize(config: RunConfig, output: str | None = None, watcher: Watcher | None = None) -> dict[str, Any]:
    """Only have `config`'s training rows written, into `<output>/synthesis`; what is there is not asked for again.

    Returns:
        The summary, as `synthesis/summary.json` holds it.

    Raises:
        InputError: there is no `synthesis`, or the settings, data or models are wrong.
        RunFailed, TeacherUnavailable: as `distill`.
    """
    config, watcher = located(config, output), watcher or Watcher()
    if config.synthesis is None:
        raise InputError("synthesis is missing; set synthesis.kind to what a teacher is to write.")
    watcher.stage("Reading data and models")
    prompts = prompts_written_for(config)
    with ExitStack() as stack:
        start_ray(cpus_needed(config))
        write_rows(config, prompts, stack, None, watcher, settled=False)
        summary = Store(written_rows(config).parent).summary
    assert summary is not None
    return summary


def write_rows(
    config: RunConfig, prompts: Sequence[Prompt], stack: ExitStack, cache: SignalCache | None, watcher: Watcher, *,
    settled: bool,
) -> dict[str, Teacher]:  # fmt: skip
    """Have the training rows written, unless they are.

    Args:
        stack: holds the teacher if training needs it too; else it comes down at once.
        settled: rows are learned from already; prompts that were left unanswered are not asked again.

    Returns:
        The teacher that stays up, by name.
    """
    assert config.synthesis is not None
    with Store(written_rows(config).parent) as store, ExitStack() as writing:
        store.claim(_made_with(config, prompts), _PLACEMENT, _CHOICE)
        if (summary := store.summary) and (settled or not summary["unanswered"]):
            return {}
        filters = filters_of(config)
        if not next(each for each in config.teachers if each.name == config.writer).attach:
            watcher.stage(f"Bringing up {config.writer} on Ray Serve")
        running = serve_all(config, applications_of(config), writing, cache, [config.writer])
        before = f", {len(store):,} completions are there" if len(store) else ""
        watcher.stage(f"Synthesising {config.synthesis.kind} for {len(prompts):,} prompts{before}")
        synthesise(
            config.synthesis, prompts, running[config.writer], store, filters, seed=config.seed,
            progress=partial(watcher.progress, unit="completion"),
        )  # fmt: skip
        if config.only_writing:
            return {}
        stack.enter_context(writing.pop_all())
        return running


def _made_with(config: RunConfig, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What the written rows depend on."""
    values = config.model_dump(mode="json")
    writer = next(teacher for teacher in values["teachers"] if teacher["name"] == config.writer)
    return {
        "synthesis": {key: value for key, value in values["synthesis"].items() if key not in _NOT_WRITTEN_WITH},
        "seed": config.seed,
        "teachers": {"model": writer["model"] or writer["name"], "engine": writer["engine"]},
        "prompts": fingerprint(prompts),
        "rows": fingerprint(prompts, whole=True),
        "compared": fingerprint(compared_prompts(config)),
    }


def located(config: RunConfig, output: str | None = None) -> RunConfig:
    """`config` with local paths made absolute: workers run in folders of their own."""
    values = config.model_dump(mode="json")
    values["output"] = output or str(config.output_path)
    values["output"] = str(Path(values["output"]).expanduser().absolute())
    for section, key in [
        (values["student"], "model"), (values["student"], "config"), (values["student"], "tokenizer"),
        (values["data"]["train"] or {}, "path"), (values["data"]["evaluation"] or {}, "path"),
        (((values["synthesis"] or {}).get("prompts")) or {}, "path"), (values["synthesis"] or {}, "seed_tasks"),
        ((values["method"].get("pretraining") or {}).get("data") or {}, "path"),
        *((teacher, "model") for teacher in values["teachers"]), *_of_demonstrations(values["method"]),
    ]:  # fmt: skip
        value = section.get(key)
        if isinstance(value, str) and (value.startswith(("./", "../", "~")) or os.path.exists(value)):
            section[key] = os.path.abspath(os.path.expanduser(value))
    for section, key in [(values["training"], "checkpoints"), (values["cache"] or {}, "path")]:
        place = section.get(key)
        if place and "://" not in place:
            section[key] = os.path.abspath(os.path.expanduser(place))
    return parse_config(values)


def _of_demonstrations(method: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Where method `in_context` names local paths."""
    demonstrations = method.get("demonstrations", {})
    return [(demonstrations, "encoder"), (demonstrations.get("pool") or {}, "path")]


def claim(config: RunConfig, resume: bool) -> None:
    """Make the run directory, or check that it holds this very run where `resume` is set.

    Raises:
        InputError: it holds another run, or something else.
    """
    folder, file = config.output_path, config.output_path / "config.yaml"
    if file.exists():
        if not resume:
            raise InputError(
                f"The output directory '{folder}' holds another run; continue it with --resume, or give another "
                "--output."
            )
        before, now = (each.model_dump(mode="json") for each in (load_config(file), config))
        # Until there are rows nothing is learned, and what is written for them looks after itself (`Store.claim`).
        if (folder / _ROWS).exists() and (place := difference(before, now, _PLACEMENT)):
            raise InputError(
                f"The run in '{folder}' was started with another '{place}'; resume it with the same settings, or "
                "give another --output."
            )
    elif folder.exists() and (not folder.is_dir() or any(each.name != "synthesis" for each in folder.iterdir())):
        raise InputError(f"The output '{folder}' exists and is no run directory of rayk; give another --output.")
    elif config.training.checkpoints and not resume and _checkpointed(config.training.checkpoints):
        raise InputError(
            f"training.checkpoints '{config.training.checkpoints}' holds another run's; continue it with --resume, or "
            "give another place."
        )
    _write_into(folder, "config.yaml", config.to_yaml())


def claim_rows(config: RunConfig, fingerprint: str) -> None:
    """Check that a resumed run learns from the rows it was started with, and not from others under the same path.

    Raises:
        InputError: it does not.
    """
    folder = config.output_path
    if (folder / _ROWS).exists() and (folder / _ROWS).read_text(encoding="utf-8") != fingerprint:
        assert config.data.train is not None
        raise InputError(
            f"The rows of data.train '{config.data.train.path}' are not those the run in '{folder}' was started "
            "with; give it those back, or another --output."
        )
    _write_into(folder, _ROWS, fingerprint)


def checked_base(config: RunConfig) -> str:
    """The fingerprint of the weights below the student's adapter, which its checkpoints do not hold; "" without one.

    Raises:
        InputError: the run's checkpoints were made on other weights under the same name.
    """
    base = base_fingerprint(config.student)
    before = CheckpointStore(config.checkpoints).base() if base else ""
    if before not in ("", base):
        raise InputError(
            f"The weights of student.model '{config.student.model}' are not those the run in '{config.output_path}' "
            "was started with, and its checkpoints hold the adapter alone; give it those back, or another --output."
        )
    return base


def _write_into(folder: Path, name: str, text: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"The output directory '{folder}' cannot be written: {error.strerror}.") from error


def _checkpointed(place: str) -> bool:
    try:
        return bool(CheckpointStore(place).steps())
    except (OSError, ValueError) as error:
        raise InputError(f"training.checkpoints '{place}' cannot be read: {str(error).splitlines()[0]}") from error


def cpus_needed(config: RunConfig) -> float:
    """Logical CPUs the run asks Ray for at a time."""
    needs = {t.name: t.resources.num_cpus * t.replicas.max for t in config.teachers if not t.attach}
    writing = needs.get(config.writer, 0.0)
    training = sum(need for name, need in needs.items() if name not in config.only_writing)
    if isinstance(config.rollouts, ServedRollouts):
        training += config.rollouts.resources.num_cpus * config.rollouts.replicas.max
    return max(writing, training + config.training.workers * config.training.resources.num_cpus) + 1


def attached_teachers(config: RunConfig) -> dict[str, Teacher]:
    """The teachers that must already run, asked.

    Raises:
        InputError: one does not answer.
    """
    names = [teacher.name for teacher in config.teachers if teacher.attach]
    if names:
        start_ray(cpus_needed(config))
    return {name: connect_teacher(name) for name in names}


def applications_of(config: RunConfig) -> dict[str, str]:
    """Each teacher's Serve application."""
    return {t.name: t.name if t.attach else f"{t.name}-{_owner(config)}" for t in config.teachers}


def policy_application(config: RunConfig) -> str:
    """The Serve application of the run's own policy; no teacher's name begins so."""
    return f"_policy-{_owner(config)}"


def _owner(config: RunConfig) -> str:
    """What a run's own Serve applications are named after, its output, so that two runs on a cluster do not take each
    other's, and a resumed run finds what a killed one has left."""
    return hashlib.sha256(str(config.output_path).encode()).hexdigest()[:8]


def serve_all(
    config: RunConfig, applications: Mapping[str, str], stack: ExitStack, cache: SignalCache | None,
    names: Collection[str] | None = None,
) -> dict[str, Teacher]:  # fmt: skip
    """The teachers of these names, by default those of training, up until `stack` closes."""
    running = {}
    names = [each.name for each in config.training_teachers] if names is None else names
    for teacher in (each for each in config.teachers if each.name in names):
        application = teacher.model_copy(update={"name": applications[teacher.name]})
        served = serve_teacher(application, cache if teacher.gives_signals else None)
        running[teacher.name] = stack.enter_context(served)
    return running


def _ranked(inputs: Inputs, watcher: Watcher) -> Demonstrator | None:
    """The inputs' demonstrator, which knows now what is nearest to each row."""
    if inputs.demonstrator is not None:
        watcher.stage("Choosing demonstrations")
        for table in (inputs.train, inputs.evaluation):
            inputs.demonstrator.rank(table or ())
    return inputs.demonstrator


def _measured(config: RunConfig, teachers: Mapping[str, Teacher], inputs: Inputs) -> Evaluation:
    assert inputs.evaluation is not None
    teacher = scorer_of(config, teachers, inputs.tokenizer)
    assert teacher is not None
    return evaluate_teacher(
        teacher, config.evaluation, list(inputs.evaluation), inputs.tokenizer, demonstrator=inputs.demonstrator
    )


def summarise(
    config: RunConfig, inputs: Inputs, outcome: Outcome, teacher: Evaluation | None, seconds: float
) -> dict[str, Any]:
    """What a run came to, for `summary.json`."""
    assert inputs.train is not None and outcome.size is not None
    student = outcome.evaluation
    rows = read_lines(config.output_path / "metrics.jsonl")
    spent = sum(row["step_seconds"] for row in rows) or 1.0
    theirs = {answer.where: answer.text for answer in teacher.answers} if teacher else {}
    places = {example.where: place for place, example in enumerate(inputs.evaluation or ())}
    answers = sorted(student.answers if student else [], key=lambda answer: places[answer.where])
    return {
        "name": config.name,
        "method": config.method.kind,
        "about": METHODS[config.method.kind].summary,
        "steps": len(rows),
        "seconds": seconds,
        "training_seconds": spent,
        "tokens_per_second": sum(row["tokens"] for row in rows) / spent,
        "teacher_wait_share": sum(row["teacher_wait_seconds"] for row in rows) / spent,
        "rows": {
            "train": len(inputs.train),
            "evaluation": len(inputs.evaluation) if inputs.evaluation else 0,
            "skipped": inputs.train.skipped,
        },
        "parameters": asdict(outcome.size),
        "student": student.metrics if student else {},
        "teacher": teacher.metrics if teacher else {},
        "samples": [
            {**asdict(answer), "teacher": theirs.get(answer.where)} for answer in answers[: config.evaluation.samples]
        ],
        "machine": {"cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()},
    }


@contextmanager
def _watching(folder: Path, total: int, watcher: Watcher) -> Iterator[None]:
    """Tell the watcher of new rows in `metrics.jsonl` while training runs, wherever rank 0 is."""
    done = threading.Event()
    follower = Follower(folder / "metrics.jsonl")

    def tell() -> None:
        finished = False
        while not finished:
            finished = done.wait(0.5)
            if rows := follower.rows():
                watcher.steps(rows, total)

    thread = threading.Thread(target=tell, name="rayk-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _write_json(path: Path, values: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(values, indent=2, ensure_ascii=False), encoding="utf-8")
    part.replace(path)
