"""The documents tell the truth about what can be checked: settings, commands, configs, links."""

import re
from pathlib import Path

import click
import pytest

from kto_dist.base.config import resolve
from kto_dist.commands.cli import main
from kto_dist.commands.settings import settings_lines, settings_page
from kto_dist.comparison.config import ComparisonConfig
from kto_dist.feedback import MiningConfig
from kto_dist.training.config import Config

ROOT = Path(__file__).parents[1]
FOLDERS = ("", "docs", "kernels", "benchmarks", "launch")
DOCUMENTS = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for folder in FOLDERS
    for path in sorted((ROOT / folder).glob("*.md"))
}
KUBERNETES = ROOT / "launch" / "configs" / "kubernetes.yaml"  # no config: tests/test_schedulers.py

# what was, keys of a JSON file, DeepSpeed's settings
OTHERS_NAMES = ("CHANGELOG.md", "docs/audit.md", "docs/engine-notes.md")


def names(line: str) -> str:
    return line.split("`")[1]


def test_the_page_of_settings_is_what_the_config_says():
    assert DOCUMENTS["docs/settings.md"] == settings_page(), "run `make docs`"


def test_the_table_of_minings_settings_is_what_its_config_says():
    wanted = settings_lines(MiningConfig)
    table = [line for line in DOCUMENTS["docs/mining.md"].splitlines() if re.match(r"\| `\w+\.\w+` \|", line)]
    assert sorted(table) == sorted(wanted)


def test_every_setting_that_a_document_names_exists():
    known = {names(line) for kind in (ComparisonConfig, MiningConfig) for line in settings_lines(kind)}
    sections = {name.partition(".")[0] for name in known}
    for document, text in DOCUMENTS.items():
        if document in OTHERS_NAMES:
            continue
        found = re.findall(r"(?<![\w/.\"])(\w+)\.(\w+)(?=[`=:])", text)
        unknown = {f"{a}.{b}" for a, b in found if a in sections and b not in ("py", "md", "yaml", "json", "jsonl")}
        assert unknown <= known | {"audit.files"}, document  # a tag in MLflow


@pytest.mark.parametrize(
    "path",
    sorted({*ROOT.glob("launch/configs/*.yaml"), *ROOT.glob("launch/demo/*.yaml")} - {KUBERNETES}),
    ids=lambda path: path.name,
)
def test_every_config_that_is_shipped_is_valid(path):
    kind = {"mine.yaml": MiningConfig, "compare.yaml": ComparisonConfig}.get(path.name, Config)
    assert resolve(path, kind=kind)[0]


def test_every_command_and_target_that_a_document_names_exists():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for document, text in DOCUMENTS.items():
        code = "\n".join(_code_of(text))
        for words in re.findall(r"(?:^|\s)kto-dist ([a-z][\w -]*)", code):
            command: click.Command = main
            for word in words.split():
                if not isinstance(command, click.Group):
                    break
                assert word in command.commands, f"{document}: kto-dist {words}"
                command = command.commands[word]
        for target in re.findall(r"(?:^|\s)make ([a-z]+)", code):
            assert target in targets, f"{document}: make {target}"


def _code_of(text: str) -> list[str]:
    """Shell blocks, and inline code outside of blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return [*blocks, *re.findall(r"`([^`]+)`", prose)]


def test_every_source_file_that_a_document_names_exists():
    tracked = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py") if ".venv" not in path.parts]
    for document, text in DOCUMENTS.items():
        for name in re.findall(r"`([\w/]+\.py)`", text):
            assert any(f"/{path}".endswith(f"/{name}") for path in tracked), f"{document}: {name}"


def test_every_link_leads_somewhere():
    broken = []
    for document, text in DOCUMENTS.items():
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        for target in re.findall(r"\]\((?!http)([^)\s]+)\)", prose):
            file, _, anchor = target.partition("#")
            path = (ROOT / document).parent / file if file else ROOT / document
            if not path.exists() or (anchor and anchor not in _anchors(path.read_text(encoding="utf-8"))):
                broken.append(f"{document}: {target}")
    assert not broken


def _anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
