"""`rayk doctor`: what a run would stumble over, found without running anything."""

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from rayk.config import RunConfig, load_config
from rayk.errors import RaykError

_PACKAGES = ("ray", "torch", "transformers", "datasets", "pyarrow")


@dataclass(frozen=True)
class Check:
    """One finding: `ok`, a `note` worth knowing, or something `wrong`."""

    state: Literal["ok", "note", "wrong"]
    text: str


def examine(config: str | None, overrides: list[str] | None = None) -> Iterator[Check]:
    """Check this machine, then the config, as far as one check lets the next be made."""
    yield from _machine()
    if config is None:
        return
    try:
        settings = load_config(config, overrides)
        yield Check("ok", f"{config}: the settings are well-formed ({settings.method.kind}).")
        yield from _run(settings)
    except RaykError as error:
        yield Check("wrong", str(error))


def _machine() -> Iterator[Check]:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES)
    yield Check("ok", f"Python {platform.python_version()}, {versions}")
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        yield Check("ok", f"{len(names)} GPU(s) here: {', '.join(names)}")
    else:
        yield Check("note", f"No GPU in this process; {os.cpu_count()} CPU cores.")
    address = os.environ.get("RAY_ADDRESS")
    yield Check(
        "ok" if address else "note",
        f"Ray: {address or 'RAY_ADDRESS is not set, so a run starts its own local cluster.'}",
    )


def _run(settings: RunConfig) -> Iterator[Check]:
    from rayk.models.student import count_planned_parameters
    from rayk.run import connect_attached_teachers, required_cpus, next_round, with_absolute_paths
    from rayk.run.inputs import build_row_filters, with_synthesized_rows, read_synthesis_prompts, read_inputs, synthesized_rows_path

    settings = with_absolute_paths(settings)
    if settings.output_path.joinpath("config.yaml").exists():
        yield Check(
            "note", f"{settings.output_path} holds a run already; `rayk run` will want --resume or another --output."
        )
    if settings.rounds > 1:
        rounds = settings.rounds
        settings, which = next_round(settings)
        yield Check("ok", f"rounds: {rounds}, of which round {which.number + 1} is next, in {settings.output_path}.")
    attached = connect_attached_teachers(settings)
    for teacher in attached.values():
        yield Check("ok", f"Teacher '{teacher.name}' answers: {teacher.info.model}, {teacher.info.dtype}.")
    if settings.synthesis is not None:
        prompts = read_synthesis_prompts(settings)
        build_row_filters(settings)
        kind = settings.synthesis.kind
        given = "" if settings.synthesis.makes_prompts else f" for {len(prompts):,} prompts"
        yield Check("ok", f"synthesis: teacher '{settings.synthesis_teacher}' writes {kind}{given}.")
    written = settings.synthesis is None or synthesized_rows_path(settings).with_name("summary.json").exists()
    if not written:
        yield Check("note", "The training rows are not written yet; the run has them written first.")
    inputs = read_inputs(with_synthesized_rows(settings) if written else settings, attached, training=written)
    yield Check("ok", f"Tokenizer {inputs.tokenizer_name}: teachers and student agree.")
    for what, table in (("train", inputs.train), ("evaluation", inputs.evaluation)):
        if table is None:
            continue
        skipped = sum(table.skipped.values())
        counted = int(table.counted_tokens.sum())
        text = f"data.{what}: {len(table):,} rows, {counted:,} counted tokens, longest {table.longest}"
        yield Check(
            "note" if skipped else "ok", text + (f"; {skipped} rows skipped: {table.skipped}" if skipped else ".")
        )
    size = count_planned_parameters(settings.student, inputs.tokenizer)
    yield Check("ok", f"The student trains {size}.")
    if (retriever := settings.retriever) is not None:
        most = retriever.candidates * retriever.rounds
        through = f" and {retriever.reward_model.model}" if retriever.reward_model else ""
        yield Check(
            "ok",
            f"Retriever: {retriever.encoder}{through} can be loaded; teacher '{settings.retriever_teacher}' scores up "
            f"to {most} demonstrations for each training input.",
        )
    yield from _signal_size(settings)
    yield Check("ok", f"The run asks Ray for {cpus_needed(settings):g} CPUs.")


def _signal_size(settings: RunConfig) -> Iterator[Check]:
    from rayk.config.support import bytes_a_token
    from rayk.methods import METHODS
    from rayk.models import load_model_config

    yield Check("ok", f"{settings.method.kind} asks of a teacher: {METHODS[settings.method.kind].needs}.")
    support = settings.signal_support
    for teacher in settings.teachers:
        if support is not None and teacher.name == settings.evaluation_teacher and teacher.model is not None:
            model = load_model_config(teacher.model, trust_remote_code=teacher.trust_remote_code).get_text_config()
            size = bytes_a_token(support, model.vocab_size, model.hidden_size)
            yield Check("ok", f"Support {support.kind} of teacher '{teacher.name}': about {size:,.0f} bytes a token.")
