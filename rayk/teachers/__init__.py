"""Teachers on Ray Serve: deploy them, and query them from any process of the cluster."""

from rayk.teachers.client import Completion, Scorer, Teacher
from rayk.teachers.ensemble import Ensemble
from rayk.teachers.route import Route, build_scorer, choose_teacher_name, split_by_teacher
from rayk.teachers.serve import connect_teacher, serve_teacher

__all__ = [
    "Completion",
    "Ensemble",
    "Route",
    "Scorer",
    "Teacher",
    "build_scorer",
    "choose_teacher_name",
    "connect_teacher",
    "serve_teacher",
    "split_by_teacher",
]
