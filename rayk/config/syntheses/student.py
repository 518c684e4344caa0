"""Syntheses whose rows depend on the student."""

from pydantic import Field

from rayk.config.sampling import ServedStudentConfig
from rayk.config.sections import SynthesisSettings


class StudentSynthesisConfig(SynthesisSettings):
    """Base of syntheses whose rows depend on the student."""

    student: ServedStudentConfig = Field(default_factory=ServedStudentConfig)
    """Serving of the student while it generates."""

    @property
    def reads_student(self) -> bool:
        return True

    @property
    def served_student(self) -> ServedStudentConfig | None:
        return self.student if self.reads_student else None
