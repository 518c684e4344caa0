"""Two of the black-box comparison's parts, on the world of `purse`: rationales against answers alone, and a teacher's
workings against people's. Settings are stated in `black_box`."""

import random
import statistics
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from rayk.run import Result, distill, evaluate_model
from tests.benchmarks.learning import purse
from tests.benchmarks.learning.harness import Comparison, Part, cache_folder, made, run_config
from tests.benchmarks.learning.words import llama, tokenizer_of, write_rows

TEACHER_MODEL = llama(purse.WORDS, hidden=64, layers=2, heads=4, between=192)
STUDENT_MODEL = llama(purse.WORDS, hidden=32, layers=2, heads=4, between=96)
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

OF_STUDENTS = {"accuracy": ("right answers", "{:.1%}"), "sound": ("sound workings", "{:.1%}")}
_OF_ROWS = {
    "rows": ("rows", "{:,.0f}"), "right_rows": ("right rows", "{:.1%}"),
    "by_luck": ("of them right for wrong reasons", "{:.1%}"), "different": ("different rows a question", "{:.2f}"),
    "seconds": ("seconds", "{:.0f}"),
}  # fmt: skip
_OF_RATIONALES = {"teacher_accuracy": ("teacher's accuracy", "{:.1%}"), "yield": ("yield", "{:.1%}")}


def _run_cot(method: str, seed: int, rate: float) -> dict[str, Any]:
    asked, held_out = drawn(seed, COT_QUESTIONS)
    if COT[method] is None:
        rows = [row_of(question, f" --> {purse.answer_to(question)}") for question in asked]
    else:
        rows = [{"prompt": question, "answer": purse.answer_to(question)} for question in asked]
    return _trained(COT[method], rows, held_out, seed, rate)


def _run_responses(method: str, seed: int, rate: float) -> dict[str, Any]:
    asked, held_out = drawn(seed, RESPONSES_QUESTIONS)
    draw = random.Random(seed)
    workings = [purse.working(question, draw, SLIPS) for question in asked]
    rows = [row_of(question, said_of(working)) for question, working in zip(asked, workings, strict=True)]
    if method == "supervised_right":
        rows = [row for row in rows if row["completion"].endswith(f" {row['answer']}")]
    return _trained(RESPONSES[method], rows, held_out, seed, rate)


def drawn(seed: int, count: int) -> tuple[list[str], list[str]]:
    """A seed's questions, those to learn from and those to be measured on."""
    every = purse.questions(count + HELD_OUT, random.Random(100 + seed))
    return every[:count], every[count:]


def row_of(question: str, completion: str) -> dict[str, str]:
    return {"prompt": f"{question} ###", "completion": completion, "answer": purse.answer_to(question)}


def said_of(working: str) -> str:
    return f" {working} --> {working.split()[-1]}"


def _trained(
    synthesis: Mapping[str, Any] | None, rows: list[dict[str, str]], held_out: Iterable[str], seed: int, rate: float
) -> dict[str, Any]:
    """A student trained on `rows`, or on what the teacher writes for them, and measured."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        tokenizer_of(purse.WORDS).save_pretrained(home / "tokenizer")
        student = {"config": STUDENT_MODEL, "tokenizer": str(home / "tokenizer")}
        sections: dict[str, Any] = {}
        if synthesis is not None:
            sections = {"synthesis": synthesis, "teachers": [{"name": TEACHER, "attach": True}]}
        given = {"path": str(write_rows(home / "train.jsonl", rows))}
        config = run_config(
            home / "run", student, given, seed, {"kind": "supervised"}, {**STUDENT_TRAINING, "learning_rate": rate},
            **measured_by(home, held_out), **sections,
        )  # fmt: skip
        result = distill(config)
        learned = rows if synthesis is None else written_rows(result, "rows")
        return {
            **of_student(result.summary), **of_rows(learned),
            **({} if synthesis is None else _of_synthesis(result, learned)),
            "seconds": result.summary["training_seconds"],
        }  # fmt: skip


def measured_by(home: Path, held_out: Iterable[str]) -> dict[str, Any]:
    """The settings of how a student is measured: it answers greedily. Method `preference` wants pairs there, too."""
    rows = [row_of(question, f" --> {purse.answer_to(question)}") for question in held_out]
    rows = [row | {"chosen": row["completion"], "rejected": " -->"} for row in rows]
    generation = {"generation": {"max_new_tokens": 18}, "answer_pattern": _PATTERN, "samples": HELD_OUT}
    path = write_rows(home / "held_out.jsonl", rows)
    return {"data": {"evaluation": {"path": str(path)}}, "evaluation": generation}


def of_student(summary: Mapping[str, Any]) -> dict[str, float]:
    sound = [_is_sound(each["prompt"], each["text"]) for each in summary["samples"]]
    return {"accuracy": summary["student"]["accuracy"], "sound": statistics.mean(sound)}


def of_rows(rows: list[Mapping[str, Any]]) -> dict[str, float]:
    """What is known of training rows: how many there are, how many have the right answer, how many of those that have
    it by a working that is not sound (answers alone have none), and how many different ones there are to a question."""
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
    working, _, said = completion.partition("-->")
    sound = purse.is_sound(prompt.removesuffix(" ###"), working)
    return sound and said.split()[:1] == working.split()[-1:]


def written_rows(result: Result, name: str) -> list[dict[str, Any]]:
    return pq.read_table(result.output / "synthesis" / f"{name}.parquet").to_pylist()


def _of_synthesis(result: Result, kept: list[dict[str, Any]]) -> dict[str, float]:
    rejected = written_rows(result, "rejected")
    written = [*kept, *rejected]
    right = [row["correct"] for row in written if row.get("correct") is not None]
    accuracy = {"teacher_accuracy": statistics.mean(right)} if right else {}
    return {**accuracy, "yield": len(kept) / len(written)}


def teacher() -> Path:
    """The folder of the model that reckons for both parts, made now unless the cache has it: it was shown sound
    workings in the three forms it is asked in, and stopped before it knew all coins."""
    draw = random.Random(1)
    forms = [draw.choice([_thinking, _thinking, _concluding, _saying, _saying]) for _ in range(TEACHER_ROWS)]
    rows = [
        form(question, purse.working(question, draw))
        for form in forms
        for question in purse.questions(1, draw, teachers=True)
    ]
    settings = [TEACHER_MODEL, TEACHER_ROWS, TEACHER_TRAINING]
    home = cache_folder("black-box-reckoning", purse, settings)
    return made(home, tokenizer_of(purse.WORDS), TEACHER_MODEL, rows, 1, **TEACHER_TRAINING) / "model"


def _thinking(question: str, working: str) -> dict[str, str]:
    return {"prompt": f"Q: {question}\nA: Let's think step by step.", "completion": f" {working}"}


def _concluding(question: str, working: str) -> dict[str, str]:
    asked = f"{_thinking(question, working)['prompt']} {working}\nTherefore, the answer is"
    return {"prompt": asked, "completion": f" {working.split()[-1]}"}


def _saying(question: str, working: str) -> dict[str, str]:
    return row_of(question, said_of(working))


def teacher_measured(model: Path) -> dict[str, float]:
    """The teacher on the first seed's held-out questions."""
    return {"accuracy": accuracy_of(model, drawn(0, COT_QUESTIONS)[1])}


def accuracy_of(model: Path, held_out: Iterable[str]) -> float:
    """How a model in a folder does, measured as students are: greedily, asked in their form."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        config = run_config(
            home / "run", {"model": str(model)}, {"path": "none"}, 0, {"kind": "supervised"}, {},
            **measured_by(home, held_out),
        )  # fmt: skip
        return evaluate_model(config, str(model))["student"]["accuracy"]


COT_PART = Part(
    Comparison(
        methods=list(COT), rates=LEARNING_RATES, tuning_seed=TUNING_SEED,
        columns=OF_STUDENTS | _OF_RATIONALES | _OF_ROWS,
        pairs=[
            ("rationales_1", "answers"), ("rationales_4", "rationales_1"), ("rationales_8", "rationales_4"),
            ("rationales_8", "rationales_8_unchecked"), ("rationales_8", "answers"),
        ],
        compared=("accuracy", "sound"),
    ),
    TEACHER, teacher, teacher_measured, _run_cot,
)  # fmt: skip
RESPONSES_PART = Part(
    Comparison(
        methods=list(RESPONSES), rates=LEARNING_RATES, tuning_seed=TUNING_SEED,
        columns=OF_STUDENTS | {"yield": _OF_RATIONALES["yield"]} | _OF_ROWS,
        pairs=[
            ("seqkd", "supervised"), ("seqkd", "supervised_right"), ("seqkd_likeliest", "seqkd"),
            ("seqkd_right", "seqkd"), ("seqkd_right", "seqkd_likeliest"), ("seqkd_right", "supervised_right"),
        ],
        compared=("accuracy", "sound"),
    ),
    TEACHER, teacher, teacher_measured, _run_responses,
)  # fmt: skip
