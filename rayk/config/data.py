"""Training and evaluation rows: where they are stored and how they are read."""

import datetime
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from rayk.config.base import InputPath, Placement, Positive, Settings

SHIPPED_TEMPLATES = ("chatml",)
"""Names of the chat templates in `rayk/data/templates`."""

_RESERVED_VARIABLES = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}

RowFormat = Literal["auto", "prompt_completion", "messages", "sharegpt", "text", "preference"]


class DataSource(Settings):
    """Rows: where they are stored and which fields are read."""

    path: InputPath
    """A file (.jsonl, .json, .csv, .tsv, .parquet; text also as .gz or .zst), a glob pattern, a folder of files or one
    saved by `datasets`, or the id of a data set on the hub. A .json file has a row per line, a list of rows, or an
    object with such a list; all values of a .csv or .tsv file are text."""
    split: str = "train"
    """The split of a data set that has several, or the key of a .json file's list of rows if it has several."""
    name: str | None = None
    """The configuration of a data set on the hub; `null`: its default."""
    rows: Positive | None = None
    """Number of rows to read, from the beginning; `null`: all."""
    format: RowFormat = "auto"
    """The form of a row; `auto` detects it from the fields of the first row. `sharegpt` is `messages` with {from,
    value}, which `messages` reads too."""
    prompt_field: str = "prompt"
    """The field with the prompt: text, or a list of messages (TRL's conversational form)."""
    completion_field: str = "completion"
    """The field with the completion, likewise text or messages; all assistant turns in it are trained on."""
    messages_field: str = "messages"
    """The field with the list of chat messages: {role, content}, or {from, value} as in ShareGPT. Rows without field
    `messages` may have ShareGPT's `conversations`. A message of `weight: 0` is not trained on."""
    system_field: str | None = None
    """The field of chat rows with the system prompt, where it is no message. `null`: none, but `system` beside
    ShareGPT's `conversations`."""
    tools_field: str | None = "tools"
    """The field of chat rows with the schemas of the tools that the assistant may call: a list, or the JSON text of
    one. `null`: no tools are read."""
    chosen_field: str = "chosen"
    """The field with the better answer of a preference pair: text, a message, or a list of messages (as in TRL, with or
    without the prompt's messages)."""
    rejected_field: str = "rejected"
    """The field with the worse answer of a preference pair, in the same form."""
    text_field: str = "text"
    """The field with plain text; every token of it is trained on."""
    chunk_tokens: Annotated[int, Field(ge=2)] | None = None
    """Cut plain text into rows of so many tokens: all texts, one after the other with EOS between them, are one
    sequence, and texts may have any length. `null`: each text is a row."""
    random_offset: bool = False
    """With `chunk_tokens`, begin the chunks of each pass over the training rows at another random token."""
    prompt_template: str | None = None
    """Template of the prompt: text with names of the row's fields in braces, such as {question}. `null`: the prompt is
    `prompt_field`."""
    completion_template: str | None = None
    """Template of the completion, in the same form. `null`: the completion is `completion_field`."""
    train_on: Literal["last", "all"] = "last"
    """The assistant turns of `messages` that are trained on: the last one, or all. Where a chat template prints earlier
    turns differently from the last one (thinking models drop their thoughts), `all` makes one example of each turn with
    the messages before it, which costs more tokens. Methods whose student generates the completions generate an answer
    after the messages before each of these turns."""
    count_template_text: bool = False
    """Also train on text that the chat template prints between its generation prompt and a row's own text, such as an
    empty think block. A template with `{% generation %}` marks decides itself."""

    @model_validator(mode="after")
    def _check_offset(self) -> "DataSource":
        if self.random_offset and self.chunk_tokens is None:
            raise ValueError("'random_offset' moves the chunks of 'chunk_tokens'; set that too")
        return self

    def with_default_format(self, row_format: RowFormat) -> "DataSource":
        """Return the source with this format if its own format is 'auto'."""
        return self.model_copy(update={"format": row_format}) if self.format == "auto" else self


class DataConfig(Settings):
    """The rows that a run trains on and is evaluated on."""

    train: DataSource | None = None
    """The training rows; `null` only if `synthesis` generates them from other prompts or without any."""
    evaluation: Annotated[DataSource | None, Placement()] = None
    """Held-out rows; `null`: nothing is evaluated."""
    max_prompt_tokens: Positive = 1024
    """Longest prompt in tokens; with `train_on: all`, longest text before the first turn that is trained on."""
    max_tokens: Positive = 2048
    """Longest row in tokens, prompt and completion together."""
    too_long: Literal["error", "skip", "truncate"] = "error"
    """Handling of longer rows: the run stops, the row is skipped, or the completion (never the prompt) is cut."""
    chat_template: bool | InputPath = False
    """Wrap the prompt and completion of each row in a chat template, as a user's and an assistant's turn. `true`: the
    tokenizer's own template; a text: the path of a .jinja file, or `chatml`, for models without a template of their
    own. Rows of messages always use the template, with `false` the tokenizer's own."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables of the chat template, such as `enable_thinking: false`."""
    chat_template_date: datetime.date | None = None
    """The date that a chat template with today's date prints; `null`: the day on which the run is started, also when it
    is resumed."""

    @model_validator(mode="after")
    def _check_evaluation(self) -> "DataConfig":
        if self.evaluation is not None and self.evaluation.random_offset:
            raise ValueError("evaluation.random_offset would evaluate other rows each time; leave it out")
        return self

    @field_validator("chat_template_kwargs")
    @classmethod
    def _check_chat_template_kwargs(cls, values: dict[str, Any]) -> dict[str, Any]:
        if reserved := sorted(values.keys() & _RESERVED_VARIABLES):
            raise ValueError(f"sets {', '.join(reserved)}, which come from the rows; leave them out")
        return values
