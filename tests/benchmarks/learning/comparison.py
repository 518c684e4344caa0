"""Methods compared on one task with a known truth, from the same start, on the same rows, at equal updates.

    python -m tests.benchmarks.learning.comparison --output comparison.jsonl [--seeds 3] [--methods minillm,on_policy]
                                          [--rates minillm=3e-2,on_policy=3e-2]

The task is `walks`, half of which the student cannot learn (width 8, one layer; the teacher has width 96 and two
layers). The teacher is trained once (kept in the cache) and runs on Ray Serve. For each seed a student is created and,
as in the MiniLLM paper, first fine-tuned on 2,000 rows of that seed; every method starts from it, with the same rows or
their prompts in the same order. `seqkd` is `supervised` on completions that the teacher generated once for these
prompts.

Settled before the runs. Fine-tuning: 300 steps of 64 rows at 1e-2. Every method: 60 steps of 64 rows with one update
each (so `minillm` has 1 inner epoch and no pretraining text), AdamW, a cosine schedule to zero after 10 steps of
warm-up. Only the learning rate is tuned: of 3e-3, 1e-2 and 3e-2 the one with the best `accuracy` on seed 1000, which is
used for nothing else; the same three and the same criterion for each method. `on_policy` is GKD with λ = 1 and reverse
KL; signals are the whole distribution. Completions are truncated at 64 tokens.

Width and rates were chosen in pilots on that seed and one more, with a student of width 16: 1e-3 was the worst of four
rates for all four methods that tried it, and 3,000 supervised steps on new rows taught that student everything its
teacher knew, so there was no gap. After 2,000 such steps a student of width 8 has 0.525 valid walks, the teacher 0.904.

Finished runs are lines of OUTPUT and are not repeated. `--rates` gives the rates that an earlier run has chosen, so
that nothing is tuned again. The measures are described in `measures`. How to read it: Markdown tables with means ±
standard deviations over seeds, and paired differences with their 95 % confidence intervals (Student's t, not corrected
for the number of pairs), `undecided` if 0 is inside.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

from rayk.environment import set_threading

set_threading()
os.environ.setdefault("RAY_worker_niceness", "0")  # the default of 15 would slow down the teacher

import torch  # noqa: E402

from rayk.config import Resources, TeacherConfig  # noqa: E402
from rayk.report.run_directory import read_lines  # noqa: E402
from rayk.run import distill  # noqa: E402
from rayk.serving.cluster import start_ray  # noqa: E402
from rayk.teachers import Teacher, serve_teacher  # noqa: E402
from tests.benchmarks.learning import walks  # noqa: E402
from tests.benchmarks.learning.harness import (  # noqa: E402
    Comparison,
    Runs,
    cache_folder,
    parse_arguments,
    read_rows,
    run_config,
    train_model_once,
)
from tests.benchmarks.learning.measures import LENGTHS, MAX_NEW_TOKENS, Measurer  # noqa: E402
from tests.benchmarks.learning.words import llama_config, make_tokenizer, write_rows  # noqa: E402
from tests.benchmarks.machine import machine  # noqa: E402

TEACHER_MODEL = llama_config(walks.WORDS, hidden=96, layers=2, heads=4, intermediate=256)
STUDENT_MODEL = llama_config(walks.WORDS, hidden=8, layers=1, heads=2, intermediate=16)
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
    given = parse_arguments(__doc__, "methods", METHODS)
    torch.set_num_threads(1)
    print(machine(), flush=True)
    home = _models_folder()
    model = train_model_once(
        home / "teacher", make_tokenizer(walks.WORDS), TEACHER_MODEL, walks.generate_rows(TEACHER_ROWS, seed=1), 1,
        steps=TEACHER_STEPS, batch_size=BATCH, learning_rate=TEACHER_RATE, warmup_steps=50,
    ) / "model"  # fmt: skip
    measurer = Measurer(model)
    comparison = Comparison(
        given.methods, LEARNING_RATES, TUNING_SEED, COLUMNS, PAIRS, compared=("accuracy", "reverse_kl"),
        printed=("accuracy", "reverse_kl", "old_town", "seconds"), known=given.rates,
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
    """Train one method's student of one seed from the seed's start, and measure it."""
    start = train_model_once(
        home / f"start-{seed}", make_tokenizer(walks.WORDS), STUDENT_MODEL, walks.generate_rows(ROWS, 10_000 + seed),
        10_000 + seed, steps=WARM_STEPS, batch_size=BATCH, learning_rate=WARM_RATE, warmup_steps=50,
    )  # fmt: skip
    rows = start / ("seqkd.jsonl" if method == "seqkd" else "train.jsonl")
    if not rows.exists():
        _write_teacher_rows(rows, start / "train.jsonl", teacher, seed)
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


def _models_folder() -> Path:
    """Return the cache folder of the teacher and of the starts."""
    settings = [TEACHER_MODEL, STUDENT_MODEL, TEACHER_ROWS, TEACHER_STEPS, TEACHER_RATE, ROWS, WARM_STEPS, WARM_RATE]
    return cache_folder("comparison", walks, settings)


def _write_teacher_rows(path: Path, given: Path, teacher: Teacher, seed: int) -> None:
    """Write the rows of `given` with completions that the teacher samples, without truncated ones."""
    prompts = [row["prompt"] for row in read_rows(given)]
    completions = teacher.generate(prompts, max_new_tokens=MAX_NEW_TOKENS, seed=seed)
    write_rows(
        path,
        [
            {"prompt": prompt, "completion": completion.text}
            for prompt, completion in zip(prompts, completions, strict=True)
            if completion.finish_reason == "stop"
        ],
    )


if __name__ == "__main__":
    main()
