"""Tasks that the teacher makes up itself, with their inputs and answers: Self-Instruct (Wang et al. 2022, arXiv
2212.10560).

From 8 instructions of the pool, 6 of them a person's and 2 a machine's (while there are none, a person's too), the
teacher goes on to 8 more. One enters the pool if it passes the paper's rules: 4 to 150 words, none about what a
language model cannot handle, and ROUGE-L F below 0.7 to every instruction of the pool. Each is then sorted into
classification or not, and the teacher writes instances: label first where it is one, input first where it is not.

The pool grows batch by batch: all lists of a batch are asked for with the pool as it was when the batch began, and read
in the order in which they were asked for; of the last batch only as many as are needed. So the same seed makes the same
tasks, however often it is interrupted and however much is in flight, and more of them go on from those there are. The
paper's presence penalty is not among rayk's sampling parameters.
"""

import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

import numpy as np

from rayk.config import SelfInstructConfig
from rayk.engines.base import SamplingParameters
from rayk.errors import RunFailed
from rayk.synthesis import self_instruct_texts as texts
from rayk.synthesis.base import (
    Candidate,
    PromptGeneratingRecipe,
    Statistic,
    completion_text,
    missing_response,
    sampling_parameters,
)
from rayk.synthesis.completions import CompletionClient, CompletionRequest, run_in_order
from rayk.synthesis.prompts import Prompt
from rayk.synthesis.self_instruct_texts import SeedTask
from rayk.synthesis.store import StoredCompletion
from rayk.text import Filter, judge

_LIST, _CHOICE, _SORT, _INSTANCES, _TEMPLATE = range(10, 15)  # the stages of a seed
_MACHINE_MADE = 2
_WORDS = (4, 150)
_NOVEL_BELOW = 0.7
_SORT_TOKENS = 4
_FRUITLESS_BATCHES = 5


@dataclass(frozen=True)
class _Made:
    """An instruction that the teacher made up, in which list, and the place of a seed task that the list went on
    from."""

    instruction: str
    origin: int
    written: StoredCompletion


class SelfInstruct(PromptGeneratingRecipe[SelfInstructConfig]):
    """See the module."""

    summary = "tasks, inputs and answers that the teacher makes up, starting from tasks written by people"
    paper = "Wang et al. 2022, arXiv 2212.10560"

    def __init__(self, settings: SelfInstructConfig, prompts: Sequence[Prompt], scribe: CompletionClient):
        super().__init__(settings, prompts, scribe)
        self._seeds = texts.read_seed_tasks(settings.seed_tasks)
        self._chat = scribe.chats
        listed = sampling_parameters(settings.sampling)
        stop = (*texts.LIST_STOP, *([] if self._chat else ["\n\n"]), *listed.stop)
        self._listing = SamplingParameters(listed.max_new_tokens, listed.temperature, listed.top_p, stop=stop)
        self._sorting = SamplingParameters(_SORT_TOKENS, 0.0, stop=texts.ANSWER_STOP)

    @classmethod
    def seed_prompts(cls, settings: SelfInstructConfig) -> list[Prompt]:
        return [
            Prompt(seed.instruction, seed.where, {}, json.dumps([seed.is_classification, *map(vars, seed.instances)]))
            for seed in texts.read_seed_tasks(settings.seed_tasks)
        ]

    @property
    def requests(self) -> int:
        lists = -(-self.settings.instructions // texts.NEW_INSTRUCTIONS)
        return lists + 2 * self.settings.instructions

    async def candidates(self) -> AsyncGenerator[Candidate, None]:
        """The instructions that were left out, then the instances of the others, instruction by instruction."""
        self.scribe.total = self.requests
        made: list[_Made] = []
        async with aclosing(self._instructions(made)) as left_out:
            async for candidate in left_out:
                yield candidate
        self.scribe.total = self.scribe.done + 2 * len(made)
        work = (self._instances_of(place, each) for place, each in enumerate(made))
        async with aclosing(run_in_order(work, self.settings.in_flight)) as written:
            async for candidates in written:
                for candidate in candidates:
                    yield candidate

    async def _instructions(self, made: list[_Made]) -> AsyncGenerator[Candidate, None]:
        """Fills `made` with as many instructions as are asked for, or as the teacher has ideas; yields the others.

        Raises:
            RunFailed: a list was left unanswered, and may be answered another time; with a gap in it the pool would not
                be the same again. One that is refused stays so.
        """
        filters = instruction_filters(self.settings.blacklist, self._seeds)
        wanted, batch_size = self.settings.instructions, self.settings.batch
        pool: list[_Made] = []  # as the lists of the batch see it, however many of them are needed
        batch = first = fruitless = dry = 0
        while len(made) < wanted and fruitless < _FRUITLESS_BATCHES:
            before = len(made)
            needed = -(-(wanted - before) // texts.NEW_INSTRUCTIONS)
            end = min(first + needed * 2**dry, batch_size)
            origins, requests = zip(*(self._list(batch, number, pool) for number in range(first, end)), strict=True)
            for origin, written in zip(origins, await self.scribe.write(requests), strict=True):
                if written.refused:
                    refused = Candidate("", "", origin, (written,), {"instruction": ""})
                    yield refused.rejected("refused", f"a list of instructions: {written.reason}")
                    continue
                for instruction in self._read(written):
                    rejection = judge({"instruction": instruction}, filters)
                    if rejection is not None:
                        candidate = Candidate(instruction, "", origin, (written,), {"instruction": instruction})
                        yield candidate.rejected(rejection.filter, rejection.reason)
                    elif len(made) < wanted:
                        made.append(_Made(instruction, origin, written))
            first, dry = end, dry + 1 if len(made) == before else 0
            if first == batch_size:
                fruitless = fruitless + 1 if len(made) == len(pool) else 0
                batch, first, pool = batch + 1, 0, list(made)

    def _list(self, batch: int, number: int, made: Sequence[_Made]) -> tuple[int, CompletionRequest]:
        """A request for new instructions, after those `made` before its batch, and the place of the first seed task in
        it."""
        draw = np.random.default_rng(self.scribe.seed(_CHOICE, batch, number))
        machine = [made[i].instruction for i in draw.permutation(len(made))[:_MACHINE_MADE]]
        people = draw.permutation(len(self._seeds))[: texts.INSTRUCTIONS_IN_CONTEXT - len(machine)]
        shown = [*machine, *(self._seeds[i].instruction for i in people)]
        asked = texts.instructions_prompt([shown[i] for i in draw.permutation(len(shown))], self._chat)
        return int(people[0]), CompletionRequest(asked, self.scribe.seed(_LIST, batch, number), self._listing)

    def _read(self, written: StoredCompletion) -> list[str]:
        if written.finish_reason == "error":
            raise RunFailed(
                f"The teacher left a prompt for new instructions unanswered: {written.reason}. What was written before "
                "is kept; see to the teacher and run again."
            )
        return texts.parse_instructions(completion_text(written, self._listing.stop), written.finish_reason, self._chat)

    async def _instances_of(self, place: int, made: _Made) -> list[Candidate]:
        """The rows of the instruction that was the `place`th to be made up."""
        asked = texts.classification_prompt(made.instruction, self._seeds, self._chat)
        sort = await self.scribe.ask(CompletionRequest(asked, self.scribe.seed(_SORT, place), self._sorting))
        fields = {"instruction": made.instruction}
        if lack := missing_response(sort):
            self.scribe.total -= 1  # its instances are not asked for
            unsorted = Candidate(made.instruction, "", made.origin, (sort, made.written), fields)
            return [unsorted.rejected(*lack)]
        is_classification = texts.parse_is_classification(sort.text)
        stop = texts.LABELLED_STOP if is_classification else texts.EXAMPLES_STOP
        asked = texts.instances_prompt(made.instruction, self._seeds, is_classification, self._chat)
        parameters = SamplingParameters(self.settings.instance_tokens, 0.0, stop=stop)
        written = await self.scribe.ask(CompletionRequest(asked, self.scribe.seed(_INSTANCES, place), parameters))
        whole = Candidate(
            made.instruction, completion_text(written, stop), made.origin, (written, sort, made.written), fields
        )
        if lack := missing_response(written):
            return [whole.rejected(*lack)]
        found, fault = texts.parse_instances(whole.completion, is_classification, written.finish_reason)
        if fault is not None:
            return [whole.rejected("instances", fault)]
        return [
            replace(
                whole,
                prompt=texts.student_prompt(made.instruction, each.input, self.scribe.seed(_TEMPLATE, place, number)),
                completion=each.output,
                fields=fields | {"input": each.input, "is_classification": is_classification},
            )
            for number, each in enumerate(found)
        ]

    def figures(self, candidates: Sequence[Candidate]) -> list[Statistic]:
        kept = [each for each in candidates if not each.rejected_by]
        sorts = {each.fields["instruction"]: each.fields["is_classification"] for each in kept}
        if not sorts:
            return []
        return [
            Statistic("tasks", len(sorts), share=False),
            Statistic("classification among them", sum(sorts.values()) / len(sorts)),
            Statistic("rows a task", len(kept) / len(sorts), share=False),
        ]


def instruction_filters(blacklist: Sequence[str], seeds: Sequence[SeedTask]) -> list[Filter]:
    """The paper's rules for new instructions (field `instruction`); the seeds are in the pool already."""
    return texts.build_pool_filters(
        (seed.instruction for seed in seeds), words=_WORDS, fault=texts.instruction_problem, blacklist=blacklist,
        similar=_NOVEL_BELOW,
    )  # fmt: skip
