"""The rules of teachers that follow the student, or the student of another run."""

from rayk.config.paths import absolute_path, is_uri
from rayk.config.sections import Run
from rayk.config.teachers import TeacherConfig


def check_following(teacher: TeacherConfig, run: Run) -> None:
    """Check a teacher with `follows` against the run's other sections.

    Raises:
        ValueError: the sections do not fit together; the message says what to change.
    """
    label = f"teacher '{teacher.name}' follows the student"
    if teacher.followed_run is not None:
        label += " of another run"
        _check_place(teacher.name, teacher.followed_run, run)
    if teacher.name in run.synthesis_teachers:
        raise ValueError(
            f"{label}, but the training rows are generated before training; name another teacher in synthesis"
        )
    if run.method.samples_with_teacher:
        raise ValueError(f"{label}, so it cannot verify the student's drafts; set method.teacher_share to 0")
    if teacher.followed_run is not None:
        return
    if run.aligned_teacher == teacher.name:
        raise ValueError(f"{label} and has its tokenizer; leave method.alignment out")
    if run.student.model is None and run.student.tokenizer is None:
        raise ValueError(f"{label}, which is made from student.config; set student.tokenizer")


def _check_place(teacher: str, place: str, run: Run) -> None:
    if is_uri(place):
        raise ValueError(
            f"teacher '{teacher}': follows.run is a URI, but a run directory is a folder; give one that both runs share"
        )
    if absolute_path(place) == str(run.output_path):
        raise ValueError(f"teacher '{teacher}': follows.run is this run's own directory; write 'follows: student'")
