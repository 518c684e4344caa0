"""Every setting of a run, checked once at the door. Imports neither torch nor ray, so `rayk --help` is instant.

A run's YAML file is one `RunConfig`. Unknown keys are errors that name the nearest right one; `load_config` turns
whatever is wrong into one sentence.
"""

from rayk.config.base import Settings
from rayk.config.cache import CacheConfig
from rayk.config.data import DataConfig, DataSource
from rayk.config.evaluation import EvaluationConfig, GenerationConfig
from rayk.config.filters import (
    ContaminationFilter,
    CustomFilter,
    EmptyFilter,
    FilterConfig,
    KeywordsFilter,
    LanguageFilter,
    LengthFilter,
    NearDuplicatesFilter,
    RefusalFilter,
    RepetitionFilter,
    RougeFilter,
    TruncatedFilter,
)
from rayk.config.loading import difference, load_config, parse_config
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
    PreferenceConfig,
    PretrainingConfig,
    SupervisedConfig,
    TaughtConfig,
)
from rayk.config.retriever import EncoderTraining, RetrieverConfig, RewardModelConfig
from rayk.config.rollouts import PolicyEngine, RolloutConfig, ServedRollouts, WorkerRollouts
from rayk.config.run import RunConfig, TrackingConfig
from rayk.config.synthesis import (
    AnswerConfig,
    AnswerType,
    ChainOfThoughtConfig,
    ResponsesConfig,
    SamplingConfig,
    SelfInstructConfig,
    SynthesisConfig,
    SynthesisSettings,
)
from rayk.config.teachers import (
    EnsembleConfig,
    LocalEngine,
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
    "AnswerConfig",
    "AnswerType",
    "CacheConfig",
    "ChainOfThoughtConfig",
    "ContaminationFilter",
    "CustomFilter",
    "DataConfig",
    "DataSource",
    "DemonstrationsConfig",
    "Divergence",
    "EmptyFilter",
    "EncoderTraining",
    "EnsembleConfig",
    "EvaluationConfig",
    "FilterConfig",
    "GenerationConfig",
    "InContextConfig",
    "KeywordsFilter",
    "LanguageFilter",
    "LengthFilter",
    "LocalEngine",
    "LogitKDConfig",
    "MatchingConfig",
    "MethodConfig",
    "MiniLLMConfig",
    "NearDuplicatesFilter",
    "OnPolicyConfig",
    "OpenAIEngine",
    "PolicyEngine",
    "PreferenceConfig",
    "PretrainingConfig",
    "RefusalFilter",
    "RepetitionFilter",
    "Replicas",
    "Resources",
    "ResponsesConfig",
    "RetrieverConfig",
    "RewardModelConfig",
    "RolloutConfig",
    "RougeFilter",
    "RouteConfig",
    "RunConfig",
    "SamplingConfig",
    "SelfInstructConfig",
    "ServedRollouts",
    "Settings",
    "SimulatedEngine",
    "StudentConfig",
    "SupervisedConfig",
    "SynthesisConfig",
    "SynthesisSettings",
    "TaughtConfig",
    "TeacherConfig",
    "TrackingConfig",
    "TrainingConfig",
    "TransformersEngine",
    "TruncatedFilter",
    "VLLMEngine",
    "WorkerRollouts",
    "difference",
    "load_config",
    "parse_config",
]
