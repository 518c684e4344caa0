"""rayk distills large language models into small ones on a Ray cluster.

Names are imported when they are first used, because settings and the command line need neither torch nor ray.
"""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayk import losses
    from rayk.config import RunConfig, TeacherConfig, TransformersEngineConfig, VLLMEngineConfig, load_config
    from rayk.config.support import Hidden, Layers, Logprob, Requested, Sampled, TopK
    from rayk.data import make_batches
    from rayk.errors import InputError, RaykError, RunFailed, TeacherUnavailable
    from rayk.methods import Experience, Loss, Method, OnPolicyMethod
    from rayk.run import Result, distill
    from rayk.signals.batch import SignalBatch
    from rayk.synthesis import Recipe
    from rayk.teachers import Completion, Teacher, connect_teacher, serve_teacher

__version__ = "0.1.0"

_MODULES = {
    "losses": "rayk.losses",
    **dict.fromkeys(
        ("RunConfig", "TeacherConfig", "TransformersEngineConfig", "VLLMEngineConfig", "load_config"), "rayk.config"
    ),
    **dict.fromkeys(("Result", "distill"), "rayk.run"),
    **dict.fromkeys(("InputError", "RaykError", "RunFailed", "TeacherUnavailable"), "rayk.errors"),
    **dict.fromkeys(("Experience", "Loss", "Method", "OnPolicyMethod"), "rayk.methods"),
    **dict.fromkeys(("Hidden", "Layers", "Logprob", "Requested", "Sampled", "TopK"), "rayk.config.support"),
    **dict.fromkeys(("Completion", "Teacher", "connect_teacher", "serve_teacher"), "rayk.teachers"),
    "Recipe": "rayk.synthesis",
    "SignalBatch": "rayk.signals.batch",
    "make_batches": "rayk.data",
}

_RENAMED = {"TransformersEngine": "TransformersEngineConfig", "VLLMEngine": "VLLMEngineConfig"}
"""Deprecated names, and the names that replace them."""

__all__ = [
    "Completion", "Experience", "Hidden", "InputError", "Layers", "Logprob", "Loss", "Method", "OnPolicyMethod",
    "RaykError", "Recipe", "Requested", "Result", "RunConfig", "RunFailed", "Sampled", "SignalBatch", "Teacher",
    "TeacherConfig", "TeacherUnavailable", "TopK", "TransformersEngineConfig", "VLLMEngineConfig", "connect_teacher",
    "distill", "load_config", "losses", "make_batches", "serve_teacher",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        message = f"rayk.{name} is now rayk.{_RENAMED[name]}; the old name will be removed in the next release."
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return __getattr__(_RENAMED[name])
    if name not in _MODULES:
        raise AttributeError(f"module 'rayk' has no attribute '{name}'")
    module = importlib.import_module(_MODULES[name])
    value = module if name == "losses" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
