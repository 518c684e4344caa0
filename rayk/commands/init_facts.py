"""Facts about data and models that `rayk init` reads before it chooses settings."""

import json
import os
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from rayk.config import DataSource, StudentConfig
from rayk.config.paths import is_local_path
from rayk.data.messages import SHAREGPT_FIELD
from rayk.data.sources import Row, read_rows
from rayk.errors import InputError
from rayk.models import load_model_config, load_tokenizer, max_positions
from rayk.models.student import count_planned_parameters

_EXAMPLE_DATA = "./data/train.jsonl"
_PROMPT_FIELDS = ("prompt", "instruction", "question", "input", "query", "problem")
_COMPLETION_FIELDS = ("completion", "response", "output", "answer", "solution", "target")
_EVALUATION_WORDS = ("test", "validation", "valid", "val", "eval", "evaluation", "dev", "held_out")
COUNTED_ROWS = 100_000
_SAMPLED_ROWS = 256
_ENDPOINT_SECONDS = 5.0


@dataclass(frozen=True)
class DataFacts:
    """Facts about the training rows: how to read them, and what they contain."""

    path: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the source that differ from the defaults."""
    row_format: str = "prompt_completion"
    """`prompts` if rows have no completion."""
    rows: list[Row] = field(default_factory=list)
    """The first rows; empty for example data."""
    num_rows: int | None = None
    evaluation: str | None = None
    """A file of held-out rows beside the training rows."""
    evaluation_settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of its source that differ from the defaults."""

    @property
    def fields(self) -> Mapping[str, Any]:
        return self.rows[0].fields if self.rows else {}


@dataclass(frozen=True)
class ModelFacts:
    """A model's tokenizer and size; None if they could not be loaded."""

    model: str
    tokenizer: Any = None
    parameters: int | None = None
    positions: float = float("inf")

    @property
    def has_chat_template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))


def read_data(path: str | None, notes: list[str]) -> DataFacts:
    """Read the first rows, and determine the source settings with which they can be read."""
    if path is None:
        notes.append(f"data.train.path is an example ({_EXAMPLE_DATA}); give your rows with --data, or edit it.")
        return DataFacts(_EXAMPLE_DATA)
    source = DataSource(path=path)
    reader = read_rows(source)
    rows = list(islice(reader, _SAMPLED_ROWS))
    num_rows = len(rows) + sum(1 for _ in islice(reader, COUNTED_ROWS))
    settings, row_format = _describe_fields(rows[0])
    evaluation, held_out = _read_evaluation(path, notes)
    return DataFacts(path, settings, row_format, rows, num_rows, evaluation, held_out)


def _describe_fields(row: Row) -> tuple[dict[str, Any], str]:
    """Return the source settings with which rows with the fields of `row` can be read, and their format."""
    fields = row.fields
    texts = [name for name, value in fields.items() if isinstance(value, str)]
    chats = [
        name for name, value in fields.items()
        if isinstance(value, list) and value and isinstance(value[0], dict) and {"role", "from"} & value[0].keys()
    ]  # fmt: skip
    prompt = next((name for name in _PROMPT_FIELDS if name in texts), None)
    prompt_setting = {"prompt_field": prompt} if prompt and prompt != "prompt" else {}
    if {"chosen", "rejected"} <= fields.keys():
        return prompt_setting, "preference"
    if "prompt" in chats:
        return {}, "messages" if "completion" in fields or "messages" in chats else "prompts"
    if "messages" in chats or (chats and prompt is None):
        known = "messages" in chats or SHAREGPT_FIELD in chats
        return ({} if known else {"messages_field": chats[0]}), "messages"
    completion = next((name for name in _COMPLETION_FIELDS if name in texts and name != prompt), None)
    if {"instruction", "input"} <= set(texts) and completion:  # the format of Alpaca
        prompt_setting = {"prompt_template": "{instruction}\n\n{input}"}
    if prompt and completion:
        return prompt_setting | ({"completion_field": completion} if completion != "completion" else {}), (
            "prompt_completion"
        )
    if prompt:
        return prompt_setting, "prompts"
    if "text" in texts:
        return {}, "text"
    raise InputError(
        f"{row.where} has no field with a prompt, messages or text that is recognized (it has: {', '.join(fields)}); "
        f"rename one to 'prompt', or write the config by hand with data.train.prompt_field."
    )


def _read_evaluation(path: str, notes: list[str]) -> tuple[str | None, dict[str, Any]]:
    """Return a file of held-out rows beside the training rows and the settings with which it is read; None without a
    usable one."""
    if (file := _find_evaluation(path)) is None:
        return None, {}
    try:
        return file, _describe_fields(next(read_rows(DataSource(path=file))))[0]
    except InputError as error:
        notes.append(f"'{file}' is not used as held-out rows: {error}")
        return None, {}


def _find_evaluation(path: str) -> str | None:
    """Return a file beside the training rows whose name is usual for held-out rows; None if there is none."""
    file = Path(os.path.expanduser(path))
    if not file.is_file():
        return None
    for word in _EVALUATION_WORDS:
        for stem in {file.stem.replace("training", word).replace("train", word), word}:
            other = file.with_name(stem + file.suffix)
            if other != file and other.is_file():
                return str(other)
    return None


def read_model(name: str, role: str, required: bool, notes: list[str]) -> ModelFacts:
    """Look up a model's tokenizer and size.

    Raises:
        InputError: `name` is a local model that cannot be read.
    """
    if not required:
        notes.append(f"{role}: {name} is an example; give your model with --{role}, or edit it.")
        return ModelFacts(name)
    try:
        tokenizer, config = load_tokenizer(name), load_model_config(name)
        parameters = count_planned_parameters(StudentConfig(model=name), tokenizer).total
        return ModelFacts(name, tokenizer, parameters, max_positions(config))
    except InputError as error:
        if is_local_path(name):
            raise
        notes.append(f"{role}: {name} could not be looked up, so common values are used. {error}")
        return ModelFacts(name)


def find_endpoint_model(url: str, notes: list[str]) -> tuple[str, str]:
    """Return the name of the endpoint's first model, and a comment; a placeholder if it does not list its models."""
    request = urllib.request.Request(f"{url.rstrip('/')}/models")
    if key := os.environ.get("OPENAI_API_KEY"):
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=_ENDPOINT_SECONDS) as response:
            names = [str(entry["id"]) for entry in json.load(response)["data"]]
        others = ", ".join(names[1:6])
        return names[0], f"also: {others}" if others else ""
    except (OSError, ValueError, LookupError, TypeError):
        notes.append(f"The endpoint {url} does not list its models; set teachers.model to the name of one.")
        return "MODEL", "the endpoint's name of the model"
