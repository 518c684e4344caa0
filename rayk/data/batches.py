"""Batches as padded tensors, sampling of the rows of each step and rank, and grouping of rows into micro-batches."""

import datetime
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from rayk.config import DataConfig, DataSource
from rayk.data.sources import Row, read_rows
from rayk.data.tokenizing import RowTokenizer, build_table
from rayk.errors import InputError
from rayk.signals.sequence import TokenSequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences as right-padded tensors.

    Attributes:
        input_ids: int64 [rows, length].
        attention_mask: int64 [rows, length], 1 at tokens, 0 at padding; computed from lengths, because the padding id
            may be EOS.
        counted_mask: bool [rows, length], True at the counted tokens.
        targets: int64 [tokens], the counted tokens, row by row.
        offsets: int64 [rows + 1]; row r's counted tokens are targets[offsets[r]:offsets[r + 1]].
        positions: int64 [tokens], the position that predicts each counted token, in the flattened [rows * length].
        sequences: the rows without padding, as teachers score them.
        pad_id: the token id after the end of shorter rows.
        tokenizer: the tokenizer of the ids, with which teachers compare their own; None where a run has compared them.
    """

    input_ids: Tensor
    attention_mask: Tensor
    counted_mask: Tensor
    targets: Tensor
    offsets: Tensor
    positions: Tensor
    sequences: list[TokenSequence]
    pad_id: int
    tokenizer: Any = field(default=None, repr=False, compare=False)

    @property
    def rows(self) -> int:
        return len(self.sequences)

    @property
    def counted_tokens(self) -> int:
        """Number of counted tokens."""
        return len(self.targets)

    def counted(self, x: Tensor) -> Tensor:
        """Return the entries of x [rows, length, ...] that predict the counted tokens, [tokens, ...], row by row.

        The token at position t is predicted at t - 1.

        Raises:
            ValueError: x has another shape.
        """
        if x.shape[:2] != self.input_ids.shape:
            raise ValueError(f"x must begin with {list(self.input_ids.shape)} [rows, length], not {list(x.shape)}")
        return x.flatten(0, 1).index_select(0, self.positions)

    def select(self, rows: Sequence[int]) -> "Batch":
        """Return the given rows, in the given order, padded to the longest of them."""
        chosen = collate([self.sequences[row] for row in rows], self.pad_id, self.tokenizer)
        return chosen.to(self.input_ids.device)

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on `device`."""
        names = ("input_ids", "attention_mask", "counted_mask", "targets", "offsets", "positions")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def collate(examples: Iterable[TokenSequence], pad_id: int, tokenizer: Any = None) -> Batch:
    """Return a batch of at least one example, on the CPU; `tokenizer` is that of its ids (`Batch.tokenizer`)."""
    sequences = list(examples)
    assert sequences, "a batch needs at least one row"
    lengths = np.array([len(sequence) for sequence in sequences])
    present = np.arange(lengths.max()) < lengths[:, None]
    ids = np.full(present.shape, pad_id, dtype=np.int64)
    ids[present] = np.concatenate([sequence.input_ids for sequence in sequences])
    counted = np.zeros(present.shape, dtype=np.bool_)
    counted[present] = np.concatenate([sequence.counted for sequence in sequences])
    return Batch(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(present.astype(np.int64)),
        counted_mask=torch.from_numpy(counted),
        targets=torch.from_numpy(ids[counted]),
        offsets=torch.from_numpy(np.concatenate(([0], np.cumsum(counted.sum(1))))),
        positions=torch.from_numpy(np.flatnonzero(counted) - 1),  # never -1: position 0 is not counted
        sequences=sequences,
        pad_id=pad_id,
        tokenizer=tokenizer,
    )


class BatchSampler:
    """Choose the rows of each step: one permutation per epoch, concatenated and cut into equal batches.

    Stateless: the rows of a step depend only on (seed, step), so a resumed run continues exactly, with any number of
    workers. A batch may contain rows of two epochs.

    Args:
        lengths: tokens of each row of the data.
        batch_size: rows of a step, over all ranks.
        seed: a non-negative number.
        steps: number of batches.
        samples: how often a step contains each of its rows; `batch_size` must be a multiple of it.
        renews: whether each epoch has other rows: row r of epoch e has the number e · len(lengths) + r.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        batch_size: int,
        seed: int,
        steps: int,
        *,
        samples: int = 1,
        renews: bool = False,
    ) -> None:
        if len(lengths) == 0:
            raise InputError("The data has no rows to make batches of; give at least one.")
        self.lengths = np.asarray(lengths)
        self.batch_size, self.seed, self.steps = batch_size, seed, steps
        self._samples, self._renews = samples, renews
        self._permutations: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self.rows(step) for step in range(self.steps))

    def epochs(self, steps: int) -> float:
        """Return the number of passes over the data in `steps` steps."""
        return steps * self.batch_size / self._samples / len(self.lengths)

    def rows(self, step: int) -> np.ndarray:
        """Return the rows of step `step` (from 0), int64 [batch_size]."""
        total = len(self.lengths)
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size) // self._samples
        epochs, within = np.divmod(positions, total)
        parts = [self._permutation(int(epoch))[within[epochs == epoch]] for epoch in np.unique(epochs)]
        return np.concatenate(parts) + (epochs * total if self._renews else 0)

    def share(self, step: int, rank: int, world: int) -> np.ndarray:
        """Return the rows of `step` for rank `rank` of `world`, int64, longest first.

        Raises:
            InputError: there are more ranks than rows in a batch.
        """
        return self.rows(step)[self.share_positions(step, rank, world)]

    def share_positions(self, step: int, rank: int, world: int) -> np.ndarray:
        """Return the positions in `rows(step)` of the rows of `share`; a row that occurs twice has two positions.

        Rows are assigned from the longest to the shortest, to ranks 0, 1, …, world − 1, world − 1, …, 1, 0, 0, 1, …, so
        that ranks have nearly equal numbers of tokens.

        Raises:
            InputError: there are more ranks than rows in a batch.
        """
        if self.batch_size < world:
            raise InputError(
                f"training.batch_size is {self.batch_size}, but there are {world} workers and each requires a "
                f"row; raise the batch size or lower training.workers."
            )
        by_length = np.argsort(-self.lengths[self.rows(step) % len(self.lengths)], kind="stable")
        pass_number, position = np.divmod(np.arange(len(by_length)), world)
        return by_length[np.where(pass_number % 2 == 0, position, world - 1 - position) == rank]

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._permutations:
            # numpy guarantees the raw stream in all versions, but not the result of Generator.permutation
            raw = np.random.Philox(np.random.SeedSequence([self.seed, epoch])).random_raw(len(self.lengths))
            # A batch can contain rows of two epochs, so the previous permutation stays in memory.
            previous = {last: self._permutations[last] for last in (epoch - 1,) if last in self._permutations}
            self._permutations = previous | {epoch: np.argsort(raw, kind="stable")}
        return self._permutations[epoch]


def micro_batches(lengths: Sequence[int] | np.ndarray, max_tokens: int) -> list[list[int]]:
    """Group rows so that the padded size of a group, rows times longest, is at most `max_tokens`; longest rows first.

    A row longer than `max_tokens` is a group of its own. Every row is in exactly one group.
    """
    groups: list[list[int]] = []
    longest = 0
    for row in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        if not groups or (len(groups[-1]) + 1) * longest > max_tokens:
            groups.append([])
            longest = int(lengths[row])
        groups[-1].append(row)
    return groups


def get_pad_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the tokenizer's padding id, or EOS if it has none: masks are computed from lengths, so both work."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def make_batches(
    rows: Iterable[Mapping[str, Any]] | DataSource | str,
    tokenizer: "PreTrainedTokenizerBase",
    batch_size: int,
    *,
    shuffle_seed: int | None = None,
    max_prompt_tokens: int = 1024,
    max_tokens: int = 2048,
    too_long: Literal["error", "skip", "truncate"] = "error",
    chat_template: bool | str = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    chat_template_date: datetime.date | None = None,
    prompts_only: bool = False,
    **source_settings: Any,
) -> list[Batch]:
    """Tokenize rows and return them in batches, for a training loop of your own; the last batch may be smaller.

    Args:
        rows: dicts, a source, or the path of a source.
        tokenizer: the student's tokenizer.
        batch_size: rows per batch.
        shuffle_seed: seed of the order of the rows; None keeps their order.
        max_prompt_tokens, max_tokens, too_long, chat_template, chat_template_kwargs: see `DataConfig`.
        chat_template_date: the date that a chat template with today's date prints; None: today.
        source_settings: fields of `DataSource`, such as `prompt_field="question"`; not allowed with a `DataSource`.

    Raises:
        InputError: rows cannot be read, lack required fields, or are too long.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; give at least 1.")
    if isinstance(rows, DataSource) and source_settings:
        raise InputError(f"{', '.join(source_settings)} cannot be given together with a DataSource; set them in it.")
    try:
        path = rows if isinstance(rows, str) else "rows"
        source = rows if isinstance(rows, DataSource) else DataSource(path=path, **source_settings)
        data = DataConfig(
            train=source,
            max_prompt_tokens=max_prompt_tokens,
            max_tokens=max_tokens,
            too_long=too_long,
            chat_template=chat_template,
            chat_template_kwargs=dict(chat_template_kwargs or {}),
            chat_template_date=chat_template_date,
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{'.'.join(map(str, first['loc'])) or 'make_batches'}: {first['msg']}.") from error
    source_rows = read_rows(source) if isinstance(rows, DataSource | str) else _number_rows(rows)
    row_tokenizer = RowTokenizer(source, data, tokenizer, prompts_only=prompts_only, section="")
    if source.random_offset:
        raise InputError("random_offset changes the rows of each pass of a run; leave it out.")
    table = build_table(row_tokenizer, source_rows, source.path)
    order = np.arange(len(table))
    if shuffle_seed is not None:
        order = BatchSampler(table.lengths, len(table), shuffle_seed, 1).rows(0)
    starts = range(0, len(order), batch_size)
    pad_id = get_pad_id(tokenizer)
    return [collate([table[i] for i in order[start : start + batch_size]], pad_id, tokenizer) for start in starts]


def _number_rows(rows: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    for number, fields in enumerate(rows, start=1):
        if not isinstance(fields, Mapping):
            raise InputError(f"Row {number} is a {type(fields).__name__}, not a mapping of fields; give dicts.")
        yield Row(fields, f"row {number}")
