"""The black-box comparison's part on adversarial rounds, in the world of `currencies`: what a referee that looks for
where the student is behind is worth, at equal rows, updates and answers. Settings are stated in `black_box`."""

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
from tests.benchmarks import currencies
from tests.benchmarks.comparing import Comparison, Part, run_config
from tests.benchmarks.words import llama, tokenizer_of, write_rows
from tests.engines.endpoint import Endpoint

STUDENT_MODEL = llama(currencies.WORDS, hidden=48, layers=2, heads=4, between=128)
GIVEN, NEW, ROUNDS, UPDATES, HELD_OUT = 1200, 300, 3, 900, 100
TRAINING = {"batch_size": 64, "warmup_steps": 20}
LEARNING_RATES, TUNING_SEED = (1e-3, 3e-3, 1e-2), 1000
TEACHER, DICE = "black-box-currencies", "black-box-dice"

_TOKENS = 20
_RESPONSES: dict[str, Any] = {"kind": "responses"}


def _rounds(hard: int, easy: int, **changed: Any) -> dict[str, Any]:
    made = {"instructions": hard, "easy_instructions": easy}
    return {"kind": "adversarial", "student": {"resources": {"num_cpus": 0.5}}, **made, **changed}


ADVERSARIAL: dict[str, dict[str, Any]] = {
    "given_alone": _RESPONSES,
    "at_once": _RESPONSES,
    "as_they_come": _rounds(2 * NEW, 0, threshold=-10.0),  # whatever the scores, all are hard
    "by_dice": _rounds(NEW, NEW, referee=DICE),
    "adversarial": _rounds(NEW, NEW),
    "hard_alone": _rounds(2 * NEW, 0),
}


def _run(method: str, seed: int, rate: float) -> dict[str, Any]:
    synthesis = {**ADVERSARIAL[method], "sampling": {"max_new_tokens": _TOKENS, "temperature": 0.7}}
    rounds = ROUNDS if synthesis["kind"] == "adversarial" else 1
    teachers = [TEACHER, *([DICE] if "referee" in synthesis else [])]
    draw = random.Random(100 + seed)
    held_out = currencies.held_out(HELD_OUT, draw)
    given = currencies.asked(GIVEN + 2 * NEW * (ROUNDS - 1), draw)
    given = given if method == "at_once" else given[:GIVEN]
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        tokenizer_of(currencies.WORDS).save_pretrained(home / "tokenizer")
        student = {"config": STUDENT_MODEL, "tokenizer": str(home / "tokenizer")}
        rows = write_rows(home / "train.jsonl", [{"prompt": question} for question in given])
        answered = [{"prompt": each, "completion": f" {currencies.answer(each, draw)}"} for each in held_out]
        asked = write_rows(home / "held_out.jsonl", answered)
        config = run_config(
            home / "run", student, {"path": str(rows)}, seed, {"kind": "supervised"},
            {**TRAINING, "steps": UPDATES // rounds, "learning_rate": rate}, data={"evaluation": {"path": str(asked)}},
            evaluation={"generation": {"max_new_tokens": _TOKENS}, "samples": len(held_out)},
            rounds=rounds, synthesis=synthesis,
            teachers=[{"name": name, "attach": True} for name in teachers],
        )  # fmt: skip
        return _figures(distill(config))


def _figures(result: Result) -> dict[str, Any]:
    """What the student came to, and what is known of its rows: how many there are, how many of those that were made up
    are about rare currencies, and how many instructions its referee found hard."""
    right = {each["prompt"]: currencies.score(each["prompt"], each["text"]) > 2 for each in result.summary["samples"]}
    folders = sorted(result.output.glob("rounds/*/synthesis")) or [result.output / "synthesis"]
    rounds = [pq.read_table(folder / "rows.parquet").column("prompt").to_pylist() for folder in folders]
    made_up = [currencies.currency_of(prompt) in currencies.RARE for prompts in rounds[1:] for prompt in prompts]
    compared = [pq.read_table(folder / "comparisons.parquet").column("kind").to_pylist() for folder in folders[1:]]
    return {
        **currencies.accuracies(right), "rows": sum(map(len, rounds)),
        **({"rare_made_up": statistics.mean(made_up)} if made_up else {}),
        **({"hard": statistics.mean(kind == "hard" for kind in compared[-1])} if compared else {}),
        "seconds": result.summary["seconds"],
    }  # fmt: skip


@contextmanager
def _serving(program: Path) -> Iterator[None]:
    """Teacher and dice as rayk meets them: an OpenAI-compatible endpoint, behind Ray Serve."""
    with ExitStack() as stack:
        endpoint = stack.enter_context(closing(Endpoint(remembers=False)))
        endpoint.answer = currencies.respond
        engine = {"kind": "openai", "base_url": endpoint.url, "api_key_variable": None, "concurrency": 32}
        for name, model in ((TEACHER, program.stem), (DICE, currencies.DICE)):
            served = {"name": name, "model": model, "engine": engine, "resources": {"num_cpus": 0.1}}
            stack.enter_context(serve_teacher(TeacherConfig.model_validate(served)))
        yield


def _program() -> Path:
    return Path(currencies.__file__)


def _program_measured(program: Path) -> dict[str, float]:
    """The program's answers to the first seed's held-out questions."""
    draw = random.Random(100)
    answers = {question: currencies.answer(question, draw) for question in currencies.held_out(HELD_OUT, draw)}
    return currencies.accuracies({question: currencies.score(question, said) > 2 for question, said in answers.items()})


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
            ("adversarial", "hard_alone"), ("adversarial", "at_once"), ("adversarial", "given_alone"),
        ],
        compared=("accuracy", "rare", "common"),
        told=("accuracy", "rare", "common", "seconds"),
    ),
    TEACHER, _program, _program_measured, _run, _serving,
)  # fmt: skip
