"""Methods' settings, distinguished by `kind`; one file each."""

from typing import Annotated

from pydantic import Field

from rayk.config.methods.alignment import AlignmentConfig
from rayk.config.methods.custom import CustomMethodConfig
from rayk.config.methods.divergence import (
    DIVERGENCE_OPTIONS,
    Divergence,
    DivergenceLossConfig,
    DivergenceMethodConfig,
)
from rayk.config.methods.in_context import InContextConfig
from rayk.config.methods.layerwise import LayerFiltersConfig, LayerwiseConfig
from rayk.config.methods.logit_kd import LogitKDConfig
from rayk.config.methods.minillm import MiniLLMConfig
from rayk.config.methods.on_policy import AdaptiveConfig, OnPolicyConfig
from rayk.config.methods.preference import PreferenceConfig
from rayk.config.methods.reward import RewardConfig
from rayk.config.methods.supervised import SupervisedConfig
from rayk.config.methods.teacher import TeacherMethodConfig

__all__ = [
    "DIVERGENCE_OPTIONS",
    "AdaptiveConfig",
    "AlignmentConfig",
    "CustomMethodConfig",
    "Divergence",
    "DivergenceLossConfig",
    "DivergenceMethodConfig",
    "InContextConfig",
    "LayerFiltersConfig",
    "LayerwiseConfig",
    "LogitKDConfig",
    "MethodConfig",
    "MiniLLMConfig",
    "OnPolicyConfig",
    "PreferenceConfig",
    "RewardConfig",
    "SupervisedConfig",
    "TeacherMethodConfig",
]

MethodConfig = Annotated[
    SupervisedConfig
    | LogitKDConfig
    | OnPolicyConfig
    | MiniLLMConfig
    | LayerwiseConfig
    | InContextConfig
    | PreferenceConfig
    | CustomMethodConfig,
    Field(discriminator="kind"),
]
