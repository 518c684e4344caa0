"""Thoughts are split from answers, and only where a completion has one."""

import pytest

from rayk.text.thoughts import join_thought, mark_separate_thought, mark_thought, split_thought

# Ends of prompts in real chat templates: Qwen3 with and without thinking, DeepSeek-R1, gpt-oss, plain ChatML.
QWEN3, QWEN3_NO_THINK = "<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n\n</think>\n\n"
R1, GPT_OSS = "<｜Assistant｜><think>\n", "<|start|>assistant"


def split(completion, prompt=QWEN3):
    parts = split_thought(mark_thought(completion, prompt))
    return parts.thought, parts.answer, parts.is_cut


@pytest.mark.parametrize(
    ("completion", "prompt", "parts"),
    [
        ("<think>\nTwo and two.\n</think>\n\nIt is 4.", QWEN3, ("Two and two.", "It is 4.", False)),
        ("Two and two.\n</think>\n\nIt is 4.", R1, ("Two and two.", "It is 4.", False)),
        ("<think>\nTwo and two.\n</think>\n\nIt is 4.", R1, ("Two and two.", "It is 4.", False)),
        ("Two and two.\n</think>\n\nIt is 4.", None, ("Two and two.", "It is 4.", False)),
        ("<think>\n\n</think>\n\nIt is 4.", QWEN3, ("", "It is 4.", False)),
        ("<think>one</think><think>two</think> It is 4.", QWEN3, ("one\n\ntwo", "It is 4.", False)),
        ("[THINK]Two and two.[/THINK]It is 4.", "[INST]2 + 2?[/INST]", ("Two and two.", "It is 4.", False)),
        ("analysisTwo and two.assistantfinalIt is 4.", GPT_OSS, ("Two and two.", "It is 4.", False)),
        ("<|channel|>analysis<|message|>Two and two.<|end|><|start|>assistant<|channel|>final<|message|>It is 4.",
         GPT_OSS, ("Two and two.", "It is 4.", False)),
        ("finalIt is 4.", GPT_OSS, ("", "It is 4.", False)),
    ],
)  # fmt: skip
def test_thoughts_are_split_from_answers(completion, prompt, parts):
    assert split(completion, prompt) == parts


@pytest.mark.parametrize(
    ("completion", "prompt"),
    [("<think>\nTwo and", QWEN3), ("Two and", R1), ("analysisTwo and", GPT_OSS), ("<think>", None), ("", R1)],
)
def test_a_completion_that_ends_in_its_thought_has_no_answer(completion, prompt):
    thought, answer, is_cut = split(completion, prompt)
    assert (answer, is_cut) == ("", True)
    assert thought in ("Two and", "")


@pytest.mark.parametrize(
    ("completion", "prompt"),
    [
        ("  It is 4.\n", QWEN3),
        ("The mark </think> ends a thought.", QWEN3_NO_THINK),
        ("Write <think> first and </think> last.", None),
        ("analysis of variance", QWEN3),
        ("analysisXassistantfinalY", None),
        ("finally", QWEN3),
    ],
)
def test_other_completions_are_unchanged(completion, prompt):
    assert split(completion, prompt) == ("", completion, False)


def test_joined_and_separate_thoughts_are_split_again():
    assert split(join_thought("Hm.", "4")) == ("Hm.", "4", False)
    assert join_thought("", "4") == "4"
    assert split(mark_separate_thought("Hm.", "4", is_truncated=True)) == ("Hm.", "4", False)
    assert split(mark_separate_thought("Hm.", "", is_truncated=True)) == ("Hm.", "", True)
    assert split(mark_separate_thought("Hm.", "", is_truncated=False)) == ("Hm.", "", False)
