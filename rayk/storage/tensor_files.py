"""Write and read safetensors files on any file system of pyarrow, without a copy of their tensors in memory.

A file consists of the length of its header (8 bytes), the header (JSON: dtype, shape and place of each tensor, and
texts under `__metadata__`), and the bytes of the tensors (https://github.com/huggingface/safetensors). safetensors' own
functions build the whole file in memory, and read from local files only.
"""

import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from pyarrow import fs
from torch import Tensor

_BLOCK_BYTES = 16 << 20
_MAX_HEADER_BYTES = 100 << 20
_MOST_ELEMENTS = 1 << 58
_METADATA = "__metadata__"
_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class DamagedFile(Exception):
    """A file is incomplete or does not contain what it should."""


class Digest(NamedTuple):
    """Size and CRC-32 of a file."""

    bytes: int
    crc32: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its type, its shape, and the place of its bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


def write_tensors(
    file_system: fs.FileSystem, path: str, tensors: list[tuple[str, Tensor]], metadata: Mapping[str, str]
) -> Digest:  # fmt: skip
    """Write a safetensors file. `tensors` (on the CPU) is emptied meanwhile, so that written ones free their memory.

    Raises:
        OSError: the file cannot be written.
        ValueError: a tensor's dtype cannot be stored.
    """
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    end = 0
    for name, tensor in tensors:
        if tensor.dtype not in _NAMES:
            raise ValueError(f"tensor '{name}' has dtype {tensor.dtype}, which safetensors cannot store")
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    crc, size = 0, 0
    with file_system.open_output_stream(path) as stream:
        for block in _blocks(len(head).to_bytes(8, "little") + head, tensors):
            stream.write(block)
            crc, size = zlib.crc32(block, crc), size + len(block)
    return Digest(size, crc)


def _blocks(head: bytes, tensors: list[tuple[str, Tensor]]) -> Iterator[memoryview]:
    """Yield the bytes of a file; remove each tensor from the list once it is yielded."""
    yield memoryview(head)
    tensors.reverse()
    while tensors:
        data = memoryview(tensors.pop()[1].contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        for start in range(0, len(data), _BLOCK_BYTES):
            yield data[start : start + _BLOCK_BYTES]


def read_digest(file_system: fs.FileSystem, path: str) -> Digest:
    """Return size and CRC-32 of a file, read block by block.

    Raises:
        OSError: the file does not exist or cannot be read.
    """
    crc, size = 0, 0
    with file_system.open_input_stream(path) as stream:
        while block := stream.read(_BLOCK_BYTES):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return Digest(size, crc)


class TensorFile:
    """An open safetensors file whose tensors, or parts of them, are read on demand.

    Attributes:
        tensors: all tensors by name.
        metadata: the texts stored beside them.

    Raises:
        DamagedFile: the header does not describe the file.
    """

    def __init__(self, file: pa.NativeFile):
        self._file = file
        self.tensors: dict[str, StoredTensor] = {}
        self.metadata: dict[str, str] = {}
        try:
            self._read_header()
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise DamagedFile(f"its header is damaged ({error})") from error

    def _read_header(self) -> None:
        size = self._file.size()
        length = int.from_bytes(self._file.read_at(8, 0), "little")
        if length > min(_MAX_HEADER_BYTES, size - 8):
            raise ValueError("its length is wrong")
        header = json.loads(self._file.read_at(length, 8))
        self.metadata = {str(key): str(text) for key, text in header.pop(_METADATA, {}).items()}
        for name, entry in header.items():
            dtype, shape = _DTYPES[entry["dtype"]], tuple(int(width) for width in entry["shape"])
            start, end = (int(place) + 8 + length for place in entry["data_offsets"])
            is_huge = math.prod(filter(None, shape)) > _MOST_ELEMENTS  # of which torch makes not even an empty tensor
            if min(shape, default=0) < 0 or is_huge or start < 8 + length or end > size:
                raise ValueError(f"the place of '{name}' is wrong")
            if end - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"the size of '{name}' is wrong")
            self.tensors[name] = StoredTensor(dtype, shape, start)

    def read(self, name: str) -> Tensor:
        """Return a whole tensor."""
        stored = self.tensors[name]
        tensor = torch.empty(stored.shape, dtype=stored.dtype)
        self.read_into(name, tensor, [0] * len(stored.shape))
        return tensor

    def read_into(self, name: str, target: Tensor, offsets: Sequence[int]) -> None:
        """Read the part of a tensor that starts at `offsets` and has the shape of `target` into `target`.

        The rows of the part (its slices along the first dimension) are read whole, a block of them at a time.

        Raises:
            DamagedFile: the file is shorter than its header says.
        """
        stored = self.tensors[name]
        if not target.numel():
            return
        if not stored.shape:
            target.copy_(self._rows(stored, 0, 1).reshape(()))
            return
        step = max(1, _BLOCK_BYTES // max(1, math.prod(stored.shape[1:]) * stored.dtype.itemsize))
        for row in range(0, len(target), step):
            count = min(step, len(target) - row)
            rows = self._rows(stored, offsets[0] + row, count)
            for dimension in range(1, rows.ndim):
                rows = rows.narrow(dimension, offsets[dimension], target.shape[dimension])
            target[row : row + count].copy_(rows)

    def _rows(self, stored: StoredTensor, first: int, count: int) -> Tensor:
        row_bytes = math.prod(stored.shape[1:]) * stored.dtype.itemsize
        data = self._file.read_at(count * row_bytes, stored.start + first * row_bytes)
        if len(data) < count * row_bytes:
            raise DamagedFile("it is truncated")
        return torch.frombuffer(bytearray(data), dtype=stored.dtype).reshape(count, *stored.shape[1:])
