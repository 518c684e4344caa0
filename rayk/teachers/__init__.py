"""Teachers on Ray Serve: deploying them, and asking them from anywhere on the cluster."""

from rayk.teachers.client import Completion, Teacher, connect_teacher, serve_teacher

__all__ = ["Completion", "Teacher", "connect_teacher", "serve_teacher"]
