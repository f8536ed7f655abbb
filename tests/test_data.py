"""Rows become the tokens that a model would see and generate, once, and whole or not at all."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing

import kto_dist.data
from kto_dist.base.errors import UserError
from kto_dist.data.config import DataConfig
from kto_dist.data.examples import load
from kto_dist.data.processes import Chunking
from kto_dist.data.tokenise import prepare, tokenizer_fingerprint
from tests.tiny import CHAT_TEMPLATE, thumbs, tiny_tokenizer, write_jsonl

BOS, EOS = 0, 1
CHAT = {
    "prompt": [{"role": "user", "content": "hi"}],
    "completion": [{"role": "assistant", "content": "yes"}],
}
CHAT_TEXT = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
TEXT = {"prompt": "hi", "completion": "yes"}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def make(tmp_path, tokenizer):
    """Rows -> the training split (and the held-out one), through files."""

    def make(*rows, both=False, tokenizer=tokenizer, chunk=1000, **settings):
        labelled = [{"label": bool(number % 2), **row} for number, row in enumerate(rows)]
        log = write_jsonl(tmp_path / "log.jsonl", labelled)
        settings = {"cache": str(tmp_path / "cache"), "workers": 1, **settings}
        chunking = Chunking(rows=chunk, alone=1)
        folders = prepare(DataConfig(train=str(log), **settings), tokenizer, chunking=chunking)
        return [folder and load(folder) for folder in folders] if both else load(folders[0])

    return make


def changed(template: str = CHAT_TEMPLATE, post: str | None = None):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    if post:
        special = [("<|im_start|>", BOS), ("<|im_end|>", EOS)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=post, special_tokens=special)
    return tokenizer


def rows_of(examples) -> list[tuple]:
    """Everything about the rows, comparable."""
    return [
        (
            examples.prompt(row).tolist(),
            examples.completion(row).tolist(),
            bool(examples.desirable[row]),
            float(examples.weights[row]),
        )
        for row in range(len(examples))
    ]


# Cutting.


def test_a_long_row_keeps_its_prompts_end_and_its_completions_start(make, tokenizer):
    row = {"prompt": "a" * 10 + "bcd", "completion": "efgh" + "z" * 10}
    examples = make(row, row, max_length=7, max_prompt_length=3)
    assert tokenizer.decode(examples.prompt(0)) == "bcd"
    assert tokenizer.decode(examples.completion(0)) == "efgh"
    assert examples.report.undesirable.prompts_cut == examples.report.desirable.completions_cut == 1


def test_a_prompt_is_cut_only_as_far_as_the_completion_needs(make, tokenizer):
    examples = make({"prompt": "abcdefgh", "completion": "12"}, max_length=8, max_prompt_length=2)
    assert tokenizer.decode(examples.prompt(0)) == "defgh"
    assert examples.completion(0)[-1] == EOS
    assert examples.report.undesirable.completions_cut == 0


# Tokens.


def test_a_chat_prompt_has_the_tokens_that_the_model_sees_when_it_generates(make, tokenizer):
    seen = tokenizer.apply_chat_template(CHAT["prompt"], add_generation_prompt=True)["input_ids"]
    assert make(CHAT).prompt(0).tolist() == seen


def test_a_chat_completion_ends_with_the_last_eos(make, tokenizer):
    examples = make(CHAT)
    assert tokenizer.decode(examples.completion(0)) == "yes<|im_end|>"
    assert examples.report.shortened_headers == 0


def test_a_completion_whose_template_writes_no_eos_is_kept_whole(make, tokenizer):
    other = changed(CHAT_TEMPLATE.replace("<|im_end|>", "#"))
    assert tokenizer.decode(make(CHAT, tokenizer=other).completion(0)) == "yes#\n"


def test_text_is_not_templated_and_ends_with_one_eos(make, tokenizer):
    examples = make(TEXT, {**TEXT, "completion": "yes<|im_end|>"})
    for row in (0, 1):
        assert tokenizer.decode(examples.prompt(row)) == "hi"
        assert tokenizer.decode(examples.completion(row)) == "yes<|im_end|>"


@pytest.mark.parametrize("post", ["<|im_start|> $A", "<|im_start|> $A <|im_end|>"])
@pytest.mark.parametrize("prompt", ["hi", "<|im_start|>hi"])
def test_a_text_prompt_has_one_bos_and_no_eos(make, tokenizer, post, prompt):
    examples = make({**TEXT, "prompt": prompt}, tokenizer=changed(post=post))
    assert tokenizer.decode(examples.prompt(0)) == "<|im_start|>hi"
    assert tokenizer.decode(examples.completion(0)) == "yes<|im_end|>"


def test_chat_text_gets_no_second_bos(make, tokenizer):
    examples = make(CHAT, tokenizer=changed(post="<|im_start|> $A"))
    assert tokenizer.decode(examples.prompt(0)) == CHAT_TEXT
    assert tokenizer.decode(examples.completion(0)) == "yes<|im_end|>"


def test_a_thought_that_only_new_answers_open_is_left_out_of_the_prompt_and_counted(make, tokenizer):
    examples = make(CHAT, TEXT, tokenizer=changed(CHAT_TEMPLATE.replace("assistant\n", "assistant\n<think>")))
    assert tokenizer.decode(examples.prompt(0)) == CHAT_TEXT
    assert tokenizer.decode(examples.completion(0)) == "yes<|im_end|>"
    assert examples.report.shortened_headers == 1


def test_a_template_that_rewrites_earlier_turns_makes_a_bad_row(make):
    numbered = changed("{{ messages|length }}" + CHAT_TEMPLATE)
    with pytest.raises(UserError, match=r"log\.jsonl:2: .*earlier turns differently"):
        make(TEXT, CHAT, tokenizer=numbered)
    examples = make(TEXT, CHAT, tokenizer=numbered, on_bad_row="skip")
    assert len(examples) == 1
    assert examples.report.skipped == {"refused by the chat template": 1}


def test_what_the_template_refuses_is_said_with_its_place(make):
    picky = changed("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match=r"log\.jsonl:1: .*roles must alternate"):
        make(CHAT, tokenizer=picky)


def test_messages_without_a_chat_template_are_an_error_with_a_remedy(make):
    bare = tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(UserError, match="no chat template: use the instruction-tuned"):
        make(CHAT, tokenizer=bare, on_bad_row="skip")


def test_empty_completions_are_dropped_and_counted_by_class(make):
    silent = {"prompt": CHAT["prompt"], "completion": [{"role": "assistant", "content": " "}], "label": True}
    examples = make(TEXT, TEXT, {**TEXT, "completion": "", "label": False}, silent, {**silent, "label": True})
    assert len(examples) == 2
    assert (examples.report.undesirable.dropped, examples.report.desirable.dropped) == (1, 2)


# What is on disk.


def test_every_row_is_found_across_chunks(make, tokenizer):
    log = thumbs(100, 10)
    examples = make(*log, chunk=7)
    assert len(examples) == 100
    for i, row in enumerate(log):
        assert tokenizer.decode(examples.prompt(i)) == row["prompt"]
        assert tokenizer.decode(examples.completion(i)) == row["completion"] + "<|im_end|>"
        assert examples.desirable[i] == row["label"]
        assert (examples.prompt_lengths[i], examples.completion_lengths[i]) == (
            len(examples.prompt(i)),
            len(examples.completion(i)),
        )
    with pytest.raises(IndexError):
        examples.prompt(100)


def test_rows_share_a_group_exactly_when_their_prompts_are_equal(make):
    examples = make(*thumbs(60, 9), CHAT, {**CHAT, "completion": "no"})
    same_group = examples.prompt_group[:, None] == examples.prompt_group[None]
    prompts = [examples.prompt(i).tolist() for i in range(len(examples))]
    assert same_group.tolist() == [[one == other for other in prompts] for one in prompts]


def test_the_fingerprint_is_of_the_rows_and_not_of_the_files(make):
    log = thumbs(30, 6)
    first = make(*log).fingerprint
    assert make(*log, {"prompt": "hi", "completion": ""}, chunk=4).fingerprint == first
    for change in (
        {"weight": 2},
        {"label": not log[7]["label"]},
        {"completion": "other"},
        {"prompt": "other"},
    ):
        assert make(*log[:7], {**log[7], **change}, *log[8:]).fingerprint != first


def test_processes_make_the_rows_that_one_process_makes(make, tmp_path):
    log = thumbs(60, 12)
    alone = make(*log)
    together = make(*log, workers=2, chunk=10, cache=str(tmp_path / "other"))
    assert rows_of(together) == rows_of(alone)
    assert (together.fingerprint, together.report) == (alone.fingerprint, alone.report)


def test_a_script_without_a_main_guard_may_tokenise_in_processes(tmp_path):
    write_jsonl(tmp_path / "log.jsonl", thumbs(40, 8))
    (tmp_path / "script.py").write_text(
        "from kto_dist.data import config, examples, processes, tokenise\n"
        "from tests.tiny import tiny_tokenizer\n"
        "settings = config.DataConfig(train='log.jsonl', cache='cache', workers=2)\n"
        "chunking = processes.Chunking(rows=10, alone=1)\n"
        "folders = tokenise.prepare(settings, tiny_tokenizer(), chunking=chunking)\n"
        "print(len(examples.load(folders[0])))\n"
    )
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, [path or "." for path in sys.path]))}
    command = [sys.executable, "script.py"]
    ran = subprocess.run(command, cwd=tmp_path, env=paths, capture_output=True, text=True, timeout=250)
    assert ran.stdout == "40\n", ran.stderr


def test_the_answers_of_a_pair_know_each_other(tmp_path, tokenizer):
    rows = [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(20)]
    rows[3]["rejected"] = " "  # is dropped, so that its other half is alone
    pairs = write_jsonl(tmp_path / "pairs.jsonl", rows)
    singles = write_jsonl(tmp_path / "singles.jsonl", thumbs(9, 9))
    config = DataConfig(train=[str(singles), str(pairs), str(singles)], heldout=0.4, cache=str(tmp_path / "c"))
    seen = 0
    for folder in prepare(config, tokenizer, chunking=Chunking(rows=7)):
        examples = load(folder)
        for row, other in enumerate(examples.pair):
            answer = examples.completion_text(row)
            if other < 0:
                assert not answer.startswith(("good", "bad")) or answer == "good 3"
                continue
            seen += 1
            assert examples.pair[other] == row and examples.desirable[row] != examples.desirable[other]
            assert answer.split()[1] == examples.completion_text(other).split()[1]
            assert examples.prompt_text(row) == examples.prompt_text(other)
    assert seen == 38


def test_preparing_data_loads_neither_deepspeed_nor_mlflow():
    modules = [f"kto_dist.data.{path.stem}" for path in Path(kto_dist.data.__file__).parent.glob("[a-z]*.py")]
    code = f"import sys, {', '.join(modules)}\nprint({{'deepspeed', 'mlflow'}} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(modules) > 5 and result.stdout == "set()\n"


# The cache.


def test_what_is_tokenised_is_not_tokenised_again(tmp_path, tokenizer):
    log = write_jsonl(tmp_path / "log.jsonl", thumbs(20, 4))
    config = DataConfig(train=str(log), heldout=0.3, cache=str(tmp_path / "cache"), workers=1)
    known = tokenizer_fingerprint(tokenizer)
    before = prepare(config, tokenizer, known)
    # whoever has no tokenizer can only find what is there
    assert prepare(config, None, known) == before


def test_a_renamed_log_is_not_tokenised_again(tmp_path, tokenizer):
    paths = [write_jsonl(tmp_path / name, thumbs(20, 4)) for name in ("a.jsonl", "b.jsonl")]
    folders = [prepare(DataConfig(train=str(path), cache=str(tmp_path / "c")), tokenizer)[0] for path in paths]
    assert folders[0] == folders[1]


@pytest.mark.parametrize(
    "settings",
    [
        {"max_length": 1000, "max_prompt_length": 512},
        {"max_prompt_length": 3},
        {"on_bad_row": "skip"},
        {"heldout": 0.5},
        {"heldout": 0.4},
    ],
)
def test_settings_that_change_rows_change_the_folder(tmp_path, tokenizer, settings):
    path = write_jsonl(tmp_path / "log.jsonl", thumbs(40, 20))
    base = {"train": str(path), "cache": str(tmp_path / "cache"), "heldout": 0.3}
    first = prepare(DataConfig(**base), tokenizer)
    assert prepare(DataConfig(**{**base, **settings}), tokenizer) != first
    assert prepare(DataConfig(**base, workers=1), tokenizer) == first


def test_another_tokenizer_or_more_rows_change_the_folder(tmp_path, tokenizer):
    config = DataConfig(train=str(tmp_path / "log.jsonl"), cache=str(tmp_path / "cache"))
    write_jsonl(tmp_path / "log.jsonl", thumbs(20, 4))
    first = prepare(config, tokenizer)
    assert prepare(config, changed(post="<|im_start|> $A")) != first
    write_jsonl(tmp_path / "log.jsonl", thumbs(21, 4))
    assert prepare(config, tokenizer) != first


def test_a_damaged_folder_is_refused_and_made_again(make, tmp_path):
    log = thumbs(20, 4)
    whole = rows_of(make(*log))
    [file] = tmp_path.glob("cache/*/rows/rows.arrow")
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    with pytest.raises(UserError, match="missing or damaged"):
        load(file.parent)
    assert rows_of(make(*log)) == whole
    assert file.read_bytes() == content


@pytest.mark.parametrize("name", ("rows.arrow", "about.json"))
def test_a_flipped_bit_of_a_tokenised_folder_is_found_and_the_rows_made_again(make, tmp_path, tokenizer, name):
    log = thumbs(20, 4)
    whole = rows_of(make(*log))
    [folder] = tmp_path.glob("cache/*/rows")
    content = (folder / name).read_bytes()
    config = DataConfig(train=str(tmp_path / "log.jsonl"), cache=str(tmp_path / "cache"), workers=1)
    rng = random.Random(0)
    for place in [0, len(content) - 1, *(rng.randrange(len(content)) for _ in range(6))]:
        (folder / name).write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        said: list[str] = []
        assert rows_of(load(prepare(config, tokenizer, warn=said.append)[0])) == whole
        assert len(said) == 1 and f"{folder.parent} is damaged ({name} " in said[0] and "made anew" in said[0]
        assert (folder / name).read_bytes() == content
        said.clear()
        prepare(config, tokenizer, warn=said.append)
        assert said == []


def test_a_failed_preparation_leaves_nothing_behind(make, tmp_path):
    with pytest.raises(UserError, match=r"log\.jsonl:21"):
        make(*thumbs(20, 4), {**TEXT, "label": "maybe"}, chunk=5)
    assert list((tmp_path / "cache").iterdir()) == []


def test_of_two_that_prepare_the_same_the_slower_takes_what_is_there(make, tmp_path, monkeypatch):
    log, replace, turns = thumbs(20, 4), os.replace, []

    def other_is_faster(source, target):
        if not turns and os.path.isdir(source):
            turns.append("other")
            make(*log)
        replace(source, target)

    monkeypatch.setattr(os, "replace", other_is_faster)
    assert len(make(*log)) == 20
    assert [path.name for path in tmp_path.glob("cache/*/*")] == ["rows"]
    assert len(list((tmp_path / "cache").iterdir())) == 1


# Held-out rows.


def test_no_prompt_is_on_both_sides_and_no_row_is_lost(make):
    log = thumbs(300, 60)
    train, heldout = make(*log, heldout=0.3, both=True)
    assert not set(train.prompt_group) & set(heldout.prompt_group)
    assert sorted(map(str, rows_of(train) + rows_of(heldout))) == sorted(map(str, rows_of(make(*log))))
    assert train.report.rows_read == len(train) and heldout.report.rows_read == len(heldout)


def test_the_fraction_is_of_the_prompts(make):
    _, heldout = make(*thumbs(2000, 2000, seed=3), heldout=0.2, both=True)
    prompts = {row["prompt"] for row in thumbs(2000, 2000, seed=3)}
    held = {heldout.prompt_text(row) for row in range(len(heldout))}
    assert abs(len(held) / len(prompts) - 0.2) < 0.04


def test_a_row_stays_on_its_side_as_the_log_grows(make):
    def sides(log):
        return [{e.prompt_text(row) for row in range(len(e))} for e in make(*log, heldout=0.3, both=True)]

    log = thumbs(200, 50)
    train, heldout = sides(log[:100])
    more_train, more_heldout = sides([*thumbs(40, 40, seed=9), *log[::-1]])
    assert train <= more_train and heldout <= more_heldout


def test_a_held_out_file_has_its_own_folder(make, tmp_path):
    path = write_jsonl(tmp_path / "heldout.jsonl", thumbs(8, 4, seed=5))
    train, heldout = make(*thumbs(20, 4), heldout=str(path), both=True)
    assert (len(train), len(heldout)) == (20, 8)


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_a_fraction_that_empties_a_side_is_an_error(make, fraction):
    with pytest.raises(UserError, match=r"data\.heldout \(.*leaves (40 rows to train on and 0|0 .* and 40) held"):
        make(*thumbs(40, 4), heldout=fraction)


def test_a_log_of_empty_completions_is_an_error(make, tmp_path):
    with pytest.raises(UserError, match="no row has a completion to train on"):
        make({**TEXT, "completion": ""})
    assert list((tmp_path / "cache").iterdir()) == []


# The tokenizer's fingerprint.


def test_a_tokenizer_is_known_by_its_content(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "copy")
    copy = type(tokenizer).from_pretrained(tmp_path / "copy")
    copy(["a", "bcd"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(copy) == tokenizer_fingerprint(tokenizer)


def test_whatever_changes_tokens_changes_the_tokenizers_fingerprint(tokenizer):
    longer = tiny_tokenizer()
    longer.add_tokens(["word"])
    other_end = tiny_tokenizer()
    other_end.eos_token = "a"
    others = [changed(CHAT_TEMPLATE + " "), changed(post="<|im_start|> $A"), longer, other_end]
    assert len({tokenizer_fingerprint(one) for one in [tokenizer, *others]}) == 5
