"""Random changes of bytes, texts and nested values."""

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

INTEGERS = (0, 1, 2, 7, 127, 128, 255, 256, 65_535, 65_536, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63,
            2**64 - 1)  # fmt: skip
"""Numbers at which sizes and counts overflow."""
PLAIN_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**30, 0.0, -0.0, 1e308, float("inf"), float("nan"), "",
    " ", "\0", "~", "~\0", "..", "/", "*", "[", "{}", "{prompt}", "a" * 300, "\U0001f600", "\u2028", "2024-02-30",
    "1e9", "file://x", "://", "s3://k:s@b?x=y", "a:b", "null", "\x1b]0;x\x07", "\ud800", [], {}, [[]], [None],
    {"": None},
)  # fmt: skip
"""Values that are wrong, or odd, in most places."""


def change_bytes(random: Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """Return `data` after one to six changes: flipped bits, other numbers, and parts removed, repeated, or replaced by
    parts of `others`."""
    changed = bytearray(data)
    for _ in range(random.randint(1, 6)):
        start = random.randrange(len(changed) + 1)
        end = min(len(changed), start + random.choice((1, 2, 4, 8, random.randint(1, 64))))
        part = changed[start:end]
        kind = random.randrange(6)
        if kind == 0 and part:
            changed[start] ^= 1 << random.randrange(8)
        elif kind == 1:
            size = random.choice((1, 2, 4, 8))
            number = (random.choice(INTEGERS) + random.choice((-1, 0, 0, 1))) % 2 ** (8 * size)
            changed[start : start + size] = number.to_bytes(size, random.choice(("little", "big")))
        elif kind == 2:
            del changed[start:end]
        elif kind == 3:
            changed[start:start] = part * random.choice((1, 2, 50))
        elif kind == 4 and others:
            other = random.choice(others)
            place = random.randrange(len(other) + 1)
            changed[start:end] = other[place : place + random.randint(1, 64)]
        elif kind == 5 and random.random() < 0.3:
            del changed[start:]
    return bytes(changed)


def change_text(random: Random, text: str, others: Sequence[str] = ()) -> bytes:
    """Return the UTF-8 of `text` after changes as in `change_bytes`, which may make it invalid."""
    return change_bytes(random, text.encode("utf-8", "surrogatepass"), [other.encode() for other in others])


def change_values(random: Random, values: Any, new_keys: Sequence[str] = ()) -> Any:
    """Return a copy of nested lists and dicts in which one to three places have another value, are missing, have an
    additional key, or have changed places."""
    for _ in range(random.randint(1, 3)):
        values = _change_once(random, values, new_keys)
    return values


def _change_once(random: Random, values: Any, new_keys: Sequence[str]) -> Any:
    if not isinstance(values, dict | list) or not values or random.random() < 0.1:
        return _replacement(random, values, new_keys)
    keys: list[Any] = list(values) if isinstance(values, dict) else list(range(len(values)))
    key, copied = random.choice(keys), values.copy()
    changes: list[Callable[[], None]] = [
        lambda: copied.__setitem__(key, _change_once(random, values[key], new_keys)),
        lambda: copied.__setitem__(key, _change_once(random, values[key], new_keys)),
        lambda: copied.__setitem__(key, values[random.choice(keys)]),
        lambda: copied.pop(key),
    ]
    if isinstance(values, dict):
        name = random.choice([*new_keys, "x"])
        changes.append(lambda: copied.__setitem__(name, _replacement(random, None, new_keys)))
    random.choice(changes)()
    return copied


def _replacement(random: Random, value: Any, new_keys: Sequence[str]) -> Any:
    """Return a value of any kind, or one near `value`."""
    if isinstance(value, int | float) and random.random() < 0.3:
        return value * random.choice((-1, 0, 2, 1000, 0.5))
    if isinstance(value, str) and random.random() < 0.3:
        return change_text(random, value).decode("utf-8", "replace")
    if random.random() < 0.1:
        return {random.choice([*new_keys, "kind", "name"]): random.choice(PLAIN_VALUES)}
    return random.choice(PLAIN_VALUES)
