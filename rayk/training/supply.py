"""What each step learns from, begun ahead of it: rows sampled in turn, then teachers asked, results in order."""

import logging
import time
from collections.abc import Generator, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rayk.config import MiniLLMConfig, RunConfig
from rayk.data.batches import Batch, BatchSampler, collate
from rayk.data.examples import ExampleTable
from rayk.errors import RunFailed, UnusableSignal
from rayk.methods import Experience, Method
from rayk.rollouts import Policy, VersionGate
from rayk.rollouts.kept import pack_row, unpack_row
from rayk.teachers.background import background, background_stream, wait_for

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """An experience, and what it took: seconds of the policy, and of the teachers."""

    experience: Experience
    generate_seconds: float
    score_seconds: float


class Supply:
    """One rank's experiences, from `step` on.

    Where the run has a policy, its steps take turns at it (`VersionGate`). After each optimiser step the loop calls
    `finish` and then, once nothing but the step to come may use the weights, `advance`.
    """

    def __init__(
        self, config: RunConfig, method: Method, policy: Policy | None, table: ExampleTable, sampler: BatchSampler,
        pad_id: int, rank: int, world: int, pretraining: ExampleTable | None = None,
    ):  # fmt: skip
        self._config, self._method, self._policy = config, method, policy
        self._table, self._sampler, self._pad_id = table, sampler, pad_id
        self._rank, self._world = rank, world
        self._pretraining = pretraining
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
        with closing(background_stream(map(self._prepared, range(step, total_steps)), ahead)) as results:
            yield from results

    def finish(self) -> None:
        """Wait until all that is to be written with the present weights has been."""
        if self._gate is not None:
            wait_for(background(self._gate.finished()))

    def advance(self, version: int) -> None:
        """Have the policy write with the weights that the learner has now."""
        if self._gate is not None:
            assert self._policy is not None
            self._policy.update(version)
            self._sampled.pop(version - 1, None)
            wait_for(background(self._gate.advance()))

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
        while kept and (step, 0) in kept:
            places = self._sampler.places(step, self._rank, self._world)
            origins = self._sampler.rows(step)
            self._sampled[step] = collate(
                [unpack_row(kept[step, int(place)], self._table[int(origins[place])]) for place in places], self._pad_id
            )
            step += 1

    async def _prepared(self, step: int) -> Prepared:
        batch, generate_seconds = self._sampled.get(step), 0.0
        if batch is None and self._gate is None:
            batch = await self._sample(step)
        elif batch is None:
            assert self._gate is not None
            async with self._gate.turn(step):
                began = time.perf_counter()
                batch = await self._sample(step)
                self._sampled[step] = batch
                generate_seconds = time.perf_counter() - began
        began = time.perf_counter()
        experience = await self._prepare(batch)
        if self._pretraining is not None:
            text = self._rows(step, self._pretraining, self._pretraining_sampler)
            beside = await self._prepare(text)
            experience = replace(experience, beside=beside, skipped=experience.skipped + beside.skipped)
        return Prepared(experience, generate_seconds, time.perf_counter() - began)

    async def _sample(self, step: int) -> Batch:
        rows = self._rows(step, self._table, self._sampler)
        return await self._method.sample(rows, self._seeds(step), step / self._sampler.steps)

    def _rows(self, step: int, table: ExampleTable, sampler: BatchSampler) -> Batch:
        rows = sampler.share(step, self._rank, self._world)
        return collate([table[int(row)] for row in rows], self._pad_id)

    def _seeds(self, step: int) -> list[int]:
        """One a row, of the run's seed, the step and the row's place in it: the same whichever rank has the row."""
        places = self._sampler.places(step, self._rank, self._world)
        keys = ([self._config.seed, step, int(place)] for place in places)
        return [int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) for key in keys]

    async def _prepare(self, batch: Batch) -> Experience:
        try:
            return await self._method.prepare(batch)
        except UnusableSignal as error:
            usable = [row for row in range(batch.rows) if row not in error.rows]
            if self._config.training.unusable_rows == "stop":
                raise RunFailed(f"{error} Set training.unusable_rows to skip to go on without such rows.") from error
            if not usable:
                raise RunFailed(f"{error} No row of the step is left.") from error
            logger.warning("%s Left out, with %d rows in all.", error, len(error.rows))
            rest = await self._prepare(batch.select(usable))
            return replace(rest, skipped=rest.skipped + len(error.rows))
