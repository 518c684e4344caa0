"""Estimate the rates of teachers and students on a cluster from the models' configurations alone.

A rate is the smaller one of what the GPUs can compute and what they can read from memory. The computed rate is a share
of the data sheet's peak in bfloat16 that is usually reached (`Efficiency`). Models in fewer bits are assumed to compute
no faster, only to fit on fewer GPUs.
"""

from dataclasses import dataclass

from rayk.config import RunConfig, TeacherConfig
from rayk.config.support import Support, bytes_per_token
from rayk.errors import InputError
from rayk.models.size import ModelSize, measure_size
from rayk.run.devices import Device

_PASS_TOKENS = 8192
"""Tokens of one forward pass of a teacher."""
_FREE_SHARE = 0.9
"""Share of a GPU's memory that a teacher's weights may take at most; the rest is for activations and the KV cache."""


@dataclass(frozen=True)
class Efficiency:
    """Shares of the peak rate in bfloat16 that are reached; estimates, not measured with rayk."""

    dense: float = 0.4
    """A dense teacher that scores rows."""
    mixture: float = 0.15
    """A teacher with a mixture of experts."""
    training: float = 0.4
    """The student."""


@dataclass(frozen=True)
class Capacity:
    """A run on a cluster. Rates are tokens per second, without padding.

    Attributes:
        teacher: the size of the teacher.
        student: the size of the student.
        teacher_gpus: GPUs of one replica.
        replicas: replicas that run beside the students.
        workers: training workers, each on one GPU.
        replica_rate: rate at which one replica scores.
        student_rate: rate of all workers if they never wait.
        most_replicas: replicas on all GPUs, for filling the cache ahead.
        most_workers: workers beside one replica, for training from the cache.
        signal_bytes: bytes of one counted token's signal.
        counted_share: share of the tokens that are counted.
        tokens: tokens of the training rows, each row once.
        epochs: passes over the rows.
    """

    teacher: ModelSize
    student: ModelSize
    teacher_gpus: int
    replicas: int
    workers: int
    replica_rate: float
    student_rate: float
    most_replicas: int
    most_workers: int
    signal_bytes: float
    counted_share: float
    tokens: float
    epochs: float

    @property
    def waiting_share(self) -> float:
        """The share of time that the student would wait for the replicas beside it."""
        return max(0.0, 1 - self.replicas * self.replica_rate / self.student_rate)

    @property
    def live_seconds(self) -> float:
        """Seconds of training with the teacher beside the student."""
        return self.epochs * self.tokens / min(self.student_rate, self.replicas * self.replica_rate)

    @property
    def cache_seconds(self) -> float:
        """Seconds in which the teacher, on all GPUs, scores all rows once."""
        return self.tokens / (self.most_replicas * self.replica_rate)

    @property
    def cached_seconds(self) -> float:
        """Seconds of training from the cache on all GPUs but those of one replica."""
        return self.epochs * self.tokens / (self.student_rate * self.most_workers / self.workers)

    @property
    def cache_bytes(self) -> float:
        """Size of the cache."""
        return self.tokens * self.counted_share * self.signal_bytes


def estimate_capacity(
    config: RunConfig, device: Device, gpus: int, *, tokens: float, counted_share: float = 1.0,
    row_tokens: float | None = None, efficiency: Efficiency = Efficiency(),
) -> Capacity:  # fmt: skip
    """Estimate what `gpus` GPUs of the type `device` can do in `config`'s run.

    Args:
        tokens: tokens of the training rows.
        counted_share: share of them that are counted.
        row_tokens: tokens of a row, on which the cost of attention depends; None: `data.max_tokens`.

    Raises:
        InputError: the method needs no signals, a model has no configuration, or the run does not fit on the GPUs.
    """
    support: Support | None = config.signal_support
    if support is None:
        raise InputError(f"method.kind '{config.method.kind}' needs no signals of a teacher; there is nothing to plan.")
    settings = next(teacher for teacher in config.teachers if teacher.name == config.evaluation_teacher)
    if settings.model is None or config.student.model is None:
        raise InputError("A plan from configurations needs teachers.model and student.model; set them.")
    length = row_tokens or config.data.max_tokens
    teacher = measure_size(settings.model, trust_remote_code=settings.trust_remote_code)
    student = measure_size(config.student.model, trust_remote_code=config.student.trust_remote_code)
    per_replica = max(1, round(settings.resources.num_gpus or settings.engine.gpus))
    _check_fit(settings, teacher, per_replica, device)
    workers, replicas = max(1, config.training.most_workers), settings.replicas.max
    if (needed := workers + replicas * per_replica) > gpus:
        raise InputError(
            f"The run needs {needed} GPUs ({workers} workers, and {replicas} replicas of {per_replica}), but --gpus is "
            f"{gpus}; lower training.workers or teachers.replicas."
        )
    share = efficiency.mixture if teacher.is_mixture else efficiency.dense
    compute = share * per_replica * device.teraflops * 1e12 / teacher.forward_flops(length)
    reading = _PASS_TOKENS * per_replica * device.gigabytes_per_second * 1e9 / teacher.weight_bytes
    peak = efficiency.training * workers * device.teraflops * 1e12
    return Capacity(
        teacher=teacher, student=student, teacher_gpus=per_replica, replicas=replicas, workers=workers,
        replica_rate=min(compute, reading),
        student_rate=peak / (_training_passes(config) * student.forward_flops(length)),
        most_replicas=gpus // per_replica, most_workers=max(1, gpus - per_replica),
        signal_bytes=bytes_per_token(support, teacher.vocab_size, teacher.width),
        counted_share=counted_share, tokens=tokens, epochs=config.training.epochs or 1.0,
    )  # fmt: skip


def _training_passes(config: RunConfig) -> float:
    """Return the cost of a step in forward passes: the backward pass costs two, without gradients of weights one."""
    recomputes = config.student.gradient_checkpointing
    return (2.0 if config.student.lora else 3.0) + bool(recomputes)


def _check_fit(teacher: TeacherConfig, size: ModelSize, gpus: int, device: Device) -> None:
    room = _FREE_SHARE * gpus * device.bytes
    if size.weight_bytes > room:
        needed = -(-size.weight_bytes // (_FREE_SHARE * device.bytes))
        raise InputError(
            f"Teacher '{teacher.name}' has {size.weight_bytes / 1e9:,.0f} GB of weights, but a replica's {gpus} GPUs "
            f"({device.name}) have room for {room / 1e9:,.0f} GB; give it at least {needed:.0f} GPUs "
            "(engine.tensor_parallel_size), or a checkpoint in fewer bits."
        )
