r"""A teacher with another tokenizer, by aligned distributions, against its text alone and against a wrong alignment.

    python -m tests.benchmarks.learning.other_tokenizer --teacher GEMMA_3_270M --student SMOLLM2_10_LAYERS \
        --data TRAIN.jsonl --held-out TEST.jsonl [--prompt-template "{instruction}\n"] [--seeds 3]

The teacher continues the prompts once (temperature 1). All methods train the same student on these rows, in the order
of the seed and with the same settings, stated before any run: learning rate 5e-5, batch size 8, `--steps` steps.

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
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rayk.config import TeacherConfig
from rayk.data.examples import Example
from rayk.environment import set_threading
from rayk.methods import METHODS, LogitKD
from rayk.run import distill
from rayk.serving.cluster import start_ray
from rayk.signals.alignment import AlignedView, TokenGroups
from rayk.teachers import Teacher, serve_teacher
from tests.benchmarks.learning.harness import paired_difference, run_config
from tests.benchmarks.machine import machine

ALIGNED = {"kind": "logit_kd", "support": {"kind": "topk", "k": 64}, "alignment": {"kind": "bytes"}}
IGNORED = {**ALIGNED, "alignment": {"kind": "bytes", "unmatched": "ignore"}}
METHOD_SETTINGS: dict[str, dict[str, Any]] = {
    "seqkd": {"kind": "supervised"}, "aligned": ALIGNED, "aligned, ignore": IGNORED, "shuffled": ALIGNED,
}  # fmt: skip


class ShuffledAlignment(LogitKD):
    """`logit_kd` that compares every group of a row with another group's signals of the same row."""

    def loss(self, student, experience):
        batch = experience.batch
        rows = [_shuffled(row) for row in batch.sequences]
        shuffled = dataclasses.replace(batch, sequences=rows)
        return super().loss(student, dataclasses.replace(experience, batch=shuffled))


def _shuffled(row: Any) -> Example:
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


def write_continuations(
    teacher: Teacher, source: str, template: str, rows: int, new_tokens: int, path: Path, seed: int
) -> Path:
    """Write the teacher's continuations of the first prompts in `source`."""
    with open(source, encoding="utf-8") as file:
        prompts = [template.format(**json.loads(line)) for line, _ in zip(file, range(rows), strict=False)]
    completions = teacher.generate(prompts, max_new_tokens=new_tokens, temperature=1.0, seed=seed)
    with path.open("w", encoding="utf-8") as file:
        for prompt, completion in zip(prompts, completions, strict=True):
            if completion.text.strip():
                file.write(json.dumps({"prompt": prompt, "completion": completion.text}) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("teacher", "student", "data", "held-out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--prompt-template", default="Question: {instruction}\nAnswer:")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--held-out-rows", type=int, default=48)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    set_threading()
    print(machine())
    start_ray(num_cpus=4)
    losses: dict[str, list[float]] = {method: [] for method in METHOD_SETTINGS}
    config = TeacherConfig(name="teacher", model=given.teacher, resources={"num_cpus": 0.5}, deadline_seconds=1500)
    with serve_teacher(config) as teacher, tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        template = given.prompt_template.replace("\\n", "\n")
        train, held_out = (
            write_continuations(teacher, source, template, rows, given.new_tokens, folder / f"{seed}.jsonl", seed)
            for seed, (source, rows) in enumerate(((given.data, given.rows), (given.held_out, given.held_out_rows)))
        )
        attached = [{"name": "teacher", "model": given.teacher, "attach": True}]
        for seed in range(given.seeds):
            for method, settings in METHOD_SETTINGS.items():
                run = run_config(
                    folder / f"{method}-{seed}", {"model": given.student}, {"path": str(train)}, seed, settings,
                    {"steps": given.steps, "batch_size": 8, "learning_rate": 5e-5},
                    data={"evaluation": {"path": str(held_out)}},
                    teachers=[] if method == "seqkd" else attached, cache={"path": str(folder / "cache")},
                )  # fmt: skip
                with replaced_logit_kd(method):
                    result = distill(run)
                losses[method].append(result.summary["student"]["loss"])
                before = result.summary["student_before"]["loss"]
                print(f"seed {seed} {method:16} loss {before:.4f} -> {losses[method][-1]:.4f}", flush=True)
    for method, values in losses.items():
        line = f"{method:16} {statistics.mean(values):.4f}"
        if method != "aligned" and given.seeds > 1:
            mean, half = paired_difference(losses["aligned"], values)
            line += f"   aligned minus {method}: {mean:+.4f} ± {half:.4f} (95 %)"
        print(line)


if __name__ == "__main__":
    main()
