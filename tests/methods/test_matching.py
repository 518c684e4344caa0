"""The reported masses on a signal's ids are those of both models' dense distributions."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from rayk.config import DataConfig, DataSource
from rayk.config.support import Hidden, TopK
from rayk.data.batches import collate
from rayk.data.tokenizing import tokenize
from rayk.methods.base import Experience
from rayk.methods.matching import match_teacher
from rayk.models import load_tokenizer
from rayk.training.student import Student
from tests.runs import write_rows


@pytest.fixture
def experience(tmp_path, tiny_student):
    source = DataSource(path=str(write_rows(tmp_path / "rows.jsonl", 5)))
    rows = tokenize(source, DataConfig(train=source), load_tokenizer(tiny_student))
    return Experience(collate(list(rows), 0))


def dense(folder, batch):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = batch.counted(model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits)
    return logits.float().softmax(1)


def of(experience, teacher, folder, support):
    said = Experience(experience.batch, teacher.score(experience.batch, support))
    student = Student(AutoModelForCausalLM.from_pretrained(folder).eval())
    return match_teacher("reverse_kl", student, student.head, said).terms


def test_masses_are_those_of_the_signal_ids(experience, served, tiny_teacher, tiny_student):
    masses = of(experience, served, tiny_student, TopK(8))
    p, q = dense(tiny_teacher, experience.batch), dense(tiny_student, experience.batch)
    named = p[:, : served.vocab_size].topk(8, dim=1)
    torch.testing.assert_close(masses["teacher_mass"], named.values.sum(1), atol=2e-3, rtol=0)
    torch.testing.assert_close(masses["student_mass"], q.gather(1, named.indices).sum(1), atol=2e-3, rtol=0)


def test_hidden_signals_report_no_masses(experience, served, tiny_student):
    assert of(experience, served, tiny_student, Hidden()) == {}
