"""Training rows that teachers write: recipes, the scribe that asks, and the store that remembers."""

from rayk.synthesis.base import PromptGeneratingRecipe
from rayk.synthesis.completions import check_chat_template
from rayk.synthesis.pipeline import RECIPES, RecipeContext, synthesize_rows
from rayk.synthesis.prompts import Prompt, fingerprint, read_prompts
from rayk.synthesis.store import CompletionStore, StoredCompletion

__all__ = [
    "RECIPES",
    "CompletionStore",
    "Prompt",
    "PromptGeneratingRecipe",
    "RecipeContext",
    "StoredCompletion",
    "check_chat_template",
    "fingerprint",
    "read_prompts",
    "synthesize_rows",
]
