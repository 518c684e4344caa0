"""`rayk cache`: request the signals that a run will need and store them in its cache; verify a cache."""

import logging
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass

from rich.table import Table

from rayk.config import CacheConfig, RunConfig
from rayk.config.support import Logprob, Requested, Support, TopK
from rayk.data.alignment import UnalignableRow
from rayk.data.batches import micro_batches
from rayk.data.examples import Example, ExampleTable
from rayk.errors import InputError, UnusableSignal
from rayk.evaluation.evaluate import limit_support
from rayk.run import (
    ProgressListener,
    connect_attached_teachers,
    next_round,
    required_cpus,
    serve_teachers,
    teacher_applications,
    with_absolute_paths,
)
from rayk.run.directory import with_pinned_date
from rayk.run.inputs import Inputs, read_inputs
from rayk.run.synthesis_inputs import with_synthesized_rows
from rayk.serving.cluster import start_ray
from rayk.serving.event_loop import stream_in_background
from rayk.storage.segments import CacheStatistics
from rayk.teachers import Teacher, choose_teacher_name
from rayk.teachers.cache import SignalCache

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheFill:
    """The cached signals of one kind of rows."""

    row_kind: str
    """Either training rows or evaluation rows."""
    rows: int
    tokens: int
    """Counted tokens, including `cached_tokens`, which were cached before."""
    cached_tokens: int
    bytes: int
    support: Support

    @property
    def bytes_per_entry(self) -> float | None:
        """Bytes per pair (id, log-prob) of a top-k signal, including tails and index; None for other supports."""
        return self.bytes / max(1, self.tokens * self.support.k) if isinstance(self.support, TopK) else None


def fill_cache(config: RunConfig, listener: ProgressListener | None = None) -> list[CacheFill]:
    """Request every signal that `config`'s run will request, and store it in `config.cache`.

    Raises:
        InputError: the cache or the teachers are missing, or the inputs are wrong.
        UnusableSignal: a row's signal contains NaN or infinities, and `training.unusable_rows` is "stop".
    """
    config, _ = next_round(with_pinned_date(with_absolute_paths(config)))
    config, listener = with_synthesized_rows(config), listener or ProgressListener()
    settings = _settings(config)
    if not config.teachers:
        raise InputError("teachers is missing; add the teacher that the cache is filled from.")
    if config.ensemble is not None:
        raise InputError(
            "Signals of an ensemble are not cached, because the requested ids depend on all its members; remove "
            "'ensemble'."
        )
    if any(teacher.follows for teacher in config.teachers):
        raise InputError(
            "Signals of a teacher that follows the student are not cached, because its weights change during the run; "
            "leave `rayk cache` out."
        )
    if not config.method.reads_completions:
        raise InputError(
            f"method.kind '{config.method.kind}' learns from rollouts, which are generated during the run, so their "
            "signals cannot be cached in advance."
        )
    if config.method.shown_demonstrations is not None:
        raise InputError(
            f"method.kind '{config.method.kind}' draws demonstrations for each row during the run, so their signals "
            "cannot be cached in advance; the run fills the cache."
        )
    if config.data.train is not None and config.data.train.random_offset:
        raise InputError(
            "data.train.random_offset gives each pass other rows, so their signals cannot be cached in advance; set it "
            "to false."
        )
    listener.stage("Reading data and models")
    with ExitStack() as stack:
        inputs = read_inputs(config, connect_attached_teachers(config))
        config = inputs.vocabulary.limit_teachers(config)
        start_ray(required_cpus(config))
        listener.stage("Starting teachers")
        cache = stack.enter_context(SignalCache(settings))
        teachers = serve_teachers(config, teacher_applications(config), stack, cache)
        fills = []
        for row_kind, teacher, support, examples in _requests(config, inputs, teachers):
            listener.stage(f"Requesting the signals of {row_kind} ({support.kind}) from {teacher.name}")
            fills.append(_fill(row_kind, teacher, support, examples, config.training.unusable_rows == "skip", listener))
    return fills


def verify_cache(config: RunConfig) -> CacheStatistics:
    """Read all of `config.cache` and delete damaged segments.

    Raises:
        InputError: the config has no cache.
    """
    return SignalCache(_settings(with_absolute_paths(config))).verify()


def _settings(config: RunConfig) -> CacheConfig:
    if config.cache is None:
        raise InputError("cache is missing; set cache.path to a folder or URI.")
    return config.cache


def _requests(
    config: RunConfig, inputs: Inputs, teachers: dict[str, Teacher]
) -> Iterable[tuple[str, Teacher, Support, list[Example]]]:
    """Yield, for each group of requests, the kind of rows, the teacher, the support and the rows."""

    def views_of(table: ExampleTable) -> Iterable[Example]:
        for row in table:
            try:
                yield inputs.views.align(inputs.views.apply(row))
            except UnalignableRow as error:
                if config.training.unusable_rows == "stop":
                    raise
                logger.warning("%s Skipped.", error)

    def by_teacher(table: ExampleTable) -> Iterable[tuple[Teacher, list[Example]]]:
        if config.route is None:
            return [(teachers[config.evaluation_teacher], list(views_of(table)))]
        rows: dict[str, list[Example]] = {}
        for example in views_of(table):
            rows.setdefault(choose_teacher_name(example, config.route), []).append(example)
        return [(teachers[name], examples) for name, examples in rows.items()]

    support = config.signal_support
    if support is not None and not isinstance(support, Requested) and config.method.reads_completions:
        assert inputs.train is not None
        for teacher, examples in by_teacher(inputs.train):
            yield "training rows", teacher, support, [answer for row in examples for answer in row.answers]
    if inputs.evaluation is not None and config.compares_teacher:
        for teacher, examples in by_teacher(inputs.evaluation):
            yield "evaluation rows", teacher, limit_support(config.evaluation.support, teacher.vocab_size), examples
            if config.route is None:
                yield "evaluation rows", teacher, Logprob(), examples


def _fill(
    row_kind: str, teacher: Teacher, support: Support, examples: list[Example], skip: bool, listener: ProgressListener
) -> CacheFill:
    assert teacher.cache is not None
    statistics, bytes_before = teacher.statistics, teacher.cache.bytes
    tokens_before, cached_before = statistics.tokens, statistics.cached_tokens

    async def request(rows: list[int]) -> int:
        """Request the signals of `rows`; return the number of rows with usable signals."""
        try:
            await teacher.ascore([examples[row] for row in rows], support)
        except UnusableSignal as error:
            if not skip:
                raise
            logger.warning("%s Skipped.", error)
            usable = [row for place, row in enumerate(rows) if place not in error.rows]
            return await request(usable) if usable else 0
        return len(rows)

    groups = micro_batches([len(example) for example in examples], teacher.settings.call_tokens)
    done = rows = 0
    with closing(stream_in_background(map(request, groups), teacher.settings.in_flight)) as answers:
        for group, count in zip(groups, answers, strict=True):
            rows, done = rows + count, done + len(group)
            listener.progress(done, len(examples), f"{statistics.tokens - tokens_before:,} tokens")
    return CacheFill(
        row_kind, rows, statistics.tokens - tokens_before, statistics.cached_tokens - cached_before,
        teacher.cache.bytes - bytes_before, support,
    )  # fmt: skip


def cache_table(fills: Sequence[CacheFill]) -> Table:
    """Return a table with a row per kind of rows and support."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("", "support", "rows", "tokens", "cached before", "bytes", "bytes per entry"):
        table.add_column(heading, justify="left" if heading in ("", "support") else "right")
    for fill in fills:
        numbers = (fill.rows, fill.tokens, fill.cached_tokens, fill.bytes)
        per_entry = "–" if fill.bytes_per_entry is None else f"{fill.bytes_per_entry:.2f}"
        table.add_row(fill.row_kind, fill.support.kind, *(f"{number:,}" for number in numbers), per_entry)
    return table
