"""Rows in the tokens of another tokenizer: every byte is in one group, whatever the text, and ends align with ends."""

import pickle

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import EOS, SENTENCES, tiny_sentencepiece, tiny_tokenizer
from tokenizers import decoders, normalizers

from rayk.config import DataConfig, DataSource
from rayk.data.alignment import RowAligner, UnalignableRow
from rayk.data.examples import Example
from rayk.data.sources import Row
from rayk.data.token_bytes import TokenBytes, shared_vocabulary
from rayk.data.tokenizing import RowTokenizer
from rayk.errors import InputError
from rayk.rollouts.policy import with_completion
from rayk.signals.alignment import group_by_bytes

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<turn>{{ message['role'] }}: {{ message['content'] | trim }}<eos>"
    "{% endfor %}{% if add_generation_prompt %}<turn>assistant: {% endif %}"
)
TOKENIZERS = {
    "bytes": tiny_tokenizer(),
    "other bytes": tiny_tokenizer(sentences=("sold many clips", "the answer is on the log"), vocab_size=300, bos=True),
    "sentencepiece": tiny_sentencepiece(chat_template=TEMPLATE),
    "unigram": tiny_sentencepiece(unigram=True),
    "with space": tiny_sentencepiece(prefix_space=True),
}
FAMILY, COMBINED = "👩\u200d👩\u200d👧\u200d👦", "e\u0301\u0323 ñ ếu"
TEXTS = st.lists(
    st.sampled_from([*SENTENCES, FAMILY, COMBINED, "你好，世界", "  ", "\t", "\n\n", "12345", " 3.14", "<|user|>", "é"])
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
    min_size=1, max_size=6,
).map("".join)  # fmt: skip


def aligner(student: str, teacher: str, source: dict | None = None, max_tokens: int = 4096, **data) -> RowAligner:
    given_rows = DataSource(path="rows.jsonl", **(source or {}))
    settings_of_data = DataConfig(train=given_rows, **data)
    return RowAligner("big", settings_of_data, TOKENIZERS[student], TOKENIZERS[teacher], max_tokens)


def example_of(student: str, fields: dict, source: dict | None = None, **data) -> Example:
    given_rows = DataSource(path="rows.jsonl", **(source or {}))
    rows = RowTokenizer(given_rows, DataConfig(train=given_rows, **data), TOKENIZERS[student])
    (row,) = rows.examples([Row(fields, "rows.jsonl, line 1")])
    return row


def texts_of(tokens: list[bytes], spans: np.ndarray) -> list[bytes]:
    return [b"".join(tokens[first:end]) for first, end in spans]


@given(st.lists(st.integers(0, 4), max_size=12), st.lists(st.integers(0, 4), max_size=12))
def test_groups_are_minimal_and_partition_both_sides(student, teacher):
    groups = group_by_bytes(student, teacher)
    assert (groups[1:, 0] == groups[:-1, 1]).all() and (groups[1:, 2] == groups[:-1, 3]).all()
    assert not len(groups) or (groups[0, 0] == 0 and groups[0, 2] == 0)
    for first, end, teacher_first, teacher_end in groups:
        assert sum(student[first:end]) == sum(teacher[teacher_first:teacher_end]) > 0
        inner = set(np.cumsum(student[first:end])[:-1]) & set(np.cumsum(teacher[teacher_first:teacher_end])[:-1])
        assert not inner - {0, sum(student[first:end])}
    if sum(student) == sum(teacher):
        assert sum(sum(student[first:end]) for first, end, *_ in groups) == sum(student)


@pytest.mark.parametrize("teacher", TOKENIZERS)
@pytest.mark.parametrize("student", ["bytes", "sentencepiece"])
@settings(max_examples=25, deadline=None)
@given(text=TEXTS)
@example(text=FAMILY + COMBINED)
@example(text="  two  spaces\t\n\n 42")
@example(text=" ")
def test_every_byte_is_covered_once(student, teacher, text):
    row = example_of(student, {"prompt": "Question:", "completion": f"{text}."})
    view = aligner(student, teacher).align(row)
    own, its = (TokenBytes(TOKENIZERS[name], name) for name in (student, teacher))
    student_texts = texts_of(own.of(row.targets), view.groups.student)
    teacher_texts = texts_of(its.of(view.sequence.targets), view.groups.teacher)
    assert (
        b"".join(student_texts[:-1])
        == f"{text}.".encode()
        == b"".join(teacher_texts[:-1]).removeprefix(
            b" " if teacher == "with space" and not text.startswith(" ") else b""
        )
    )
    assert student_texts[1:-1] == teacher_texts[1:-1]
    assert student_texts[-1] == teacher_texts[-1] == EOS.encode()
    assert view.groups.is_single[-1]
    assert (
        view.groups.student[-1, 1] == row.counted_tokens and view.groups.teacher[-1, 1] == view.sequence.counted_tokens
    )
    sizes = np.diff(view.groups.student)[:, 0], np.diff(view.groups.teacher)[:, 0]
    assert not (view.groups.is_single & ((sizes[0] > 1) | (sizes[1] > 1))).any()


@pytest.mark.parametrize("name", ["bytes", "sentencepiece", "with space"])
@settings(max_examples=15, deadline=None)
@given(text=TEXTS)
def test_same_tokenizer_aligns_every_token_with_itself(name, text):
    row = example_of(name, {"prompt": "Question:", "completion": f"{text}."})
    try:
        view = aligner(name, name).align(row)
    except UnalignableRow:
        assert name == "with space" and "<" in text  # it puts another space after each special token
        return
    assert np.array_equal(view.sequence.input_ids, row.input_ids)
    assert np.array_equal(view.sequence.counted, row.counted)
    assert np.array_equal(view.groups.student, view.groups.teacher)
    assert view.groups.is_single.all() and len(view.groups) == row.counted_tokens


@pytest.mark.parametrize("name", ["bytes", "sentencepiece", "unigram"])
def test_same_tokenizer_shares_every_token(name):
    tokens = TokenBytes(TOKENIZERS[name], name)
    shared = shared_vocabulary(tokens, tokens, (TOKENIZERS[name].eos_token_id,) * 2)
    assert np.array_equal(shared.student, shared.teacher)
    assert np.array_equal(shared.student, np.arange(len(tokens.pieces)))


def test_shared_tokens_have_the_same_bytes_and_ends_are_partners():
    student, teacher = TOKENIZERS["bytes"], TOKENIZERS["sentencepiece"]
    own, its = TokenBytes(student, "s"), TokenBytes(teacher, "t")
    end = student.convert_tokens_to_ids("<|end|>")
    shared = shared_vocabulary(own, its, (end, teacher.eos_token_id))
    pairs = dict(zip(shared.student.tolist(), shared.teacher.tolist(), strict=True))
    assert pairs.pop(end) == teacher.eos_token_id
    assert all(own.pieces[one] == its.pieces[other] for one, other in pairs.items())
    assert len(set(pairs.values())) == len(pairs) > 256
    assert pairs[student.convert_tokens_to_ids("Ġcat")] == teacher.convert_tokens_to_ids("▁cat")


def test_each_side_renders_its_own_chat_template():
    fields = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "the answer is 4"}]}
    row = example_of("bytes", fields)
    view = aligner("bytes", "sentencepiece").align(row)
    teacher = TOKENIZERS["sentencepiece"]
    assert teacher.decode(view.sequence.input_ids) == (
        "<bos><turn>user: 2 + 2?<eos><turn>assistant: the answer is 4<eos>"
    )
    assert teacher.decode(view.sequence.targets) == "the answer is 4<eos>"
    student_end, teacher_end = TOKENIZERS["bytes"].convert_tokens_to_ids("<|end|>"), teacher.eos_token_id
    assert (row.targets[-1], view.sequence.targets[-1]) == (student_end, teacher_end)
    assert teacher_end == view.vocabulary.teacher[view.vocabulary.student.tolist().index(student_end)]


def test_text_that_the_students_template_puts_before_an_answer_is_not_the_teachers():
    own = TOKENIZERS["bytes"]
    thinking = own.chat_template.replace(
        "{{ message['content'] }}",
        "{{ '<think></think>' if loop.last and message['role'] == 'assistant' }}{{ message['content'] }}",
    )
    fields = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "the mat"}]}
    own.chat_template, template = thinking, own.chat_template
    try:
        row = example_of("bytes", fields)
        view = aligner("bytes", "sentencepiece").align(row)
    finally:
        own.chat_template = template
    assert "<think></think>" in own.decode(row.input_ids) and "<think>" not in own.decode(row.targets)
    assert TOKENIZERS["sentencepiece"].decode(view.sequence.targets) == "the mat<eos>"
    assert "<think>" not in TOKENIZERS["sentencepiece"].decode(view.sequence.input_ids)
    assert len(view.groups) and view.groups.student[-1, 1] == row.counted_tokens


def test_teacher_without_a_chat_template_is_named():
    fields = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
    with pytest.raises(InputError, match=r"^Teacher 'big': rows.jsonl, line 1 requires a chat template"):
        aligner("bytes", "unigram").align(example_of("bytes", fields))


def test_prompt_and_completion_are_wrapped_in_each_template():
    fields = {"prompt": "2 + 2?", "completion": "4"}
    row = example_of("bytes", fields, chat_template=True)
    view = aligner("bytes", "sentencepiece", chat_template=True).align(row)
    decoded = TOKENIZERS["sentencepiece"].decode(view.sequence.input_ids)
    assert decoded == "<bos><turn>user: 2 + 2?<eos><turn>assistant: 4<eos>"


@pytest.mark.parametrize("teacher", ["other bytes", "sentencepiece"])
def test_rollout_that_stops_inside_a_character_counts_up_to_it(teacher):
    row = example_of("bytes", {"prompt": "Question:", "completion": "x"})
    ids = TOKENIZERS["bytes"](f"the cat {FAMILY}", add_special_tokens=False).input_ids[:-2]
    rollout = with_completion(row, np.array(ids, np.int32))
    view = aligner("bytes", teacher).align(rollout)
    covered = texts_of(TokenBytes(TOKENIZERS["bytes"], "s").of(rollout.targets), view.groups.student)
    whole = f"the cat {FAMILY}".encode()
    assert whole.startswith(b"".join(covered)) and b"".join(covered).decode().startswith("the cat")
    assert view.groups.student.max() < rollout.counted_tokens
    assert TOKENIZERS[teacher].eos_token_id not in view.sequence.targets


def test_rollout_of_invalid_bytes_has_no_group():
    row = example_of("bytes", {"prompt": "Question:", "completion": "x"})
    byte = TOKENIZERS["bytes"]("你", add_special_tokens=False).input_ids[1]
    view = aligner("bytes", "sentencepiece").align(with_completion(row, np.array([byte, byte], np.int32)))
    assert not len(view.groups) and not view.sequence.counted.any()


def test_cut_rollout_has_no_end_and_no_artificial_span():
    row = example_of("bytes", {"prompt": "Question:", "completion": "x"})
    cut = TOKENIZERS["bytes"](" the mat and the do", add_special_tokens=False).input_ids
    view = aligner("bytes", "sentencepiece").align(with_completion(row, np.array(cut, np.int32)))
    assert view.groups.is_single[-1] and TOKENIZERS["sentencepiece"].eos_token_id not in view.sequence.input_ids


def test_first_token_of_a_text_row_is_not_counted():
    row = example_of("bytes", {"text": "the cat sat"})
    view = aligner("bytes", "sentencepiece").align(row)
    assert row.prompt_tokens == 0 and view.groups.student[0, 0] >= 0
    covered = b"".join(texts_of(TokenBytes(TOKENIZERS["bytes"], "s").of(row.targets), view.groups.student)[:-1])
    assert b"the cat sat".endswith(covered) and not view.sequence.counted[0]


def test_tokenizer_that_changes_the_text_is_refused_with_the_row():
    lossy = tiny_tokenizer(vocab_size=300)
    lossy.backend_tokenizer.normalizer = normalizers.Lowercase()
    TOKENIZERS["lossy"] = lossy
    try:
        row = example_of("bytes", {"prompt": "Question:", "completion": "the Cat"})
        with pytest.raises(
            UnalignableRow, match=r"^rows.jsonl, line 1 cannot be aligned: .*'big' changes.*'Cat'.*'cat'"
        ):
            aligner("bytes", "lossy").align(row)
    finally:
        del TOKENIZERS["lossy"]


@pytest.mark.parametrize("train_on", ["all", "last"])
def test_row_with_several_trained_turns_is_refused(train_on):
    turns = [("user", "2 + 2?"), ("assistant", "4"), ("user", "and 3 + 3?"), ("assistant", "6")]
    fields = {"messages": [{"role": role, "content": content} for role, content in turns]}
    row = example_of("bytes", fields, {"train_on": train_on})
    if train_on == "last":
        view = aligner("bytes", "sentencepiece").align(row)
        assert TOKENIZERS["sentencepiece"].decode(view.sequence.targets) == "6<eos>"
        return
    with pytest.raises(UnalignableRow, match="line 1 has several turns after its prompt"):
        aligner("bytes", "sentencepiece").align(row)


def test_row_that_is_too_long_for_the_teacher_is_refused():
    row = example_of("bytes", {"prompt": "Question:", "completion": FAMILY * 4})
    with pytest.raises(UnalignableRow, match="line 1 has .* tokens in the tokenizer of teacher 'big', which takes 40;"):
        aligner("bytes", "sentencepiece", max_tokens=40).align(row)


def test_tokenizer_of_unknown_bytes_is_refused():
    wordpiece = tiny_tokenizer(vocab_size=300)
    wordpiece.backend_tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(InputError, match="teacher 'big' cannot be aligned.*synthesis 'responses'"):
        TokenBytes(wordpiece, "teacher 'big'")


def test_aligner_can_be_pickled():
    row = example_of("bytes", {"prompt": "Question:", "completion": "the cat"})
    one = aligner("bytes", "sentencepiece")
    again = pickle.loads(pickle.dumps(one)).align(row)
    assert np.array_equal(again.sequence.input_ids, one.align(row).sequence.input_ids)
