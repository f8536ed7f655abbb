"""Mappings of known applications' exports: one YAML file each in presets/, named by the application.

In:  `input.preset`.
Out: sections of a mining config, below those that the config itself has.
"""

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

_FOLDER = Path(__file__).parent / "presets"


def names() -> list[str]:
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def preset(name: str) -> dict[str, dict[str, Any]]:
    """Its sections. Raises `ValueError` that names the nearest known one."""
    if name not in names():
        near = difflib.get_close_matches(str(name).casefold(), names(), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"input.preset ({name}) is none that is known: {hint}known: {', '.join(names())}")
    tree: dict[str, dict[str, Any]] = yaml.safe_load((_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    return tree


def laid_over(below: dict[str, dict[str, Any]], tree: dict[str, Any]) -> dict[str, Any]:
    """The tree of sections with what it does not say itself from `below`."""
    result = dict(tree)
    for name, section in below.items():
        own = tree.get(name)
        said = own.model_dump(exclude_unset=True) if isinstance(own, BaseModel) else own
        result[name] = {**section, **(said or {})}
    return result
