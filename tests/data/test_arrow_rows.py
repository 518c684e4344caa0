"""Parquet files and datasets with nested columns, and values that Python cannot represent."""

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayk.config import DataConfig, DataSource
from rayk.data.row_texts import RowTexts
from rayk.data.sources import read_rows
from rayk.data.tokenizing import tokenize
from rayk.errors import InputError


def write(tmp_path, table, name="a.parquet"):
    pq.write_table(table, tmp_path / name)
    return tmp_path / name


def fields_of(path):
    return [row.fields for row in read_rows(DataSource(path=str(path)))]


def call(name, **arguments):
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}


CALLS = [
    {"messages": [{"role": "user", "content": "Weather?"}, call("get_weather", city="Bern")], "note": None},
    {"messages": [{"role": "user", "content": "Time?"}, call("get_time", zone="CET", at=None)], "note": "x"},
]


def test_fields_that_arrow_adds_to_structs_are_removed(tmp_path):
    table = pa.Table.from_pylist(CALLS)
    assert table.to_pylist()[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]["zone"] is None
    dataset = datasets.Dataset(table)
    dataset.save_to_disk(tmp_path / "saved")
    for path in (write(tmp_path, table), tmp_path / "saved"):
        rows = list(read_rows(DataSource(path=str(path))))
        assert [row.fields["note"] for row in rows] == [None, "x"]
        arguments = [RowTexts(DataSource(path="")).messages(row)[1]["tool_calls"][0]["function"] for row in rows]
        # `at` is null in all rows, so that it is content and not Arrow's
        assert arguments[0] == {"name": "get_weather", "arguments": {"city": "Bern", "at": None}}
        assert arguments[1] == {"name": "get_time", "arguments": {"zone": "CET", "at": None}}


def test_maps_are_objects_and_lists_keep_nulls(tmp_path):
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("meta", pa.map_("string", "string"))]))
    messages = [{"role": "user", "content": "a", "meta": [("k", "v"), ("n", None)]}]
    table = pa.table({"messages": pa.array([messages], kind), "options": [["a", None]]})
    assert fields_of(write(tmp_path, table)) == [
        {"messages": [{"role": "user", "content": "a", "meta": {"k": "v", "n": None}}], "options": ["a", None]}
    ]


def test_messages_of_different_shape_in_a_dataset(tmp_path):
    features = datasets.Features({"messages": datasets.List(datasets.Json())})
    rows = [{"messages": [{"role": "user", "content": "a", "meta": {"x": None}}]}, {"messages": [{"role": "tool"}]}]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
    assert fields_of(tmp_path / "saved") == rows


HOSTILE = {
    "a date after 9999": pa.array([0, 9_000_000], pa.date32()),
    "bytes that are no text": pa.array([b"x", b"\xff"]).view(pa.string()),
    "a map with the same key twice": pa.array([[("k", 1)], [("k", 1), ("k", 2)]], pa.map_(pa.string(), pa.int32())),
    "a date in a list": pa.array([[0], [9_000_000]], pa.list_(pa.date32())),
}  # fmt: skip


@pytest.mark.parametrize("column", HOSTILE.values(), ids=HOSTILE)
def test_unreadable_value_matters_only_where_it_is_read(tmp_path, tokenizer, column):
    table = pa.table({"prompt": ["a", "b"], "completion": ["c", "d"], "when": column})
    path = write(tmp_path, table)
    assert [(row["prompt"], row["completion"]) for row in fields_of(path)] == [("a", "c"), ("b", "d")]
    source = DataSource(path=str(path))
    assert len(tokenize(source, DataConfig(train=source), tokenizer)) == 2
    read = DataSource(path=str(path), prompt_field="when", rows=2)
    row = list(read_rows(read))[1]
    with pytest.raises(InputError, match="^row 2 of .*a.parquet: field 'when' cannot be read: .*; correct the row"):
        RowTexts(read).prompt(row)


def test_broken_schemas_are_errors(tmp_path):
    path = write(tmp_path, pa.table({"prompt": ["a"]}))
    path.write_bytes(path.read_bytes().replace(b"prompt", b"pr\xffmpt"))
    with pytest.raises(InputError, match=r"a.parquet' has a name of a column that is not UTF-8 text|not a valid Parq"):
        fields_of(path)
    twice = pa.table([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    with pytest.raises(InputError, match=r"a.parquet' has two columns of the same name \(prompt, prompt\); rename one"):
        fields_of(write(tmp_path, twice))


def test_cut_parquet_files_are_errors(tmp_path):
    path = write(tmp_path, pa.table({"prompt": ["abc" * i for i in range(500)]}))
    whole = path.read_bytes()
    for damaged in (whole[:-3], whole[:100], whole[4:], whole[:50] + b"x" * 200 + whole[250:]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="a.parquet"):
            assert len(fields_of(path)) == 500
