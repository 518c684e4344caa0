"""Parse JSON strictly: without NaN, infinite numbers and repeated keys."""

import json
import math
from typing import Any

from rayk.errors import InputError


def parse_json(text: str | bytes, where: str, fix: str = "") -> Any:
    """Return the value of a JSON text.

    Raises:
        InputError: the text is not UTF-8 or not JSON, or contains NaN, an infinite number or an object with a repeated
            key: a row that has one is damaged, and would silently lose a value or gain the text "nan". `fix` ends the
            sentence.
    """
    try:
        return STRICT.decode(text if isinstance(text, str) else text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 text; save the file as UTF-8.") from error
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise InputError(f"{where} is not JSON: {error.msg} ({place}){fix}.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {error}{fix}.") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key '{repeated[:60]}' occurs twice in one object, so one value would be lost")
    return values


def _number(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the number {text[:60]} is too large")
    return number


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON; write null or leave the field out")


STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_float=_number, parse_constant=_constant)
"""The decoder of `parse_json`; its errors are ValueErrors."""
