"""Demonstrations: solved examples of a row's task that stand before it, so that a model reads how the task is done.

Laid out as MetaICL does (Min et al. 2022, arXiv 2110.15943; `metaicl/data.py`), ⏎ for its separators:

    input_1 ⏎ output_1 ⏎⏎⏎ … input_k ⏎ output_k ⏎⏎⏎ input ⏎ | output

Inputs, outputs and separators are tokenised each by itself, so that an output is the same tokens in a demonstration as
where it is to be learned. What is too much is cut off at the beginning. Where a row has options, its output counts
without an end-of-sequence token, as in MetaICL; else with it, as in the house's other rows.

Teacher and student may read different numbers of demonstrations, the student the last ones of the teacher's. What the
student reads is then how the teacher's text ends, so any token of it counts for both.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import nlargest
from typing import TYPE_CHECKING

import numpy as np

from rayk.config import DemonstrationsConfig, InContextConfig
from rayk.data.examples import Example, ExampleTable
from rayk.data.retrieval import Embedder, best_of, scores_by_bm25
from rayk.data.tokens import Encoder
from rayk.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Shown(Example):
    """A row after demonstrations, as the student reads it.

    Attributes:
        teacher_row: the same counted tokens as the teacher reads them, after its own demonstrations.
    """

    teacher_row: Example | None = None


@dataclass(frozen=True, eq=False)
class Query(Shown):
    """A row after demonstrations with its own output, and what else it might be answered.

    Attributes:
        counted: the output.
        options: the token ids of each possible output, int32 [length] each; none where any text may be one.
        gold: which of the options the output is.
        prefix_tokens: the first so many tokens are the tokenizer's (BOS), none of the text.
        hard_label_weight: α of the step that learns from the row.
    """

    options: tuple[np.ndarray, ...] = ()
    gold: int = 0
    prefix_tokens: int = 0
    hard_label_weight: float = 1.0

    @property
    def alternatives(self) -> list[Shown]:
        """The row with each of its options as the output, which counts."""
        assert self.teacher_row is not None
        return [
            Shown(
                **vars(_ended(self.prompt_ids, option, self)),
                teacher_row=_ended(self.teacher_row.prompt_ids, option, self),
            )
            for option in self.options
        ]

    @property
    def whole(self) -> Shown:
        """The row with every token of the student's text counted, demonstrations and input too."""
        assert self.teacher_row is not None
        first, theirs = max(1, self.prefix_tokens), self.teacher_row
        counted = np.arange(len(self)) >= first
        counted_by_teacher = np.arange(len(theirs)) >= len(theirs) - (len(self) - first)
        return Shown(
            self.input_ids, counted, None, first, self.where, self.fields,
            teacher_row=replace(theirs, counted=counted_by_teacher),
        )  # fmt: skip


class Demonstrator:
    """Shows rows demonstrations from a pool.

    Args:
        pool: prompt/completion rows.
        settings: the method's.
        tokenizer: the student's, with which the pool was made.
        max_tokens: of a row with its demonstrations.
    """

    def __init__(
        self, pool: ExampleTable, settings: InContextConfig, tokenizer: "PreTrainedTokenizerBase", max_tokens: int
    ):
        self.settings: DemonstrationsConfig = settings.demonstrations
        self.students = self.settings.k if settings.student_demonstrations is None else settings.student_demonstrations
        self.wants_options = settings.targets == "label_words"
        # What is trained on whole label words is asked for them; else MetaICL's rule, the lowest mean loss a token.
        self.per_token = not self.wants_options
        self.max_tokens = max_tokens
        self.pool = pool
        self._encoder = Encoder(tokenizer)
        self._output_separator, self._separator = map(
            _array, self._encoder.encode([self.settings.output_separator, self.settings.separator])
        )
        self._of_task: dict[str, list[int]] = defaultdict(list)
        self._of_input: dict[bytes, list[int]] = defaultdict(list)
        for place, row in enumerate(pool):
            self._of_task[self.task(row)].append(place)
            self._of_input[self.key(row)].append(place)
        self._nearest: dict[bytes, list[int]] = {}

    def query(self, row: Example, seed: int, hard_label_weight: float = 1.0) -> Query:
        """`row` after demonstrations; where they are drawn, `seed` says which.

        Raises:
            InputError: as `check`.
        """
        return self.after(row, self.chosen(row, seed), hard_label_weight)

    def after(self, row: Example, places: Sequence[int], hard_label_weight: float = 1.0) -> Query:
        """`row` after these rows of the pool.

        Raises:
            InputError: as `check`.
        """
        return self._query(row, [self._demonstration(self.pool[place]) for place in places], hard_label_weight)

    def _query(self, row: Example, demonstrations: list[np.ndarray], hard_label_weight: float = 1.0) -> Query:
        options = self.options(row)
        output = self._output(row, ended=not options)
        gold = next((place for place, option in enumerate(options) if np.array_equal(option, output)), None)
        if options and gold is None:
            raise InputError(
                f"{row.where}: the output is none of the options in its field '{self.settings.options_field}'; correct "
                "the row."
            )
        room = self.max_tokens - max(len(each) for each in (output, *options))
        contexts = [
            self._context(demonstrations[-count:] if count else [], row, room)
            for count in (self.settings.k, self.students)
        ]
        theirs, own = (_ended(context, output, row) for context in contexts)
        return Query(
            **vars(own), teacher_row=theirs, options=tuple(options), gold=gold or 0,
            prefix_tokens=len(self._encoder.prefix), hard_label_weight=hard_label_weight,
        )  # fmt: skip

    def drawn(self, row: Example, draw: int) -> Query:
        """`row` after evaluation's draw number `draw`: the same in every run, whoever measures it."""
        content = int.from_bytes(self.key(row))
        return self.query(row, int(np.random.SeedSequence([draw, content]).generate_state(1, np.uint64)[0]))

    def check(self, row: Example) -> None:
        """
        Raises:
            InputError: the row has no options where they are needed, or others than its output, is no input with an
                output, is too long, or there is no other row of its task.
        """
        if self.settings.k and not self.candidates(row):
            raise InputError(
                f"{row.where} is of task '{self.task(row)}', of which there is no other input to show it; give more "
                "rows of it, set method.demonstrations.pool, or set method.demonstrations.k to 0."
            )
        self._query(row, [])

    def task(self, row: Example) -> str:
        """The name of the row's task; "" where it has none."""
        return str(row.fields.get(self.settings.task_field, ""))

    def key(self, row: Example) -> bytes:
        """The same for the same input in the same task."""
        digest = hashlib.blake2b(self.task(row).encode(), digest_size=16)
        digest.update(self._input(row).astype("<i4").tobytes())
        return digest.digest()

    def options(self, row: Example) -> list[np.ndarray]:
        """The token ids of each of the row's options, int32 [length] each.

        Raises:
            InputError: they are no list of at least two different texts, or missing where they are needed.
        """
        field = self.settings.options_field
        given = row.fields.get(field) or []
        if not given and not self.wants_options:
            return []
        texts = isinstance(given, list) and all(isinstance(option, str) and option for option in given)
        if not texts or len(set(given)) < max(2, len(given)):
            raise InputError(
                f"{row.where} has no list of at least two different texts in its field '{field}', which "
                "method.targets 'label_words' compares; correct the row, set method.demonstrations.options_field, or "
                "set method.targets to 'tokens'."
            )
        return [_array(ids) for ids in self._encoder.encode(given)]

    def chosen(self, row: Example, seed: int) -> list[int]:
        """Which rows of the pool stand before `row`, in this order."""
        if not self.settings.k:
            return []
        if self.settings.choice != "random":
            return self._nearest[self.key(row)]
        return self.at_random(row, seed)

    def at_random(self, row: Example, seed: int) -> list[int]:
        """As many rows of the pool as may stand before `row`, drawn."""
        members, same = self._of_task.get(self.task(row), []), self._of_input.get(self.key(row), [])
        count = min(self.settings.k, len(members) - len(same))
        # Raw numbers alone are promised by numpy never to change; not of the streams of what the seed is used for else.
        numbers = np.random.Philox(np.random.SeedSequence([seed, 2]))
        drawn: dict[int, None] = {}
        while len(drawn) < count:
            place = members[int(numbers.random_raw()) % len(members)]
            if place not in same:
                drawn[place] = None
        return list(drawn)

    def rank(self, rows: Iterable[Example], encoder: str | None = None) -> None:
        """Find what stands before each of `rows`, where that is what is nearest to it.

        Args:
            encoder: what choice 'learned' has learned.
        """
        if self.settings.choice == "random" or not self.settings.k:
            return
        encoder = encoder or self.settings.encoder
        for row, best in self.nearest(rows, self.settings.k, Embedder(encoder) if encoder else None):
            self._nearest[self.key(row)] = best[::-1]

    def nearest(
        self, rows: Iterable[Example], count: int, embedder: Embedder | None = None
    ) -> Iterator[tuple[Example, list[int]]]:
        """Each different input of `rows` with the rows of the pool nearest to it, the nearest first: by the words of
        their inputs (BM25), or as `embedder` sees them."""
        for task, queries in self._by_task(rows).items():
            members = self._of_task[task]
            pool = [self.pool[place] for place in members]
            asked = [self._input(row) for row in queries]
            if embedder is None:
                scores = scores_by_bm25([self._input(row) for row in pool], asked)
            else:
                read = self._solved if embedder.reading.outputs else self._input
                scores = embedder.scores(self._texts(map(read, pool)), self._texts(asked))
            for row, of_row in zip(queries, scores, strict=True):
                of_row[np.isin(members, self._of_input.get(self.key(row), []))] = -np.inf
                yield row, [members[each] for each in best_of(of_row, min(count, self.candidates(row)))]

    def distinct(self, rows: Iterable[Example]) -> list[Example]:
        """The first of each input."""
        return [row for of_task in self._by_task(rows).values() for row in of_task]

    @property
    def solved(self) -> list[str]:
        """The text of each row of the pool as a demonstration, without the separator behind it."""
        return self._texts(map(self._solved, self.pool))

    def texts(self, row: Example) -> tuple[str, str]:
        """Of a row's input and of its output."""
        asked, answer = self._texts([self._input(row), self._output(row, ended=False)])
        return asked, answer

    def label(self, row: Example) -> tuple[str, frozenset[str], str] | None:
        """Task, options and which of them the row's output is: rows that agree in the first two are of one
        classification. None where it has no options."""
        options = self.options(row)
        if not options:
            return None
        texts = frozenset(row.fields[self.settings.options_field])
        return self.task(row), texts, self._texts([self._output(row, ended=False)])[0]

    def candidates(self, row: Example) -> int:
        """How many rows of the pool may stand before `row`."""
        return len(self._of_task.get(self.task(row), [])) - len(self._of_input.get(self.key(row), []))

    def longest(self, rows: Sequence[Example]) -> int:
        """At most so many tokens has one of `rows` with its demonstrations."""
        demonstrations = {
            task: sum(nlargest(self.settings.k, (len(self._demonstration(self.pool[place])) for place in places)))
            for task, places in self._of_task.items()
        }
        longest = 0
        for row in rows:
            query = self._query(row, [])
            answer = max(query.counted_tokens, *map(len, query.options), 0)
            longest = max(longest, demonstrations.get(self.task(row), 0) + query.prompt_tokens + answer)
        return min(self.max_tokens, longest)

    def _texts(self, inputs: Iterable[np.ndarray]) -> list[str]:
        return [str(self._encoder.tokenizer.decode(ids)) for ids in inputs]

    def _by_task(self, rows: Iterable[Example]) -> Mapping[str, list[Example]]:
        """The rows with different inputs, by task."""
        found: dict[str, dict[bytes, Example]] = defaultdict(dict)
        for row in rows:
            found[self.task(row)].setdefault(self.key(row), row)
        return {task: list(inputs.values()) for task, inputs in found.items()}

    def _context(self, demonstrations: list[np.ndarray], row: Example, room: int) -> np.ndarray:
        """What stands before the output, int32 [at most `room`]."""
        prefix = _array(self._encoder.prefix)
        query = np.concatenate([self._input(row), self._output_separator])
        room -= len(prefix)
        if len(query) > room:
            raise InputError(
                f"{row.where} has no room for its output within data.max_tokens ({self.max_tokens}); raise it."
            )
        return np.concatenate([prefix, np.concatenate([*demonstrations, query])[-room:]])

    def _demonstration(self, row: Example) -> np.ndarray:
        return np.concatenate([self._solved(row), self._separator])

    def _solved(self, row: Example) -> np.ndarray:
        output = self._output(row, ended=False)[: self.settings.max_tokens]
        shortened = self._input(row)[: self.settings.max_tokens - len(output)]
        return np.concatenate([shortened, self._output_separator, output])

    def _input(self, row: Example) -> np.ndarray:
        if not row.prompt_tokens:
            raise InputError(
                f"{row.where} has no input apart from its output; method 'in_context' needs prompt and completion."
            )
        return row.prompt_ids[len(self._encoder.prefix) :]

    def _output(self, row: Example, *, ended: bool) -> np.ndarray:
        ids = row.input_ids[row.prompt_tokens :]
        return ids[:-1] if not ended and ids[-1] == self._encoder.eos_id else ids


def _ended(context: np.ndarray, output: np.ndarray, row: Example) -> Example:
    """`row` with another context, and an output that counts."""
    ids = np.concatenate([context, output]).astype(np.int32)
    return Example(ids, np.arange(len(ids)) >= len(context), None, len(context), row.where, row.fields)


def _array(ids: Sequence[int]) -> np.ndarray:
    return np.asarray(ids, dtype=np.int32)
