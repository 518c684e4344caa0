"""How likely demonstrations make right answers: asked of a served teacher, and kept, so that nothing is asked twice."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rayk.config.support import Logprob
from rayk.data.demonstrations import DemonstratedRow
from rayk.errors import UnusableSignal
from rayk.losses import sequence_sum
from rayk.serving.event_loop import stream_in_background
from rayk.signals.sequence import TokenSequence
from rayk.storage.parquet_store import ParquetStore
from rayk.teachers import Teacher

REFUSED = -100.0
"""The score of a demonstration that is no use, as the paper's code has it; any log-prob of a token that a teacher gives
is better."""

Progress = Callable[[int, int, str], None]
"""Told (done, total, what to say of it)."""

_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("query", pa.string()),
        ("demonstrations", pa.list_(pa.string())),
        ("mean_logprob", pa.float32()),
        ("tokens", pa.int32()),
    ]
)
_QUERIES_A_CALL = 32
_FLUSH_SECONDS = 10.0


class Scores:
    """Mean log-probs, nats a token, of right answers under `teacher`, in `folder` as they come.

    Attributes:
        asked: how many were asked of the teacher, the others being found.
        unusable: how many of them it could not say; they count as refused.

    Raises:
        InputError: the folder cannot be written.
    """

    def __init__(self, teacher: Teacher, folder: Path):
        self.asked = self.unusable = 0
        self._teacher = teacher
        self._kept = ParquetStore(folder, _SCHEMA)
        self._kept.load()
        self._pending: dict[str, dict[str, Any]] = {}
        self._flushed = time.monotonic()
        info = teacher.info
        self._context = json.dumps([info.weights_fingerprint or info.model, info.engine, info.dtype]).encode()

    def of(self, shown: Iterable[tuple[DemonstratedRow, Sequence[str]]], total: int, progress: Progress) -> np.ndarray:
        """The scores of queries after demonstrations, float32, in order; what was asked before is not asked again.

        Args:
            shown: each query as the teacher reads it, and where its demonstrations stood.
            total: how many there are.

        Raises:
            RunFailed: the disk is full.
            InputError, TeacherUnavailable: as `Teacher.score`.
        """
        scores = np.empty(total, np.float32)
        waiting: list[list[tuple[int, str]]] = []
        done, before, began = 0, self.asked, time.monotonic()

        def calls() -> Iterable[Any]:
            nonlocal done
            call: list[tuple[int, str, TokenSequence, dict[str, Any]]] = []
            for place, (query, demonstrations) in enumerate(shown):
                view = query.view(self._teacher.settings.name)
                key = self._key(view)
                found = self._find(key)
                if found is not None:
                    scores[place], done = found, done + 1
                    continue
                provenance = {"query": query.where, "demonstrations": list(demonstrations)}
                call.append((place, key, view, provenance))
                if len(call) == _QUERIES_A_CALL:
                    waiting.append([each[:2] for each in call])
                    yield self._ask([each[1:] for each in call])
                    call = []
            if call:
                waiting.append([each[:2] for each in call])
                yield self._ask([each[1:] for each in call])

        try:
            with closing(stream_in_background(calls(), self._teacher.settings.in_flight)) as answers:
                for rows in answers:
                    places = [place for place, _ in waiting.pop(0)]
                    scores[places] = [row["mean_logprob"] for row in rows]
                    self._pending |= {row["key"]: row for row in rows}
                    self.asked, done = self.asked + len(rows), done + len(rows)
                    if time.monotonic() - self._flushed > _FLUSH_SECONDS:
                        self._flush()
                    rate = (self.asked - before) / max(time.monotonic() - began, 1e-3)
                    progress(done, total, f"{rate:,.0f} scores/s")
        finally:
            self._flush()
        return scores

    def _find(self, key: str) -> float | None:
        if row := self._pending.get(key):
            return row["mean_logprob"]
        found = self._kept.find(key, ["mean_logprob"])
        return None if found is None else found[0]

    def _key(self, row: TokenSequence) -> str:
        digest = hashlib.blake2b(self._context, digest_size=16)
        digest.update(row.input_ids.astype("<i4").tobytes())
        digest.update(np.packbits(row.counted).tobytes())
        return digest.hexdigest()

    async def _ask(self, call: list[tuple[str, TokenSequence, dict[str, Any]]]) -> list[dict[str, Any]]:
        """The rows to be kept of one call."""
        sequences = [sequence for _, sequence, _ in call]
        means = np.full(len(call), REFUSED, np.float32)
        usable = list(range(len(call)))
        while usable:
            try:
                signals = await self._teacher.ascore([sequences[place] for place in usable], Logprob())
            except UnusableSignal as error:
                self.unusable += len(error.rows)
                usable = [place for number, place in enumerate(usable) if number not in error.rows]
                continue
            sums = sequence_sum(signals.target_logprobs.double(), signals.offsets) / signals.offsets.diff()
            means[usable] = sums.clamp(min=REFUSED).float().numpy()
            break
        return [
            {"key": key, **provenance, "mean_logprob": float(mean), "tokens": sequence.counted_tokens}
            for (key, sequence, provenance), mean in zip(call, means, strict=True)
        ]

    def _flush(self) -> None:
        if self._pending:
            self._kept.add(list(self._pending.values()))
            self._pending = {}
        self._flushed = time.monotonic()
