"""Every setting of a run, checked once at the door. Imports neither torch nor ray, so `rayk --help` is instant.

A run's YAML file is one `RunConfig`. Unknown keys are errors that name the nearest right one; `load_config` turns
whatever is wrong into one sentence.
"""

from rayk.config.base import Settings
from rayk.config.cache import CacheConfig
from rayk.config.data import DataConfig, DataSource
from rayk.config.evaluation import EvaluationConfig, GenerationConfig
from rayk.config.loading import load_config, parse_config
from rayk.config.methods import (
    DIVERGENCE_OPTIONS,
    AdaptiveConfig,
    DemonstrationsConfig,
    Divergence,
    InContextConfig,
    LogitKDConfig,
    MatchingConfig,
    MethodConfig,
    MiniLLMConfig,
    OnPolicyConfig,
    PretrainingConfig,
    SupervisedConfig,
    TaughtConfig,
)
from rayk.config.rollouts import RolloutConfig, WorkerRollouts
from rayk.config.run import RunConfig, TrackingConfig
from rayk.config.teachers import (
    EnsembleConfig,
    OpenAIEngine,
    Replicas,
    Resources,
    RouteConfig,
    SimulatedEngine,
    TeacherConfig,
    TransformersEngine,
    VLLMEngine,
)
from rayk.config.training import StudentConfig, TrainingConfig

__all__ = [
    "DIVERGENCE_OPTIONS",
    "AdaptiveConfig",
    "CacheConfig",
    "DataConfig",
    "DataSource",
    "DemonstrationsConfig",
    "Divergence",
    "EnsembleConfig",
    "EvaluationConfig",
    "GenerationConfig",
    "InContextConfig",
    "LogitKDConfig",
    "MatchingConfig",
    "MethodConfig",
    "MiniLLMConfig",
    "OnPolicyConfig",
    "OpenAIEngine",
    "PretrainingConfig",
    "Replicas",
    "Resources",
    "RolloutConfig",
    "RouteConfig",
    "RunConfig",
    "Settings",
    "SimulatedEngine",
    "StudentConfig",
    "SupervisedConfig",
    "TaughtConfig",
    "TeacherConfig",
    "TrackingConfig",
    "TrainingConfig",
    "TransformersEngine",
    "VLLMEngine",
    "WorkerRollouts",
    "load_config",
    "parse_config",
]
