import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayk.config import DataConfig, DataSource
from rayk.data.examples import ExampleTable
from rayk.data.tokenizing import tokenize
from rayk.errors import InputError
from tests.tiny import BOS, END, EOS, spaced_tokenizer, tiny_tokenizer

PAIR = {"prompt": "Question: how many clips?", "completion": " She sold 24 clips."}
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "how many?"},
    {"role": "assistant", "content": "24 clips"},
    {"role": "user", "content": "and in May?"},
    {"role": "assistant", "content": "72"},
]


def counted_text(tokenizer, example):
    return tokenizer.decode(example.targets)


def spans_text(tokenizer, example):
    """The decoded runs of counted tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], example.counted.astype(int), [0]))))
    return [tokenizer.decode(example.input_ids[start:end]) for start, end in edges.reshape(-1, 2)]


def test_only_completion_and_eos_are_counted(tokenizer, encode):
    (example,) = encode(tokenizer, [PAIR])
    assert counted_text(tokenizer, example) == PAIR["completion"] + EOS
    assert tokenizer.decode(example.prompt_ids) == PAIR["prompt"]
    assert example.counted_tokens == len(tokenizer(PAIR["completion"])["input_ids"]) + 1
    assert example.counted[-1] and example.input_ids[-1] == tokenizer.eos_token_id
    assert example.input_ids.dtype == np.int32 and example.counted.dtype == np.bool_


@given(prompt=st.text(min_size=1, max_size=30), completion=st.text(min_size=1, max_size=30).filter(str.strip))
@settings(max_examples=60, deadline=None)
def test_counted_tokens_decode_to_the_completion(tokenizer, encode, prompt, completion):
    (example,) = encode(tokenizer, [{"prompt": prompt, "completion": completion}])
    expected = tokenizer(completion)["input_ids"] + [tokenizer.eos_token_id]
    assert example.targets.tolist() == expected


def test_prompt_tokens_are_equal_in_training_and_evaluation(tokenizer, bos_tokenizer, encode):
    # "clips" is one token in both; tokenised together, "cl" + "ips" would become it and the prompt would be lost
    rows = [{"prompt": "how many cl", "completion": "ips"}, PAIR]
    for chosen in (tokenizer, bos_tokenizer):
        trained = encode(chosen, rows)
        prompts = encode(chosen, [{"prompt": row["prompt"]} for row in rows], prompts_only=True)
        for example, prompt, line in zip(trained, prompts, encode.lines, strict=True):
            assert (
                example.prompt_ids.tolist() == prompt.input_ids.tolist() == chosen(line.fields["prompt"])["input_ids"]
            )
            assert encode.reader.prompt_of(line).tolist() == prompt.input_ids.tolist()
            assert prompt.counted_tokens == 0 and prompt.prompt_tokens == len(prompt)


def test_bos_is_added_before_the_prompt_only(bos_tokenizer, encode):
    (example,) = encode(bos_tokenizer, [PAIR])
    assert bos_tokenizer.decode(example.input_ids) == BOS + PAIR["prompt"] + PAIR["completion"] + EOS
    (empty,) = encode(bos_tokenizer, [{"prompt": "", "completion": "24"}])
    assert counted_text(bos_tokenizer, empty) == "24" + EOS and not empty.counted[0]


def test_prompt_does_not_end_with_the_tokenizers_eos(encode):
    from tokenizers import processors

    tokenizer = tiny_tokenizer(bos=True)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(BOS, 2), (EOS, 1)]
    )
    assert tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
    (example,) = encode(tokenizer, [PAIR])
    assert tokenizer.decode(example.input_ids) == BOS + PAIR["prompt"] + PAIR["completion"] + EOS


def test_existing_eos_of_a_completion_is_not_doubled(tokenizer, encode):
    (example,) = encode(tokenizer, [PAIR | {"completion": "24" + EOS}])
    assert counted_text(tokenizer, example) == "24" + EOS


def test_pad_token_can_be_eos(encode):
    same = tiny_tokenizer(pad_is_eos=True)
    (example,) = encode(same, [PAIR])
    assert counted_text(same, example) == PAIR["completion"] + EOS
    (chat,) = encode(same, [{"messages": CHAT}])
    assert counted_text(same, chat) == "72" + END


def test_templates_insert_fields(tokenizer, encode):
    row = {"question": "2 {x}?", "answer": "It is <<1+1=2>>2.\n#### 2", "id": 7}
    template = {"prompt_template": "Q{id} {{a}}: {question}\nAnswer:", "completion_template": " {answer}"}
    (example,) = encode(tokenizer, [row], **template)
    assert tokenizer.decode(example.prompt_ids) == "Q7 {a}: 2 {x}?\nAnswer:"
    assert counted_text(tokenizer, example) == " It is <<1+1=2>>2.\n#### 2" + EOS
    (mixed,) = encode(tokenizer, [row], prompt_template="{question}", completion_field="answer")
    assert counted_text(tokenizer, mixed) == row["answer"] + EOS


@pytest.mark.parametrize("template", ["{}", "{0}", "{a.b}", "{a[0]}", "{a!r}", "{a:>3}", "{a", "a}"])
def test_templates_accept_plain_fields_only(tokenizer, encode, template):
    with pytest.raises(InputError, match=r"^data\.train\.prompt_template "):
        encode(tokenizer, [{"a": "x", "completion": "y"}], prompt_template=template)


def test_last_turn_is_counted_through_its_end_token(tokenizer, encode):
    (example,) = encode(tokenizer, [{"messages": CHAT}])
    assert spans_text(tokenizer, example) == ["72" + END]
    prompt = tokenizer.apply_chat_template(CHAT[:-1], tokenize=False, add_generation_prompt=True)
    assert example.prompt_ids.tolist() == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert encode.reader.prompt_of(encode.lines[0]).tolist() == example.prompt_ids.tolist()
    assert example.counted[-1]  # the newline behind the end token is cut off


def test_all_turns_are_counted_with_train_on_all(tokenizer, encode):
    (example,) = encode(tokenizer, [{"messages": CHAT}], train_on="all")
    assert spans_text(tokenizer, example) == ["24 clips" + END, "72" + END]
    whole = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert tokenizer.decode(example.input_ids) == whole.removesuffix("\n")
    assert example.prompt_tokens == encode(tokenizer, [{"messages": CHAT}])[0].prompt_tokens


def test_turn_is_tokenized_jointly_where_its_boundary_is_a_token_boundary(encode):
    from tokenizers import pre_tokenizers

    tokenizer = tiny_tokenizer()  # made to put a space before every text, as SentencePiece tokenizers do
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    (example,) = encode(tokenizer, [{"messages": CHAT}])
    assert spans_text(tokenizer, example) == ["72" + END]
    whole = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert tokenizer(whole)["input_ids"][: len(example)] == example.input_ids.tolist()


def test_tokenizers_that_put_a_space_before_texts_add_none_to_a_completion(encode):
    tokenizer = spaced_tokenizer()
    for prompt, completion in (("Answer:", " four"), ("Answer:", "four"), ("how many cl", "ips")):
        row = {"prompt": prompt, "completion": completion}
        (example,) = encode(tokenizer, [row])
        assert tokenizer.decode(example.input_ids) == f"{BOS} {prompt}{completion}{EOS}"
        assert example.prompt_ids.tolist() == tokenizer(prompt)["input_ids"]
        (pair,) = encode(tokenizer, [{"prompt": prompt, "chosen": completion, "rejected": "no"}], format="preference")
        assert pair.input_ids.tolist() == example.input_ids.tolist()


@given(texts=st.lists(st.text(min_size=1, max_size=12).filter(str.strip), min_size=2, max_size=6))
@settings(max_examples=40, deadline=None)
def test_each_counted_turn_is_preceded_by_its_generation_prompt(tokenizer, encode, texts):
    roles = ["user", "assistant"] * 3
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    messages = messages[: len(messages) // 2 * 2]
    (example,) = encode(tokenizer, [{"messages": messages}], train_on="all")
    assert spans_text(tokenizer, example) == [message["content"] + END for message in messages[1::2]]
    starts = np.flatnonzero(np.diff(example.counted.astype(int)) == 1) + 1
    for turn, start in zip(range(1, len(messages), 2), starts, strict=True):
        prompt = tokenizer.apply_chat_template(messages[:turn], tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(example.input_ids[:start]) == prompt


def test_template_without_end_token_gets_eos(encode):
    plain = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}"
    tokenizer = tiny_tokenizer(chat_template=plain + "{% if add_generation_prompt %}assistant:{% endif %}")
    messages = [{"role": "user", "content": " what"}, {"role": "assistant", "content": " 72"}]
    (example,) = encode(tokenizer, [{"messages": messages}])
    assert counted_text(tokenizer, example) == " 72\n" + EOS
    assert tokenizer.decode(example.prompt_ids) == "user: what\nassistant:"
    # a generation prompt whose last token would merge with the first of the turn: still the tokens of generation
    spaced = plain + "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = tiny_tokenizer(chat_template=spaced)
    (example,) = encode(tokenizer, [{"messages": messages}])
    assert counted_text(tokenizer, example) == "72\n" + EOS
    assert example.prompt_ids.tolist() == tokenizer("user: what\nassistant: ")["input_ids"]
    # a special token inside the turn does not end it
    messages[1] = {"role": "assistant", "content": f" 7{END} 2"}
    (example,) = encode(tokenizer, [{"messages": messages}])
    assert counted_text(tokenizer, example) == f"7{END} 2\n" + EOS


def test_row_without_a_prompt_is_skipped_unless_bos_stands_before_its_completion(tokenizer, bos_tokenizer, encode):
    row = {"prompt": "", "completion": "24"}
    assert encode(tokenizer, [row]) == [] and encode.skipped == {"empty prompt, and no BOS token": 1}
    (example,) = encode(bos_tokenizer, [row])
    assert counted_text(bos_tokenizer, example) == "24" + EOS and example.prompt_tokens == 1


def test_prompt_and_completion_can_be_rendered_in_the_chat_template(tokenizer, encode):
    (example,) = encode(tokenizer, [PAIR], chat_template=True)
    assert counted_text(tokenizer, example) == PAIR["completion"] + END
    assert tokenizer.decode(example.prompt_ids) == f"<|user|>\n{PAIR['prompt']}{END}\n<|assistant|>\n"
    (prompt,) = encode(tokenizer, [{"prompt": PAIR["prompt"]}], chat_template=True, prompts_only=True)
    assert prompt.input_ids.tolist() == example.prompt_ids.tolist()


def test_plain_text_is_counted_from_its_second_token_through_eos(tokenizer, bos_tokenizer, encode):
    (example,) = encode(tokenizer, [{"text": "the cat sat"}])
    assert example.counted.tolist() == [False] + [True] * (len(example) - 1)
    assert tokenizer.decode(example.input_ids) == "the cat sat" + EOS and example.prompt_tokens == 0
    (example,) = encode(bos_tokenizer, [{"text": "the cat sat"}])
    assert counted_text(bos_tokenizer, example) == "the cat sat" + EOS
    with pytest.raises(InputError, match="line 1 is plain text, which has no prompt"):
        encode(tokenizer, [{"text": "a"}], prompts_only=True)


CHAT_ERRORS = {
    "message 2 of 'messages' has the role 'narrator'; the roles are system, developer, user, assistant, tool, and": [
        CHAT[1],
        {"role": "narrator", "content": ""},
    ],
    r"message 1 of 'messages' has no role \(it has: name, value\)": [{"name": "human", "value": "x"}],
    "message 1 of 'messages' has no content that is text": [{"role": "user"}],
    "message 1 of 'messages' is a str, not an object": ["hello"],
    "'messages' must be a list": "hello",
    "ends with a message of role user, so it has no completion to train on": CHAT[:-1],
    "has no message before its assistant turn": [CHAT[2]],
}


@pytest.mark.parametrize("sentence", CHAT_ERRORS)
def test_malformed_messages_are_errors_that_name_the_row(tokenizer, encode, sentence):
    with pytest.raises(InputError, match=f"^rows.jsonl, line 2:? {sentence}"):
        encode(tokenizer, [{"messages": CHAT}, {"messages": CHAT_ERRORS[sentence]}])


ROW_ERRORS = [
    (
        {"question": "x", "completion": "y"},
        {},
        r"line 2 has no field 'prompt' \(it has: question, completion\); other rows have it, so correct or remove this "
        r"row\.",
    ),
    ({"prompt": None, "completion": "y"}, {}, "line 2 has nothing in field 'prompt' where text is needed"),
    ({"prompt": ["a"], "completion": "y"}, {}, "line 2 has a list in field 'prompt'"),
    ({"prompt": "\ud83d", "completion": "y"}, {}, "line 2: field 'prompt' contains half a Unicode character"),
    ({"prompt": "x"}, {"prompt_template": "{prompt}"}, "line 2 has no field 'completion'"),
    (
        {"completion": "y"},
        {"prompt_template": "{prompt}"},
        "no field 'prompt' .*; other rows have it, so correct or remove this row",
    ),
]


@pytest.mark.parametrize(("row", "how", "sentence"), ROW_ERRORS)
def test_missing_fields_are_errors_that_name_the_row(tokenizer, encode, row, how, sentence):
    with pytest.raises(InputError, match=f"rows.jsonl, {sentence}" if sentence.startswith("line") else sentence):
        encode(tokenizer, [PAIR, row], **how)


def test_auto_format_follows_from_the_first_row(tokenizer, encode):
    for fields, expected in [
        (PAIR | {"text": "x"}, "prompt_completion"),
        ({"messages": CHAT, "prompt": "x"}, "messages"),
        ({"text": "x y"}, "text"),
    ]:
        encode(tokenizer, [fields])
        assert encode.reader.format == expected
    with pytest.raises(InputError, match=r"line 1 has neither 'prompt' with .* \(it has: question, answer\)"):
        encode(tokenizer, [{"question": "x", "answer": "y"}])


def test_unsuitable_tokenizers_are_refused(encode):
    with pytest.raises(InputError, match="no end-of-sequence token"):
        encode(tiny_tokenizer(eos=False), [PAIR])
    bare = tiny_tokenizer(chat_template=None)
    with pytest.raises(InputError, match="line 1 requires a chat template, but the tokenizer has none"):
        encode(bare, [{"messages": CHAT}])
    strict = tiny_tokenizer(chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InputError, match="line 1: the chat template fails on these messages: .*roles must alternate"):
        encode(strict, [{"messages": CHAT}])


def test_unusable_rows_are_counted_by_reason(tokenizer, encode):
    rows = [PAIR, PAIR | {"completion": " \n"}, PAIR | {"completion": ""}]
    assert len(encode(tokenizer, rows)) == 1
    assert encode.skipped == {"empty completion": 2}
    silent = [*CHAT[:-1], {"role": "assistant", "content": ""}]
    assert not encode(tokenizer, [{"messages": silent}]) and encode.skipped == {"empty completion": 1}
    (example,) = encode(tokenizer, [{"messages": silent}], train_on="all")
    assert spans_text(tokenizer, example) == ["24 clips" + END]
    assert not encode(tokenizer, [{"text": ""}]) and encode.skipped == {"empty text": 1}
    assert not encode(tokenizer, [{"prompt": ""}], prompts_only=True) and encode.skipped == {"empty prompt": 1}


def test_long_rows_are_errors_or_skipped_or_truncated(tokenizer, encode):
    long = {"prompt": "the cat", "completion": "1 2 3 4 5 6 7 8 9"}
    (whole,) = encode(tokenizer, [long])
    short = len(whole) - 3
    with pytest.raises(InputError, match=f"line 2 has {len(whole)} tokens, more than data.max_tokens .{short}.; raise"):
        encode(tokenizer, [{"prompt": "a", "completion": "b"}, long], max_tokens=short)
    assert not encode(tokenizer, [long], max_tokens=short, too_long="skip")
    assert encode.skipped == {"more than max_tokens": 1}
    (cut,) = encode(tokenizer, [long], max_tokens=short, too_long="truncate")
    assert cut.input_ids.tolist() == whole.input_ids[:short].tolist()
    assert cut.counted.tolist() == whole.counted[:short].tolist()
    (fits,) = encode(tokenizer, [long], max_tokens=len(whole), max_prompt_tokens=whole.prompt_tokens)
    assert len(fits) == len(whole)
    # a prompt is never cut
    limit = whole.prompt_tokens - 1
    with pytest.raises(
        InputError, match=f"line 1 has a prompt of {limit + 1} tokens, more than data.max_prompt_tokens"
    ):
        encode(tokenizer, [long], max_prompt_tokens=limit)
    for way in ("skip", "truncate"):
        assert not encode(tokenizer, [long], max_prompt_tokens=limit, too_long=way)
        assert encode.skipped == {"more than max_prompt_tokens": 1}
    # nothing of the completion would be left
    assert not encode(tokenizer, [long], max_tokens=whole.prompt_tokens, too_long="truncate")
    assert encode.skipped == {"no counted token": 1}


@pytest.fixture
def written(tmp_path):
    rows = [{"prompt": f"the cat {i}", "completion": "é" * (i % 7), "answer": i} for i in range(2500)]
    path = tmp_path / "train.jsonl"
    path.write_text("\r\n".join(json.dumps(row) for row in rows), newline="")
    return path


def table_of(path, tokenizer, **settings):
    source = DataSource(path=str(path), **settings)
    return tokenize(source, DataConfig(train=source), tokenizer)


def test_table_returns_the_examples(written, tokenizer, caplog):
    table = table_of(written, tokenizer)
    assert len(table) == 2500 - 358 and table.skipped == {"empty completion": 358}
    assert f"empty completion (358 rows, first {written}, line 1)" in caplog.text
    for index, row in ((0, 1), (1500, 1751), (-1, 2498)):
        example = table[index]
        assert example.where == f"{written}, line {row + 1}" and example.fields["answer"] == row
        assert counted_text(tokenizer, example) == "é" * (row % 7) + EOS
        assert tokenizer.decode(example.prompt_ids) == f"the cat {row}"
    assert table.lengths.tolist() == [len(example) for example in table]
    assert table.counted_tokens.tolist() == [example.counted_tokens for example in table]
    with pytest.raises(IndexError):
        table[len(table)]


def test_table_is_shared_without_copies(written, tokenizer):
    table = table_of(written, tokenizer, rows=50)
    buffers = []
    head = pickle.dumps(table, protocol=5, buffer_callback=buffers.append)
    copy = pickle.loads(head, buffers=buffers)
    assert isinstance(copy, ExampleTable) and copy.skipped == table.skipped
    assert np.shares_memory(copy[3].input_ids, table[3].input_ids)
    assert copy.fingerprint == table.fingerprint


def test_fingerprint_differs_for_other_data_and_order(written, tokenizer, bos_tokenizer, tmp_path):
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_bytes(written.read_bytes())
    table = table_of(written, tokenizer, rows=20)
    assert table_of(moved, tokenizer, rows=20).fingerprint == table.fingerprint
    shuffled = ExampleTable.from_examples([table[i] for i in reversed(range(len(table)))])
    recounted = ExampleTable.from_examples(list(table_of(written, tokenizer, rows=19)))
    unmasked = ExampleTable.from_examples([replace(each, counted=np.zeros_like(each.counted)) for each in table])
    others = [shuffled, recounted, unmasked, table_of(written, bos_tokenizer, rows=20)]
    assert len({other.fingerprint for other in (table, *others)}) == 5


def test_source_without_usable_rows_is_refused(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"prompt": "x", "completion": ""}\n')
    with pytest.raises(InputError, match="a.jsonl' has no usable row: empty completion .1 row, first "):
        table_of(tmp_path / "a.jsonl", tokenizer)


def test_errors_name_the_section_of_the_config(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"question": "x", "completion": "y"}\n')
    evaluation = DataSource(path=str(tmp_path / "a.jsonl"), format="prompt_completion")
    data = DataConfig(train=DataSource(path="x"), evaluation=evaluation)
    with pytest.raises(InputError, match=r"set data\.evaluation\.prompt_field"):
        tokenize(data.evaluation, data, tokenizer)
