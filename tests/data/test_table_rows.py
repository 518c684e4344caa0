"""CSV and TSV files: texts by the names in the header."""

import contextlib
import csv
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayk.config import DataSource
from rayk.data.sources import read_rows
from rayk.data.table_rows import read_csv
from rayk.errors import InputError


def read(content: bytes | str, delimiter=None):
    content = content.encode() if isinstance(content, str) else content
    return [(row.fields, row.where) for row in read_csv(io.BytesIO(content), "a.csv", delimiter)]


def test_rows_are_texts_and_name_their_first_line():
    content = b'\xef\xbb\xbfprompt,completion\r\n2 + 2?,4\r\n\r\n"a ""b"",\nc",007\r\nx,\n'
    assert read(content) == [
        ({"prompt": "2 + 2?", "completion": "4"}, "a.csv, line 2"),
        ({"prompt": 'a "b",\nc', "completion": "007"}, "a.csv, line 4"),
        ({"prompt": "x", "completion": ""}, "a.csv, line 6"),
    ]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_delimiter_follows_from_the_header(delimiter):
    content = f"question{delimiter}'its, answer;'{delimiter}n\nWhy, oh why?{delimiter}x{delimiter}1\n".replace("'", '"')
    if delimiter != ",":
        assert read(content)[0][0] == {"question": "Why, oh why?", "its, answer;": "x", "n": "1"}
    assert read("only\nrow, with a comma\n".replace(", ", " "))[0][0] == {"only": "row with a comma"}


def test_tsv_files_are_separated_by_tabs(tmp_path):
    (tmp_path / "a.tsv").write_text("prompt, with commas, in it\tcompletion\nx\ty\n")
    (row,) = read_rows(DataSource(path=str(tmp_path / "a.tsv")))
    assert row.fields == {"prompt, with commas, in it": "x", "completion": "y"}


def test_long_fields_are_read():
    assert len(read("text\n" + "a" * 1_000_000 + "\n")[0][0]["text"]) == 1_000_000


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("a,b\n1,2\n1,2,3\n", r"a.csv, line 3 has 3 fields, but the header has 2 \(a, b\); quote fields"),
        ('a,b\n1,"2\n2,3\n', "a.csv, line 2 is not a row of a table: unexpected end of data"),
        ('a,b\n1,2\n1,"2" x\n', "a.csv, line 3 is not a row of a table: .*; quotes inside a quoted field must be"),
        ("a,,b\n1,2,3\n", r"a.csv has an empty or repeated name in its header \('a', '', 'b'\)"),
        ("a,a\n1,2\n", "a.csv has an empty or repeated name in its header"),
        (b"a,b\n1,2\n1,\xff\n", "a.csv, line 3 is not UTF-8 text"),
        ("a,b\n1,2\n".encode("utf-16"), "a.csv, line 1 is not UTF-8 text"),
        ("a,b\r1,2\r", "a.csv, line 1 is not a row of a table: new-line character seen"),
        ('a,"b"c\n1,2\n', "a.csv, line 1 is not a row of a table"),
    ],
)
def test_broken_table_is_an_error_that_names_the_line(content, sentence):
    with pytest.raises(InputError, match=sentence):
        read(content)


def test_header_alone_has_no_rows():
    assert read("a,b\n") == read("") == read("\n\n") == []


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)


@given(rows=st.lists(st.tuples(texts, texts), max_size=5), delimiter=st.sampled_from([",", ";", "\t"]))
@settings(max_examples=100, deadline=None)
def test_any_texts_are_read_as_they_were_written(rows, delimiter):
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows([("prompt", "completion"), *rows])
    assert [tuple(fields.values()) for fields, _ in read(file.getvalue())] == rows


@given(content=st.binary(max_size=60) | st.text(alphabet='a,;"\n\r\t', max_size=60).map(str.encode))
@settings(max_examples=300, deadline=None)
def test_any_bytes_give_rows_or_one_error(content):
    with contextlib.suppress(InputError):
        read(content)
