"""What the student writes while it trains: policies that generate, and when each may."""

from rayk.rollouts.gate import VersionGate
from rayk.rollouts.policy import Policy, Rollout, WorkerPolicy, completed, summarise, with_own_ids
from rayk.rollouts.served import PolicyAddress, ServedPolicy, serve_policy
from rayk.serving.weights import learned

__all__ = [
    "Policy", "PolicyAddress", "Rollout", "ServedPolicy", "VersionGate", "WorkerPolicy", "completed", "learned",
    "serve_policy", "summarise", "with_own_ids",
]  # fmt: skip
