"""Demonstrations: solved examples in front of a row, for method `in_context`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rayk.config.base import InputPath, Positive, Settings
from rayk.config.data import DataSource, RowFormat
from rayk.config.retriever import RetrieverConfig

ROW_FORMAT: RowFormat = "prompt_completion"
"""The format of the rows of method `in_context` and of its demonstrations: an input and an output."""


class DemonstrationsConfig(Settings):
    """Solved examples in front of a row. Each is written as its input, `output_separator`, its output, `separator`;
    the row's own input and `output_separator` follow (MetaICL, arXiv 2110.15943)."""

    k: Annotated[int, Field(ge=0)] = 16
    """Number of demonstrations that the teacher reads; fewer if the row's task has fewer."""
    choice: Literal["random", "bm25", "embedding", "learned"] = "random"
    """Choice of demonstrations. `random`: different ones in every epoch. `bm25`, `embedding`: those whose inputs are
    nearest to the row's, the nearest last. `learned`: the same with an encoder that is first trained to find
    demonstrations that help a teacher (`retriever`)."""
    encoder: InputPath | None = None
    """The model whose mean hidden states `embedding` compares: a local folder or hub id, or OUTPUT/retriever of a run
    with `learned`."""
    retriever: RetrieverConfig | None = None
    """Training of the retriever for `learned`; only for that choice."""
    pool: DataSource | None = None
    """Rows that demonstrations are taken from; `null`: the training rows. A demonstration never has the same input as
    the row that it precedes."""
    separator: Annotated[str, Field(min_length=1)] = "\n\n\n"
    """Text after each demonstration."""
    output_separator: Annotated[str, Field(min_length=1)] = "\n"
    """Text between an input and its output."""
    max_tokens: Positive = 256
    """Longest demonstration in tokens, without separators; of a longer one the end of the input is cut off. If all
    demonstrations of a row together exceed `data.max_tokens`, their beginning is cut off."""
    task_field: str = "task"
    """The row's field with its task: only rows of the same task are demonstrations for each other. Rows without the
    field count as one task."""
    options_field: str = "options"
    """The row's field with the list of its possible outputs."""

    @model_validator(mode="after")
    def _check_choice(self) -> "DemonstrationsConfig":
        if (self.choice == "embedding") != (self.encoder is not None):
            raise ValueError("'encoder' is required by choice 'embedding' and by no other; set both or neither")
        if self.pool is not None:
            object.__setattr__(self, "pool", self.pool.with_default_format(ROW_FORMAT))
        if self.choice != "learned":
            if self.retriever is not None:
                raise ValueError(f"'retriever' is only for choice 'learned', but choice is '{self.choice}'; remove it")
            return self
        if not self.k:
            raise ValueError("choice 'learned' chooses no demonstrations if 'k' is 0; raise it")
        object.__setattr__(self, "retriever", self.retriever or RetrieverConfig())
        return self
