"""The black-box comparison's part on learning from demonstrations, with the tasks of `signs`: in-context distillation
against training on the rows' own words, with and without demonstrations. Settings are stated in `black_box`."""

import itertools
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rayk.config import RunConfig
from rayk.run import distill, evaluate_model
from tests.benchmarks.learning import signs
from tests.benchmarks.learning.harness import Comparison, Part, cache_folder, made, run_config
from tests.benchmarks.learning.words import llama, tokenizer_of, write_rows

TEACHER_MODEL = llama(signs.WORDS, hidden=64, layers=2, heads=4, between=192) | {"initializer_range": 64**-0.5}
STUDENT_MODEL = llama(signs.WORDS, hidden=32, layers=2, heads=4, between=96) | {"initializer_range": 32**-0.5}
TEACHER_TRAINING = {"steps": 600, "batch_size": 32, "learning_rate": 3e-3, "warmup_steps": 30}
WARM_TRAINING = {"steps": 300, "batch_size": 32, "learning_rate": 5e-3, "warmup_steps": 30, "schedule": "constant"}
STUDENT_TRAINING = {"steps": 200, "batch_size": 32, "warmup_steps": 10}
LEARNING_RATES, TUNING_SEED = (1e-3, 3e-3, 1e-2), 1000
READ, SHOTS, WRONG = 8, 12, 0.1
VILLAGES, ROWS, NEW_VILLAGES, NEW_ROWS = 320, 20, 30, 20
TEACHER = "black-box-reading"
_NOTHING = " "
"""White space, which the tokenizer leaves out."""
_FIELDS = {"prompt_field": "input", "completion_field": "output"}

Villages = tuple[list[dict[str, Any]], list[dict[str, Any]]]
"""Solved signs that are shown, and rows."""

_LABELS = {"hard_label_weight": 1.0, "final_hard_label_weight": 1.0}
_TRAINED: dict[str, dict[str, float]] = {
    "fine_tuned": _LABELS,
    "labels": _LABELS,
    "distilled": {"hard_label_weight": 1.0, "final_hard_label_weight": 0.0},
    "distilled_softly": {"hard_label_weight": 0.0, "final_hard_label_weight": 0.0},
}
_SLIPS = "_slips"
METHODS = ["start", *_TRAINED, *(f"{method}{_SLIPS}" for method in _TRAINED)]
"""`start` is not trained; those that end with `_SLIPS` learn from rows of which some are wrong."""


def _run(method: str, seed: int, rate: float) -> dict[str, Any]:
    if method == "start":
        return _measured(start(), seed)
    name, wrong = method.removesuffix(_SLIPS), WRONG if method.endswith(_SLIPS) else 0.0
    shown, weights = 0 if name == "fine_tuned" else READ, _TRAINED[name]
    with tempfile.TemporaryDirectory() as folder:
        teachers = [{"name": TEACHER, "attach": True}] if weights["final_hard_label_weight"] < 1 else []
        training = {**STUDENT_TRAINING, "learning_rate": rate}
        rows = learned(seed, wrong)
        result = distill(_config(Path(folder), start(), seed, *rows, shown, weights, training, teachers=teachers))
        return {**_measured(result.model, seed), "seconds": result.summary["training_seconds"]}


def _measured(model: Path, seed: int) -> dict[str, float]:
    """A model on a seed's new villages, of each of which it is shown solved signs."""
    with tempfile.TemporaryDirectory() as folder:
        shots, rows = new(seed)
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


def learned(seed: int, wrong: float) -> Villages:
    """The villages that a seed's student learns from."""
    return _villages(random.Random(200 + seed), signs.LEARNED, VILLAGES, ROWS, wrong)


def new(seed: int) -> Villages:
    """Those it is measured on."""
    return _villages(random.Random(300 + seed), signs.NEW, NEW_VILLAGES, NEW_ROWS)


def _villages(
    draw: random.Random, pairs: Sequence[tuple[str, str]], count: int, rows: int, wrong: float = 0.0
) -> Villages:
    """Solved signs and rows of villages, all tasks of the pairs in turn."""
    tasks = itertools.islice(itertools.cycle(signs.tasks(pairs)), count)
    drawn = [
        signs.village(str(number), task, draw, shots=SHOTS, rows=rows, wrong=wrong) for number, task in enumerate(tasks)
    ]
    shots, rows_of = ([row for of_village in part for row in of_village] for part in zip(*drawn, strict=True))
    return shots, rows_of


def teacher() -> Path:
    """The folder of the model that has learned to read tasks from what precedes, made now unless the cache has it."""
    return _reader("teacher", TEACHER_MODEL, TEACHER_TRAINING, seed=1)


def start() -> Path:
    """The student as all methods and seeds find it: a smaller model that has read a little of such text."""
    return _reader("start", STUDENT_MODEL, WARM_TRAINING, seed=2)


def _reader(name: str, model: dict[str, Any], training: dict[str, Any], seed: int) -> Path:
    """A model that has read conversations in which signs are called by a task each, and was taught the words."""
    folder = cache_folder("black-box-reading", signs, [model, training, READ, seed]) / name
    draw = random.Random(seed)
    count = 0 if folder.is_dir() else training["steps"] * training["batch_size"]
    tasks = (draw.choice(signs.tasks(signs.LEARNED)) for _ in range(count))
    rows = [{"messages": signs.conversation(task, READ + 1, draw)} for task in tasks]
    tokenizer = tokenizer_of(signs.WORDS)
    tokenizer.chat_template = signs.CHAT_TEMPLATE
    return made(folder, tokenizer, model, rows, seed, train_on="all", **training) / "model"


def teacher_measured(model: Path) -> dict[str, float]:
    """The teacher on the first seed's new villages, as students are measured."""
    return _measured(model, 0)


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
        told=("accuracy",), known={"start": 0.0},
    ),
    TEACHER, teacher, teacher_measured, _run,
)  # fmt: skip
