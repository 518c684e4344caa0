"""Methods, one file each. `README.md` defines them; CONTRIBUTING.md shows how to add one."""

from typing import Any

from rayk.config import CustomMethodConfig
from rayk.errors import InputError
from rayk.methods.base import Experience, Loss, Method, OnPolicyMethod, Student
from rayk.methods.in_context import InContext
from rayk.methods.layerwise import Layerwise
from rayk.methods.logit_kd import LogitKD
from rayk.methods.matching import load_divergence
from rayk.methods.minillm import MiniLLM
from rayk.methods.on_policy import OnPolicy
from rayk.methods.preference import Preference
from rayk.methods.reward import TaskReward
from rayk.methods.supervised import Supervised
from rayk.text.functions import load_class

METHODS: dict[str, type[Method]] = {
    method.kind: method for method in (Supervised, LogitKD, OnPolicy, MiniLLM, Layerwise, InContext, Preference)
}
"""The built-in methods by `method.kind`."""

ENTRY_POINTS = "rayk.methods"
"""The group of entry points that name installed methods."""

__all__ = [
    "METHODS",
    "Experience",
    "InContext",
    "Layerwise",
    "LogitKD",
    "Loss",
    "Method",
    "MiniLLM",
    "OnPolicy",
    "OnPolicyMethod",
    "Preference",
    "Student",
    "Supervised",
    "resolve_method",
]


def resolve_method(settings: Any) -> type[Method]:
    """Return the class of the method that `settings` (section `method`) describe, and load the user's code they name.

    Raises:
        InputError: the class, the divergence or the reward cannot be loaded, or does not fit the settings.
    """
    load_divergence(settings)
    if reward := getattr(settings, "reward", None):
        TaskReward(reward)
    if not isinstance(settings, CustomMethodConfig):
        return METHODS[settings.kind]
    base: Any = Method  # abstract, so mypy refuses it as type[T]
    method: type[Method] = load_class(settings.path, base, "method.path", ENTRY_POINTS, "rayk.Method")
    is_on_policy = issubclass(method, OnPolicyMethod)
    if is_on_policy != settings.samples_rollouts:
        fix = "set method.rollouts: true" if is_on_policy else "derive it from rayk.OnPolicyMethod"
        state = "generates completions" if is_on_policy else "generates no completions"
        raise InputError(
            f"method.path: class '{settings.path}' {state}, but method.rollouts is {str(not is_on_policy).lower()}; "
            f"{fix}."
        )
    return method
