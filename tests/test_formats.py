"""Logs in every layout become the same rows, and whatever is wrong with one is said with its place."""

import csv
import itertools
import json

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from thumbs_logs import ANSWER, CHAT_ROW, GOOD, TEXT_ROW, USER, WORSE, content, read, write

from kto_dist.base.class_labels import features_beside, namers_of
from kto_dist.base.errors import UserError
from kto_dist.data.formats import BadRows, read_rows
from kto_dist.data.sources import find_sources

CHAT_PAIR = [CHAT_ROW, ((USER,), (WORSE,), False, 1.0)]
TEXT_PAIR = [TEXT_ROW, ("hi", "what", False, 1.0)]
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
LAYOUTS = {
    "TRL, text": (GOOD, [TEXT_ROW]),
    "TRL, messages": ({"prompt": [USER], "completion": [ANSWER], "label": True}, [CHAT_ROW]),
    "HALOs, binary": (
        {
            "prompt_id": 7,
            "prompt": [USER],
            "output": [ANSWER],
            "label": 1,
            "reward": 0.8,
            "type": "binary_feedback",
        },
        [CHAT_ROW],
    ),
    "HALOs, text output": ({"prompt": [USER], "output": "hello", "label": 1}, [CHAT_ROW]),
    "HALOs, pairwise": (
        {"prompt": [USER], "output_A": [WORSE], "output_B": [ANSWER], "label": 0, "reward_A": 0.1},
        [((USER,), (WORSE,), False, 1.0), CHAT_ROW],
    ),
    "NeMo-Aligner": ({"prompt": "hi", "response": "hello", "preference": "chosen"}, [TEXT_ROW]),
    "LLaMA-Factory": ({"messages": [USER, ANSWER], "label": True}, [CHAT_ROW]),
    "LLaMA-Factory, ShareGPT": ({"conversations": SHAREGPT, "kto_tag": True}, [CHAT_ROW]),
    "LLaMA-Factory, alpaca": (
        {
            "instruction": "say",
            "input": "hi",
            "output": "hello",
            "kto_tag": False,
            "system": "be kind",
            "history": [["a", "b"]],
        },
        [
            (
                (
                    {"role": "system", "content": "be kind"},
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                    {"role": "user", "content": "say\nhi"},
                ),
                (ANSWER,),
                False,
                1.0,
            )
        ],
    ),
    "pair, text": ({"prompt": "hi", "chosen": "hello", "rejected": "what"}, TEXT_PAIR),
    "pair, messages": ({"prompt": [USER], "chosen": [ANSWER], "rejected": [WORSE]}, CHAT_PAIR),
    "pair, ShareGPT": (
        {"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": {"from": "gpt", "value": "what"}},
        CHAT_PAIR,
    ),
    "pair, whole conversations": ({"chosen": [USER, ANSWER], "rejected": [USER, WORSE]}, CHAT_PAIR),
    "pair, whole conversations and the prompt": (
        {"prompt": "hi", "chosen": [USER, ANSWER], "rejected": [USER, WORSE], "messages": [USER, ANSWER]},
        CHAT_PAIR,
    ),
    "pair, equal conversations": (
        {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]},
        [CHAT_ROW, ((USER,), (ANSWER,), False, 1.0)],
    ),
    "pair, HH text": (
        {"chosen": "\n\nHuman: hi\n\nAssistant: I can", "rejected": "\n\nHuman: hi\n\nAssistant: I cannot"},
        [
            ("\n\nHuman: hi\n\nAssistant:", " I can", True, 1.0),
            ("\n\nHuman: hi\n\nAssistant:", " I cannot", False, 1.0),
        ],
    ),
}


@pytest.mark.parametrize("record, rows", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_becomes_the_same_rows(tmp_path, record, rows):
    assert content(read(write(tmp_path / "log.jsonl", record))) == rows


@pytest.mark.parametrize("record, rows", LAYOUTS.values(), ids=LAYOUTS)
def test_parquet_gives_the_rows_that_json_lines_give(tmp_path, record, rows):
    pyarrow.parquet.write_table(pa.Table.from_pylist([record]), tmp_path / "log.parquet")
    assert content(read(tmp_path / "log.parquet")) == rows


@pytest.mark.parametrize(
    "label, desirable",
    [
        *(
            (word, True)
            for word in (True, 1, 1.0, "1", "+1", "chosen", "UP", "Thumbs up", "thumbs-up", "good", " Like ")
        ),
        *((word, True) for word in ("desirable", "TRUE", "👍", "👍🏽")),
        *((word, False) for word in (False, 0, -1, -1.0, "0", "-1", "Rejected", "down", "THUMBS_DOWN", "bad")),
        *((word, False) for word in ("dislike", "undesirable", "false", "👎", "👎🏿")),
    ],
)
def test_label_words_mean_what_people_mean(tmp_path, label, desirable):
    [row] = read(write(tmp_path / "log.jsonl", {**GOOD, "label": label}))
    assert row.desirable is desirable


@pytest.mark.parametrize(
    "record, reason, quoted",
    [
        ("{broken", "broken JSON", "{broken"),
        ("[1, 2", "broken JSON", "[1, 2"),
        ("17", "broken JSON", "17"),
        ({"prompt": "hi", "label": True}, "missing field", "completion"),
        ({**GOOD, "completion": None}, "missing field", "completion"),
        ({**GOOD, "completion": 5}, "wrong type", "5"),
        ({**GOOD, "completion": "\ud83d"}, "wrong type", "surrogate"),
        ({**GOOD, "prompt": []}, "wrong type", "[]"),
        ({**GOOD, "label": "maybe"}, "unknown label", "'maybe'"),
        ({**GOOD, "label": 2}, "unknown label", "2"),
        ({**GOOD, "label": None}, "missing field", "label"),
        ({**GOOD, "prompt": " "}, "empty prompt", "' '"),
        ({**GOOD, "prompt": [{"role": "user", "content": ""}]}, "empty prompt", "prompt"),
        ({**GOOD, "prompt": [{"role": "wizard", "content": "hi"}]}, "unknown role", "'wizard'"),
        ({**GOOD, "prompt": [{"content": "hi"}]}, "wrong type", "role"),
        ({**GOOD, "prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "wrong type", "image"),
        ({**GOOD, "prompt": [USER, ANSWER], "completion": [ANSWER]}, "wrong turn", "hello"),
        ({**GOOD, "completion": [ANSWER, USER]}, "wrong turn", "hi"),
        ({**GOOD, "weight": -1}, "bad weight", "-1"),
        ({**GOOD, "weight": "heavy"}, "bad weight", "'heavy'"),
        ('{"prompt": "hi", "completion": "hello", "label": true, "weight": NaN}', "bad weight", "nan"),
    ],
)
def test_a_bad_row_is_named_or_counted(tmp_path, record, reason, quoted):
    path = write(tmp_path / "log.jsonl", GOOD, "", record, GOOD)
    with pytest.raises(UserError) as error:
        read(path)
    assert f"{path}:3: " in str(error.value)
    assert quoted in str(error.value)
    assert "skip" in str(error.value)

    bad = BadRows()
    rows = read(path, on_bad_row="skip", bad=bad)
    assert [row.source for row in rows] == [f"{path}:1", f"{path}:4"]
    assert bad.counts == {reason: 1}
    assert len(bad.examples) == 1 and f"{path}:3" in bad.examples[0]


@pytest.mark.parametrize("turns", [[USER], [USER, ANSWER, USER]])
def test_a_conversation_must_end_with_the_rated_answer(tmp_path, turns):
    path = write(tmp_path / "log.jsonl", {"messages": turns, "label": True})
    with pytest.raises(UserError, match=r"log\.jsonl:1: messages: the last turn .*hi.* must be the assistant's"):
        read(path)


def test_unknown_columns_are_listed_with_the_layouts_that_are_known(tmp_path):
    path = write(tmp_path / "log.jsonl", {"question": "hi", "answer": "hello"})
    with pytest.raises(UserError, match=r"question, answer.*prompt, completion and label"):
        read(path)


def test_a_missing_label_column_is_said_to_be_missing(tmp_path):
    path = write(tmp_path / "log.jsonl", {"prompt": "hi", "completion": "hello"})
    with pytest.raises(UserError, match="lack a label column"):
        read(path)


def test_a_long_value_is_shortened_in_the_message(tmp_path):
    path = write(tmp_path / "log.jsonl", {**GOOD, "label": "x" * 5000})
    with pytest.raises(UserError) as error:
        read(path)
    assert len(str(error.value)) < 1000


def test_an_empty_completion_is_a_row(tmp_path):
    [row] = read(write(tmp_path / "log.jsonl", {**GOOD, "completion": ""}))
    assert row.completion == ""


def test_a_row_weight_is_kept_and_null_counts_as_one(tmp_path):
    path = write(tmp_path / "log.jsonl", {**GOOD, "weight": 0.25}, {**GOOD, "weight": None}, {**GOOD, "weight": 0})
    assert [row.weight for row in read(path)] == [0.25, 1.0, 0.0]


def test_both_rows_of_a_pair_have_its_weight_and_place(tmp_path):
    path = write(tmp_path / "log.jsonl", {"prompt": "hi", "chosen": "a", "rejected": "b", "weight": 3})
    assert [(row.weight, row.source) for row in read(path)] == [(3.0, f"{path}:1")] * 2


def test_tool_and_system_turns_stay_in_the_prompt_and_tool_calls_in_their_message(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    turns = [
        {"role": "system", "content": "s"},
        USER,
        call,
        {"role": "tool", "content": "42", "name": None},
        ANSWER,
    ]
    [row] = read(write(tmp_path / "log.jsonl", {"messages": turns, "label": 1}))
    assert row.prompt == (turns[0], USER, {**call, "content": ""}, {"role": "tool", "content": "42"})
    assert row.completion == (ANSWER,)


def test_text_parts_of_a_message_are_joined(tmp_path):
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    [row] = read(write(tmp_path / "log.jsonl", {**GOOD, "prompt": [{"role": "user", "content": parts}]}))
    assert row.prompt == (USER,)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@given(prompt=TEXT, completion=TEXT, label=st.booleans())
def test_text_survives_the_file_exactly(tmp_path_factory, prompt, completion, label):
    record = {"prompt": prompt, "completion": completion, "label": label}
    path = write(tmp_path_factory.mktemp("text") / "log.jsonl", json.dumps(record, ensure_ascii=False))
    assert content(read(path)) == [(prompt, completion, label, 1.0)]


def test_files_of_different_layouts_mix(tmp_path):
    first = write(tmp_path / "a.jsonl", GOOD)
    second = write(tmp_path / "b.jsonl", {"messages": [USER, ANSWER], "label": "down"})
    assert content(read(first, second)) == [TEXT_ROW, ((USER,), (ANSWER,), False, 1.0)]


def test_skipping_never_skips_a_whole_file(tmp_path):
    path = write(tmp_path / "log.jsonl", {"text": "a"}, {"text": "b"})
    with pytest.raises(UserError, match=r"not one of its 2 rows could be read; the first: .*log.jsonl:1"):
        read(path, on_bad_row="skip")


def test_rows_stream(tmp_path):
    path = write(tmp_path / "log.jsonl", GOOD, "{broken")
    rows = read_rows(find_sources([path]), on_bad_row="error", bad=BadRows())
    assert content(list(itertools.islice(rows, 1))) == [TEXT_ROW]


# Labels of the datasets library.


@pytest.mark.parametrize("names, first", [(["thumbs_up", "thumbs_down"], True), (["thumbs_down", "thumbs_up"], False)])
def test_a_class_label_means_its_name_and_not_its_number(tmp_path, names, first):
    kinds = {
        "prompt": datasets.Value("string"),
        "completion": datasets.Value("string"),
        "label": datasets.ClassLabel(names=names),
    }
    made = datasets.Dataset.from_list([{**GOOD, "label": number} for number in (0, 1, 0)], datasets.Features(kinds))
    made.to_parquet(tmp_path / "log.parquet")
    made.save_to_disk(tmp_path / "folder")
    for path in (tmp_path / "log.parquet", tmp_path / "folder"):
        assert [row.desirable for row in read(path)] == [first, not first, first]


def test_class_labels_within_messages_are_names_too(tmp_path):
    turn = {"role": datasets.ClassLabel(names=["user", "assistant"]), "content": datasets.Value("string")}
    features = datasets.Features({"messages": datasets.List(turn), "label": datasets.Value("bool")})
    turns = [{"role": 0, "content": "hi"}, {"role": 1, "content": "hello"}]
    made = datasets.Dataset.from_list([{"messages": turns, "label": True}], features)
    made.to_parquet(tmp_path / "log.parquet")
    assert content(read(tmp_path / "log.parquet")) == [CHAT_ROW]


README = """---
license: mit
dataset_info:
  features:
  - name: prompt
    dtype: string
  - name: label
    dtype:
      class_label:
        names:
          '0': thumbs_up
          '1': thumbs_down
  - name: votes
    list:
    - name: of
      sequence:
        class_label:
          names: [yes, no]
---
# Thumbs
"""


@pytest.mark.parametrize("place", ["log", "data/log"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_names_of_class_labels_in_a_datasets_readme_are_read(tmp_path, kind, place):
    (tmp_path / "README.md").write_text(README)
    path = tmp_path / f"{place}.{kind}"
    path.parent.mkdir(exist_ok=True)
    numbers = [{**GOOD, "label": number} for number in (0, 1)]
    if kind == "csv":
        path.write_text("prompt,completion,label\nhi,hello,0\nhi,hello,1\n")
    elif kind == "jsonl":
        write(path, *numbers, {**GOOD, "label": "thumbs_down"})
    else:
        pyarrow.parquet.write_table(pa.Table.from_pylist(numbers), path)
    [source] = find_sources([str(path)])
    before, said = source.digest(), [row.desirable for row in read(path)]
    assert said == [True, False, *[False] * (kind == "jsonl")]
    # other names are other data, and a file of earlier days has its names in JSON
    (tmp_path / "README.md").write_text("# Thumbs\n\n---\ndataset_info: none\n---\n")
    infos = {"default": {"features": {"label": {"names": ["thumbs_down", "thumbs_up"], "_type": "ClassLabel"}}}}
    (tmp_path / "dataset_infos.json").write_text(json.dumps(infos))
    assert [row.desirable for row in read(path)][:2] == [False, True] and source.digest() != before
    write(tmp_path / "other.jsonl", {**GOOD, "label": 2})
    with pytest.raises(UserError, match=r"label \(2\) is a number beyond its labels' names"):
        read(tmp_path / "other.jsonl")


def test_minus_one_is_no_label_and_no_number_beyond_the_names(tmp_path):
    """`datasets` writes it where a row has none."""
    (tmp_path / "README.md").write_text(README)
    log = write(tmp_path / "log.jsonl", GOOD | {"label": 0}, GOOD | {"label": -1})
    named = namers_of(features_beside(log))["label"]
    assert named(-1) is None and named("-1") is None and named(1) == "thumbs_down"
    with pytest.raises(IndexError):
        named(-2)
    with pytest.raises(UserError, match="label") as caught:
        read(log)
    assert "beyond" not in str(caught.value)


def test_parts_of_a_dataset_with_other_names_are_told_apart_by_their_folders(tmp_path):
    names = {"one": ["thumbs_down", "thumbs_up"], "two": ["thumbs_up", "thumbs_down"]}
    parts = [
        {"config_name": part, "features": [{"name": "label", "dtype": {"class_label": {"names": said}}}]}
        for part, said in names.items()
    ]
    (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump({'dataset_info': parts})}---\n")
    for name, first in (("one", False), ("two", True)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "log.jsonl", {**GOOD, "label": 0})
        assert [row.desirable for row in read(tmp_path / name / "log.jsonl")] == [first]
    write(tmp_path / "log.jsonl", {**GOOD, "label": 0})
    with pytest.raises(UserError, match=r"other names for the numbers in label, .* move it there \(two/\)"):
        read(tmp_path / "log.jsonl")


# CSV, and lines that mean harm.


def test_csv_gives_the_rows_that_json_lines_give(tmp_path):
    text = 'prompt,completion,label,weight,tools\nhi,hello,👍,0.5,\n"a, ""b""\nc",hello,-1,,\n'
    for name, written in (
        ("a.csv", text),
        ("b.tsv", text.replace(",", "\t").replace("a\t", "a,")),
        ("c.csv", "\ufeff" + text),
    ):
        (tmp_path / name).write_text(written, encoding="utf-8", newline="")
        rows = read(tmp_path / name)
        assert content(rows) == [("hi", "hello", True, 0.5), ('a, "b"\nc', "hello", False, 1.0)]
        assert [row.source for row in rows] == [f"{tmp_path / name}:2", f"{tmp_path / name}:3"]


def test_csv_holds_messages_as_text_and_a_folder_of_it_is_read(tmp_path):
    with open(tmp_path / "log.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerows([["messages", "label"], [json.dumps([USER, ANSWER]), "True"], [str([USER, ANSWER]), "1.0"]])
    assert content(read(tmp_path)) == [CHAT_ROW] * 2


def test_broken_lines_of_csv_are_bad_rows_and_an_open_quotation_mark_is_an_error(tmp_path):
    (tmp_path / "log.csv").write_bytes(b'prompt,completion,label\nhi,hello\nhi,\xff,1\n"a"b,c,1\nhi,hello,1\n')
    bad = BadRows()
    assert content(read(tmp_path / "log.csv", on_bad_row="skip", bad=bad)) == [TEXT_ROW]
    assert bad.counts == {"broken CSV": 2, "wrong type": 1}
    (tmp_path / "open.csv").write_text('prompt,completion,label\nhi,hello,1\n"hi,hello,1\nhi,hello,1\n')
    with pytest.raises(UserError, match=r"open\.csv:3: a quotation mark is not closed"):
        read(tmp_path / "open.csv", on_bad_row="skip")


HOSTILE = {
    "a long integer": '{"prompt": "hi", "completion": "hello", "label": ' + "1" * 5000 + "}",
    "many brackets": "[" * 100_000,
    "many objects": '{"a":' * 100_000,
    "deep messages": json.dumps(
        {"messages": [USER, {**ANSWER, "tool_calls": [json.loads("[" * 80 + "]" * 80)]}], "label": 1}
    ),
    "deep arguments": '{"messages": ['
    + json.dumps(USER)
    + ', {"role": "assistant", "content": "a", "x": '
    + "[" * 900
    + "]" * 900
    + '}], "label": 1}',
    "deep brackets in text": json.dumps({**GOOD, "tools": "[" * 100_000, "prompt": [USER]}),
    "half of a pair in a call": '{"messages": ['
    + json.dumps(USER)
    + ', {"role": "assistant", "content": "a", "name": "\\ud83d"}], "label": 1}',
    "no UTF-8": b"\xff\xfe\x00",
    "no number": '{"prompt": "hi", "completion": "hello", "label": NaN}',
    "a list of lists": "[[1]]",
}


@pytest.mark.parametrize("line", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("first", [True, False])
def test_a_line_that_means_harm_is_one_bad_row(tmp_path, line, first):
    path, good = tmp_path / "log.jsonl", json.dumps(GOOD).encode()
    lines = [line if isinstance(line, bytes) else line.encode(), good]
    path.write_bytes(b"\n".join(lines if first else lines[::-1]) + b"\n")
    bad = BadRows()
    assert content(read(path, on_bad_row="skip", bad=bad)) == [TEXT_ROW]
    assert bad.counts.total() == 1
    with pytest.raises(UserError, match=rf"log\.jsonl:{1 if first else 2}: "):
        read(path)
