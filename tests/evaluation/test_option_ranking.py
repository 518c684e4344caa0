"""A row with options is answered by the likeliest option, and by the majority of several draws."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayk.config import DataConfig, EvaluationConfig, InContextConfig
from rayk.data.demonstrations import DemonstrationPool
from rayk.data.examples import ExampleTable
from rayk.data.tokenizing import tokenize
from rayk.data.views import RowViews
from rayk.evaluation.answer_scoring import AnswerScorer
from rayk.evaluation.evaluate import Evaluation, Evaluator, evaluate_teacher
from rayk.evaluation.option_ranking import answer_with_options
from rayk.training.student import Student
from tests.runs import write_tasks

DRAWS = 3


@pytest.fixture(scope="module")
def tokenizer(tiny_student):
    return AutoTokenizer.from_pretrained(tiny_student)


@pytest.fixture(scope="module")
def examples(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder, count=12)
    data = DataConfig(train={"path": str(folder / "rows.jsonl"), "format": "prompt_completion"})
    return tokenize(data.train, data, tokenizer)


def make_pool(examples, tokenizer, **settings):
    return DemonstrationPool(examples, InContextConfig(demonstrations={"k": 2}, **settings), tokenizer, 512)


@torch.no_grad()
def best_option(model, pool, row, tokenizer, draw, per_token):
    """The option with the highest log-prob after a draw, from full logits."""
    query = pool.add_evaluation_demonstrations(row, draw)
    scores = []
    for text in row.fields["options"]:
        option = tokenizer(text).input_ids
        ids = torch.tensor([*query.prompt_ids.tolist(), *option])
        logprobs = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        chosen = logprobs[-len(option) :]
        scores.append(float(chosen.mean() if per_token else chosen.sum()))
    return row.fields["options"][int(np.argmax(scores))]


@pytest.mark.parametrize("targets", ["label_words", "tokens"])
def test_ranks_answer_with_the_majority_of_the_likeliest_options(targets, examples, tokenizer, tiny_student):
    model = AutoModelForCausalLM.from_pretrained(tiny_student).eval()
    pool = make_pool(examples, tokenizer, targets=targets)
    settings = EvaluationConfig(demonstration_draws=DRAWS)
    shares = [
        Evaluator(settings, examples, tokenizer, None, 200, rank, 2, RowViews(demonstrations=pool)).run(
            Student(model), True
        )
        for rank in range(2)
    ]
    answers = {answer.where: answer for answer in Evaluation.merge(shares).answers}
    assert len(answers) == len(examples)
    for row in examples:
        votes = [best_option(model, pool, row, tokenizer, draw, targets == "tokens") for draw in range(DRAWS)]
        assert answers[row.where].text == max(votes, key=votes.count)
        assert answers[row.where].correct == (answers[row.where].text == row.fields["completion"])


def test_teacher_answers_after_its_own_demonstrations(examples, tokenizer, tiny_teacher, served):
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher).eval()
    pool = make_pool(examples, tokenizer, student_demonstrations=0)
    all_demonstrations = make_pool(examples, tokenizer)
    measured = evaluate_teacher(
        served, EvaluationConfig(), list(examples), tokenizer, views=RowViews(demonstrations=pool)
    )
    texts = [best_option(model, all_demonstrations, row, tokenizer, 0, False) for row in examples]
    assert [answer.text for answer in measured.answers] == texts


def test_majority_wins_and_ties_go_to_the_first_draw(examples, tokenizer):
    pool = make_pool(examples, tokenizer)
    row = examples[1]  # three options
    scorer = AnswerScorer(EvaluationConfig(), tokenizer)
    for votes, expected in (((2, 0, 2), 2), ((1, 0, 2), 1), ((0, 1, 1), 1)):

        def log_probs(answers, votes=votes):
            return [float(place % 3 == votes[place // 3]) for place in range(len(answers))]

        [answer] = answer_with_options([row], pool, DRAWS, scorer, log_probs)
        assert answer.text == row.fields["options"][expected]


def test_generated_answers_are_voted_on_too(examples, tokenizer, tiny_student):
    model = AutoModelForCausalLM.from_pretrained(tiny_student).eval()
    rows = [replace(row, fields={"task": row.fields["task"]}) for row in examples]
    pool = make_pool(ExampleTable.from_examples(rows), tokenizer, targets="tokens")
    generation = {"max_new_tokens": 3, "rows": 5}

    def answers(shown, **settings):
        settings, views = EvaluationConfig(generation=generation, **settings), RowViews(demonstrations=shown)
        evaluator = Evaluator(settings, rows, tokenizer, None, 200, views=views)
        return evaluator.run(Student(model), True).answers

    single = [{answer.where: answer.text for answer in answers(_only_draw(pool, draw))} for draw in range(DRAWS)]
    voted = answers(pool, demonstration_draws=DRAWS)
    assert len(voted) == 5
    for answer in voted:
        texts = [draw[answer.where] for draw in single]
        assert answer.text in texts
        assert texts.count(answer.text) == max(map(texts.count, texts))


def _only_draw(pool, draw):
    """`pool` with `draw` in place of every draw."""
    other = copy.copy(pool)
    other.add_evaluation_demonstrations = lambda row, _: pool.add_evaluation_demonstrations(row, draw)
    return other
