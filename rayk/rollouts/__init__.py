"""What the student writes while it trains: policies that generate, and when each may."""

from rayk.rollouts.gate import VersionGate
from rayk.rollouts.policy import Policy, Rollout, WorkerPolicy, completed, summarise

__all__ = ["Policy", "Rollout", "VersionGate", "WorkerPolicy", "completed", "summarise"]
