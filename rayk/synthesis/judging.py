"""A model rates rows: the filter `judge` (LLM as a judge; Zheng et al. 2023, arXiv 2306.05685 §3.1, grading of single
answers).

Each row that is left after the filters of text is put into a template, and the model's reply must hold a score. Replies
are completions like any other: in the store, with their prompt and model, and asked for once. A row whose reply holds
no score, or that has no reply, is left out for a reason of its own.
"""

import string
from collections.abc import Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from rayk.config import FilterConfig, JudgeFilterConfig
from rayk.engines.base import SamplingParameters
from rayk.errors import InputError
from rayk.synthesis.base import Candidate, missing_response
from rayk.synthesis.completions import CompletionClient, CompletionRequest, run_in_order
from rayk.synthesis.store import StoredCompletion
from rayk.text.answers import find_last_match

_RATING = 90  # the stage of a seed
_EXCERPT = 60


@dataclass(frozen=True)
class Judge:
    """One judge among the filters: what counts and reports call it, and its settings."""

    name: str
    settings: JudgeFilterConfig

    def prompt(self, row: Mapping[str, Any]) -> str:
        """The row in the template.

        Raises:
            InputError: it lacks a field.
        """
        names = [name for _, name, _, _ in string.Formatter().parse(self.settings.template) if name is not None]
        for name in names:
            if name not in row:
                raise InputError(
                    f"Filter '{self.name}' reads the field '{name}', which the row has not (it has: {', '.join(row)}); "
                    "set its template."
                )
        return self.settings.template.format(**{name: row[name] for name in names})

    def score(self, reply: str) -> float | None:
        """The last score in a reply; None where there is none."""
        try:
            return float(find_last_match(reply, self.settings.score_pattern) or "")
        except ValueError:
            return None


def find_judges(filters: Sequence[FilterConfig]) -> Iterator[Judge]:
    """The judges in their order."""
    found = [each for each in filters if isinstance(each, JudgeFilterConfig)]
    for number, each in enumerate(found, start=1):
        yield Judge("judge" if len(found) == 1 else f"judge {number}", each)


async def apply_judge(
    judge: Judge,
    candidates: Sequence[Candidate],
    rows: Sequence[Mapping[str, Any]],
    scribe: CompletionClient,
    at_once: int,
) -> list[Candidate]:
    """The candidates, those that `judge` does not let pass rejected; with the score and the key of the reply.

    Args:
        rows: each candidate as filters see it.
        scribe: asks the judge; `at_once` rows at a time.
    """
    prompts = [None if each.rejected_by else judge.prompt(row) for each, row in zip(candidates, rows, strict=True)]
    asked = [prompt for prompt in dict.fromkeys(prompts) if prompt is not None]  # equal ones once
    parameters, seed = SamplingParameters(judge.settings.max_new_tokens, 0.0), scribe.seed(_RATING)
    scribe.total += len(asked)
    work = (scribe.ask(CompletionRequest(prompt, seed, parameters)) for prompt in asked)
    async with scribe, aclosing(run_in_order(work, at_once)) as replies:
        reply_to = {prompt: await anext(replies) for prompt in asked}
    return [
        each if prompt is None else _passed(judge, each, reply_to[prompt])
        for each, prompt in zip(candidates, prompts, strict=True)
    ]


def _passed(judge: Judge, candidate: Candidate, reply: StoredCompletion) -> Candidate:
    candidate = replace(candidate, written=(*candidate.written, reply))
    if lack := missing_response(reply):
        return candidate.rejected(f"{judge.name} {lack[0]}", lack[1])
    score = judge.score(reply.text)
    if score is None:
        said = " ".join(reply.text.split())
        return candidate.rejected(f"{judge.name} unparsable", f"no score in {said[-_EXCERPT:]!r}")
    name = f"{judge.name.replace(' ', '_')}_score"
    candidate = replace(candidate, fields={**candidate.fields, name: score})
    if score < judge.settings.at_least:
        return candidate.rejected(judge.name, f"is rated {score:g} of at least {judge.settings.at_least:g}")
    return candidate
