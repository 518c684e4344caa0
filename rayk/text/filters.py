"""Quality control: filters that judge candidates in order, each giving its reason in words.

A candidate is a mapping of fields: `prompt`, `completion`, `finish_reason`, `tokens` and what a recipe adds. What one
filter rejects the next does not see, and only what all have kept is remembered by those that compare candidates with
each other: a text rejected for its language does not make its translation's twin a duplicate.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from typing import Any

import regex

from rayk.config import filters as kinds
from rayk.errors import InputError
from rayk.text.duplicates import Contamination, NearDuplicates
from rayk.text.functions import load_function
from rayk.text.refusals import BEGINNING, compile_refusals
from rayk.text.rouge import RougeIndex
from rayk.text.words import UNSPACED, ngrams, normalize, words

Candidate = Mapping[str, Any]
Judge = Callable[[Candidate], str | None]

_EXCERPT = 60
_SHORTEST_RUN = 10
_SURE_OF_A_LANGUAGE = 0.2


def _remember_nothing(_: Candidate) -> None:
    pass


@dataclass(frozen=True)
class Filter:
    """One filter as built from its settings.

    Attributes:
        name: its kind, numbered where there are several of the kind; what counts and reports call it.
        judge: None where the candidate may stay, else the reason why not, in words.
        remember: told of each candidate that all filters kept.
    """

    name: str
    judge: Judge
    remember: Callable[[Candidate], None] = _remember_nothing

    @property
    def remembers(self) -> bool:
        """Whether it compares candidates with those before."""
        return self.remember is not _remember_nothing


@dataclass(frozen=True)
class Rejection:
    """A candidate that was left out, by which filter, and why."""

    candidate: Candidate
    filter: str
    reason: str


@dataclass
class FilterResult:
    """What filters made of candidates."""

    kept: list[Candidate] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    """How many each filter rejected, in the order in which they judge, none left out."""


def build_filters(
    settings: Sequence[kinds.FilterConfig], evaluation_prompts: Iterable[str] | None = None
) -> list[Filter]:
    """The filters in their order, with memories that are still empty. A `judge` is none of them, for it asks a model
    (`rayk.synthesis.judging`).

    Args:
        evaluation_prompts: what `contamination` compares with; read only where it is asked for.

    Raises:
        InputError: `contamination` has nothing to compare with, a language is unknown, or a function cannot be loaded.
    """
    counts = Counter(each.kind for each in settings)
    numbers: Counter[str] = Counter()
    built = []
    for each in settings:
        numbers[each.kind] += 1
        name = each.kind if counts[each.kind] == 1 else f"{each.kind} {numbers[each.kind]}"
        if isinstance(each, kinds.JudgeFilterConfig):
            continue
        if isinstance(each, kinds.ContaminationFilterConfig):
            built.append(Filter(name, _contamination(each, name, evaluation_prompts)))
        elif isinstance(each, kinds.NearDuplicatesFilterConfig | kinds.RougeFilterConfig):
            built.append(_BUILDERS_WITH_MEMORY[type(each)](each, name))
        else:
            built.append(Filter(name, _BUILDERS[type(each)](each, name)))
    return built


def apply_filters(candidates: Iterable[Candidate], filters: Sequence[Filter]) -> FilterResult:
    """Judge the candidates one after the other. Called again with the same filters, it goes on where it was.

    Raises:
        InputError: a candidate lacks the field that a filter reads, or a custom function failed.
    """
    sifted = FilterResult(counts={each.name: 0 for each in filters})
    for candidate in candidates:
        rejection = judge(candidate, filters)
        if rejection is None:
            sifted.kept.append(candidate)
        else:
            sifted.rejected.append(rejection)
            sifted.counts[rejection.filter] += 1
    return sifted


def judge(candidate: Candidate, filters: Sequence[Filter]) -> Rejection | None:
    """What the first of the filters has against the candidate; one that all of them keep is remembered.

    Raises:
        InputError: as `apply_filters`.
    """
    for each in filters:
        reason = each.judge(candidate)
        if reason is not None:
            return Rejection(candidate, each.name, reason)
    for each in filters:
        each.remember(candidate)
    return None


def _value(candidate: Candidate, name: str, filter_name: str) -> Any:
    if name not in candidate:
        raise InputError(
            f"Filter '{filter_name}' reads the field '{name}', which the candidate has not (it has: "
            f"{', '.join(candidate)}); set the filter's field, or leave it out."
        )
    return candidate[name]


def _text(candidate: Candidate, name: str, filter_name: str) -> str:
    value = _value(candidate, name, filter_name)
    if not isinstance(value, str):
        raise InputError(
            f"Filter '{filter_name}' reads text, but the field '{name}' holds a {type(value).__name__}; set the "
            "filter's field to one with text."
        )
    return value


def _excerpt(text: str) -> str:
    flat = " ".join(text.split())
    return repr(flat if len(flat) <= _EXCERPT else flat[: _EXCERPT - 1] + "…")


def _empty(given: kinds.EmptyFilterConfig, name: str) -> Judge:
    # Separators, control and format characters (zero-width spaces, byte-order marks) show nothing.
    visible = regex.compile(r"[^\p{Z}\p{C}]")

    def judge(candidate: Candidate) -> str | None:
        return None if visible.search(_text(candidate, given.field, name)) else "is empty"

    return judge


def _truncated(_: kinds.TruncatedFilterConfig, name: str) -> Judge:
    def judge(candidate: Candidate) -> str | None:
        cut = _value(candidate, "finish_reason", name) == "length"
        return "was cut at the token limit" if cut else None

    return judge


def _length(given: kinds.LengthFilterConfig, name: str) -> Judge:
    def measure(candidate: Candidate) -> int:
        if given.unit == "tokens":
            if (tokens := candidate.get("tokens")) is None:
                raise InputError(f"Filter '{name}' counts tokens, which the endpoint does not tell; set another unit.")
            return int(tokens)
        text = _text(candidate, given.field, name)
        return len(words(text)) if given.unit == "words" else len(text)

    def judge(candidate: Candidate) -> str | None:
        length = measure(candidate)
        if length < given.minimum:
            return f"has {length} of at least {given.minimum} {given.unit}"
        if given.maximum is not None and length > given.maximum:
            return f"has {length} of at most {given.maximum} {given.unit}"
        return None

    return judge


@cache
def _language_identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _language(given: kinds.LanguageFilterConfig, name: str) -> Judge:
    identifier = _language_identifier()
    unknown = sorted(set(given.languages) - set(identifier.labels))
    if unknown:
        raise InputError(
            f"Filter '{name}' knows no language '{unknown[0]}'; give ISO 639-1 codes such as en, zh, de (all: "
            f"{', '.join(sorted(identifier.labels))})."
        )

    def judge(candidate: Candidate) -> str | None:
        probabilities = dict(identifier.rank(_text(candidate, given.field, name)))
        language, probability = next(iter(probabilities.items()))
        wanted = sum(probabilities[each] for each in given.languages)
        if probability < _SURE_OF_A_LANGUAGE or probability < given.margin * wanted:
            return None
        return f"is in '{language}' (probability {probability:.2f}), not in {' or '.join(given.languages)}"

    return judge


def _repetition(given: kinds.RepetitionFilterConfig, name: str) -> Judge:
    def judge(candidate: Candidate) -> str | None:
        text = _text(candidate, given.field, name)
        grams = list(ngrams(words(text), given.n))
        repeated = 1 - len(set(grams)) / len(grams) if grams else 0.0
        if repeated > given.maximum:
            return f"repeats {repeated:.0%} of its {given.n}-grams"
        # Runs are invisible to words: a thousand exclamation marks have none, a thousand a's are one.
        visible = "".join(text.split())
        run, character = max(((len(list(same)), each) for each, same in groupby(visible)), default=(0, ""))
        if run >= _SHORTEST_RUN and run > given.maximum * len(visible):
            return f"is {run / len(visible):.0%} one run of {character!r}"
        return None

    return judge


def _refusal(given: kinds.RefusalFilterConfig, name: str) -> Judge:
    pattern = compile_refusals(given.patterns)

    def judge(candidate: Candidate) -> str | None:
        beginning = normalize(_text(candidate, given.field, name).strip()[:BEGINNING]).translate(_APOSTROPHES)
        found = pattern.search(beginning)
        return f"refuses: {_excerpt(found.group())}" if found else None

    return judge


_APOSTROPHES = str.maketrans("’‘ʼ`´", "'''''")


def _keywords(given: kinds.KeywordsFilterConfig, name: str) -> Judge:
    # Where a keyword begins or ends with a letter that needs spaces around it, no other may stand next to it.
    spaced = rf"[[\p{{L}}\p{{M}}\p{{N}}_]--[{UNSPACED}]]"
    edges = rf"(?V1)(?:(?<!{spaced})|(?!{spaced}))(?:%s)(?:(?!{spaced})|(?<!{spaced}))"
    pattern = regex.compile(edges % "|".join(regex.escape(normalize(each)) for each in given.keywords))

    def judge(candidate: Candidate) -> str | None:
        found = pattern.search(normalize(_text(candidate, given.field, name)))
        return f"has {found.group()!r} in it" if found else None

    return judge


def _ending(given: kinds.EndingFilterConfig, name: str) -> Judge:
    def judge(candidate: Candidate) -> str | None:
        text = _text(candidate, given.field, name).rstrip()
        found = next((each for each in given.endings if text.endswith(each)), None)
        return f"ends with {found!r}" if found else None

    return judge


def _contamination(given: kinds.ContaminationFilterConfig, name: str, prompts: Iterable[str] | None) -> Judge:
    if prompts is None:
        raise InputError(f"Filter '{name}' compares with the evaluation set; set data.evaluation, or leave it out.")
    contamination = Contamination(prompts, given.n)

    def judge(candidate: Candidate) -> str | None:
        for field_name in given.fields:
            found = contamination.find(_text(candidate, field_name, name))
            if found is not None:
                return f"shares {_excerpt(found)} with the evaluation set ({field_name})"
        return None

    return judge


def _near_duplicates(given: kinds.NearDuplicatesFilterConfig, name: str) -> Filter:
    pool = NearDuplicates(given.threshold, given.n, given.permutations)

    def joined(candidate: Candidate) -> str:
        return "\n".join(_text(candidate, each, name) for each in given.fields)

    def judge(candidate: Candidate) -> str | None:
        found = pool.find(joined(candidate))
        return f"is a near-duplicate ({found.score:.2f}) of {_excerpt(found.text)}" if found else None

    return Filter(name, judge, lambda candidate: pool.add(joined(candidate)))


def _rouge(given: kinds.RougeFilterConfig, name: str) -> Filter:
    pool = RougeIndex(given.threshold)

    def judge(candidate: Candidate) -> str | None:
        found = pool.find(_text(candidate, given.field, name))
        return f"has ROUGE-L {found.score:.2f} to {_excerpt(found.text)}" if found else None

    return Filter(name, judge, lambda candidate: pool.add(_text(candidate, given.field, name)))


def _custom(given: kinds.CustomFilterConfig, name: str) -> Judge:
    function = load_function(given.function, f"Filter '{name}'")

    def judge(candidate: Candidate) -> str | None:
        try:
            reason = function(candidate)
        except Exception as error:  # a function of the user's fails in ways of its own
            raise InputError(
                f"Filter '{name}': {given.function} failed with {type(error).__name__}: {error}; the candidate was "
                f"{_excerpt(repr(dict(candidate)))}."
            ) from error
        if reason is not None and (not isinstance(reason, str) or not reason):
            raise InputError(
                f"Filter '{name}': {given.function} returned {reason!r}; let it return None to keep a candidate, or "
                "the reason for leaving it out as text."
            )
        return reason

    return judge


_BUILDERS: dict[type, Callable[[Any, str], Judge]] = {
    kinds.EmptyFilterConfig: _empty,
    kinds.TruncatedFilterConfig: _truncated,
    kinds.LengthFilterConfig: _length,
    kinds.LanguageFilterConfig: _language,
    kinds.RepetitionFilterConfig: _repetition,
    kinds.RefusalFilterConfig: _refusal,
    kinds.KeywordsFilterConfig: _keywords,
    kinds.EndingFilterConfig: _ending,
    kinds.CustomFilterConfig: _custom,
}
_BUILDERS_WITH_MEMORY: dict[type, Callable[[Any, str], Filter]] = {
    kinds.NearDuplicatesFilterConfig: _near_duplicates,
    kinds.RougeFilterConfig: _rouge,
}
