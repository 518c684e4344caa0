"""What `black_box` measures with is right: its tasks' truths, what it counts of rows, and which runs it makes."""

import json
import random
from collections import Counter
from dataclasses import replace

import pytest

from rayk.synthesis.adversarial import new_instruction_filters
from rayk.synthesis.adversarial_texts import new_prompt, parse_new_prompt, parse_scores, referee_prompt
from rayk.text import judge
from tests.benchmarks.learning import currencies, in_context, purse, signs
from tests.benchmarks.learning.harness import Comparison, Runs
from tests.benchmarks.learning.preferences import of_steps
from tests.benchmarks.learning.reasoning import of_rows
from tests.benchmarks.learning.words import tokenizer_of


def test_workings_are_sound_and_changed_ones_are_not():
    draw = random.Random(0)
    for question in purse.questions(50, draw):
        working = purse.working(question, draw)
        words = working.split()
        assert purse.is_sound(question, working) and words[-1] == purse.answer_to(question)
        for place in range(len(words)):
            wrong = [*words[:place], "coin99" if place % 2 == 0 else str((int(words[place]) + 1) % 10)]
            assert not purse.is_sound(question, " ".join([*wrong, *words[place + 1 :]]))
        assert not purse.is_sound(question, " ".join(words[:-2]))
    slipped = [purse.working(question, draw, 0.1) for question in purse.questions(400, draw)]
    right = sum(working.split()[-1] == purse.answer_to(" ".join(working.split()[::2])) for working in slipped)
    assert 0.9**5 - 0.1 < right / 400 < 0.9**5 + 0.1


def test_the_teacher_learns_from_other_purses_than_its_students():
    draw = random.Random(0)
    theirs, ours = (
        {frozenset(question.split()) for question in purse.questions(1800, draw, teachers=teachers)}
        for teachers in (True, False)
    )
    assert len(theirs) == len(ours) == 1800 and not theirs & ours


def test_rows_right_for_wrong_reasons_are_counted():
    question = "coin0 coin1 coin2 coin3 coin4"
    answer, sound = purse.answer_to(question), purse.working(question, random.Random(0))
    words = sound.split()
    lucky = " ".join([*words[:3], str((int(words[3]) + 1) % 10), *words[4:]])
    wrong = str((int(answer) + 1) % 10)
    said = [f" {sound} --> {answer}", f" {lucky} --> {answer}", f" {sound} --> {wrong}", f" {sound} --> {answer}"]
    rows = [{"prompt": f"{question} ###", "completion": each, "answer": answer} for each in said]
    assert of_rows(rows) == {"rows": 4, "right_rows": 0.75, "by_luck": pytest.approx(1 / 3), "different": 3.0}
    assert "by_luck" not in of_rows([rows[0] | {"completion": f" --> {answer}"}])


def test_every_word_has_its_token():
    for words in (purse.WORDS, signs.WORDS, currencies.WORDS):
        tokenizer = tokenizer_of(words)
        assert tokenizer(" ".join(words)).input_ids == list(range(len(words)))
    assert tokenizer_of(purse.WORDS)(" \n").input_ids == []


def said(prompt, model="currencies", seed=0):
    """What the world of currencies answers at its endpoint."""
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "seed": seed}
    return json.loads(currencies.respond(body))["choices"][0]["message"]["content"]


def test_questions_about_currencies_come_as_often_as_is_said_and_none_is_held_out():
    asked, held_out = currencies.asked(4000, random.Random(0)), currencies.held_out(100, random.Random(1))
    purses = [{frozenset(each.split()) for each in questions} for questions in (asked, held_out)]
    assert len(set(asked)) == 4000 and len(set(held_out)) == 600 and not purses[0] & purses[1]
    often = Counter(currencies.currency_of(each).name for each in asked)
    for currency in currencies.CURRENCIES:
        assert often[currency.name] / 4000 == pytest.approx(currency.share, abs=0.03)
    assert sum(each.share for each in currencies.CURRENCIES) == pytest.approx(1)
    assert Counter(map(currencies.currency_of, held_out)) == dict.fromkeys(currencies.CURRENCIES, 100)
    assert not set(currencies.COMMON) & set(currencies.RARE)


def test_the_world_of_currencies_answers_right_and_knows_who_does():
    for question in currencies.held_out(5, random.Random(0)):
        answer, coins = said(question), question.split()[:-1]
        assert [int(each) for each in answer.split()] == [
            sum(currencies.WORTH[coin] for coin in coins[: place + 1]) % 10 for place in range(len(coins))
        ]
        *before, last = answer.split()
        wrong, lucky = " ".join([*before, str((int(last) + 1) % 10)]), last
        assert [currencies.score(question, each) for each in (answer, lucky, wrong, "", "=")] == [9, 6, 2, 2, 2]
        for answers, scores in (((answer, wrong), (9, 2)), ((wrong, answer), (2, 9)), ((lucky, answer), (6, 9))):
            assert parse_scores(said(referee_prompt(question, answers, chat=True))) == scores


def test_dice_do_not_look_at_the_answers():
    question = currencies.asked(1, random.Random(0))[0]
    asked = referee_prompt(question, (said(question), "nonsense"), chat=True)
    thrown = [parse_scores(said(asked, currencies.DICE, seed)) for seed in range(300)]
    leads = [first - second for first, second in thrown]
    assert abs(sum(leads)) / 300 < 1 and {-9, 9} & set(leads)


def test_new_questions_are_of_the_same_currency_or_of_a_rarer_one_of_the_same_land_and_pass():
    given = currencies.asked(300, random.Random(0))
    filters = new_instruction_filters((), given)
    passed = Counter()
    for seed, model in enumerate(given):
        currency = currencies.currency_of(model)
        for hard in (True, False):
            new = parse_new_prompt(said(new_prompt(model, hard, chat=True), seed=seed))
            of = currencies.currency_of(new)
            assert of == currency if hard else of.land == currency.land
            assert hard or of.share < currency.share or of in currencies.RARE
            passed[hard] += judge({"instruction": new}, filters) is None
    assert min(passed.values()) > 200


def test_accuracies_weigh_currencies_as_people_ask():
    asked = currencies.held_out(10, random.Random(0))
    right = {each: currencies.currency_of(each) in currencies.COMMON for each in asked}
    told = currencies.accuracies(right)
    assert told == {"accuracy": pytest.approx(0.7), "rare": 0.0, "common": 1.0}


def test_what_answers_gained_is_told_in_nats_by_a_rounds_last_steps():
    steps = [{"chosen_reward": 5.0, "rejected_reward": 5.0}] + [{"chosen_reward": -0.4, "rejected_reward": -1.0}] * 10
    gained = {"chosen_gained": pytest.approx(-4), "rejected_gained": pytest.approx(-10)}
    assert of_steps(steps) == gained and of_steps([{"loss": 1.0}]) == {}


def test_words_of_new_tasks_come_together_in_no_training_row():
    learned, new = ({frozenset(pair) for pair in pairs} for pairs in (signs.LEARNED, signs.NEW))
    assert not learned & new and (len(learned), len(new)) == (30, 15)
    tasks = signs.tasks(signs.LEARNED)
    assert len(set(tasks)) == 60 and set(tasks) == {(other, one) for one, other in tasks}


def test_a_village_shows_right_words_of_other_signs_than_its_rows_some_of_which_are_wrong():
    draw = random.Random(0)
    wrong = 0
    for number in range(100):
        task = draw.choice(signs.tasks(signs.LEARNED))
        shots, rows = signs.village(str(number), task, draw, shots=12, rows=20, wrong=0.1)
        assert (len(shots), len(rows)) == (12, 20) and len({row["input"] for row in [*shots, *rows]}) == 32
        for row in [*shots, *rows]:
            assert row["task"] == str(number) and row["output"] in row["options"] == sorted(task)
        right = [row["output"] == task[row["input"].split()[1] not in signs.ROUND] for row in [*shots, *rows]]
        assert all(right[:12])
        wrong += right[12:].count(False)
    assert 0.08 < wrong / 2000 < 0.12


def test_methods_of_a_seed_learn_from_the_same_villages_and_are_measured_on_new_ones():
    (shots, rows), (_, slipped) = (in_context.learned(1, wrong) for wrong in (0.0, 0.1))
    asked, again = ([(row["task"], row["input"], row["options"]) for row in part] for part in (rows, slipped))
    assert asked == again and {row["task"] for row in shots} == {row["task"] for row in rows}
    new = {tuple(row["options"]) for part in in_context.new(1) for row in part}
    assert new == {tuple(sorted(pair)) for pair in signs.NEW} and not new & {tuple(options) for _, _, options in asked}
    assert in_context.learned(1, 0.1) == (shots, slipped) != in_context.learned(2, 0.1)


def test_conversations_read_as_demonstrations_do():
    tokenizer = tokenizer_of(signs.WORDS)
    tokenizer.chat_template = signs.CHAT_TEMPLATE
    messages = signs.conversation(signs.NEW[0], 3, random.Random(0))
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole.split() == [word for message in messages for word in message["content"].split()]
    assert len(whole.split()) == 9


def test_a_rate_is_chosen_on_the_tuning_seed_and_no_run_is_made_twice(tmp_path, capsys):
    made = []

    def run(method, seed, rate):
        made.append((method, seed, rate))
        return {"accuracy": (rate if method == "high" else 1 - rate) + 0.01 * seed * (method == "high"), "seconds": 1.0}

    columns = {"accuracy": ("right", "{:.1%}"), "luck": ("luck", "{:.1%}")}
    comparison = Comparison(["high", "low"], (0.1, 0.3), 1000, columns, [("high", "low")])
    for seeds in (2, 3, 3):
        Runs(tmp_path / "runs.jsonl").add(comparison, range(seeds), run)
    assert made[:4] == [(method, 1000, rate) for method in ("high", "low") for rate in (0.1, 0.3)]
    assert made[4:] == [(m, seed, rate) for seed in range(3) for m, rate in (("high", 0.3), ("low", 0.1))]
    known = replace(comparison, methods=["new"], known={"new": 0.5})
    Runs(tmp_path / "runs.jsonl").add(known, range(1), run)
    assert made[10:] == [("new", 0, 0.5)]
    capsys.readouterr()
    Runs(tmp_path / "runs.jsonl").print(comparison, range(5), {"accuracy": 1.0})
    printed = capsys.readouterr().out
    assert "over 3 seeds" in printed and "| teacher | – | 100.0% | – |" in printed
    assert "| high | 0.3 | 31.0% ± 1.0% | – |" in printed
    assert "| high − low | -0.590 ± 0.025 |" in printed
