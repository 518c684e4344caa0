"""JSON files of every form are read row by row, in constant memory."""

import contextlib
import io
import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayk.data import json_rows
from rayk.data.json_rows import read_json
from rayk.errors import InputError

FIELDS = {"prompt", "completion", "messages", "text"}
ROWS = [{"prompt": f"été {i}", "completion": '\\"]}, 🎈'} for i in range(5)]


def read(content: bytes | str, split="train"):
    content = content.encode() if isinstance(content, str) else content
    return [(row.fields, row.where) for row in read_json(lambda: io.BytesIO(content), "a.json", split, FIELDS)]


def rows_of(content, split="train"):
    return [fields for fields, _ in read(content, split)]


@pytest.fixture(params=[1, 7, 1 << 20])
def chunk_bytes(request, monkeypatch):
    monkeypatch.setattr(json_rows, "_CHUNK_BYTES", request.param)


@pytest.mark.usefixtures("chunk_bytes")
def test_all_forms_give_the_same_rows():
    for indent in (None, 2):
        assert rows_of(json.dumps(ROWS, indent=indent)) == ROWS
        for document in ({"data": ROWS}, {"version": "1.1", "n": 12.5, "data": ROWS, "tags": ["a"], "errors": []}):
            assert rows_of(json.dumps(document, indent=indent)) == ROWS
    assert rows_of("\n".join(map(json.dumps, ROWS))) == ROWS
    assert rows_of(b"\xef\xbb\xbf \n" + json.dumps({"data": ROWS}, ensure_ascii=False).encode() + b"\n \n") == ROWS


@pytest.mark.usefixtures("chunk_bytes")
def test_object_with_a_field_of_rows_is_a_row():
    row = {"messages": [{"role": "user", "content": "a"}], "id": 1, "spans": [{"start": 1}]}
    assert read(json.dumps(row, indent=2)) == [(row, "row 1 of a.json")]
    assert read(json.dumps(row)) == [(row, "a.json, line 1")]
    assert read(json.dumps(row) + "\n" + json.dumps(row))[1] == (row, "a.json, line 2")
    assert read(json.dumps({"id": 1, "tags": ["a"]}, indent=1)) == [({"id": 1, "tags": ["a"]}, "row 1 of a.json")]


def test_one_of_several_lists_is_chosen_by_the_split():
    document = json.dumps({"validation": ROWS[:1], "train": ROWS[1:]})
    assert rows_of(document) == ROWS[1:]
    assert rows_of(document, split="validation") == ROWS[:1]
    with pytest.raises(
        InputError, match=r"^a.json has several lists of rows \(validation, train\); set the source's s"
    ):
        rows_of(document, split="test")


@pytest.mark.usefixtures("chunk_bytes")
@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('[{"a": 1},\n {"a": }]', r"row 2 of a.json is not JSON: Expecting value \(line 2, column 8\)"),
        ('[{"a": 1} {"a": 2}]', r"row 1 of a.json is not JSON: Expecting ',' \(line 1, column 11\)"),
        ('[{"a": 1}, {"a": "x', r"row 2 of a.json is not JSON: Unterminated string .*line 1, column 18"),
        ('[{"a": 1}, 5]', "row 2 of a.json is a int, not an object with fields"),
        ('[{"a": 1}, {"a": NaN}]', "row 2 of a.json is not JSON: NaN is no number"),
        ('[{"a": 1e999}]', "row 1 of a.json is not JSON: the number 1e999 is too large"),
        ('[{"a": 1}, {"a": 1, "a": 2}]', "row 2 of a.json is not JSON: the key 'a' occurs twice"),
        ('{"data": [{"a": 1},\n{"a": 1, "a": 2}]\n}', "row 2 of a.json is not JSON: the key 'a' occurs twice"),
        ('{\n "prompt": "a",\n "completion": }', r"^a.json is not JSON: Expecting value \(line 3, column 16\)"),
        ('{"prompt": "a"}\n{"prompt" "b"}\n', r"a.json, line 2 is not JSON: Expecting ':' delimiter \(column 11\)"),
        ('{"prompt": }\n{"prompt": "b"}\n', r"a.json, line 1 is not JSON: Expecting value \(column 12\)"),
        (b'[{"a": 1}, {"a": "\xff"}, {"a": 1}]', "row 2 of a.json is not UTF-8 text; save the file as UTF-8"),
        (b'{"a": 1}\n{"a": "\xff"}', "a.json, line 2 is not UTF-8 text; save the file as UTF-8"),
        ("prompt,completion\na,b", "a.json, line 1 is not JSON"),
    ],
)
def test_broken_document_is_an_error_that_names_the_place(content, sentence):
    with pytest.raises(InputError, match=sentence):
        read(content)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
row_lists = st.lists(st.dictionaries(texts, values, min_size=1, max_size=4), min_size=1, max_size=5)


@pytest.mark.slow
@given(rows=row_lists, indent=st.sampled_from([None, 0, 3]), ascii=st.booleans(), chunk=st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_any_rows_are_read_from_any_layout(rows, indent, ascii, chunk):
    document = json.dumps(rows, indent=indent, ensure_ascii=ascii).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "_CHUNK_BYTES", chunk)
        assert rows_of(document) == rows
        assert rows_of(b'{"data": ' + document + b"}") == rows


@given(content=st.binary(max_size=40) | st.text(alphabet='{}[]":,\\ \n1eNa.-', max_size=40).map(str.encode))
@settings(max_examples=300, deadline=None)
def test_any_bytes_give_rows_or_one_error(content):
    with contextlib.suppress(InputError):
        read(content)


@pytest.mark.slow
def test_long_lists_are_read_in_constant_memory():
    document = json.dumps({"data": [{"prompt": "a" * 1000, "completion": "b"}] * 20_000}).encode()
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_json(lambda: io.BytesIO(document), "a.json", "train", FIELDS)) == 20_000
        assert tracemalloc.get_traced_memory()[1] < len(document) / 2
    finally:
        tracemalloc.stop()
