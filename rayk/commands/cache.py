"""`rayk cache`: ask the teachers for every signal a run will need, before it starts; check what a cache holds."""

import logging
from collections.abc import Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass

from rayk.config import CacheConfig, InContextConfig, RunConfig
from rayk.config.support import Logprob, Requested, Support, TopK
from rayk.data.batches import micro_batches
from rayk.data.examples import Example, ExampleTable
from rayk.errors import InputError, UnusableSignal
from rayk.evaluation.evaluate import fitting
from rayk.run import (
    ProgressListener,
    teacher_applications,
    connect_attached_teachers,
    required_cpus,
    next_round,
    serve_teachers,
    with_absolute_paths,
)
from rayk.run.inputs import Inputs, with_synthesized_rows, read_inputs
from rayk.serving.cluster import start_ray
from rayk.serving.event_loop import background_stream
from rayk.storage.segments import Found
from rayk.teachers import Teacher
from rayk.teachers.cache import SignalCache
from rayk.teachers.ensemble import name_for

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheFill:
    """What the cache holds of one kind of rows."""

    what: str
    rows: int
    tokens: int
    """Counted tokens, of which `cached_tokens` were there before."""
    cached_tokens: int
    bytes: int
    support: Support

    @property
    def bytes_an_entry(self) -> float | None:
        """Bytes for one pair (id, log-prob) of a top-k signal, tails and index included."""
        return self.bytes / max(1, self.tokens * self.support.k) if isinstance(self.support, TopK) else None


def fill_cache(config: RunConfig, listener: ProgressListener | None = None) -> list[CacheFill]:
    """Ask for every signal that `config`'s run will ask for, and keep it in `config.cache`.

    Raises:
        InputError: there is no cache or no teacher to fill it, or the inputs are wrong.
        UnusableSignal: a row's signal cannot be learned from, and `training.unusable_rows` is "stop".
    """
    config, listener = with_synthesized_rows(next_round(with_absolute_paths(config))[0]), listener or ProgressListener()
    settings = _settings(config)
    if not config.teachers:
        raise InputError("There is no teacher to fill the cache from; add one under 'teachers'.")
    if config.ensemble is not None:
        raise InputError("An ensemble asks for ids that depend on all its members, which no cache holds; leave it out.")
    if not getattr(config.method, "reads_completions", True):
        raise InputError(
            f"method '{config.method.kind}' learns from rows that are not written yet; nothing can be asked ahead."
        )
    if isinstance(config.method, InContextConfig):
        raise InputError(
            "method 'in_context' asks about rows with demonstrations, which its run draws; the run fills the cache."
        )
    listener.stage("Reading data and models")
    with ExitStack() as stack:
        inputs = read_inputs(config, connect_attached_teachers(config))
        start_ray(required_cpus(config))
        listener.stage("Bringing up teachers")
        cache = stack.enter_context(SignalCache(settings))
        teachers = serve_teachers(config, teacher_applications(config), stack, cache)
        filled = []
        for what, teacher, support, examples in _wanted(config, inputs, teachers):
            listener.stage(f"Asking {teacher.name} for the signals of {what} ({support.kind})")
            filled.append(_fill(what, teacher, support, examples, config.training.unusable_rows == "skip", listener))
    return filled


def verify_cache(config: RunConfig) -> Found:
    """Read all of `config.cache` and delete what is damaged.

    Raises:
        InputError: there is no cache.
    """
    return SignalCache(_settings(with_absolute_paths(config))).verify()


def _settings(config: RunConfig) -> CacheConfig:
    if config.cache is None:
        raise InputError("cache is missing; set cache.path to the folder or URI that holds it.")
    return config.cache


def _wanted(
    config: RunConfig, inputs: Inputs, teachers: dict[str, Teacher]
) -> Iterable[tuple[str, Teacher, Support, list[Example]]]:
    def by_teacher(table: ExampleTable) -> Iterable[tuple[Teacher, list[Example]]]:
        if config.route is None:
            return [(teachers[config.evaluation_teacher], list(table))]
        rows: dict[str, list[Example]] = {}
        for example in table:
            rows.setdefault(name_for(example, config.route), []).append(example)
        return [(teachers[name], examples) for name, examples in rows.items()]

    support = getattr(config.method, "support", None)
    if support is not None and not isinstance(support, Requested) and getattr(config.method, "reads_completions", True):
        assert inputs.train is not None
        for teacher, examples in by_teacher(inputs.train):
            yield "training rows", teacher, support, [answer for row in examples for answer in row.answers]
    if inputs.evaluation is not None:
        for teacher, examples in by_teacher(inputs.evaluation):
            yield "evaluation rows", teacher, fitting(config.evaluation.support, teacher.vocab_size), examples
            if config.route is None:
                yield "evaluation rows", teacher, Logprob(), examples


def _fill(
    what: str, teacher: Teacher, support: Support, examples: list[Example], skip: bool, listener: ProgressListener
) -> CacheFill:
    assert teacher.cache is not None
    statistics, bytes_before = teacher.statistics, teacher.cache.bytes
    tokens_before, cached_before = statistics.tokens, statistics.cached_tokens

    async def kept(rows: list[int]) -> int:
        """How many of `rows` the cache holds now."""
        try:
            await teacher.ascore([examples[row] for row in rows], support)
        except UnusableSignal as error:
            if not skip:
                raise
            logger.warning("%s Left out.", error)
            usable = [row for place, row in enumerate(rows) if place not in error.rows]
            return await kept(usable) if usable else 0
        return len(rows)

    groups = micro_batches([len(example) for example in examples], teacher.settings.call_tokens)
    done = rows = 0
    with closing(background_stream(map(kept, groups), teacher.settings.in_flight)) as answers:
        for group, count in zip(groups, answers, strict=True):
            rows, done = rows + count, done + len(group)
            listener.progress(done, len(examples), f"{statistics.tokens - tokens_before:,} tokens")
    return CacheFill(
        what, rows, statistics.tokens - tokens_before, statistics.cached_tokens - cached_before,
        teacher.cache.bytes - bytes_before, support,
    )  # fmt: skip
