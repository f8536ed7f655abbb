"""How settings are read: typed, documented, strict, and where each value came from.

In:  a YAML file and `section.key=value` overrides (last wins), or keyword arguments from Python.
Out: a config of sections, frozen, every field validated when it is built; unknown keys name the nearest known one.
Each wing declares its own sections (`<wing>/config.py`), and `training/config.py` puts them together.

Each field's description is the documentation that `kto-dist config` and the README show, so it states the unit.
Rules that need more than one field live in the validators of the section (or config) that owns the fields.
Paths are kept as written: relative ones are relative to the working directory, as in the peers' tools.
"""

import difflib
import re
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from kto_dist.base.errors import UserError

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]


_EXPONENT = re.compile(r"[+-]?\d+[eE][+-]?\d+")


class _StrictLoader(yaml.SafeLoader):
    """A key that is written twice is an error: plain YAML silently drops the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is written twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _one_path_as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError("must not be blank")
    return value


Text = Annotated[str, AfterValidator(_not_blank)]
Paths = Annotated[tuple[Text, ...], BeforeValidator(_one_path_as_list), Field(min_length=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


# A config: a model whose fields are sections, such as that of a training run or that of mining.
Kind = TypeVar("Kind", bound=Section)


def resolve(
    path: str | Path, overrides: list[str] | tuple[str, ...] = (), *, kind: type[Kind]
) -> tuple[Kind, dict[str, str]]:
    """The config, and for each `section.key` its origin: `default`, the file's name, or `override`."""
    path = Path(path)
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except FileNotFoundError:
        raise UserError(f"config {path} does not exist: give the path of a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError) as error:
        raise UserError(f"config {path} is not readable as YAML: {error}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict) or not all(isinstance(section, dict | None) for section in tree.values()):
        raise UserError(f"config {path} must hold sections with keys below them, such as `train:` with `lr: 5.0e-6`")
    tree = {name: dict(section or {}) for name, section in tree.items()}
    origin = {f"{name}.{key}": str(path) for name, section in tree.items() for key in section}

    for override in overrides:
        dotted, separator, text = override.partition("=")
        section, dot, key = dotted.partition(".")
        if not (separator and dot and section and key):
            raise UserError(f"override {override!r} must read section.key=value, for example train.lr=1e-6")
        try:
            tree.setdefault(section, {})[key] = yaml.load(text, _StrictLoader)
        except yaml.YAMLError as error:
            raise UserError(
                f"override {override!r} is not readable as YAML: {error}; quote the value, as in \"{dotted}='...'\""
            ) from None
        origin[dotted] = "override"

    overridden = {name for name, source in origin.items() if source == "override"}
    config = build(tree, where=str(path), overridden=overridden, kind=kind)
    for name, key, _ in flatten(config):
        origin.setdefault(f"{name}.{key}", "default")
    return config, origin


def build(
    tree: dict[str, dict[str, Any]],
    *,
    kind: type[Kind],
    where: str = "config",
    overridden: Collection[str] = (),
) -> Kind:
    """A config from nested plain values. Raises `UserError` that lists every problem at once.

    `where` and `overridden` (`section.key`s) say in messages where a value stands.
    """
    try:
        return kind.model_validate(_floats_from_text(tree))
    except ValidationError as error:
        problems = error.errors()
        places = ["override" if ".".join(map(str, p["loc"][:2])) in overridden else where for p in problems]
        raise UserError(
            "\n".join(_explain(p, place, kind) for p, place in zip(problems, places, strict=True))
        ) from None


def sections(kind: type[Section]) -> dict[str, type[Section]]:
    """A config's sections by name, in the order of its class."""
    fields = {name: field.annotation for name, field in kind.model_fields.items()}
    return {name: part for name, part in fields.items() if isinstance(part, type) and issubclass(part, Section)}


def flatten(config: Section) -> list[tuple[str, str, Any]]:
    """(section, key, plain value) of every setting, in the order of the classes above."""
    dumped = config.model_dump(mode="json", by_alias=True)
    return [(name, key, value) for name, section in dumped.items() for key, value in section.items()]


def to_yaml(config: Section) -> str:
    return yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False)


def _floats_from_text(tree: dict[str, Any]) -> dict[str, Any]:
    # YAML 1.1 reads `1e-6` as text, because it has no dot; people write it all the same.
    def convert(value: Any) -> Any:
        return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value

    return {
        name: {key: convert(value) for key, value in section.items()} if isinstance(section, dict) else section
        for name, section in tree.items()
    }


# What the settings are called in transformers and TRL.
_ELSEWHERE = {
    "learning_rate": "lr",
    "lr_scheduler_type": "schedule",
    "warmup_ratio": "warmup",
    "warmup_steps": "warmup",
    "max_grad_norm": "clip",
    "num_train_epochs": "epochs",
    "output_dir": "output",
    "per_device_train_batch_size": "tokens_per_microbatch",
    "bf16": "dtype",
    "save_steps": "every_steps",
    "loss_type": "loss",
}


def _explain(problem: Any, where: str, kind: type[Section]) -> str:
    location = [str(part) for part in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        if len(location) == 1:
            known, what = list(kind.model_fields), "section"
        else:
            fields = sections(kind)[location[0]].model_fields
            known, what = [field.alias or name for name, field in fields.items()], "key"
        near = difflib.get_close_matches(_ELSEWHERE.get(location[-1], location[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        return f"{where}: unknown {what} {'.'.join(location)}: {hint}"
    # A union's error names the branch that failed after the field; section.key is what the user wrote.
    name = ".".join(location[:2])
    if problem["type"] == "missing" and len(location) == 1:
        fields = sections(kind)[name].model_fields
        needed = {key: field for key, field in fields.items() if field.is_required()} or fields
        wanted = [f"{name}.{key} ({field.description})" for key, field in needed.items()]
        return f"{where}: {name} is required: give {', '.join(wanted)}"
    if problem["type"] == "missing":
        return f"{where}: {name} is required: {_description(location, kind)}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{where}: {name + ': ' if name else ''}{message}"
    return f"{where}: {name} ({problem['input']!r}): {message}; {_description(location, kind)}"


def _description(location: list[str], kind: type[Section]) -> str:
    section = sections(kind).get(location[0])
    if section is None or len(location) < 2:
        return "see `kto-dist config --help`"
    for name, field in section.model_fields.items():
        if location[1] in (name, field.alias):
            return field.description or ""
    return ""
