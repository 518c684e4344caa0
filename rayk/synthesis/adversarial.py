"""Instructions on which the student is behind its teacher, round by round: Lion (Jiang et al. 2023, arXiv 2305.12870).

There are two pools of instructions: those trained on in a round (train), and all so far (cache). Both start with the
given prompts. A round is

1. imitation: the teacher completes the train pool, and the student of the previous round is trained on the completions;
2. discrimination: teacher and student complete the cache pool, and a referee scores both completions from 1 to 10, once
   with the teacher's first and once with the student's. An instruction is hard if on average the teacher leads by
   d = teacher − student ≥ 1, else easy;
3. generation: in each request the teacher generates from one hard instruction another of the same domain and type, or
   from one easy instruction a rarer one of the same domain, until the configured number of each kind is reached. A new
   instruction is rejected if it says "instruction", was truncated, has 3 words or fewer, begins badly, or has ROUGE-L F
   above 0.7 to an instruction of the cache pool or to another new one;
4. the new instructions replace the train pool and join the cache pool.

In this implementation, steps 2 and 3 run at the beginning of the round that trains on their instructions, so that round
0 consists of step 1 only. The cache pool also contains the teacher's completions, which are not requested again.
Differences from the authors' code:

- an instruction is neither hard nor easy if the referee gives no scores in one of the orders, after two requests (in
  their code, -1 counts as a score);
- each instruction of a kind is used once before any is used again, and a new instruction may begin in any script;
- a new instruction may have at least 32 tokens (in their code, four tokens per word of its source);
- the referee is already tested in round 0.

Requests for new instructions are sent in waves, hard and easy alternating, and their responses are read in the order of
the requests. The requests depend on no other responses than the referee's scores. So equal seeds give equal
instructions, however often a round is interrupted.
"""

from collections import Counter
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from itertools import count, islice, zip_longest
from statistics import fmean
from types import MappingProxyType

from rayk.config import AdversarialConfig
from rayk.engines.base import SamplingParameters
from rayk.engines.batching import gather
from rayk.errors import InputError, RunFailed
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
from rayk.synthesis.completions import CompletionClient
from rayk.synthesis.concurrency import run_in_order
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
from rayk.synthesis.requests import CompletionRequest
from rayk.synthesis.store import StoredCompletion
from rayk.text import Filter, find_rejection
from rayk.text.words import words

_ANSWER, _AGAIN, _STUDENT, _REFEREE, _CHOICE, _NEW = range(20, 26)  # the first number of a seed's position
_MIN_WORDS = 4
_MIN_SIMILARITY = 0.700001  # a filter rejects its threshold too, but here exactly 0.7 is accepted
_MIN_TOKENS = 32
_MIN_WAVE = 8
_MAX_EMPTY_WAVES = 5
_NUM_REFEREE_TESTS = 4


@dataclass(frozen=True)
class _Instruction:
    """An instruction of the train pool.

    Attributes:
        seed_position: position for the seed of its completion: the index of the given prompt, or the index of the
            source instruction and the number of the turn. It is not the index in the train pool, because an instruction
            whose request fails now and succeeds later would shift the others.
        responses: responses that the instruction was generated from; empty if it was given.
    """

    entry: PoolEntry
    seed_position: tuple[int, ...]
    responses: tuple[StoredCompletion, ...] = ()


class Adversarial(Recipe[AdversarialConfig]):
    """Recipe `adversarial`; see the module."""

    summary = "new instructions on which the student is behind its teacher, round by round"
    paper = "Jiang et al. 2023, arXiv 2305.12870"
    example_fields = MappingProxyType({"kind": GIVEN, "made_from": ""})

    def __init__(self, settings: AdversarialConfig, prompts: Sequence[Prompt], client: CompletionClient):
        super().__init__(settings, prompts, client)
        self._completion_parameters = sampling_parameters(settings.sampling)
        self._comparisons: list[AnswerComparison] = []
        self._instructions: list[_Instruction] = []
        self._num_rejected: Counter[str] = Counter()
        self._pool_sizes: dict[str, int] = {}

    @classmethod
    def check_prompts(cls, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            if prompt.has_context:
                raise InputError(
                    f"{prompt.where} has {len(prompt.messages)} messages before its last answer, but synthesis "
                    "'adversarial' generates new instructions from single ones; give rows with one user's message."
                )

    @property
    def max_requests(self) -> int:
        return 2 * sum(self.settings.instructions_of.values()) if self.round.number else len(self.prompts)

    async def candidates(self) -> AsyncGenerator[Candidate, None]:
        """Yield the rejected instructions, then the others with the teacher's completions."""
        self.client.total = self.max_requests
        cache: list[PoolEntry] = []
        if self.round.number == 0:
            self._instructions = self._given_instructions()
        else:
            assert self.round.before is not None
            cache = read_pool(self.round.before, CACHE)
            self.client.total += 3 * len(cache)
            await self._discriminate(cache)
            async with aclosing(self._generate_instructions(cache)) as rejected:
                async for candidate in rejected:
                    self._num_rejected[candidate.rejected_by] += 1
                    yield candidate
            if not self._instructions and not self._num_rejected:
                raise RunFailed(
                    f"No instruction of the cache pool's {len(cache)} is hard for the student in round "
                    f"{self.round.number + 1}, and synthesis.easy_instructions is 0; lower synthesis.threshold or "
                    "raise synthesis.easy_instructions."
                )
        self.client.total = self.client.done + len(self._instructions)
        train: list[PoolEntry] = []
        work = (self._imitate(instruction) for instruction in self._instructions)
        async with aclosing(run_in_order(work, self.settings.in_flight)) as results:
            async for entry, candidate in results:
                train.append(entry)
                yield candidate
        if self.round.number == 0:
            await self._test_referee(train)
        for name, pool in ((TRAIN, train), (CACHE, [*cache, *train])):
            write_pool(self.store, name, pool)
            self._pool_sizes[name] = len(pool)

    def _given_instructions(self) -> list[_Instruction]:
        """Return the distinct prompts."""
        first: dict[str, int] = {}
        for index, prompt in enumerate(self.prompts):
            first.setdefault(prompt.text.strip(), index)
        return [
            _Instruction(PoolEntry(self.prompts[index].text, GIVEN, 0, index), (index,)) for index in first.values()
        ]

    async def _imitate(self, instruction: _Instruction) -> tuple[PoolEntry, Candidate]:
        """Return an instruction of the train pool with the teacher's completion, and its candidate."""
        entry = instruction.entry
        seed = (_ANSWER, self.round.number, *instruction.seed_position)
        response = await self._complete(self.client, entry, seed)
        text = completion_text(response, self._completion_parameters.stop)
        candidate = _candidate(entry, text, response, *instruction.responses)
        if missing := missing_response(response):
            return entry, candidate.reject(*missing)
        problem = completion_problem(response, text)
        return replace(entry, answer=text), candidate.reject(*problem) if problem else candidate

    async def _test_referee(self, train: Sequence[PoolEntry]) -> None:
        """Let the referee compare some completions with themselves, to detect a useless referee before the training.

        Raises:
            RunFailed: the referee gives no scores.
        """
        entries = [entry for entry in train if entry.answer][:_NUM_REFEREE_TESTS]
        comparisons = [AnswerComparison(entry, entry.answer or "", entry.answer or "") for entry in entries]
        results = await gather(self._judge(place, comparison, 0) for place, comparison in enumerate(comparisons))
        if results and not any(scores for scores, _ in results):
            raise RunFailed(
                f"The referee gave no scores in {len(results)} test comparisons of the first round: {results[0][1]}. "
                "Check synthesis.referee and synthesis.referee_template and run again; the completions are kept."
            )

    async def _discriminate(self, cache: Sequence[PoolEntry]) -> None:
        """Let the student complete the cache pool, and the referee compare its completions with the teacher's.

        Raises:
            RunFailed: no instruction could be compared.
        """
        work = (self._compare(index, entry) for index, entry in enumerate(cache))
        async with aclosing(run_in_order(work, self.settings.in_flight)) as comparisons:
            self._comparisons = [comparison async for comparison in comparisons]
        write_comparisons(self.store, self._comparisons, self.settings.threshold)
        if not any(comparison.lead is not None for comparison in self._comparisons):
            reason = next(comparison.reason for comparison in self._comparisons)
            raise RunFailed(
                f"None of the cache pool's {len(cache)} instructions could be compared in round "
                f"{self.round.number + 1}; the first: {reason}. See '{self.store.folder / COMPARISONS}.parquet', and "
                "check synthesis.referee and synthesis.referee_template."
            )

    async def _compare(self, index: int, entry: PoolEntry) -> AnswerComparison:
        """Return both completions of an instruction of the cache pool with the referee's scores in both orders."""
        assert self.round.student is not None
        student_seed = (_STUDENT, self.round.number, index)
        teacher, student = await gather(
            [self._teacher_response(index, entry), self._complete(self.round.student, entry, student_seed)]
        )
        stop = self._completion_parameters.stop
        comparison = AnswerComparison(entry, completion_text(teacher, stop), completion_text(student, stop))
        for model, response in (("the teacher", teacher), ("the student", student)):
            if missing := missing_response(response):
                return replace(comparison, reason=f"{missing[0]} by {model}: {missing[1]}")
        results = await gather(self._judge(index, comparison, order) for order in range(2))
        scores, reasons = zip(*results, strict=True)
        return replace(comparison, scores=scores, reason=next(filter(None, reasons), ""))

    async def _teacher_response(self, index: int, entry: PoolEntry) -> StoredCompletion:
        """Return the teacher's completion; request it if it failed in the round that added the instruction."""
        if entry.answer is not None:
            return StoredCompletion("", entry.answer, None, None, "stop")
        # The same request in every round, so that a stored result is found.
        return await self._complete(self.client, entry, (_AGAIN, index))

    async def _complete(self, client: CompletionClient, entry: PoolEntry, seed: tuple[int, ...]) -> StoredCompletion:
        request = CompletionRequest(entry.instruction, self.client.seed(*seed), self._completion_parameters)
        return await client.complete(request)

    async def _judge(self, index: int, comparison: AnswerComparison, order: int) -> tuple[Scores | None, str]:
        """Return the scores of teacher and student with the completions in this order, or why there are none.

        A second request is sent if the first reply has no scores.
        """
        template, answers = self.settings.referee_template, (comparison.teacher, comparison.student)
        referee = self.round.referee
        shown = answers if order == 0 else answers[::-1]
        prompt = referee_prompt(comparison.entry.instruction, shown, referee.uses_chat, template)
        parameters = sampling_parameters(self.settings.referee_sampling)
        if template is None and not referee.uses_chat:
            parameters = replace(parameters, stop=(*REFEREE_STOP, *parameters.stop))
        for attempt in range(2):
            seed = self.client.seed(_REFEREE, self.round.number, index, order, attempt)
            response = await referee.complete(CompletionRequest(prompt, seed, parameters))
            if missing := missing_response(response):
                return None, f"{missing[0]} by the referee: {missing[1]}"
            if scores := parse_scores(completion_text(response, parameters.stop)):
                return scores if order == 0 else scores[::-1], ""
        return None, f"the referee's reply has no two scores: {response.text[-80:]!r}"

    async def _generate_instructions(self, cache: Sequence[PoolEntry]) -> AsyncGenerator[Candidate, None]:
        """Generate the configured number of instructions of each kind, or fewer if the teacher repeats itself.

        Yields the rejected instructions.
        """
        filters = new_instruction_filters(self.settings.blacklist, (entry.instruction for entry in cache))
        kinds = [comparison.kind(self.settings.threshold) for comparison in self._comparisons]
        turns = {
            kind: self._turns([index for index, each in enumerate(kinds) if each == kind])
            for kind in (HARD, EASY)
            if kind in kinds
        }
        num_wanted, num_accepted, empty_waves = self.settings.instructions_of, Counter[str](), Counter[str]()
        while unfinished := [
            kind for kind in turns if num_accepted[kind] < num_wanted[kind] and empty_waves[kind] < _MAX_EMPTY_WAVES
        ]:
            empty_waves.update(unfinished)
            waves = [
                islice(turns[kind], self._wave_size(num_wanted[kind] - num_accepted[kind], num_wanted[kind]))
                for kind in unfinished
            ]
            sources = [source for pair in zip_longest(*waves) for source in pair if source is not None]
            responses = await gather(self._propose(cache[index], kinds[index], index, turn) for index, turn in sources)
            for (index, turn), response in zip(sources, responses, strict=True):
                kind = kinds[index]
                if num_accepted[kind] == num_wanted[kind]:
                    continue
                new, rejection = self._parse_proposal(response, cache[index], kind, filters)
                if rejection:
                    yield _candidate(new, "", response).reject(*rejection)
                else:
                    self._instructions.append(_Instruction(new, (index, turn), (response,)))
                    num_accepted[kind] += 1
                    empty_waves[kind] = 0

    def _turns(self, indices: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Yield (index, turn) of the next instruction to generate from, endlessly, with another order in each turn."""
        for turn in count():
            order = {index: self.client.seed(_CHOICE, self.round.number, turn, index) for index in indices}
            yield from ((index, turn) for index in sorted(indices, key=order.__getitem__))

    def _wave_size(self, num_missing: int, num_wanted: int) -> int:
        """Return the number of requests for a kind that are sent together."""
        return min(self.settings.batch, max(num_missing, min(_MIN_WAVE, num_wanted)))

    async def _propose(self, source: PoolEntry, kind: str, index: int, turn: int) -> StoredCompletion:
        template = self.settings.hard_template if kind == HARD else self.settings.easy_template
        prompt = new_prompt(source.instruction, kind == HARD, self.client.uses_chat, template)
        max_tokens = self.settings.instruction_tokens_per_word * len(words(source.instruction))
        parameters = SamplingParameters(
            max(_MIN_TOKENS, min(max_tokens, self.settings.sampling.max_new_tokens)),
            self.settings.instruction_temperature,
            stop=() if self.client.uses_chat else NEW_PROMPT_STOP,
        )
        seed = self.client.seed(_NEW, self.round.number, index, turn)
        return await self.client.complete(CompletionRequest(prompt, seed, parameters))

    def _parse_proposal(
        self, response: StoredCompletion, source: PoolEntry, kind: str, filters: Sequence[Filter]
    ) -> tuple[PoolEntry, tuple[str, str] | None]:
        """Return the new instruction, and the rule that rejects it with the reason; None if it is accepted."""
        text = parse_new_prompt(completion_text(response, () if self.client.uses_chat else NEW_PROMPT_STOP))
        new = PoolEntry(text, kind, self.round.number, source.origin, made_from=source.instruction)
        if missing := missing_response(response):
            return new, missing
        if response.finish_reason == "length":
            return new, ("cut", "was truncated at the token limit")
        rejection = find_rejection({"instruction": text}, filters)
        return new, None if rejection is None else (rejection.filter, rejection.reason)

    def statistics(self, candidates: Sequence[Candidate]) -> list[Statistic]:
        sizes = [Statistic(name.replace("_", " "), size, share=False) for name, size in self._pool_sizes.items()]
        if not self._comparisons:
            return sizes
        return [*self._comparison_statistics(), *self._instruction_statistics(), *sizes]

    def _comparison_statistics(self) -> list[Statistic]:
        comparisons = self._comparisons
        leads = [comparison.lead for comparison in comparisons if comparison.lead is not None]
        scores = [each for comparison in comparisons for each in comparison.scores]
        num_hard = sum(comparison.kind(self.settings.threshold) == HARD for comparison in comparisons)
        num_order = sum(comparison.depends_on_order for comparison in comparisons)
        return [
            Statistic("teacher's lead over the student, of 9 points", fmean(leads), share=False),
            Statistic("hard instructions", num_hard / len(leads)),
            Statistic("judgements without scores", scores.count(None) / len(scores)),
            Statistic("not compared", 1 - len(leads) / len(comparisons)),
            Statistic("the order of the answers decides", num_order / len(leads)),
        ]

    def _instruction_statistics(self) -> list[Statistic]:
        counts = Counter(instruction.entry.kind for instruction in self._instructions)
        return [
            *(Statistic(f"new from {kind} ones", counts[kind], share=False) for kind in (HARD, EASY)),
            *(Statistic(f"left out: {rule}", num, share=False) for rule, num in self._num_rejected.most_common()),
        ]


def _candidate(entry: PoolEntry, completion: str, *responses: StoredCompletion) -> Candidate:
    fields = {"kind": entry.kind, "made_from": entry.made_from}
    return Candidate(entry.instruction, completion, entry.origin, responses, fields, new_prompt=entry.kind != GIVEN)


def new_instruction_filters(blacklist: Sequence[str], cache: Iterable[str]) -> list[Filter]:
    """Build the paper's rules for new instructions (field `instruction`), with the cache pool to compare with."""
    return texts.build_pool_filters(
        cache, words=(_MIN_WORDS, None), problem=texts.beginning_problem, blacklist=blacklist, similar=_MIN_SIMILARITY
    )
