"""One run from settings to result: inputs checked, teachers up, rows written, student trained and measured."""

from rayk.run.directory import located
from rayk.run.once import Result, evaluate_model
from rayk.run.rounds import distill, next_round, synthesize
from rayk.run.serving import applications_of, attached_teachers, cpus_needed, policy_application, serve_all
from rayk.run.watching import Watcher

__all__ = [
    "Result", "Watcher", "applications_of", "attached_teachers", "cpus_needed", "distill", "evaluate_model", "located",
    "next_round", "policy_application", "serve_all", "synthesize",
]  # fmt: skip
