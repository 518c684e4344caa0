"""Make training rows and the summary from candidates."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rayk.config import DataSource
from rayk.synthesis.base import Candidate, Recipe
from rayk.synthesis.prompts import Prompt
from rayk.text.thoughts import join_thought

TOOLS_FIELD = DataSource.model_fields["tools_field"].default
_EXAMPLES = 3


def training_row(
    candidate: Candidate, prompts: Sequence[Prompt], *, keep_thoughts: bool = False
) -> dict[str, Any]:  # fmt: skip
    """Return the row of `rows.parquet` or `rejected.parquet`.

    It contains the fields of the source row, so that evaluation, routes and templates find them. The texts, the
    recipe's fields and the provenance replace fields of the same name. If the source's rows are messages, so is the
    row: `messages`, or for a pair `prompt`, `chosen` and `rejected` with messages.

    Args:
        keep_thoughts: begin completions with the thoughts of the responses that contain them.
    """
    row = _text_row(candidate, prompts)
    if keep_thoughts:
        names = ("completion",) if candidate.worse is None else ("chosen", "rejected")
        for name, response in zip(names, candidate.responses, strict=False):
            row[name] = join_thought(response.thought, row[name])
    return _with_messages(row, candidate, prompts) if any(prompt.messages for prompt in prompts) else row


def _text_row(candidate: Candidate, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Return a row with its prompt and completions as text."""
    first = candidate.responses[0]
    logprobs = [each.mean_logprob for each in candidate.responses if each.mean_logprob is not None]
    return {
        **({} if candidate.new_prompt else prompts[candidate.prompt_index].fields),
        "prompt": candidate.prompt,
        **row_texts(candidate),
        **candidate.fields,
        "where": prompts[candidate.prompt_index].where,
        "finish_reason": first.finish_reason,
        **({} if first.tokens is None else {"tokens": first.tokens}),
        # Rounded, because the last digits depend on which prompts shared a batch.
        "mean_logprob": round(logprobs[0], 4) if logprobs else None,
        "keys": [each.key for each in candidate.responses],
        **({"rejected_by": candidate.rejected_by, "reason": candidate.reason} if candidate.rejected_by else {}),
    }


def _with_messages(row: dict[str, Any], candidate: Candidate, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Return a row with messages instead of texts."""
    source = prompts[candidate.prompt_index]
    messages: list[Mapping[str, Any]] = [{"role": "user", "content": candidate.prompt}]
    if candidate.messages or (source.messages and candidate.prompt == source.text):
        messages = list(candidate.messages or source.messages)
    answers: dict[str, Any] = {
        name: [{"role": "assistant", "content": row[name]}]
        for name in ("completion", "chosen", "rejected")
        if name in row_texts(candidate)
    }
    others = {name: value for name, value in row.items() if name not in ("prompt", "messages", *answers)}
    if source.tools and not candidate.new_prompt:
        others[TOOLS_FIELD] = json.dumps(source.tools, ensure_ascii=False)
    messages = [_storable(message) for message in messages]
    if candidate.worse is None:
        return {"messages": [*messages, *answers["completion"]], **others}
    return {"prompt": messages, **answers, **others}


def _storable(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a message with its tool calls as JSON, because Parquet gives all arguments of a column the same keys."""
    calls = message.get("tool_calls")
    return {**message, "tool_calls": json.dumps(calls, ensure_ascii=False)} if calls else message


def filter_fields(candidate: Candidate, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Return the fields that filters read: those of the row, with its prompt and completions as text; for a pair also
    `completion`, the chosen text."""
    return _text_row(candidate, prompts) | {"completion": candidate.completion}


def row_texts(candidate: Candidate) -> dict[str, str]:
    """Return the texts of a row besides the prompt: `completion`, or `chosen` and `rejected` of a pair."""
    if candidate.worse is None:
        return {"completion": candidate.completion}
    return {"chosen": candidate.completion, "rejected": candidate.worse}


def summarize(recipe: Recipe, candidates: Sequence[Candidate], filters: Sequence[str]) -> dict[str, Any]:
    """Return the content of `summary.json`.

    Args:
        filters: names of the filters in the order in which they are applied.
    """
    settings, prompts, teacher, tracker = recipe.settings, recipe.prompts, recipe.client.teacher, recipe.client.tracker
    accepted = [candidate for candidate in candidates if not candidate.rejected_by]
    rejected = [candidate for candidate in candidates if candidate.rejected_by]
    counts = Counter(candidate.rejected_by for candidate in rejected)
    return {
        "kind": settings.kind,
        "about": recipe.summary,
        "paper": recipe.paper,
        "teacher": {"name": teacher.name, "model": teacher.info.model, "engine": teacher.info.engine},
        "prompts": 0 if settings.makes_prompts else len(prompts),
        "candidates": len(candidates),
        "kept": len(accepted),
        "rejected": dict.fromkeys(filters, 0) | dict(counts),
        "unanswered": tracker.unanswered,
        "refused": recipe.store.num_refusals,
        "completions": len(recipe.store),
        "figures": [asdict(statistic) for statistic in recipe.statistics(candidates)],
        "usage": tracker.charges,
        "examples": {
            "kept": [_example(candidate, prompts) for candidate in _spread(accepted)],
            "rejected": [
                _example(candidate, prompts)
                for reason in counts
                for candidate in _spread([each for each in rejected if each.rejected_by == reason])
            ],
        },
    }


def why_no_rows(recipe: Recipe, rejected: Sequence[Candidate]) -> str:
    """Explain in sentences why no row is left."""
    store = recipe.store
    if rejected:
        return (
            f"All {len(rejected)} candidate rows were rejected ({_count_reasons(rejected)}); see "
            f"'{store.folder / 'rejected.parquet'}'."
        )
    return (
        f"None of the {len(store):,} completions has the form that synthesis '{recipe.settings.kind}' requested; see "
        f"'{store.folder / 'completions'}'. Check that synthesis.chat (for an endpoint: engine.chat) fits the teacher, "
        "a chat model or a base model."
    )


def _count_reasons(rejected: Sequence[Candidate]) -> str:
    first: Mapping[str, str] = {candidate.rejected_by: candidate.reason for candidate in reversed(rejected)}
    counts = Counter(candidate.rejected_by for candidate in rejected)
    return "; ".join(f"{count} {name}, the first: {first[name]}" for name, count in counts.most_common())


def _example(candidate: Candidate, prompts: Sequence[Prompt]) -> dict[str, Any]:
    return {
        "where": prompts[candidate.prompt_index].where,
        **{name: getattr(candidate, name) for name in ("prompt", "completion", "worse", "rejected_by", "reason")},
    }


def _spread(candidates: Sequence[Candidate]) -> Sequence[Candidate]:
    """Return up to three candidates, evenly spread."""
    return candidates[:: max(1, len(candidates) // _EXAMPLES)][:_EXAMPLES]
