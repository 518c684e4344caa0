"""The protocol of a way of learning: `sample` has the policy write, `prepare` turns rows into an experience, `loss`
says what is learned from it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from rayk.data.batches import Batch, collate
from rayk.data.demonstrations import Demonstrator
from rayk.models import Head
from rayk.rollouts import Policy
from rayk.signals.batch import SignalBatch, concatenate
from rayk.teachers import Scorer


class Student(Protocol):
    """What a method sees of the model that learns."""

    @property
    def head(self) -> Head: ...

    def hidden(self, batch: Batch) -> Tensor:
        """Final hidden states that predict the counted tokens, [tokens, width]."""
        ...


@dataclass(frozen=True)
class Experience:
    """What one step learns from: rows, and what was said about them. It can be cut into micro-batches by row; a
    method's own kind of it may keep several rows together."""

    batch: Batch
    signals: SignalBatch | None = None
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    """What a method has made of each counted token, [counted tokens] each."""
    beside: "Experience | None" = None
    """Learned from in the same update, its loss averaged over its own units."""
    skipped: int = 0
    """Rows left out, since nothing could be learned from what was said about them."""

    @property
    def count(self) -> int:
        """Units the loss is averaged over, summed across micro-batches and workers: counted tokens."""
        return self.batch.counted_tokens

    @property
    def lengths(self) -> list[int]:
        """Tokens of each part that `select` can choose, its rows padded to the longest of them."""
        return [len(sequence) for sequence in self.batch.sequences]

    def select(self, rows: list[int]) -> "Experience":
        tokens = torch.cat([torch.arange(*self.batch.offsets[row : row + 2].tolist()) for row in rows])
        return replace(
            self,
            batch=self.batch.select(rows),
            signals=None if self.signals is None else self.signals.select(rows),
            columns={name: column[tokens] for name, column in self.columns.items()},
        )

    @classmethod
    def joined(cls, parts: Sequence["Experience"]) -> "Experience":
        """The rows of all `parts` (of one method), in order; what may stand beside them is not theirs yet."""
        first = parts[0]
        if len(parts) == 1:
            return first
        return cls(
            collate([row for part in parts for row in part.batch.sequences], first.batch.pad_id),
            None if first.signals is None else concatenate([part.signals for part in parts if part.signals]),
            {name: torch.cat([part.columns[name] for part in parts]) for name in first.columns},
        )

    def to(self, device: torch.device | str) -> "Experience":
        return replace(
            self,
            batch=self.batch.to(device),
            signals=None if self.signals is None else self.signals.to(device),
            columns={name: column.to(device) for name, column in self.columns.items()},
        )


@dataclass(frozen=True)
class Loss:
    """The loss of each unit (token, pair or query), nats [count], and the terms it is made of, for the metrics."""

    per_token: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    unusable: Tensor | None = None
    """Units that nothing can be learned from any more, bool [count]: their loss is left out, and `training.
    unusable_rows` says what follows."""


class Method(ABC):
    """A way of learning. One file an implementation; `rayk.methods.METHODS` lists them."""

    kind: ClassVar[str]
    summary: ClassVar[str]
    """One line for `rayk methods`."""
    paper: ClassVar[str]
    needs: ClassVar[str]
    """What it asks of a teacher, with the cost."""

    def __init__(
        self, settings: Any, teacher: Scorer | None, policy: Policy | None = None,
        demonstrator: Demonstrator | None = None,
    ):  # fmt: skip
        self.settings = settings
        self.teacher = teacher
        self.policy = policy
        """Who writes, where the run has `rollouts`; for `sample` alone, whose turn it is."""
        self.demonstrator = demonstrator
        """Who shows rows demonstrations, with method `in_context`."""

    @property
    def fewest_rows(self) -> int:
        """How many rows each worker needs of a step, after those that nothing can be learned from are left out."""
        return 1

    def groups(self, batch: Batch, seeds: Sequence[int], progress: float) -> list[list[int]]:
        """The rows that `sample` is to see at a time, each in one group; a group's teachers are asked while the next is
        written. By default all at once."""
        return [list(range(batch.rows))]

    def look_at_start(self, student: Student, batches: Iterable[Batch]) -> Any:
        """What has to be known of the student before its first update; by default nothing. Runs once in a run, on every
        worker: a resumed one does not ask again, so what must last belongs in `state_dict`.

        Args:
            batches: this worker's share of all that the run will learn from, each answer of a preference pair as a row
                of its own.
        """
        return None

    def on_start(self, seen: Sequence[Any]) -> None:  # noqa: B027
        """Called after `look_at_start` with what all workers have seen."""

    async def sample(self, batch: Batch, seeds: Sequence[int], progress: float) -> Batch:
        """The rows that the step learns from, for methods that have the policy write them or draw something to each; by
        default the data's.

        Runs before `prepare`, where there is a policy while it holds the weights promised to the step.

        Args:
            seeds: one a row, all that its random choices may depend on.
            progress: the share of the run's steps that come before this one.
        """
        return batch

    @abstractmethod
    async def prepare(self, batch: Batch) -> Experience:
        """Rows to experience: asks teachers. Runs ahead of the training step, on the background event loop.

        Raises:
            UnusableSignal: nothing can be learned from some rows; where the settings say so, the caller leaves them out
                and prepares the rest.
        """

    def together(self, experience: Experience, sums: Callable[[list[float]], list[float]]) -> Experience:
        """The experience with what takes all workers to know; by default as it is. Runs on every worker at once.

        Args:
            sums: each number summed over the workers.
        """
        return experience

    def updates(self, experience: Experience, seed: int) -> Iterable[Experience]:
        """What each optimiser update of the step learns from, as many on every worker; by default one, from all."""
        return [experience]

    @abstractmethod
    def loss(self, student: Student, experience: Experience) -> Loss:
        """The loss of one micro-batch. Runs inside the wrapped student's forward, so that DDP and FSDP see the head."""

    def modules(self) -> nn.Module | None:
        """Modules of the method's own that train with the student."""
        return None

    def on_step(self, step: int) -> None:  # noqa: B027
        """Called after each optimiser step."""

    def on_evaluation(self, metrics: Mapping[str, float]) -> None:  # noqa: B027
        """Called after each evaluation, with its numbers."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold beside the student: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Take up what `state_dict` gave."""
