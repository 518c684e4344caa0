"""Replies of referees and teachers are parsed correctly or not at all."""

import pytest

from rayk.config import AdversarialConfig
from rayk.synthesis.adversarial import new_instruction_filters
from rayk.synthesis.adversarial_texts import new_prompt, parse_new_prompt, parse_scores, referee_prompt
from rayk.synthesis.instruction_pools import AnswerComparison, PoolEntry
from rayk.text import find_rejection


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("Both are fine.\nScore of A: 8\nScore of B: 7", (8, 7)),
        ("A is better.\n\n**Score of A:** 8.5/10\n**Score of B:** 7/10", (8.5, 7)),
        ("Score of the Assistant 1: 8\nScore of the Assistant 2: 9", (8, 9)),
        ("At first I thought score of A: 3, score of B: 3.\nScore of A: 9\nScore of B: 2", (9, 2)),
        ('{"A": 10, "B": 1}', (10, 1)),
        ("Answer A scores: 6, Answer B scores: 6", (6, 6)),
        ("Score (A) = 4; Score (B) = 5", (4, 5)),
        ("Score of B: 5\nScore of A: 4", (4, 5)),
        (" 8\nScore of B: 7", (8, 7)),  # a base model, whose prompt ended in "Score of A:"
        ("8 7\nThe first one is longer.", (8, 7)),
        ("The first one is better.\n8, 7", (8, 7)),
        ("7 and 8.5", (7, 8.5)),
        ("", None),
        ("Both are excellent.", None),
        ("Score of A: 8", None),
        ("Score of A: -1\nScore of B: -1", None),
        ("Score of A: 11\nScore of B: 3", None),
        ("Score of A: 0\nScore of B: 3", None),
        ("Score of A: 85/100\nScore of B: 70/100", None),
        ("Score of A: 4/5\nScore of B: 3/5", None),
        ("Score of A: -\nScore of B: -", None),
        ("8/10", None),
        ("8,5 7,5", None),
        ("In 2019, 12 people agreed.", None),
        ("USA: 9\nARAB: 3", None),
    ],
)
def test_scores_are_parsed(text, scores):
    assert parse_scores(text) == scores


@pytest.mark.parametrize("chat", [True, False])
def test_the_referee_sees_both_answers_in_the_order_given(chat):
    asked = referee_prompt("Why {so}?", ("one {first}", "two"), chat)
    assert asked.index("Why {so}?") < asked.index("one {first}") < asked.rindex("two")
    assert asked.endswith("Score of A:") is not chat
    assert referee_prompt("q", ("x", "y"), chat, "{second}|{first}|{instruction}") == "y|x|q"


@pytest.mark.parametrize("chat", [True, False])
def test_prompts_differ_for_hard_and_easy_instructions(chat):
    hard, easy = (new_prompt("Name a\nriver in {Peru}.", kind, chat) for kind in (True, False))
    assert "same type of task" in hard and "rarer" not in hard
    assert "rarer" in easy and "same type" not in easy
    for asked in (hard, easy):
        assert ("river in {Peru}." in asked) and asked.endswith("New prompt:") is not chat
    assert new_prompt("x", True, chat, "More like {instruction}") == "More like x"


@pytest.mark.parametrize(
    ("text", "instruction"),
    [
        (" Name a river in Chile.\n", "Name a river in Chile."),
        ("**New prompt:** Name a river.", "Name a river."),
        ("# Created Prompt #:\nName a river.\n\nThen its length.", "Name a river.\n\nThen its length."),
        ('"Name a river in Chile."', "Name a river in Chile."),
        ('"Yes" or "no"', '"Yes" or "no"'),
        ("Prompt engineers: who are they?", "Prompt engineers: who are they?"),
        ("", ""),
        ('"', '"'),
    ],
)
def test_a_new_instruction_is_parsed_without_heading_and_quotes(text, instruction):
    assert parse_new_prompt(text) == instruction


@pytest.mark.parametrize(
    ("scores", "lead", "kind", "depends_on_order"),
    [
        (((8, 7), (8, 7)), 1.0, "hard", False),
        (((9, 5), (6, 8)), 1.0, "hard", True),
        (((8, 7), (7, 7)), 0.5, "easy", False),
        (((3, 9), (3, 9)), -6.0, "easy", False),
        (((9, 1), None), None, "unscored", False),
        ((None, None), None, "unscored", False),
    ],
)
def test_the_lead_is_the_mean_of_both_orders_and_needs_both(scores, lead, kind, depends_on_order):
    compared = AnswerComparison(PoolEntry("x", "given", 0, 0), "teacher's", "student's", scores)
    assert (compared.lead, compared.kind(1.0), compared.depends_on_order) == (lead, kind, depends_on_order)


@pytest.mark.parametrize(
    ("instruction", "rule"),
    [
        ("Name four rivers in Chile.", None),
        ("Write a program that sorts rivers.", None),  # Self-Instruct's rule, not Lion's
        ("为智利的河流写一首诗", None),
        ("Three words only.", "length"),
        ("", "length"),
        ("Write an instruction about four rivers.", "keywords"),
        ("Write Instructions for four rivers.", "keywords"),
        ("Reconstruction of four old bridges.", None),
        ("- name four rivers in Chile", "beginning"),
        ("a b c d e f g 1 2 3", None),  # exactly 0.7 to the one in the pool
        ("a b c d e f g h 1 2", "rouge"),
    ],
)
def test_the_rules_for_new_instructions(instruction, rule):
    rules = new_instruction_filters(AdversarialConfig().blacklist, ["a b c d e f g h i j"])
    rejection = find_rejection({"instruction": instruction}, rules)
    assert (rejection and rejection.filter) == rule
