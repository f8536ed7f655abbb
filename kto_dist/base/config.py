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
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from kto_dist.base.elsewhere import ELSEWHERE
from kto_dist.base.errors import UserError
from kto_dist.base.secrets import masked

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


def _fits_a_file_system(value: str) -> str:
    if "\0" in value:
        raise ValueError(f"{value!r} holds a NUL character, which no name of a file can have")
    longest = max(value.split("/"), key=len)
    if "://" not in value and len(longest.encode()) > 255:
        raise ValueError(f"must have no part of more than 255 bytes, which file systems refuse: {longest[:40]}...")
    return value


Text = Annotated[str, AfterValidator(_not_blank)]
# a file, a folder or a URL
Place = Annotated[Text, AfterValidator(_fits_a_file_system)]
Paths = Annotated[tuple[Place, ...], BeforeValidator(_one_path_as_list), Field(min_length=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_yes_for_a_number_and_no_nul(cls, values: Any) -> Any:
        fields = {field.alias or name: field for name, field in cls.model_fields.items()}
        for name, value in values.items() if isinstance(values, dict) else ():
            parts = value if isinstance(value, list | tuple) else [value]
            if isinstance(value, str) and "\0" in value:
                raise ValueError(f"{name} ({value!r}) holds a NUL character, which no name of a file can have")
            kinds = _leaves(fields[name].annotation) if name in fields else set()
            if any(isinstance(part, bool) for part in parts) and kinds & {int, float} and bool not in kinds:
                raise ValueError(f"{name} ({str(value).lower()}) must be a number: {fields[name].description}")
        return values


def _leaves(annotation: Any) -> set[Any]:
    """The plain types that a field's annotation is made of."""
    parts = get_args(annotation)
    return {annotation} if not parts else {leaf for part in parts for leaf in _leaves(part)}


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
    except OSError as error:
        raise UserError(f"config {path} cannot be read: {error}") from None
    tree = {} if tree is None else tree
    renamed: Mapping[str, str] = getattr(kind, "RENAMED", {})
    if isinstance(tree, dict) and (dotted := _dotted(tree, kind, renamed)):
        section, key = dotted[0].split(".")
        raise UserError(
            f"config {path}: {', '.join(dotted)} at the top: names with a dot are for the command line; in a file "
            f"write `{section}:`, and `{key}: ...` below it"
        )
    if not isinstance(tree, dict) or not all(isinstance(section, dict | None) for section in tree.values()):
        loose = (
            [] if not isinstance(tree, dict) else [name for name, value in tree.items() if not isinstance(value, dict)]
        )
        hints = [f"; {name} is {' or '.join(_called(name, kind))}" for name in loose if _called(name, kind)]
        raise UserError(
            f"config {path} must hold sections with keys below them, such as `train:` with `lr: 5.0e-6`{''.join(hints)}"
        )
    tree = {name: dict(section or {}) for name, section in tree.items()}
    try:
        tree = current_names(tree, renamed)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    origin = {f"{name}.{key}": str(path) for name, section in tree.items() for key in section}

    origin |= dict.fromkeys(override(tree, overrides, kind), "override")

    overridden = {name for name, source in origin.items() if source == "override"}
    config = build(tree, where=str(path), overridden=overridden, kind=kind)
    for name, key, _ in flatten(config):
        origin.setdefault(f"{name}.{key}", "default")
    return config, origin


def current_names(tree: dict[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """Sections that stand under an older name, under the one that they have today. Raises `ValueError` for both."""
    for older, name in renamed.items():
        if older in tree and name in tree:
            raise ValueError(f"{older} is the older name of {name}, and both are there: write {name} alone")
    return {renamed.get(name, name): section for name, section in tree.items()}


def _dotted(tree: Mapping[Any, Any], kind: type[Section], renamed: Mapping[str, str]) -> list[str]:
    """Names of settings with their sections in front, where sections should stand."""
    every = _settings(kind)
    parts = {str(name): str(name).partition(".") for name in tree}
    return [name for name, (section, _, key) in parts.items() if f"{renamed.get(section, section)}.{key}" in every]


def override(tree: dict[str, dict[str, Any]], words: Collection[str], kind: type[Section]) -> list[str]:
    """Puts `section.key=value`s of a config of that kind into a tree of plain values; returns each `section.key`.
    Raises `UserError`."""
    changed, renamed = [], getattr(kind, "RENAMED", {})
    for word in words:
        dotted, separator, text = word.partition("=")
        section, dot, key = dotted.partition(".")
        if not (separator and dot and section and key):
            meant = _meant(dotted, kind) if separator and not dot else []
            hint = f": did you mean {' or '.join(f'{name}={text}' for name in meant)}?" if meant else ""
            raise UserError(f"override {word!r} must read section.key=value, for example train.lr=1e-6{hint}")
        section = renamed.get(section, section)
        try:
            tree.setdefault(section, {})[key] = yaml.load(text, _StrictLoader)
        except yaml.YAMLError as error:
            raise UserError(
                f"override {word!r} is not readable as YAML: {error}; quote the value, as in \"{dotted}='...'\""
            ) from None
        changed.append(f"{section}.{key}")
    return changed


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
        raise UserError(
            "\n".join(
                _explain(problem, COMMAND_LINE if _is_overridden(problem, overridden, tree) else where, kind)
                for problem in error.errors()
            )
        ) from None


COMMAND_LINE = "on the command line"


def _is_overridden(problem: ErrorDetails, overridden: Collection[str], tree: dict[str, dict[str, Any]]) -> bool:
    """Whether it was made by an override: by the key itself, by all there is of a section, or, where a rule needs more
    than one key, by one that the message names."""
    location = list(map(str, problem["loc"]))
    if len(location) > 1:
        return ".".join(location[:2]) in overridden
    if problem["type"] in ("extra_forbidden", "missing"):
        keys_given = tree.get(location[0], {}) if location else {}
        return bool(keys_given) and {f"{location[0]}.{key}" for key in keys_given} <= set(overridden)
    names = [name.removeprefix(f"{location[0]}.") if location else name for name in overridden]
    return any(re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", problem["msg"]) for name in names)


def sections(kind: type[Section]) -> dict[str, type[Section]]:
    """A config's sections by name, in the order of its class."""
    fields = {name: field.annotation for name, field in kind.model_fields.items()}
    return {name: part for name, part in fields.items() if isinstance(part, type) and issubclass(part, Section)}


def keys(section: type[Section]) -> dict[str, str]:
    """The keys of a section as people write them, each with its meaning."""
    return {field.alias or name: field.description or "" for name, field in section.model_fields.items()}


def flatten(config: Section) -> list[tuple[str, str, Any]]:
    """(section, key, plain value) of every setting, in the order of the classes above."""
    dumped = config.model_dump(mode="json", by_alias=True)
    return [(name, key, value) for name, section in dumped.items() for key, value in section.items()]


def to_yaml(config: Section) -> str:
    """To be kept and passed around: without the passwords of URLs."""
    return yaml.safe_dump(_masked(config.model_dump(mode="json", by_alias=True)), sort_keys=False)


def _masked(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _masked(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_masked(part) for part in value]
    return masked(value) if isinstance(value, str) else value


def _floats_from_text(tree: dict[str, Any]) -> dict[str, Any]:
    # YAML 1.1 reads `1e-6` as text, because it has no dot; people write it all the same.
    def convert(value: Any) -> Any:
        return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value

    return {
        name: {key: convert(value) for key, value in section.items()} if isinstance(section, dict) else section
        for name, section in tree.items()
    }


def _explain(problem: ErrorDetails, where: str, kind: type[Section]) -> str:
    location = [str(part) for part in problem["loc"]]
    # A union's error names the branch that failed after the field; section.key is what the user wrote.
    name = ".".join(location[:2])
    if problem["type"] == "extra_forbidden":
        what = "section" if len(location) == 1 else "key"
        return f"{where}: unknown {what} {'.'.join(location)}: {_hint(location, kind)}"
    if problem["type"] == "missing" and len(location) == 1:
        section = sections(kind)[name]
        needed = [field.alias or key for key, field in section.model_fields.items() if field.is_required()]
        wanted = [f"{name}.{key} ({meaning})" for key, meaning in keys(section).items() if key in needed or not needed]
        return f"{where}: {name} is required: give {', '.join(wanted)}"
    if problem["type"] == "missing":
        return f"{where}: {name} is required: {_meaning(location, kind)}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{where}: {name + ': ' if name else ''}{message}"
    return f"{where}: {name} ({problem['input']!r}): {message}; {_meaning(location, kind)}"


def _meaning(location: list[str], kind: type[Section]) -> str:
    section = sections(kind).get(location[0])
    if section is None or len(location) < 2:
        return "see `kto-dist config --help`"
    return keys(section).get(location[1], "")


def _hint(location: list[str], kind: type[Section]) -> str:
    """What an unknown name may have meant: another section's key, another library's word, or a slip of the pen."""
    own = sections(kind).get(location[0]) if len(location) > 1 else None
    prefix, known = ("", list(sections(kind))) if own is None else (f"{location[0]}.", list(keys(own)))
    meant = _called(location[-1], kind)
    for near in [] if meant else difflib.get_close_matches(location[-1], [*known, *_words(kind)], n=1, cutoff=0.6):
        meant = [prefix + near] if near in known else _called(near, kind)
    listed = f"known: {', '.join(known)}"
    if not meant:
        return listed
    asked = f"did you mean {' or '.join(meant)}?"
    return asked if {name.removeprefix(prefix) for name in meant} <= set(known) else f"{asked} {listed}"


def _called(word: str, kind: type[Section]) -> list[str]:
    """`section.key` of every setting that is called so, here or elsewhere."""
    every = _settings(kind)
    same = [name for name in sorted(every) if name.partition(".")[2] == word]
    return same or [name for name in ELSEWHERE.get(word, ()) if name in every]


def _meant(word: str, kind: type[Section]) -> list[str]:
    """`section.key` of every setting that is called so, or else nearly so."""
    near = difflib.get_close_matches(word, _words(kind), n=1, cutoff=0.6)
    return _called(word, kind) or [name for found in near for name in _called(found, kind)]


def _settings(kind: type[Section]) -> set[str]:
    """`section.key`s."""
    return {f"{name}.{key}" for name, section in sections(kind).items() for key in keys(section)}


def _words(kind: type[Section]) -> list[str]:
    """What settings are called, here or elsewhere."""
    return [*(key for section in sections(kind).values() for key in keys(section)), *ELSEWHERE]
