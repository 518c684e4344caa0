"""Load users' functions and classes, which settings name as 'module:name' or by entry point."""

import importlib
import inspect
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

from rayk.errors import InputError

T = TypeVar("T")


def load_function(path: str, setting: str) -> Callable[..., Any]:
    """Load the function `path` ('module:name') from an installed module or a file in a folder of `sys.path`, to which
    the current folder and the config file's folder belong.

    Args:
        setting: name of the setting in error messages ("synthesis.scorer").

    Raises:
        InputError: the module cannot be imported or has no such function.
    """
    function = _load(path, setting, "function")
    if not callable(function):
        raise InputError(f"{setting}: '{path}' is not a function but a {type(function).__name__}; correct the name.")
    return function


def load_class(path: str, base: type[T], setting: str, group: str, public_name: str) -> type[T]:
    """Load the class `path` ('module:name', or the name of an entry point in `group`), a subclass of `base`.

    Args:
        public_name: import name of `base` in error messages ("rayk.Recipe").

    Raises:
        InputError: the class cannot be imported, is not a subclass of `base`, or lacks abstract methods of it.
    """
    found = load_object(path, setting, group)
    if not inspect.isclass(found) or not issubclass(found, base):
        raise InputError(f"{setting}: '{path}' is not a subclass of {public_name}; derive the class from it.")
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        raise InputError(f"{setting}: class '{path}' does not define {', '.join(map(repr, missing))}; add it.")
    return found


def load_object(path: str, setting: str, group: str) -> Any:
    """Load the class `path` ('module:name', or the name of an entry point in `group`), of any type.

    Raises:
        InputError: it cannot be imported.
    """
    return _load(path, setting, "class") if ":" in path else _load_entry_point(path, setting, group)


def call_function(function: Callable[..., Any], path: str, setting: str, where: str, *arguments: Any) -> Any:
    """Return the result of a user's function for a row.

    Args:
        path: the function's 'module:name', for error messages, as `setting` and `where`, the row's place.

    Raises:
        InputError: the function fails.
    """
    try:
        return function(*arguments)
    except InputError:
        raise
    except Exception as error:  # a user's function can raise anything
        raise InputError(f"{setting}: '{path}' fails for {where}: {describe_error(error)}.") from error


def describe_error(error: Exception) -> str:
    """Describe an error in a user's code with file and line: "KeyError: 'x' (my_module.py, line 3)"."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(frame.filename).name}, line {frame.lineno})"


def _load(path: str, setting: str, kind: str) -> Any:
    module_name, _, name = path.partition(":")
    sys.path.append("")  # console scripts, unlike `python -m`, do not search the current folder
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing a user's module can raise anything
        raise InputError(
            f"{setting}: module '{module_name}' cannot be imported: {type(error).__name__}: {error}; correct the path, "
            "or start rayk in the folder with the module."
        ) from error
    finally:
        sys.path.remove("")
    try:
        return getattr(module, name)
    except AttributeError as error:
        raise InputError(f"{setting}: module '{module_name}' has no {kind} '{name}'; correct the name.") from error


def _load_entry_point(name: str, setting: str, group: str) -> Any:
    installed = {entry.name: entry for entry in entry_points(group=group)}
    if name not in installed:
        names = ", ".join(map(repr, sorted(installed))) or "none"
        raise InputError(
            f"{setting}: no installed package registers '{name}' as entry point in group '{group}' (registered: "
            f"{names}); install it, or give 'module:name'."
        )
    try:
        return installed[name].load()
    except Exception as error:  # importing a user's module can raise anything
        raise InputError(
            f"{setting}: entry point '{name}' cannot be loaded: {type(error).__name__}: {error}; reinstall its package."
        ) from error
