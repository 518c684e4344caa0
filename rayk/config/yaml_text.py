"""Parse YAML of people and of run directories: plain values of a bounded size, and errors that repeat no secrets.

YAML's aliases let a few hundred bytes stand for billions of values, which every later copy of the settings would write
out. Its errors quote the line that they are about, which may contain a key.
"""

from typing import Any

import yaml

_MOST_CHARACTERS = 1 << 20
_MOST_VALUES = 100_000
_MOST_MERGED_KEYS = 1_000
_DEEPEST = 50
_MOST_BITS = 64


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text.

    Raises:
        ValueError: the text is not YAML, too large, nested too deeply, or contains itself, a number of more than 64
            bits, or half of a surrogate pair. The message is a part of a sentence.
    """
    if len(text) > _MOST_CHARACTERS:
        raise ValueError(f"it has more than {_MOST_CHARACTERS:,} characters")
    try:
        values = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        place = error.problem_mark or error.context_mark
        where = f" (line {place.line + 1}, column {place.column + 1})" if place else ""
        raise ValueError(f"{_one_line(error.problem or error.context)}{where}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(_one_line(error)) from None
    except (AttributeError, IndexError, KeyError, TypeError, OverflowError):  # of PyYAML, such as for `!!int ""`
        raise ValueError("a value does not have the form that its tag requires") from None
    _Extent().measure(values, 0)
    return _without_aliases(values)


def _without_aliases(value: Any) -> Any:
    """Return a copy in which no two places share a mapping or list, so that each can be changed alone."""
    if isinstance(value, dict):
        return {key: _without_aliases(part) for key, part in value.items()}
    return [_without_aliases(part) for part in value] if isinstance(value, list) else value


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses `<<` with more keys than any section has, before it copies them again and again."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > _MOST_MERGED_KEYS:
            raise yaml.constructor.ConstructorError(None, None, "a mapping has too many keys", node.start_mark)


class _Extent:
    """Computes how large values are once their aliases are written out, and checks each plain value."""

    def __init__(self) -> None:
        self._measured: dict[int, tuple[int, int]] = {}
        self._open: set[int] = set()

    def measure(self, value: Any, depth: int) -> tuple[int, int]:
        """Return the number of values and of levels in `value`.

        Raises:
            ValueError: there are too many, or a plain value cannot be used.
        """
        if isinstance(value, dict):
            parts = [*value, *value.values()]
        elif isinstance(value, list | tuple | set):
            parts = [*value]
        else:
            _check_plain(value)
            return 1, 0
        if id(value) in self._open:
            raise ValueError("an alias stands for something that contains it")
        if id(value) not in self._measured:
            self._open.add(id(value))
            inside = [self.measure(part, depth + 1) for part in parts] if depth < _DEEPEST else [(0, _DEEPEST)]
            self._open.remove(id(value))
            self._measured[id(value)] = 1 + sum(size for size, _ in inside), 1 + max((h for _, h in inside), default=0)
        size, height = self._measured[id(value)]
        if height > _DEEPEST:
            raise ValueError(f"it is nested more than {_DEEPEST} levels deep")
        if size > _MOST_VALUES:
            raise ValueError(f"it has more than {_MOST_VALUES:,} values, counting those of aliases each time")
        return size, height


def _check_plain(value: Any) -> None:
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise ValueError(f"a number has more than {_MOST_BITS} bits")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("a text contains half of a surrogate pair") from None


def _one_line(text: Any) -> str:
    return " ".join(str(text).split())
