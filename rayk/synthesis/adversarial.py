"""Instructions where the student is behind its teacher, round by round: Lion (Jiang et al. 2023, arXiv 2305.12870).

Two pools hold instructions: what is learned from in a round (train), and all so far (cache). Both begin as the given
prompts. A round is

1. imitation: the teacher answers the train pool, and the student, as the round before has left it, learns the answers;
2. discrimination: teacher and student answer the cache pool, and a referee scores both answers from 1 to 10, once with
   the teacher's first and once with the student's. An instruction is hard if on average the teacher leads by
   d = teacher − student ≥ 1, else easy;
3. generation: from one hard instruction a call the teacher makes another of the same domain and type, from one easy
   instruction a rarer one of the same domain, until there are as many of either kind as are asked for. One is left out
   if it says "instruction", was cut, has 3 words or less, begins badly, or has ROUGE-L F above 0.7 to one of the cache
   pool or to a new one;
4. the new ones replace the train pool and join the cache pool.

Here 2 and 3 are written at the beginning of the round whose train pool they make, so that round 0 is imitation alone.
The teacher's answers come with the cache pool and are not asked for again. Other than the authors' code

- an instruction that the referee gave no scores for in one of the orders, asked twice, is neither hard nor easy
  (there, -1 counts as a score);
- every instruction of a kind is taken once before one is taken again, and any script may begin a new one;
- a new one may have 32 tokens however short its model is (there, four a word);
- the referee is tried in round 0 already.

Requests of a lap are asked for together and read in the order in which they were asked for, hard and easy in turn;
which they are depends on no answer but the scores. So the same seed makes the same instructions, however often a round
is interrupted.
"""

from collections import Counter
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from itertools import count, islice, zip_longest
from statistics import fmean

from rayk.config import AdversarialConfig
from rayk.engines.base import SamplingParameters
from rayk.engines.batching import gather
from rayk.errors import RunFailed
from rayk.synthesis import self_instruct_texts as texts
from rayk.synthesis.adversarial_texts import (
    NEW_PROMPT_STOP,
    REFEREE_STOP,
    Scores,
    new_prompt,
    parse_new_prompt,
    parse_scores,
    referee_prompt,
)
from rayk.synthesis.base import (
    Candidate,
    Recipe,
    Statistic,
    completion_problem,
    completion_text,
    missing_response,
    sampling_parameters,
)
from rayk.synthesis.completions import CompletionClient, CompletionRequest, run_in_order
from rayk.synthesis.instruction_pools import (
    CACHE,
    COMPARISONS,
    EASY,
    GIVEN,
    HARD,
    TRAIN,
    AnswerComparison,
    PoolEntry,
    read_pool,
    write_comparisons,
    write_pool,
)
from rayk.synthesis.prompts import Prompt
from rayk.synthesis.store import StoredCompletion
from rayk.text import Filter, judge
from rayk.text.words import words

_ANSWER, _AGAIN, _STUDENT, _REFEREE, _CHOICE, _NEW = range(20, 26)  # the stages of a seed
_SHORTEST_WORDS = 4
_TOO_SIMILAR = 0.700001  # a filter leaves out what reaches its threshold; 0.7 itself may stay
_LEAST_TOKENS = 32
_LEAST_A_LAP = 8
_FRUITLESS_LAPS = 5
_TRIED = 4


@dataclass(frozen=True)
class _Made:
    """An instruction of the train pool.

    Attributes:
        made_of: where it comes from, for its seed: the place of the given prompt, or the seed instruction's and its
        turn. It is no place in the train pool, for one that is left unanswered and had later would move those behind.
        written: what the teacher wrote to make it up; nothing where it was given.
    """

    entry: PoolEntry
    made_of: tuple[int, ...]
    written: tuple[StoredCompletion, ...] = ()


class Adversarial(Recipe[AdversarialConfig]):
    """See the module."""

    summary = "new instructions where the student is behind its teacher, round by round, and the teacher's answers"
    paper = "Jiang et al. 2023, arXiv 2305.12870"

    def __init__(self, settings: AdversarialConfig, prompts: Sequence[Prompt], scribe: CompletionClient):
        super().__init__(settings, prompts, scribe)
        self._answering = sampling_parameters(settings.sampling)
        self._comparisons: list[AnswerComparison] = []
        self._made: list[_Made] = []
        self._left_out: Counter[str] = Counter()
        self._pools: dict[str, int] = {}

    @property
    def requests(self) -> int:
        return 2 * sum(self.settings.instructions_of.values()) if self.round.number else len(self.prompts)

    async def candidates(self) -> AsyncGenerator[Candidate, None]:
        """The instructions that were left out, then the answers to the others."""
        self.scribe.total = self.requests
        cache: list[PoolEntry] = []
        if self.round.number == 0:
            self._made = self._given()
        else:
            assert self.round.before is not None
            cache = read_pool(self.round.before, CACHE)
            self.scribe.total += 3 * len(cache)
            await self._discriminate(cache)
            async with aclosing(self._generate(cache)) as left_out:
                async for candidate in left_out:
                    self._left_out[candidate.rejected_by] += 1
                    yield candidate
            if not self._made and not self._left_out:
                raise RunFailed(
                    f"No instruction of the cache pool's {len(cache)} is hard for the student in round "
                    f"{self.round.number + 1}, and from easy ones none are to be made; lower synthesis.threshold, or "
                    "raise synthesis.easy_instructions."
                )
        self.scribe.total = self.scribe.done + len(self._made)
        train: list[PoolEntry] = []
        work = (self._answered(each) for each in self._made)
        async with aclosing(run_in_order(work, self.settings.in_flight)) as answered:
            async for entry, candidate in answered:
                train.append(entry)
                yield candidate
        if self.round.number == 0:
            await self._try_referee(train)
        for name, pool in ((TRAIN, train), (CACHE, [*cache, *train])):
            write_pool(self.store, name, pool)
            self._pools[name] = len(pool)

    def _given(self) -> list[_Made]:
        """The prompts, each once."""
        first: dict[str, int] = {}
        for place, prompt in enumerate(self.prompts):
            first.setdefault(prompt.text.strip(), place)
        return [_Made(PoolEntry(self.prompts[place].text, GIVEN, 0, place), (place,)) for place in first.values()]

    async def _answered(self, made: _Made) -> tuple[PoolEntry, Candidate]:
        """Imitation: the teacher's answer to an instruction of the train pool."""
        entry = made.entry
        written = await self._ask(self.scribe, entry, (_ANSWER, self.round.number, *made.made_of))
        text = completion_text(written, self._answering.stop)
        candidate = _candidate(entry, text, written, *made.written)
        if lack := missing_response(written):
            return entry, candidate.rejected(*lack)
        fault = completion_problem(written, text)
        return replace(entry, answer=text), candidate.rejected(*fault) if fault else candidate

    async def _try_referee(self, train: Sequence[PoolEntry]) -> None:
        """Have the referee compare some answers with themselves, before a round is trained that it could not follow.

        Raises:
            RunFailed: it gives no scores.
        """
        some = [AnswerComparison(each, each.answer, each.answer) for each in train if each.answer][:_TRIED]
        tried = await gather(self._judged(place, compared, 0) for place, compared in enumerate(some))
        if tried and not any(scores for scores, _ in tried):
            raise RunFailed(
                f"The referee was tried on {len(tried)} answers of the first round, and could not be used: "
                f"{tried[0][1]}. See to synthesis.referee and synthesis.referee_template and run again; the answers "
                "are kept."
            )

    async def _discriminate(self, cache: Sequence[PoolEntry]) -> None:
        """Have the student answer the cache pool, and the referee compare.

        Raises:
            RunFailed: nothing could be compared.
        """
        work = (self._compare(place, entry) for place, entry in enumerate(cache))
        async with aclosing(run_in_order(work, self.settings.in_flight)) as compared:
            self._comparisons = [each async for each in compared]
        write_comparisons(self.store, self._comparisons, self.settings.threshold)
        if not any(each.lead is not None for each in self._comparisons):
            reason = next(each.reason for each in self._comparisons)
            raise RunFailed(
                f"None of the cache pool's {len(cache)} instructions could be compared in round "
                f"{self.round.number + 1}; the first: {reason}. See '{self.store.folder / COMPARISONS}.parquet', and "
                "to synthesis.referee and synthesis.referee_template."
            )

    async def _compare(self, place: int, entry: PoolEntry) -> AnswerComparison:
        """Both answers to an instruction of the cache pool, and the referee's scores in both orders."""
        assert self.round.student is not None
        number = self.round.number
        teacher, student = await gather(
            [self._teachers(place, entry), self._ask(self.round.student, entry, (_STUDENT, number, place))]
        )
        compared = AnswerComparison(
            entry, completion_text(teacher, self._answering.stop), completion_text(student, self._answering.stop)
        )
        for who, written in (("the teacher", teacher), ("the student", student)):
            if lack := missing_response(written):
                return replace(compared, reason=f"{lack[0]} by {who}: {lack[1]}")
        judged = await gather(self._judged(place, compared, order) for order in range(2))
        scores, reasons = zip(*judged, strict=True)
        return replace(compared, scores=scores, reason=next(filter(None, reasons), ""))

    async def _teachers(self, place: int, entry: PoolEntry) -> StoredCompletion:
        """The teacher's answer, which the round that added the instruction may have left open."""
        if entry.answer is not None:
            return StoredCompletion("", entry.answer, None, None, "stop")
        # In every round the same request: what it came to in an earlier one is found.
        return await self._ask(self.scribe, entry, (_AGAIN, place))

    async def _ask(self, scribe: CompletionClient, entry: PoolEntry, seed: tuple[int, ...]) -> StoredCompletion:
        return await scribe.ask(CompletionRequest(entry.instruction, self.scribe.seed(*seed), self._answering))

    async def _judged(self, place: int, compared: AnswerComparison, order: int) -> tuple[Scores | None, str]:
        """The scores of teacher and student with the answers in this order, or why there are none; asked once more
        where the referee gives none."""
        own, answers = self.settings.referee_template, (compared.teacher, compared.student)
        asked = referee_prompt(
            compared.entry.instruction, answers if order == 0 else answers[::-1], self.round.referee.chats, own
        )  # fmt: skip
        parameters = sampling_parameters(self.settings.referee_sampling)
        if own is None and not self.round.referee.chats:
            parameters = replace(parameters, stop=(*REFEREE_STOP, *parameters.stop))
        for attempt in range(2):
            seed = self.scribe.seed(_REFEREE, self.round.number, place, order, attempt)
            written = await self.round.referee.ask(CompletionRequest(asked, seed, parameters))
            if lack := missing_response(written):
                return None, f"{lack[0]} by the referee: {lack[1]}"
            if scores := parse_scores(completion_text(written, parameters.stop)):
                return scores if order == 0 else scores[::-1], ""
        return None, f"the referee gave no two scores: {written.text[-80:]!r}"

    async def _generate(self, cache: Sequence[PoolEntry]) -> AsyncGenerator[Candidate, None]:
        """Makes up as many instructions of each kind as are asked for, or as the teacher has ideas; yields those that
        are left out."""
        filters = new_instruction_filters(self.settings.blacklist, (each.instruction for each in cache))
        kinds = [each.kind(self.settings.threshold) for each in self._comparisons]
        seeds = {kind: self._seeds([i for i, each in enumerate(kinds) if each == kind]) for kind in (HARD, EASY)}
        seeds = {kind: each for kind, each in seeds.items() if kind in kinds}
        wanted, have, fruitless = self.settings.instructions_of, Counter[str](), Counter[str]()
        while going_on := [kind for kind in seeds if have[kind] < wanted[kind] and fruitless[kind] < _FRUITLESS_LAPS]:
            fruitless.update(going_on)
            laps = [islice(seeds[kind], self._lap(wanted[kind] - have[kind], wanted[kind])) for kind in going_on]
            asked = [seed for pair in zip_longest(*laps) for seed in pair if seed is not None]
            proposals = await gather(self._propose(cache[place], kinds[place], place, turn) for place, turn in asked)
            for (place, turn), written in zip(asked, proposals, strict=True):
                kind = kinds[place]
                if have[kind] == wanted[kind]:
                    continue
                new, rejection = self._read(written, cache[place], kind, filters)
                if rejection:
                    yield _candidate(new, "", written).rejected(*rejection)
                else:
                    self._made.append(_Made(new, (place, turn), (written,)))
                    have[kind] += 1
                    fruitless[kind] = 0

    def _seeds(self, places: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Places of the cache pool to make new instructions from, without an end: all in an order of chance, then all
        in another one; each with the number of its turn."""
        for turn in count():
            chance = {place: self.scribe.seed(_CHOICE, self.round.number, turn, place) for place in places}
            yield from ((place, turn) for place in sorted(places, key=chance.__getitem__))

    def _lap(self, missing: int, wanted: int) -> int:
        """How many calls for a kind go out together while so many of those that are wanted are missing."""
        return min(self.settings.batch, max(missing, min(_LEAST_A_LAP, wanted)))

    async def _propose(self, model: PoolEntry, kind: str, place: int, turn: int) -> StoredCompletion:
        template = self.settings.hard_template if kind == HARD else self.settings.easy_template
        asked = new_prompt(model.instruction, kind == HARD, self.scribe.chats, template)
        longest = self.settings.instruction_tokens_per_word * len(words(model.instruction))
        parameters = SamplingParameters(
            max(_LEAST_TOKENS, min(longest, self.settings.sampling.max_new_tokens)),
            self.settings.instruction_temperature,
            stop=() if self.scribe.chats else NEW_PROMPT_STOP,
        )
        return await self.scribe.ask(CompletionRequest(asked, self.scribe.seed(_NEW, self.round.number, place, turn), parameters))

    def _read(
        self, written: StoredCompletion, model: PoolEntry, kind: str, filters: Sequence[Filter]
    ) -> tuple[PoolEntry, tuple[str, str] | None]:
        """The new instruction that was written, and the rule by which it is left out, with the reason."""
        text = parse_new_prompt(completion_text(written, () if self.scribe.chats else NEW_PROMPT_STOP))
        new = PoolEntry(text, kind, self.round.number, model.origin, made_from=model.instruction)
        if lack := missing_response(written):
            return new, lack
        if written.finish_reason == "length":
            return new, ("cut", "was cut at the token limit")
        rejection = judge({"instruction": text}, filters)
        return new, None if rejection is None else (rejection.filter, rejection.reason)

    def figures(self, candidates: Sequence[Candidate]) -> list[Statistic]:
        figures = [Statistic(name.replace("_", " "), size, share=False) for name, size in self._pools.items()]
        return [*self._of_comparisons(), *self._of_new_ones(), *figures] if self._comparisons else figures

    def _of_comparisons(self) -> list[Statistic]:
        leads = [each.lead for each in self._comparisons if each.lead is not None]
        judged = [scores for each in self._comparisons for scores in each.scores]
        hard = sum(each.kind(self.settings.threshold) == HARD for each in self._comparisons)
        return [
            Statistic("teacher's lead over the student, of 9 points", fmean(leads), share=False),
            Statistic("hard instructions", hard / len(leads)),
            Statistic("judgements without scores", judged.count(None) / len(judged)),
            Statistic("not compared", 1 - len(leads) / len(self._comparisons)),
            Statistic(
                "the order of the answers decides", sum(e.depends_on_order for e in self._comparisons) / len(leads)
            ),
        ]

    def _of_new_ones(self) -> list[Statistic]:
        made = Counter(each.entry.kind for each in self._made)
        return [
            *(Statistic(f"new from {kind} ones", made[kind], share=False) for kind in (HARD, EASY)),
            *(Statistic(f"left out: {rule}", number, share=False) for rule, number in self._left_out.most_common()),
        ]


def _candidate(entry: PoolEntry, answer: str, *written: StoredCompletion) -> Candidate:
    fields = {"kind": entry.kind, "made_from": entry.made_from}
    return Candidate(entry.instruction, answer, entry.origin, written, fields, made_up=entry.kind != GIVEN)


def new_instruction_filters(blacklist: Sequence[str], cache: Iterable[str]) -> list[Filter]:
    """The paper's rules for new instructions (field `instruction`) beside those of the cache pool."""
    return texts.build_pool_filters(
        cache, words=(_SHORTEST_WORDS, None), fault=texts.beginning_problem, blacklist=blacklist, similar=_TOO_SIMILAR
    )
