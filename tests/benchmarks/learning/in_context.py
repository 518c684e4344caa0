"""Part `in_context` of `black_box`: in-context distillation against training on the rows' words, with and without
demonstrations.

The tasks are those of `signs`; the settings are described in `black_box`.
"""

import itertools
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rayk.config import RunConfig
from rayk.run import distill, evaluate_model
from tests.benchmarks.learning import signs
from tests.benchmarks.learning.harness import Comparison, Part, cache_folder, run_config, train_model_once
from tests.benchmarks.learning.words import llama_config, make_tokenizer, write_rows

TEACHER_MODEL = llama_config(signs.WORDS, hidden=64, layers=2, heads=4, intermediate=192) | {
    "initializer_range": 64**-0.5
}
STUDENT_MODEL = llama_config(signs.WORDS, hidden=32, layers=2, heads=4, intermediate=96) | {
    "initializer_range": 32**-0.5
}
TEACHER_TRAINING = {"steps": 600, "batch_size": 32, "learning_rate": 3e-3, "warmup_steps": 30}
WARM_TRAINING = {"steps": 300, "batch_size": 32, "learning_rate": 5e-3, "warmup_steps": 30, "schedule": "constant"}
STUDENT_TRAINING = {"steps": 200, "batch_size": 32, "warmup_steps": 10}
LEARNING_RATES, TUNING_SEED = (1e-3, 3e-3, 1e-2), 1000
READ, SHOTS, WRONG = 8, 12, 0.1
VILLAGES, ROWS, NEW_VILLAGES, NEW_ROWS = 320, 20, 30, 20
TEACHER = "black-box-reading"
_NOTHING = " "
"""White space, which the tokenizer ignores."""
_FIELDS = {"prompt_field": "input", "completion_field": "output"}

Villages = tuple[list[dict[str, Any]], list[dict[str, Any]]]
"""Solved signs as demonstrations, and rows."""

_LABELS = {"hard_label_weight": 1.0, "final_hard_label_weight": 1.0}
_TRAINED: dict[str, dict[str, float]] = {
    "fine_tuned": _LABELS,
    "labels": _LABELS,
    "distilled": {"hard_label_weight": 1.0, "final_hard_label_weight": 0.0},
    "distilled_softly": {"hard_label_weight": 0.0, "final_hard_label_weight": 0.0},
}
_SLIPS = "_slips"
METHODS = ["start", *_TRAINED, *(f"{method}{_SLIPS}" for method in _TRAINED)]
"""`start` is not trained; methods that end with `_SLIPS` learn from rows of which some are wrong."""


def _run(method: str, seed: int, rate: float) -> dict[str, Any]:
    if method == "start":
        return _measure(make_start(), seed)
    name, wrong = method.removesuffix(_SLIPS), WRONG if method.endswith(_SLIPS) else 0.0
    shown, weights = 0 if name == "fine_tuned" else READ, _TRAINED[name]
    with tempfile.TemporaryDirectory() as folder:
        teachers = [{"name": TEACHER, "attach": True}] if weights["final_hard_label_weight"] < 1 else []
        training = {**STUDENT_TRAINING, "learning_rate": rate}
        rows = training_villages(seed, wrong)
        result = distill(_config(Path(folder), make_start(), seed, *rows, shown, weights, training, teachers=teachers))
        return {**_measure(result.model, seed), "seconds": result.summary["training_seconds"]}


def _measure(model: Path, seed: int) -> dict[str, float]:
    """Measure a model on a seed's new villages, after solved signs of each."""
    with tempfile.TemporaryDirectory() as folder:
        shots, rows = new_villages(seed)
        evaluation = {"evaluation": {"path": str(write_rows(Path(folder) / "new.jsonl", rows)), **_FIELDS}}
        config = _config(Path(folder), model, seed, shots, rows, READ, _LABELS, {}, data=evaluation)
        student = evaluate_model(config, str(model))["student"]
        return {name: student[name] for name in ("accuracy", "loss")}


def _config(
    folder: Path, student: Path, seed: int, shots: list[dict[str, Any]], rows: list[dict[str, Any]], shown: int,
    weights: dict[str, float], training: dict[str, Any], **sections: Any,
) -> RunConfig:  # fmt: skip
    pool, train = (
        {"path": str(write_rows(folder / name, given)), **_FIELDS}
        for name, given in (("pool.jsonl", shots), ("train.jsonl", rows))
    )
    demonstrations = {"k": shown, "pool": pool, "separator": _NOTHING, "output_separator": _NOTHING}
    method = {"kind": "in_context", "demonstrations": demonstrations, "text_weight": 0.0, **weights}
    return run_config(folder / "run", {"model": str(student)}, train, seed, method, training, **sections)


def training_villages(seed: int, wrong: float) -> Villages:
    """Return the villages for training of a seed."""
    return _make_villages(random.Random(200 + seed), signs.TRAINING_PAIRS, VILLAGES, ROWS, wrong)


def new_villages(seed: int) -> Villages:
    """Return the villages for evaluation of a seed."""
    return _make_villages(random.Random(300 + seed), signs.NEW_PAIRS, NEW_VILLAGES, NEW_ROWS)


def _make_villages(
    draw: random.Random, pairs: Sequence[tuple[str, str]], count: int, rows: int, wrong: float = 0.0
) -> Villages:
    """Return solved signs and rows of `count` villages, which take the tasks of `pairs` in turn."""
    tasks = itertools.islice(itertools.cycle(signs.tasks(pairs)), count)
    drawn = [
        signs.make_village(str(number), task, draw, shots=SHOTS, rows=rows, wrong=wrong)
        for number, task in enumerate(tasks)
    ]
    shots, rows_of = ([row for of_village in part for row in of_village] for part in zip(*drawn, strict=True))
    return shots, rows_of


def make_teacher() -> Path:
    """Return the folder of the teacher, which has learned to read tasks from demonstrations; train it if necessary."""
    return _make_reader("teacher", TEACHER_MODEL, TEACHER_TRAINING, seed=1)


def make_start() -> Path:
    """Return the student from which all methods and seeds start: a smaller model with a little of such training."""
    return _make_reader("start", STUDENT_MODEL, WARM_TRAINING, seed=2)


def _make_reader(name: str, model: dict[str, Any], training: dict[str, Any], seed: int) -> Path:
    """Return a model trained on the words of conversations, each about the signs of one task."""
    folder = cache_folder("black-box-reading", signs, [model, training, READ, seed]) / name
    draw = random.Random(seed)
    count = 0 if folder.is_dir() else training["steps"] * training["batch_size"]
    tasks = (draw.choice(signs.tasks(signs.TRAINING_PAIRS)) for _ in range(count))
    rows = [{"messages": signs.make_conversation(task, READ + 1, draw)} for task in tasks]
    tokenizer = make_tokenizer(signs.WORDS)
    tokenizer.chat_template = signs.CHAT_TEMPLATE
    return train_model_once(folder, tokenizer, model, rows, seed, train_on="all", **training) / "model"


def measure_teacher(model: Path) -> dict[str, float]:
    """The teacher on the first seed's new villages, as students are measured."""
    return _measure(model, 0)


IN_CONTEXT_PART = Part(
    Comparison(
        methods=METHODS, rates=LEARNING_RATES, tuning_seed=TUNING_SEED,
        columns={
            "accuracy": ("right words, new villages", "{:.1%}"), "loss": ("loss over the vocabulary", "{:.3f}"),
            "seconds": ("seconds", "{:.0f}"),
        },
        pairs=[
            (f"{one}{slips}", other if other == "start" else f"{other}{slips}")
            for slips in ("", _SLIPS)
            for one, other in (
                ("labels", "start"), ("labels", "fine_tuned"), ("distilled", "labels"), ("distilled_softly", "labels"),
                ("distilled_softly", "distilled"),
            )
        ],
        printed=("accuracy",), known={"start": 0.0},
    ),
    TEACHER, make_teacher, measure_teacher, _run,
)  # fmt: skip
