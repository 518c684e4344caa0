"""Convert Arrow tables into rows of Python values."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow as pa

from rayk.data.json_text import STRICT
from rayk.data.rows import Row, Unreadable
from rayk.errors import InputError

_JSON_TYPE = "arrow.json"
_UNREADABLE = (ValueError, OverflowError, LookupError, pa.ArrowException)  # LookupError: of an unknown time zone
_Convert = Callable[[Any], Any]


def read_arrow(batches: Iterable[pa.RecordBatch | pa.Table], name: str) -> Iterator[Row]:
    """Yield the rows of Arrow tables with equal columns.

    Maps become dicts. Null fields of structs are left out: Arrow gives every struct the fields of all others in its
    column, so that a call of one tool would otherwise have the arguments of all tools. A value that Python cannot
    represent, such as a date after the year 9999, becomes `Unreadable`.

    Raises:
        InputError: two columns have the same name.
    """
    number = 0
    for batch in batches:
        names = batch.schema.names
        if len(set(names)) < len(names):
            raise InputError(f"'{name}' has two columns of the same name ({', '.join(names)}); rename one.")
        for values in zip(*map(_column_values, batch.columns), strict=True):
            number += 1
            yield Row(dict(zip(names, values, strict=True)), f"row {number} of {name}")


def _column_values(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    convert = _converter(column.type)
    try:
        values = column.to_pylist()
        return values if convert is None else [None if value is None else convert(value) for value in values]
    except _UNREADABLE:
        return [_readable_value(scalar, convert) for scalar in column]


def _readable_value(scalar: pa.Scalar, convert: _Convert | None) -> Any:
    try:
        value = scalar.as_py()
        return value if value is None or convert is None else convert(value)
    except _UNREADABLE as error:
        return Unreadable(f"{scalar.type}: {error}")


def _converter(kind: pa.DataType) -> _Convert | None:
    """Return the conversion of values of a type from `to_pylist`'s form; None if they stay as they are."""
    if isinstance(kind, pa.BaseExtensionType):
        return STRICT.decode if kind.extension_name == _JSON_TYPE else _converter(kind.storage_type)
    if pa.types.is_struct(kind):
        return _struct_converter(kind)
    if pa.types.is_map(kind):
        return _map_converter(kind)
    if pa.types.is_dictionary(kind):
        return _converter(kind.value_type)
    if not hasattr(kind, "value_type"):
        return None
    convert = _converter(kind.value_type)
    if convert is None:
        return None
    return lambda values: [None if value is None else convert(value) for value in values]


def _struct_converter(kind: pa.StructType) -> _Convert:
    fields = [kind.field(i) for i in range(kind.num_fields)]
    converters = {field.name: _converter(field.type) for field in fields}
    # a field that is null in all rows is there because the rows have it
    always_null = {field.name for field in fields if pa.types.is_null(field.type)}

    def convert_struct(values: dict[str, Any]) -> dict[str, Any]:
        converted = {}
        for name, value in values.items():
            if value is not None or name in always_null:
                convert = converters[name]
                converted[name] = value if value is None or convert is None else convert(value)
        return converted

    return convert_struct


def _map_converter(kind: pa.MapType) -> _Convert:
    convert = _converter(kind.item_type)

    def convert_map(items: list[tuple[Any, Any]]) -> dict[Any, Any]:
        converted = {key: value if value is None or convert is None else convert(value) for key, value in items}
        if len(converted) < len(items):
            raise ValueError("a map has the same key twice")
        return converted

    return convert_map
