"""What the student writes while it trains: policies that generate, and when each may."""

from rayk.rollouts.gate import VersionGate
from rayk.rollouts.policy import Policy, Rollout, WorkerPolicy, completed, summarise, with_own_ids

__all__ = ["Policy", "Rollout", "VersionGate", "WorkerPolicy", "completed", "summarise", "with_own_ids"]
