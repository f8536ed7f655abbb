"""Columns of any name are found or asked for, and what stands beside them is used, counted or refused."""

import json

import pyarrow as pa
import pyarrow.parquet
import pytest
from thumbs_logs import ANSWER, CHAT_ROW, GOOD, TEXT_ROW, USER, WORSE, content, read, write

from kto_dist.base.config import Section, build
from kto_dist.base.errors import UserError
from kto_dist.data.config import DataConfig
from kto_dist.data.formats import BadRows


@pytest.mark.parametrize("name", ["question", "query", "input", "context"])
def test_a_question_of_another_name_is_the_prompt(tmp_path, name):
    asked, good, bad = (
        "What is the capital of France?",
        "The capital of France is Paris.",
        "The capital of France is Rome.",
    )
    pair = write(tmp_path / "pair.jsonl", {name: asked, "chosen": good, "rejected": bad})
    assert content(read(pair)) == [(asked, good, True, 1.0), (asked, bad, False, 1.0)]
    single = write(tmp_path / "single.jsonl", {name: asked, "answer": good, "label": 1})
    assert content(read(single)) == [(asked, good, True, 1.0)]


@pytest.mark.parametrize("more", [{}, {"ask": "What is the capital of France?"}])
def test_text_pairs_without_marked_turns_are_refused_and_the_other_columns_named(tmp_path, more):
    record = {**more, "chosen": "The capital of France is Paris.", "rejected": "The capital of France is Rome."}
    with pytest.raises(UserError, match=r"data\.columns: \{prompt: ask\}" if more else "add a prompt column"):
        read(write(tmp_path / "log.jsonl", record))


HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"


MARKED = {
    "HH": ("\n\nHuman: {}", "\n\nAssistant:"),
    "colons": ("User: {}", "\nAssistant:"),
    "headings": ("### Instruction:\n{}", "\n\n### Response:\n"),
    "ChatML": ("<|im_start|>user\n{}<|im_end|>\n", "<|im_start|>assistant\n"),
    "Llama 3": (HEADER.format("user") + "{}<|eot_id|>", HEADER.format("assistant")),
    "Llama 2": ("[INST] {} [/INST]", ""),
}


@pytest.mark.parametrize("asked, answered", MARKED.values(), ids=MARKED)
def test_marked_turns_tell_where_a_whole_conversation_is_cut(tmp_path, asked, answered):
    start = asked.format("hi") + answered + " first." + asked.format("and?").rjust(len(asked) + 4, "\n") + answered
    pair = {"chosen": start + " I can", "rejected": start + " I cannot"}
    assert content(read(write(tmp_path / "log.jsonl", pair))) == [
        (start, " I can", True, 1.0),
        (start, " I cannot", False, 1.0),
    ]


def test_conversations_that_part_before_the_last_turn_are_bad_rows(tmp_path):
    talk = "\n\nHuman: a\n\nAssistant: {}\n\nHuman: {}\n\nAssistant: {}"
    record = {"chosen": talk.format("b1", "c", "d"), "rejected": talk.format("b2", "e", "f")}
    bad, good = BadRows(), {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    rows = read(write(tmp_path / "log.jsonl", record, good), on_bad_row="skip", bad=bad)
    assert [row.completion for row in rows] == [" b", " c"] and bad.counts == {"parts too early": 1}
    assert "Human: c" in bad.examples[0]


def test_two_prompts_are_refused_unless_one_holds_the_other_or_is_left_out(tmp_path):
    path = write(tmp_path / "log.jsonl", {**GOOD, "context": "a long text"})
    with pytest.raises(UserError, match=r"prompt and context .*data\.columns: \{context: null\}"):
        read(path)
    assert content(read(path, columns={"context": None})) == [TEXT_ROW]
    held = write(tmp_path / "held.jsonl", {**GOOD, "prompt": "Q: why? A:", "question": "why?"})
    assert [row.prompt for row in read(held)] == ["Q: why? A:"]


def test_columns_of_other_names_are_mapped_also_from_within(tmp_path):
    record = {"ask": "hi", "said": {"text": ["no", "hello"]}, "votes": json.dumps({"thumb": "up"}), "id": 7}
    columns = {"prompt": "ask", "completion": "/said/text/-1", "label": "/votes/thumb"}
    bad = BadRows()
    assert content(read(write(tmp_path / "log.jsonl", record), bad=bad, columns=columns)) == [TEXT_ROW]
    pyarrow.parquet.write_table(pa.Table.from_pylist([record]), tmp_path / "log.parquet")
    assert content(read(tmp_path / "log.parquet", columns=columns)) == [TEXT_ROW]
    assert bad.unused == {"id": 1}


def test_a_mapped_column_that_no_row_has_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"data\.columns\.prompt \(qestion\): no row has such a column"):
        read(write(tmp_path / "log.jsonl", GOOD), columns={"prompt": "qestion"})


def test_a_config_maps_names_that_are_known():
    with pytest.raises(UserError, match="promt is no name that is known, did you mean prompt"):
        build({"data": {"train": "log.jsonl", "columns": {"promt": "q"}}}, kind=DataOnly)


class DataOnly(Section):
    data: DataConfig


def test_what_nothing_reads_is_counted_by_column(tmp_path):
    records = [{**GOOD, "prompt_id": 1, "tools": [{"name": "f"}], "note": None}, {**GOOD, "prompt_id": 2, "note": "x"}]
    for path in (write(tmp_path / "log.jsonl", *records), str(tmp_path / "log.parquet")):
        if path.endswith("parquet"):
            pyarrow.parquet.write_table(pa.Table.from_pylist(records), path)
        bad = BadRows()
        read(path, bad=bad)
        assert bad.unused == {"prompt_id": 2, "tools": 1, "note": 1}


@pytest.mark.parametrize(
    "more, reason, quoted",
    [
        ({"system": "be kind"}, "system beside text", "be kind"),
        ({"images": ["a.png"]}, "more than text", "a.png"),
        ({"image": {"bytes": "x"}}, "more than text", "image"),
        ({"kto_tag": False}, "two labels", "kto_tag"),
        ({"weight": 10**400}, "bad weight", "100000"),
    ],
)
def test_what_would_change_the_row_and_cannot_be_used_is_a_bad_row(tmp_path, more, reason, quoted):
    bad, path = BadRows(), write(tmp_path / "log.jsonl", {**GOOD, **more}, GOOD)
    assert content(read(path, on_bad_row="skip", bad=bad)) == [TEXT_ROW]
    assert bad.counts == {reason: 1} and quoted in bad.examples[0]


def test_labels_that_agree_are_one(tmp_path):
    assert content(read(write(tmp_path / "log.jsonl", {**GOOD, "kto_tag": 1}))) == [TEXT_ROW]


def test_the_system_column_goes_before_turns_of_pairs_too(tmp_path):
    system = {"role": "system", "content": "be kind"}
    for record in (
        {"system": "be kind", "prompt": [USER], "chosen": [ANSWER], "rejected": [WORSE]},
        {"system": "be kind", "chosen": [USER, ANSWER], "rejected": [USER, WORSE]},
        {"system": "be kind", "instruction": "hi", "chosen": "hello", "rejected": "what"},
    ):
        assert [row.prompt for row in read(write(tmp_path / "log.jsonl", record))] == [(system, USER)] * 2


def test_a_prompt_that_answers_repeat_is_counted_and_repeated_messages_are_taken_off(tmp_path):
    bad = BadRows()
    read(
        write(tmp_path / "log.jsonl", {"prompt": "Q: hi A:", "chosen": "Q: hi A: yes", "rejected": "Q: hi A: no"}),
        bad=bad,
    )
    assert [count for note, count in bad.notes.items() if "repeat the whole text of their prompt" in note] == [2]
    [row] = read(write(tmp_path / "log.jsonl", {"prompt": [USER], "completion": [USER, ANSWER], "label": 1}))
    assert content([row]) == [CHAT_ROW]


@pytest.mark.parametrize("written", [json.dumps, repr])
def test_messages_as_text_of_json_are_read_as_messages_and_counted(tmp_path, written):
    bad = BadRows()
    record = {"prompt": written([USER]), "completion": written([ANSWER]), "label": True}
    assert content(read(write(tmp_path / "log.jsonl", record), bad=bad)) == [CHAT_ROW]
    assert [count for note, count in bad.notes.items() if "JSON text" in note] == [1]
    assert content(read(write(tmp_path / "log.jsonl", {**GOOD, "prompt": "[{'a': 1}]"})))[0][0] == "[{'a': 1}]"


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)], [TOOL["function"]], TOOL])
def test_tools_come_as_a_list_or_as_json_text_of_it(tmp_path, tools):
    record = {"messages": [USER, ANSWER], "label": True, "tools": tools, "chat_template_kwargs": '{"depth": 3}'}
    [row] = read(write(tmp_path / "log.jsonl", record))
    assert row.tools == (TOOL,) and row.template_kwargs == {"depth": 3}


def test_nulls_of_arrow_are_dropped_at_every_depth(tmp_path):
    def call(**arguments):
        called = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        return {
            "messages": [USER, {"role": "assistant", "content": None, "tool_calls": [called]}],
            "label": True,
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": arguments}}}],
        }

    records = [call(city="Rome"), call(town="Ulm", deep=[{"a": "1"}]), call(deep=[{"b": "2"}])]
    pyarrow.parquet.write_table(pa.Table.from_pylist(records), tmp_path / "log.parquet")
    for record, row in zip(records, read(tmp_path / "log.parquet"), strict=True):
        calls = record["messages"][1]["tool_calls"]
        assert row.completion == ({"role": "assistant", "content": "", "tool_calls": calls},)
        assert list(row.tools) == record["tools"]


@pytest.mark.parametrize("role", ["Assistant", "ASSISTANT", " assistant ", "GPT"])
def test_roles_are_read_in_any_case(tmp_path, role):
    turns = [{"role": "User", "content": "hi"}, {"role": role, "content": "hello"}]
    assert content(read(write(tmp_path / "log.jsonl", {"messages": turns, "label": True}))) == [CHAT_ROW]


def test_calls_of_the_older_api_and_contents_in_parts_are_read(tmp_path):
    turns = [
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "42"},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "hello"}]},
    ]
    [row] = read(write(tmp_path / "log.jsonl", {"messages": turns, "label": True}))
    called = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    assert row.prompt[1] == {"role": "assistant", "content": "", "tool_calls": [called]}
    assert row.prompt[2]["role"] == "tool"
    assert row.completion == ({**ANSWER, "reasoning_content": "hm"},)
