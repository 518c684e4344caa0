"""Demonstrations: solved examples of a row's task placed before it, from which a model infers the task.

The layout is MetaICL's (Min et al. 2022, arXiv 2110.15943; `metaicl/data.py`), with ⏎ for its separators:

    input_1 ⏎ output_1 ⏎⏎⏎ … input_k ⏎ output_k ⏎⏎⏎ input ⏎ | output

Inputs, outputs and separators are tokenized separately, so an output has the same tokens in a demonstration as where it
is trained on. A tokenizer that puts a space before each text (Llama 2) puts it before the first input only. A context
that is too long is truncated at its beginning. The output of a row with options is counted without an end-of-sequence
token, as in MetaICL; the output of any other row is counted with it.

Teacher and student may read different numbers of demonstrations: the student reads the last ones of the teacher's. The
student's text is then the end of the teacher's text, so any token of it can be counted for both
(`DemonstratedRow.full_text`).
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import nlargest
from typing import TYPE_CHECKING

import numpy as np

from rayk.config import DemonstrationsConfig, MethodSettings
from rayk.data.examples import EVERY_TEACHER, Example, ExampleTable
from rayk.data.nearest import Embedder, bm25_scores, top_indices
from rayk.data.text_encoder import TextEncoder
from rayk.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class DemonstratedRow(Example):
    """A row with demonstrations before it: the student's in `input_ids`, the teachers' in `contexts`.

    Attributes:
        counted: True at the tokens of the output.
        options: the token ids of each possible output, int32 [length] each; empty if the output is free text.
        gold: the index of the row's output among the options.
        prefix_tokens: number of leading special tokens (BOS).
        teacher_prefix: what teachers read before the student's text, int32 [length].
        hard_label_weight: α of the step that trains on the row.
    """

    options: tuple[np.ndarray, ...] = ()
    gold: int = 0
    prefix_tokens: int = 0
    teacher_prefix: np.ndarray | None = None
    hard_label_weight: float = 1.0

    @property
    def alternatives(self) -> list[Example]:
        """Copies of the row, each with one of the options as the counted output."""
        return [_with_output(self, self.prompt_ids, option, self.contexts) for option in self.options]

    @property
    def full_text(self) -> Example:
        """The row with all tokens that the student reads counted, including demonstrations and input."""
        first = max(1, self.prefix_tokens)
        prefix = np.empty(0, np.int32) if self.teacher_prefix is None else self.teacher_prefix
        context = np.concatenate([prefix, self.input_ids[self.prefix_tokens : first]])
        counted = np.arange(len(self)) >= first
        return Example(self.input_ids, counted, None, first, self.where, self.fields, contexts={EVERY_TEACHER: context})


class DemonstrationPool:
    """Select demonstrations from a pool of rows, and place them before other rows.

    Args:
        rows: the pool, prompt/completion rows.
        settings: the settings of method `in_context`.
        tokenizer: the student's; the pool was tokenized with it.
        max_tokens: maximum number of tokens of a row with its demonstrations.
    """

    def __init__(
        self, rows: ExampleTable, settings: MethodSettings, tokenizer: "PreTrainedTokenizerBase", max_tokens: int
    ):
        assert settings.shown_demonstrations is not None
        self.settings: DemonstrationsConfig = settings.shown_demonstrations
        self.num_student_demonstrations = settings.num_student_demonstrations
        self.requires_options = settings.requires_options
        # Training on label words compares options by their total log-prob; otherwise evaluation follows MetaICL and
        # compares their mean log-prob per token.
        self.normalizes_by_length = not self.requires_options
        self.max_tokens = max_tokens
        self.rows = rows
        self._method = settings
        self._encoder = TextEncoder(tokenizer)
        self._output_separator, self._separator = map(
            _array, self._encoder.continuations([self.settings.output_separator, self.settings.separator])
        )
        self._by_task: dict[str, list[int]] = defaultdict(list)
        self._by_input: dict[bytes, list[int]] = defaultdict(list)
        for index, row in enumerate(rows):
            self._by_task[self.task(row)].append(index)
            self._by_input[self.input_key(row)].append(index)
        self._nearest: dict[bytes, list[int]] = {}

    def add_demonstrations(self, row: Example, seed: int, progress: float = 0.0) -> DemonstratedRow:
        """Return `row` with the demonstrations of a training step; a row that has demonstrations is returned unchanged.

        Args:
            seed: seed of the random selection.
            progress: share of the run's steps before this one, in [0, 1), from which α is computed.

        Raises:
            InputError: as `check`.
        """
        if isinstance(row, DemonstratedRow):
            return row
        return self.place_demonstrations(row, self.select(row, seed), self._method.hard_label_weight_at(progress))

    def add_evaluation_demonstrations(self, row: Example, draw: int) -> DemonstratedRow:
        """Return `row` with the demonstrations of evaluation draw number `draw`, which are the same in every run."""
        content = int.from_bytes(self.input_key(row))
        seed = int(np.random.SeedSequence([draw, content]).generate_state(1, np.uint64)[0])
        return self.place_demonstrations(row, self.select(row, seed))

    def place_demonstrations(
        self, row: Example, indices: Sequence[int], hard_label_weight: float = 1.0
    ) -> DemonstratedRow:
        """Return `row` with the pool's rows at `indices` before it, in this order.

        Raises:
            InputError: as `check`.
        """
        return self._lay_out(row, [self.rows[index] for index in indices], hard_label_weight)

    def _lay_out(
        self, row: Example, demonstrations: Sequence[Example], hard_label_weight: float = 1.0
    ) -> DemonstratedRow:
        options = self.option_ids(row)
        output = self._output(row, with_eos=not options)
        gold = next((index for index, option in enumerate(options) if np.array_equal(option, output)), None)
        if options and gold is None:
            raise InputError(
                f"{row.where}: the output is none of the options in its field '{self.settings.options_field}'; correct "
                "the row."
            )
        room = self.max_tokens - max(len(ids) for ids in (output, *options))
        prefix = _array(self._encoder.prefix)
        room -= len(prefix)
        shown = demonstrations[-self.settings.k :] if self.settings.k else []
        split = max(0, len(shown) - self.num_student_demonstrations)
        student_text = self._context(shown[split:], row, room)
        teacher_context = np.concatenate([prefix, self._context(shown, row, room)])
        before = _last(self._demonstrations(shown[:split]), room - len(student_text))
        return DemonstratedRow(
            **vars(_with_output(row, np.concatenate([prefix, student_text]), output, {EVERY_TEACHER: teacher_context})),
            options=tuple(options), gold=gold or 0, prefix_tokens=len(prefix),
            teacher_prefix=np.concatenate([prefix, before]), hard_label_weight=hard_label_weight,
        )  # fmt: skip

    def check(self, row: Example) -> None:
        """Check that demonstrations can be placed before `row`.

        Raises:
            InputError: the row's options are missing although required, or do not include its output; it has no input
                separate from its output; it is too long; or the pool has no other input of its task.
        """
        if self.settings.k and not self.num_candidates(row):
            raise InputError(
                f"{row.where} has task '{self.task(row)}', and there is no other input of that task to show before it; "
                "give more rows of the task, set method.demonstrations.pool, or set method.demonstrations.k to 0."
            )
        self._lay_out(row, [])

    def task(self, row: Example) -> str:
        """Return the name of the row's task; "" if it has none."""
        return str(row.fields.get(self.settings.task_field, ""))

    def input_key(self, row: Example) -> bytes:
        """Return a hash of the row's task and input."""
        digest = hashlib.blake2b(self.task(row).encode(), digest_size=16)
        digest.update(self._input(row).astype("<i4").tobytes())
        return digest.digest()

    def option_ids(self, row: Example) -> list[np.ndarray]:
        """Return the token ids of each of the row's options, int32 [length] each; empty if it has none.

        Raises:
            InputError: the options are not a list of at least two different texts, or are missing although required.
        """
        field = self.settings.options_field
        options = row.fields.get(field) or []
        if not options and not self.requires_options:
            return []
        are_texts = isinstance(options, list) and all(isinstance(option, str) and option for option in options)
        if not are_texts or len(set(options)) < max(2, len(options)):
            raise InputError(
                f"{row.where} has no list of at least two different texts in its field '{field}', which "
                "method.targets 'label_words' compares; correct the row, set method.demonstrations.options_field, or "
                "set method.targets to 'tokens'."
            )
        return [_array(ids) for ids in self._encoder.continuations(options)]

    def select(self, row: Example, seed: int) -> list[int]:
        """Return the indices of the pool's rows to place before `row`, in this order."""
        if not self.settings.k:
            return []
        if self.settings.choice != "random":
            return self._nearest[self.input_key(row)]
        return self.select_random(row, seed)

    def select_random(self, row: Example, seed: int) -> list[int]:
        """Return the indices of up to k random rows of the pool with the task of `row` and another input."""
        task, same_input = self._by_task.get(self.task(row), []), self._by_input.get(self.input_key(row), [])
        count = min(self.settings.k, len(task) - len(same_input))
        # numpy guarantees the raw stream in all versions, but not its other methods. 2 is the number of this stream.
        numbers = np.random.Philox(np.random.SeedSequence([seed, 2]))
        selected: dict[int, None] = {}
        while len(selected) < count:
            index = task[int(numbers.random_raw()) % len(task)]
            if index not in same_input:
                selected[index] = None
        return list(selected)

    def rank_nearest(self, rows: Iterable[Example], encoder: str | None = None) -> None:
        """Find the nearest demonstrations of `rows` in advance, for `select`; nothing if the choice is `random`.

        Args:
            encoder: folder of the encoder that was trained for choice `learned`.
        """
        if self.settings.choice == "random" or not self.settings.k:
            return
        encoder = encoder or self.settings.encoder
        for row, indices in self.nearest(rows, self.settings.k, Embedder(encoder) if encoder else None):
            self._nearest[self.input_key(row)] = indices[::-1]

    def nearest(
        self, rows: Iterable[Example], count: int, embedder: Embedder | None = None
    ) -> Iterator[tuple[Example, list[int]]]:
        """Yield each different input of `rows` with the indices of the pool's nearest rows, nearest first: by BM25 over
        inputs, or by the cosine of the embedder's vectors."""
        for task, queries in self._unique_by_task(rows).items():
            indices = self._by_task[task]
            candidates = [self.rows[index] for index in indices]
            inputs = [self._input(row) for row in queries]
            if embedder is None:
                scores = bm25_scores([self._input(row) for row in candidates], inputs)
            else:
                encode = self._input_and_output if embedder.settings.outputs else self._input
                scores = embedder.scores(self._decode(map(encode, candidates)), self._decode(inputs))
            for row, row_scores in zip(queries, scores, strict=True):
                row_scores[np.isin(indices, self._by_input.get(self.input_key(row), []))] = -np.inf
                best = top_indices(row_scores, min(count, self.num_candidates(row)))
                yield row, [indices[place] for place in best]

    def unique_inputs(self, rows: Iterable[Example]) -> list[Example]:
        """Return the first of the rows with each input."""
        return [row for unique in self._unique_by_task(rows).values() for row in unique]

    @property
    def demonstration_texts(self) -> list[str]:
        """The text of each row of the pool as a demonstration (input and output), without the separator after it."""
        return self._decode(map(self._input_and_output, self.rows))

    def texts(self, row: Example) -> tuple[str, str]:
        """Return the text of a row's input and the text of its output."""
        input_text, output_text = self._decode([self._input(row), self._output(row, with_eos=False)])
        return input_text, output_text

    def label(self, row: Example) -> tuple[str, frozenset[str], str] | None:
        """Return the task, the options and the output of a row; None if it has no options. Rows with equal task and
        options belong to one classification problem."""
        if not self.option_ids(row):
            return None
        options = frozenset(row.fields[self.settings.options_field])
        return self.task(row), options, self._decode([self._output(row, with_eos=False)])[0]

    def num_candidates(self, row: Example) -> int:
        """Return the number of rows of the pool that can be placed before `row`."""
        return len(self._by_task.get(self.task(row), [])) - len(self._by_input.get(self.input_key(row), []))

    def max_length(self, rows: Sequence[Example]) -> int:
        """Return an upper bound on the number of tokens of any of `rows` with its demonstrations."""
        demonstrations = {
            task: sum(nlargest(self.settings.k, (self._max_demonstration(self.rows[index]) for index in indices)))
            for task, indices in self._by_task.items()
        }
        longest = 0
        for row in rows:
            bare = self._lay_out(row, [])
            output = max(bare.counted_tokens, *map(len, bare.options), 0)
            longest = max(longest, demonstrations.get(self.task(row), 0) + bare.prompt_tokens + output)
        return min(self.max_tokens, longest)

    def _decode(self, texts: Iterable[np.ndarray]) -> list[str]:
        return [str(self._encoder.tokenizer.decode(ids)) for ids in texts]

    def _unique_by_task(self, rows: Iterable[Example]) -> Mapping[str, list[Example]]:
        """Return the first of the rows with each input, by task."""
        unique: dict[str, dict[bytes, Example]] = defaultdict(dict)
        for row in rows:
            unique[self.task(row)].setdefault(self.input_key(row), row)
        return {task: list(inputs.values()) for task, inputs in unique.items()}

    def _context(self, demonstrations: Sequence[Example], row: Example, room: int) -> np.ndarray:
        """Return the tokens between the prefix and the output, int32 [length], at most `room` of them."""
        row_input = self._input(row, continues=bool(demonstrations))
        query = np.concatenate([row_input, self._output_separator])
        if len(query) > room:
            raise InputError(
                f"{row.where} has no room for its output within data.max_tokens ({self.max_tokens}); raise it."
            )
        return _last(np.concatenate([self._demonstrations(demonstrations), query]), room)

    def _demonstrations(self, rows: Sequence[Example]) -> np.ndarray:
        """Return the tokens of demonstrations, int32 [length]."""
        parts = [np.empty(0, np.int32)]
        for number, row in enumerate(rows):
            parts += [self._input_and_output(row, continues=number > 0), self._separator]
        return np.concatenate(parts)

    def _max_demonstration(self, row: Example) -> int:
        """Return the number of tokens of a demonstration, wherever it is shown."""
        return len(self._separator) + max(len(self._input_and_output(row, continues=c)) for c in (False, True))

    def _input_and_output(self, row: Example, *, continues: bool = False) -> np.ndarray:
        output = self._output(row, with_eos=False)[: self.settings.max_tokens]
        shortened = self._input(row, continues=continues)[: self.settings.max_tokens - len(output)]
        return np.concatenate([shortened, self._output_separator, output])

    def _input(self, row: Example, *, continues: bool = False) -> np.ndarray:
        """Return the tokens of a row's input; with `continues`, as they are after other text."""
        if not row.prompt_tokens:
            raise InputError(
                f"{row.where} has no input separate from its output; method 'in_context' requires prompt and "
                "completion."
            )
        ids = row.prompt_ids[len(self._encoder.prefix) :]
        return _array(self._encoder.as_continuation(ids.tolist())) if continues else ids

    def _output(self, row: Example, *, with_eos: bool) -> np.ndarray:
        ids = row.input_ids[row.prompt_tokens :]
        return ids[:-1] if not with_eos and ids[-1] == self._encoder.eos_id else ids


def _with_output(row: Example, context: np.ndarray, output: np.ndarray, contexts: Mapping[str, np.ndarray]) -> Example:
    """Return `row` with another context before `output`, whose tokens are counted."""
    ids = np.concatenate([context, output]).astype(np.int32)
    counted = np.arange(len(ids)) >= len(context)
    return Example(ids, counted, None, len(context), row.where, row.fields, contexts=contexts)


def _last(ids: np.ndarray, count: int) -> np.ndarray:
    return ids[max(0, len(ids) - count) :]


def _array(ids: Sequence[int]) -> np.ndarray:
    return np.asarray(ids, dtype=np.int32)
