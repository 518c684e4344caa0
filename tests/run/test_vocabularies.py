"""Vocabularies that extend one another run and are reported; others are refused with the ways out."""

import json

import pytest
import torch
from tokenizers import Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast

from rayk.commands.doctor import examine
from rayk.config import StudentConfig, parse_config
from rayk.engines.build import build_engine
from rayk.errors import InputError
from rayk.models import final_hidden, real_vocab_size
from rayk.models.student import build_model_config
from rayk.models.tokenization import tokenization_differences
from rayk.models.vocabulary import compare_vocabularies, read_vocabulary
from rayk.run.inputs import read_inputs
from tests.runs import write_rows
from tests.tiny import tiny_model, tiny_tokenizer

BASE = real_vocab_size(tiny_tokenizer())


def extended(*tokens, **options):
    tokenizer = tiny_tokenizer(**options)
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    return tokenizer


def renamed(old, new, **options):
    """The tiny tokenizer in which the added token `old` is called `new` and has the same id."""
    content = json.loads(tiny_tokenizer(**options).backend_tokenizer.to_str().replace(old, new))
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="<eos>")


def save(folder, tokenizer, vocab_size=384, **options):
    tiny_model(folder, tokenizer=tokenizer, vocab_size=vocab_size, hidden=16, layers=1, **options)
    return str(folder)


def config_of(tmp_path, teacher, student, rows=None, **changes):
    path = tmp_path / "rows.jsonl"
    if rows is None:
        write_rows(path, 6)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "output": str(tmp_path / "run"), "teachers": [{"model": teacher}], "student": {"model": student},
        "data": {"train": {"path": str(path)}}, "method": {"kind": "logit_kd", "support": {"kind": "topk", "k": 4}},
    }  # fmt: skip
    return parse_config(settings | changes)


def read(config):
    return read_inputs(config, {})


def test_equal_vocabularies_change_nothing_and_are_not_mentioned(tmp_path):
    config = config_of(tmp_path, save(tmp_path / "t", tiny_tokenizer()), save(tmp_path / "s", tiny_tokenizer()))
    inputs = read(config)
    assert inputs.notes == ()
    assert inputs.vocabulary.size == BASE
    assert inputs.vocabulary.generated is None
    assert inputs.vocabulary.limit_teachers(config).teachers == config.teachers


def test_a_teacher_with_more_tokens_is_limited_to_the_students(tmp_path):
    teacher = save(tmp_path / "t", extended("<think>", "</think>"))
    config = config_of(tmp_path, teacher, save(tmp_path / "s", tiny_tokenizer()))
    inputs = read(config)
    assert "has 2 tokens that the student lacks (<think>, </think>)" in inputs.notes[0]
    [limited] = inputs.vocabulary.limit_teachers(config).teachers
    assert limited.vocab_size == BASE
    assert [build_engine(one).info.vocab_size for one in (config.teachers[0], limited)] == [BASE + 2, BASE]
    assert inputs.vocabulary.generated is None


def test_a_student_with_more_tokens_generates_only_shared_ones_and_their_rows_are_refused(tmp_path):
    teacher, student = save(tmp_path / "t", tiny_tokenizer()), save(tmp_path / "s", extended("<think>", "</think>"))
    inputs = read(config_of(tmp_path, teacher, student))
    assert "lacks 2 tokens that the student has (<think>, </think>)" in inputs.notes[0]
    assert inputs.vocabulary.generated == BASE
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "<think>b</think>"}]
    with pytest.raises(InputError, match=r"rows.jsonl, line 2 contains the token '<think>' .*teacher 'teacher' lacks"):
        read(config_of(tmp_path, teacher, student, rows))
    supervised = config_of(tmp_path, teacher, student, rows, teachers=[], method={"kind": "supervised"})
    assert read(supervised).train is not None


def test_a_renamed_token_is_noted_with_the_row_that_contains_it(tmp_path):
    teacher = save(tmp_path / "t", renamed("<|end|>", "<|stop|>"))
    student = save(tmp_path / "s", tiny_tokenizer())
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a<|end|>", "completion": "b"}]
    notes = read(config_of(tmp_path, teacher, student, rows)).notes
    assert "has other names for 1 token of the student (<|stop|> for <|end|>)" in notes[0]
    assert "line 2 contains '<|end|>', which is '<|stop|>' to teacher 'teacher'" in notes[-1]


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        (tiny_tokenizer(sentences=("x y z",)), "id [0-9]+ is '.*' for the teacher and '.*' for the student"),
        (extended("<a>", "<think>"), "'<think>' has id [0-9]+ for the teacher and [0-9]+ for the student"),
    ],
    ids=["merges", "moved"],
)
def test_tokens_with_other_ids_are_refused_with_the_ways_out(tmp_path, teacher, said):
    config = config_of(tmp_path, save(tmp_path / "t", teacher), save(tmp_path / "s", extended("<think>")))
    with pytest.raises(InputError, match=f"Teacher 'teacher' .*{said}.*Set student.tokenizer.*synthesis"):
        read(config)


def test_added_tokens_past_the_embedding_are_allowed_until_a_row_contains_one(tmp_path):
    """Gemma 3 1B's tokenizer has an image token whose id is one past the embedding."""
    teacher = save(tmp_path / "t", extended("<image>"))
    student = save(tmp_path / "s", extended("<image>"), vocab_size=BASE)
    config = config_of(tmp_path, teacher, student)
    inputs = read(config)
    assert inputs.vocabulary.limit_teachers(config).teachers[0].vocab_size == BASE
    with pytest.raises(InputError, match=r"line 1 contains the token '<image>' .*the student lacks"):
        read(config_of(tmp_path, teacher, student, [{"prompt": "<image>", "completion": "b"}]))
    small = StudentConfig(config={"model_type": "llama", "vocab_size": BASE - 1})
    with pytest.raises(InputError, match="is smaller than its tokenizer's"):
        build_model_config(small, tiny_tokenizer())


def test_a_padding_id_past_the_embedding_is_never_looked_up():
    """As after adding a padding token to GPT-2's tokenizer without resizing the model."""
    model = tiny_model(vocab_size=BASE)
    ids, mask = torch.tensor([[5, 6, 7], [8, BASE, BASE]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    hidden = final_hidden(model, ids, mask)
    alone = final_hidden(model, ids[1:, :1], mask[1:, :1])
    torch.testing.assert_close(hidden[1, 0], alone[0, 0], atol=1e-6, rtol=1e-5)


def test_other_treatment_of_text_is_described():
    student = tiny_tokenizer()
    assert tokenization_differences(student, tiny_tokenizer()) == []
    [note] = tokenization_differences(student, tiny_tokenizer(bos=True))
    assert note == "it adds <bos> before a text and the student's nothing"
    lower = tiny_tokenizer()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    [note] = tokenization_differences(student, lower)
    assert note.startswith("it splits 'The quick brown fox")
    other_end = tiny_tokenizer()
    other_end.eos_token = "<|end|>"
    assert tokenization_differences(student, other_end) == ["its end of a text is <|end|> and the student's <eos>"]


def test_doctor_reports_differences(tmp_path):
    teacher = save(tmp_path / "t", extended("<think>", bos=True))
    config = config_of(tmp_path, teacher, save(tmp_path / "s", tiny_tokenizer()))
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(config.model_dump(mode="json", exclude_unset=True)))
    texts = {check.text: check.state for check in examine(str(path))}
    assert any("has 1 token that the student lacks" in text and state == "note" for text, state in texts.items())
    assert any("adds <bos> before a text" in text and state == "note" for text, state in texts.items())
    assert any(f"share {BASE:,} token ids" in text for text in texts)


def test_an_embedding_without_the_last_tokens_has_a_smaller_vocabulary():
    tokenizer = extended("<a>", "<b>")
    whole, part = read_vocabulary(tokenizer), read_vocabulary(tokenizer, BASE + 1)
    assert (whole.size, part.size) == (BASE + 2, BASE + 1)
    difference = compare_vocabularies(part, whole)
    assert difference.shared == BASE + 1
    assert difference.student_lacks == {BASE + 1: "<b>"}
