"""Python functions of the user's own, which a setting names."""

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from kto_dist.base.errors import UserError


def function_named(setting: str, name: str) -> Callable[..., Any]:
    """`name`: module:function, or path/file.py:function. Raises `UserError`, which names the setting."""
    place, _, function = name.rpartition(":")
    if not place or not function:
        raise UserError(f"{setting} ({name!r}) must read module:function or path/file.py:function")
    try:
        module = _module(place)
    except Exception as error:
        raise UserError(f"{setting} ({name}): {place} cannot be imported: {error}") from error
    found: Any = getattr(module, function, None)
    if not callable(found):
        raise UserError(f"{setting} ({name}): {place} has no function {function}")
    own: Callable[..., Any] = found
    return own


def _module(place: str) -> ModuleType:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    spec = importlib.util.spec_from_file_location(Path(place).stem, place)
    if spec is None or spec.loader is None:
        raise ImportError(f"{place} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
