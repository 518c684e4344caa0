"""`rayk plan`: how many replicas keep the student fed, and what crosses the network, before anything is paid for.

A teacher that is asked for a fifth more than it can give makes the student wait for ever; one with a fifth to spare
hides behind prefetching. So replicas = ⌈1.2 · student's tokens/s ÷ one replica's tokens/s⌉.
"""

import math
import time
from dataclasses import dataclass

from rayk.config import InContextConfig, RunConfig
from rayk.config.support import Support, bytes_a_token
from rayk.data.examples import ExampleTable
from rayk.errors import InputError
from rayk.models import load_model_config
from rayk.models.student import Size, count_planned_parameters
from rayk.report.run_directory import read_lines
from rayk.run import next_round, with_absolute_paths
from rayk.run.inputs import with_synthesized_rows, read_inputs
from rayk.teachers import serve_teacher
from rayk.training import steps_of_epochs

_HEADROOM = 1.2
_PROBE_TOKENS = 40_000
_REQUEST_BYTES_A_TOKEN = 4 + 1 / 8  # an id, and whether it counts


@dataclass(frozen=True)
class Plan:
    """What a run needs of its teacher. Rates are tokens of rows (padding apart) a second."""

    student_rate: float
    """What the student would learn from, never waiting."""
    teacher_rate: float
    """What one replica scores."""
    replicas: int
    counted_share: float
    bytes_a_token: float
    """Of a counted token's signal."""
    total_tokens: float
    """Over the whole run."""
    size: Size
    """Of the student."""

    @property
    def bytes_a_second(self) -> float:
        """Between teachers and students, both ways, while the student is fed."""
        return self.student_rate * (self.counted_share * self.bytes_a_token + _REQUEST_BYTES_A_TOKEN)

    @property
    def seconds(self) -> float:
        """The run's training time where the student is fed."""
        return self.total_tokens / self.student_rate

    def waiting_share(self, replicas: int) -> float:
        """The share of the time that the student would wait with so many replicas."""
        return max(0.0, 1 - replicas * self.teacher_rate / self.student_rate)


def plan(config: RunConfig, student_rate: float | None = None, teacher_rate: float | None = None) -> Plan:
    """Plan `config`'s run.

    Args:
        student_rate: tokens a second; by default measured, from the run in the config's output directory.
        teacher_rate: of one replica; by default what a simulated engine says, else measured on one replica, which is
            brought up for it.

    Raises:
        InputError: the run has no teacher to ask, or the student's rate is neither given nor measured.
    """
    config, _ = next_round(with_absolute_paths(config))
    support: Support | None = config.signal_support
    if support is None:
        raise InputError(f"method.kind '{config.method.kind}' asks no teacher for signals; there is nothing to plan.")
    if config.rollouts is not None or isinstance(config.method, InContextConfig):
        rows = "each row after its demonstrations" if config.rollouts is None else "rows that are not written yet"
        raise InputError(
            f"method.kind '{config.method.kind}' learns from {rows}; plan a 'logit_kd' run on rows of such length "
            "instead."
        )
    teacher = next(each for each in config.teachers if each.name == config.evaluation_teacher)
    if teacher.model is None:
        raise InputError(f"Teacher '{teacher.name}' has no 'model' to plan for; set it beside 'attach'.")
    inputs = read_inputs(with_synthesized_rows(config), {})
    table = inputs.train
    assert table is not None
    student_rate = student_rate or _student_rate(config)
    if teacher_rate is None and teacher.engine.kind == "simulated":
        teacher_rate = teacher.engine.tokens_per_second
    if teacher_rate is None:
        one = teacher.model_copy(update={"name": f"{teacher.name}-plan", "replicas": type(teacher.replicas)()})
        with serve_teacher(one) as served:
            teacher_rate = _rate(served, table, support)
    model = load_model_config(teacher.model, trust_remote_code=teacher.trust_remote_code).get_text_config()
    steps = config.training.steps or steps_of_epochs(config.training, len(table))
    return Plan(
        student_rate=student_rate,
        teacher_rate=teacher_rate,
        replicas=max(1, math.ceil(_HEADROOM * student_rate / teacher_rate)),
        counted_share=float(table.counted_tokens.sum() / table.lengths.sum()),
        bytes_a_token=bytes_a_token(support, model.vocab_size, model.hidden_size),
        total_tokens=steps * config.training.batch_size * float(table.lengths.mean()),
        size=count_planned_parameters(config.student, inputs.tokenizer),
    )


def _student_rate(config: RunConfig) -> float:
    """From the steps of the run in the output directory, its waiting left out."""
    path = config.output_path / "metrics.jsonl"
    rows = read_lines(path)[1:] if path.exists() else []  # the first step warms up
    busy = sum(row["step_seconds"] - row["teacher_wait_seconds"] for row in rows)
    if not busy:
        raise InputError(
            f"The student's speed is not known: give --student-tokens-per-second, or run some steps into "
            f"'{config.output_path}' first."
        )
    return sum(row["tokens"] for row in rows) / busy


def _rate(teacher, table: ExampleTable, support: Support) -> float:
    """Tokens a second of one warm replica, from rows of the data."""
    rows, tokens = [], 0
    for row in table:
        rows.append(row)
        tokens += len(row)
        if tokens >= _PROBE_TOKENS:
            break
    batches = [rows[i : i + 16] for i in range(0, len(rows), 16)]
    teacher.score(batches[0], support)
    began = time.perf_counter()
    for _ in teacher.stream(batches, support):
        pass
    return tokens / (time.perf_counter() - began)
