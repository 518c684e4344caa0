"""Training rows that teachers write: recipes, the scribe that asks, and the store that remembers."""

from rayk.synthesis.base import OwnPrompts
from rayk.synthesis.make import RECIPES, Company, synthesise
from rayk.synthesis.prompts import Prompt, fingerprint, read_prompts
from rayk.synthesis.scribe import check_chats
from rayk.synthesis.store import Store, Written

__all__ = [
    "RECIPES",
    "Company",
    "OwnPrompts",
    "Prompt",
    "Store",
    "Written",
    "check_chats",
    "fingerprint",
    "read_prompts",
    "synthesise",
]
