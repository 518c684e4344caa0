"""Teachers on Ray Serve: deploying them, and asking them from anywhere on the cluster."""

from rayk.teachers.client import Completion, Scorer, Teacher, connect_teacher, serve_teacher
from rayk.teachers.ensemble import Ensemble, Route, scorer_of

__all__ = ["Completion", "Ensemble", "Route", "Scorer", "Teacher", "connect_teacher", "scorer_of", "serve_teacher"]
