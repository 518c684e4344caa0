"""Check that the weight files of a local model are there and complete, without reading the weights."""

import json
import os
from pathlib import Path

from rayk.errors import InputError

_LFS = b"version https://git-lfs.github.com/spec/"
_LARGEST_HEADER = 100_000_000
"""Bytes; safetensors accepts no larger header."""
_INDEX = "model.safetensors.index.json"
_OTHER_INDEX = "pytorch_model.bin.index.json"


def check_weight_files(name: str) -> None:
    """Check the weights in a local folder; do nothing for a hub id.

    Raises:
        InputError: there are no weights, or a file is missing, cut off, or a Git LFS pointer instead of its content.
    """
    folder = Path(os.path.expanduser(name))
    if not folder.is_dir():
        return
    for path in _weight_files(folder):
        _check_file(path)


def _weight_files(folder: Path) -> list[Path]:
    """Return the weight files that transformers would load: those of an index, or the only one."""
    for single, index in (("model.safetensors", _INDEX), ("pytorch_model.bin", _OTHER_INDEX)):
        if (folder / single).exists():
            return [folder / single]
        if (folder / index).exists():
            names = _names_in_index(folder / index)
            if missing := [name for name in names if not (folder / name).exists()]:
                others = f" and {len(missing) - 1} other files" if len(missing) > 1 else ""
                raise InputError(
                    f"{folder / missing[0]}{others} of the {len(names)} weight files in {index} do not exist; download "
                    "the model again."
                )
            return [folder / name for name in names]
    found = sorted(folder.glob("*.safetensors"))  # other names can be given to vLLM
    if not found and not any(any(folder.glob(pattern)) for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf")):
        raise InputError(f"The folder '{folder}' contains no weights (model.safetensors); download the model again.")
    return found


def _names_in_index(path: Path) -> list[str]:
    content = path.read_bytes()
    _check_pointer(path, content)
    try:
        return sorted(set(json.loads(content)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not an index of weight files; download the model again.") from error


def _check_file(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(_LFS))
        _check_pointer(path, start)
        if path.suffix != ".safetensors":
            if size == 0:
                raise InputError(f"{path} is empty; download the model again.")
            return
        file.seek(0)
        header_bytes = int.from_bytes(file.read(8), "little")
        if size < 8 or header_bytes > min(size, _LARGEST_HEADER):
            raise InputError(f"{path} is damaged or cut off ({size:,} bytes); download the model again.")
        try:
            tensors = json.loads(file.read(header_bytes))
            end = max((entry["data_offsets"][1] for key, entry in tensors.items() if key != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise InputError(f"{path} is not a safetensors file; download the model again.") from error
    if size < 8 + header_bytes + end:
        raise InputError(
            f"{path} is cut off: it has {size:,} of {8 + header_bytes + end:,} bytes; download the model again."
        )


def _check_pointer(path: Path, start: bytes) -> None:
    if start.startswith(_LFS):
        raise InputError(
            f"{path} is a Git LFS pointer, not the file itself; run 'git lfs pull' in its folder, or download the "
            "model again."
        )
