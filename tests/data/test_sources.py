import gzip
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayk.config import DataSource
from rayk.data import json_rows, table_rows
from rayk.data import rows as row_module
from rayk.data.sources import read_rows
from rayk.errors import InputError

ROWS = [{"prompt": f"été {i}?", "completion": f"line\u2028sep 🎈 {i}"} for i in range(5)]


def rows_of(path, **settings):
    return list(read_rows(DataSource(path=str(path), **settings)))


def write_lines(path: Path, rows, end="\n") -> Path:
    path.write_bytes(end.join(json.dumps(row, ensure_ascii=False) for row in rows).encode() + end.encode())
    return path


def test_jsonl_json_parquet_and_saved_datasets_give_the_same_rows(tmp_path):
    write_lines(tmp_path / "a.jsonl", ROWS)
    write_lines(tmp_path / "lines.json", ROWS)
    (tmp_path / "list.json").write_text(json.dumps(ROWS, indent=1))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet", row_group_size=2)
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": saved, "test": saved.select([1])}).save_to_disk(tmp_path / "splits")
    for name in ("a.jsonl", "lines.json", "list.json", "a.parquet", "saved", "splits"):
        assert [row.fields for row in rows_of(tmp_path / name)] == ROWS, name
    assert [row.fields for row in rows_of(tmp_path / "splits", split="test")] == ROWS[1:2]
    with pytest.raises(InputError, match="has no split 'dev' \\(it has: train, test\\)"):
        rows_of(tmp_path / "splits", split="dev")


def test_rows_name_their_place(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n   \n{"a": "x\\ry"}\r\n{"a": 3}')
    assert [(row.fields["a"], row.where) for row in rows_of(path)] == [
        (1, f"{path}, line 1"),
        ("x\ry", f"{path}, line 4"),
        (3, f"{path}, line 5"),
    ]
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet", row_group_size=2)
    assert [row.where for row in rows_of(tmp_path / "a.parquet")][3] == f"row 4 of {tmp_path}/a.parquet"


def test_number_of_rows_can_be_limited(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ROWS)
    with open(path, "ab") as file:
        file.write(b"broken")
    assert [row.fields for row in rows_of(path, rows=5)] == ROWS
    with pytest.raises(InputError):
        rows_of(path)


def test_globs_and_folders_read_their_files_in_order(tmp_path):
    write_lines(tmp_path / "part-1.jsonl", ROWS[3:])
    write_lines(tmp_path / "part-0.jsonl", ROWS[:3])
    (tmp_path / "readme.md").write_text("x")
    assert [row.fields for row in rows_of(tmp_path)] == ROWS
    assert [row.fields for row in rows_of(tmp_path / "part-*.jsonl")] == ROWS


def test_folder_is_read_by_split(tmp_path):
    write_lines(tmp_path / "train.jsonl", ROWS[:3])
    write_lines(tmp_path / "test.jsonl", ROWS[3:])
    assert [row.fields for row in rows_of(tmp_path)] == ROWS[:3]
    assert [row.fields for row in rows_of(tmp_path, split="test")] == ROWS[3:]
    with pytest.raises(InputError, match="no file for the split 'validation' \\(it has: test.jsonl, train.jsonl\\)"):
        rows_of(tmp_path, split="validation")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'{"a": 1}\n\n{"a": \n', r"a\.jsonl, line 3 is not JSON: Expecting value \(column 6\)"),
        (b'{"a": 1}\n[1, 2]\n', r"a\.jsonl, line 2 is a list, not an object with fields"),
        (b'{"a": 1}\n{"a": "\xff"}\n', r"a\.jsonl, line 2 is not UTF-8 text; save the file as UTF-8"),
        (b"[" * 100_000, r"row 1 of .*a\.jsonl is not JSON"),
        (b'{"a": NaN}\n', r"a\.jsonl, line 1 is not JSON: NaN is no number in JSON; write null"),
        (b'{"a": 1}\n{"a": -Infinity}\n', r"a\.jsonl, line 2 is not JSON: -Infinity is no number in JSON"),
        (b'{"a": 1}\n{"a": [1e400]}\n', r"a\.jsonl, line 2 is not JSON: the number 1e400 is too large"),
        (b'{"a": 1}\n{"a": 1, "b": 0, "a": 2}\n', r"a\.jsonl, line 2 is not JSON: the key 'a' occurs twice in one"),
        (b'{"a": {"b": 1, "b": 1}}\n', r"a\.jsonl, line 1 is not JSON: the key 'b' occurs twice"),
        (b"", r"a\.jsonl' has no rows; give a source"),
        (b"\n \r\n", r"a\.jsonl' has no rows; give a source"),
    ],
)
def test_broken_line_is_an_error_that_names_it(tmp_path, content, sentence):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=sentence):
        rows_of(tmp_path / "a.jsonl")


def test_missing_and_unreadable_sources_are_errors_that_name_them(tmp_path):
    with pytest.raises(InputError, match="folder '/nowhere/a.jsonl' does not exist; check the path"):
        read_rows(DataSource(path="/nowhere/a.jsonl"))
    with pytest.raises(InputError, match="No file matches"):
        read_rows(DataSource(path=str(tmp_path / "*.jsonl")))
    with pytest.raises(InputError, match="contains no data file, such as .jsonl, .json, .csv, .tsv, .parquet .text"):
        read_rows(DataSource(path=str(tmp_path)))
    (tmp_path / "a.xlsx").write_text("a,b")
    with pytest.raises(InputError, match="not a file type that rayk reads; give one of .jsonl"):
        read_rows(DataSource(path=str(tmp_path / "a.xlsx")))
    (tmp_path / "a.parquet").write_text("not parquet")
    with pytest.raises(InputError, match="is not a valid Parquet file"):
        rows_of(tmp_path / "a.parquet")
    (tmp_path / "list.json").write_text('[{"a": 1},\n {"a": }]')
    with pytest.raises(InputError, match=r"list.json is not JSON: Expecting value \(line 2, column 8\)"):
        rows_of(tmp_path / "list.json")
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    with pytest.raises(InputError, match="has no rows"):
        rows_of(tmp_path / "empty.parquet")


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("~nosuchuser/a.jsonl", "'~nosuchuser/a.jsonl' does not exist"),
        ("a" * 300 + ".jsonl", "'a{299}…' does not exist"),
        ("a\0.jsonl", r"'a.x00.jsonl' contains a zero byte"),
        ("\0*", "contains a zero byte"),
        ("s3://bucket/a.jsonl", "is a URI, but rows are read from local files and the hub"),
    ],
)
def test_paths_that_no_file_can_have_are_errors(path, sentence):
    with pytest.raises(InputError, match=sentence):
        read_rows(DataSource(path=path))


def test_compressed_files_are_read_as_their_content(tmp_path):
    lines = write_lines(tmp_path / "a.jsonl", ROWS).read_bytes()
    contents = {".jsonl": lines, ".json": json.dumps(ROWS).encode(), ".csv": b"prompt,completion\nx,y\n"}
    for suffix, content in contents.items():
        # two parts, as of files that were concatenated
        (tmp_path / f"b{suffix}.gz").write_bytes(gzip.compress(content[:7]) + gzip.compress(content[7:]))
        zstd = pa.Codec("zstd")
        parts = (zstd.compress(part, asbytes=True) for part in (content[:7], content[7:]))
        (tmp_path / f"b{suffix}.zst").write_bytes(b"".join(parts))
        for compressed in (".gz", ".zst"):
            rows = rows_of(tmp_path / f"b{suffix}{compressed}")
            expected = [{"prompt": "x", "completion": "y"}] if suffix == ".csv" else ROWS
            assert [row.fields for row in rows] == expected
    assert rows_of(tmp_path / "b.jsonl.zst")[2].where == f"{tmp_path}/b.jsonl.zst, line 3"
    for name in ("b.jsonl.gz", "b.jsonl.zst"):
        whole = (tmp_path / name).read_bytes()
        for damaged in (whole[:-4], b"not compressed", whole[:30] + b"damaged" + whole[30:]):
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(InputError, match=f"'.*{name}' cannot be read: |{name}, line ."):
                rows_of(tmp_path / name)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_a_row_longer_than_the_limit_is_refused(tmp_path, monkeypatch, suffix):
    """A compressed file of a few kilobytes can contain a row that fills any memory."""
    for module in (row_module, json_rows, table_rows):
        monkeypatch.setattr(module, "LONGEST_ROW_BYTES", 3 << 20)
    start = {".jsonl": b'{"prompt": "', ".json": b'[{"prompt": "', ".csv": b'prompt\n"'}[suffix]
    with gzip.open(tmp_path / f"a{suffix}.gz", "wb") as file:
        file.write(start)
        for _ in range(64):
            file.write(b"x" * (1 << 20) + (b"\n" if suffix == ".csv" else b""))
    with pytest.raises(InputError, match=r"is longer than 3 MB|field larger than field limit"):
        rows_of(tmp_path / f"a{suffix}.gz")


def test_folder_is_read_without_tables_beside_its_rows_and_without_copies(tmp_path):
    (tmp_path / "labels.csv").write_text("label,meaning\n1,cat\n")
    assert [row.fields for row in rows_of(tmp_path)] == [{"label": "1", "meaning": "cat"}]
    lines = write_lines(tmp_path / "a.csv.jsonl", ROWS[:3]).read_bytes()
    (tmp_path / "a.csv.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(write_lines(tmp_path / "c", ROWS[3:]).read_bytes()))
    assert [row.fields for row in rows_of(tmp_path)] == ROWS


def test_unavailable_hub_dataset_is_an_error_in_one_sentence(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="No dataset 'nobody/nothing' .split 'train'. could be loaded") as caught:
        read_rows(DataSource(path="nobody/nothing"))
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("Check the network, or give a local file or a folder saved by `datasets`.")
