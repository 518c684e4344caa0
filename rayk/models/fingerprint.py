"""Fingerprints of weights and tokenizers, and the size of a tokenizer's vocabulary."""

import hashlib
import json
import os
from pathlib import Path
from typing import BinaryIO

HASHED_WHOLE_BYTES = 64 << 20
"""Files up to this size are hashed completely."""
_SAMPLE_BYTES = 64 << 10
_SAMPLES = 256


def weights_fingerprint(name: str, commit: str | None = None) -> str:
    """Return a hash that changes with the weights in a local folder; for a hub id its `commit`, or "" if unknown.

    Small files are hashed completely. From larger files, the header and samples of each tensor are hashed, because
    reading tens of gigabytes would delay the first replica. Training any tensor changes the fingerprint, but a manual
    edit of a few elements may not.
    """
    folder = Path(os.path.expanduser(name))
    if not folder.is_dir():
        return commit or ""
    whole = hashlib.blake2b(digest_size=16)
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        whole.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            for offset, length in _sampled_parts(file, path):
                file.seek(offset)
                whole.update(file.read(length))
    return whole.hexdigest()


def _sampled_parts(file: BinaryIO, path: Path) -> list[tuple[int, int]]:
    """Return the parts of a file that its fingerprint covers, as (offset, length)."""
    size = path.stat().st_size
    if size <= HASHED_WHOLE_BYTES:
        return [(0, size)]
    if path.suffix != ".safetensors":
        return [(i * (size - _SAMPLE_BYTES) // _SAMPLES, _SAMPLE_BYTES) for i in range(_SAMPLES + 1)]
    header = 8 + int.from_bytes(file.read(8), "little")
    tensors = json.loads(file.read(header - 8))
    tensors.pop("__metadata__", None)
    samples = [(0, header)]
    for start, end in sorted(tensor["data_offsets"] for tensor in tensors.values()):
        length = min(_SAMPLE_BYTES, end - start)
        samples += [(header + start + i * (end - start - length) // 2, length) for i in range(3)]
    return samples


def real_vocab_size(tokenizer) -> int:
    """Return the tokenizer's highest id plus 1. Models often pad their embeddings to a larger size."""
    return max(tokenizer.get_vocab().values()) + 1


def tokenizer_fingerprint(tokenizer) -> str:
    """Return a hash of the map from tokens to ids; it is equal for tokenizers with the same ids for all tokens."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]
