"""Syntheses' settings, distinguished by `kind`; one file each."""

from typing import Annotated

from pydantic import Field

from rayk.config.syntheses.adversarial import AdversarialConfig
from rayk.config.syntheses.answer import AnswerConfig
from rayk.config.syntheses.chain_of_thought import ChainOfThoughtConfig
from rayk.config.syntheses.custom import CustomSynthesisConfig
from rayk.config.syntheses.magpie import MagpieConfig
from rayk.config.syntheses.preferences import PreferencesConfig
from rayk.config.syntheses.responses import ResponsesConfig
from rayk.config.syntheses.self_instruct import SelfInstructConfig
from rayk.config.syntheses.student import StudentSynthesisConfig

__all__ = [
    "AdversarialConfig",
    "AnswerConfig",
    "ChainOfThoughtConfig",
    "CustomSynthesisConfig",
    "MagpieConfig",
    "PreferencesConfig",
    "ResponsesConfig",
    "SelfInstructConfig",
    "StudentSynthesisConfig",
    "SynthesisConfig",
]

SynthesisConfig = Annotated[
    ResponsesConfig
    | ChainOfThoughtConfig
    | SelfInstructConfig
    | MagpieConfig
    | AdversarialConfig
    | PreferencesConfig
    | CustomSynthesisConfig,
    Field(discriminator="kind"),
]
