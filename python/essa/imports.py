"""Importing what the user names as `path.to.module:name`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable

from essa.config import InputError, suggest


def import_named(argument: str, name: str, kind: str = "function") -> Callable:
    """The function or class that ``name``, `path.to.module:name`, stands for.

    Args:
        argument: what the name was given as, for messages.
        kind: what it must be, for messages.

    Raises:
        InputError: it cannot be imported, is not there, or cannot be called.
    """
    module_name, _, attribute = name.partition(":")
    # As `python -m` does: a module beside the caller's working folder can be named.
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = importlib.import_module(module_name)
    except Exception as error:
        raise InputError(
            f"{argument} {name!r}: importing {module_name!r} failed: {type(error).__name__}: {error}"
        ) from error
    if not hasattr(found, attribute):
        raise InputError(f"{argument} {name!r}: {module_name!r} has no {attribute!r}{suggest(attribute, dir(found))}")
    value = getattr(found, attribute)
    if not callable(value):
        raise InputError(f"{argument} {name!r} must be a {kind}, got {type(value).__name__}")
    return value
