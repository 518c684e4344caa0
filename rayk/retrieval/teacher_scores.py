"""Score demonstrations by the served teacher's log-prob of the right answer after them. Scores are stored, so that none
is requested twice."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
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
"""Score of a useless demonstration, as in the paper's code; lower than any log-prob that a teacher returns."""

Progress = Callable[[int, int, str], None]
"""Called with the number of finished parts, the total number of parts, and a text that describes the progress."""

_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("query", pa.string()),
        ("demonstrations", pa.list_(pa.string())),
        ("mean_logprob", pa.float32()),
        ("tokens", pa.int32()),
    ]
)
_REQUEST_QUERIES = 32
_FLUSH_SECONDS = 10.0


@dataclass(frozen=True, eq=False)
class _Request:
    """One row to score: its index in the result, its key in the store, and the row as the teacher reads it."""

    index: int
    key: str
    view: TokenSequence
    provenance: dict[str, Any]


class TeacherScores:
    """Mean log-probs of right answers under `teacher`, nats per token, stored in `folder` as they arrive.

    Attributes:
        requested: number of scores requested from the teacher; the other ones were found in the store.
        unusable: number of requested scores that the teacher could not compute; they have the value `REFUSED`.

    Raises:
        InputError: the folder cannot be written.
    """

    def __init__(self, teacher: Teacher, folder: Path):
        self.requested = self.unusable = 0
        self._teacher = teacher
        self._store = ParquetStore(folder, _SCHEMA)
        self._store.load()
        self._pending: dict[str, dict[str, Any]] = {}
        self._flushed_at = time.monotonic()
        info = teacher.info
        self._context = json.dumps([info.weights_fingerprint or info.model, info.engine, info.dtype]).encode()

    def compute(
        self, rows: Iterable[tuple[DemonstratedRow, Sequence[str]]], total: int, progress: Progress
    ) -> np.ndarray:
        """Return the score of each row, float32 [total]; only scores that are not stored are requested.

        Args:
            rows: demonstrated rows, each with the places of its demonstrations (`Example.where`).
            total: number of rows.

        Raises:
            RunFailed: the disk is full.
            InputError, TeacherUnavailable: as `Teacher.score`.
        """
        scores = np.empty(total, np.float32)
        waiting: list[list[_Request]] = []
        done, requested_before, started = 0, self.requested, time.monotonic()

        def requests() -> Iterator[_Request]:
            """Yield a request for each score that is not stored, and fill in the stored ones."""
            nonlocal done
            for index, (row, demonstrations) in enumerate(rows):
                view = row.view(self._teacher.settings.name)
                key = self._key(view)
                stored = self._find(key)
                if stored is None:
                    yield _Request(index, key, view, {"query": row.where, "demonstrations": list(demonstrations)})
                else:
                    scores[index], done = stored, done + 1

        def calls() -> Iterator[Any]:
            remaining = requests()
            while call := list(islice(remaining, _REQUEST_QUERIES)):
                waiting.append(call)
                yield self._request(call)

        try:
            with closing(stream_in_background(calls(), self._teacher.settings.in_flight)) as results:
                for records in results:
                    scores[[request.index for request in waiting.pop(0)]] = [row["mean_logprob"] for row in records]
                    self._pending |= {row["key"]: row for row in records}
                    self.requested, done = self.requested + len(records), done + len(records)
                    if time.monotonic() - self._flushed_at > _FLUSH_SECONDS:
                        self._flush()
                    rate = (self.requested - requested_before) / max(time.monotonic() - started, 1e-3)
                    progress(done, total, f"{rate:,.0f} scores/s")
        finally:
            self._flush()
        return scores

    def _find(self, key: str) -> float | None:
        if row := self._pending.get(key):
            return row["mean_logprob"]
        found = self._store.find(key, ["mean_logprob"])
        return None if found is None else found[0]

    def _key(self, row: TokenSequence) -> str:
        digest = hashlib.blake2b(self._context, digest_size=16)
        digest.update(row.input_ids.astype("<i4").tobytes())
        digest.update(np.packbits(row.counted).tobytes())
        return digest.hexdigest()

    async def _request(self, call: list[_Request]) -> list[dict[str, Any]]:
        """Request the scores of one call, and return their records for the store."""
        means = np.full(len(call), REFUSED, np.float32)
        usable = list(range(len(call)))
        while usable:
            try:
                signals = await self._teacher.ascore([call[index].view for index in usable], Logprob())
            except UnusableSignal as error:
                self.unusable += len(error.rows)
                usable = [index for row, index in enumerate(usable) if row not in error.rows]
                continue
            sums = sequence_sum(signals.target_logprobs.double(), signals.offsets) / signals.offsets.diff()
            means[usable] = sums.clamp(min=REFUSED).float().numpy()
            break
        return [
            {
                "key": request.key, **request.provenance, "mean_logprob": float(mean),
                "tokens": request.view.counted_tokens,
            }
            for request, mean in zip(call, means, strict=True)
        ]  # fmt: skip

    def _flush(self) -> None:
        if self._pending:
            self._store.add(list(self._pending.values()))
            self._pending = {}
        self._flushed_at = time.monotonic()
