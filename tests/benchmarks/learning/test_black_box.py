"""The tools of `black_box`: truths of its tasks, statistics of rows, and the runs it makes."""

import json
import random
from collections import Counter
from dataclasses import replace

import pytest

from rayk.synthesis.adversarial import new_instruction_filters
from rayk.synthesis.adversarial_texts import new_prompt, parse_new_prompt, parse_scores, referee_prompt
from rayk.text import find_rejection
from tests.benchmarks.learning import currencies, in_context, purse, signs
from tests.benchmarks.learning.harness import Comparison, Runs
from tests.benchmarks.learning.preferences import logprob_gains
from tests.benchmarks.learning.reasoning import row_statistics
from tests.benchmarks.learning.words import make_tokenizer


def test_workings_are_sound_and_changed_ones_are_not():
    draw = random.Random(0)
    for question in purse.sample_questions(50, draw):
        working = purse.make_working(question, draw)
        words = working.split()
        assert purse.is_sound(question, working) and words[-1] == purse.answer_to(question)
        for place in range(len(words)):
            wrong = [*words[:place], "coin99" if place % 2 == 0 else str((int(words[place]) + 1) % 10)]
            assert not purse.is_sound(question, " ".join([*wrong, *words[place + 1 :]]))
        assert not purse.is_sound(question, " ".join(words[:-2]))
    slipped = [purse.make_working(question, draw, 0.1) for question in purse.sample_questions(400, draw)]
    right = sum(working.split()[-1] == purse.answer_to(" ".join(working.split()[::2])) for working in slipped)
    assert 0.9**5 - 0.1 < right / 400 < 0.9**5 + 0.1


def test_teacher_and_students_learn_from_different_purses():
    draw = random.Random(0)
    teacher_purses, student_purses = (
        {frozenset(question.split()) for question in purse.sample_questions(1800, draw, for_teacher=for_teacher)}
        for for_teacher in (True, False)
    )
    assert len(teacher_purses) == len(student_purses) == 1800 and not teacher_purses & student_purses


def test_rows_right_for_wrong_reasons_are_counted():
    question = "coin0 coin1 coin2 coin3 coin4"
    answer, sound = purse.answer_to(question), purse.make_working(question, random.Random(0))
    words = sound.split()
    lucky = " ".join([*words[:3], str((int(words[3]) + 1) % 10), *words[4:]])
    wrong = str((int(answer) + 1) % 10)
    completions = [
        f" {sound} --> {answer}",
        f" {lucky} --> {answer}",
        f" {sound} --> {wrong}",
        f" {sound} --> {answer}",
    ]
    rows = [{"prompt": f"{question} ###", "completion": text, "answer": answer} for text in completions]
    assert row_statistics(rows) == {"rows": 4, "right_rows": 0.75, "by_luck": pytest.approx(1 / 3), "different": 3.0}
    assert "by_luck" not in row_statistics([rows[0] | {"completion": f" --> {answer}"}])


def test_each_word_is_one_token():
    for words in (purse.WORDS, signs.WORDS, currencies.WORDS):
        tokenizer = make_tokenizer(words)
        assert tokenizer(" ".join(words)).input_ids == list(range(len(words)))
    assert make_tokenizer(purse.WORDS)(" \n").input_ids == []


def respond(prompt, model="currencies", seed=0):
    """Return the response of the program for currencies."""
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "seed": seed}
    return json.loads(currencies.respond(body))["choices"][0]["message"]["content"]


def test_sampled_currencies_have_their_frequencies_and_exclude_held_out_questions():
    asked, held_out = (
        currencies.sample_questions(4000, random.Random(0)),
        currencies.held_out_questions(100, random.Random(1)),
    )
    purses = [{frozenset(question.split()) for question in questions} for questions in (asked, held_out)]
    assert len(set(asked)) == 4000 and len(set(held_out)) == 600 and not purses[0] & purses[1]
    counts = Counter(currencies.currency_of(question).name for question in asked)
    for currency in currencies.CURRENCIES:
        assert counts[currency.name] / 4000 == pytest.approx(currency.share, abs=0.03)
    assert sum(currency.share for currency in currencies.CURRENCIES) == pytest.approx(1)
    assert Counter(map(currencies.currency_of, held_out)) == dict.fromkeys(currencies.CURRENCIES, 100)
    assert not set(currencies.COMMON) & set(currencies.RARE)


def test_program_answers_correctly_and_scores_answers():
    for question in currencies.held_out_questions(5, random.Random(0)):
        answer, coins = respond(question), question.split()[:-1]
        assert [int(total) for total in answer.split()] == [
            sum(currencies.WORTH[coin] for coin in coins[: place + 1]) % 10 for place in range(len(coins))
        ]
        *before, last = answer.split()
        wrong, lucky = " ".join([*before, str((int(last) + 1) % 10)]), last
        assert [currencies.score(question, text) for text in (answer, lucky, wrong, "", "=")] == [9, 6, 2, 2, 2]
        for answers, scores in (((answer, wrong), (9, 2)), ((wrong, answer), (2, 9)), ((lucky, answer), (6, 9))):
            assert parse_scores(respond(referee_prompt(question, answers, chat=True))) == scores


def test_random_referee_ignores_the_answers():
    question = currencies.sample_questions(1, random.Random(0))[0]
    asked = referee_prompt(question, (respond(question), "nonsense"), chat=True)
    thrown = [parse_scores(respond(asked, currencies.DICE, seed)) for seed in range(300)]
    leads = [first - second for first, second in thrown]
    assert abs(sum(leads)) / 300 < 1 and {-9, 9} & set(leads)


def test_new_questions_have_the_same_or_a_rarer_currency_and_pass_the_filters():
    given = currencies.sample_questions(300, random.Random(0))
    filters = new_instruction_filters((), given)
    passed = Counter()
    for seed, model in enumerate(given):
        currency = currencies.currency_of(model)
        for hard in (True, False):
            new = parse_new_prompt(respond(new_prompt(model, hard, chat=True), seed=seed))
            varied = currencies.currency_of(new)
            assert varied == currency if hard else varied.land == currency.land
            assert hard or varied.share < currency.share or varied in currencies.RARE
            passed[hard] += find_rejection({"instruction": new}, filters) is None
    assert min(passed.values()) > 200


def test_accuracy_is_weighted_by_what_people_ask():
    asked = currencies.held_out_questions(10, random.Random(0))
    right = {question: currencies.currency_of(question) in currencies.COMMON for question in asked}
    accuracies = currencies.compute_accuracies(right)
    assert accuracies == {"accuracy": pytest.approx(0.7), "rare": 0.0, "common": 1.0}


def test_log_prob_gains_are_nats_over_the_last_steps():
    steps = [{"chosen_reward": 5.0, "rejected_reward": 5.0}] + [{"chosen_reward": -0.4, "rejected_reward": -1.0}] * 10
    gained = {"chosen_gained": pytest.approx(-4), "rejected_gained": pytest.approx(-10)}
    assert logprob_gains(steps) == gained and logprob_gains([{"loss": 1.0}]) == {}


def test_word_pairs_of_new_tasks_are_in_no_training_task():
    learned, new = ({frozenset(pair) for pair in pairs} for pairs in (signs.TRAINING_PAIRS, signs.NEW_PAIRS))
    assert not learned & new and (len(learned), len(new)) == (30, 15)
    tasks = signs.tasks(signs.TRAINING_PAIRS)
    assert len(set(tasks)) == 60 and set(tasks) == {(other, one) for one, other in tasks}


def test_demonstrations_are_right_and_a_share_of_rows_is_wrong():
    draw = random.Random(0)
    wrong = 0
    for number in range(100):
        task = draw.choice(signs.tasks(signs.TRAINING_PAIRS))
        shots, rows = signs.make_village(str(number), task, draw, shots=12, rows=20, wrong=0.1)
        assert (len(shots), len(rows)) == (12, 20) and len({row["input"] for row in [*shots, *rows]}) == 32
        for row in [*shots, *rows]:
            assert row["task"] == str(number) and row["output"] in row["options"] == sorted(task)
        right = [row["output"] == task[row["input"].split()[1] not in signs.ROUND] for row in [*shots, *rows]]
        assert all(right[:12])
        wrong += right[12:].count(False)
    assert 0.08 < wrong / 2000 < 0.12


def test_methods_of_a_seed_share_villages_and_are_evaluated_on_new_ones():
    (shots, rows), (_, slipped) = (in_context.training_villages(1, wrong) for wrong in (0.0, 0.1))
    asked, again = ([(row["task"], row["input"], row["options"]) for row in part] for part in (rows, slipped))
    assert asked == again and {row["task"] for row in shots} == {row["task"] for row in rows}
    new = {tuple(row["options"]) for part in in_context.new_villages(1) for row in part}
    assert new == {tuple(sorted(pair)) for pair in signs.NEW_PAIRS} and not new & {
        tuple(options) for _, _, options in asked
    }
    assert in_context.training_villages(1, 0.1) == (shots, slipped) != in_context.training_villages(2, 0.1)


def test_conversations_are_rendered_like_demonstrations():
    tokenizer = make_tokenizer(signs.WORDS)
    tokenizer.chat_template = signs.CHAT_TEMPLATE
    messages = signs.make_conversation(signs.NEW_PAIRS[0], 3, random.Random(0))
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole.split() == [word for message in messages for word in message["content"].split()]
    assert len(whole.split()) == 9


def test_rate_is_chosen_on_the_tuning_seed_and_runs_are_not_repeated(tmp_path, capsys):
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
