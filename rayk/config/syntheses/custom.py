"""Settings of a user's own recipe."""

from typing import Any, Literal

from pydantic import Field

from rayk.config.base import ClassPath
from rayk.config.sections import SynthesisSettings


class CustomSynthesisConfig(SynthesisSettings):
    """Your own recipe: a subclass of `rayk.Recipe`."""

    kind: Literal["custom"] = "custom"
    """The synthesis' kind."""
    path: ClassPath
    """The recipe's class as 'module:name'. The module may be a file next to the config file."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Your own options; the recipe reads them as `settings.options`."""
    own_prompts: bool = False
    """True if the recipe makes its own prompts, so that neither `data.train` nor `synthesis.prompts` is given."""
    pairs: bool = False
    """True if each row has a better and a worse answer, for method `preference`."""

    @property
    def makes_prompts(self) -> bool:
        return self.own_prompts

    @property
    def writes_pairs(self) -> bool:
        return self.pairs
