"""Methods compared on one task with a known truth, from the same start, on the same rows, at equal updates.

    python -m tests.benchmarks.comparison --output comparison.jsonl [--seeds 3] [--methods minillm,on_policy]
                                          [--rates minillm=3e-2,on_policy=3e-2]

The task is `walks`: half of it is beyond the student (width 8, one layer; the teacher has 96 and two). The teacher
learns it once (kept in the cache), and is served by Ray Serve. For each seed a student is made and, as in the paper,
first fine-tuned on 2,000 rows of that seed: every method goes on from there, with the same rows or their prompts in the
same order. `seqkd` is `supervised` on what the teacher wrote once after these prompts.

Settled before the runs. Fine-tuning: 300 steps of 64 rows at 1e-2. Every method: 60 steps of 64 rows, one update each
(so `minillm` has 1 inner epoch; it has no text to learn beside), AdamW, cosine to zero after 10 steps of warm-up. The
one thing tuned is the learning rate: of 3e-3, 1e-2 and 3e-2 the one whose student has the best accuracy (`accuracy`
below) on seed 1000, which is used for nothing else; the same three and the same criterion for each method. `on_policy`
is GKD with λ = 1 and reverse KL; signals are the whole distribution. Completions are cut at 64 tokens.

Width and grid were chosen on pilot runs, on that seed and one more, of a student of width 16: 1e-3 was the worst of
four rates with all four methods that had had them, and 3,000 supervised steps of fresh rows taught that student all
that its teacher knew, so there was no gap. After 2,000 such steps one of width 8 still has 0.525 of its walks right,
the teacher 0.904.

Every finished run is a line of OUTPUT and is not run again. `--rates` says what an earlier run has chosen, so that
nothing is tuned again. What is measured: `comparison_measures`. Printed as
Markdown: means ± standard deviations over seeds, and paired differences with their 95 % intervals (Student's t, none of
them corrected for the number of pairs), `undecided` where 0 is inside.
"""

import argparse
import hashlib
import inspect
import itertools
import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayk.environment import set_threading

set_threading()
os.environ.setdefault("RAY_worker_niceness", "0")  # the teacher is not to wait longer than those who ask it

import torch  # noqa: E402

from rayk.cluster import start_ray  # noqa: E402
from rayk.config import Resources, RunConfig, TeacherConfig, parse_config  # noqa: E402
from rayk.evaluation.run_directory import read_lines  # noqa: E402
from rayk.run import distill  # noqa: E402
from rayk.teachers import Teacher, serve_teacher  # noqa: E402
from tests.benchmarks import walks  # noqa: E402
from tests.benchmarks.comparison_measures import LENGTHS, MAX_NEW_TOKENS, Measurer, paired  # noqa: E402
from tests.benchmarks.machine import machine  # noqa: E402

_LLAMA = {
    "model_type": "llama",
    "vocab_size": len(walks.WORDS),
    "max_position_embeddings": 128,
    "pad_token_id": walks.WORDS.index(walks.PAD),
    "eos_token_id": walks.WORDS.index(walks.EOS),
    "bos_token_id": None,
    "tie_word_embeddings": False,
}
TEACHER_MODEL = _LLAMA | {
    "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4,
}  # fmt: skip
STUDENT_MODEL = _LLAMA | {
    "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip
TEACHER_ROWS, TEACHER_STEPS, TEACHER_RATE = 48_000, 750, 3e-3
ROWS, BATCH = 2000, 64
WARM_STEPS, WARM_RATE = 300, 1e-2
STEPS, LEARNING_RATES, TUNING_SEED = 60, (3e-3, 1e-2, 3e-2), 1000

_ALL = {"support": {"kind": "topk", "k": len(walks.WORDS)}}
METHODS: dict[str, dict[str, Any]] = {
    "supervised": {"kind": "supervised"},
    "seqkd": {"kind": "supervised"},
    "logit_kd": {"kind": "logit_kd"} | _ALL,
    "logit_kd_reverse": {"kind": "logit_kd", "divergence": "reverse_kl"} | _ALL,
    "on_policy": {"kind": "on_policy"} | _ALL,
    "minillm": {"kind": "minillm"} | _ALL,
    "minillm_without_single_step": {"kind": "minillm", "single_step": False} | _ALL,
    "minillm_without_teacher_mixed": {"kind": "minillm", "teacher_share": 0.0} | _ALL,
    "minillm_without_length_norm": {"kind": "minillm", "length_norm": False} | _ALL,
}
PAIRS = [
    *(("minillm", other) for other in METHODS if other != "minillm"),
    ("on_policy", "logit_kd"),
    ("on_policy", "logit_kd_reverse"),
    ("logit_kd_reverse", "logit_kd"),
    ("logit_kd", "seqkd"),
    ("seqkd", "supervised"),
]
COMPARED = ("accuracy", "reverse_kl")
_TEACHER = "comparison-teacher"

Key = tuple[str, int, float]
"""Method, seed, learning rate."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--output", type=Path, required=True, help="a .jsonl file; what is in it is not run again")
    parser.add_argument("--rates", default="", help="METHOD=RATE,… of the methods that are not to be tuned")
    parser.add_argument("--print", action="store_true", help="run nothing; print the seeds that all methods have had")
    given = parser.parse_args()
    methods = given.methods.split(",")
    given.output.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    print(machine(), flush=True)
    home = cache_folder()
    teacher = teacher_model(home)
    measurer = Measurer(teacher)
    results = {(row["method"], row["seed"], row["learning_rate"]): row for row in read_lines(given.output)}
    seeds = list(range(given.seeds))
    rates = {method: float(rate) for method, rate in (each.split("=") for each in given.rates.split(",") if each)}
    if not given.print:
        run_all(methods, seeds, rates, results, given.output, home, measurer)
    chosen = {method: rates.get(method) or chosen_rate(method, results) for method in methods}
    seeds = [seed for seed in seeds if all((method, seed, chosen[method]) in results for method in methods)]
    table = {method: [results[method, seed, chosen[method]] for seed in seeds] for method in methods}
    print_results(table, chosen, measurer.measure(teacher))


def run_all(
    methods: list[str], seeds: list[int], rates: Mapping[str, float], results: dict[Key, dict[str, Any]], output: Path,
    home: Path, measurer: Measurer,
) -> None:  # fmt: skip
    """Add to `results` and `output` what is not in them yet: the learning rates of every method that has none in
    `rates`, then seed by seed."""
    start_ray(num_cpus=2)
    served = TeacherConfig(name=_TEACHER, model=str(home / "teacher"), resources=Resources(num_cpus=0.5))
    with serve_teacher(served) as teacher:

        def run(method: str, seed: int, rate: float) -> None:
            if (method, seed, rate) in results:
                return
            row = compare(method, seed, rate, home, teacher, measurer)
            results[method, seed, rate] = row
            with output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            told = {name: round(row[name], 4) for name in ("accuracy", "reverse_kl", "old_town", "seconds")}
            print(f"seed {seed} {method} {rate:g}: {told}", flush=True)

        for method, rate in itertools.product(methods, LEARNING_RATES):
            if method not in rates:
                run(method, TUNING_SEED, rate)
        for seed, method in itertools.product(seeds, methods):
            run(method, seed, rates.get(method) or chosen_rate(method, results))


def chosen_rate(method: str, results: Mapping[Key, Mapping[str, Any]]) -> float:
    """The learning rate with the best accuracy on the tuning seed."""
    return max(LEARNING_RATES, key=lambda rate: results[method, TUNING_SEED, rate]["accuracy"])


def compare(
    method: str, seed: int, learning_rate: float, home: Path, teacher: Teacher, measurer: Measurer
) -> dict[str, Any]:
    """One method's student of one seed: trained from the seed's start, measured; its line of the output."""
    with tempfile.TemporaryDirectory() as folder:
        start = started(home, seed)
        rows = start / ("seqkd.jsonl" if method == "seqkd" else "train.jsonl")
        if not rows.exists():
            _write_by_teacher(rows, start / "train.jsonl", teacher, seed)
        config = run_config(
            Path(folder) / "run", {"model": str(start / "model")}, rows, seed, METHODS[method], steps=STEPS,
            learning_rate=learning_rate, warmup_steps=10,
        )  # fmt: skip
        result = distill(config)
        counted = sum(row["counted_tokens"] for row in read_lines(result.output / "metrics.jsonl"))
        return {
            "method": method, "seed": seed, "learning_rate": learning_rate, **measurer.measure(result.model),
            "trained_tokens": counted, "seconds": result.summary["training_seconds"],
        }  # fmt: skip


def cache_folder() -> Path:
    """Where teacher and starts are kept: one folder for each version of the task and the settings."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    settings = [TEACHER_MODEL, STUDENT_MODEL, TEACHER_ROWS, TEACHER_STEPS, TEACHER_RATE, ROWS, WARM_STEPS, WARM_RATE]
    version = hashlib.sha256((inspect.getsource(walks) + json.dumps(settings)).encode()).hexdigest()[:12]
    return base / "rayk" / f"comparison-{version}"


def teacher_model(home: Path) -> Path:
    """The folder of the trained teacher, trained now unless `home` has it."""
    model = home / "teacher"
    if not model.is_dir():
        print("training the teacher", flush=True)
        _made(model, TEACHER_MODEL, rows=TEACHER_ROWS, steps=TEACHER_STEPS, learning_rate=TEACHER_RATE, seed=1)
        (model / "model").rename(home / "weights")
        shutil.rmtree(model)
        (home / "weights").rename(model)
    return model


def started(home: Path, seed: int) -> Path:
    """The folder of a seed's rows (`train.jsonl`) and warmed-up student (`model`), made now unless `home` has it."""
    folder = home / f"start-{seed}"
    if not folder.is_dir():
        _made(folder, STUDENT_MODEL, rows=ROWS, steps=WARM_STEPS, learning_rate=WARM_RATE, seed=10_000 + seed)
    return folder


def _made(folder: Path, model: Mapping[str, Any], *, rows: int, steps: int, learning_rate: float, seed: int) -> None:
    """`train.jsonl` and, trained on it with supervision from random weights, `model`."""
    work = folder.with_name(f"{folder.name}-{os.getpid()}")
    work.mkdir(parents=True)
    walks.task_tokenizer().save_pretrained(work / "tokenizer")
    walks.write_rows(work / "train.jsonl", walks.generate_rows(rows, seed))
    student = {"config": dict(model), "tokenizer": str(work / "tokenizer")}
    config = run_config(
        work / "run", student, work / "train.jsonl", seed, METHODS["supervised"], steps=steps,
        learning_rate=learning_rate, warmup_steps=50,
    )  # fmt: skip
    distill(config).model.rename(work / "model")
    shutil.rmtree(work / "run")
    work.rename(folder)


def run_config(
    output: Path, student: Mapping[str, Any], rows: Path, seed: int, method: Mapping[str, Any], **training: Any
) -> RunConfig:
    """A run in this very process."""
    taught = method["kind"] != "supervised"
    return parse_config(
        {
            "output": str(output),
            "seed": seed,
            "teachers": [{"name": _TEACHER, "attach": True}] if taught else [],
            "student": student,
            "data": {"train": {"path": str(rows)}},
            "method": method,
            **({"rollouts": {"max_new_tokens": MAX_NEW_TOKENS}} if method["kind"] in ("on_policy", "minillm") else {}),
            "training": {
                "workers": 0, "batch_size": BATCH, "checkpoint_every_steps": 10_000, **training,
            },
            "tracking": {"tensorboard": False},
        }
    )  # fmt: skip


def _write_by_teacher(path: Path, given: Path, teacher: Teacher, seed: int) -> None:
    """The rows of `given` with completions the teacher samples; of those it does not end, none."""
    prompts = [row["prompt"] for row in read_lines(given)]
    written = teacher.generate(prompts, max_new_tokens=MAX_NEW_TOKENS, seed=seed)
    walks.write_rows(
        path,
        [
            {"prompt": prompt, "completion": each.text}
            for prompt, each in zip(prompts, written, strict=True)
            if each.finish_reason == "stop"
        ],
    )


def print_results(
    table: Mapping[str, list[dict[str, Any]]], chosen: Mapping[str, float], teacher: Mapping[str, float]
) -> None:
    """Means and paired differences as Markdown."""
    columns = {
        "accuracy": ("valid, sampled", "{:.1%}"), "greedy_accuracy": ("valid, greedy", "{:.1%}"),
        "reverse_kl": ("reverse KL, own text", "{:.3f}"), "forward_kl": ("forward KL, own text", "{:.3f}"),
        "data_forward_kl": ("forward KL, data", "{:.3f}"),
        **{f"excess_error_{length}": (f"ExAccErr({length})", "{:+.1%}") for length in LENGTHS},
        "old_town": ("old town", "{:.1%}"), "length": ("length", "{:.1f}"), "distinct_4": ("distinct-4", "{:.3f}"),
        "entropy": ("entropy", "{:.3f}"), "trained_tokens": ("trained tokens", "{:,.0f}"),
        "seconds": ("seconds", "{:.0f}"),
    }  # fmt: skip
    seeds = len(next(iter(table.values())))
    print(f"\nMeans ± standard deviations over {seeds} seeds\n")
    print("| method | learning rate | " + " | ".join(title for title, _ in columns.values()) + " |")
    print("|---" * (len(columns) + 2) + "|")
    cells = [form.format(teacher[name]) if name in teacher else "–" for name, (_, form) in columns.items()]
    print(f"| teacher | – | {' | '.join(cells)} |")
    for method, rows in table.items():
        cells = []
        for name, (_, form) in columns.items():
            values = [row[name] for row in rows]
            spread = statistics.stdev(values) if seeds > 1 else 0.0
            cells.append(f"{form.format(statistics.mean(values))} ± {form.format(spread).lstrip('+')}")
        print(f"| {method} | {chosen[method]:g} | {' | '.join(cells)} |")
    if seeds > 1:
        _print_pairs(table)


def _print_pairs(table: Mapping[str, list[dict[str, Any]]]) -> None:
    print("\nPaired differences with their 95 % intervals\n")
    print("| pair | " + " | ".join(COMPARED) + " |")
    print("|---" * (len(COMPARED) + 1) + "|")
    for one, other in PAIRS:
        if one not in table or other not in table:
            continue
        cells = []
        for name in COMPARED:
            mean, half = paired([row[name] for row in table[one]], [row[name] for row in table[other]])
            cells.append(f"{mean:+.3f} ± {half:.3f}" + (", undecided" if abs(mean) <= half else ""))
        print(f"| {one} − {other} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
