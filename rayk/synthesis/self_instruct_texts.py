"""Prompts and parsers of Self-Instruct (Wang et al. 2022, arXiv 2212.10560).

Pure functions of text. Every prompt has two forms: for a base model it ends where the response begins, for a chat model
(`chat`) it ends with an instruction; responses to both are read by the same parsers. The rules are those of the paper's
code, except that

- instructions keep their capitals (the code's `capitalize()` destroys acronyms) and may begin in any script;
- of a truncated list only the last, unfinished item is dropped, not the whole list;
- ROUGE-L of exactly 0.7 is too similar, as in the paper (the code accepts it).
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayk.config import DataSource, KeywordsFilterConfig, LengthFilterConfig, RougeFilterConfig
from rayk.data.sources import Row, read_rows
from rayk.errors import InputError
from rayk.text import Filter, build_filters

INSTRUCTIONS_IN_CONTEXT = 8
NEW_INSTRUCTIONS = 8
INSTANCES_KEPT = 5
LIST_STOP = (f"\n{INSTRUCTIONS_IN_CONTEXT + NEW_INSTRUCTIONS + 1}.",)
ANSWER_STOP = ("\n",)
EXAMPLES_STOP = (f"\nExample {INSTANCES_KEPT + 1}", "\nTask:")
LABELLED_STOP = ("\nTask:",)
"""Stop texts. A base model's list also ends at a blank line; chat models put blank lines between items."""

TEMPLATES_WITH_INPUT = (
    "{instruction}\n\n{input}",
    "{instruction}\n{input}",
    "{instruction}\n\nInput: {input}",
    "{instruction}\n\nInput: {input}\n\nOutput:",
    "{instruction}\n{input}\n\nOutput:",
    "Task: {instruction}\n\n{input}",
    "Task: {instruction}\nInput: {input}\nOutput:",
)
TEMPLATES_WITHOUT_INPUT = (
    "{instruction}",
    "{instruction}\n",
    "{instruction}\n\nOutput:",
    "{instruction} Output:",
    "Task: {instruction}",
    "Task: {instruction}\n\nOutput:",
)
"""Formats of the student's prompts, one of which is sampled for each row."""

_IN_CONTEXT_CLASSIFICATION, _IN_CONTEXT_OTHERS = 12, 19
_IN_CONTEXT_EXAMPLES = 8


@dataclass(frozen=True)
class Instance:
    """An example of a task; `input` is empty if the task needs none."""

    input: str
    output: str


@dataclass(frozen=True)
class SeedTask:
    """A task written by a person. `where`: its location in words ("seeds.jsonl, line 3")."""

    instruction: str
    instances: tuple[Instance, ...]
    is_classification: bool
    where: str


def read_seed_tasks(path: str | None = None) -> list[SeedTask]:
    """Read the tasks of a JSONL file in the paper's format (`instruction`, `instances` with `input` and `output`,
    `is_classification`), by default rayk's own.

    Raises:
        InputError: the file cannot be read, a line is not such a task (the message names file and line), or there are
            fewer than 8 tasks, no classification task, or only classification tasks.
    """
    name = path or str(Path(__file__).with_name("seed_tasks.jsonl"))
    tasks = [_seed_task(row) for row in read_rows(DataSource(path=name))]
    kinds = {task.is_classification for task in tasks}
    if len(tasks) < INSTRUCTIONS_IN_CONTEXT or len(kinds) < 2:
        raise InputError(
            f"'{name}' has {len(tasks)} seed tasks; give at least {INSTRUCTIONS_IN_CONTEXT}, including classification "
            "tasks (is_classification: true) and other tasks."
        )
    return tasks


def _seed_task(row: Row) -> SeedTask:
    fields, where = row.fields, row.where
    instruction, instances = fields.get("instruction"), fields.get("instances")
    if not isinstance(instruction, str) or not instruction.strip():
        raise InputError(f"{where} has no 'instruction' that is text; correct the line.")
    if not isinstance(fields.get("is_classification"), bool):
        raise InputError(f"{where} has no 'is_classification' that is true or false; correct the line.")
    if not isinstance(instances, list) or not instances or not all(map(_is_instance, instances)):
        raise InputError(f"{where} has no 'instances', each with 'input' (may be empty) and 'output' as text.")
    read = tuple(Instance(each.get("input", "").strip(), each["output"].strip()) for each in instances)
    return SeedTask(" ".join(instruction.split()), read, fields["is_classification"], where)


def _is_instance(given: Any) -> bool:
    return (
        isinstance(given, dict)
        and isinstance(given.get("input", ""), str)
        and isinstance(given.get("output"), str)
        and bool(given["output"].strip())
    )


def instructions_prompt(examples: Sequence[str], chat: bool = False) -> str:
    """Return the prompt for new instructions after `examples`, which are numbered from 1."""
    listed = "\n".join(f"{number}. {' '.join(each.split())}" for number, each in enumerate(examples, start=1))
    first, last = len(examples) + 1, len(examples) + NEW_INSTRUCTIONS
    if not chat:
        return f"Come up with a series of tasks:\n{listed}\n{first}."
    return (
        f"Come up with a series of tasks:\n{listed}\n\nContinue the list with tasks {first} to {last}, unlike those "
        "above and unlike each other in kind and subject. Write only the numbered tasks, one on each line."
    )


_ITEM = re.compile(r"(?:^|\n)[ \t*#]*\d+[ \t]*[.)、][ \t*]*")


def parse_instructions(text: str, finish_reason: str, chat: bool = False) -> list[str]:
    """Return the instructions of a numbered list in order, with white space collapsed.

    Args:
        text: the response. A base model's text begins within the first item, whose number ended the prompt; a chat
            model's text before the first number or after a blank line is not part of an item.
        finish_reason: if it is 'length', the last item is truncated and dropped.
    """
    items = _ITEM.split(text)[1:] if chat else _ITEM.split(text)
    if finish_reason == "length":
        items = items[:-1]
    folded = [" ".join(item.strip().split("\n\n", 1)[0].strip("* ").split()) for item in items]
    return [item[0].upper() + item[1:] for item in folded if item]


def instruction_problem(instruction: str) -> str | None:
    """Return in words which of the paper's rules an instruction's beginning breaks; None if it breaks none."""
    if instruction.lower().startswith("write a program"):
        return "asks for a program"
    return beginning_problem(instruction)


def beginning_problem(instruction: str) -> str | None:
    """Return in words why an instruction's beginning is not acceptable; None if it is."""
    if unicodedata.category(instruction[0])[0] not in "LN":
        return f"begins with {instruction[0]!r}"
    return None


def build_pool_filters(
    pool: Iterable[str], *, words: tuple[int, int | None], problem: Callable[[str], str | None],
    blacklist: Sequence[str], similar: float,
) -> list[Filter]:  # fmt: skip
    """Build filters for new instructions (field `instruction`), which join the pool if they pass.

    Args:
        words: smallest and largest number of words.
        problem: returns in words what is wrong with an instruction, or None.
        blacklist: words that an instruction must not contain.
        similar: smallest ROUGE-L F with an instruction of the pool that rejects a new one.
    """
    field = "instruction"
    keywords = [KeywordsFilterConfig(field=field, keywords=list(blacklist))] if blacklist else []
    filters = [
        *build_filters([LengthFilterConfig(field=field, minimum=words[0], maximum=words[1])]),
        Filter("beginning", lambda candidate: problem(candidate[field])),
        *build_filters([*keywords, RougeFilterConfig(field=field, threshold=similar)]),
    ]
    for instruction in pool:
        for each in filters:
            each.remember({field: instruction})
    return filters


def classification_prompt(instruction: str, seeds: Sequence[SeedTask], chat: bool = False) -> str:
    """Return the prompt that asks whether a task is a classification task, after seed tasks of both kinds."""
    yes = [seed for seed in seeds if seed.is_classification][:_IN_CONTEXT_CLASSIFICATION]
    no = [seed for seed in seeds if not seed.is_classification][:_IN_CONTEXT_OTHERS]
    # Mixed evenly, so that neither the last examples nor a pattern suggests the answer.
    positions = [(index / len(kind), seed) for kind in (yes, no) for index, seed in enumerate(kind)]
    shown = [seed for _, seed in sorted(positions, key=lambda each: each[0])]
    question = "Can the following task be regarded as a classification task with finite output labels?"
    answers = {True: "Yes", False: "No"}
    blocks = [f"Task: {seed.instruction}\nIs it classification? {answers[seed.is_classification]}" for seed in shown]
    if not chat:
        return "\n\n".join([question, *blocks, f"Task: {instruction}\nIs it classification?"])
    return "\n\n".join([question, *blocks, f"Task: {instruction}", "Answer for this last task with Yes or No only."])


def parse_is_classification(text: str) -> bool:
    """Return whether the response is yes; anything else counts as no, as in the paper's code."""
    return re.match(r"\W*yes\b", text, re.IGNORECASE) is not None


def instances_prompt(instruction: str, seeds: Sequence[SeedTask], is_classification: bool, chat: bool = False) -> str:
    """Return the prompt for instances of a task.

    For a classification task each label comes before its input, so that not all inputs belong to one class
    (output-first); for other tasks the input, if there is one, comes before the output (input-first).
    """
    shown = [seed for seed in seeds if seed.is_classification == is_classification][:_IN_CONTEXT_EXAMPLES]
    if is_classification:
        question = (
            "Given a classification task, write each of its class labels and an input to which that label is the right "
            "answer. Do not use a label twice."
        )
        blocks = [_labelled_block(seed) for seed in shown]
    else:
        question = (
            "Write examples for the following tasks, up to five where a task takes an input. If a task takes no input, "
            "write only its output."
        )
        blocks = [_example_block(seed) for seed in shown]
    if chat:
        return "\n\n".join(
            [question, *blocks, f"Task: {instruction}", "Write this for the last task, in the same form."]
        )
    return "\n\n".join([question, *blocks, f"Task: {instruction}\n"])


def _labelled_block(seed: SeedTask) -> str:
    pairs = [f"Class label: {each.output}\nInput: {each.input}" for each in seed.instances]
    return "\n\n".join([f"Task: {seed.instruction}\n{pairs[0]}", *pairs[1:]])


def _example_block(seed: SeedTask) -> str:
    if not seed.instances[0].input:
        return f"Task: {seed.instruction}\nOutput: {seed.instances[0].output}"
    examples = [
        f"Example {number}\nInput: {each.input}\nOutput: {each.output}"
        for number, each in enumerate(seed.instances, start=1)
    ]
    return "\n\n".join([f"Task: {seed.instruction}\n{examples[0]}", *examples[1:]])


_TASK = re.compile(r"\A\s*[*#]*Task:[^\n]*(?:\n|$)")
_EXAMPLE = re.compile(r"(?:^|\n)[ \t*#]*Example[ \t]*\d+[ \t]*[.:)]?[ \t*]*(?=\n|$)", re.IGNORECASE)
_INPUT = re.compile(r"(?:^|\n)[ \t*]*Input[ \t]*:[ \t*]*", re.IGNORECASE)
_OUTPUT = re.compile(r"(?:^|\n)[ \t*]*Output[ \t]*:[ \t*]*", re.IGNORECASE)
_LABEL = re.compile(r"(?:^|\n)[ \t*]*Class label[ \t]*:[ \t*]*", re.IGNORECASE)
_NO_INPUT = re.compile(r"[\W_]*(?:none|no input|n/?a|empty)?[\W_]*", re.IGNORECASE)


def parse_instances(text: str, is_classification: bool, finish_reason: str) -> tuple[list[Instance], str | None]:
    """Return the usable instances in the response to `instances_prompt`; if there are none, also the reason.

    Instances are dropped if they have no output, an output equal to the input, or a colon at the end; if they repeat
    another instance; and if they are the last one of a truncated text. If one input has two outputs, all are dropped.
    At most 5 instances are kept.

    Args:
        finish_reason: 'length' if the text is truncated.
    """
    text = _TASK.sub("", text, count=1)
    found = _parse_labelled(text) if is_classification else _parse_examples(text)
    if finish_reason == "length":
        found = found[:-1]
    usable = list(dict.fromkeys(each for each in found if _is_usable(each)))
    if not usable:
        return [], "has no usable instance"
    inputs = [each.input for each in usable if each.input]
    if len(set(inputs)) < len(inputs):
        return [], "has two outputs for one input"
    return usable[:INSTANCES_KEPT], None


def _parse_labelled(text: str) -> list[Instance]:
    instances = []
    for block in _LABEL.split(text)[1:]:
        label, *given = _INPUT.split(block, maxsplit=1)
        if given:
            instances.append(Instance(given[0].strip(), label.strip()))
    return instances


def _parse_examples(text: str) -> list[Instance]:
    before, *blocks = _EXAMPLE.split(text)
    if blocks:
        return [each for each in map(_parse_example, blocks) if each is not None]
    # Without numbered examples the text is one example, and without a marked output all of it is the output.
    return [_parse_example(before) or Instance("", before.strip())]


def _parse_example(block: str) -> Instance | None:
    given, *outputs = _OUTPUT.split(block, maxsplit=2)
    if not outputs:
        return None
    given = _INPUT.sub("", given.strip(), count=1).strip()
    return Instance("" if _NO_INPUT.fullmatch(given) else given, outputs[0].strip())


def _is_usable(instance: Instance) -> bool:
    ends_with_colon = instance.input.endswith((":", "：")) or instance.output.endswith((":", "："))
    return bool(instance.output) and instance.output != instance.input and not ends_with_colon


def student_prompt(instruction: str, given: str, choice: int) -> str:
    """Return the student's prompt in the template that the non-negative number `choice` selects."""
    templates = TEMPLATES_WITH_INPUT if given else TEMPLATES_WITHOUT_INPUT
    return templates[choice % len(templates)].format(instruction=instruction, input=given)
