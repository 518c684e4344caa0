"""Settings of a user's own method."""

from typing import Any, Literal

from pydantic import Field

from rayk.config.base import ClassPath
from rayk.config.sections import MethodSettings
from rayk.config.support import Support, TopK


class CustomMethodConfig(MethodSettings):
    """Your own method: a subclass of `rayk.Method`."""

    kind: Literal["custom"] = "custom"
    """The method's kind."""
    path: ClassPath
    """The method's class as 'module:name', or the name of an entry point in group `rayk.methods`. The module may be a
    file next to the config file."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Your own options; the method reads them as `self.settings.options`."""
    teacher: str | None = None
    """Which of `teachers` is queried; `null`: the first."""
    support: Support | None = TopK()
    """The part of the teacher's distribution that is requested at each counted token; `null`: no teacher is queried."""
    rollouts: bool = False
    """True if the method trains on completions that the student generates."""
    completions: bool | None = None
    """True if the rows' own completions are trained on; `false`: rows need only prompts; `null`: the opposite of
    `rollouts`."""
    pairs: bool = False
    """True if each row has a better and a worse answer."""

    @property
    def teacher_name(self) -> str | None:
        return self.teacher

    @property
    def signal_support(self) -> Support | None:
        return self.support

    @property
    def samples_rollouts(self) -> bool:
        return self.rollouts

    @property
    def reads_completions(self) -> bool:
        return not self.rollouts if self.completions is None else self.completions

    @property
    def reads_pairs(self) -> bool:
        return self.pairs
