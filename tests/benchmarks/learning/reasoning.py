"""Parts `cot` and `responses` of `black_box`: rationales against answers alone, a teacher's workings against people's.

The task is `purse`; the settings are described in `black_box`.
"""

import random
import statistics
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from rayk.run import Result, distill, evaluate_model
from tests.benchmarks.learning import purse
from tests.benchmarks.learning.harness import Comparison, Part, cache_folder, run_config, train_model_once
from tests.benchmarks.learning.words import llama_config, make_tokenizer, write_rows

TEACHER_MODEL = llama_config(purse.WORDS, hidden=64, layers=2, heads=4, intermediate=192)
STUDENT_MODEL = llama_config(purse.WORDS, hidden=32, layers=2, heads=4, intermediate=96)
TEACHER_ROWS, TEACHER_TRAINING = 30_000, {"steps": 260, "batch_size": 64, "learning_rate": 3e-3, "warmup_steps": 50}
STUDENT_TRAINING = {"steps": 600, "batch_size": 64, "warmup_steps": 20}
LEARNING_RATES, TUNING_SEED = (1e-3, 3e-3, 1e-2), 1000
HELD_OUT, COT_QUESTIONS, RESPONSES_QUESTIONS, SLIPS = 400, 200, 600, 0.1
TEACHER = "black-box-reckoning"

_SAMPLING = {"max_new_tokens": 16, "temperature": 0.7}
ANSWER = {"type": "number", "field": "answer"}
_PATTERN = r"-->\s*(\d+)"


def _rationales(count: int, **changed: Any) -> dict[str, Any]:
    asked = {"rationales": count, "answer": ANSWER, "sampling": _SAMPLING, "answer_tokens": 4}
    return {"kind": "chain_of_thought", **asked, **changed}


def _responses(samples: int, **changed: Any) -> dict[str, Any]:
    return {"kind": "responses", "samples": samples, "sampling": {"max_new_tokens": 18, "temperature": 0.7}, **changed}


COT: dict[str, dict[str, Any] | None] = {
    "answers": None,
    "rationales_1": _rationales(1),
    "rationales_4": _rationales(4),
    "rationales_8": _rationales(8),
    "rationales_8_unchecked": _rationales(8, keep="answered"),
}
RESPONSES: dict[str, dict[str, Any] | None] = {
    "supervised": None,
    "supervised_right": None,
    "seqkd": _responses(1),
    "seqkd_likeliest": _responses(4, keep="best", scorer="mean_logprob"),
    "seqkd_right": _responses(4, keep="best", scorer="answer", answer=ANSWER),
}

STUDENT_COLUMNS = {"accuracy": ("right answers", "{:.1%}"), "sound": ("sound workings", "{:.1%}")}
_ROW_COLUMNS = {
    "rows": ("rows", "{:,.0f}"), "right_rows": ("right rows", "{:.1%}"),
    "by_luck": ("of them right for wrong reasons", "{:.1%}"), "different": ("different rows a question", "{:.2f}"),
    "seconds": ("seconds", "{:.0f}"),
}  # fmt: skip
_RATIONALE_COLUMNS = {"teacher_accuracy": ("teacher's accuracy", "{:.1%}"), "yield": ("yield", "{:.1%}")}


def _run_cot(method: str, seed: int, rate: float) -> dict[str, Any]:
    asked, held_out = split_questions(seed, COT_QUESTIONS)
    if COT[method] is None:
        rows = [make_row(question, f" --> {purse.answer_to(question)}") for question in asked]
    else:
        rows = [{"prompt": question, "answer": purse.answer_to(question)} for question in asked]
    return _train_and_measure(COT[method], rows, held_out, seed, rate)


def _run_responses(method: str, seed: int, rate: float) -> dict[str, Any]:
    asked, held_out = split_questions(seed, RESPONSES_QUESTIONS)
    draw = random.Random(seed)
    workings = [purse.make_working(question, draw, SLIPS) for question in asked]
    rows = [make_row(question, make_completion(working)) for question, working in zip(asked, workings, strict=True)]
    if method == "supervised_right":
        rows = [row for row in rows if row["completion"].endswith(f" {row['answer']}")]
    return _train_and_measure(RESPONSES[method], rows, held_out, seed, rate)


def split_questions(seed: int, count: int) -> tuple[list[str], list[str]]:
    """Return a seed's questions: for training, and held out."""
    every = purse.sample_questions(count + HELD_OUT, random.Random(100 + seed))
    return every[:count], every[count:]


def make_row(question: str, completion: str) -> dict[str, str]:
    return {"prompt": f"{question} ###", "completion": completion, "answer": purse.answer_to(question)}


def make_completion(working: str) -> str:
    return f" {working} --> {working.split()[-1]}"


def _train_and_measure(
    synthesis: Mapping[str, Any] | None, rows: list[dict[str, str]], held_out: Iterable[str], seed: int, rate: float
) -> dict[str, Any]:
    """Train a student on `rows`, or on what the teacher generates for them, and measure it."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        make_tokenizer(purse.WORDS).save_pretrained(home / "tokenizer")
        student = {"config": STUDENT_MODEL, "tokenizer": str(home / "tokenizer")}
        sections: dict[str, Any] = {}
        if synthesis is not None:
            sections = {"synthesis": synthesis, "teachers": [{"name": TEACHER, "attach": True}]}
        given = {"path": str(write_rows(home / "train.jsonl", rows))}
        config = run_config(
            home / "run", student, given, seed, {"kind": "supervised"}, {**STUDENT_TRAINING, "learning_rate": rate},
            **evaluation_settings(home, held_out), **sections,
        )  # fmt: skip
        result = distill(config)
        learned = rows if synthesis is None else read_synthesis_rows(result, "rows")
        return {
            **student_measures(result.summary), **row_statistics(learned),
            **({} if synthesis is None else _synthesis_measures(result, learned)),
            "seconds": result.summary["training_seconds"],
        }  # fmt: skip


def evaluation_settings(home: Path, held_out: Iterable[str]) -> dict[str, Any]:
    """Return the settings of evaluation with greedy generation; rows are pairs as well, for method `preference`."""
    rows = [make_row(question, f" --> {purse.answer_to(question)}") for question in held_out]
    rows = [row | {"chosen": row["completion"], "rejected": " -->"} for row in rows]
    generation = {"generation": {"max_new_tokens": 18}, "answer_pattern": _PATTERN, "samples": HELD_OUT}
    path = write_rows(home / "held_out.jsonl", rows)
    return {"data": {"evaluation": {"path": str(path)}}, "evaluation": generation}


def student_measures(summary: Mapping[str, Any]) -> dict[str, float]:
    sound = [_is_sound(sample["prompt"], sample["text"]) for sample in summary["samples"]]
    return {"accuracy": summary["student"]["accuracy"], "sound": statistics.mean(sound)}


def row_statistics(rows: list[Mapping[str, Any]]) -> dict[str, float]:
    """Return statistics of training rows.

    These are the number of rows, the share with the right answer, the share of those whose working is unsound (answers
    alone have no working), and the number of different rows per question.
    """
    right = [row for row in rows if row["completion"].endswith(f"--> {row['answer']}")]
    worked = [row for row in right if row["completion"].split()[0] != "-->"]
    by_luck = [row for row in worked if not _is_sound(row["prompt"], row["completion"])]
    questions = {row["prompt"] for row in rows}
    return {
        "rows": len(rows), "right_rows": len(right) / len(rows),
        **({"by_luck": len(by_luck) / len(worked)} if worked else {}),
        "different": len({(row["prompt"], row["completion"]) for row in rows}) / len(questions),
    }  # fmt: skip


def _is_sound(prompt: str, completion: str) -> bool:
    working, _, answer = completion.partition("-->")
    sound = purse.is_sound(prompt.removesuffix(" ###"), working)
    return sound and answer.split()[:1] == working.split()[-1:]


def read_synthesis_rows(result: Result, name: str) -> list[dict[str, Any]]:
    return pq.read_table(result.output / "synthesis" / f"{name}.parquet").to_pylist()


def _synthesis_measures(result: Result, kept: list[dict[str, Any]]) -> dict[str, float]:
    rejected = read_synthesis_rows(result, "rejected")
    written = [*kept, *rejected]
    right = [row["correct"] for row in written if row.get("correct") is not None]
    accuracy = {"teacher_accuracy": statistics.mean(right)} if right else {}
    return {**accuracy, "yield": len(kept) / len(written)}


def make_teacher() -> Path:
    """Return the folder of the teacher of both parts; train it unless the cache has it.

    It has seen sound workings in the three forms of its later prompts, and was stopped before it knew all coins.
    """
    draw = random.Random(1)
    forms = [
        draw.choice([_rationale_row, _rationale_row, _answer_row, _response_row, _response_row])
        for _ in range(TEACHER_ROWS)
    ]
    rows = [
        form(question, purse.make_working(question, draw))
        for form in forms
        for question in purse.sample_questions(1, draw, for_teacher=True)
    ]
    settings = [TEACHER_MODEL, TEACHER_ROWS, TEACHER_TRAINING]
    home = cache_folder("black-box-reckoning", purse, settings)
    return train_model_once(home, make_tokenizer(purse.WORDS), TEACHER_MODEL, rows, 1, **TEACHER_TRAINING) / "model"


def _rationale_row(question: str, working: str) -> dict[str, str]:
    return {"prompt": f"Q: {question}\nA: Let's think step by step.", "completion": f" {working}"}


def _answer_row(question: str, working: str) -> dict[str, str]:
    asked = f"{_rationale_row(question, working)['prompt']} {working}\nTherefore, the answer is"
    return {"prompt": asked, "completion": f" {working.split()[-1]}"}


def _response_row(question: str, working: str) -> dict[str, str]:
    return make_row(question, make_completion(working))


def measure_teacher(model: Path) -> dict[str, float]:
    """Measure the teacher on the first seed's held-out questions."""
    return {"accuracy": measure_accuracy(model, split_questions(0, COT_QUESTIONS)[1])}


def measure_accuracy(model: Path, held_out: Iterable[str]) -> float:
    """Return the accuracy of a model in a folder, measured as students are."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        config = run_config(
            home / "run", {"model": str(model)}, {"path": "none"}, 0, {"kind": "supervised"}, {},
            **evaluation_settings(home, held_out),
        )  # fmt: skip
        return evaluate_model(config, str(model))["student"]["accuracy"]


COT_PART = Part(
    Comparison(
        methods=list(COT), rates=LEARNING_RATES, tuning_seed=TUNING_SEED,
        columns=STUDENT_COLUMNS | _RATIONALE_COLUMNS | _ROW_COLUMNS,
        pairs=[
            ("rationales_1", "answers"), ("rationales_4", "rationales_1"), ("rationales_8", "rationales_4"),
            ("rationales_8", "rationales_8_unchecked"), ("rationales_8", "answers"),
        ],
        compared=("accuracy", "sound"),
    ),
    TEACHER, make_teacher, measure_teacher, _run_cot,
)  # fmt: skip
RESPONSES_PART = Part(
    Comparison(
        methods=list(RESPONSES), rates=LEARNING_RATES, tuning_seed=TUNING_SEED,
        columns=STUDENT_COLUMNS | {"yield": _RATIONALE_COLUMNS["yield"]} | _ROW_COLUMNS,
        pairs=[
            ("seqkd", "supervised"), ("seqkd", "supervised_right"), ("seqkd_likeliest", "seqkd"),
            ("seqkd_right", "seqkd"), ("seqkd_right", "seqkd_likeliest"), ("seqkd_right", "supervised_right"),
        ],
        compared=("accuracy", "sound"),
    ),
    TEACHER, make_teacher, measure_teacher, _run_responses,
)  # fmt: skip
