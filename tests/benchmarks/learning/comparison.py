"""Methods compared on one task with a known truth, from the same start, on the same rows, at equal updates.

    python -m tests.benchmarks.learning.comparison --output comparison.jsonl [--seeds 3] [--methods minillm,on_policy]
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
nothing is tuned again. What is measured: `comparison_measures`. Printed as Markdown: means ± standard deviations over
seeds, and paired differences with their 95 % intervals (Student's t, none of them corrected for the number of pairs),
`undecided` where 0 is inside.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

from rayk.environment import set_threading

set_threading()
os.environ.setdefault("RAY_worker_niceness", "0")  # the teacher is not to wait longer than those who ask it

import torch  # noqa: E402

from rayk.config import Resources, TeacherConfig  # noqa: E402
from rayk.report.run_directory import read_lines  # noqa: E402
from rayk.run import distill  # noqa: E402
from rayk.serving.cluster import start_ray  # noqa: E402
from rayk.teachers import Teacher, serve_teacher  # noqa: E402
from tests.benchmarks.learning import walks  # noqa: E402
from tests.benchmarks.learning.harness import Comparison, Runs, arguments, cache_folder, made, run_config  # noqa: E402
from tests.benchmarks.learning.measures import LENGTHS, MAX_NEW_TOKENS, Measurer  # noqa: E402
from tests.benchmarks.learning.words import llama, tokenizer_of, write_rows  # noqa: E402
from tests.benchmarks.machine import machine  # noqa: E402

TEACHER_MODEL = llama(walks.WORDS, hidden=96, layers=2, heads=4, between=256)
STUDENT_MODEL = llama(walks.WORDS, hidden=8, layers=1, heads=2, between=16)
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
COLUMNS = {
    "accuracy": ("valid, sampled", "{:.1%}"), "greedy_accuracy": ("valid, greedy", "{:.1%}"),
    "reverse_kl": ("reverse KL, own text", "{:.3f}"), "forward_kl": ("forward KL, own text", "{:.3f}"),
    "data_forward_kl": ("forward KL, data", "{:.3f}"),
    **{f"excess_error_{length}": (f"ExAccErr({length})", "{:+.1%}") for length in LENGTHS},
    "old_town": ("old town", "{:.1%}"), "length": ("length", "{:.1f}"), "distinct_4": ("distinct-4", "{:.3f}"),
    "entropy": ("entropy", "{:.3f}"), "trained_tokens": ("trained tokens", "{:,.0f}"),
    "seconds": ("seconds", "{:.0f}"),
}  # fmt: skip
_TEACHER = "comparison-teacher"


def main() -> None:
    given = arguments(__doc__, "methods", METHODS)
    torch.set_num_threads(1)
    print(machine(), flush=True)
    home = _home()
    model = made(
        home / "teacher", tokenizer_of(walks.WORDS), TEACHER_MODEL, walks.generate_rows(TEACHER_ROWS, seed=1), 1,
        steps=TEACHER_STEPS, batch_size=BATCH, learning_rate=TEACHER_RATE, warmup_steps=50,
    ) / "model"  # fmt: skip
    measurer = Measurer(model)
    comparison = Comparison(
        given.methods, LEARNING_RATES, TUNING_SEED, COLUMNS, PAIRS, compared=("accuracy", "reverse_kl"),
        told=("accuracy", "reverse_kl", "old_town", "seconds"), known=given.rates,
    )  # fmt: skip
    runs = Runs(given.output)
    if not given.print:
        start_ray(num_cpus=2)
        served = TeacherConfig(name=_TEACHER, model=str(model), resources=Resources(num_cpus=0.5))
        with serve_teacher(served) as teacher:
            runs.add(
                comparison, range(given.seeds),
                lambda method, seed, rate: compare(method, seed, rate, home, teacher, measurer),
            )  # fmt: skip
    runs.print(comparison, range(given.seeds), measurer.measure(model))


def compare(
    method: str, seed: int, learning_rate: float, home: Path, teacher: Teacher, measurer: Measurer
) -> dict[str, Any]:
    """One method's student of one seed: trained from the seed's start, measured."""
    start = made(
        home / f"start-{seed}", tokenizer_of(walks.WORDS), STUDENT_MODEL, walks.generate_rows(ROWS, 10_000 + seed),
        10_000 + seed, steps=WARM_STEPS, batch_size=BATCH, learning_rate=WARM_RATE, warmup_steps=50,
    )  # fmt: skip
    rows = start / ("seqkd.jsonl" if method == "seqkd" else "train.jsonl")
    if not rows.exists():
        _write_by_teacher(rows, start / "train.jsonl", teacher, seed)
    settings = METHODS[method]
    sections: dict[str, Any] = {}
    if settings["kind"] != "supervised":
        sections["teachers"] = [{"name": _TEACHER, "attach": True}]
    if settings["kind"] in ("on_policy", "minillm"):
        sections["rollouts"] = {"max_new_tokens": MAX_NEW_TOKENS}
    training = {"steps": STEPS, "batch_size": BATCH, "learning_rate": learning_rate, "warmup_steps": 10}
    with tempfile.TemporaryDirectory() as folder:
        config = run_config(
            Path(folder) / "run", {"model": str(start / "model")}, {"path": str(rows)}, seed, settings, training,
            **sections,
        )  # fmt: skip
        result = distill(config)
        counted = sum(row["counted_tokens"] for row in read_lines(result.output / "metrics.jsonl"))
        return {
            **measurer.measure(result.model), "trained_tokens": counted, "seconds": result.summary["training_seconds"],
        }  # fmt: skip


def _home() -> Path:
    """Where teacher and starts are kept."""
    settings = [TEACHER_MODEL, STUDENT_MODEL, TEACHER_ROWS, TEACHER_STEPS, TEACHER_RATE, ROWS, WARM_STEPS, WARM_RATE]
    return cache_folder("comparison", walks, settings)


def _write_by_teacher(path: Path, given: Path, teacher: Teacher, seed: int) -> None:
    """The rows of `given` with completions the teacher samples; of those it does not end, none."""
    prompts = [row["prompt"] for row in read_lines(given)]
    written = teacher.generate(prompts, max_new_tokens=MAX_NEW_TOKENS, seed=seed)
    write_rows(
        path,
        [
            {"prompt": prompt, "completion": each.text}
            for prompt, each in zip(prompts, written, strict=True)
            if each.finish_reason == "stop"
        ],
    )


if __name__ == "__main__":
    main()
