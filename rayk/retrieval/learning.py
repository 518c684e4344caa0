"""Learning to find the demonstrations that help a teacher (LLM-R, Wang et al. 2023, arXiv 2307.07164).

A round:

1. Candidates of each training query x: the nearest demonstrations by BM25, in later rounds by the retriever of the
   round before, and some of them drawn. Each candidate d is scored by the frozen teacher: the mean log-prob of the
   tokens of the right answer y after d and x, laid out as the student's rows are. With another label in the same
   classification d is refused. (Another task's cannot come up: a row is shown its own task's rows only.)
2. A reward model s(x, y, d) learns from all scores so far, and rewards this round's candidates.
3. A bi-encoder learns from all rewards so far, anew from where it began.

What is nearest by the last round's bi-encoder stands before a row, the nearest last. Where candidates come from, the
paper compares whole demonstrations by BM25; here inputs are compared, as `choice: bm25` does.

The folder `<output>/retriever/` holds

- `scores/part-*.parquet`: every score, by what was asked;
- `rounds/N/`: a round's `candidates.parquet`, `reward_model/`, `rewards.parquet`, `encoder/` and `round.json`, each
  written when the one before is whole; removed at the end;
- `fingerprint`: of the rows it is made of;
- the last bi-encoder itself, and `summary.json`, written last.
"""

import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayk.config import RetrieverConfig
from rayk.data.demonstrations import DemonstratedRow, DemonstrationPool
from rayk.data.examples import Example, ExampleTable
from rayk.data.nearest import Embedder, check_encoder
from rayk.errors import InputError
from rayk.retrieval.fitting import (
    ENCODER_SETTING,
    REWARD_SETTING,
    Graded,
    Texts,
    Workshop,
    fit_encoder,
    fit_reward_model,
    rewarded,
)
from rayk.retrieval.scores import REFUSED, Progress, Scores
from rayk.storage.atomic import disk_errors, write_whole
from rayk.storage.parquet_store import parquet_bytes
from rayk.teachers import Teacher

T = TypeVar("T")
_HELD_OUT_SHARE = 10


class Learning:
    """One retriever, from scores to a folder.

    Args:
        demonstrations: whose pool is searched.
        rows: training rows, whose inputs are the queries.
        teacher: who scores.
        folder: the retriever's.
        remote: runs what trains, somewhere else; None: in this process.
        stage, progress: are told how it goes.
    """

    def __init__(
        self, settings: RetrieverConfig, demonstrations: DemonstrationPool, rows: ExampleTable, teacher: Teacher, folder: Path,
        workshop: Workshop, remote: Callable[..., Any] | None, stage: Callable[[str], None],
        progress: Callable[..., None],
    ):  # fmt: skip
        self._settings, self._demonstrations, self._folder = settings, demonstrations, folder
        self._workshop, self._remote, self._stage, self._progress = workshop, remote, stage, progress
        self._teacher, self._pool = teacher, demonstrations.pool
        self._scores = Scores(teacher, folder / "scores")
        self._queries, self._held_out = _divided(demonstrations.unique_inputs(rows), settings, workshop.seed)
        self._labels, self._others = (
            [demonstrations.label(row) for row in each] for each in (self._queries, self._pool)
        )
        self._texts = self._read()
        self._measured: dict[str, np.ndarray] = {}
        self._fingerprint = f"{rows.fingerprint} {self._pool.fingerprint}"

    def to_the_end(self) -> dict[str, Any]:
        """Go through the rounds that are not over yet.

        Returns:
            The summary, as `summary.json` holds it.

        Raises:
            InputError: the folder holds a retriever of other rows, or a model cannot be loaded.
            RunFailed: a model diverges, there is nothing to learn from, or the disk is full.
            TeacherUnavailable: as `Teacher.score`.
        """
        self._claim()
        self._stage(f"Retriever: measuring {len(self._held_out):,} held-out rows after random and BM25 demonstrations")
        self._measure("random", {
            row.where: self._demonstrations.select_random(row, self._workshop.seed) for row in self._held_out
        })  # fmt: skip
        self._measure("bm25", self._nearest_first(self._held_out, None))
        graded: list[Graded] = []
        compared: list[Graded] = []
        rounds = []
        embedder = None
        for number in range(1, self._settings.rounds + 1):
            folder = self._of_round(number)
            with disk_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
            began = time.monotonic()
            scored = self._scored(number, embedder)
            graded += scored
            figures = {"round": number, "candidates": sum(len(each.candidates) for each in scored)}
            figures |= {"refused": int(sum((each.scores <= REFUSED).sum() for each in scored))}
            compared += self._rewarded(number, scored, graded, folder, figures)
            encoder = self._encoder(number, compared, folder, figures)
            embedder = Embedder(str(encoder))
            self._stage(f"Retriever, round {number}: measuring on {len(self._held_out):,} held-out rows")
            self._measure("learned", self._nearest_first(self._held_out, embedder))
            rounds.append({**figures, "mean_logprob": _mean(self._measured["learned"])})
            rounds[-1]["seconds"] = time.monotonic() - began
        assert embedder is not None
        with disk_errors(self._folder):
            embedder.save(self._folder)
        summary = self._summary(rounds)
        write_whole(self._folder / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False).encode())
        shutil.rmtree(self._folder / "rounds", ignore_errors=True)
        return summary

    def _claim(self) -> None:
        rows, file = self._fingerprint, self._folder / "fingerprint"
        if file.exists() and file.read_text(encoding="utf-8") != rows:
            raise InputError(
                f"The retriever in '{self._folder}' was begun with other training rows or another pool; give it those "
                "back, or another --output."
            )
        write_whole(file, rows.encode())

    def _scored(self, number: int, embedder: Embedder | None) -> list[Graded]:
        """Each query with its candidates of round `number` and the teacher's scores of them."""
        drawn = self._candidates(number, embedder)
        asked = [(query, int(place)) for query, places in enumerate(drawn) for place in places
                 if not self._refused(query, int(place))]  # fmt: skip
        self._stage(f"Retriever, round {number}: the teacher scores {len(asked):,} candidates")
        shown = ((self._shown(self._queries[query], [place]), [self._pool[place].where]) for query, place in asked)
        scores = dict(zip(asked, self._scores.of(shown, len(asked), self._told("score")), strict=True))
        return [
            Graded(query, places, np.array([scores.get((query, int(each)), REFUSED) for each in places], np.float32))
            for query, places in enumerate(drawn)
            if len(places)
        ]

    def _candidates(self, number: int, embedder: Embedder | None) -> list[np.ndarray]:
        """Each query's candidates, places in the pool; as they were drawn once, whoever draws now."""
        kept = self._of_round(number) / "candidates.parquet"
        if not kept.exists():
            by = "BM25" if embedder is None else "the retriever of the round before"
            self._stage(f"Retriever, round {number}: candidates of {len(self._queries):,} rows by {by}")
            found = self._demonstrations.nearest(self._queries, self._settings.nearest, embedder)
            nearest = {row.where: places for row, places in found}
            random = np.random.default_rng([self._workshop.seed, 3, number])
            drawn = [
                random.permutation(np.array(nearest[row.where], np.int64))[: self._settings.candidates].tolist()
                for row in self._queries
            ]
            write_whole(kept, parquet_bytes(pa.table({"candidates": pa.array(drawn, pa.list_(pa.int64()))})))
        return [np.array(each, np.int64) for each in pq.read_table(kept).column("candidates").to_pylist()]

    def _of_round(self, number: int) -> Path:
        return self._folder / "rounds" / str(number)

    def _refused(self, query: int, place: int) -> bool:
        """Whether a candidate has another label in the query's own classification."""
        own, other = self._labels[query], self._others[place]
        if own is None or other is None or not self._settings.same_label:
            return False
        return own != other and own[:2] == other[:2]

    def _rewarded(
        self, number: int, scored: list[Graded], graded: list[Graded], folder: Path, figures: dict[str, Any]
    ) -> list[Graded]:
        """The round's candidates with what the encoder learns from."""
        settings = self._settings
        if settings.reward_model is None:
            return scored
        kept = folder / "rewards.parquet"
        if not kept.exists():
            self._stage(f"Retriever, round {number}: training the reward model")
            loss = self._trained("step", fit_reward_model, settings, self._texts, graded, folder / "reward_model")
            self._stage(f"Retriever, round {number}: rewarding {figures['candidates']:,} candidates")
            rewards = self._trained(
                "candidate", rewarded, settings.reward_model, self._texts, scored, folder / "reward_model"
            )
            table = pa.table({"rewards": [each.tolist() for each in rewards], "loss": [loss] * len(rewards)})
            write_whole(kept, parquet_bytes(table))
        table = pq.read_table(kept)
        figures["reward_loss"] = table.column("loss")[0].as_py()
        rewards = [np.array(each, np.float32) for each in table.column("rewards").to_pylist()]
        return [replace(each, scores=given) for each, given in zip(scored, rewards, strict=True)]

    def _encoder(self, number: int, compared: list[Graded], folder: Path, figures: dict[str, Any]) -> Path:
        """The round's bi-encoder."""
        done = folder / "round.json"
        if not done.exists():
            self._stage(f"Retriever, round {number}: training the encoder")
            loss = self._trained("step", fit_encoder, self._settings, self._texts, compared, folder / "encoder")
            write_whole(done, json.dumps({"encoder_loss": loss}).encode())
        figures |= json.loads(done.read_text(encoding="utf-8"))
        return folder / "encoder"

    def _nearest_first(self, rows: list[Example], embedder: Embedder | None) -> dict[str, list[int]]:
        """What would stand before each row, by where it stood."""
        nearest = self._demonstrations.nearest(rows, self._demonstrations.settings.k, embedder)
        return {row.where: places[::-1] for row, places in nearest}

    def _measure(self, what: str, chosen: Mapping[str, list[int]]) -> None:
        """How likely the held-out rows' right answers are after these demonstrations."""
        shown = (
            (self._shown(row, chosen[row.where]), [self._pool[place].where for place in chosen[row.where]])
            for row in self._held_out
        )
        self._measured[what] = self._scores.of(shown, len(self._held_out), self._told("row"))

    def _shown(self, row: Example, places: Sequence[int]) -> DemonstratedRow:
        return self._demonstrations.demonstrate_with(row, places)

    def _told(self, unit: str) -> Progress:
        return partial(self._progress, unit=unit)

    def _trained(self, unit: str, work: Callable[..., T], *arguments: Any) -> T:
        if self._remote is None:
            return work(*arguments, self._workshop, self._told(unit))
        return self._remote(work, *arguments, self._workshop)

    def _read(self) -> Texts:
        """What the models read."""
        texts = [self._demonstrations.texts(row) for row in self._queries]
        separator, count = self._demonstrations.settings.output_separator, len(texts)
        rows = _numbers(map(self._demonstrations.input_key, [*self._queries, *self._pool]))
        labels = _numbers([*self._labels, *self._others])
        return Texts(
            [asked for asked, _ in texts], [separator + answer for _, answer in texts], self._demonstrations.demonstration_texts,
            rows[:count], rows[count:], labels[:count], labels[count:],
        )  # fmt: skip

    def _summary(self, rounds: list[dict[str, Any]]) -> dict[str, Any]:
        settings = self._settings
        gains = self._measured["learned"].astype(np.float64) - self._measured["bm25"]
        error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else None
        return {
            "teacher": self._teacher.info.model,
            "encoder": settings.encoder,
            "reward_model": settings.reward_model and settings.reward_model.model,
            "queries": len(self._queries),
            "pool": len(self._pool),
            "unusable": self._scores.unusable,
            "rounds": rounds,
            "held_out": {
                "rows": len(self._held_out),
                "mean_logprob": {what: _mean(of_rows) for what, of_rows in self._measured.items()},
                "learned_over_bm25": {"mean": _mean(gains), "standard_error": error},
            },
        }


def check_retriever(settings: RetrieverConfig, demonstrations: DemonstrationPool, rows: ExampleTable) -> None:
    """See before anything costs time that the models can be loaded and training `rows` have something to learn from.

    Raises:
        InputError: the sentence names the setting.
    """
    check_encoder(settings.encoder, ENCODER_SETTING, settings.max_tokens)
    if settings.reward_model is not None:
        check_encoder(settings.reward_model.model, REWARD_SETTING, settings.reward_model.max_tokens)
    most = max(demonstrations.num_candidates(row) for row in rows)
    if most <= settings.positives:
        raise InputError(
            f"No training row has more than {most} candidates for demonstrations, of which "
            f"method.demonstrations.retriever.positives takes {settings.positives} as good ones; give more rows of "
            "each task, or lower it."
        )
    if len(demonstrations.unique_inputs(rows)) < 2:
        raise InputError("A retriever needs at least two different training inputs, one to be measured on; give more.")


def _divided(rows: list[Example], settings: RetrieverConfig, seed: int) -> tuple[list[Example], list[Example]]:
    """The queries, and those the retriever is measured on."""
    order = np.random.default_rng([seed, 4]).permutation(len(rows))
    held_out = min(settings.held_out, max(1, len(rows) // _HELD_OUT_SHARE))
    chosen = [rows[place] for place in order]
    return chosen[held_out : held_out + settings.queries], chosen[:held_out]


def _numbers(names: Iterable[Any]) -> np.ndarray:
    """A number for each different name, -1 for None; int64."""
    numbers: dict[Any, int] = {}
    return np.array([-1 if name is None else numbers.setdefault(name, len(numbers)) for name in names], np.int64)


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values, dtype=np.float64))
