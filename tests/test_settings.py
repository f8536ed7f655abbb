"""What a user starts from: the examples of `kto-dist init`, and the settings' documentation."""

import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from kto_dist.base.config import resolve
from kto_dist.commands.cli import EXAMPLES, main
from kto_dist.commands.settings import settings_lines
from kto_dist.comparison.config import ComparisonConfig
from kto_dist.feedback import MiningConfig
from kto_dist.training.config import Config

KINDS = {"mine": MiningConfig, "compare": ComparisonConfig}
CONFIGS = [name for name in EXAMPLES if name not in ("slurm", "kubernetes", "hpz")]


@pytest.mark.parametrize("example", CONFIGS)
def test_init_prints_a_config_that_is_valid_as_it_is(tmp_path, example):
    shown = CliRunner().invoke(main, ["init", example])
    assert shown.exit_code == 0
    (tmp_path / "config.yaml").write_text(shown.output)
    config, origin = resolve(tmp_path / "config.yaml", kind=KINDS.get(example, Config))
    assert set(origin.values()) == {"default", str(tmp_path / "config.yaml")}
    assert config.output.folder == "runs/mined" if isinstance(config, MiningConfig) else config.train.output


def test_config_as_markdown_documents_every_setting_once():
    shown = CliRunner().invoke(main, ["config", "--markdown"])
    lines = settings_lines()
    assert len(lines) == sum(len(section.annotation.model_fields) for section in ComparisonConfig.model_fields.values())
    assert [line for line in shown.output.splitlines() if line.startswith("| `")] == lines


def test_config_without_a_file_says_how_to_get_one():
    shown = CliRunner().invoke(main, ["config"])
    assert shown.exit_code == 2 and "kto-dist init" in shown.output


def test_every_command_explains_itself_and_its_options():
    queue = [((), main)]
    while queue:
        path, command = queue.pop()
        page = CliRunner().invoke(main, [*path, "--help"])
        assert page.exit_code == 0
        assert len(command.help or "") > 20, path
        for option in command.params:
            if isinstance(option, click.Option):
                assert option.help and option.opts[0] in page.output, (path, option.name)
            elif not isinstance(option.type, click.Choice):  # the text says what an argument is
                assert option.name in command.help.lower(), (path, option.name)
        for name, below in getattr(command, "commands", {}).items():
            assert name in page.output and f"{name}..." not in page.output
            assert not below.get_short_help_str(limit=60).endswith("..."), (path, name)
            queue.append(((*path, name), below))


@pytest.mark.parametrize("words", (["config", "CONFIG"], ["init"], ["mine", "--help"], ["audit", "--help"]))
def test_commands_that_only_tell_load_nothing_heavy(tmp_path, words):
    (tmp_path / "config.yaml").write_text("model: {path: x}\ndata: {train: y}\n")
    code = (
        "import sys\n"
        "from kto_dist.commands.cli import main\n"
        f"main({[word.replace('CONFIG', str(tmp_path / 'config.yaml')) for word in words]}, standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'mlflow', 'pyarrow', 'duckdb', 'matplotlib', 'scipy'}\n"
        "print('heavy:', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy: []"
