"""Python functions of the user's own, which a setting names."""

import contextlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from kto_dist.base.errors import UserError
from kto_dist.base.remembered import sha256_once


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


def source_digest(name: str, function: Callable[..., Any]) -> str | None:
    """Of the files that hold what `function_named` gave for `name`: its module's, and where it comes from another
    module that one's. None where there is no such file, as of a module in C. Raises `OSError`."""
    place = name.rpartition(":")[0]
    files = {place if place.endswith(".py") else getattr(sys.modules.get(place), "__file__", None)}
    for thing in (inspect.unwrap(function), type(function)):  # a function, or an object that can be called
        with contextlib.suppress(TypeError):  # what is built in
            files.add(inspect.getsourcefile(thing))
    known = {Path(file).resolve() for file in files if file is not None}
    if not any(file.suffix == ".py" for file in known):
        return None
    return " ".join(sorted(sha256_once(file) for file in known))


def _module(place: str) -> ModuleType:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    spec = importlib.util.spec_from_file_location(Path(place).stem, place)
    if spec is None or spec.loader is None:
        raise ImportError(f"{place} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
