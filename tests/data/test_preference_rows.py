"""Rows of two answers to one prompt become pairs of token sequences, whichever of TRL's forms they come in."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest

from rayk.config import DataConfig, DataSource
from rayk.data.batches import collate, make_batches
from rayk.data.examples import ExampleTable
from rayk.data.tokenizing import tokenize
from rayk.errors import InputError
from tests.tiny import BOS, END, EOS, tiny_tokenizer

PAIR = {"prompt": "Question: how many clips?", "chosen": " She sold 24 clips.", "rejected": " 48"}
USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "how many?"), ("assistant", "24"), ("assistant", "4 8"))
)


@pytest.fixture
def encode_pairs(encode):
    def run(tokenizer, rows, **settings):
        return encode(tokenizer, rows, **{"format": "preference"} | settings)

    return run


def counted_texts(tokenizer, example):
    return [tokenizer.decode(answer.targets) for answer in example.answers]


def test_both_answers_and_their_eos_are_counted_after_one_prompt(bos_tokenizer, encode_pairs):
    (example,) = encode_pairs(bos_tokenizer, [PAIR])
    assert counted_texts(bos_tokenizer, example) == [" She sold 24 clips." + EOS, " 48" + EOS]
    for answer in example.answers:
        assert bos_tokenizer.decode(answer.prompt_ids) == BOS + PAIR["prompt"]
        assert answer.counted.tolist() == [i >= example.prompt_tokens for i in range(len(answer))]
        assert (answer.where, answer.fields) == ("rows.jsonl, line 1", PAIR)


def test_plain_row_is_its_only_answer(tokenizer, encode):
    (example,) = encode(tokenizer, [{"prompt": "a", "completion": "b"}])
    assert example.answers == [example]


def test_existing_eos_is_not_doubled_and_text_can_be_rendered_in_the_template(tokenizer, encode_pairs):
    (example,) = encode_pairs(tokenizer, [PAIR | {"rejected": "48" + EOS}])
    assert counted_texts(tokenizer, example)[1] == "48" + EOS
    (chat,) = encode_pairs(tokenizer, [PAIR], chat_template=True)
    assert counted_texts(tokenizer, chat) == [PAIR["chosen"] + END, PAIR["rejected"] + END]
    assert tokenizer.decode(chat.prompt_ids) == f"<|user|>\n{PAIR['prompt']}{END}\n<|assistant|>\n"


CONVERSATIONS = {
    "explicit prompt": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "implicit prompt": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "prompt as text": {"prompt": "how many?", "chosen": [GOOD], "rejected": [BAD]},
    "answers as text": {"prompt": [USER], "chosen": "24", "rejected": "4 8"},
    "one answer as text": {"prompt": "how many?", "chosen": [GOOD], "rejected": "4 8"},
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "how many?"}],
        "chosen": {"from": "gpt", "value": "24"},
        "rejected": {"from": "gpt", "value": "4 8"},
    },
    "prompt as text beside whole conversations": {"prompt": "how m…", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
}


@pytest.mark.parametrize("row", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_all_forms_of_conversations_give_the_same_pair(tokenizer, encode_pairs, row):
    (example,) = encode_pairs(tokenizer, [row])
    assert tokenizer.decode(example.prompt_ids) == f"<|user|>\nhow many?{END}\n<|assistant|>\n"
    assert counted_texts(tokenizer, example) == ["24" + END, "4 8" + END]


def test_last_message_of_a_longer_conversation_is_counted(tokenizer, encode_pairs):
    before = [{"role": "system", "content": "be brief"}, USER, GOOD, {"role": "user", "content": "and in May?"}]
    (example,) = encode_pairs(tokenizer, [{"prompt": before, "chosen": [BAD], "rejected": [GOOD]}])
    assert counted_texts(tokenizer, example) == ["4 8" + END, "24" + END]
    (prompt,) = encode_pairs(tokenizer, [{"prompt": before, "chosen": [BAD], "rejected": [GOOD]}], prompts_only=True)
    assert prompt.input_ids.tolist() == example.prompt_ids.tolist()
    assert prompt.rejected is None


def test_fields_and_templates_can_be_set(tokenizer, encode_pairs):
    row = {"question": "2?", "better": "b", "worse": "w"}
    names = {"prompt_template": "Q: {question}", "chosen_field": "better", "rejected_field": "worse"}
    (example,) = encode_pairs(tokenizer, [row], **names)
    assert tokenizer.decode(example.prompt_ids) == "Q: 2?"
    assert counted_texts(tokenizer, example) == ["b" + EOS, "w" + EOS]


def test_unusable_pairs_are_skipped_and_counted(tokenizer, encode, encode_pairs):
    rows = [
        PAIR, PAIR | {"rejected": PAIR["chosen"]}, PAIR | {"chosen": " \n"}, PAIR | {"rejected": ""},
        PAIR | {"rejected": PAIR["chosen"] + EOS},
    ]  # fmt: skip
    assert len(encode_pairs(tokenizer, rows)) == 1
    assert encode.skipped == {"identical answers": 2, "empty chosen answer": 1, "empty rejected answer": 1}


def test_pair_with_one_long_answer_is_too_long(tokenizer, encode, encode_pairs):
    (whole,) = encode_pairs(tokenizer, [PAIR])
    limit = len(whole.rejected)
    assert limit < len(whole)
    with pytest.raises(InputError, match=f"line 1 has {len(whole)} tokens, more than data.max_tokens .{limit}.; raise"):
        encode_pairs(tokenizer, [PAIR], max_tokens=limit)
    turned = PAIR | {"chosen": PAIR["rejected"], "rejected": PAIR["chosen"]}
    for row in (PAIR, turned):
        assert not encode_pairs(tokenizer, [row], max_tokens=limit, too_long="skip")
        assert encode.skipped == {"more than max_tokens": 1}
    (cut,) = encode_pairs(tokenizer, [PAIR], max_tokens=limit, too_long="truncate")
    assert cut.input_ids.tolist() == whole.input_ids[:limit].tolist()
    assert cut.rejected.input_ids.tolist() == whole.rejected.input_ids.tolist()
    # what is left of the two may be the same
    alike = PAIR | {"rejected": PAIR["chosen"] + " And more."}
    assert not encode_pairs(tokenizer, [alike], max_tokens=len(whole) - 1, too_long="truncate")
    assert encode.skipped == {"identical answers": 1}


WRONG = {
    "line 2 has no field 'chosen' .it has: prompt, completion.; other rows have it, so correct or remove this row": {
        "prompt": "a", "completion": "b"
    },
    "line 2 has no field 'prompt' .it has: chosen, rejected.; other rows have it, so correct or remove this row": {
        "chosen": "b", "rejected": "c"
    },
    "line 2 has a list in field 'rejected' where text is needed": PAIR | {"rejected": [BAD]},
    "line 2 has nothing in field 'rejected' where text is needed": PAIR | {"rejected": None},
}  # fmt: skip
WRONG_CONVERSATIONS = {
    "line 2: 'chosen' and 'rejected' differ before their last message": {
        "chosen": [USER, GOOD], "rejected": [{"role": "user", "content": "what?"}, BAD]
    },
    "line 2: 'rejected' must end with a message of role assistant": {"chosen": [USER, GOOD], "rejected": [USER, USER]},
    "line 2: 'chosen' must end with a message of role assistant": {"prompt": [], "chosen": [USER], "rejected": [BAD]},
    "line 2: 'rejected' must end with a message of role assistant after": {"chosen": [USER, GOOD], "rejected": "4 8"},
    "line 2: 'rejected' must be a list of at least one message": {"chosen": [USER, GOOD], "rejected": []},
    "line 2: message 1 of 'chosen' has the role 'me'": {
        "chosen": [{"role": "me", "content": "?"}, GOOD], "rejected": [USER, BAD]
    },
}  # fmt: skip


@pytest.mark.parametrize("sentence", [*WRONG, *WRONG_CONVERSATIONS])
def test_malformed_pairs_are_errors_that_name_the_row(tokenizer, encode_pairs, sentence):
    first, row = (PAIR, WRONG[sentence]) if sentence in WRONG else (
        CONVERSATIONS["implicit prompt"], WRONG_CONVERSATIONS[sentence]
    )  # fmt: skip
    with pytest.raises(InputError, match=f"^rows.jsonl, {sentence}"):
        encode_pairs(tokenizer, [first, row])


@pytest.fixture
def table(tmp_path, tokenizer):
    rows = [PAIR | {"chosen": "é" * (i % 5), "rejected": " 48" * (1 + i % 3)} for i in range(1500)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = DataSource(path=str(path))
    return tokenize(source, DataConfig(train=source), tokenizer, pairs=True)


def test_table_stores_pairs_and_counts_both_answers(table, tokenizer):
    assert len(table) == 1200
    assert table.skipped == {"empty chosen answer": 300}
    for index, row in ((0, 1), (900, 1126), (-1, 1499)):
        assert table[index].where.endswith(f"line {row + 1}")
        assert counted_texts(tokenizer, table[index]) == ["é" * (row % 5) + EOS, " 48" * (1 + row % 3) + EOS]
    answers = [example.answers for example in table]
    assert table.lengths.tolist() == [sum(map(len, pair)) for pair in answers]
    assert table.counted_tokens.tolist() == [sum(each.counted_tokens for each in pair) for pair in answers]
    assert table.longest == max(len(each) for pair in answers for each in pair)
    copy = pickle.loads(pickle.dumps(table))
    assert copy[3].rejected.input_ids.tolist() == table[3].rejected.input_ids.tolist()
    assert copy.fingerprint == table.fingerprint


def test_fingerprint_differs_for_another_rejected_answer(table):
    examples = list(table)[:8]
    first, second = examples[0], examples[1]
    assert len(first.rejected) != len(second.rejected)
    same_length = replace(first.rejected, input_ids=np.flip(first.rejected.input_ids))
    alone = [replace(each, rejected=None) for each in examples]
    others = [
        [replace(first, rejected=other), *examples[1:]] for other in (second.rejected, same_length, first.rejected)
    ]
    found = [ExampleTable.from_examples(rows).fingerprint for rows in (examples, alone, *others)]
    assert len(set(found)) == 4
    assert found[-1] == found[0]


def test_first_token_of_both_answers_is_not_counted_after_an_empty_prompt(tmp_path, tokenizer):
    source = DataSource(path="rows.jsonl")
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(PAIR | {"prompt": ""}))
    (example,) = tokenize(DataSource(path=str(path)), DataConfig(train=source), tokenizer, pairs=True)
    for answer in example.answers:
        assert answer.counted.tolist() == [False] + [True] * (len(answer) - 1)


def test_make_batches_gives_both_answers():
    tokenizer = tiny_tokenizer()
    batches = make_batches([PAIR, PAIR], tokenizer, 2, format="preference")
    pairs = collate([answer for row in batches[0].sequences for answer in row.answers], 0)
    assert [tokenizer.decode(each.targets) for each in pairs.sequences] == [
        PAIR["chosen"] + EOS, PAIR["rejected"] + EOS
    ] * 2  # fmt: skip
    assert np.array_equal(pairs.sequences[0].prompt_ids, pairs.sequences[1].prompt_ids)
