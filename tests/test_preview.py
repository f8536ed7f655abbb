"""Looking before training: the rows that `--check` and every start of a run show, and the exit status."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny import tiny_tokenizer, write_jsonl
from tiny_runs import metrics_of, tiny_config

from kto_dist.base.config import to_yaml
from kto_dist.base.console import Console
from kto_dist.commands.cli import main
from kto_dist.training.loop import train
from kto_dist.training.prepare import class_weights, prepare
from kto_dist.training.preview import preview


def asked(words: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": words}]


def told(words: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": words}]


APP = [
    {"prompt": asked("one"), "completion": told("bad"), "label": False},
    {"prompt": asked("two"), "completion": told("worse"), "label": False, "weight": 0.5, "colour": "red"},
]
HH = [{"prompt": asked("three"), "completion": told("good"), "label": True, "weight": 2.0}]


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, str]:
    named = {"app": APP, "hh": HH}
    return {name: str(write_jsonl(tmp_path / f"{name}.jsonl", rows)) for name, rows in named.items()}


def checked(folder: Path, *overrides: str, **settings: object):
    """The command, in this process: (exit status, what it said)."""
    model = folder / "model"
    if not model.exists():
        model.mkdir()
        tiny_tokenizer().save_pretrained(model)
        about = {"model_type": "llama", "vocab_size": 258, "max_position_embeddings": 256}
        (model / "config.json").write_text(json.dumps(about))
        (model / "model.safetensors").touch()
    path = folder / "config.yaml"
    path.write_text(to_yaml(tiny_config(folder, model, folder / "app.jsonl", **settings)))
    result = CliRunner().invoke(main, ["train", str(path), "--check", *overrides])
    return result.exit_code, result.output


def test_a_check_says_what_an_adapter_comes_to_and_finds_one_that_does_not_fit(tmp_path, sources):
    status, said = checked(tmp_path, "adapter.type=lora", "adapter.rank=4", data__train=sources)
    assert status == 0 and "adapter: lora of rank 4" in said, said
    status, said = checked(tmp_path, "adapter.type=lora", "adapter.targets=[qproj]", data__train=sources)
    assert status == 2 and "qproj" in said, said


def test_a_check_shows_rows_counts_and_what_is_not_used_without_reading_weights(tmp_path, sources):
    """The file of weights is empty."""
    status, said = checked(tmp_path, data__train=sources)
    assert status == 0, said
    lines = said.splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("row 3"))
    assert lines[start : start + 9] == [
        "row 3 of 3: desirable, weight 2 (times 1 of its class), 24 prompt + 5 completion tokens, from hh",
        '  prompt:     "<|im_start|>user\\nthree<|im_end|>\\n<|im_start|>assistant\\n"',
        '  trained on: "good<|im_end|>"',
        "row 1 of 3: undesirable, weight 1 (times 1 of its class), 22 prompt + 4 completion tokens, from app",
        '  prompt:     "<|im_start|>user\\none<|im_end|>\\n<|im_start|>assistant\\n"',
        '  trained on: "bad<|im_end|>"',
        "row 2 of 3: undesirable, weight 0.5 (times 1 of its class), 22 prompt + 6 completion tokens, from app",
        '  prompt:     "<|im_start|>user\\ntwo<|im_end|>\\n<|im_start|>assistant\\n"',
        '  trained on: "worse<|im_end|>"',
    ]
    assert "source app: 0 desirable, 2 undesirable" in said and "source hh: 1 desirable, 0 undesirable" in said
    assert "colour (1)" in said
    assert lines[-1].startswith("check: passed")
    assert not (tmp_path / "run").exists()


def test_a_check_finds_that_weights_are_not_there(tmp_path, sources):
    assert checked(tmp_path, data__train=sources)[0] == 0
    empty = tmp_path / "empty"
    empty.mkdir()
    status, said = checked(tmp_path, f"reference.path={empty}", data__train=sources)
    assert status == 2 and "holds no weights" in said and str(empty) in said, said
    (tmp_path / "model" / "model.safetensors").unlink()
    status, said = checked(tmp_path, data__train=sources)
    assert status == 2 and "holds no weights: it needs model.safetensors" in said, said
    shards = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(shards))
    (tmp_path / "model" / "model-1.safetensors").touch()
    status, said = checked(tmp_path, data__train=sources)
    assert status == 2 and "lacks model-2.safetensors, of its weights" in said, said
    status, said = checked(tmp_path, "model.gguf_file=model.gguf", data__train=sources)
    assert status == 2 and "lacks model.gguf" in said, said


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"data__train": "nothing.jsonl"}, "does not exist"),
        ({"data__max_length": 512}, "512"),
        ({"objective__beta": -1}, "beta"),
    ],
)
def test_a_check_says_what_is_wrong_with_status_2(tmp_path, sources, changes, rule):
    overrides = [f"{name.replace('__', '.')}={value}" for name, value in changes.items()]
    status, said = checked(tmp_path, *overrides, data__train=sources)
    assert status == 2 and rule in said, said


def test_long_texts_are_cut_in_their_middle(tmp_path, tiny_model):
    rows = [{"prompt": "a" * 40 + "b" * 20, "completion": "c" * 30 + "d", "label": label} for label in (True, False)]
    rows.append({"prompt": "other", "completion": "e", "label": True})
    config = tiny_config(tmp_path, tiny_model, write_jsonl(tmp_path / "log.jsonl", rows))
    prepared = prepare(config, Console())
    lines = preview(prepared, class_weights(prepared.train, config, print), rows=1, characters=20)
    assert lines[1:] == [
        '  prompt:     "aaaaaaaaaa [... 40 characters ...] bbbbbbbbbb"',
        '  trained on: "cccccccccc [... 21 characters ...] <|im_end|>"',
    ]


def test_a_run_shows_three_rows_and_has_metrics_by_source(tmp_path, tiny_model, sources, capsys):
    """A step of all rows has both sources; steps of one row have one each."""
    config = tiny_config(tmp_path, tiny_model, tmp_path, data__train=sources, train__max_steps=2, train__global_batch=3)
    train(config)
    said = capsys.readouterr().out
    assert [line.split(":")[0] for line in said.splitlines() if line.startswith("row ")] == [
        "row 3 of 3", "row 1 of 3", "row 2 of 3",
    ]  # fmt: skip
    for line in metrics_of(config):
        assert (line["rows/source/app"], line["rows/source/hh"]) == (2, 1)
        # app is all of the thumbs down, and hh of the thumbs up
        for name, label in (("app", "undesirable"), ("hh", "desirable")):
            assert line[f"loss/source/{name}"] == pytest.approx(line[f"loss/{label}"])
            assert line[f"rewards/source/{name}"] == pytest.approx(line[f"rewards/{label}"])
        assert not {name for name in line if not any(known.fullmatch(name) for known in documented())}


def documented():
    """The names of docs/metrics.md, where `*` and NAME stand for any name."""
    page = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")
    cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    names = [name for cell in cells for name in re.findall("`([^`]+)`", cell)]
    return [re.compile(re.escape(name).replace(r"\*", r"\w+").replace("NAME", r"\w+")) for name in names]
