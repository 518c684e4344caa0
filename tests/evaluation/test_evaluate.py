"""Evaluation's numbers are those of whole distributions, however the rows are shared out."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayk.config import DataConfig, EvaluationConfig
from rayk.config.support import TopK
from rayk.data.batches import collate
from rayk.data.tokenizing import tokenize
from rayk.evaluation.evaluate import Evaluation, Evaluator, evaluate_teacher
from rayk.models import real_vocab_size
from rayk.training.student import Student
from tests.runs import write_rows

SETTINGS = EvaluationConfig(support=TopK(10_000), generation={"max_new_tokens": 6, "rows": 7}, answer_field="answer")


@pytest.fixture(scope="module")
def tokenizer(tiny_student):
    return AutoTokenizer.from_pretrained(tiny_student)


@pytest.fixture(scope="module")
def student(tiny_student, tokenizer):
    return Student(AutoModelForCausalLM.from_pretrained(tiny_student).eval())


@pytest.fixture(scope="module")
def examples(tmp_path_factory, tokenizer):
    path = write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", count=11)
    data = DataConfig(train={"path": str(path)})
    return list(tokenize(data.train, data, tokenizer))


@torch.no_grad()
def test_metrics_equal_dense_computations(student, examples, tokenizer, served, tiny_teacher):
    measured = Evaluator(SETTINGS, examples, tokenizer, served, 300).run(student, answers=False).metrics
    teacher = AutoModelForCausalLM.from_pretrained(tiny_teacher).eval()
    log_p, log_q, targets = [], [], []
    for example in examples:
        batch = collate([example], 0)
        log_q.append(batch.counted(student.model(batch.input_ids).logits))
        log_p.append(batch.counted(teacher(batch.input_ids).logits))
        targets.append(batch.targets)
    real = real_vocab_size(tokenizer)
    agreement = torch.cat(log_q).argmax(1) == torch.cat(log_p)[:, :real].argmax(1)
    log_p, log_q = (torch.cat(parts).double().log_softmax(1) for parts in (log_p, log_q))
    # A support of all real tokens leaves the embeddings' padding to the tail.
    log_p, log_q = (
        torch.cat([each[:, :real], each[:, real:].logsumexp(1, keepdim=True)], 1) for each in (log_p, log_q)
    )
    expected = {
        "loss": -log_q.gather(1, torch.cat(targets)[:, None]).mean(),
        "forward_kl": (log_p.exp() * (log_p - log_q)).sum(1).mean(),
        "reverse_kl": (log_q.exp() * (log_q - log_p)).sum(1).mean(),
        "agreement": agreement.double().mean(),
        "teacher_entropy": -(log_p.exp() * log_p).sum(1).mean(),
        "teacher_mass": log_p[:, :real].exp().sum(1).mean(),
        "student_mass": log_q[:, :real].exp().sum(1).mean(),
    }
    assert measured == pytest.approx({name: float(value) for name, value in expected.items()}, rel=2e-3)


@torch.no_grad()
def test_masses_equal_the_probability_of_the_top_tokens(student, examples, tokenizer, served, tiny_teacher):
    settings = EvaluationConfig(support=TopK(3))
    measured = Evaluator(settings, examples, tokenizer, served, 300).run(student, answers=False).metrics
    teacher = AutoModelForCausalLM.from_pretrained(tiny_teacher).eval()
    theirs, ours = [], []
    for example in examples:
        batch = collate([example], 0)
        q = batch.counted(student.model(batch.input_ids).logits).softmax(1)
        p = batch.counted(teacher(batch.input_ids).logits).softmax(1)
        top = p[:, : real_vocab_size(tokenizer)].topk(3).indices
        theirs.append(p.gather(1, top).sum(1))
        ours.append(q.gather(1, top).sum(1))
    assert measured["teacher_mass"] == pytest.approx(float(torch.cat(theirs).mean()), rel=1e-3)
    assert measured["student_mass"] == pytest.approx(float(torch.cat(ours).mean()), rel=1e-3)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_merged_shares_equal_the_whole(student, examples, tokenizer, temperature):
    generation = SETTINGS.generation.model_copy(update={"temperature": temperature})
    settings = SETTINGS.model_copy(update={"generation": generation})
    whole = Evaluator(settings, examples, tokenizer, None, 10_000).run(student, answers=True)
    assert len(whole.answers) == 7
    shares = [Evaluator(settings, examples, tokenizer, None, 60, rank, 3).run(student, True) for rank in range(3)]
    merged = Evaluation.merge([*shares, None])
    assert merged.metrics == pytest.approx(whole.metrics, rel=1e-5)
    assert {a.where: a.text for a in merged.answers} == {a.where: a.text for a in whole.answers}


def test_samples_of_a_row_differ_and_their_metrics_are_averaged(student, examples, tokenizer):
    generation = {"max_new_tokens": 6, "rows": 3, "temperature": 1.0}
    one, four = (
        Evaluator(EvaluationConfig(generation=generation | more, metrics=["rouge_l"]), examples, tokenizer, None, 99)
        .run(student, answers=True)
        for more in ({}, {"samples": 4})
    )  # fmt: skip
    by_row = {where: [a.text for a in four.answers if a.where == where] for where in {a.where for a in four.answers}}
    assert [len(texts) for texts in by_row.values()] == [4] * 3
    assert all(len(set(texts)) > 1 for texts in by_row.values())
    assert all(answer.text in by_row[answer.where] for answer in one.answers)
    assert four.metrics["rouge_l"] == pytest.approx(sum(a.metrics["rouge_l"] for a in four.answers) / 12)


def test_answers_are_generated_in_the_precision_of_training(student, examples, tokenizer):
    dtypes = set()
    layer = student.model.model.layers[0].mlp.down_proj
    handle = layer.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    settings = EvaluationConfig(generation={"max_new_tokens": 2, "rows": 1})
    Evaluator(settings, examples, tokenizer, None, 99).run(Student(student.model, "bfloat16"), answers=True)
    handle.remove()
    assert dtypes == {torch.bfloat16}


def test_empty_share_has_no_metrics(student, examples, tokenizer):
    assert Evaluator(SETTINGS, examples[:1], tokenizer, None, 100, rank=1, world=2).run(student, True).metrics == {}


def test_teacher_evaluation_equals_the_model_alone(examples, tokenizer, served, tiny_teacher):
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher).eval()
    alone = Evaluator(SETTINGS, examples, tokenizer, None, 500).run(Student(model), answers=True)
    asked = evaluate_teacher(served, SETTINGS, examples, tokenizer)
    assert asked.metrics["loss"] == pytest.approx(alone.metrics["loss"], rel=1e-3)
    assert sorted(a.text for a in asked.answers) == sorted(a.text for a in alone.answers)
