"""The roles of a run's teachers: which teachers generate training rows, return signals, or take part in evaluation."""

from rayk.config.retriever import RetrieverConfig
from rayk.config.sections import Run
from rayk.config.support import Support
from rayk.config.teachers import TeacherConfig


class TeacherRoles:
    """The teachers' roles, derived from a run's sections."""

    @property
    def signal_support(self: Run) -> Support | None:
        """The support that the method requests of its teachers; None if it queries none."""
        return self.method.signal_support

    @property
    def signal_teacher_names(self: Run) -> list[str]:
        """The teachers that method, ensemble and route query for signals."""
        names: list[str] = []
        if self.ensemble is not None:
            names += self.ensemble.teachers or [teacher.name for teacher in self.teachers]
        if self.route is not None:
            names += self.route.names
        if self.signal_support is not None and self.teachers and not names:
            able = [t.name for t in self.teachers if t.name not in self.synthesis_teachers or t.gives_signals]
            names = [self.method.teacher_name or [*able, self.teachers[0].name][0]]
        return names

    @property
    def retriever(self: Run) -> RetrieverConfig | None:
        """Training of the retriever of demonstrations; None if the run trains no retriever."""
        shown = self.method.shown_demonstrations
        return shown.retriever if shown else None

    @property
    def retriever_teacher(self: Run) -> str:
        """The teacher that scores demonstrations for the retriever; "" without a retriever."""
        if self.retriever is None:
            return ""
        return self.retriever.teacher or self.evaluation_teacher or self.teachers[0].name

    @property
    def synthesis_teacher(self: Run) -> str:
        """The teacher that generates the training rows; "" without synthesis."""
        return (self.synthesis.teacher or self.teachers[0].name) if self.synthesis and self.teachers else ""

    @property
    def referee(self: Run) -> str:
        """The teacher that compares answers: the one that `synthesis` names, else the one that generates the rows."""
        return (self.synthesis and self.synthesis.referee_name) or self.synthesis_teacher

    @property
    def judges(self: Run) -> list[str]:
        """The teachers that rate generated rows, one per filter of kind `judge`."""
        filters = self.synthesis.filters if self.synthesis else []
        return list(filter(None, (each.judge_teacher(self.synthesis_teacher) for each in filters)))

    @property
    def synthesis_teachers(self: Run) -> list[str]:
        """The teachers that run while the training rows are generated."""
        names = [self.synthesis_teacher, self.referee, *self.judges]
        return list(dict.fromkeys(names)) if self.synthesis else []

    @property
    def synthesis_only_teachers(self: Run) -> list[str]:
        """The teachers that are not needed after the training rows are generated."""
        return [name for name in self.synthesis_teachers if name not in self.signal_teacher_names]

    @property
    def training_teachers(self: Run) -> list[TeacherConfig]:
        """The teachers that run during training and evaluation."""
        return [teacher for teacher in self.teachers if teacher.name not in self.synthesis_only_teachers]

    @property
    def signal_teachers(self: Run) -> list[TeacherConfig]:
        """Training teachers whose engine returns signals (not black-box endpoints)."""
        return [teacher for teacher in self.training_teachers if teacher.gives_signals]

    @property
    def evaluation_teacher(self: Run) -> str:
        """The teacher that evaluation compares the student with: the method's, else the first that returns signals; ""
        if there is none."""
        return self.method.teacher_name or next((each.name for each in self.signal_teachers), "")

    @property
    def compares_teacher(self: Run) -> bool:
        """Return whether evaluation compares the student with a teacher, which then has the student's tokens."""
        return bool(self.evaluation_teacher) and not self.aligned_teacher

    @property
    def aligned_teacher(self: Run) -> str:
        """The teacher that has another tokenizer than the student (`method.alignment`); "" without one."""
        return self.evaluation_teacher if self.method.aligns_tokens else ""


def find_continuing_teachers(run: Run, key: str) -> list[TeacherConfig]:
    """Return the teachers that write after prompts of the training rows: each row's own teacher.

    Args:
        key: the setting that needs them, which 0 switches off.

    Raises:
        ValueError: some rows have an ensemble, which cannot write.
    """
    names = run.route.names if run.route else ["ensemble" if run.ensemble else run.evaluation_teacher]
    if run.ensemble and "ensemble" in names:
        raise ValueError(
            f"{key} needs one teacher that generates for each row, but an ensemble only returns signals; set it to 0, "
            "or give each row one of 'teachers' with 'route'"
        )
    return [teacher for teacher in run.teachers if teacher.name in names]
