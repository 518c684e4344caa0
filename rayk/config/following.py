"""The rules of teachers that follow the student."""

from rayk.config.sections import Run
from rayk.config.teachers import TeacherConfig


def check_following(teacher: TeacherConfig, run: Run) -> None:
    """Check a teacher with `follows` against the run's other sections.

    Raises:
        ValueError: the sections do not fit together; the message says what to change.
    """
    label = f"teacher '{teacher.name}' follows the student"
    if teacher.name in run.synthesis_teachers:
        raise ValueError(
            f"{label}, but the training rows are generated before training; name another teacher in synthesis"
        )
    if run.method.samples_with_teacher:
        raise ValueError(f"{label}, so it cannot verify the student's drafts; set method.teacher_share to 0")
    if run.aligned_teacher == teacher.name:
        raise ValueError(f"{label} and has its tokenizer; leave method.alignment out")
    if run.student.model is None and run.student.tokenizer is None:
        raise ValueError(f"{label}, which is made from student.config; set student.tokenizer")
