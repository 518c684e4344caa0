"""Methods that query a teacher for signals."""

from rayk.config.sections import MethodSettings
from rayk.config.support import Support, TopK


class TeacherMethodConfig(MethodSettings):
    """Base of methods that query a teacher for signals."""

    teacher: str | None = None
    """Which of `teachers` is queried; `null`: the first."""
    support: Support = TopK()
    """The part of the teacher's distribution that is requested at each counted token."""

    @property
    def teacher_name(self) -> str | None:
        return self.teacher

    @property
    def signal_support(self) -> Support | None:
        return self.support
