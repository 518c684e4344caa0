"""Functions of the user's, named in the settings as 'module:name'."""

import importlib
import sys
from collections.abc import Callable
from typing import Any

from rayk.errors import InputError


def load_function(name: str, setting: str) -> Callable[..., Any]:
    """The function `name` ('module:name'), from an installed module or one that lies where rayk was started.

    Raises:
        InputError: it cannot be imported or called; the sentence names `setting`.
    """
    module_name, _, attribute = name.partition(":")
    sys.path.append("")  # what `python -m` has and a console script lacks
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a module of the user's fails in ways of its own
        raise InputError(
            f"{setting}: module '{module_name}' cannot be imported: {type(error).__name__}: {error}."
        ) from error
    finally:
        sys.path.remove("")
    function = getattr(module, attribute, None)
    if not callable(function):
        raise InputError(f"{setting}: module '{module_name}' has no function '{attribute}'; correct the name.")
    return function
