"""Call a user's functions once before a teacher generates anything, so that `rayk doctor` finds their errors."""

from collections.abc import Iterator, Sequence
from typing import Any

from rayk.config import CustomFilterConfig, SynthesisSettings
from rayk.synthesis.base import Candidate
from rayk.synthesis.prompts import Prompt
from rayk.synthesis.recipes import find_recipe
from rayk.synthesis.rows import filter_fields
from rayk.synthesis.scoring import call_scorer
from rayk.synthesis.store import StoredCompletion
from rayk.text import build_filters
from rayk.text.functions import load_function

_EXAMPLE = "This is an example of a completion."


def try_functions(settings: SynthesisSettings, prompts: Sequence[Prompt]) -> Iterator[str]:
    """Call the user's scorer and filters on the first prompt with an example completion, and yield what was called.

    Raises:
        InputError: a function cannot be loaded, fails, or returns something unusable.
    """
    scorer = getattr(settings, "scorer", "")
    if ":" in scorer:
        score = call_scorer(load_function(scorer, "synthesis.scorer"), scorer, prompts[0], _EXAMPLE)
        yield f"synthesis.scorer {scorer} returns {score:g} for an example"
    custom = [each for each in settings.filters if isinstance(each, CustomFilterConfig)]
    for config, built in zip(custom, build_filters(custom), strict=True):
        reason = built.check(example_fields(settings, prompts))
        result = "accepts" if reason is None else "rejects"
        yield f"synthesis.filters {config.function} {result} an example"


def example_fields(settings: SynthesisSettings, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Return the fields of an example candidate for the first prompt, as filters read them."""
    response = StoredCompletion("", _EXAMPLE, 8, -0.5, "stop")
    fields, worse = dict(find_recipe(settings).example_fields), "No." if settings.writes_pairs else None
    return filter_fields(Candidate(prompts[0].text, _EXAMPLE, 0, (response,), fields, worse=worse), prompts)
