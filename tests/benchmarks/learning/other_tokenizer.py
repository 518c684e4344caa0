r"""A teacher with another tokenizer, by aligned distributions, against its text alone and against a wrong alignment.

    python -m tests.benchmarks.learning.other_tokenizer --teacher GEMMA_3_270M --student RECOVERED_SMOLLM2 \
        --data TRAIN.jsonl --held-out TEST.jsonl --output other.jsonl [--prompt-template "{instruction}\n"] [--seeds 3]

The teacher continues the prompts once (temperature 1). All methods train the same student on these rows, in the order
of the seed and with the same settings, stated before any run: learning rate 2e-4, 2 steps of warm-up, batch size 8,
`--steps` steps. Finished runs are lines of OUTPUT and are not repeated.

- `seqkd`: cross-entropy on the teacher's text (method `supervised`).
- `aligned`: forward KL by `method.alignment` with `unmatched: sorted`; `aligned, ignore`: with `unmatched: ignore`.
- `shuffled`: as `aligned`, but every group is compared with another group of the teacher's in the same row.

How to read it: the student's loss on the teacher's continuations of held-out prompts, in nats per token of the
student; paired differences with their 95 % confidence intervals. If alignment carries information, `aligned` is below
both `seqkd` (which sees one sample where `aligned` sees a distribution) and `shuffled`.
"""

import argparse
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rayk.environment import set_threading

set_threading()
os.environ.setdefault("RAY_worker_niceness", "0")  # the default of 15 would slow down the teacher

import torch  # noqa: E402

from rayk.config import TeacherConfig  # noqa: E402
from rayk.data.batches import make_batches  # noqa: E402
from rayk.data.examples import Example  # noqa: E402
from rayk.methods import METHODS, LogitKD  # noqa: E402
from rayk.models import load_model, load_tokenizer  # noqa: E402
from rayk.run import distill  # noqa: E402
from rayk.serving.cluster import start_ray  # noqa: E402
from rayk.signals.alignment import AlignedView, TokenGroups  # noqa: E402
from rayk.teachers import Teacher, serve_teacher  # noqa: E402
from tests.benchmarks.learning.harness import Comparison, Runs, run_config  # noqa: E402
from tests.benchmarks.learning.words import write_rows  # noqa: E402
from tests.benchmarks.machine import machine  # noqa: E402

ALIGNED = {"kind": "logit_kd", "support": {"kind": "topk", "k": 64}, "alignment": {"kind": "bytes"}}
IGNORED = {**ALIGNED, "alignment": {"kind": "bytes", "unmatched": "ignore"}}
METHOD_SETTINGS: dict[str, dict[str, Any]] = {
    "seqkd": {"kind": "supervised"}, "aligned": ALIGNED, "aligned, ignore": IGNORED, "shuffled": ALIGNED,
}  # fmt: skip
RATE = 2e-4
PAIRS = [("aligned", "seqkd"), ("aligned", "shuffled"), ("aligned", "aligned, ignore"), ("aligned, ignore", "seqkd")]
COMPARISON = Comparison(
    ["start", *METHOD_SETTINGS], (RATE,), 1000, {"loss": ("loss", "{:.4f}"), "seconds": ("seconds", "{:.0f}")}, PAIRS,
    compared=("loss",), printed=("loss", "seconds"), known=dict.fromkeys(["start", *METHOD_SETTINGS], RATE),
)  # fmt: skip
_TEACHER = "other-teacher"


class ShuffledAlignment(LogitKD):
    """`logit_kd` that compares every group of a row with another group's signals of the same row."""

    def loss(self, student, experience):
        batch = experience.batch
        rows = [shuffle_groups(row) for row in batch.sequences]
        shuffled = dataclasses.replace(batch, sequences=rows)
        return super().loss(student, dataclasses.replace(experience, batch=shuffled))


def shuffle_groups(row: Example) -> Example:
    """Rotate the teacher's side of the row's groups, those of one token apart from all others."""
    views = {}
    for name, view in row.aligned.items():
        teacher = view.groups.teacher.copy()
        for chosen in (view.groups.is_single, ~view.groups.is_single):
            teacher[chosen] = np.roll(teacher[chosen], int(chosen.sum()) // 2, axis=0)
        groups = TokenGroups(view.groups.student, teacher, view.groups.is_single)
        views[name] = AlignedView(view.sequence, groups, view.vocabulary)
    return dataclasses.replace(row, aligned=views)


@contextmanager
def replaced_logit_kd(method: str) -> Iterator[None]:
    """Let `logit_kd` shuffle the alignment if `method` is 'shuffled'."""
    original = METHODS["logit_kd"]
    METHODS["logit_kd"] = ShuffledAlignment if method == "shuffled" else original
    try:
        yield
    finally:
        METHODS["logit_kd"] = original


def read_prompts(source: str, template: str, rows: int, longest: int) -> list[str]:
    """Return the first `rows` prompts in `source` of at most `longest` characters."""
    with open(source, encoding="utf-8") as file:
        prompts = (template.format(**json.loads(line)) for line in file)
        return [prompt for prompt in prompts if len(prompt) <= longest][:rows]


def write_continuations(teacher: Teacher, prompts: list[str], new_tokens: int, path: Path, seed: int) -> None:
    """Write the teacher's continuations of `prompts` as rows; empty ones are left out."""
    completions = teacher.generate(prompts, max_new_tokens=new_tokens, temperature=1.0, seed=seed)
    pairs = [(prompt, completion.text) for prompt, completion in zip(prompts, completions, strict=True)]
    write_rows(path, [{"prompt": prompt, "completion": text} for prompt, text in pairs if text.strip()])


@torch.no_grad()
def measure_loss(model: str, rows: Path) -> float:
    """Return the loss of the model in a folder on the rows' completions, nats per token of the model."""
    loaded, total, tokens = load_model(model), 0.0, 0
    for batch in make_batches(str(rows), load_tokenizer(model), batch_size=8):
        body = loaded.get_decoder()(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        logits = loaded.get_output_embeddings()(batch.counted(body.last_hidden_state))
        total += float(torch.nn.functional.cross_entropy(logits, batch.targets, reduction="sum"))
        tokens += batch.counted_tokens
    return total / tokens


def train_student(method: str, seed: int, rate: float, given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train one method's student on the rows in `folder`, and measure it. Method 'start' is only measured."""
    held_out = folder / "held-out.jsonl"
    if method == "start":
        return {"loss": measure_loss(given.student, held_out), "seconds": 0.0}
    settings = METHOD_SETTINGS[method]
    with tempfile.TemporaryDirectory() as temporary, replaced_logit_kd(method):
        config = run_config(
            Path(temporary) / "run", {"model": given.student}, {"path": str(folder / "train.jsonl")}, seed, settings,
            {"steps": given.steps, "batch_size": 8, "learning_rate": rate, "warmup_steps": 2, "threads": 1},
            teachers=[] if method == "seqkd" else [{"name": _TEACHER, "model": given.teacher, "attach": True}],
            cache={"path": str(folder / "signals")},
        )  # fmt: skip
        result = distill(config)
        loss = measure_loss(str(result.model), held_out)
    return {"loss": loss, "seconds": result.summary["training_seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("teacher", "student", "data", "held-out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--output", type=Path, required=True, help="a .jsonl file; runs in it are not repeated")
    parser.add_argument("--prompt-template", default="Question: {instruction}\nAnswer:")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--held-out-rows", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--longest-prompt", type=int, default=120, help="in characters; longer prompts are left out")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(machine(), flush=True)
    start_ray(num_cpus=4)
    config = TeacherConfig(name=_TEACHER, model=given.teacher, resources={"num_cpus": 0.5}, deadline_seconds=1500)
    folder = given.output.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    runs = Runs(given.output)
    with serve_teacher(config) as teacher:
        template = given.prompt_template.replace("\\n", "\n")
        sources = (("train", given.data, given.rows), ("held-out", given.held_out, given.held_out_rows))
        for seed, (name, source, rows) in enumerate(sources):
            path = folder / f"{name}.jsonl"
            if not path.exists():
                prompts = read_prompts(source, template, rows, given.longest_prompt)
                write_continuations(teacher, prompts, given.new_tokens, path, seed)
        runs.add(
            COMPARISON, range(given.seeds), lambda method, seed, rate: train_student(method, seed, rate, given, folder)
        )
    runs.print(COMPARISON, range(given.seeds), {})


if __name__ == "__main__":
    main()
