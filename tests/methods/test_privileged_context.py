"""Privileged context: the teacher reads the row's answer before the completion, the student does not."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayk.config import parse_config
from rayk.data.tokenizing import tokenize
from rayk.methods import METHODS, OnPolicy
from rayk.rollouts import Rollout
from rayk.run import distill
from tests.runs import curve, settings

TEMPLATE = "The answer is {answer}.\n{prompt} ="


def run_config(folder, student, template=TEMPLATE, source=None, rollouts=None, **method):
    folder.mkdir(exist_ok=True)
    method = {"kind": "on_policy", "support": {"kind": "topk", "k": 16}} | method
    values = settings(folder, student, method, steps=1, batch_size=4, learning_rate=1e-4)
    values["teachers"][0]["prompt_template"] = template
    values["data"]["train"] |= source or {}
    values["data"]["chat_template"] = source is None
    values["rollouts"] |= rollouts or {}
    return parse_config(values)


@pytest.fixture
def rows(monkeypatch):
    """The rows that the runs of the test train on."""
    seen = []

    class Watching(OnPolicy):
        def loss(self, student, experience):
            seen.extend(experience.batch.sequences)
            return super().loss(student, experience)

    monkeypatch.setitem(METHODS, "on_policy", Watching)
    return seen


def hinted_prompt(tokenizer, row):
    """The ids of the teacher's prompt, from the row's fields alone."""
    messages = [{"role": "user", "content": TEMPLATE.format(**row.fields)}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return np.array(tokenizer(text, add_special_tokens=False).input_ids, np.int32)


@pytest.mark.parametrize("kind", ["topk", "hidden"])
def test_on_policy_compares_the_models_after_their_own_prompts(
    kind, rows, tmp_path, tiny_student, tiny_teacher, served
):
    vocabulary = served.info.vocab_size
    support = {"kind": "topk", "k": vocabulary} if kind == "topk" else {"kind": "hidden", "dtype": "float32"}
    distill(run_config(tmp_path, tiny_student, support=support))
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny_student, tiny_teacher))
    tokenizer = AutoTokenizer.from_pretrained(tiny_student)

    def logprobs(model, prompt, completion):
        ids = torch.from_numpy(np.concatenate([prompt, completion])).long()
        with torch.no_grad():
            found = model(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        # For a signal, the padding of the embedding is part of the tail.
        return torch.cat([found[:, :vocabulary], found[:, vocabulary:].logsumexp(1, keepdim=True)], 1)

    total = tokens = 0
    for row in rows:
        assert isinstance(row, Rollout)
        log_q = logprobs(student, row.prompt_ids, row.completion_ids)
        log_p = logprobs(teacher, hinted_prompt(tokenizer, row), row.completion_ids)
        total += F.kl_div(log_p, log_q, log_target=True, reduction="none").sum()
        tokens += len(row.completion_ids)
    assert curve(tmp_path / "run") == [pytest.approx(float(total / tokens), rel=1e-3)]


def test_an_empty_context_changes_nothing(tmp_path, tiny_student, served):
    """{prompt} is the prompt that the student reads, here made by a template of its own."""
    losses = []
    for name, template in (("plain", None), ("empty", "{prompt}"), ("full", TEMPLATE)):
        run = run_config(tmp_path / name, tiny_student, template, source={"prompt_template": "{answer} = {prompt}"})
        distill(run)
        losses += curve(tmp_path / name / "run")
    plain, empty, full = losses
    assert empty == pytest.approx(plain, rel=1e-6)
    assert abs(full - plain) > 1e-2


def test_the_teacher_writes_after_its_own_prompt(rows, tmp_path, tiny_student, served):
    """The student learns the completion after its own prompt (context distillation); in evaluation too, the teacher
    answers with its context."""
    method = {"student_fraction": 0.0, "teacher_written": 1.0}
    run = run_config(tmp_path, tiny_student, rollouts={"temperature": 0.0, "max_new_tokens": 12}, **method)
    evaluation = {"generation": {"max_new_tokens": 12}, "before_training": False}
    values = run.model_dump(mode="json") | {"evaluation": evaluation}
    values["data"]["evaluation"] = values["data"]["train"] | {"rows": 3}
    summary = distill(parse_config(values)).summary
    tokenizer = AutoTokenizer.from_pretrained(tiny_student)

    def answers(read):
        prompts = [hinted_prompt(tokenizer, row) for row in read]
        return served.generate(prompts, max_new_tokens=12, temperature=0.0)

    for row, expected in zip(rows, answers(rows), strict=True):
        assert np.array_equal(row.input_ids[row.prompt_tokens :], expected.token_ids)
        assert not np.array_equal(row.prompt_ids, hinted_prompt(tokenizer, row))
    table = tokenize(run.data.train, run.data, tokenizer)
    expected = [answer.text for answer in answers(table[i] for i in range(3))]
    assert [sample["teacher"] for sample in summary["samples"]] == expected
