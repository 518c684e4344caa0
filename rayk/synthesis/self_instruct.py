"""Tasks that the teacher generates itself, with inputs and outputs: Self-Instruct (Wang et al. 2022, arXiv 2212.10560).

The teacher reads 8 instructions of the pool, 6 written by people and 2 generated (at the beginning, all 8 written by
people), and continues the list with 8 more. An instruction enters the pool if it passes the paper's rules: it has 4 to
150 words, none of them about images or other things that a language model cannot handle, and ROUGE-L F below 0.7 with
every instruction of the pool. The teacher then says whether the instruction is a classification task, and generates
instances: with the label first for a classification task, else with the input first.

The pool grows in batches: all lists of a batch are requested with the pool at the beginning of the batch, and are read
in the order of their requests; of the last batch only as many lists as needed are requested. So equal seeds give equal
tasks, however often the run is interrupted and however many requests run at a time, and a run for more tasks begins
with the tasks of a run for fewer. The paper's presence penalty is not among rayk's sampling parameters.
"""

import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from types import MappingProxyType

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
from rayk.synthesis.completions import CompletionClient
from rayk.synthesis.concurrency import run_in_order
from rayk.synthesis.prompts import Prompt
from rayk.synthesis.requests import CompletionRequest
from rayk.synthesis.self_instruct_texts import SeedTask
from rayk.synthesis.store import StoredCompletion
from rayk.text import Filter, find_rejection

_LIST, _CHOICE, _CLASSIFICATION, _INSTANCES, _TEMPLATE = range(10, 15)  # the first number of a seed's position
_GENERATED_IN_CONTEXT = 2
_WORDS = (4, 150)
_MAX_ROUGE = 0.7
_CLASSIFICATION_TOKENS = 4
_MAX_EMPTY_BATCHES = 5


@dataclass(frozen=True)
class _Instruction:
    """A generated instruction.

    Attributes:
        seed_index: index of a seed task in the prompt that the instruction's list continued.
        response: the response with the list.
    """

    text: str
    seed_index: int
    response: StoredCompletion


class SelfInstruct(PromptGeneratingRecipe[SelfInstructConfig]):
    """Recipe `self_instruct`; see the module."""

    summary = "tasks, inputs and outputs that the teacher generates from tasks written by people"
    paper = "Wang et al. 2022, arXiv 2212.10560"
    example_fields = MappingProxyType({"instruction": "Name a river.", "input": "", "is_classification": False})

    def __init__(self, settings: SelfInstructConfig, prompts: Sequence[Prompt], client: CompletionClient):
        super().__init__(settings, prompts, client)
        self._seed_tasks = texts.read_seed_tasks(settings.seed_tasks)
        self._chat = client.uses_chat
        sampling = sampling_parameters(settings.sampling)
        stop = (*texts.LIST_STOP, *([] if self._chat else ["\n\n"]), *sampling.stop)
        self._list_parameters = SamplingParameters(
            sampling.max_new_tokens, sampling.temperature, sampling.top_p, stop=stop
        )  # fmt: skip
        self._classification_parameters = SamplingParameters(_CLASSIFICATION_TOKENS, 0.0, stop=texts.ANSWER_STOP)

    @classmethod
    def seed_prompts(cls, settings: SelfInstructConfig) -> list[Prompt]:
        return [
            Prompt(task.instruction, task.where, {}, json.dumps([task.is_classification, *map(vars, task.instances)]))
            for task in texts.read_seed_tasks(settings.seed_tasks)
        ]

    @property
    def max_requests(self) -> int:
        lists = -(-self.settings.instructions // texts.NEW_INSTRUCTIONS)
        return lists + 2 * self.settings.instructions

    async def candidates(self) -> AsyncGenerator[Candidate, None]:
        """Yield the rejected instructions, then the instances of the others, instruction by instruction."""
        self.client.total = self.max_requests
        accepted: list[_Instruction] = []
        async with aclosing(self._generate_instructions(accepted)) as rejected:
            async for candidate in rejected:
                yield candidate
        self.client.total = self.client.done + 2 * len(accepted)
        work = (self._generate_instances(position, instruction) for position, instruction in enumerate(accepted))
        async with aclosing(run_in_order(work, self.settings.in_flight)) as results:
            async for candidates in results:
                for candidate in candidates:
                    yield candidate

    async def _generate_instructions(self, accepted: list[_Instruction]) -> AsyncGenerator[Candidate, None]:
        """Fill `accepted` with the configured number of instructions, or fewer if the teacher repeats itself; yield the
        rejected ones.

        Raises:
            RunFailed: the request for a list failed and may succeed later. Without the list the pool would differ. (A
                request that was refused for good is skipped.)
        """
        filters = instruction_filters(self.settings.blacklist, self._seed_tasks)
        num_wanted, batch_size = self.settings.instructions, self.settings.batch
        pool: list[_Instruction] = []  # the pool at the beginning of the batch
        batch = start = empty_batches = empty_rounds = 0
        while len(accepted) < num_wanted and empty_batches < _MAX_EMPTY_BATCHES:
            before = len(accepted)
            num_lists = -(-(num_wanted - before) // texts.NEW_INSTRUCTIONS)
            end = min(start + num_lists * 2**empty_rounds, batch_size)
            indices, requests = zip(*(self._list_request(batch, i, pool) for i in range(start, end)), strict=True)
            for index, response in zip(indices, await self.client.complete_all(requests), strict=True):
                missing = missing_response(response)
                if missing and missing[0] != "unanswered":
                    by, reason = missing
                    empty = Candidate("", "", index, (response,), {"instruction": ""})
                    yield empty.reject(by, f"a list of instructions: {reason}")
                    continue
                for instruction in self._parse_list(response):
                    rejection = find_rejection({"instruction": instruction}, filters)
                    if rejection is not None:
                        candidate = Candidate(instruction, "", index, (response,), {"instruction": instruction})
                        yield candidate.reject(rejection.filter, rejection.reason)
                    elif len(accepted) < num_wanted:
                        accepted.append(_Instruction(instruction, index, response))
            start, empty_rounds = end, empty_rounds + 1 if len(accepted) == before else 0
            if start == batch_size:
                empty_batches = empty_batches + 1 if len(accepted) == len(pool) else 0
                batch, start, pool = batch + 1, 0, list(accepted)

    def _list_request(self, batch: int, number: int, pool: Sequence[_Instruction]) -> tuple[int, CompletionRequest]:
        """Return the index of the first seed task in the prompt, and the request for a list of new instructions."""
        rng = np.random.default_rng(self.client.seed(_CHOICE, batch, number))
        generated = [pool[i].text for i in rng.permutation(len(pool))[:_GENERATED_IN_CONTEXT]]
        by_people = rng.permutation(len(self._seed_tasks))[: texts.INSTRUCTIONS_IN_CONTEXT - len(generated)]
        shown = [*generated, *(self._seed_tasks[i].instruction for i in by_people)]
        prompt = texts.instructions_prompt([shown[i] for i in rng.permutation(len(shown))], self._chat)
        request = CompletionRequest(prompt, self.client.seed(_LIST, batch, number), self._list_parameters)
        return int(by_people[0]), request

    def _parse_list(self, response: StoredCompletion) -> list[str]:
        if response.finish_reason == "error":
            raise RunFailed(
                f"The teacher did not answer a request for new instructions: {response.reason}. Earlier completions "
                "are kept; check the teacher and run again."
            )
        text = completion_text(response, self._list_parameters.stop)
        return texts.parse_instructions(text, response.finish_reason, self._chat)

    async def _generate_instances(self, position: int, instruction: _Instruction) -> list[Candidate]:
        """Return the rows of an instruction.

        Args:
            position: position of the instruction among all accepted ones.
        """
        prompt = texts.classification_prompt(instruction.text, self._seed_tasks, self._chat)
        request = CompletionRequest(
            prompt, self.client.seed(_CLASSIFICATION, position), self._classification_parameters
        )
        classification = await self.client.complete(request)
        index, fields = instruction.seed_index, {"instruction": instruction.text}
        if missing := missing_response(classification):
            self.client.total -= 1  # no instances are requested
            return [
                Candidate(instruction.text, "", index, (classification, instruction.response), fields).reject(*missing)
            ]
        is_classification = texts.parse_is_classification(classification.text)
        stop = texts.LABELLED_STOP if is_classification else texts.EXAMPLES_STOP
        prompt = texts.instances_prompt(instruction.text, self._seed_tasks, is_classification, self._chat)
        parameters = SamplingParameters(self.settings.instance_tokens, 0.0, stop=stop)
        response = await self.client.complete(
            CompletionRequest(prompt, self.client.seed(_INSTANCES, position), parameters)
        )  # fmt: skip
        responses = (response, classification, instruction.response)
        whole = Candidate(instruction.text, completion_text(response, stop), index, responses, fields)
        if missing := missing_response(response):
            return [whole.reject(*missing)]
        instances, problem = texts.parse_instances(whole.completion, is_classification, response.finish_reason)
        if problem is not None:
            return [whole.reject("instances", problem)]
        return [
            replace(
                whole,
                prompt=texts.student_prompt(
                    instruction.text, instance.input, self.client.seed(_TEMPLATE, position, number)
                ),
                completion=instance.output,
                fields=fields | {"input": instance.input, "is_classification": is_classification},
            )
            for number, instance in enumerate(instances)
        ]

    def statistics(self, candidates: Sequence[Candidate]) -> list[Statistic]:
        kept = [each for each in candidates if not each.rejected_by]
        is_classification = {each.fields["instruction"]: each.fields["is_classification"] for each in kept}
        if not is_classification:
            return []
        return [
            Statistic("tasks", len(is_classification), share=False),
            Statistic("classification among them", sum(is_classification.values()) / len(is_classification)),
            Statistic("rows a task", len(kept) / len(is_classification), share=False),
        ]


def instruction_filters(blacklist: Sequence[str], seed_tasks: Sequence[SeedTask]) -> list[Filter]:
    """Build the paper's rules for new instructions (field `instruction`), with the seed tasks in the pool."""
    return texts.build_pool_filters(
        (task.instruction for task in seed_tasks), words=_WORDS, problem=texts.instruction_problem,
        blacklist=blacklist, similar=_MAX_ROUGE,
    )  # fmt: skip
