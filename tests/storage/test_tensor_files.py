"""Tensors are written in safetensors' format, and read whole, in parts, or not at all."""

import json

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs
from safetensors.torch import load_file, save_file

from rayk.storage import tensor_files
from rayk.storage.tensor_files import DamagedFile, TensorFile, read_digest, write_tensors

LOCAL = fs.LocalFileSystem()


def some_tensors():
    return {
        "matrix": torch.randn(5, 3), "half": torch.randn(4).bfloat16(), "number": torch.tensor(7.0),
        "empty": torch.zeros(0, 3), "mask": torch.tensor([True, False]), "ids": torch.arange(24).reshape(2, 3, 4),
        "transposed": torch.randn(3, 2).t(),
    }  # fmt: skip


def write(path, tensors, metadata=None):
    return write_tensors(LOCAL, str(path), list(tensors.items()), metadata or {})


def test_files_are_those_of_safetensors(tmp_path):
    tensors = some_tensors()
    digest = write(tmp_path / "ours", tensors, {"format": "pt"})
    loaded = load_file(tmp_path / "ours")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor), name
    assert digest == read_digest(LOCAL, str(tmp_path / "ours"))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs")
    with LOCAL.open_input_file(str(tmp_path / "theirs")) as stream:
        file = TensorFile(stream)
        assert all(torch.equal(file.read(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("block", [1, 20, 1 << 20])
def test_any_part_of_a_tensor_is_read(tmp_path, monkeypatch, block):
    monkeypatch.setattr(tensor_files, "_BLOCK_BYTES", block)
    whole = torch.arange(60.0).reshape(5, 3, 4)
    write(tmp_path / "file", {"x": whole})
    with LOCAL.open_input_file(str(tmp_path / "file")) as stream:
        file = TensorFile(stream)
        for offsets, shape in [((0, 0, 0), (5, 3, 4)), ((2, 0, 0), (3, 3, 4)), ((1, 1, 2), (2, 2, 1))]:
            part = torch.zeros(shape)
            file.read_into("x", part, offsets)
            a, b, c = (slice(offset, offset + width) for offset, width in zip(offsets, shape, strict=True))
            assert torch.equal(part, whole[a, b, c])


def test_written_tensors_free_their_memory(tmp_path):
    tensors = list(some_tensors().items())
    write_tensors(LOCAL, str(tmp_path / "file"), tensors, {})
    assert tensors == []


def test_unknown_types_are_named(tmp_path):
    with pytest.raises(ValueError, match="'phase' has dtype torch.complex64"):
        write(tmp_path / "file", {"phase": torch.zeros(2, dtype=torch.complex64)})


@settings(deadline=None)
@given(st.binary(max_size=200), st.integers(0, 300), st.integers(0, 255))
def test_damaged_headers_end_in_one_error(data, place, value):
    header = b'{"__metadata__":{"a":"b"},"x":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}'
    good = bytearray(len(header).to_bytes(8, "little") + header + bytes(24))
    assert "x" in TensorFile(pa.BufferReader(bytes(good))).tensors
    good[place % len(good)] = value
    for content in (data, bytes(good), bytes(good[: place % len(good)])):
        try:
            file = TensorFile(pa.BufferReader(content))
            for name in file.tensors:
                file.read(name)
        except DamagedFile:
            pass


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]},
        {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-100, -92]},
        {"dtype": "F999", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]},
    ],
)
def test_headers_that_do_not_fit_the_file_are_refused_before_memory_is_reserved(tmp_path, entry):
    header = json.dumps({"x": entry}).encode()
    (tmp_path / "file").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with LOCAL.open_input_file(str(tmp_path / "file")) as stream, pytest.raises(DamagedFile):
        TensorFile(stream)
