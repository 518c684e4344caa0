"""Whose a run directory is: its settings and the rows it learns from, held against those it was started with."""

import os
from pathlib import Path
from typing import Any

from rayk.config import RunConfig, difference, load_config, parse_config
from rayk.errors import InputError
from rayk.models.student import base_fingerprint
from rayk.training.checkpoint import CheckpointStore

# Settings that say where and how fast, not what is learned: they may change between a run and its resumption.
PLACEMENT = {
    "name", "output", "tracking", "evaluation", "data.evaluation", "student.gradient_checkpointing", "cache.path",
    "cache.max_gigabytes", "synthesis.in_flight",
    *(f"training.{key}" for key in (
        "workers", "resources", "threads", "micro_batch_tokens", "prefetch", "checkpoint_every_steps", "checkpoints",
        "keep_checkpoints", "max_failures", "collective_timeout_seconds",
    )),
    *(f"teachers.{key}" for key in (
        "attach", "replicas", "resources", "call_tokens", "in_flight", "deadline_seconds", "engine.batch_tokens",
        "engine.device", "engine.threads", "engine.tensor_parallel_size", "engine.across_nodes",
        "engine.gpu_memory_utilization", "engine.api_key_variable", "engine.concurrency", "engine.requests_per_minute",
        "engine.tokens_per_minute", "engine.attempts", "engine.timeout_seconds",
        "engine.price_per_million_prompt_tokens", "engine.price_per_million_completion_tokens",
    )),
    *(f"rollouts.{key}" for key in (
        "kind", "engine", "replicas", "resources", "in_flight", "deadline_seconds", "timeout_seconds",
    )),
    *(f"synthesis.student.{key}" for key in (
        "replicas", "resources", "deadline_seconds", "engine.batch_tokens", "engine.device", "engine.threads",
        "engine.tensor_parallel_size", "engine.across_nodes", "engine.gpu_memory_utilization",
    )),
}  # fmt: skip
# Settings that say what is made of a teacher's completions, or what is asked beside them, but change none of them.
CHOICE = {"rows", "compared", "judges"} | {
    f"synthesis.{key}" for key in (
        "filters", "keep", "chosen", "scorer", "answer", "student_format", "instructions", "instruction_filters",
        "keep_longest", "threshold", "blacklist", "hard_template", "easy_template", "referee_template",
        "referee_sampling",
    )
}  # fmt: skip
ROUNDS = "rounds"
"""Where the rounds' own run directories are."""
_ROWS = "data.fingerprint"


def with_absolute_paths(config: RunConfig, output: str | None = None) -> RunConfig:
    """`config` with local paths made absolute: workers run in folders of their own."""
    values = config.model_dump(mode="json")
    values["output"] = output or str(config.output_path)
    values["output"] = str(Path(values["output"]).expanduser().absolute())
    for section, key in [
        (values["student"], "model"), (values["student"], "config"), (values["student"], "tokenizer"),
        (values["data"]["train"] or {}, "path"), (values["data"]["evaluation"] or {}, "path"),
        (((values["synthesis"] or {}).get("prompts")) or {}, "path"), (values["synthesis"] or {}, "seed_tasks"),
        (values["synthesis"] or {}, "tokenizer"),
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
    retriever = demonstrations.get("retriever") or {}
    return [
        (demonstrations, "encoder"), (demonstrations.get("pool") or {}, "path"), (retriever, "encoder"),
        (retriever.get("reward_model") or {}, "model"),
    ]  # fmt: skip


def claim(config: RunConfig, resume: bool) -> None:
    """Make the run directory, or check that it holds this very run where `resume` is set.

    Raises:
        InputError: it holds another run, or something else.
    """
    check(config, resume)
    write_config(config)


def check(config: RunConfig, resume: bool) -> None:
    """See `claim`; nothing is written."""
    folder, file = config.output_path, config.output_path / "config.yaml"
    in_rounds, begun = (folder / ROUNDS).exists(), {ROUNDS} if config.rounds > 1 else {"synthesis"}
    if (in_rounds or learned_from(config)) and in_rounds != (config.rounds > 1):
        raise InputError(
            f"The run in '{folder}' was started {'with' if in_rounds else 'without'} 'rounds'; resume it as it was, or "
            "give another --output."
        )
    if file.exists():
        if not resume:
            raise InputError(
                f"The output directory '{folder}' holds another run; continue it with --resume, or give another "
                "--output."
            )
        before, now = (each.model_dump(mode="json") for each in (load_config(file), config))
        # Until there are rows nothing is learned, and what is written for them looks after itself (`CompletionStore.claim`).
        if learned_from(config) and (place := difference(before, now, PLACEMENT)):
            raise InputError(
                f"The run in '{folder}' was started with another '{place}'; resume it with the same settings, or "
                "give another --output."
            )
    elif folder.exists() and (not folder.is_dir() or any(each.name not in begun for each in folder.iterdir())):
        raise InputError(f"The output '{folder}' exists and is no run directory of rayk; give another --output.")
    elif config.training.checkpoints and not resume and _checkpointed(config.training.checkpoints):
        raise InputError(
            f"training.checkpoints '{config.training.checkpoints}' holds another run's; continue it with --resume, or "
            "give another place."
        )


def write_config(config: RunConfig) -> None:
    """Write `config.yaml` into the run directory.

    Raises:
        InputError: that cannot be written.
    """
    _write_into(config.output_path, "config.yaml", config.to_yaml())


def claim_rows(config: RunConfig, fingerprint: str) -> None:
    """Check that a resumed run learns from the rows it was started with, and not from others under the same path.

    Raises:
        InputError: it does not.
    """
    folder = config.output_path
    if learned_from(config) and (folder / _ROWS).read_text(encoding="utf-8") != fingerprint:
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


def learned_from(config: RunConfig) -> bool:
    """Whether the run in its directory has begun to learn from rows."""
    return (config.output_path / _ROWS).exists()


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
