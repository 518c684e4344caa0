"""Part `adversarial` of `black_box`: what the referee of Lion's rounds contributes, at equal rows, updates and answers.

The task is `currencies`: six kinds of purses, of which two are rare and three are longer than the others. Teacher and
referee are a program that knows the truth, behind an OpenAI-compatible endpoint, so the part measures the rounds where
both can be trusted. Students (48×2) start after 600 updates on the answers to 600 questions as people ask them. In the
first round they learn the answers to 400 other questions, and then in two rounds to 200 new ones each:

- `adversarial`: 100 from questions that the referee finds hard for the current student, of the same currency, and 100
  of a rarer currency from easy ones;
- `by_dice`: the same with a referee that scores at random;
- `as_they_come`: 200 of the same currency, from any question.

Without rounds they learn the answers to 800 questions as people ask them, including the 400 (`at_once`), or to the 400
alone (`given_alone`). All but the last need 800 answers from the teacher. Every student makes 180 updates of 64 rows,
60 per round if there are three, each with its own cosine schedule. Learning rates are 1e-3, 3e-3, 1e-2. Evaluation uses
100 questions of each currency, weighted by what people ask, and those of the two rare and of the two common currencies
alone.

In a pilot students started with the 400 questions of the first round and made 600 updates: they memorized them, so the
referee found none of them hard in the second round, and fewer rows were generated.
"""

import random
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from rayk.config import TeacherConfig
from rayk.run import Result, distill
from rayk.teachers import serve_teacher
from tests.benchmarks.learning import currencies
from tests.benchmarks.learning.harness import Comparison, Part, cache_folder, run_config, train_model_once
from tests.benchmarks.learning.words import llama_config, make_tokenizer, write_rows
from tests.engines.endpoint import Endpoint

STUDENT_MODEL = llama_config(currencies.WORDS, hidden=48, layers=2, heads=4, intermediate=128)
BEFORE = {"steps": 600, "batch_size": 64, "learning_rate": 3e-3, "warmup_steps": 20}
BEFORE_QUESTIONS, GIVEN, NEW, ROUNDS, UPDATES, HELD_OUT = 600, 400, 100, 3, 180, 100
TRAINING = {"batch_size": 64, "warmup_steps": 10}
LEARNING_RATES, TUNING_SEED = (1e-3, 3e-3, 1e-2), 1000
TEACHER, DICE = "black-box-currencies", "black-box-dice"

_TOKENS = 8
_RESPONSES: dict[str, Any] = {"kind": "responses"}


def _rounds(hard: int, easy: int, **changed: Any) -> dict[str, Any]:
    counts = {"instructions": hard, "easy_instructions": easy}
    return {"kind": "adversarial", "student": {"resources": {"num_cpus": 0.5}}, **counts, **changed}


ADVERSARIAL: dict[str, dict[str, Any]] = {
    "given_alone": _RESPONSES,
    "at_once": _RESPONSES,
    "as_they_come": _rounds(2 * NEW, 0, threshold=-10.0),  # so low that all are hard
    "by_dice": _rounds(NEW, NEW, referee=DICE),
    "adversarial": _rounds(NEW, NEW),
}


def _run(method: str, seed: int, rate: float) -> dict[str, Any]:
    synthesis = {**ADVERSARIAL[method], "sampling": {"max_new_tokens": _TOKENS, "temperature": 0.7}}
    rounds = ROUNDS if synthesis["kind"] == "adversarial" else 1
    teachers = [TEACHER, *([DICE] if "referee" in synthesis else [])]
    _, given, held_out = _split_questions(seed)
    given = given if method == "at_once" else given[:GIVEN]
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        asked, measured = write_rows(home / "train.jsonl", given), write_rows(home / "held_out.jsonl", held_out)
        config = run_config(
            home / "run", {"model": str(_make_start(seed))}, {"path": str(asked)}, seed, {"kind": "supervised"},
            {**TRAINING, "steps": UPDATES // rounds, "learning_rate": rate},
            data={"evaluation": {"path": str(measured)}},
            evaluation={"generation": {"max_new_tokens": _TOKENS}, "samples": len(held_out)},
            rounds=rounds, synthesis=synthesis,
            teachers=[{"name": name, "attach": True} for name in teachers],
        )  # fmt: skip
        return _measure(distill(config))


def _split_questions(seed: int) -> tuple[list[dict[str, str]], ...]:
    """Return a seed's questions with answers: for the student's start, for training, and for evaluation."""
    draw = random.Random(100 + seed)
    asked = currencies.sample_questions(BEFORE_QUESTIONS + GIVEN + 2 * NEW * (ROUNDS - 1), draw)
    parts = asked[:BEFORE_QUESTIONS], asked[BEFORE_QUESTIONS:], currencies.held_out_questions(HELD_OUT, draw)
    return tuple([_make_row(question) for question in part] for part in parts)


def _make_row(question: str) -> dict[str, str]:
    return {"prompt": question, "completion": f" {currencies.answer_to(question)}"}


def _make_start(seed: int) -> Path:
    """Return the student from which all methods of a seed start; it has learned the answers to other questions."""
    settings = [STUDENT_MODEL, BEFORE, BEFORE_QUESTIONS, GIVEN, NEW, ROUNDS]
    home = cache_folder("black-box-rounds", currencies, settings) / str(seed)
    return (
        train_model_once(
            home, make_tokenizer(currencies.WORDS), STUDENT_MODEL, _split_questions(seed)[0], seed, **BEFORE
        )
        / "model"
    )


def _measure(result: Result) -> dict[str, Any]:
    """Return the student's accuracies and statistics of its rows.

    These are the number of rows, the share of generated rows about rare currencies, and the share of instructions that
    the referee found hard in the last round.
    """
    right = {
        sample["prompt"]: currencies.score(sample["prompt"], sample["text"]) > 2 for sample in result.summary["samples"]
    }
    folders = sorted(result.output.glob("rounds/*/synthesis")) or [result.output / "synthesis"]
    rounds = [pq.read_table(folder / "rows.parquet").column("prompt").to_pylist() for folder in folders]
    made_up = [currencies.currency_of(prompt) in currencies.RARE for prompts in rounds[1:] for prompt in prompts]
    compared = [pq.read_table(folder / "comparisons.parquet").column("kind").to_pylist() for folder in folders[1:]]
    return {
        **currencies.compute_accuracies(right), "rows": sum(map(len, rounds)),
        **({"rare_made_up": statistics.mean(made_up)} if made_up else {}),
        **({"hard": statistics.mean(kind == "hard" for kind in compared[-1])} if compared else {}),
        "seconds": result.summary["seconds"],
    }  # fmt: skip


@contextmanager
def _serve_programs(program: Path) -> Iterator[None]:
    """Serve the teacher and the random referee: an OpenAI-compatible endpoint behind Ray Serve."""
    with ExitStack() as stack:
        endpoint = stack.enter_context(closing(Endpoint(records=False)))
        endpoint.answer = currencies.respond
        engine = {"kind": "openai", "base_url": endpoint.url, "api_key_variable": None, "concurrency": 32}
        for name, model in ((TEACHER, program.stem), (DICE, currencies.DICE)):
            served = {"name": name, "model": model, "engine": engine, "resources": {"num_cpus": 0.1}}
            stack.enter_context(serve_teacher(TeacherConfig.model_validate(served)))
        yield


def _program_file() -> Path:
    return Path(currencies.__file__)


def _measure_program(program: Path) -> dict[str, float]:
    """Measure the program on the first seed's held-out questions."""
    draw = random.Random(100)
    answers = {question: currencies.answer_to(question) for question in currencies.held_out_questions(HELD_OUT, draw)}
    return currencies.compute_accuracies(
        {question: currencies.score(question, said) > 2 for question, said in answers.items()}
    )


ADVERSARIAL_PART = Part(
    Comparison(
        methods=list(ADVERSARIAL), rates=LEARNING_RATES, tuning_seed=TUNING_SEED,
        columns={
            "accuracy": ("right answers, as people ask", "{:.1%}"), "rare": ("about rare currencies", "{:.1%}"),
            "common": ("about common ones", "{:.1%}"), "rows": ("rows", "{:,.0f}"),
            "rare_made_up": ("made up about rare ones", "{:.1%}"), "hard": ("found hard in the last round", "{:.1%}"),
            "seconds": ("seconds", "{:.0f}"),
        },
        pairs=[
            ("as_they_come", "given_alone"), ("adversarial", "as_they_come"), ("adversarial", "by_dice"),
            ("adversarial", "at_once"), ("adversarial", "given_alone"),
        ],
        compared=("accuracy", "rare", "common"),
        printed=("accuracy", "rare", "common", "seconds"),
    ),
    TEACHER, _program_file, _measure_program, _run, _serve_programs,
)  # fmt: skip
