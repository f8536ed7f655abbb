"""The README tells the truth about what can be checked: its settings, its example configs, the files that it names."""

import re
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import yaml

from kto_dist.base.config import Section, resolve
from kto_dist.feedback import MiningConfig
from kto_dist.training.config import Config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MINING = (ROOT / "docs" / "mining.md").read_text(encoding="utf-8")


def settings_table(kind: type[Section] = Config) -> list[str]:
    """A line for every setting, from the config's own documentation."""
    lines = []
    for section, outer in kind.model_fields.items():
        for name, field in outer.annotation.model_fields.items():
            default = "required" if field.is_required() else yaml.safe_dump(field.default).split("\n")[0]
            if isinstance(field.default, tuple):
                default = str(list(field.default))
                # long lists, and patterns whose bars would end the table's cell
                default = "built-in list" if len(default) > 60 or "|" in default else default
            words = [word for word in _choices(field.annotation) if not isinstance(word, bool)]
            choices = f" ({', '.join(map(str, words))})" if len(words) > 1 else ""
            lines.append(f"| `{section}.{field.alias or name}` | {default} | {field.description}{choices} |")
    return lines


def _choices(annotation: object) -> list[object]:
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [choice for part in get_args(annotation) for choice in _choices(part)]


@pytest.mark.parametrize("line", settings_table(), ids=lambda line: line.split("`")[1])
def test_every_setting_stands_in_the_readme_with_its_default_and_meaning(line):
    assert line in README.splitlines()


@pytest.mark.parametrize("line", settings_table(MiningConfig), ids=lambda line: line.split("`")[1])
def test_every_setting_of_mining_stands_in_its_document(line):
    assert line in MINING.splitlines()


def test_no_setting_of_minings_document_is_unknown():
    named = set(re.findall(r"^\| `(\w+\.\w+)` \|", MINING, flags=re.MULTILINE))
    assert named == {line.split("`")[1] for line in settings_table(MiningConfig)}


def test_the_demos_mining_config_is_valid():
    assert resolve(ROOT / "launch/demo/mine.yaml", kind=MiningConfig)[0].columns.user == "user"


def test_no_setting_of_the_readme_is_unknown():
    table = README.partition("## Settings")[2].partition("\n## ")[0]
    named = set(re.findall(r"^\| `(\w+\.\w+)` \|", table, flags=re.MULTILINE))
    assert named == {line.split("`")[1] for line in settings_table()}


@pytest.mark.parametrize("path", sorted([*ROOT.glob("launch/configs/*.yaml"), ROOT / "launch/demo/demo.yaml"]), ids=str)
def test_every_config_that_is_shipped_is_valid(path):
    assert resolve(path, kind=Config)[0].train.output


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_every_link_to_a_file_leads_somewhere(target):
    assert (ROOT / target).exists()
