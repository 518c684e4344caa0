"""Teachers on Ray Serve: deploy them, and query them from any process of the cluster."""

from rayk.teachers.client import Completion, Scorer, Teacher, connect_teacher, serve_teacher
from rayk.teachers.ensemble import Ensemble, Route, build_scorer

__all__ = ["Completion", "Ensemble", "Route", "Scorer", "Teacher", "build_scorer", "connect_teacher", "serve_teacher"]
