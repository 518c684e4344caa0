"""`rayk plan`: compute the number of teacher replicas that keep the student busy, and the network traffic.

The number of replicas is ⌈1.2 · student's tokens/s ÷ one replica's tokens/s⌉. With a fifth of spare capacity,
prefetching hides the teacher's latency; with too little capacity the student waits at every step.
"""

import math
import time
from dataclasses import dataclass

from rich.table import Table

from rayk.commands.console import two_columns
from rayk.config import RunConfig
from rayk.config.support import Support, bytes_per_token
from rayk.data.examples import ExampleTable
from rayk.data.views import RowViews
from rayk.errors import InputError
from rayk.models import load_model_config
from rayk.models.student import ParameterCount, count_planned_parameters
from rayk.report.run_directory import read_lines
from rayk.run import next_round, with_absolute_paths
from rayk.run.inputs import read_inputs
from rayk.run.synthesis_inputs import with_synthesized_rows
from rayk.teachers import Teacher, serve_teacher
from rayk.training import count_steps

_HEADROOM = 1.2
_PROBE_TOKENS = 40_000
_REQUEST_BYTES_PER_TOKEN = 4 + 1 / 8  # the token's id, and a bit for whether it is counted


@dataclass(frozen=True)
class Plan:
    """The teacher capacity that a run needs. Rates are tokens per second, without padding."""

    student_rate: float
    """Tokens per second of a student that never waits."""
    teacher_rate: float
    """Tokens per second that one replica scores."""
    replicas: int
    counted_share: float
    """Share of the tokens that are counted."""
    bytes_per_token: float
    """Bytes of a counted token's signal."""
    total_tokens: float
    """Tokens of the whole run."""
    size: ParameterCount
    """The student's parameters."""
    student_origin: str = "given"
    """Where `student_rate` comes from."""
    teacher_origin: str = "given"
    """Where `teacher_rate` comes from."""

    @property
    def bytes_per_second(self) -> float:
        """Network traffic between teachers and students, both ways, while the student does not wait."""
        return self.student_rate * (self.counted_share * self.bytes_per_token + _REQUEST_BYTES_PER_TOKEN)

    @property
    def seconds(self) -> float:
        """Training time if the student does not wait."""
        return self.total_tokens / self.student_rate

    def waiting_share(self, replicas: int) -> float:
        """Return the share of time that the student would wait with `replicas` replicas."""
        return max(0.0, 1 - replicas * self.teacher_rate / self.student_rate)


def plan(config: RunConfig, student_rate: float | None = None, teacher_rate: float | None = None) -> Plan:
    """Compute the plan of `config`'s run.

    Args:
        student_rate: tokens per second; by default measured from the run in the config's output directory.
        teacher_rate: tokens per second of one replica; by default a simulated engine's setting, otherwise measured on
            one replica that is deployed for this.

    Raises:
        InputError: the method needs no teacher signals, or the student's rate is neither given nor measured.
    """
    config, _ = next_round(with_absolute_paths(config))
    support: Support | None = config.signal_support
    if support is None:
        raise InputError(f"method.kind '{config.method.kind}' needs no signals of a teacher; there is nothing to plan.")
    if config.rollouts is not None or config.method.shown_demonstrations is not None:
        rows = "rows with demonstrations" if config.rollouts is None else "rollouts"
        raise InputError(
            f"method.kind '{config.method.kind}' learns from {rows}, whose lengths are not known in advance; plan a "
            "'logit_kd' run on rows of similar length instead."
        )
    teacher = next(teacher for teacher in config.teachers if teacher.name == config.evaluation_teacher)
    if teacher.model is None:
        raise InputError(f"Teacher '{teacher.name}' has no 'model' to plan for; set it beside 'attach'.")
    inputs = read_inputs(with_synthesized_rows(config), {})
    table = inputs.train
    assert table is not None
    student_origin = "given" if student_rate else "measured in the run of the output directory"
    teacher_origin = "given" if teacher_rate else "simulated" if teacher.engine.simulated_rate else "measured"
    student_rate = student_rate or _student_rate(config)
    teacher_rate = teacher_rate or teacher.engine.simulated_rate
    if teacher_rate is None:
        one = teacher.model_copy(update={"name": f"{teacher.name}-plan", "replicas": type(teacher.replicas)()})
        with serve_teacher(one) as served:
            teacher_rate = _measure_rate(served, table, support, inputs.views, teacher.name)
    model = load_model_config(teacher.model, trust_remote_code=teacher.trust_remote_code).get_text_config()
    steps = count_steps(config, len(table))
    return Plan(
        student_rate=student_rate,
        teacher_rate=teacher_rate,
        replicas=max(1, math.ceil(_HEADROOM * student_rate / teacher_rate)),
        counted_share=float(table.counted_tokens.sum() / table.lengths.sum()),
        bytes_per_token=bytes_per_token(support, model.vocab_size, model.hidden_size),
        total_tokens=steps * config.training.batch_size * float(table.lengths.mean()),
        size=count_planned_parameters(config.student, inputs.tokenizer),
        student_origin=student_origin,
        teacher_origin=teacher_origin,
    )


def _student_rate(config: RunConfig) -> float:
    """Return the rate of the run in the output directory, without its waiting time."""
    path = config.output_path / "metrics.jsonl"
    rows = read_lines(path)[1:] if path.exists() else []  # the first step includes warm-up
    busy = sum(row["step_seconds"] - row["teacher_wait_seconds"] for row in rows)
    if not busy:
        raise InputError(
            f"The student's speed is not known: give --student-tokens-per-second, or first train some steps in "
            f"'{config.output_path}'."
        )
    return sum(row["tokens"] for row in rows) / busy


def _measure_rate(teacher: Teacher, table: ExampleTable, support: Support, views: RowViews, name: str) -> float:
    """Return the student's tokens per second that one replica scores after a warm-up request.

    Args:
        name: the teacher's name in the settings; its rows may be in another tokenizer's tokens.
    """
    rows, tokens = [], 0
    for row in table:
        rows.append(views.align(row).view(name))
        tokens += len(row)
        if tokens >= _PROBE_TOKENS:
            break
    batches = [rows[i : i + 16] for i in range(0, len(rows), 16)]
    teacher.score(batches[0], support)
    started = time.perf_counter()
    for _ in teacher.stream(batches, support):
        pass
    return tokens / (time.perf_counter() - started)


def plan_table(plan: Plan) -> Table:
    """Return the plan as a table of names and numbers with units."""
    fewer = sorted({1, max(1, plan.replicas // 2), max(1, plan.replicas - 1)} - {plan.replicas})
    return two_columns(
        {
            "the student trains": str(plan.size),
            "student, never waiting": f"{plan.student_rate:,.0f} tokens/s ({plan.student_origin})",
            "one replica": f"{plan.teacher_rate:,.0f} tokens/s ({plan.teacher_origin})",
            "replicas": f"{plan.replicas}, with a fifth to spare",
            "the student would wait": ", ".join(f"with {count}: {plan.waiting_share(count):.0%}" for count in fewer),
            "a counted token": f"about {plan.bytes_per_token:,.0f} bytes; {plan.counted_share:.0%} of the tokens count",
            "network": f"{plan.bytes_per_second / 1e6:,.2f} MB/s, "
            f"{plan.bytes_per_second * plan.seconds / 1e9:,.2f} GB in total",
            "training": f"{plan.total_tokens / 1e6:,.2f} million tokens, about {plan.seconds / 60:,.1f} minutes",
        }
    )
