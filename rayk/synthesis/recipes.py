"""Find the recipe of a synthesis by its settings."""

from typing import Any

from rayk.config import CustomSynthesisConfig, SynthesisSettings
from rayk.errors import InputError
from rayk.synthesis.adversarial import Adversarial
from rayk.synthesis.base import PromptGeneratingRecipe, Recipe
from rayk.synthesis.chain_of_thought import ChainOfThought
from rayk.synthesis.magpie import Magpie
from rayk.synthesis.preferences import Preferences
from rayk.synthesis.responses import Responses
from rayk.synthesis.self_instruct import SelfInstruct
from rayk.text.functions import load_class

RECIPES: dict[str, type[Recipe]] = {
    "responses": Responses,
    "chain_of_thought": ChainOfThought,
    "self_instruct": SelfInstruct,
    "magpie": Magpie,
    "adversarial": Adversarial,
    "preferences": Preferences,
}
ENTRY_POINTS = "rayk.recipes"


def find_recipe(settings: SynthesisSettings) -> type[Recipe[Any]]:
    """Return the recipe's class, one of `RECIPES` or with `kind: custom` the class at `path`.

    Raises:
        InputError: the class cannot be loaded, is not a complete recipe, or does not fit `own_prompts`.
    """
    if not isinstance(settings, CustomSynthesisConfig):
        return RECIPES[settings.kind]
    recipe = load_class(settings.path, Recipe, "synthesis.path", ENTRY_POINTS, "rayk.Recipe")
    if recipe.generate is Recipe.generate and recipe.candidates is Recipe.candidates:
        raise InputError(
            f"synthesis.path: recipe '{settings.path}' generates nothing; define its method 'generate' (for one "
            "prompt) or 'candidates' (for all)."
        )
    if settings.own_prompts is not issubclass(recipe, PromptGeneratingRecipe):
        derived = "is not" if settings.own_prompts else "is"
        raise InputError(
            f"synthesis.own_prompts is {str(settings.own_prompts).lower()}, but recipe '{settings.path}' {derived} "
            "derived from rayk.synthesis.PromptGeneratingRecipe; change one of the two."
        )
    return recipe
