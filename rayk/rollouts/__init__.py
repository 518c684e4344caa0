"""Rollouts: completions that the student generates while it trains."""

from rayk.rollouts.policy import Policy, Rollout, WorkerPolicy, summarize_rollouts, with_completion, with_requested_ids
from rayk.rollouts.served import PolicyAddress, ServedPolicy, serve_policy
from rayk.rollouts.turns import Tool, ToolPolicy
from rayk.rollouts.version_gate import VersionGate

__all__ = [
    "Policy", "PolicyAddress", "Rollout", "ServedPolicy", "Tool", "ToolPolicy", "VersionGate", "WorkerPolicy",
    "serve_policy", "summarize_rollouts", "with_completion", "with_requested_ids",
]  # fmt: skip
