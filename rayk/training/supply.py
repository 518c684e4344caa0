"""What each step learns from, begun ahead of it: rows sampled in turn, then teachers asked, results in order."""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Generator, Iterable, Mapping
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rayk.config import MiniLLMConfig, RunConfig
from rayk.data.batches import Batch, BatchSampler, collate
from rayk.data.examples import Example, ExampleTable
from rayk.data.views import RowViews
from rayk.engines.batching import task_group
from rayk.errors import RunFailed, UnusableSignal
from rayk.methods import Experience, Method
from rayk.rollouts import Policy, VersionGate
from rayk.rollouts.packed_rows import pack_row, unpack_row
from rayk.serving.event_loop import run_in_background, stream_in_background, wait_for
from rayk.signals.sequence import TokenSequence

logger = logging.getLogger(__name__)

_Usable = tuple[list[int], Experience | None]
"""Which rows of a batch can be learned from, and what: None where there are none."""


@dataclass(frozen=True)
class Span:
    """When something was done: its start in seconds since 1970, and how long it took."""

    started_at: float
    seconds: float

    @classmethod
    def since(cls, started_at: float) -> "Span":
        return cls(started_at, time.time() - started_at)


@dataclass(frozen=True)
class Prepared:
    """An experience, and when this rank's part of it was written and scored."""

    experience: Experience
    written: Span | None
    """None where nobody wrote: the rows are the data's, or kept of a checkpoint."""
    scored: Span


class Supply:
    """One rank's experiences, from `step` on.

    Where the run has a policy, its steps take turns at it (`VersionGate`). After each optimiser step the loop calls
    `finish` and then, once nothing but the step to come may use the weights, `advance`.
    """

    def __init__(
        self, config: RunConfig, method: Method, policy: Policy | None, table: ExampleTable, sampler: BatchSampler,
        pad_id: int, rank: int, world: int, pretraining: ExampleTable | None = None,
        views: RowViews | None = None,
    ):  # fmt: skip
        self._config, self._method, self._policy = config, method, policy
        self._table, self._sampler, self._pad_id = table, sampler, pad_id
        self._rank, self._world = rank, world
        self._pretraining = pretraining
        self._views = views or RowViews()
        if pretraining is not None:
            assert isinstance(config.method, MiniLLMConfig) and config.method.pretraining is not None
            size = config.method.pretraining.batch_size or config.training.batch_size
            # Of a seed of its own: its rows are not to come in the order of the others'.
            self._pretraining_sampler = BatchSampler(pretraining.lengths, size, config.seed + 1, sampler.steps)
        self._max_staleness = config.rollouts.max_staleness if config.rollouts else 0
        self._sampled: dict[int, Batch] = {}
        """By step; those kept of a checkpoint, and, since their weights will be gone, those of steps to come."""
        self._gate: VersionGate | None = None

    def stream(self, step: int, total_steps: int) -> Generator[Prepared, None, None]:
        """Each step's experience in order, `training.prefetch` of them begun ahead."""
        if self._policy is not None:
            self._policy.update(step)
            next_step = next(each for each in range(step, total_steps + 1) if each not in self._sampled)
            self._gate = VersionGate(step, next_step, total_steps - 1, self._max_staleness)
        # A step that is not begun would never have its turn, and `finish` would wait for it.
        ahead = max(self._config.training.prefetch, self._max_staleness)
        with closing(stream_in_background(map(self._prepared, range(step, total_steps)), ahead)) as results:
            yield from results

    def finish(self) -> None:
        """Wait until all that is to be written with the present weights has been."""
        if self._gate is not None:
            wait_for(run_in_background(self._gate.finished()))

    def advance(self, version: int) -> None:
        """Have the policy write with the weights that the learner has now."""
        if self._gate is not None:
            assert self._policy is not None
            if version + self._max_staleness < self._sampler.steps:  # else no step is left that writes with it
                self._policy.update(version)
            self._sampled.pop(version - 1, None)
            wait_for(run_in_background(self._gate.advance()))

    def state(self, step: int) -> list[dict[str, Any]]:
        """For a checkpoint after `step` steps: the rows sampled for later ones under weights that will be gone."""
        if not self._max_staleness:
            return []
        rows = []
        while (batch := self._sampled.get(step)) is not None:
            places = self._sampler.places(step, self._rank, self._world)
            rows += [
                {"step": step, "place": int(place), "row": pack_row(row)}
                for place, row in zip(places, batch.sequences, strict=True)
            ]
            step += 1
        return rows

    def load_state(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take up what `state` gave, of all ranks together, whichever of them this one is now."""
        kept = {(each["step"], each["place"]): each["row"] for each in rows}
        # Of a step that not all workers had finished when the run stopped, every row is written anew.
        while kept and all((step, place) in kept for place in range(self._sampler.batch_size)):
            places = self._sampler.places(step, self._rank, self._world)
            origins = self._sampler.rows(step)
            self._sampled[step] = collate(
                [unpack_row(kept[step, int(place)], self._table[int(origins[place])]) for place in places], self._pad_id
            )
            step += 1

    async def _prepared(self, step: int) -> Prepared:
        """The step's experience: of rows that the policy writes, or of the data's or a checkpoint's."""
        batch, written = self._sampled.get(step), None
        if batch is None and self._gate is not None:
            experience, written, scored = await self._written(step, self._gate)
        else:
            experience, scored = await self._scored(batch or await self._sample(step))
        if self._pretraining is not None:
            beside, _ = await self._scored(self._rows(step, self._pretraining, self._pretraining_sampler))
            experience = replace(experience, beside=beside, skipped=experience.skipped + beside.skipped)
            scored = Span.since(scored.started_at)
        return Prepared(experience, written, scored)

    async def _scored(self, batch: Batch) -> tuple[Experience, Span]:
        began = time.time()
        experience = self._joined(batch.rows, [([*range(batch.rows)], await self._usable(batch))])
        return experience, Span.since(began)

    async def _written(self, step: int, gate: VersionGate) -> tuple[Experience, Span, Span]:
        """What the policy writes for the step, group by group: teachers are asked about one while it writes the
        next."""
        rows, seeds = self._rows(step, self._table, self._sampler), self._seeds(step, self._sampler)
        progress = step / self._sampler.steps
        sampled: dict[int, TokenSequence] = {}
        scoring: list[tuple[list[int], asyncio.Task[_Usable]]] = []
        async with task_group() as tasks, gate.turn(step), self._in_time(step):
            began = time.time()
            scored_from = math.inf
            for group in self._method.groups(rows, seeds, progress):
                part = await self._method.sample(rows.select(group), [seeds[row] for row in group], progress)
                sampled |= zip(group, part.sequences, strict=True)
                scored_from = min(scored_from, time.time())
                scoring.append((group, tasks.create_task(self._usable(part))))
            self._sampled[step] = collate([sampled[row] for row in range(rows.rows)], self._pad_id)
            written = Span.since(began)
        experience = self._joined(rows.rows, [(group, task.result()) for group, task in scoring])
        return experience, written, Span.since(scored_from)

    @asynccontextmanager
    async def _in_time(self, step: int) -> AsyncIterator[None]:
        """Held while the policy writes for `step`, no longer than the settings allow."""
        assert self._config.rollouts is not None
        clock = asyncio.timeout(self._config.rollouts.timeout_seconds)
        try:
            async with clock:
                yield
        except TimeoutError as error:
            if not clock.expired():
                raise
            raise RunFailed(
                f"The completions of step {step + 1} took longer than rollouts.timeout_seconds "
                f"({self._config.rollouts.timeout_seconds} s); see what holds them up, lower rollouts.max_new_tokens, "
                "or raise it."
            ) from error

    async def _sample(self, step: int) -> Batch:
        rows = self._rows(step, self._table, self._sampler)
        return await self._method.sample(rows, self._seeds(step, self._sampler), step / self._sampler.steps)

    def _rows(self, step: int, table: ExampleTable, sampler: BatchSampler) -> Batch:
        """This rank's rows of `step`, with the contexts of the models that read them."""
        rows = [table[int(row)] for row in sampler.share(step, self._rank, self._world)]
        seeds, progress = self._seeds(step, sampler), step / sampler.steps
        return collate(
            [self._views.apply(row, seed, progress) for row, seed in zip(rows, seeds, strict=True)], self._pad_id
        )

    def _seeds(self, step: int, sampler: BatchSampler) -> list[int]:
        """One a row, of the run's seed, the step and the row's place in it: the same whichever rank has the row."""
        places = sampler.places(step, self._rank, self._world)
        keys = ([self._config.seed, step, int(place)] for place in places)
        return [int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) for key in keys]

    async def _usable(self, batch: Batch) -> _Usable:
        """What can be learned from of `batch`, and which of its rows that are."""
        # Rows that come from a checkpoint have no contexts yet.
        views = [self._views.apply(row) for row in batch.sequences if isinstance(row, Example)]
        batch, rows = replace(batch, sequences=list[TokenSequence](views)), list(range(batch.rows))
        while rows:
            try:
                left = batch if len(rows) == batch.rows else batch.select(rows)
                return rows, await self._method.prepare(left)
            except UnusableSignal as error:
                if self._config.training.unusable_rows == "stop":
                    hint = "Set training.unusable_rows to skip to go on without such rows."
                    raise RunFailed(f"{error} {hint}") from error
                logger.warning("%s Left out, with %d rows in all.", error, len(error.rows))
                rows = [row for place, row in enumerate(rows) if place not in error.rows]
        return rows, None

    def _joined(self, count: int, parts: Iterable[tuple[list[int], _Usable]]) -> Experience:
        """The experience of `count` rows, in their order, from `parts`: which rows each was, and what is left of it.

        Raises:
            RunFailed: too little is left to learn from.
        """
        usable = [(group, kept, experience) for group, (kept, experience) in parts if experience is not None]
        rows = [group[row] for group, kept, _ in usable for row in kept]
        if len(rows) < self._method.fewest_rows:
            raise RunFailed(
                f"Of the step's {count} rows {len(rows)} are left to learn from, but {self._method.fewest_rows} are "
                "needed; see above why the others could not be used."
            )
        experience = Experience.joined([experience for *_, experience in usable])
        if rows != sorted(rows):
            experience = experience.select(np.argsort(rows).tolist())
        return replace(experience, skipped=count - len(rows))
