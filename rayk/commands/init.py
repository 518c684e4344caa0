"""`rayk init`: write a commented config for given models and data.

It chooses usual settings for the first rows, the tokenizers and the models' sizes. Models whose files are not on this
machine are looked up on the Hugging Face hub; if that fails, it uses common values and adds a note.
"""

import json
import os
import re
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from rayk.commands.init_facts import COUNTED_ROWS, DataFacts, ModelFacts, find_endpoint_model, read_data, read_model
from rayk.config import DataConfig, DataSource, load_config
from rayk.config.paths import is_local_path
from rayk.data.row_texts import RowTexts
from rayk.data.tokenizing import RowTokenizer
from rayk.errors import InputError
from rayk.methods import METHODS
from rayk.models import real_vocab_size
from rayk.models.vocabulary import compare_vocabularies, read_vocabulary
from rayk.storage.atomic import disk_errors, write_whole

_EXAMPLE_TEACHER, _EXAMPLE_STUDENT = "Qwen/Qwen3-8B", "Qwen/Qwen3-0.6B"
_LONGEST = 4096
_TEACHER_METHODS = ("logit_kd", "on_policy", "minillm", "in_context")
_COMMENTS = {
    "supervised": "cross-entropy on the rows' completions",
    "logit_kd": "match the teacher's distribution at every token of the rows",
    "on_policy": "match the teacher's distribution on completions that the student generates",
    "minillm": "policy gradients of reverse KL on completions that the student generates",
    "in_context": "learn from demonstrations in the context as the teacher does",
    "preference": "DPO: prefer the chosen completion to the rejected one",
}


def init(teacher: str | None, student: str | None, data: str | None, method: str | None, path: Path) -> list[str]:
    """Write a config to `path`.

    Args:
        teacher: a model's name or folder, or the URL of an OpenAI-compatible endpoint.
        method: a kind of `rayk methods`; by default one that fits the rows and models.

    Returns:
        Notes on values that could not be looked up and on choices that were made.

    Raises:
        InputError: the file exists, a local model or the data cannot be read, or the method does not fit them.
    """
    if path.exists():
        raise InputError(f"'{path}' exists already; remove it, or give another file with -o.")
    if method is not None and method not in _COMMENTS:
        raise InputError(f"--method '{method}' is unknown; choose one of {', '.join(_COMMENTS)}.")
    notes: list[str] = []
    rows = read_data(data, notes)
    student_facts = read_model(student or _EXAMPLE_STUDENT, "student", student is not None, notes)
    endpoint = teacher if teacher and teacher.startswith(("http://", "https://")) else None
    teacher_facts = None
    if teacher and endpoint is None:
        teacher_facts = read_model(teacher, "teacher", True, notes)
    elif teacher is None and student is None and method != "supervised" and rows.row_format != "preference":
        teacher_facts = read_model(_EXAMPLE_TEACHER, "teacher", False, notes)
    kind = _choose_method(method, rows, student_facts, teacher_facts, endpoint, notes)
    text = _render(path, kind, rows, student_facts, teacher_facts, endpoint, notes)
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.encode())
    try:
        load_config(path)
    except InputError:
        path.unlink()
        raise
    return notes


def _choose_method(
    method: str | None, rows: DataFacts, student: ModelFacts, teacher: ModelFacts | None, endpoint: str | None,
    notes: list[str],
) -> str:  # fmt: skip
    """Return the method: the given one, or else one that fits the rows and models.

    Raises:
        InputError: the given method does not fit the rows or the teacher.
    """
    if method == "preference" and rows.row_format != "preference":
        raise InputError("--method preference needs rows with 'chosen' and 'rejected'; the rows have none.")
    if method in _TEACHER_METHODS:
        if endpoint is not None:
            raise InputError(
                f"--method {method} needs the teacher's distributions, but an endpoint returns only text; use --method "
                "supervised, for which the endpoint generates the completions."
            )
        if teacher is None:
            raise InputError(f"--method {method} needs a teacher; give one with --teacher.")
    differ = teacher is not None and _tokenizers_differ(student, teacher)
    if method is None:
        method = _default_method(rows, teacher is not None and not differ)
        if differ and rows.row_format != "preference":
            notes.append(
                "Teacher and student have different tokenizers, so that distributions cannot be compared: the teacher "
                "generates completions, and the student is trained on them."
            )
    elif differ and method in _TEACHER_METHODS:
        raise InputError(
            f"--method {method} compares distributions, but teacher and student have different tokenizers; use "
            "--method supervised, for which the teacher generates the completions."
        )
    if method == "supervised" and rows.row_format == "prompts" and teacher is None and endpoint is None:
        raise InputError("The rows have prompts but no completions; give a teacher that generates them with --teacher.")
    if method in ("on_policy", "minillm") and rows.row_format == "text":
        raise InputError(f"--method {method} needs rows with prompts, but these are plain text; use logit_kd.")
    if method == "preference" and (teacher or endpoint):
        notes.append("Preference pairs need no teacher, so --teacher is not used.")
    return method


def _default_method(rows: DataFacts, has_distributions: bool) -> str:
    if rows.row_format == "preference":
        return "preference"
    if not has_distributions:
        return "supervised"
    return "on_policy" if rows.row_format == "prompts" else "logit_kd"


def _tokenizers_differ(student: ModelFacts, teacher: ModelFacts) -> bool:
    """Return whether the tokenizers give tokens different ids; one may have more tokens than the other."""
    if student.tokenizer is None or teacher.tokenizer is None:
        return False
    try:
        compare_vocabularies(read_vocabulary(student.tokenizer), read_vocabulary(teacher.tokenizer))
    except InputError:
        return True
    return False


def _render(
    path: Path, kind: str, rows: DataFacts, student: ModelFacts, teacher: ModelFacts | None, endpoint: str | None,
    notes: list[str],
) -> str:  # fmt: skip
    """Return the YAML text."""
    if kind == "preference":
        teacher = endpoint = None
    chat, chat_comment = _chat_template(kind, rows, student)
    gpus = _num_gpus()
    synthesizes = kind == "supervised" and (teacher is not None or endpoint is not None)
    if synthesizes and rows.row_format == "text":
        notes.append("The rows are plain text without prompts, so the student is trained on them without the teacher.")
        synthesizes, teacher, endpoint = False, None, None
    lengths = _lengths(kind, rows, student, teacher, chat)
    schedule = _schedule(kind, rows.num_rows, student.parameters)
    answer_field = next(
        (
            name for name in ("answer", "label")
            if rows.evaluation and isinstance(rows.fields.get(name), str | int | float)
            and name not in rows.settings.values() and kind not in ("preference", "in_context")
        ),
        None,
    )  # fmt: skip
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["yaml"] = _to_yaml
    template = resources.files("rayk.commands").joinpath("init.yaml.j2").read_text(encoding="utf-8")
    student_name = re.sub(r"[^A-Za-z0-9._-]+", "-", student.model.rstrip("/").rsplit("/", 1)[-1]).lstrip("._-")
    text = environment.from_string(template).render(
        title=_title(kind, synthesizes), file=path, name=f"{student_name or 'student'}-{kind}", method=kind,
        teacher=_teacher_values(teacher, endpoint, path, notes),
        student={"model": _path_in_config(student.model, path), "size": _format_parameters(student)},
        data={
            "path": _path_in_config(rows.path, path), "settings": rows.settings, "rows": _format_num_rows(rows),
            "evaluation": rows.evaluation and _path_in_config(rows.evaluation, path),
            "evaluation_settings": rows.evaluation_settings,
        },
        chat_template=chat, chat_comment=chat_comment,
        synthesis={
            "chat": teacher is not None and teacher.has_chat_template,
            "comment": "an endpoint applies its own chat template" if endpoint else "use the teacher's chat template",
        } if synthesizes else None,
        method_comment=_COMMENTS[kind], method_lines=_method_lines(kind, rows, student),
        rollouts=kind in ("on_policy", "minillm"),
        workers=max(1, gpus - 1) if teacher else max(1, gpus), shared_gpu=gpus == 1 and teacher is not None,
        precision="bfloat16" if gpus else "float32",
        precision_comment="on GPUs" if gpus else "this machine has no GPU; use bfloat16 on GPUs",
        answer_field=answer_field, **lengths, **schedule,
    )  # fmt: skip
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def _title(kind: str, synthesizes: bool) -> str:
    if synthesizes:
        return "Sequence-level distillation: the teacher generates completions, the student is trained on them."
    return f"{kind}: {METHODS[kind].summary}."


def _teacher_values(
    teacher: ModelFacts | None, endpoint: str | None, path: Path, notes: list[str]
) -> dict[str, Any] | None:
    if endpoint is not None:
        model, comment = find_endpoint_model(endpoint, notes)
        local = re.match(r"https?://(localhost|127\.|\[::1\])", endpoint) is not None
        return {
            "endpoint": endpoint, "model": model, "model_comment": comment,
            "api_key_variable": None if local and "OPENAI_API_KEY" not in os.environ else "OPENAI_API_KEY",
        }  # fmt: skip
    if teacher is None:
        return None
    return {"endpoint": None, "model": _path_in_config(teacher.model, path), "size": _format_parameters(teacher)}


def _chat_template(kind: str, rows: DataFacts, student: ModelFacts) -> tuple[bool, str]:
    """Return whether rows are wrapped in the student's chat template, and why."""
    if kind == "in_context":
        return False, "the method lays out rows with their demonstrations itself"
    if rows.row_format == "messages":
        return False, "rows of messages always use the template"
    if not student.has_chat_template:
        return False, "true for a chat model"
    if rows.row_format == "text":
        return False, "rows are plain text"
    if any(isinstance(rows.fields.get(field), list) for field in ("prompt", "chosen")):
        return False, "rows of messages always use the template"
    if rows.rows:
        prompt = RowTexts(DataSource(path=rows.path, **rows.settings)).prompt(rows.rows[0])
        if any(mark in prompt for mark in student.tokenizer.all_special_tokens):
            return False, "the prompts already contain the template's marks"
    return True, "wrap prompt and completion in the student's chat template; false for a base model"


def _lengths(kind: str, rows: DataFacts, student: ModelFacts, teacher: ModelFacts | None, chat: bool) -> dict[str, int]:
    """Return limits on lengths in tokens that fit the first rows and both models."""
    limit = int(min(_LONGEST, student.positions, teacher.positions if teacher else _LONGEST))
    prompt, whole = _longest(kind, rows, student, chat)
    generated = min(512, _power_of_two(max(whole - prompt, 64) if rows.row_format != "prompts" else 256))
    generated = min(generated, max(limit // 4, 1))
    prompt_limit = min(limit - generated, _power_of_two(max(prompt * 3 // 2, 64)))
    whole_limit = min(limit, max(_power_of_two(max(whole * 3 // 2, 128)), prompt_limit + generated))
    if kind == "in_context":  # a row with its demonstrations
        whole_limit = min(limit, max(whole_limit * 4, 512))
    return {
        "max_prompt_tokens": prompt_limit, "max_tokens": whole_limit, "max_new_tokens": generated,
    }  # fmt: skip


def _longest(kind: str, rows: DataFacts, student: ModelFacts, chat: bool) -> tuple[int, int]:
    """Return the tokens of the longest prompt and the longest row among the first rows."""
    if student.tokenizer is None or not rows.rows:
        return 512, 1024
    source = DataSource(path=rows.path, **rows.settings)
    data = DataConfig(train=source, max_prompt_tokens=1 << 24, max_tokens=1 << 24, chat_template=chat)
    tokenizer = RowTokenizer(
        source, data, student.tokenizer, prompts_only=rows.row_format == "prompts", pairs=kind == "preference"
    )
    examples = list(tokenizer.examples(rows.rows))
    if not examples:
        raise InputError(f"The first rows of '{rows.path}' are empty; give rows with a prompt and a completion.")
    answers = [answer for example in examples for answer in example.answers]
    return max(answer.prompt_tokens for answer in answers), max(map(len, answers))


def _schedule(kind: str, num_rows: int | None, parameters: int | None) -> dict[str, Any]:
    """Return the settings of `training` that depend on the number of rows and on the size of the student."""
    rows = num_rows or 10_000
    batch_size = max(1, min(32, _power_of_two(rows // 4 + 1) // 2))
    epochs = 3 if rows < 2_000 else 2 if rows < 20_000 else 1
    if kind in ("on_policy", "minillm") and rows >= 500:
        epochs = 1
    steps = max(1, rows * epochs // batch_size)
    rate = 2e-5 if parameters is None or parameters > 300e6 else 1e-4 if parameters > 30e6 else 5e-4
    rate *= {"on_policy": 0.5, "minillm": 0.25, "preference": 0.05, "in_context": 0.5}.get(kind, 1.0)
    mantissa, exponent = f"{rate:.1e}".split("e")
    return {
        "batch_size": batch_size, "epochs": epochs, "learning_rate": f"{mantissa}e{int(exponent)}",
        "warmup_steps": min(20, steps // 10), "every_steps": max(1, steps // 5),
        "checkpoint_every_steps": min(100, max(1, steps // 4)),
    }  # fmt: skip


def _method_lines(kind: str, rows: DataFacts, student: ModelFacts) -> list[str]:
    k = min(64, real_vocab_size(student.tokenizer)) if student.tokenizer is not None else 64
    return {
        "supervised": [],
        "logit_kd": [
            "divergence: forward_kl  # or reverse_kl, {name: jensen_shannon, beta: 0.5}, …",
            f"support: {{kind: topk, k: {k}}}  # the teacher's k most likely tokens, and the rest as one outcome",
            "hard_label_weight: 0.0  # share of cross-entropy on the rows' own tokens",
        ],
        "on_policy": [
            "divergence: reverse_kl  # or forward_kl, {name: jensen_shannon, beta: 0.5}, …",
            f"support: {{kind: requested, k: {k // 2 or 1}}}  # the teacher's k most likely tokens, and",
            f"requested_ids: {k // 2 or 1}  # the student's own most likely tokens",
            "student_fraction: 1.0  # share of rows whose completion the student generates",
        ],
        "minillm": ["inner_epochs: 1  # passes over the completions of a step; the paper takes 4"],
        "in_context": [
            "demonstrations: {k: 4, choice: random, max_tokens: 256}",
            f"targets: {'label_words' if 'options' in rows.fields else 'tokens'}  # label_words: rows with 'options'",
        ],
        "preference": [
            "beta: 0.1  # strength of the tie to the reference, the student before training",
        ],
    }[kind]


def _path_in_config(name: str, path: Path) -> str:
    """Return a model's name unchanged, and a local path relative to the folder of the config `path` if it is inside,
    else absolute."""
    if not is_local_path(name) or not os.path.exists(os.path.expanduser(name)):
        return name
    absolute = os.path.abspath(os.path.expanduser(name))
    relative = os.path.relpath(absolute, path.absolute().parent)
    return absolute if relative.startswith("..") else f"./{relative}"


def _to_yaml(value: Any) -> str:
    """Return a value on one line of YAML."""
    if isinstance(value, str) and "\n" in value:
        return json.dumps(value, ensure_ascii=False)
    return yaml.safe_dump(value, width=10_000, allow_unicode=True).removesuffix("...\n").strip()


def _format_parameters(model: ModelFacts) -> str:
    return "" if model.parameters is None else f"{model.parameters:,}"


def _format_num_rows(rows: DataFacts) -> str:
    if rows.num_rows is None:
        return ""
    return f"more than {COUNTED_ROWS:,}" if rows.num_rows > COUNTED_ROWS else f"{rows.num_rows:,}"


def _power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least `number`."""
    return 1 << max(0, number - 1).bit_length()


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()
