"""Train a retriever that finds the demonstrations which help a teacher (LLM-R, Wang et al. 2023, arXiv 2307.07164).

A round:

1. Select candidates for each training query x: some of the nearest demonstrations by BM25, in later rounds by the
   retriever of the previous round. The frozen teacher scores each candidate d by the mean log-prob of the tokens of the
   right answer y after d and x, in the layout of the student's rows. A candidate with another label in the same
   classification is refused. (Rows of other tasks are never candidates: demonstrations come from the row's own task.)
2. Train a reward model s(x, y, d) on all scores so far, and compute the rewards of this round's candidates.
3. Train a bi-encoder on all rewards so far, starting from the pretrained encoder again.

After training, a row's demonstrations are the nearest ones by the last round's bi-encoder, the nearest one last. To
select candidates, the paper compares whole demonstrations by BM25; here inputs are compared, as with `choice: bm25`.

The folder `<output>/retriever/` contains

- `scores/part-*.parquet`: every score, by a hash of the row as the teacher reads it;
- `rounds/N/`: a round's `candidates.parquet`, `reward_model/`, `rewards.parquet`, `encoder/` and `round.json`, each
  written when the previous one is complete; removed at the end;
- `fingerprint`: a hash of the rows that the retriever is trained on;
- the last bi-encoder itself, and `summary.json`, written last.
"""

import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayk.config import RetrieverConfig
from rayk.data.demonstrations import DemonstrationPool
from rayk.data.examples import Example, ExampleTable
from rayk.data.nearest import Embedder, check_encoder
from rayk.errors import InputError
from rayk.retrieval.model_training import (
    ENCODER_SETTING,
    REWARD_SETTING,
    ComputeSettings,
    RetrieverTexts,
    ScoredCandidates,
    compute_rewards,
    fit_encoder,
    fit_reward_model,
)
from rayk.retrieval.teacher_scores import REFUSED, Progress, TeacherScores
from rayk.storage.atomic import disk_errors, write_whole
from rayk.storage.parquet_store import parquet_bytes
from rayk.teachers import Teacher

T = TypeVar("T")
_HELD_OUT_DIVISOR = 10


class RetrieverTraining:
    """Train one retriever in rounds, and write it to a folder.

    Args:
        pool: the demonstrations to choose from.
        rows: training rows, whose inputs are the queries.
        teacher: scores the candidates.
        folder: the retriever's folder.
        compute: seed, precision and threads of model training.
        remote: runs a function in another process, to train a model there; None trains models in this process.
        stage: called with the name of each stage.
        progress: called with (done, total, text) and the keyword `unit`.
    """

    def __init__(
        self, settings: RetrieverConfig, pool: DemonstrationPool, rows: ExampleTable, teacher: Teacher, folder: Path,
        compute: ComputeSettings, remote: Callable[..., Any] | None, stage: Callable[[str], None],
        progress: Callable[..., None],
    ):  # fmt: skip
        self._settings, self._pool, self._folder = settings, pool, folder
        self._compute, self._remote, self._stage, self._progress = compute, remote, stage, progress
        self._teacher = teacher
        self._scores = TeacherScores(teacher, folder / "scores")
        self._queries, self._held_out = _split_held_out(pool.unique_inputs(rows), settings, compute.seed)
        self._query_labels = [pool.label(row) for row in self._queries]
        self._pool_labels = [pool.label(row) for row in pool.rows]
        self._texts = self._make_texts()
        self._held_out_scores: dict[str, np.ndarray] = {}
        self._fingerprint = f"{rows.fingerprint} {pool.rows.fingerprint}"

    def run(self) -> dict[str, Any]:
        """Run all rounds; parts that are stored in the folder already are not computed again.

        Returns:
            The content of `summary.json`.

        Raises:
            InputError: the folder belongs to a retriever of other rows, or a model cannot be loaded.
            RunFailed: a model diverges, there is nothing to learn from, or the disk is full.
            TeacherUnavailable: as `Teacher.score`.
        """
        self._check_fingerprint()
        held_out = f"{len(self._held_out):,} held-out rows"
        self._stage(f"Retriever: measuring {held_out} after random and BM25 demonstrations")
        random = {row.where: self._pool.select_random(row, self._compute.seed) for row in self._held_out}
        self._measure("random", random)
        self._measure("bm25", self._select_nearest(self._held_out, None))
        scored: list[ScoredCandidates] = []
        rewarded: list[ScoredCandidates] = []
        rounds = []
        embedder = None
        for number in range(1, self._settings.rounds + 1):
            folder = self._round_folder(number)
            with disk_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
            started = time.monotonic()
            new = self._score_candidates(number, embedder)
            scored += new
            figures = {"round": number, "candidates": sum(len(query.candidates) for query in new)}
            figures |= {"refused": int(sum((query.scores <= REFUSED).sum() for query in new))}
            rewarded += self._compute_rewards(number, new, scored, folder, figures)
            encoder = self._train_encoder(number, rewarded, folder, figures)
            embedder = Embedder(str(encoder))
            self._stage(f"Retriever, round {number}: measuring {held_out}")
            self._measure("learned", self._select_nearest(self._held_out, embedder))
            rounds.append({**figures, "mean_logprob": _mean(self._held_out_scores["learned"])})
            rounds[-1]["seconds"] = time.monotonic() - started
        assert embedder is not None
        with disk_errors(self._folder):
            embedder.save(self._folder)
        summary = self._summary(rounds)
        write_whole(self._folder / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False).encode())
        shutil.rmtree(self._folder / "rounds", ignore_errors=True)
        return summary

    def _check_fingerprint(self) -> None:
        file = self._folder / "fingerprint"
        if file.exists() and file.read_text(encoding="utf-8") != self._fingerprint:
            raise InputError(
                f"The retriever in '{self._folder}' was started with other training rows or another pool; give it "
                "those again, or set another --output."
            )
        write_whole(file, self._fingerprint.encode())

    def _score_candidates(self, number: int, embedder: Embedder | None) -> list[ScoredCandidates]:
        """Return each query with its candidates of round `number` and their scores by the teacher."""
        candidates = self._select_candidates(number, embedder)
        pairs = [
            (query, int(index))
            for query, indices in enumerate(candidates)
            for index in indices
            if not self._is_refused(query, int(index))
        ]
        self._stage(f"Retriever, round {number}: the teacher scores {len(pairs):,} candidates")
        rows = (
            (self._pool.place_demonstrations(self._queries[query], [index]), [self._pool.rows[index].where])
            for query, index in pairs
        )
        scores = dict(zip(pairs, self._scores.compute(rows, len(pairs), self._progress_of("score")), strict=True))
        return [
            ScoredCandidates(
                query, indices, np.array([scores.get((query, int(index)), REFUSED) for index in indices], np.float32)
            )
            for query, indices in enumerate(candidates)
            if len(indices)
        ]

    def _select_candidates(self, number: int, embedder: Embedder | None) -> list[np.ndarray]:
        """Return each query's candidates, int64 indices in the pool; selected once and then stored."""
        stored = self._round_folder(number) / "candidates.parquet"
        if not stored.exists():
            by = "BM25" if embedder is None else "the retriever of the previous round"
            self._stage(f"Retriever, round {number}: candidates of {len(self._queries):,} rows by {by}")
            found = self._pool.nearest(self._queries, self._settings.nearest, embedder)
            nearest = {row.where: indices for row, indices in found}
            random = np.random.default_rng([self._compute.seed, 3, number])
            candidates = [
                random.permutation(np.array(nearest[row.where], np.int64))[: self._settings.candidates].tolist()
                for row in self._queries
            ]
            write_whole(stored, parquet_bytes(pa.table({"candidates": pa.array(candidates, pa.list_(pa.int64()))})))
        return [np.array(indices, np.int64) for indices in pq.read_table(stored).column("candidates").to_pylist()]

    def _round_folder(self, number: int) -> Path:
        return self._folder / "rounds" / str(number)

    def _is_refused(self, query: int, index: int) -> bool:
        """Return whether a candidate has another label than the query in the same classification problem."""
        label, other = self._query_labels[query], self._pool_labels[index]
        if label is None or other is None or not self._settings.same_label:
            return False
        return label != other and label[:2] == other[:2]

    def _compute_rewards(
        self, number: int, new: list[ScoredCandidates], scored: list[ScoredCandidates], folder: Path,
        figures: dict[str, Any],
    ) -> list[ScoredCandidates]:  # fmt: skip
        """Return the round's candidates with the scores that the encoder is trained on: rewards of the reward model, or
        the teacher's scores without one."""
        settings = self._settings
        if settings.reward_model is None:
            return new
        stored = folder / "rewards.parquet"
        if not stored.exists():
            self._stage(f"Retriever, round {number}: training the reward model")
            loss = self._run("step", fit_reward_model, settings, self._texts, scored, folder / "reward_model")
            self._stage(f"Retriever, round {number}: rewarding {figures['candidates']:,} candidates")
            rewards = self._run(
                "candidate", compute_rewards, settings.reward_model, self._texts, new, folder / "reward_model"
            )
            table = pa.table({"rewards": [values.tolist() for values in rewards], "loss": [loss] * len(rewards)})
            write_whole(stored, parquet_bytes(table))
        table = pq.read_table(stored)
        figures["reward_loss"] = table.column("loss")[0].as_py()
        rewards = [np.array(values, np.float32) for values in table.column("rewards").to_pylist()]
        return [replace(query, scores=values) for query, values in zip(new, rewards, strict=True)]

    def _train_encoder(
        self, number: int, rewarded: list[ScoredCandidates], folder: Path, figures: dict[str, Any]
    ) -> Path:
        """Train the round's bi-encoder unless it is stored, and return its folder."""
        done = folder / "round.json"
        if not done.exists():
            self._stage(f"Retriever, round {number}: training the encoder")
            loss = self._run("step", fit_encoder, self._settings, self._texts, rewarded, folder / "encoder")
            write_whole(done, json.dumps({"encoder_loss": loss}).encode())
        figures |= json.loads(done.read_text(encoding="utf-8"))
        return folder / "encoder"

    def _select_nearest(self, rows: list[Example], embedder: Embedder | None) -> dict[str, list[int]]:
        """Return the k nearest demonstrations of each row, by `Example.where`, the nearest one last."""
        nearest = self._pool.nearest(rows, self._pool.settings.k, embedder)
        return {row.where: indices[::-1] for row, indices in nearest}

    def _measure(self, name: str, selected: Mapping[str, list[int]]) -> None:
        """Compute the teacher's scores of the held-out rows' right answers after the selected demonstrations, and keep
        them under `name`."""
        rows = (
            (
                self._pool.place_demonstrations(row, selected[row.where]),
                [self._pool.rows[index].where for index in selected[row.where]],
            )
            for row in self._held_out
        )
        self._held_out_scores[name] = self._scores.compute(rows, len(self._held_out), self._progress_of("row"))

    def _progress_of(self, unit: str) -> Progress:
        return partial(self._progress, unit=unit)

    def _run(self, unit: str, work: Callable[..., T], *arguments: Any) -> T:
        """Run a function of `rayk.retrieval.model_training` in this process or remotely."""
        if self._remote is None:
            return work(*arguments, self._compute, self._progress_of(unit))
        return self._remote(work, *arguments, self._compute)

    def _make_texts(self) -> RetrieverTexts:
        texts = [self._pool.texts(row) for row in self._queries]
        separator, count = self._pool.settings.output_separator, len(texts)
        rows = _number_names(map(self._pool.input_key, [*self._queries, *self._pool.rows]))
        labels = _number_names([*self._query_labels, *self._pool_labels])
        return RetrieverTexts(
            [query for query, _ in texts], [separator + answer for _, answer in texts],
            self._pool.demonstration_texts, rows[:count], rows[count:], labels[:count], labels[count:],
        )  # fmt: skip

    def _summary(self, rounds: list[dict[str, Any]]) -> dict[str, Any]:
        settings = self._settings
        gains = self._held_out_scores["learned"].astype(np.float64) - self._held_out_scores["bm25"]
        error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else None
        return {
            "teacher": self._teacher.info.model,
            "encoder": settings.encoder,
            "reward_model": settings.reward_model and settings.reward_model.model,
            "queries": len(self._queries),
            "pool": len(self._pool.rows),
            "unusable": self._scores.unusable,
            "rounds": rounds,
            "held_out": {
                "rows": len(self._held_out),
                "mean_logprob": {name: _mean(scores) for name, scores in self._held_out_scores.items()},
                "learned_over_bm25": {"mean": _mean(gains), "standard_error": error},
            },
        }


def check_retriever(settings: RetrieverConfig, pool: DemonstrationPool, rows: ExampleTable) -> None:
    """Check before the run that the models can be loaded and that training `rows` have candidates to learn from.

    Raises:
        InputError: a model cannot be loaded, or there are too few candidates or rows; the message names the setting.
    """
    check_encoder(settings.encoder, ENCODER_SETTING, settings.max_tokens)
    if settings.reward_model is not None:
        check_encoder(settings.reward_model.model, REWARD_SETTING, settings.reward_model.max_tokens)
    most = max(pool.num_candidates(row) for row in rows)
    if most <= settings.positives:
        raise InputError(
            f"No training row has more than {most} candidates for demonstrations, of which "
            f"method.demonstrations.retriever.positives takes {settings.positives} as good ones; give more rows of "
            "each task, or lower it."
        )
    if len(pool.unique_inputs(rows)) < 2:
        raise InputError("A retriever needs at least two different training inputs, one of them held out; give more.")


def _split_held_out(rows: list[Example], settings: RetrieverConfig, seed: int) -> tuple[list[Example], list[Example]]:
    """Split the rows into the queries, and the held-out rows on which the retriever is measured."""
    order = np.random.default_rng([seed, 4]).permutation(len(rows))
    held_out = min(settings.held_out, max(1, len(rows) // _HELD_OUT_DIVISOR))
    shuffled = [rows[index] for index in order]
    return shuffled[held_out : held_out + settings.queries], shuffled[:held_out]


def _number_names(names: Iterable[Any]) -> np.ndarray:
    """Return the same number for equal names, and -1 for None; int64 [names]."""
    numbers: dict[Any, int] = {}
    return np.array([-1 if name is None else numbers.setdefault(name, len(numbers)) for name in names], np.int64)


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values, dtype=np.float64))
