"""Exports as applications write them, with made-up content: the right rows, or an error that says what to map.

`cases/feedback/cases.jsonl` names each file, the mapping that one tries first, and the rows that the file means.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from mining import config_of

from kto_dist.base.config import build
from kto_dist.base.errors import UserError
from kto_dist.feedback import MiningConfig, mine, pipeline

FOLDER = Path(__file__).parent / "cases" / "feedback"
CASES = {case["name"]: case for case in map(json.loads, (FOLDER / "cases.jsonl").read_text().splitlines())}
PRESETS = Path(__file__).parents[1] / "kto_dist" / "feedback" / "presets"
ALL = {"clean__near_duplicates": None, "agreement__conflicts": "keep"}

# case -> what the mapping that one tries first needs beside it, or in its place (null)
RIGHT: dict[str, dict[str, dict[str, Any]]] = {
    "openwebui-jsonl": {"columns": {"rated": "/meta/message_id"}},
    "librechat-2-role-boolean": {"roles": {"true": "user", "false": "assistant"}},
    "librechat-9-edited-question": {"columns": {"id": "messageId", "parent": "parentMessageId"}},
    "langfuse-traces-scores-0-boolean-judge": {"columns": {"feedback": "/scores[name=user-feedback]/value"}},
    "argilla-three-annotators": {
        "columns": {"feedback": "/responses/quality[]/value", "user": "/responses/quality[]/user_id"},
        "where": {"/responses/quality[]/status": "submitted"},
    },
    "mlflow-search-traces-jsonl": {
        "columns": {
            "feedback": "/assessments[assessment_name=user_satisfaction]/feedback/value",
            "user": "/assessments[]/source/source_id",
        },
        "where": {"/assessments[]/source/source_type": "HUMAN"},
    },
    "phoenix-messages": {"where": {"annotator_kind": "HUMAN"}},
    "flowise": {"roles": {"userMessage": "user", "apiMessage": "assistant"}},
    "hf-classlabel-parquet": {},
    "turns-sentinel-skip": {},
    "turns-unknown-role-skip": {"roles": {"customer": "user"}},
    "turns-split-replies": {"turns": {"answers_in_a_row": "joined", "joined_by": ", "}},
    "slack-thread": {
        "columns": {"role": ["subtype", "type"], "feedback": "/reactions[]/name", "user": "/reactions[]/users[]"},
        "roles": {"bot_message": "assistant", "message": "user"},
        "labels": {"neutral": ["eyes"]},
    },
    "arena-pairs": {
        "columns": {
            "messages": None, "chosen": None, "rejected": None,
            "answer_a": "conversation_a", "answer_b": "conversation_b", "winner": "winner", "user": "judge",
        },
    },
    "dify-json-wrapped": {
        "input": {"rows": "/feedback_data"},
        "clean": {"truncated": [r"(?s)^.{500}\.\.\.$"], "near_duplicates": None},
    },
}  # fmt: skip
# Rows that a file cannot give: four conversations have a turn without a time, six answers were cut by the export.
LACKING = {"turns-sentinel-skip": 4, "dify-json-wrapped": 6}
OF_PRESETS = {
    "openwebui": "openwebui-jsonl",
    "librechat": "librechat-9-edited-question",
    "langfuse": "langfuse-traces-scores-0-boolean-judge",
    "mlflow": "mlflow-search-traces-jsonl",
    "argilla": "argilla-three-annotators",
    "phoenix": "phoenix-messages",
    "flowise": "flowise",
    "slack": "slack-thread",
    "arena": "arena-pairs",
    "dify": "dify-json-wrapped",
}


def tree_of(folder: Path, name: str, more: dict[str, dict[str, Any]]) -> dict[str, Any]:
    case = CASES[name]
    tree = config_of(folder, FOLDER / case["file"], {"prompt": "x", "response": "y", "feedback": "z"}, **ALL)
    plain = {"input", "split", "clean", "output", "resources", "agreement"}
    base = {key: value for key, value in tree.model_dump(mode="json", exclude_unset=True).items() if key in plain}
    for part in (case["tried"], more):
        base = {key: {**base.get(key, {}), **part.get(key, {})} for key in {**base, **part}}
    return base


def rows(folder: Path, tree: dict[str, Any]) -> set[tuple[str, str, bool]]:
    with pipeline(build(tree, kind=MiningConfig)) as connection:
        found = connection.execute("SELECT prompt, completion, label FROM examples JOIN texts USING (vote)").fetchall()
    return {(json.dumps(json.loads(prompt), sort_keys=True), answer, label) for prompt, answer, label in found}


def right(name: str) -> set[tuple[str, str, bool]]:
    return {
        (json.dumps(row["prompt"], sort_keys=True), row["completion"], row["label"]) for row in CASES[name]["right"]
    }


def with_right_rows() -> Iterator[str]:
    yield from (name for name, case in CASES.items() if case["right"] is not None)


@pytest.mark.parametrize("name", with_right_rows())
def test_an_export_gives_the_right_rows(tmp_path, name):
    found = rows(tmp_path, tree_of(tmp_path, name, RIGHT[name]))
    assert not found - right(name)
    assert len(right(name) - found) == LACKING.get(name, 0)


@pytest.mark.parametrize("name", with_right_rows())
def test_the_mapping_that_one_tries_first_gives_no_wrong_row(tmp_path, name):
    if name == "dify-json-wrapped":  # whose cut answers only a rule can tell
        return
    try:
        found = rows(tmp_path, tree_of(tmp_path, name, {}))
    except UserError as mistake:
        assert any(part in str(mistake) for part in (": ", "columns.", "roles")), mistake
    else:
        assert found and not found - right(name)


@pytest.mark.parametrize("preset", OF_PRESETS)
def test_a_preset_is_one_line(tmp_path, preset):
    name = OF_PRESETS[preset]
    tree = tree_of(tmp_path, name, {"input": {"preset": preset}})
    found = rows(
        tmp_path, {key: value for key, value in tree.items() if key not in CASES[name]["tried"] or key == "input"}
    )
    assert not found - right(name) and len(right(name) - found) == LACKING.get(name, 0)


def test_a_preset_without_a_sample_says_where_it_is_from():
    for path in PRESETS.glob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        tried = "# Tried on a sample." in text
        assert tried == (path.stem in OF_PRESETS) and tried != ("# From the application's documentation." in text), path
        yaml.safe_load(text)


def test_what_a_config_says_itself_goes_before_its_preset(tmp_path):
    tree = tree_of(tmp_path, "argilla-three-annotators", {})
    tree["columns"] = {"user": None}
    tree["input"]["preset"] = "argilla"
    config = build(tree, kind=MiningConfig)
    assert config.columns.user is None and config.columns.prompt == "/fields/prompt"
    with pytest.raises(UserError, match=r"preset \(argila\) is none that is known: did you mean argilla\?"):
        build({**tree, "input": {**tree["input"], "preset": "argila"}}, kind=MiningConfig)


@pytest.mark.parametrize("name", ["openai-tool-calls", "openai-tool-calls-empty-content"])
def test_calls_of_tools_stay_in_the_prompt(tmp_path, name):
    mine(build(tree_of(tmp_path, name, {}), kind=MiningConfig))
    table = pq.read_table(tmp_path / "mined" / "train.parquet").to_pylist()
    calling = [row["prompt"] for row in table if len(row["prompt"]) == 3]
    assert len(table) == 20 and len(calling) == 10
    for user, call, result in calling:
        assert [user["role"], call["role"], result["role"]] == ["user", "assistant", "tool"]
        assert call["tool_calls"][0]["function"] == {"name": "lookup", "arguments": '{"q": 1}'}
        assert result["tool_call_id"] == call["tool_calls"][0]["id"] == "c1" and result["content"] == "found"


def test_the_document_shows_every_preset():
    document = (Path(__file__).parents[1] / "docs" / "formats.md").read_text(encoding="utf-8")
    for path in PRESETS.glob("*.yaml"):
        assert f"```yaml\n{path.read_text(encoding='utf-8')}```" in document, path
        assert f"`input.preset: {path.stem}`" in document, path
