"""The black-box comparison's part on learning from demonstrations, with the tasks of `signs`: in-context distillation
against training on the rows' own words. Settings are stated in `black_box`."""

import random
import tempfile
from pathlib import Path
from typing import Any

from rayk.run import distill, evaluate_model
from tests.benchmarks import signs
from tests.benchmarks.comparing import Comparison, Part, cache_folder, made, run_config
from tests.benchmarks.words import llama, tokenizer_of, write_rows

MODEL = llama(signs.WORDS, hidden=64, layers=2, heads=4, between=192) | {"initializer_range": 64**-0.5}
_READING = {"batch_size": 64, "learning_rate": 1e-3, "warmup_steps": 30, "schedule": "constant"}
TEACHER_TRAINING = {"steps": 600, **_READING}
WARM_TRAINING = {"steps": 360, **_READING}
STUDENT_TRAINING = {"steps": 200, "batch_size": 32, "warmup_steps": 10}
LEARNING_RATES, TUNING_SEED = (1e-4, 3e-4, 1e-3), 1000
DEMONSTRATIONS, WRONG = 12, 0.1
PAIRS, ROWS_A_TASK, NEW_PAIRS, NEW_ROWS_A_TASK = 20, 20, 10, 20
TEACHER = "black-box-reading"
_NOTHING = " "
"""White space, which the tokenizer leaves out."""

IN_CONTEXT: dict[str, dict[str, float]] = {
    "labels": {"hard_label_weight": 1.0, "final_hard_label_weight": 1.0},
    "distilled": {"hard_label_weight": 1.0, "final_hard_label_weight": 0.0},
    "distilled_softly": {"hard_label_weight": 0.0, "final_hard_label_weight": 0.0},
}


def _run(method: str, seed: int, rate: float) -> dict[str, Any]:
    weights, start = IN_CONTEXT[method], _started(seed)
    with tempfile.TemporaryDirectory() as folder:
        config = _config(
            Path(folder), str(start), seed, weights, {**STUDENT_TRAINING, "learning_rate": rate},
            teachers=[{"name": TEACHER, "attach": True}] if weights["final_hard_label_weight"] < 1 else [],
        )  # fmt: skip
        summary = distill(config).summary
    before = _measured(start, seed)["accuracy"]
    return {**_figures(summary), "before": before, "seconds": summary["training_seconds"]}


def _figures(summary: dict[str, Any]) -> dict[str, float]:
    return {name: summary["student"][name] for name in ("accuracy", "loss")}


def _config(
    folder: Path, student: str, seed: int, weights: dict[str, float], training: dict[str, Any], **sections: Any
):
    """A run on a seed's tasks, measured on new ones, of which the pool has some solved signs."""
    rows, shots, measured = _drawn(seed)
    train, pool, evaluation = (
        {"path": str(write_rows(folder / name, given)), "prompt_field": "input", "completion_field": "output"}
        for name, given in (("train.jsonl", rows), ("pool.jsonl", [*rows, *shots]), ("new.jsonl", measured))
    )
    shown = {"k": DEMONSTRATIONS, "pool": pool, "separator": _NOTHING, "output_separator": _NOTHING}
    method = {"kind": "in_context", "demonstrations": shown, "text_weight": 0.0, **weights}
    return run_config(
        folder / "run", {"model": student}, train, seed, method, training, data={"evaluation": evaluation}, **sections
    )


def _drawn(seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """A seed's rows of many tasks, and of new tasks some that are shown and others to be measured on."""
    draw = random.Random(200 + seed)
    tasks, new = signs.tasks(draw.sample(signs.LEARNED, PAIRS)), signs.tasks(draw.sample(signs.NEW, NEW_PAIRS))
    rows = [row for task in tasks for row in signs.task_rows(task, ROWS_A_TASK, draw, WRONG)]
    of_new = [signs.task_rows(task, DEMONSTRATIONS + NEW_ROWS_A_TASK, draw) for task in new]
    shots = [row for of_task in of_new for row in of_task[:DEMONSTRATIONS]]
    return rows, shots, [row for of_task in of_new for row in of_task[DEMONSTRATIONS:]]


def teacher() -> Path:
    """The folder of the model that has learned to read tasks from what precedes, made now unless the cache has it."""
    return _reader("teacher", TEACHER_TRAINING, seed=1)


def _started(seed: int) -> Path:
    """The student as all methods of a seed find it: one that has read a little of such text."""
    return _reader(f"start-{seed}", WARM_TRAINING, seed=10_000 + seed)


def _reader(name: str, training: dict[str, Any], seed: int) -> Path:
    """A model that has read conversations in which signs are called by a task each, and was taught the words."""
    settings = [MODEL, TEACHER_TRAINING, WARM_TRAINING, DEMONSTRATIONS]
    folder = cache_folder("black-box-reading", signs, settings) / name
    draw = random.Random(seed)
    count = 0 if folder.is_dir() else training["steps"] * training["batch_size"]
    tasks = (draw.choice(signs.tasks(signs.LEARNED)) for _ in range(count))
    rows = [{"messages": signs.conversation(task, DEMONSTRATIONS + 1, draw)} for task in tasks]
    tokenizer = tokenizer_of(signs.WORDS)
    tokenizer.chat_template = signs.CHAT_TEMPLATE
    return made(folder, tokenizer, MODEL, rows, seed, train_on="all", **training) / "model"


def teacher_measured(model: Path) -> dict[str, float]:
    """The teacher on the first seed's new tasks, as students are measured."""
    return _measured(model, 0)


def _measured(model: Path, seed: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        config = _config(Path(folder), str(model), seed, IN_CONTEXT["labels"], {})
        return _figures(evaluate_model(config, str(model)))


IN_CONTEXT_PART = Part(
    Comparison(
        methods=list(IN_CONTEXT), rates=LEARNING_RATES, tuning_seed=TUNING_SEED,
        columns={
            "accuracy": ("right words, new tasks", "{:.1%}"), "before": ("before", "{:.1%}"),
            "loss": ("loss over the vocabulary", "{:.3f}"),
            "seconds": ("seconds", "{:.0f}"),
        },
        pairs=[("distilled", "labels"), ("distilled_softly", "labels"), ("distilled_softly", "distilled")],
    ),
    TEACHER, teacher, teacher_measured, _run,
)  # fmt: skip
