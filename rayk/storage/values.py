"""Nested values with tensors as JSON and named tensors, so that they can be stored without pickle."""

import base64
from collections.abc import Mapping
from typing import Any

from torch import Tensor

_TAG = "$"
"""Key of a JSON object that stands for a value which JSON does not have."""


def split_tensors(value: Any, prefix: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Return `value` as JSON values, and copies of its tensors on the CPU, by the names that stand in their places.

    Args:
        prefix: the beginning of all names.

    Raises:
        TypeError: a value is none of: tensor, number, text, bytes, truth value, None, list, tuple, set, dict.
    """
    tensors: dict[str, Tensor] = {}

    def split(value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Tensor):
            name = f"{prefix}{len(tensors)}"
            tensors[name] = value.detach().to("cpu", copy=True).contiguous()
            return {_TAG: "tensor", "value": name}
        if isinstance(value, bytes):
            return {_TAG: "bytes", "value": base64.b64encode(value).decode()}
        if isinstance(value, list):
            return [split(part) for part in value]
        if isinstance(value, tuple):
            return {_TAG: "tuple", "value": [split(part) for part in value]}
        if isinstance(value, set | frozenset):
            return {_TAG: "set", "value": [split(part) for part in value]}
        if isinstance(value, Mapping):
            if all(isinstance(key, str) for key in value) and _TAG not in value:
                return {key: split(part) for key, part in value.items()}
            return {_TAG: "dict", "value": [[split(key), split(part)] for key, part in value.items()]}
        raise TypeError(f"it contains a {type(value).__name__}")

    return split(value), tensors


def join_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the value of which `split_tensors` returned these parts.

    Raises:
        ValueError, KeyError, TypeError: the parts do not come from `split_tensors`.
    """
    if isinstance(value, list):
        return [join_tensors(part, tensors) for part in value]
    if not isinstance(value, dict):
        return value
    if _TAG not in value:
        return {key: join_tensors(part, tensors) for key, part in value.items()}
    kind, content = value[_TAG], value["value"]
    if kind == "tensor":
        return tensors[content]
    if kind == "bytes":
        return base64.b64decode(content)
    parts = join_tensors(content, tensors)
    if kind == "dict":
        return dict(parts)
    return {"tuple": tuple, "set": set}[kind](parts)
