"""Ways of learning, one file each. To add one, see CONTRIBUTING.md."""

from rayk.methods.base import Experience, Loss, Method
from rayk.methods.in_context import InContext
from rayk.methods.logit_kd import LogitKD
from rayk.methods.minillm import MiniLLM
from rayk.methods.on_policy import OnPolicy
from rayk.methods.preference import Preference
from rayk.methods.supervised import Supervised

METHODS: dict[str, type[Method]] = {
    method.kind: method for method in (Supervised, LogitKD, OnPolicy, MiniLLM, InContext, Preference)
}

__all__ = [
    "METHODS",
    "Experience",
    "InContext",
    "LogitKD",
    "Loss",
    "Method",
    "MiniLLM",
    "OnPolicy",
    "Preference",
    "Supervised",
]
