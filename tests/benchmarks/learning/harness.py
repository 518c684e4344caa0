"""Shared code of comparisons: tuning of learning rates, runs that are stored and not repeated, tables of results.

A comparison's own module states its task, budget and tuning in its docstring before anything is run.
"""

import argparse
import hashlib
import inspect
import itertools
import json
import os
import shutil
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from scipy import stats
from transformers import PreTrainedTokenizerBase

from rayk.config import RunConfig, parse_config
from rayk.run import distill
from tests.benchmarks.learning.words import write_rows

Interval = tuple[float, float]
Key = tuple[str, int, float]
"""Method, seed, learning rate."""
Run = Callable[[str, int, float], dict[str, Any]]
"""Measures of a method's student, given method, seed and learning rate."""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSON lines file; a last row that a kill has truncated is left out."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


@dataclass(frozen=True)
class Comparison:
    """Methods to compare, and how.

    Attributes:
        rates: learning rates; each method uses the one with the best `accuracy` on `tuning_seed`, which is used for
            nothing else.
        columns: measures of a run, each with its title and its format.
        pairs: pairs whose differences, first minus second, are printed.
        compared: measures for which these differences are printed.
        printed: measures that are printed when a run ends.
        known: learning rates of methods that an earlier run has tuned.
    """

    methods: Sequence[str]
    rates: Sequence[float]
    tuning_seed: int
    columns: Mapping[str, tuple[str, str]]
    pairs: Sequence[tuple[str, str]]
    compared: Sequence[str] = ("accuracy",)
    printed: Sequence[str] = ("accuracy", "seconds")
    known: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """One comparison of a benchmark that has several, with its teacher.

    Attributes:
        application: the teacher's application name on Ray Serve.
        make_teacher: returns the folder of its model, trained unless the cache has it; or the file of a program.
        measure_teacher: measures the teacher as students are measured.
        run: trains and measures one student.
        serve: serves a teacher that is not a model.
    """

    comparison: Comparison
    application: str
    make_teacher: Callable[[], Path]
    measure_teacher: Callable[[Path], dict[str, float]]
    run: Run
    serve: Callable[[Path], AbstractContextManager[None]] | None = None


@dataclass
class Runs:
    """Finished runs, one line each of a .jsonl file; they are not repeated."""

    output: Path
    results: dict[Key, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.results = {(row["method"], row["seed"], row["learning_rate"]): row for row in read_rows(self.output)}

    def add(self, comparison: Comparison, seeds: Iterable[int], run: Run) -> None:
        """Run what is missing: first the learning rates of every method to tune, then all methods seed by seed."""
        tuned = [method for method in comparison.methods if method not in comparison.known]
        for method, rate in itertools.product(tuned, comparison.rates):
            self._add(comparison, (method, comparison.tuning_seed, rate), run)
        for seed, method in itertools.product(seeds, comparison.methods):
            self._add(comparison, (method, seed, self.rate_of(method, comparison)), run)

    def _add(self, comparison: Comparison, key: Key, run: Run) -> None:
        if key in self.results:
            return
        method, seed, rate = key
        row = {"method": method, "seed": seed, "learning_rate": rate, **run(method, seed, rate)}
        self.results[key] = row
        with self.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"seed {seed} {method} {rate:g}: { {name: round(row[name], 4) for name in comparison.printed} }", flush=True
        )

    def rate_of(self, method: str, comparison: Comparison) -> float:
        """Return the known learning rate, or the one with the best accuracy on the tuning seed."""
        if method in comparison.known:
            return comparison.known[method]
        accuracies = {rate: self.results[method, comparison.tuning_seed, rate]["accuracy"] for rate in comparison.rates}
        return max(comparison.rates, key=lambda rate: accuracies[rate])

    def print(self, comparison: Comparison, seeds: Iterable[int], teacher: Mapping[str, float]) -> None:
        """Print means and paired differences as Markdown, over those of `seeds` that all methods have finished."""
        rates = {method: self.rate_of(method, comparison) for method in comparison.methods}
        seeds = [seed for seed in seeds if all((method, seed, rates[method]) in self.results for method in rates)]
        table = {method: [self.results[method, seed, rate] for seed in seeds] for method, rate in rates.items()}
        print(f"\nMeans ± standard deviations over {len(seeds)} seeds\n")
        columns = comparison.columns
        print(_line(["method", "learning rate", *(title for title, _ in columns.values())]))
        print("|---" * (len(columns) + 2) + "|")
        given = [form.format(teacher[name]) if name in teacher else "–" for name, (_, form) in columns.items()]
        print(_line(["teacher", "–", *given]))
        for method, rows in table.items():
            cells = [_mean([row[name] for row in rows if name in row], form) for name, (_, form) in columns.items()]
            print(_line([method, f"{rates[method]:g}", *cells]))
        if len(seeds) > 1:
            _print_pairs(comparison, table)


def _mean(values: list[float], form: str) -> str:
    if not values:
        return "–"
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{form.format(statistics.mean(values))} ± {form.format(spread).lstrip('+')}"


def _print_pairs(comparison: Comparison, table: Mapping[str, list[dict[str, Any]]]) -> None:
    print("\nPaired differences with their 95 % intervals\n")
    print(_line(["pair", *comparison.compared]))
    print("|---" * (len(comparison.compared) + 1) + "|")
    for one, other in comparison.pairs:
        if one not in table or other not in table:
            continue
        cells = []
        for name in comparison.compared:
            mean, half = paired_difference([row[name] for row in table[one]], [row[name] for row in table[other]])
            cells.append(f"{mean:+.3f} ± {half:.3f}" + (", undecided" if abs(mean) <= half else ""))
        print(_line([f"{one} − {other}", *cells]))


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def paired_difference(ours: Sequence[float], others: Sequence[float]) -> Interval:
    """Return the mean of the paired differences and half of its 95 % confidence interval (Student's t)."""
    differences = [one - other for one, other in zip(ours, others, strict=True)]
    half = stats.t.ppf(0.975, len(differences) - 1) * statistics.stdev(differences) / len(differences) ** 0.5
    return statistics.mean(differences), float(half)


def parse_arguments(about: str | None, choice: str, names: Iterable[str]) -> argparse.Namespace:
    """Parse a comparison's command line: `seeds`, `output`, `rates`, `print`, and `choice`, a selection of `names`."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(f"--{choice}", type=lambda given: given.split(","), default=list(names))
    parser.add_argument("--output", type=Path, required=True, help="a .jsonl file; runs in it are not repeated")
    parser.add_argument("--rates", type=_rates, default={}, help="METHOD=RATE,… for methods that are already tuned")
    parser.add_argument("--print", action="store_true", help="run nothing; print the finished seeds")
    return parser.parse_args()


def _rates(given: str) -> dict[str, float]:
    return {method: float(rate) for method, rate in (pair.split("=") for pair in given.split(","))}


def cache_folder(name: str, task: ModuleType, settings: Sequence[Any]) -> Path:
    """Return the cache folder of a version of `task` and `settings`, for models that are trained once."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    version = hashlib.sha256((inspect.getsource(task) + json.dumps(settings)).encode()).hexdigest()[:12]
    return base / "rayk" / f"{name}-{version}"


def train_model_once(
    folder: Path, tokenizer: PreTrainedTokenizerBase, model: Mapping[str, Any], rows: Sequence[Mapping[str, Any]],
    seed: int, *, train_on: str = "last", **training: Any,
) -> Path:  # fmt: skip
    """Return `folder` with `train.jsonl` and a `model` trained on it from random weights; train unless it exists."""
    if folder.is_dir():
        return folder
    print(f"making {folder}", flush=True)
    work = folder.with_name(f"{folder.name}-{os.getpid()}")
    work.mkdir(parents=True)
    tokenizer.save_pretrained(work / "tokenizer")
    train = write_rows(work / "train.jsonl", rows)
    student = {"config": dict(model), "tokenizer": str(work / "tokenizer")}
    config = run_config(
        work / "run", student, {"path": str(train), "train_on": train_on}, seed, {"kind": "supervised"}, training
    )
    distill(config).model.rename(work / "model")
    shutil.rmtree(work / "run")
    work.rename(folder)
    return folder


def run_config(
    output: Path, student: Mapping[str, Any], train: Mapping[str, Any], seed: int, method: Mapping[str, Any],
    training: Mapping[str, Any], *, data: Mapping[str, Any] | None = None, **sections: Any,
) -> RunConfig:  # fmt: skip
    """Return the settings of a run in this process.

    Args:
        data: keys of the data section other than `train`.
        sections: further sections of the settings.
    """
    return parse_config(
        {
            "output": str(output),
            "seed": seed,
            "student": student,
            "data": {"train": train, **(data or {})},
            "method": method,
            "training": {"workers": 0, "checkpoint_every_steps": 10_000, **training},
            "tracking": {"tensorboard": False},
            **sections,
        }
    )
