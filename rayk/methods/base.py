"""The interface of a method: `prepare` turns rows into an experience, `loss` computes what the student minimizes.

A method whose student generates completions derives from `OnPolicyMethod`, any other from `Method`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from rayk.config.support import LayerPart
from rayk.data.batches import Batch, collate
from rayk.data.examples import Example
from rayk.models import Head
from rayk.rollouts import Policy
from rayk.signals import batch as signal_batch
from rayk.signals.batch import SignalBatch
from rayk.teachers import Scorer


class StudentOutput(Protocol):
    """The head and the hidden states of the student, from which a loss on its distribution is computed."""

    @property
    def head(self) -> Head:
        """The final projection, hidden states to logits."""
        ...

    def hidden(self, batch: Batch) -> Tensor:
        """Return the final hidden states that predict the counted tokens, [tokens, width], with gradient."""
        ...


class Student(StudentOutput, Protocol):
    """The student as a method uses it: body and head of a causal LM, in training."""

    @property
    def layer_width(self) -> int:
        """Size of the states of a layer."""
        ...

    def layer_numbers(self, layers: int | Sequence[int]) -> list[int]:
        """Return the numbers of the layers, from 0: `layers` itself, or that many, spread evenly up to the last one."""
        ...

    @property
    def attention_widths(self) -> tuple[int, int, int]:
        """Sizes of the queries, keys and values of all heads of a layer."""
        ...

    def layer_states(
        self, batch: Batch, layers: Sequence[int], part: LayerPart = "output"
    ) -> tuple[Tensor, list[Tensor]]:
        """Return what `hidden` returns, and the states of `layers` at the same positions, [tokens, width] each, with
        gradient: their outputs, or their queries, keys and values, one after the other."""
        ...


class Workers(Protocol):
    """Collectives over the training workers; each must be called equally often on every worker."""

    def sums(self, values: list[float]) -> list[float]:
        """Return each number summed over the workers."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """Return the value of every worker."""
        ...


@dataclass(frozen=True)
class Experience:
    """A batch of rows with the teacher's signals: what one step trains on.

    It is split into micro-batches by row. A subclass whose loss has another unit than the token (a pair, a query)
    overrides `count`, `lengths`, `select` and `to`.
    """

    batch: Batch
    signals: SignalBatch | None = None
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    """Additional values that the method needs, one per counted token, [counted tokens] each."""
    auxiliary: "Experience | None" = None
    """A second experience whose mean loss is added to this one's in the same update."""
    skipped: int = 0
    """Number of rows left out because their signals are unusable."""

    @property
    def count(self) -> int:
        """Number of units in this experience (here counted tokens). The loss is averaged over the units of all
        workers."""
        return self.batch.counted_tokens

    @property
    def has_token_units(self) -> bool:
        """Whether the units are the counted tokens, row by row."""
        return type(self).count is Experience.count

    @property
    def offsets(self) -> Tensor:
        """int64 [sequences + 1]; sequence i has the units offsets[i]:offsets[i + 1]."""
        return self.batch.offsets

    @property
    def lengths(self) -> list[int]:
        """Number of tokens with padding of each unit that `select` can choose (here rows)."""
        return [len(sequence) for sequence in self.batch.sequences]

    def select(self, rows: list[int]) -> Self:
        """Return the given rows (or pairs, or queries), in the given order."""
        tokens = torch.cat([torch.arange(*self.batch.offsets[row : row + 2].tolist()) for row in rows])
        return replace(
            self,
            batch=self.batch.select(rows),
            signals=None if self.signals is None else self.signals.select(rows),
            columns={name: column[tokens] for name, column in self.columns.items()},
        )

    @classmethod
    def concatenate(cls, parts: Sequence["Experience"]) -> "Experience":
        """Return the rows of all `parts`, which one method prepared, in order; without auxiliary experiences."""
        first = parts[0]
        if len(parts) == 1:
            return first
        return cls(
            collate([row for part in parts for row in part.batch.sequences], first.batch.pad_id),
            None if first.signals is None else signal_batch.concatenate([p.signals for p in parts if p.signals]),
            {name: torch.cat([part.columns[name] for part in parts]) for name in first.columns},
        )

    def to(self, device: torch.device | str) -> Self:
        """Return the same experience on `device`."""
        return replace(
            self,
            batch=self.batch.to(device),
            signals=None if self.signals is None else self.signals.to(device),
            columns={name: column.to(device) for name, column in self.columns.items()},
        )


@dataclass(frozen=True)
class Loss:
    """The loss of an experience, before it is averaged."""

    per_token: Tensor
    """Loss of each unit (token, pair or query), [count], with gradient."""
    terms: dict[str, Tensor] = field(default_factory=dict)
    """Values for the metrics, [count] each; their means are recorded at every step."""
    unusable: Tensor | None = None
    """True at units that must not be trained on, bool [count]: their loss is left out, and `training.unusable_rows`
    decides whether the run stops."""


class Method(ABC):
    """Base of all methods.

    Args:
        settings: the settings in section `method`.
        teacher: computes signals with `await teacher.ascore(batch, support)`; None without a teacher.
        policy: generates with the student's weights; None unless the method is an `OnPolicyMethod`.
    """

    kind: ClassVar[str] = "custom"
    summary: ClassVar[str] = ""
    """One line for `rayk methods`."""
    paper: ClassVar[str] = ""
    needs: ClassVar[str] = ""
    """The signals that the method requests from a teacher, with their size per token."""
    uses_dropout: bool = True
    """Whether the student is trained with its dropout; false if the loss compares the student's log-probs with others
    of the same weights, which are computed without dropout."""

    def __init__(self, settings: Any, teacher: Scorer | None, policy: Policy | None = None):
        self.settings = settings
        self.teacher = teacher

    @property
    def trains_in_stages(self) -> bool:
        """Return whether some trained weights have no part in the loss of some steps."""
        return False

    def start(self, student: Student) -> None:  # noqa: B027
        """Create what depends on the student, such as `modules` of its width; by default nothing.

        Runs once on every worker, before `modules`, with torch's random numbers seeded by the run's seed.
        """

    def precompute(  # noqa: B027
        self, student: Student, batches: Iterable[Batch], gather: Callable[[Any], list[Any]]
    ) -> None:  # fmt: skip
        """Compute values that need the initial student, e.g. reference log-probs; by default nothing.

        Runs once before the first update, on every worker, without gradients. A resumed run does not repeat it, so
        results that are needed later belong in `state_dict`.

        Args:
            batches: this worker's share of all training rows; each answer of a preference pair is a row.
            gather: returns the values of all workers; a collective, so call it equally often on every worker.
        """

    @abstractmethod
    async def prepare(self, batch: Batch) -> Experience:
        """Return the experience of a batch, e.g. with the teacher's signals.

        Runs on a background event loop, `training.prefetch` steps ahead of training.

        Raises:
            UnusableSignal: signals of some rows are unusable. With `training.unusable_rows: skip` the caller removes
                these rows and prepares the remaining ones.
        """

    def synchronize(self, experience: Experience, workers: Workers, step: int) -> Experience:
        """Add columns that need all workers or the step, e.g. global reward moments; by default none.

        Runs in the training loop, before the loss, on every worker.

        Args:
            step: number of finished optimizer steps.
        """
        return experience

    async def prepare_auxiliary(self, batch: Batch) -> Experience:
        """Return the experience of a batch of `settings.auxiliary_data`; by default as `prepare`."""
        return await self.prepare(batch)

    @abstractmethod
    def loss(self, student: Student, experience: Experience) -> Loss:
        """Return the loss of one micro-batch.

        Runs inside the forward pass of the wrapped student, so that DDP and FSDP see the gradients of the head.
        """

    def modules(self) -> nn.Module | None:
        """Return the method's own modules, which train with the student; by default none."""
        return None

    def on_step(self, step: int) -> None:  # noqa: B027
        """Called after each optimizer step, with the number of finished steps."""

    def on_evaluation(self, metrics: Mapping[str, float]) -> None:  # noqa: B027
        """Called after each evaluation, with its metrics."""

    def state_dict(self) -> dict[str, Any]:
        """Return the method's state for a checkpoint: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Restore the state that `state_dict` returned."""


class OnPolicyMethod(Method):
    """Base of methods whose student generates completions while it is trained (section `rollouts`).

    A step runs `sample`, `prepare`, `synchronize`, and one update for each experience of `updates`.
    """

    def __init__(self, settings: Any, teacher: Scorer | None, policy: Policy | None = None):
        super().__init__(settings, teacher)
        self._policy = policy

    @property
    def policy(self) -> Policy:
        """The policy, which generates completions with the student's weights; use it in `sample` and `groups` only."""
        assert self._policy is not None
        return self._policy

    @property
    def distance(self) -> str:
        """The term of the loss that measures the student's distance from the teacher; the metrics contain its mean over
        each quarter of the completions. By default the loss itself."""
        return "loss"

    @property
    def minimum_rows(self) -> int:
        """Number of rows that each worker needs in a step, after rows with unusable signals are removed."""
        return 1

    def groups(self, batch: Batch, seeds: Sequence[int], progress: float) -> list[list[int]]:
        """Split the rows into groups; `sample` is called once per group. By default a group is a batch of the policy.

        Teachers score a group while the next one is generated.
        """
        return self.policy.groups(batch.sequences)

    async def sample(self, batch: Batch, seeds: Sequence[int], progress: float) -> Batch:
        """Return the rows that the step trains on; by default the student generates the completion of every row.

        Runs before `prepare`, while the policy has the weights of the step.

        Args:
            seeds: one per row; every random choice must depend on these alone.
            progress: share of the run's steps before this one, in [0, 1).
        """
        prompts = [row for row in batch.sequences if isinstance(row, Example)]
        return collate(await self.policy.generate(prompts, self.policy.parameters, seeds), batch.pad_id)

    def updates(self, experience: Experience, seed: int) -> Iterable[Experience]:
        """Return the experience of each optimizer update of the step; by default one update with all rows. Every worker
        must return the same number."""
        return [experience]
