"""Numbers of class labels -> their names: the type that `datasets` calls ClassLabel.

In:  what `datasets` wrote of its types: into a Parquet file's metadata, or into README.md or dataset_infos.json of a
     dataset's folder, which stand beside its JSON lines, CSV and Parquet.
Out: a function that puts names in place of numbers, wherever they stand in a record. Without it 0 may well be the
     thumbs up.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from kto_dist.base.errors import UserError

Features = dict[str, Any]
"""Column -> its type, as `datasets.Features.to_dict` writes it."""
Namer = Callable[[Any], Any]

_HEIGHT = 3  # folders above a file in which its dataset's README may lie: data/CONFIG/train.csv


def features_in(metadata: dict[bytes, bytes] | None) -> Features:
    """What `datasets` wrote of its types into a Parquet file."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def features_beside(path: str | Path) -> Features:
    """What a dataset's folder says of the columns of one of its files that are class labels; {} for other files.

    Raises `UserError` where parts of the dataset have other names for the same numbers, and none is this file's.
    """
    path = Path(path).absolute()
    for folder in [*path.parents][:_HEIGHT]:
        parts = _in_readme(folder / "README.md") or _in_infos(folder / "dataset_infos.json")
        if not parts:
            continue
        named = {name: part for name, part in parts.items() if name in path.relative_to(folder).parts}
        found: Features = {}
        for name, features in (named or parts).items():
            for column, feature in features.items():
                if found.setdefault(column, feature) != feature:
                    raise UserError(
                        f"{folder}: parts of the dataset ({', '.join(parts)}) have other names for the numbers in "
                        f"{column}, and {path.name} stands in no folder of the name of one: move it there ({name}/)"
                    )
        return found
    return {}


def namers_of(features: Features) -> dict[str, Namer]:
    """Column -> the function that names its numbers, of columns that hold some."""
    found = {name: _namer(feature) for name, feature in features.items()}
    return {name: namer for name, namer in found.items() if namer is not None}


def _in_readme(path: Path) -> dict[str, Features]:
    """Part of the dataset -> its features, from the YAML that a dataset's README starts with."""
    try:
        start, _, rest = path.read_text(encoding="utf-8").partition("---\n")
        said = {} if start.strip("\ufeff \n") or "\n---" not in rest else yaml.safe_load(rest.split("\n---")[0])
        infos = said.get("dataset_info") or []
        listed = infos if isinstance(infos, list) else [infos]
        return {
            str(info.get("config_name", "default")): _with_labels(_struct(info.get("features") or []))
            for info in listed
        }
    except (OSError, ValueError, yaml.YAMLError, AttributeError, TypeError, KeyError, RecursionError):
        return {}  # another README


def _in_infos(path: Path) -> dict[str, Features]:
    """As older datasets have it: JSON, by part."""
    try:
        infos = json.loads(path.read_text(encoding="utf-8"))
        return {name: _with_labels(info["features"]) for name, info in infos.items()}
    except (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError):
        return {}


def _with_labels(features: Features) -> Features:
    return {name: feature for name, feature in features.items() if _namer(feature) is not None}


def _struct(entries: list[dict[str, Any]]) -> Features:
    return {entry["name"]: _feature({key: said for key, said in entry.items() if key != "name"}) for entry in entries}


def _feature(said: Any) -> Any:
    """A type as README.md writes it -> as `Features.to_dict` does, as far as class labels go."""
    if isinstance(said, list):
        return _struct(said)
    if not isinstance(said, dict):
        return {"_type": "Value"}
    if "class_label" in said:
        names = said["class_label"].get("names") or {}
        ordered = names if isinstance(names, list) else [names[key] for key in sorted(names, key=int)]
        return {"_type": "ClassLabel", "names": [str(name) for name in ordered]}
    inner = next((said[key] for key in ("dtype", "struct") if key in said), None)
    if inner is not None:
        return _feature(inner)
    inner = next((said[key] for key in ("sequence", "list", "large_list") if key in said), None)
    return {"_type": "Value"} if inner is None else {"_type": "List", "feature": _feature(inner)}


def _namer(feature: Any) -> Namer | None:
    """A function that puts names in place of the numbers of class labels; None where there are none."""
    if isinstance(feature, list):
        return _each(_namer(feature[0])) if len(feature) == 1 else None
    if not isinstance(feature, dict):
        return None
    kind = feature.get("_type")
    if kind == "ClassLabel" and isinstance(feature.get("names"), list):
        return _label_namer(feature["names"])
    if isinstance(kind, str):
        return _each(_namer(feature.get("feature")))
    inner = {name: _namer(part) for name, part in feature.items()}
    namers = {name: namer for name, namer in inner.items() if namer is not None}
    if not namers:
        return None

    def rename(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: namers[name](item) if name in namers else item for name, item in value.items()}

    return rename


def _label_namer(names: list[str]) -> Namer:
    """Raises `IndexError` for a number beyond the names."""

    def rename(value: Any) -> Any:
        if isinstance(value, list):  # a sequence of objects is stored as an object of lists
            return [rename(item) for item in value]
        if isinstance(value, str):  # of CSV; a name stands for itself
            text = value.strip()
            value = int(text) if text not in names and text.lstrip("-").isdecimal() and len(text) < 10 else value
        if isinstance(value, bool) or not isinstance(value, int):
            return value
        # `datasets` writes -1 where there is no label
        return None if value == -1 else names[value if value >= 0 else len(names)]

    return rename


def _each(namer: Namer | None) -> Namer | None:
    if namer is None:
        return None
    return lambda value: [namer(item) for item in value] if isinstance(value, list) else namer(value)
