"""Rate rows with a model: the filter `judge` (LLM as a judge; Zheng et al. 2023, arXiv 2306.05685 §3.1, single answer
grading).

Each row that passed the text filters is put into a template, and the model's reply must contain a score. Replies are
completions like any other: stored with prompt and model, and requested once. Rows without a reply, and rows whose reply
contains no score, are rejected with separate reasons.
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
from rayk.synthesis.completions import CompletionClient
from rayk.synthesis.concurrency import run_in_order
from rayk.synthesis.requests import CompletionRequest
from rayk.synthesis.store import StoredCompletion
from rayk.text.answers import find_last_match

_RATING = 90  # the first number of a seed's position
_EXCERPT = 60


@dataclass(frozen=True)
class Judge:
    """A judge among the filters: its name in counts and reports, and its settings."""

    name: str
    settings: JudgeFilterConfig

    def prompt(self, row: Mapping[str, Any]) -> str:
        """Return the template filled with the fields of a row.

        Raises:
            InputError: the row lacks a field.
        """
        names = [name for _, name, _, _ in string.Formatter().parse(self.settings.template) if name is not None]
        for name in names:
            if name not in row:
                raise InputError(
                    f"Filter '{self.name}' reads the field '{name}', which the row lacks (it has: {', '.join(row)}); "
                    "change the filter's template."
                )
        return self.settings.template.format(**{name: row[name] for name in names})

    def score(self, reply: str) -> float | None:
        """Return the last score in a reply; None if there is none."""
        try:
            return float(find_last_match(reply, self.settings.score_pattern) or "")
        except ValueError:
            return None


def find_judges(filters: Sequence[FilterConfig]) -> Iterator[Judge]:
    """Yield the judges among the filters, in order."""
    judges = [each for each in filters if isinstance(each, JudgeFilterConfig)]
    for number, settings in enumerate(judges, start=1):
        yield Judge("judge" if len(judges) == 1 else f"judge {number}", settings)


async def apply_judge(
    judge: Judge, candidates: Sequence[Candidate], rows: Sequence[Mapping[str, Any]], client: CompletionClient,
    limit: int,
) -> list[Candidate]:  # fmt: skip
    """Rate candidates that are accepted so far, and reject those with low or missing scores.

    Args:
        rows: the fields of each candidate, as filters read them.
        client: client of the judging model.
        limit: number of requests at a time.

    Returns:
        The candidates, with the score as a field and the reply among the responses.
    """
    prompts = [None if each.rejected_by else judge.prompt(row) for each, row in zip(candidates, rows, strict=True)]
    distinct = [prompt for prompt in dict.fromkeys(prompts) if prompt is not None]
    parameters, seed = SamplingParameters(judge.settings.max_new_tokens, 0.0), client.seed(_RATING)
    client.total += len(distinct)
    work = (client.complete(CompletionRequest(prompt, seed, parameters)) for prompt in distinct)
    async with client, aclosing(run_in_order(work, limit)) as replies:
        reply_to = {prompt: await anext(replies) for prompt in distinct}
    return [
        candidate if prompt is None else _apply_reply(judge, candidate, reply_to[prompt])
        for candidate, prompt in zip(candidates, prompts, strict=True)
    ]


def _apply_reply(judge: Judge, candidate: Candidate, reply: StoredCompletion) -> Candidate:
    candidate = replace(candidate, responses=(*candidate.responses, reply))
    if missing := missing_response(reply):
        return candidate.reject(f"{judge.name} {missing[0]}", missing[1])
    score = judge.score(reply.text)
    if score is None:
        text = " ".join(reply.text.split())
        return candidate.reject(f"{judge.name} unparsable", f"no score in {text[-_EXCERPT:]!r}")
    name = f"{judge.name.replace(' ', '_')}_score"
    candidate = replace(candidate, fields={**candidate.fields, name: score})
    if score < judge.settings.at_least:
        return candidate.reject(judge.name, f"is rated {score:g}, below {judge.settings.at_least:g}")
    return candidate
