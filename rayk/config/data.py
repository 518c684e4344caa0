"""Where rows come from and how they are read."""

from typing import Literal

from rayk.config.base import Positive, Settings


class DataSource(Settings):
    """Where rows come from and how to read them."""

    path: str
    """A .jsonl or .parquet file, a glob, a folder saved by `datasets`, or a hub dataset id."""
    split: str = "train"
    name: str | None = None
    """The configuration of a hub dataset."""
    rows: Positive | None = None
    """Take only the first so many."""
    format: Literal["auto", "prompt_completion", "messages", "text", "preference"] = "auto"
    prompt_field: str = "prompt"
    completion_field: str = "completion"
    messages_field: str = "messages"
    chosen_field: str = "chosen"
    """The better of two answers to `prompt`: text, or a list of messages (as in TRL, with the prompt's or without)."""
    rejected_field: str = "rejected"
    text_field: str = "text"
    prompt_template: str | None = None
    """Text with {field} names of the row, instead of `prompt_field`."""
    completion_template: str | None = None
    train_on: Literal["last", "all"] = "last"
    """Which assistant turns of `messages` count."""


class DataConfig(Settings):
    """The rows a run learns from and is measured on."""

    train: DataSource | None = None
    """Left out only where `synthesis.prompts` says what to write rows from."""
    evaluation: DataSource | None = None
    max_prompt_tokens: Positive = 1024
    max_tokens: Positive = 2048
    """Longest row, prompt and completion together."""
    too_long: Literal["error", "skip", "truncate"] = "error"
    """What happens to longer rows; `truncate` cuts the completion, never the prompt."""
    chat_template: bool = False
    """Wrap `prompt`/`completion` rows in the tokenizer's chat template."""
