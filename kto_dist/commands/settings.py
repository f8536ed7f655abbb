"""The settings' documentation, made from the config itself: `docs/settings.md`, and the tables of other documents."""

from typing import Literal, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from kto_dist.base.config import Section, sections
from kto_dist.comparison.config import ComparisonConfig

INTRODUCTION = """# Settings

Made by `make docs` from the config's own descriptions; `kto-dist config CONFIG` prints the same with a run's values.

A config is one YAML file of sections. Overrides on the command line come last and win: `train.lr=1e-6`. An unknown key
is an error that names the nearest known one. Paths are relative to the working directory. `auto` is decided by the rule
in the setting's line. The section `compare` is that of `kto-dist compare` alone.
"""


def settings_page(kind: type[Section] = ComparisonConfig) -> str:
    """All of docs/settings.md: a table for every section."""
    parts = [INTRODUCTION]
    for name, section in sections(kind).items():
        summary = (section.__doc__ or "").strip().splitlines()[0]
        parts.append(f"## {name}\n\n{summary}\n\n| setting | default | meaning |\n|---|---|---|")
        parts[-1] += "".join(f"\n{line}" for line in section_lines(name, section)) + "\n"
    return "\n".join(parts)


def settings_lines(kind: type[Section] = ComparisonConfig) -> list[str]:
    """A table's line for every setting of a config."""
    return [line for name, section in sections(kind).items() for line in section_lines(name, section)]


def section_lines(name: str, section: type[Section]) -> list[str]:
    return [
        f"| `{name}.{field.alias or key}` | {_default(field)} | {_meaning(field)} |"
        for key, field in section.model_fields.items()
    ]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if not isinstance(field.default, tuple):
        return str(yaml.safe_dump(field.default).split("\n")[0])
    text = str(list(field.default))
    # long lists, and patterns whose bars would end the table's cell
    return "built-in list" if len(text) > 60 or "|" in text else text


def _meaning(field: FieldInfo) -> str:
    words = [word for word in _choices(field.annotation) if not isinstance(word, bool)]
    return f"{field.description} ({', '.join(map(str, words))})" if len(words) > 1 else str(field.description)


def _choices(annotation: object) -> list[object]:
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [choice for part in get_args(annotation) for choice in _choices(part)]
