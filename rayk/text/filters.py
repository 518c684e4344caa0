"""Filters that reject candidates for training rows, each with a reason in words.

A candidate is a mapping of fields: `prompt`, `completion`, `finish_reason`, `tokens` and the recipe's own. Filters are
applied in order until one rejects the candidate. Filters that compare candidates with each other only remember
candidates that all filters accepted.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from typing import Any

import regex

from rayk.config import filters as configs
from rayk.errors import InputError
from rayk.text.duplicates import Contamination, NearDuplicates
from rayk.text.functions import describe_error, load_function
from rayk.text.refusals import BEGINNING, compile_refusals
from rayk.text.rouge import RougeIndex
from rayk.text.words import UNSPACED, ngrams, normalize, words

Candidate = Mapping[str, Any]
Check = Callable[[Candidate], str | None]
"""Returns None to accept a candidate, else the reason for rejecting it."""

_EXCERPT = 60
_SHORTEST_RUN = 10
_MIN_LANGUAGE_PROBABILITY = 0.2


def _remember_nothing(_: Candidate) -> None:
    pass


@dataclass(frozen=True)
class Filter:
    """A filter built from its settings.

    Attributes:
        name: the filter's kind, with a number if there are several of the kind; used in counts and reports.
        check: returns None to accept a candidate, else the reason for rejecting it.
        remember: called with each candidate that all filters accepted.
    """

    name: str
    check: Check
    remember: Callable[[Candidate], None] = _remember_nothing

    @property
    def compares_rows(self) -> bool:
        """Whether the filter compares candidates with earlier ones."""
        return self.remember is not _remember_nothing


@dataclass(frozen=True)
class Rejection:
    """A rejected candidate, the filter's name and the reason."""

    candidate: Candidate
    filter: str
    reason: str


@dataclass
class FilterResult:
    """Accepted and rejected candidates."""

    kept: list[Candidate] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    """Number of candidates that each filter rejected, in order, including 0."""


def build_filters(
    settings: Sequence[configs.FilterConfig], evaluation_prompts: Iterable[str] | None = None
) -> list[Filter]:
    """Build the filters in order, except `judge`, which queries a model (`rayk.synthesis.judging`).

    Args:
        evaluation_prompts: prompts that `contamination` compares with.

    Raises:
        InputError: `contamination` has no evaluation prompts, a language is unknown, or a function cannot be loaded.
    """
    counts = Counter(each.kind for each in settings)
    numbers: Counter[str] = Counter()
    built = []
    for each in settings:
        numbers[each.kind] += 1
        name = each.kind if counts[each.kind] == 1 else f"{each.kind} {numbers[each.kind]}"
        if isinstance(each, configs.JudgeFilterConfig):
            continue
        if isinstance(each, configs.ContaminationFilterConfig):
            built.append(Filter(name, _contamination(each, name, evaluation_prompts)))
        elif isinstance(each, configs.NearDuplicatesFilterConfig | configs.RougeFilterConfig):
            built.append(_COMPARING_BUILDERS[type(each)](each, name))
        else:
            built.append(Filter(name, _BUILDERS[type(each)](each, name)))
    return built


def apply_filters(candidates: Iterable[Candidate], filters: Sequence[Filter]) -> FilterResult:
    """Apply the filters to candidates one after another. Filters also compare with the candidates of earlier calls.

    Raises:
        InputError: a candidate lacks the field that a filter reads, or a custom function failed.
    """
    result = FilterResult(counts={each.name: 0 for each in filters})
    for candidate in candidates:
        rejection = find_rejection(candidate, filters)
        if rejection is None:
            result.kept.append(candidate)
        else:
            result.rejected.append(rejection)
            result.counts[rejection.filter] += 1
    return result


def find_rejection(candidate: Candidate, filters: Sequence[Filter]) -> Rejection | None:
    """Return the rejection by the first filter that rejects the candidate; None if all accept it and remember it.

    Raises:
        InputError: as `apply_filters`.
    """
    for each in filters:
        reason = each.check(candidate)
        if reason is not None:
            return Rejection(candidate, each.name, reason)
    for each in filters:
        each.remember(candidate)
    return None


def _value(candidate: Candidate, name: str, filter_name: str) -> Any:
    if name not in candidate:
        raise InputError(
            f"Filter '{filter_name}' reads the field '{name}', which the candidate lacks (it has: "
            f"{', '.join(candidate)}); change the filter's field, or remove the filter."
        )
    return candidate[name]


def _text(candidate: Candidate, name: str, filter_name: str) -> str:
    value = _value(candidate, name, filter_name)
    if not isinstance(value, str):
        raise InputError(
            f"Filter '{filter_name}' reads text, but the field '{name}' is a {type(value).__name__}; set the filter's "
            "field to one with text."
        )
    return value


def _excerpt(text: str) -> str:
    flat = " ".join(text.split())
    return repr(flat if len(flat) <= _EXCERPT else flat[: _EXCERPT - 1] + "…")


def _empty(given: configs.EmptyFilterConfig, name: str) -> Check:
    # Separators, control and format characters (zero-width spaces, byte-order marks) are not visible.
    visible = regex.compile(r"[^\p{Z}\p{C}]")

    def check(candidate: Candidate) -> str | None:
        return None if visible.search(_text(candidate, given.field, name)) else "is empty"

    return check


def _truncated(_: configs.TruncatedFilterConfig, name: str) -> Check:
    def check(candidate: Candidate) -> str | None:
        truncated = _value(candidate, "finish_reason", name) == "length"
        return "was truncated at the token limit" if truncated else None

    return check


def _length(given: configs.LengthFilterConfig, name: str) -> Check:
    def measure(candidate: Candidate) -> int:
        if given.unit == "tokens":
            if (tokens := candidate.get("tokens")) is None:
                raise InputError(f"Filter '{name}' counts tokens, but the endpoint returns no count; set another unit.")
            return int(tokens)
        text = _text(candidate, given.field, name)
        return len(words(text)) if given.unit == "words" else len(text)

    def check(candidate: Candidate) -> str | None:
        length = measure(candidate)
        if length < given.minimum:
            return f"has {length} of at least {given.minimum} {given.unit}"
        if given.maximum is not None and length > given.maximum:
            return f"has {length} of at most {given.maximum} {given.unit}"
        return None

    return check


@cache
def _language_identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _language(given: configs.LanguageFilterConfig, name: str) -> Check:
    identifier = _language_identifier()
    unknown = sorted(set(given.languages) - set(identifier.labels))
    if unknown:
        raise InputError(
            f"Filter '{name}' does not know the language '{unknown[0]}'; give ISO 639-1 codes such as en, zh, de (all: "
            f"{', '.join(sorted(identifier.labels))})."
        )

    def check(candidate: Candidate) -> str | None:
        probabilities = dict(identifier.rank(_text(candidate, given.field, name)))
        language, probability = next(iter(probabilities.items()))
        wanted = sum(probabilities[each] for each in given.languages)
        if probability < _MIN_LANGUAGE_PROBABILITY or probability < given.margin * wanted:
            return None
        return f"is in '{language}' (probability {probability:.2f}), not in {' or '.join(given.languages)}"

    return check


def _repetition(given: configs.RepetitionFilterConfig, name: str) -> Check:
    def check(candidate: Candidate) -> str | None:
        text = _text(candidate, given.field, name)
        grams = list(ngrams(words(text), given.n))
        repeated = 1 - len(set(grams)) / len(grams) if grams else 0.0
        if repeated > given.maximum:
            return f"repeats {repeated:.0%} of its {given.n}-grams"
        # Words do not show sequences of one character: 1000 exclamation marks have no word, and "aaa…" is one word.
        visible = "".join(text.split())
        run, character = max(((len(list(same)), each) for each, same in groupby(visible)), default=(0, ""))
        if run >= _SHORTEST_RUN and run > given.maximum * len(visible):
            return f"is {run / len(visible):.0%} one run of {character!r}"
        return None

    return check


def _refusal(given: configs.RefusalFilterConfig, name: str) -> Check:
    pattern = compile_refusals(given.patterns)

    def check(candidate: Candidate) -> str | None:
        beginning = normalize(_text(candidate, given.field, name).strip()[:BEGINNING]).translate(_APOSTROPHES)
        found = pattern.search(beginning)
        return f"refuses: {_excerpt(found.group())}" if found else None

    return check


_APOSTROPHES = str.maketrans("’‘ʼ`´", "'''''")


def _keywords(given: configs.KeywordsFilterConfig, name: str) -> Check:
    # If a keyword begins or ends with a letter of a script with spaces, the next character must not be such a letter.
    spaced = rf"[[\p{{L}}\p{{M}}\p{{N}}_]--[{UNSPACED}]]"
    edges = rf"(?V1)(?:(?<!{spaced})|(?!{spaced}))(?:%s)(?:(?!{spaced})|(?<!{spaced}))"
    pattern = regex.compile(edges % "|".join(regex.escape(normalize(each)) for each in given.keywords))

    def check(candidate: Candidate) -> str | None:
        found = pattern.search(normalize(_text(candidate, given.field, name)))
        return f"contains {found.group()!r}" if found else None

    return check


def _ending(given: configs.EndingFilterConfig, name: str) -> Check:
    def check(candidate: Candidate) -> str | None:
        text = _text(candidate, given.field, name).rstrip()
        found = next((each for each in given.endings if text.endswith(each)), None)
        return f"ends with {found!r}" if found else None

    return check


def _contamination(given: configs.ContaminationFilterConfig, name: str, prompts: Iterable[str] | None) -> Check:
    if prompts is None:
        raise InputError(
            f"Filter '{name}' compares with the evaluation set; set data.evaluation, or remove the filter."
        )
    contamination = Contamination(prompts, given.n)

    def check(candidate: Candidate) -> str | None:
        for field_name in given.fields:
            found = contamination.find(_text(candidate, field_name, name))
            if found is not None:
                return f"shares {_excerpt(found)} with the evaluation set ({field_name})"
        return None

    return check


def _near_duplicates(given: configs.NearDuplicatesFilterConfig, name: str) -> Filter:
    pool = NearDuplicates(given.threshold, given.n, given.permutations)

    def join_fields(candidate: Candidate) -> str:
        return "\n".join(_text(candidate, each, name) for each in given.fields)

    def check(candidate: Candidate) -> str | None:
        found = pool.find(join_fields(candidate))
        return f"is a near-duplicate ({found.score:.2f}) of {_excerpt(found.text)}" if found else None

    return Filter(name, check, lambda candidate: pool.add(join_fields(candidate)))


def _rouge(given: configs.RougeFilterConfig, name: str) -> Filter:
    pool = RougeIndex(given.threshold)

    def check(candidate: Candidate) -> str | None:
        found = pool.find(_text(candidate, given.field, name))
        return f"has ROUGE-L {found.score:.2f} to {_excerpt(found.text)}" if found else None

    return Filter(name, check, lambda candidate: pool.add(_text(candidate, given.field, name)))


def _custom(given: configs.CustomFilterConfig, name: str) -> Check:
    function = load_function(given.function, f"Filter '{name}'")

    def check(candidate: Candidate) -> str | None:
        try:
            reason = function(candidate)
        except Exception as error:  # a user's function can raise anything
            raise InputError(
                f"Filter '{name}': {given.function} failed with {describe_error(error)}; the candidate was "
                f"{_excerpt(repr(dict(candidate)))}."
            ) from error
        if reason is not None and (not isinstance(reason, str) or not reason):
            raise InputError(
                f"Filter '{name}': {given.function} returned {reason!r}; let it return None to accept a candidate, or "
                "the reason for rejecting it as text."
            )
        return reason

    return check


_BUILDERS: dict[type, Callable[[Any, str], Check]] = {
    configs.EmptyFilterConfig: _empty,
    configs.TruncatedFilterConfig: _truncated,
    configs.LengthFilterConfig: _length,
    configs.LanguageFilterConfig: _language,
    configs.RepetitionFilterConfig: _repetition,
    configs.RefusalFilterConfig: _refusal,
    configs.KeywordsFilterConfig: _keywords,
    configs.EndingFilterConfig: _ending,
    configs.CustomFilterConfig: _custom,
}
_COMPARING_BUILDERS: dict[type, Callable[[Any, str], Filter]] = {
    configs.NearDuplicatesFilterConfig: _near_duplicates,
    configs.RougeFilterConfig: _rouge,
}
