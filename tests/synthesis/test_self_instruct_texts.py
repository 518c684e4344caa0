"""Prompts and parsers of Self-Instruct."""

import json
from collections import Counter

import pytest

from rayk.errors import InputError
from rayk.synthesis import self_instruct_texts as texts
from rayk.synthesis.self_instruct import instruction_filters
from rayk.synthesis.self_instruct_texts import Instance, read_seed_tasks
from rayk.text import find_rejection, rouge_l

SEEDS = read_seed_tasks()
BLACKLIST = ["image", "images", "draw", "go to"]


def test_the_seed_tasks_of_rayk_are_many_and_different():
    assert len(SEEDS) >= 60
    assert min(Counter(seed.is_classification for seed in SEEDS).values()) >= 12
    assert max(rouge_l(a.instruction, b.instruction) for i, a in enumerate(SEEDS) for b in SEEDS[:i]) < 0.7
    for seed in SEEDS:
        assert find_rejection({"instruction": seed.instruction}, instruction_filters(BLACKLIST, [])) is None, seed
        inputs = [each.input for each in seed.instances]
        assert len(set(inputs)) == len(inputs) and not any(each.output == each.input for each in seed.instances)
        assert not seed.is_classification or all(inputs)


def seed_file(path, *lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return str(path)


def seed(instruction="Do this.", label=False, **changed):
    return {
        "instruction": instruction,
        "is_classification": label,
        "instances": [{"input": "", "output": "x"}],
    } | changed


GOOD = [seed(f"Do {number}.", number % 2 == 0) for number in range(8)]


def test_seed_tasks_of_a_file(tmp_path):
    found = read_seed_tasks(seed_file(tmp_path / "mine.jsonl", *GOOD, {**seed("  Name\na colour. "), "id": "seed_8"}))
    assert found[8].instruction == "Name a colour."
    assert found[8].where == f"{tmp_path}/mine.jsonl, line 9"
    assert found[0].instances == (Instance("", "x"),)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"instruction": "half', "line 9 is not JSON"),
        ("[1]", "line 9 is a list, not an object"),
        (seed(" "), "line 9 has no 'instruction' that is text"),
        (seed(label="no"), "line 9 has no 'is_classification' that is true or false"),
        (seed(instances=[]), "line 9 has no 'instances'"),
        (seed(instances=[{"input": "x"}]), "line 9 has no 'instances'"),
        (seed(instances=[{"input": 3, "output": "x"}]), "line 9 has no 'instances'"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, message):
    path = seed_file(tmp_path / "mine.jsonl", *GOOD, line)
    with pytest.raises(InputError, match=message) as error:
        read_seed_tasks(path)
    assert path in str(error.value)


def test_too_few_seed_tasks_or_kinds_are_refused(tmp_path):
    with pytest.raises(InputError, match="has 7 seed tasks; give at least 8"):
        read_seed_tasks(seed_file(tmp_path / "few.jsonl", *GOOD[:7]))
    with pytest.raises(InputError, match="including classification tasks"):
        read_seed_tasks(seed_file(tmp_path / "one_sort.jsonl", *[seed(f"Do {n}.") for n in range(9)]))
    with pytest.raises(InputError, match="does not exist"):
        read_seed_tasks(str(tmp_path / "absent.jsonl"))


def test_the_prompt_for_instructions():
    base = texts.instructions_prompt([f"Task\n {n}" for n in range(8)])
    assert base.startswith("Come up with a series of tasks:\n1. Task 0\n2. Task 1\n")
    assert base.endswith("\n8. Task 7\n9.")
    assert "tasks 9 to 16" in texts.instructions_prompt(["Task"] * 8, chat=True)


@pytest.mark.parametrize(
    ("text", "finish_reason", "chat", "expected"),
    [
        (" name a NASA\n mission.\n10. Say it.\n11.Sing it.", "stop", False,
         ["Name a NASA mission.", "Say it.", "Sing it."]),
        (" name it.\n10. Say it.\n11. Sing", "length", False, ["Name it.", "Say it."]),
        (" only this", "length", False, []),
        ("Sure, here they are:\n\n9. **Name it.**\n\n10) Say it.\n\nI hope this helps!", "stop", True,
         ["Name it.", "Say it."]),
        ("I cannot do that.", "stop", True, []),
        ("", "stop", False, []),
        ("\n10.\n11.  \n12. Do it.", "stop", False, ["Do it."]),
        ("写一首诗\n10、唱一首歌", "stop", False, ["写一首诗", "唱一首歌"]),
        (" add 3.5 to 4. Then stop.", "stop", False, ["Add 3.5 to 4. Then stop."]),
    ],
)  # fmt: skip
def test_lists_of_instructions_are_parsed(text, finish_reason, chat, expected):
    assert texts.parse_instructions(text, finish_reason, chat) == expected


@pytest.mark.parametrize(
    ("instruction", "rejected_by"),
    [
        ("Name three rivers.", "length"),
        ("Name three long rivers.", None),
        ("word " * 151, "length"),
        ("说出三条河。", None),
        ("诗歌。", "length"),
        ("Write a program that sorts.", "beginning"),
        ("Write a programme for the evening.", "beginning"),
        ("(a) Name the longest river.", "beginning"),
        ("“Quote” the longest river there.", "beginning"),
        ("Äußere dich zu diesem Fluss.", None),
        ("3 rivers are to be named.", None),
        ("Describe the images below to me.", "keywords"),
        ("Draw the longest river there.", "keywords"),
        ("Withdraw the money and imagine.", None),
        (SEEDS[0].instruction.replace("dinner", "meal"), "rouge"),
    ],
)
def test_the_papers_rules_for_instructions(instruction, rejected_by):
    rejection = find_rejection({"instruction": instruction}, instruction_filters(BLACKLIST, SEEDS))
    assert (rejection and rejection.filter) == rejected_by


def test_an_instruction_is_novel_once():
    filters = instruction_filters([], SEEDS)
    assert find_rejection({"instruction": "Name the rivers of Iceland in order."}, filters) is None
    again = find_rejection({"instruction": "Name the rivers of Iceland in some order."}, filters)
    assert again is not None and again.filter == "rouge"


def test_the_classification_prompt_mixes_both_kinds():
    prompt = texts.classification_prompt("Is it so?", SEEDS)
    assert (prompt.count("classification? Yes"), prompt.count("classification? No")) == (12, 19)
    assert prompt.endswith("Task: Is it so?\nIs it classification?")
    answers = [line[-3:] for line in prompt.splitlines() if line.startswith("Is it classification? ")]
    assert "Yes" in answers[-8:] and " No" in answers[:8]
    assert texts.classification_prompt("Is it so?", SEEDS, chat=True).endswith("with Yes or No only.")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" Yes", True),
        ("yes.", True),
        ("**Yes**", True),
        (" No", False),
        ("Yesterday", False),
        ("", False),
        ("It is", False),
    ],
)
def test_classifications_are_parsed(text, expected):
    assert texts.parse_is_classification(text) is expected


def test_the_prompts_for_instances_have_the_form_that_is_parsed():
    """The parser reads a seed task's own instances from the prompt."""
    for is_classification in (True, False):
        prompt = texts.instances_prompt("Now this.", SEEDS, is_classification)
        assert prompt.endswith("Task: Now this.\n")
        blocks = prompt.split("\nTask: ")[1:-1]
        shown = [each for each in SEEDS if each.is_classification == is_classification][: len(blocks)]
        assert len(blocks) == 8
        for block, each in zip(blocks, shown, strict=True):
            found, fault = texts.parse_instances(block.split("\n", 1)[1], is_classification, "stop")
            assert (tuple(found), fault) == (each.instances, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Example 1\nInput: 2\nOutput: 4\n\nExample 2\nInput: 3\nOutput: 6", [("2", "4"), ("3", "6")]),
        ("**Example 1**\n**Input:** 2\n**Output:** 4", [("2", "4")]),
        ("Task: Now this.\nOutput: a poem\nof two lines", [("", "a poem\nof two lines")]),
        ("Output: a poem", [("", "a poem")]),
        ("a poem", [("", "a poem")]),
        ("Example 1\nNumber: 2\nBase: 3\nOutput: 8", [("Number: 2\nBase: 3", "8")]),
        ("Example 1\nInput: None\nOutput: x", [("", "x")]),
        ("Example 1\nInput: 2\nOutput:\n\nExample 2\nInput: 3\nOutput: 6", [("3", "6")]),
        ("Example 1\nInput: 2\nOutput: 2\nExample 2\nInput: 3\nOutput: 6", [("3", "6")]),
        ("Example 1\nInput: 3\nOutput: see:\nExample 2\nInput: 4\nOutput: 8", [("4", "8")]),
        ("Example 1\nInput: 2\nOutput: 4\nExample 2\nInput: 2\nOutput: 4", [("2", "4")]),
        ("\n".join(f"Example {n}\nInput: {n}\nOutput: o{n}" for n in range(9)), [(str(n), f"o{n}") for n in range(5)]),
    ],
)  # fmt: skip
def test_examples_are_parsed(text, expected):
    assert texts.parse_instances(text, False, "stop") == ([Instance(*each) for each in expected], None)


@pytest.mark.parametrize(
    ("text", "finish_reason", "fault"),
    [
        ("", "stop", "has no usable instance"),
        ("Example 1\nInput: 2\nOutput: 4", "length", "has no usable instance"),
        ("Example 1\nInput: 2\nOutput: 4\nExample 2\nInput: 2\nOutput: 5", "stop", "has two outputs for one input"),
        ("Example 1\nInput: 2", "stop", "has no usable instance"),
    ],
)
def test_tasks_without_usable_instances_have_a_reason(text, finish_reason, fault):
    assert texts.parse_instances(text, False, finish_reason) == ([], fault)


def test_a_truncated_text_loses_only_its_last_instance():
    text = "Example 1\nInput: 2\nOutput: 4\nExample 2\nInput: 3\nOutput: 6 and so"
    assert texts.parse_instances(text, False, "length") == ([Instance("2", "4")], None)


def test_labels_are_parsed_with_their_inputs():
    text = "Class label: Good\nInput: I liked it.\nClass label: Bad\nInput: It was\nawful.\n\nClass label: Neither"
    expected = [Instance("I liked it.", "Good"), Instance("It was\nawful.", "Bad")]
    assert texts.parse_instances(text, True, "stop") == (expected, None)
    assert texts.parse_instances("Class label: A\nInput: x\nClass label: B\nInput: x", True, "stop")[0] == []


def test_every_template_contains_the_task():
    with_input = {texts.student_prompt("Do {it}.", "this {one}", choice) for choice in range(50)}
    without = {texts.student_prompt("Do {it}.", "", choice) for choice in range(50)}
    assert (len(with_input), len(without)) == (7, 6)
    assert all("Do {it}." in prompt and "this {one}" in prompt for prompt in with_input)
    assert all("Do {it}." in prompt and "nput" not in prompt for prompt in without)
