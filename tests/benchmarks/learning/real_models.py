"""Methods compared on a real model and real text: SmolLM2-135M-Instruct teaches its 10-layer cut.

    python -m tests.benchmarks.learning.real_models --teacher SMOLLM2 --start RECOVERED --data DATA --task dolly \
        --output dolly.jsonl [--seeds 3] [--methods logit_kd,on_policy] [--print]

DATA contains TASK/{train,test}.jsonl, of Dolly (`instruction`, `input`, `output`) or GSM8K (`question`, `answer`).
`--prepare FOLDER` only writes the rows (`real_rows`), for the recovery of the cut student.

The cut is noise at first, so all methods start from RECOVERED: the cut after `jobs/cut_student.yaml` on rows that no
method is trained on. `seqkd` is `supervised` on the teacher's greedy answers (`synthesis.kind: responses`). The rows of
a task's pool are short, and only prompts whose answer by the teacher ends within the limit are used, by all methods.

The rules. Every method makes 10 updates of 8 rows, drawn from the pool by the seed, the same rows or
prompts in the same order for all methods; AdamW, 2 steps of warm-up, then a cosine schedule to zero; full fine-tuning
in float32; ChatML without a system prompt. No method is tuned: the learning rate is twice rayk's default for the
method, 2e-4, and 1e-5 for `minillm`. `on_policy` is GKD with λ = 1 and reverse KL; `minillm` has 1 inner epoch, no
pretraining text, and for its time no teacher mixing (`teacher_share: 0`). Both generate at most 32 tokens, with
temperature 1. Signals are the teacher's 64 most likely tokens and their rest.

Stated before the runs were 20 updates, 48 held-out rows, answers of at most 32 tokens, and 2e-4 for all methods.
Changed after the first runs: the sizes, because they took too long (one run was discarded); and the rate of `minillm`,
which at 2e-4 destroyed its student on seed 0 (loss 11.9), and which was then run again with its own rate.

Measures, on 32 held-out rows: the loss on their completions; exact KL both ways and agreement of the most likely token
at the same tokens, against the teacher; ROUGE-L of greedy answers of at most 24 tokens against the completions.
Accuracy on GSM8K is not measured: a model of this size has none. Finished runs are lines of OUTPUT and are not
repeated. How to read it: means ± standard deviations over seeds, and paired differences with their 95 % confidence
intervals (Student's t, not corrected for the number of pairs), `undecided` if 0 is inside.
"""

import argparse
import dataclasses
import functools
import os
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rayk.environment import set_threading

set_threading()
os.environ.setdefault("RAY_worker_niceness", "0")  # the default of 15 would slow down the teacher

import pyarrow.parquet as pq  # noqa: E402
import torch  # noqa: E402

from rayk.config import Resources, TeacherConfig  # noqa: E402
from rayk.data.batches import make_batches  # noqa: E402
from rayk.engines.base import SamplingParameters  # noqa: E402
from rayk.engines.generation import generate  # noqa: E402
from rayk.losses import forward_kl, reverse_kl  # noqa: E402
from rayk.models import load_model, load_tokenizer  # noqa: E402
from rayk.report.run_directory import read_lines  # noqa: E402
from rayk.run import distill, synthesize  # noqa: E402
from rayk.serving.cluster import start_ray  # noqa: E402
from rayk.teachers import serve_teacher  # noqa: E402
from rayk.text.rouge import rouge_l  # noqa: E402
from tests.benchmarks.learning.harness import Comparison, Runs, read_rows, run_config  # noqa: E402
from tests.benchmarks.learning.real_rows import TASKS, prepare_rows  # noqa: E402
from tests.benchmarks.learning.words import write_rows  # noqa: E402
from tests.benchmarks.machine import machine  # noqa: E402

METHODS: dict[str, dict[str, Any]] = {
    "start": {},
    "supervised": {"kind": "supervised"},
    "seqkd": {"kind": "supervised"},
    "logit_kd": {"kind": "logit_kd"},
    "logit_kd_reverse": {"kind": "logit_kd", "divergence": "reverse_kl"},
    "on_policy": {"kind": "on_policy"},
    "minillm": {"kind": "minillm", "teacher_share": 0.0},
}
RATES = dict.fromkeys(METHODS, 2e-4) | {"minillm": 1e-5}
STEPS, BATCH = 10, 8
ROLLOUT_TOKENS, ANSWER_TOKENS = 32, 24
TEACHER_TOKENS = {"dolly": 40, "gsm8k": 96}
"""Longest answer of the teacher, for `seqkd`."""
PAIRS = [
    *((method, "start") for method in METHODS if method != "start"),
    ("seqkd", "supervised"), ("logit_kd", "supervised"), ("logit_kd", "seqkd"), ("logit_kd_reverse", "logit_kd"),
    ("on_policy", "supervised"), ("on_policy", "logit_kd"), ("on_policy", "logit_kd_reverse"),
    ("minillm", "supervised"), ("minillm", "logit_kd"), ("minillm", "on_policy"),
]  # fmt: skip
COLUMNS = {
    "loss": ("loss", "{:.3f}"), "forward_kl": ("forward KL", "{:.3f}"), "reverse_kl": ("reverse KL", "{:.3f}"),
    "agreement": ("agreement", "{:.1%}"), "rouge_l": ("ROUGE-L", "{:.3f}"), "length": ("answer tokens", "{:.1f}"),
    "trained_tokens": ("trained tokens", "{:,.0f}"), "seconds": ("seconds", "{:.0f}"),
}  # fmt: skip
COMPARISON = Comparison(
    list(METHODS), (), 1000, COLUMNS, PAIRS, compared=("loss", "forward_kl", "reverse_kl", "agreement", "rouge_l"),
    printed=("loss", "forward_kl", "reverse_kl", "agreement", "rouge_l", "seconds"),
    known=RATES,
)  # fmt: skip
_CHAT = {"chat_template": "chatml"}
_TEACHER = "real-teacher"


class Measurer:
    """Measures students on the same held-out rows, on the CPU of this process."""

    def __init__(self, teacher: str, rows: Path):
        self._tokenizer = load_tokenizer(teacher)
        self._batches = make_batches(str(rows), self._tokenizer, batch_size=16, **_CHAT)
        self._references = [row["completion"] for row in read_rows(rows)]
        self._teacher = load_model(teacher)
        self._log_p = [self._log_probs(self._teacher, batch) for batch in self._batches]

    def measure_teacher(self) -> dict[str, float]:
        return self._measure(self._teacher)

    def measure(self, student: Path) -> dict[str, float]:
        """Measure the model in a folder; the measures are described in the module."""
        return self._measure(load_model(str(student)))

    @functools.cache  # noqa: B019  (one measurer for a whole process)
    def measure_start(self, student: Path) -> dict[str, float]:
        """Measure the common start of all seeds, once."""
        return self.measure(student)

    @torch.no_grad()
    def _measure(self, model: Any) -> dict[str, float]:
        sums = dict.fromkeys(("loss", "forward_kl", "reverse_kl", "agreement"), 0.0)
        for batch, log_p in zip(self._batches, self._log_p, strict=True):
            log_q = self._log_probs(model, batch)
            sums["loss"] -= float(log_q.gather(1, batch.targets[:, None]).sum())
            sums["forward_kl"] += float(forward_kl(log_q, log_p).sum())
            sums["reverse_kl"] += float(reverse_kl(log_q, log_p).sum())
            sums["agreement"] += float((log_q.argmax(-1) == log_p.argmax(-1)).sum())
        tokens = sum(batch.counted_tokens for batch in self._batches)
        prompts = [row.prompt_ids for batch in self._batches for row in batch.sequences]
        parameters = SamplingParameters(ANSWER_TOKENS, 0.0)
        answers = generate(model, len(self._tokenizer), self._tokenizer, prompts, parameters, range(len(prompts)))
        scores = [rouge_l(answer.text, right) for answer, right in zip(answers, self._references, strict=True)]
        return {
            **{name: total / tokens for name, total in sums.items()},
            "rouge_l": statistics.mean(scores),
            "length": statistics.mean(len(answer.token_ids) for answer in answers),
        }

    @torch.no_grad()
    def _log_probs(self, model: Any, batch: Any) -> torch.Tensor:
        body = model.get_decoder()(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        logits = model.get_output_embeddings()(batch.counted(body.last_hidden_state))
        return logits.float().log_softmax(-1)


def write_answers(rows: Path, start: str, task: str, folder: Path) -> tuple[Path, Path]:
    """Let the served teacher answer the prompts of the pool once.

    Returns:
        The rows whose answer ends within the limit: with their own completions, and with the teacher's answers.
    """
    own, answered = folder / f"{task}-train.jsonl", folder / f"{task}-answered.jsonl"
    if answered.exists():
        return own, answered
    sampling = {"max_new_tokens": TEACHER_TOKENS[task], "temperature": 0.0}
    config = run_config(
        folder / f"{task}-synthesis", {"model": start}, {"path": str(rows)}, 0, {"kind": "supervised"}, {},
        data=_CHAT, teachers=[{"name": _TEACHER, "attach": True}],
        synthesis={"kind": "responses", "sampling": sampling, "filters": [{"kind": "truncated"}, {"kind": "empty"}]},
    )  # fmt: skip
    synthesize(config)
    synthesized = pq.read_table(config.output_path / "synthesis" / "rows.parquet").to_pylist()
    answers = {row["prompt"]: row["completion"] for row in synthesized}
    kept = [row for row in read_rows(rows) if row["prompt"] in answers]
    write_rows(own, kept)
    write_rows(answered, [{"prompt": row["prompt"], "completion": answers[row["prompt"]]} for row in kept])
    return own, answered


def train_student(
    method: str, seed: int, rate: float, start: str, rows: tuple[Path, Path], folder: Path, measurer: Measurer
) -> dict[str, Any]:
    """Train one method's student, and measure it. Method 'start' is only measured.

    Args:
        rows: the rows with their own completions, and with the teacher's answers.
    """
    if method == "start":
        return {**measurer.measure_start(Path(start)), "trained_tokens": 0, "seconds": 0.0}
    settings, sections = METHODS[method], {}
    if settings["kind"] != "supervised":
        sections["teachers"] = [{"name": _TEACHER, "attach": True}]
    if settings["kind"] == "logit_kd":
        sections["cache"] = {"path": str(folder / "signals")}
    if settings["kind"] in ("on_policy", "minillm"):
        sections["rollouts"] = {"max_new_tokens": ROLLOUT_TOKENS}
    training = {"steps": STEPS, "batch_size": BATCH, "learning_rate": rate, "warmup_steps": 2, "threads": 1}
    with tempfile.TemporaryDirectory() as temporary:
        config = run_config(
            Path(temporary) / "run", {"model": start}, {"path": str(rows[method == "seqkd"])}, seed, settings, training,
            data=_CHAT, **sections,
        )  # fmt: skip
        result = distill(config)
        steps = read_lines(result.output / "metrics.jsonl")
        return {
            **measurer.measure(result.model), "trained_tokens": sum(row["counted_tokens"] for row in steps),
            "seconds": result.summary["training_seconds"],
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--start", help="folder of the recovered student")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--task", choices=TASKS, default=TASKS[0])
    parser.add_argument("--output", type=Path, help="a .jsonl file; runs in it are not repeated")
    parser.add_argument("--methods", type=lambda given: given.split(","), default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prepare", type=Path, help="write the rows to this folder and end")
    parser.add_argument("--print", action="store_true", help="run nothing; print the finished seeds")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(machine(), flush=True)
    if given.prepare:
        given.prepare.mkdir(parents=True, exist_ok=True)
        prepare_rows(given.data, load_tokenizer(given.teacher), given.prepare)
        return
    if not (given.start and given.output):
        parser.error("needs --start and --output")
    comparison = dataclasses.replace(COMPARISON, methods=given.methods)
    folder = given.output.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    prepare_rows(given.data, load_tokenizer(given.teacher), folder)
    measurer = Measurer(given.teacher, folder / f"{given.task}-held-out.jsonl")
    if not given.print:
        start_ray(num_cpus=2)
        with ExitStack() as stack:
            stack.enter_context(
                serve_teacher(TeacherConfig(name=_TEACHER, model=given.teacher, resources=Resources(num_cpus=0.5)))
            )
            rows = write_answers(folder / f"{given.task}-pool.jsonl", given.start, given.task, folder)
            Runs(given.output).add(
                comparison, range(given.seeds),
                lambda method, seed, rate: train_student(method, seed, rate, given.start, rows, folder, measurer),
            )  # fmt: skip
    Runs(given.output).print(comparison, range(given.seeds), measurer.measure_teacher())


if __name__ == "__main__":
    main()
