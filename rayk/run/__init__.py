"""One run from settings to result: inputs checked, teachers up, rows written, student trained and measured."""

from rayk.run.directory import with_absolute_paths
from rayk.run.pipeline import Result, evaluate_model
from rayk.run.rounds import distill, next_round, synthesize
from rayk.run.applications import teacher_applications, connect_attached_teachers, required_cpus, policy_application, serve_teachers
from rayk.run.progress import ProgressListener

__all__ = [
    "Result",
    "ProgressListener",
    "teacher_applications",
    "connect_attached_teachers",
    "required_cpus",
    "distill",
    "evaluate_model",
    "next_round",
    "policy_application",
    "serve_teachers",
    "synthesize",
    "with_absolute_paths",
]  # fmt: skip
