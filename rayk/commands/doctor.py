"""`rayk doctor`: find the problems of this machine and of a config before anything runs."""

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from rayk.config import RunConfig, load_config
from rayk.errors import RaykError

_PACKAGES = ("ray", "torch", "transformers", "datasets", "pyarrow")
_HIGH_LEARNING_RATE = 0.1


@dataclass(frozen=True)
class Check:
    """One finding, with state `ok`, `note` (allowed, but maybe not intended) or `wrong`."""

    state: Literal["ok", "note", "wrong"]
    text: str


def examine(
    config: str | None, overrides: list[str] | None = None, device_memory: str | None = None
) -> Iterator[Check]:
    """Check this machine, then the config. An error on which later checks depend is the last finding.

    Args:
        device_memory: the memory of a worker's GPU, such as 80GB; None: that of this machine.
    """
    try:
        yield from _check_machine()
        if config is None:
            return
        settings = load_config(config, overrides)
        yield Check("ok", f"{config}: the settings are well-formed ({settings.method.kind}).")
        yield from _check_run(settings, device_memory)
    except RaykError as error:
        yield Check("wrong", str(error))


def _check_machine() -> Iterator[Check]:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES)
    yield Check("ok", f"Python {platform.python_version()}, {versions}")
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        yield Check("ok", f"{len(names)} GPU(s) on this machine: {', '.join(names)}")
    else:
        yield Check("note", f"No GPU on this machine; {os.cpu_count()} CPU cores.")
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        yield Check("note", "Ray: RAY_ADDRESS is not set, so a run starts its own local cluster.")
        return
    from rayk.serving.cluster import check_address, start_ray

    check_address(address)
    start_ray()
    yield Check("ok", f"Ray: connected to the cluster at {address}.")


def _check_run(settings: RunConfig, device_memory: str | None) -> Iterator[Check]:
    from rayk.run import connect_attached_teachers, next_round, with_absolute_paths
    from rayk.run.inputs import read_inputs
    from rayk.run.synthesis_inputs import synthesized_rows_path, with_synthesized_rows

    settings = with_absolute_paths(settings)
    yield _check_output(settings)
    yield from _check_places(settings)
    yield from _check_resources(settings)
    if settings.rounds > 1:
        rounds = settings.rounds
        settings, round_info = next_round(settings)
        yield Check("ok", f"rounds: round {round_info.number + 1} of {rounds} is next, in {settings.output_path}.")
    attached = connect_attached_teachers(settings)
    for teacher in attached.values():
        yield Check("ok", f"Teacher '{teacher.name}' responds: {teacher.info.model}, {teacher.info.dtype}.")
    if settings.synthesis is not None:
        yield from _check_synthesis(settings)
    has_rows = settings.synthesis is None or synthesized_rows_path(settings).with_name("summary.json").exists()
    if not has_rows:
        yield Check("note", "The training rows are not synthesized yet; the run does this first.")
    settings = with_synthesized_rows(settings) if has_rows else settings
    inputs = read_inputs(settings, attached, training=has_rows)
    yield from _check_vocabularies(inputs)
    yield from _check_rows(settings, inputs)
    yield from _check_models(settings, inputs)
    yield from _check_memory(settings, inputs, device_memory)
    yield from _check_signals(settings)


def _check_output(settings: RunConfig) -> Check:
    if settings.output_path.joinpath("config.yaml").exists():
        return Check(
            "note",
            f"{settings.output_path} contains a run already; `rayk run` needs --resume to continue it, or another "
            "--output.",
        )
    return Check("ok", f"The run directory will be {settings.output_path}.")


def _check_places(settings: RunConfig) -> Iterator[Check]:
    """Check that the URIs to which the run writes can be written."""
    from rayk.config.paths import is_uri
    from rayk.config.secrets import hide
    from rayk.errors import InputError
    from rayk.storage.places import check_place, first_line

    cache = settings.cache.path if settings.cache else None
    places = {
        "training.checkpoints": settings.training.checkpoints, "student.save_to": settings.student.save_to,
        "cache.path": cache,
    }  # fmt: skip
    for name, place in places.items():
        if place is None or not is_uri(place):
            continue
        try:
            check_place(place)
        except (OSError, ValueError) as error:
            raise InputError(f"{name} '{hide(place)}' cannot be written: {first_line(error)}.") from error
        yield Check("ok", f"{name} can be written: {hide(place)}.")


def _check_resources(settings: RunConfig) -> Iterator[Check]:
    """Compare the resources that the run requires with those of the cluster, or with those of this machine if the run
    starts a local cluster."""
    from rayk.run.applications import missing_resources, requested_cpus

    if os.environ.get("RAY_ADDRESS"):
        import ray

        found = ray.cluster_resources()
        missing = missing_resources(settings, found.get("CPU", 0), found.get("GPU", 0))
        if missing:
            yield Check("note", f"{missing} On this cluster it waits until nodes are added.")
            return
    else:
        import torch

        if missing := missing_resources(settings, float("inf"), torch.cuda.device_count()):
            yield Check("wrong", missing)
            return
        if missing := missing_resources(settings, os.cpu_count() or 1, float("inf")):
            yield Check("note", f"{missing} On this machine they share the cores, so the run is slow.")
            return
    yield Check("ok", f"Workers and replicas use up to {requested_cpus(settings):g} CPUs at the same time.")


def _check_synthesis(settings: RunConfig) -> Iterator[Check]:
    from rayk.run.synthesis_inputs import build_row_filters, read_synthesis_prompts
    from rayk.synthesis import try_functions

    assert settings.synthesis is not None
    prompts = read_synthesis_prompts(settings)
    build_row_filters(settings)
    rows = "" if settings.synthesis.makes_prompts else f" for {len(prompts):,} prompts"
    yield Check("ok", f"synthesis: teacher '{settings.synthesis_teacher}' generates {settings.synthesis.kind}{rows}.")
    for result in try_functions(settings.synthesis, prompts):
        yield Check("ok", f"{result}.")


def _check_vocabularies(inputs: Any) -> Iterator[Check]:
    for note in inputs.notes:
        yield Check("note", note)
    name, vocabulary = inputs.tokenizer_name, inputs.vocabulary
    for teacher, aligner in inputs.views.aligners.items():
        shared = f"{aligner.shared_tokens:,} of the student's {aligner.student_tokens:,} tokens"
        yield Check(
            "ok", f"Teacher '{teacher}' has another tokenizer, which contains {shared}; rows are aligned by bytes."
        )
    if not vocabulary.teacher_sizes:
        yield Check("ok", f"Tokenizer {name}: {vocabulary.size:,} tokens.")
    elif vocabulary.notes:
        yield Check("ok", f"Tokenizer {name}: teachers and student share {vocabulary.size:,} token ids.")
    else:
        yield Check("ok", f"Tokenizer {name}: teachers and student agree on the ids and on sample texts.")


def _check_rows(settings: RunConfig, inputs: Any) -> Iterator[Check]:
    for name, table in (("train", inputs.train), ("evaluation", inputs.evaluation)):
        if table is None:
            continue
        skipped = sum(table.skipped.values())
        counted = int(table.counted_tokens.sum())
        text = f"data.{name}: {len(table):,} rows, {counted:,} counted tokens, longest {table.longest}"
        yield Check(
            "note" if skipped else "ok", text + (f"; {skipped} rows skipped: {table.skipped}" if skipped else ".")
        )
    batch_size = settings.training.batch_size
    if inputs.train is not None and len(inputs.train) < batch_size:
        yield Check(
            "note",
            f"training.batch_size is {batch_size}, but data.train has only {len(inputs.train)} rows, so that one step "
            "trains on rows several times; lower it, or give more rows.",
        )
    if inputs.train is not None and _lacks_chat_template(settings, inputs.tokenizer):
        yield Check(
            "note",
            "The student's tokenizer has a chat template, but data.chat_template is false, so that rows are plain text "
            "to the models; set it to true for a chat model, unless the prompts already contain the template's marks.",
        )


def _lacks_chat_template(settings: RunConfig, tokenizer: Any) -> bool:
    """Return whether rows with a plain prompt are trained on without the tokenizer's chat template."""
    from rayk.data.row_texts import RowTexts
    from rayk.data.sources import read_rows

    source = settings.data.train
    if settings.data.chat_template or source is None or not getattr(tokenizer, "chat_template", None):
        return False
    row, texts = next(iter(read_rows(source))), RowTexts(source)
    row_format = texts.format_of(
        row, prompts_only=not settings.method.reads_completions, pairs=settings.method.reads_pairs
    )
    if row_format not in ("prompt_completion", "preference"):
        return False
    if row_format == "preference" and texts.has_conversations(row):
        return False
    return not any(mark in texts.prompt(row) for mark in tokenizer.all_special_tokens)


def _is_student_itself(settings: RunConfig, teacher: Any) -> bool:
    """Return whether a teacher predicts the same as the student before training."""
    student = settings.student
    reads_more = teacher.prompt_template is not None or settings.method.shown_demonstrations is not None
    return teacher.model == student.model and student.layers is None and teacher.follows is None and not reads_more


def _check_models(settings: RunConfig, inputs: Any) -> Iterator[Check]:
    from rayk.config import StudentConfig
    from rayk.errors import InputError
    from rayk.models.student import count_planned_parameters

    size = count_planned_parameters(settings.student, inputs.tokenizer)
    yield Check("ok", f"The student trains {size}.")
    for teacher in settings.signal_teachers:
        if teacher.model is None:
            continue
        if _is_student_itself(settings, teacher):
            yield Check(
                "note",
                f"Teacher '{teacher.name}' is the same model as the student and reads the same prompts; at first "
                "there is nothing to learn from it.",
            )
        try:
            model = StudentConfig(model=teacher.model, trust_remote_code=teacher.trust_remote_code)
            total = count_planned_parameters(model, inputs.tokenizer).total
        except InputError:  # such as a quantized model, whose size is not needed
            continue
        if total < size.total:
            yield Check(
                "note",
                f"Teacher '{teacher.name}' has {total:,} parameters and the student {size.total:,}; if they were "
                "swapped, exchange teachers.model and student.model.",
            )
    training = settings.training
    assert training.learning_rate is not None  # `RunConfig` sets it
    steps = training.warmup_steps
    warmup = f"{training.warmup_share or 0:.0%} of the steps as warmup" if steps is None else f"{steps} warmup steps"
    yield Check(
        "ok",
        f"Optimization: learning rate {training.learning_rate:g} ({training.schedule}, {warmup}), "
        f"precision {training.precision}.",
    )
    if training.learning_rate >= _HIGH_LEARNING_RATE:
        yield Check(
            "note",
            f"training.learning_rate is {training.learning_rate:g}, at which training diverges with AdamW; "
            "usual values are 1e-6 to 1e-3.",
        )
    if (retriever := settings.retriever) is not None:
        most = retriever.candidates * retriever.rounds
        reward = f" and {retriever.reward_model.model}" if retriever.reward_model else ""
        yield Check(
            "ok",
            f"Retriever: {retriever.encoder}{reward} can be loaded; teacher '{settings.retriever_teacher}' scores up "
            f"to {most} demonstrations for each training input.",
        )


def _check_memory(settings: RunConfig, inputs: Any, device_memory: str | None) -> Iterator[Check]:
    from rayk.run.devices import worker_memory
    from rayk.run.verdict import estimate_worker, memory_verdict

    limit = worker_memory(settings, device_memory)
    estimate = estimate_worker(settings, inputs, limit)
    lines = [(f"{part.name}{', on the host' * (part.phase == 'host')}", part.bytes) for part in estimate.parts]
    parts = "\n".join(f"    {name:<32}{size / 1e9:>10,.2f} GB" for name, size in lines)
    yield Check("ok", f"Memory of a worker, with {estimate.tokens:,} tokens in a micro-batch:\n{parts}")
    yield Check(*memory_verdict(estimate, limit))


def _check_signals(settings: RunConfig) -> Iterator[Check]:
    from rayk.config.support import bytes_per_token
    from rayk.models import load_model_config

    support = settings.signal_support
    for teacher in settings.teachers:
        if support is not None and teacher.name == settings.evaluation_teacher and teacher.model is not None:
            model = load_model_config(teacher.model, trust_remote_code=teacher.trust_remote_code).get_text_config()
            size = bytes_per_token(support, model.vocab_size, model.hidden_size)
            yield Check("ok", f"Support {support.kind} of teacher '{teacher.name}': about {size:,.0f} bytes per token.")
