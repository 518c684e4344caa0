"""Prepare the experiences of later steps while the student trains: generate rows, query teachers, yield in order."""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Mapping
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rayk.config import RunConfig
from rayk.data.alignment import UnalignableRow
from rayk.data.batches import Batch, BatchSampler, collate
from rayk.data.chunks import TrainingRows
from rayk.data.examples import Example
from rayk.data.views import RowViews
from rayk.engines.batching import task_group
from rayk.errors import InputError, Interrupted, RunFailed, UnusableSignal
from rayk.methods import Experience, Method, OnPolicyMethod
from rayk.rollouts import Policy, VersionGate
from rayk.rollouts.packed_rows import pack_row, unpack_row
from rayk.serving.event_loop import run_in_background, stream_in_background, wait_for
from rayk.signals.sequence import TokenSequence
from rayk.training.following import FollowingTeachers
from rayk.training.interruption import StopRequest

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2

_Usable = tuple[list[int], Experience | None]
"""The indices of a batch's rows with usable signals, and the experience of these rows; None if there are none."""

_Prepare = Callable[[Batch], Any]


@dataclass(frozen=True)
class TimeSpan:
    """A period of time: its start in seconds since 1970, and its duration."""

    started_at: float
    seconds: float

    @classmethod
    def since(cls, started_at: float) -> "TimeSpan":
        return cls(started_at, time.time() - started_at)


@dataclass(frozen=True)
class PreparedStep:
    """This rank's experience of a step, and when its rows were generated and scored."""

    experience: Experience
    generated: TimeSpan | None
    """None if nothing was generated: the rows come from the data or from a checkpoint."""
    scored: TimeSpan


class ExperienceSource:
    """Prepare one rank's experiences, step by step.

    If the run has a policy, the steps use it one after the other (`VersionGate`); it has the weights of the first step
    before `stream` begins. After each optimizer step the loop
    calls `finish`, and then `advance`, which updates the policy's weights for later steps.

    Args:
        auxiliary: rows of `settings.auxiliary_data` and their sampler; None without such data.
        following: the teachers that follow the student.
    """

    def __init__(
        self, config: RunConfig, method: Method, policy: Policy | None, table: TrainingRows, sampler: BatchSampler,
        pad_id: int, rank: int, world: int, auxiliary: tuple[TrainingRows, BatchSampler] | None = None,
        views: RowViews | None = None, stop_request: StopRequest | None = None,
        following: FollowingTeachers | None = None,
    ):  # fmt: skip
        self._config, self._method, self._policy = config, method, policy
        self._generating = method if isinstance(method, OnPolicyMethod) else None
        self._table, self._sampler, self._pad_id = table, sampler, pad_id
        self._rank, self._world = rank, world
        self._auxiliary = auxiliary
        self._views = views or RowViews()
        self._stop_request = stop_request
        self._following = following
        self._awaited: int | None = None
        """The step that the training loop is waiting for, or has received last."""
        self._max_staleness = config.rollouts.max_staleness if config.rollouts else 0
        self._sampled: dict[int, Batch] = {}
        """Rows that were already generated for later steps, by step: kept for the next checkpoint, or restored from the
        last one."""
        self._gate: VersionGate | None = None

    def stream(self, step: int, total_steps: int) -> Generator[PreparedStep, None, None]:
        """Yield the experience of each step in order, and prepare the next `training.prefetch` ones meanwhile.

        Raises:
            Interrupted: a stop was requested while the loop waits for an experience.
        """
        if self._policy is not None:
            next_step = next(later for later in range(step, total_steps + 1) if later not in self._sampled)
            self._gate = VersionGate(step, next_step, total_steps - 1, self._max_staleness)
        # `finish` waits for all steps that use the current weights, so all of these must be started.
        ahead = max(self._config.training.prefetch, self._max_staleness)
        steps = map(self._prepare_unless_stopped, range(step, total_steps))
        with closing(stream_in_background(steps, ahead)) as results:
            for awaited in range(step, total_steps):
                self._awaited = awaited
                # No variable holds the result: its memory is freed before the next one arrives.
                yield next(results)

    def finish(self) -> None:
        """Wait until all rows that need the policy's current weights are generated."""
        if self._gate is not None:
            wait_for(run_in_background(self._gate.wait_for_samplers()))

    def advance(self, version: int) -> None:
        """Let the policy generate with the student's current weights."""
        if self._gate is not None:
            assert self._policy is not None
            if version + self._max_staleness < self._sampler.steps:  # else no later step generates with these weights
                self._policy.update(version)
            self._sampled.pop(version - 1, None)
            wait_for(run_in_background(self._gate.advance()))

    def state(self, step: int) -> list[dict[str, Any]]:
        """Return, for a checkpoint after `step` steps, the rows already generated for later steps."""
        if not self._max_staleness:
            return []
        rows = []
        while (batch := self._sampled.get(step)) is not None:
            places = self._sampler.share_positions(step, self._rank, self._world)
            rows += [
                {"step": step, "place": int(place), "row": pack_row(row)}
                for place, row in zip(places, batch.sequences, strict=True)
            ]
            step += 1
        return rows

    def load_state(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Restore the rows that `state` returned, those of all ranks; the number of ranks may have changed."""
        stored = {(entry["step"], entry["place"]): entry["row"] for entry in rows}
        # A step with missing rows is generated again as a whole.
        while stored and all((step, place) in stored for place in range(self._sampler.batch_size)):
            places = self._sampler.share_positions(step, self._rank, self._world)
            origins = self._sampler.rows(step)
            self._sampled[step] = collate(
                [unpack_row(stored[step, int(place)], self._table[int(origins[place])]) for place in places],
                self._pad_id,
            )
            step += 1

    async def _prepare_unless_stopped(self, step: int) -> PreparedStep:
        """Prepare the step, or raise Interrupted if a stop is requested while the loop waits for this step."""
        if self._stop_request is None:
            return await self._prepare(step)
        work = asyncio.ensure_future(self._prepare(step))
        try:
            while not (await asyncio.wait({work}, timeout=_POLL_SECONDS))[0]:
                if self._awaited == step and self._stop_request.exists():
                    raise Interrupted("The run was asked to stop.")
            return work.result()
        finally:
            work.cancel()

    async def _prepare(self, step: int) -> PreparedStep:
        """Prepare the step from rows that the policy generates, from the data's rows, or from a checkpoint's rows."""
        if self._following is not None:
            await self._following.use_weights_of(step)
        batch, generated = self._sampled.get(step), None
        if batch is None and self._gate is not None:
            experience, generated, scored = await self._generate_and_score(step, self._gate)
        else:
            experience, scored = await self._score(batch or await self._sample(step), self._method.prepare)
        if self._auxiliary is not None:
            rows = self._rows(step, *self._auxiliary)
            auxiliary, _ = await self._score(rows, self._method.prepare_auxiliary)
            experience = replace(experience, auxiliary=auxiliary, skipped=experience.skipped + auxiliary.skipped)
            scored = TimeSpan.since(scored.started_at)
        return PreparedStep(experience, generated, scored)

    async def _score(self, batch: Batch, prepare: _Prepare) -> tuple[Experience, TimeSpan]:
        """Return the experience of the batch's usable rows, and the time in which it was prepared."""
        started_at = time.time()
        usable = await self._prepare_usable(batch, prepare)
        return self._concatenate(batch.rows, [([*range(batch.rows)], usable)]), TimeSpan.since(started_at)

    async def _generate_and_score(self, step: int, gate: VersionGate) -> tuple[Experience, TimeSpan, TimeSpan]:
        """Generate the step's rows group by group; teachers score a group while the next one is generated."""
        assert self._generating is not None
        rows, seeds = self._rows(step, self._table, self._sampler), self._seeds(step, self._sampler)
        progress = step / self._sampler.steps
        sampled: dict[int, TokenSequence] = {}
        scoring: list[tuple[list[int], asyncio.Task[_Usable]]] = []
        async with task_group() as tasks, gate.turn(step), self._time_limit(step):
            started_at = time.time()
            scoring_started_at = math.inf
            for group in self._generating.groups(rows, seeds, progress):
                part = await self._generating.sample(rows.select(group), [seeds[row] for row in group], progress)
                sampled |= zip(group, part.sequences, strict=True)
                scoring_started_at = min(scoring_started_at, time.time())
                scoring.append((group, tasks.create_task(self._prepare_usable(part, self._method.prepare))))
            self._sampled[step] = collate([sampled[row] for row in range(rows.rows)], self._pad_id)
            generated = TimeSpan.since(started_at)
        experience = self._concatenate(rows.rows, [(group, task.result()) for group, task in scoring])
        return experience, generated, TimeSpan.since(scoring_started_at)

    @asynccontextmanager
    async def _time_limit(self, step: int) -> AsyncIterator[None]:
        """Limit the time of generation for `step` to `rollouts.timeout_seconds`."""
        assert self._config.rollouts is not None
        limit = asyncio.timeout(self._config.rollouts.timeout_seconds)
        try:
            async with limit:
                yield
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise RunFailed(
                f"The completions of step {step + 1} took longer than rollouts.timeout_seconds "
                f"({self._config.rollouts.timeout_seconds} s); find out what delays them, lower "
                "rollouts.max_new_tokens, or raise the limit."
            ) from error

    async def _sample(self, step: int) -> Batch:
        """Return this rank's rows of `step`; an on-policy method generates their completions."""
        rows = self._rows(step, self._table, self._sampler)
        if self._generating is None:
            return rows
        return await self._generating.sample(rows, self._seeds(step, self._sampler), step / self._sampler.steps)

    def _rows(self, step: int, table: TrainingRows, sampler: BatchSampler) -> Batch:
        """Return this rank's rows of `step`, with the contexts of the models that read them."""
        rows = [table[int(row)] for row in sampler.share(step, self._rank, self._world)]
        if not self._views.is_empty:
            seeds, progress = self._seeds(step, sampler), step / sampler.steps
            rows = [self._views.apply(row, seed, progress) for row, seed in zip(rows, seeds, strict=True)]
        return collate(rows, self._pad_id)

    def _seeds(self, step: int, sampler: BatchSampler) -> list[int]:
        """Return a seed per row, from the run's seed, the step and the row's position in the step, on any rank."""
        places = sampler.share_positions(step, self._rank, self._world)
        keys = ([self._config.seed, step, int(place)] for place in places)
        return [int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) for key in keys]

    async def _prepare_usable(self, batch: Batch, prepare: _Prepare) -> _Usable:
        """Return the indices of the rows of `batch` with usable signals, and the experience of these rows."""
        rows = list(range(batch.rows))
        while rows:
            try:
                chosen = batch if len(rows) == batch.rows else batch.select(rows)
                experience = await prepare(self._with_views(chosen))
            except UnusableSignal as error:
                if self._config.training.unusable_rows == "stop":
                    raise RunFailed(f"{error} Set training.unusable_rows to skip to leave such rows out.") from error
                logger.warning("%s Left out, with %d rows in all.", error, len(error.rows))
                rows = [row for place, row in enumerate(rows) if place not in error.rows]
            else:
                if not isinstance(experience, Experience):
                    raise InputError(
                        f"{type(self._method).__name__}.prepare must return a rayk.Experience, but it returned "
                        f"{type(experience).__name__}; return Experience(batch, signals)."
                    )
                return rows, experience
        return rows, None

    def _with_views(self, batch: Batch) -> Batch:
        """Return `batch`, whose completions are final, with all views of its rows.

        Raises:
            UnusableSignal: some rows cannot be aligned with the teacher's tokens.
        """
        if self._views.is_empty:
            return batch
        sequences, problems = list(batch.sequences), dict[int, UnalignableRow]()
        for place, row in enumerate(sequences):
            if isinstance(row, Example):
                try:
                    # Rows that come from a checkpoint have no contexts yet.
                    sequences[place] = self._views.align(self._views.apply(row))
                except UnalignableRow as error:
                    problems[place] = error
        if problems:
            raise UnusableSignal(str(next(iter(problems.values()))), [*problems])
        return replace(batch, sequences=sequences)

    def _concatenate(self, count: int, parts: Iterable[tuple[list[int], _Usable]]) -> Experience:
        """Concatenate the experiences of `parts` in the order of the step's rows.

        Args:
            count: number of rows of the step.
            parts: indices of a group's rows in the step, and the group's usable rows.

        Raises:
            RunFailed: fewer rows are usable than the method needs.
        """
        usable = [(group, kept, experience) for group, (kept, experience) in parts if experience is not None]
        rows = [group[row] for group, kept, _ in usable for row in kept]
        minimum = self._generating.minimum_rows if self._generating is not None else 1
        if len(rows) < minimum:
            raise RunFailed(
                f"Of the step's {count} rows, {len(rows)} have usable signals, but {minimum} are needed; the warnings "
                "above say why the other rows were left out."
            )
        experience = Experience.concatenate([experience for *_, experience in usable])
        if rows != sorted(rows):
            experience = experience.select(np.argsort(rows).tolist())
        return replace(experience, skipped=count - len(rows))
