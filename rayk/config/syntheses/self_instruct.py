"""Settings of `self_instruct`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rayk.config.base import InputPath, Positive, Selection
from rayk.config.filters import FilterConfig
from rayk.config.sampling import SamplingConfig
from rayk.config.sections import SynthesisSettings
from rayk.config.syntheses.checks import refuse_thoughts


class ListSamplingConfig(SamplingConfig):
    """Sampling of lists of new instructions."""

    max_new_tokens: Positive = 1024
    """Longest list in tokens."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Sample from the most likely tokens with this total probability; 1: from all."""


class SelfInstructConfig(SynthesisSettings):
    """New tasks that the teacher generates, with inputs and answers (Self-Instruct); a base model is sufficient."""

    kind: Literal["self_instruct"] = "self_instruct"
    """The synthesis' kind."""
    seed_tasks: InputPath | None = None
    """The tasks to start from, a JSONL file in the paper's format: {"instruction": …, "is_classification": true or
    false, "instances": [{"input": …, "output": …}, …]}. `null`: rayk's own 70 tasks."""
    instructions: Annotated[Positive, Selection()] = 1000
    """Number of new instructions; fewer if the teacher only repeats itself. Each becomes up to 5 rows."""
    batch: Positive = 16
    """Number of lists, of 8 instructions each, that are requested before their instructions join the pool."""
    sampling: ListSamplingConfig = Field(default_factory=ListSamplingConfig)
    """Sampling of lists of instructions. The other requests are decoded greedily: whether a task is a classification
    task, and its instances."""
    instance_tokens: Positive = 350
    """Longest text in tokens with all instances of a task."""
    blacklist: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Selection()] = (
        "image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps", "draw", "plot",
        "go to",
    )  # fmt: skip
    """Words that reject an instruction, because a text model cannot follow it; by default the paper's. []: none."""
    filters: Annotated[list[FilterConfig], Selection()] = Field(default_factory=list)
    """Filters of the rows, besides the recipe's own rules. The recipe already drops the last instance of a truncated
    answer; filter `truncated` would also reject the complete instances before it."""

    @property
    def makes_prompts(self) -> bool:
        return True

    @property
    def prefers_chat(self) -> bool:
        return False  # the recipe is made for base models, whose tokenizers often have a chat template too

    @model_validator(mode="after")
    def _check_thoughts(self) -> "SelfInstructConfig":
        refuse_thoughts(self)
        return self
