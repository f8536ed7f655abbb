"""A setting is right, or an error says what it was, what the rule is and what to do."""

import re

import pytest
import yaml
from pydantic import ValidationError

from kto_dist.base.config import flatten, keys, resolve, sections, to_yaml
from kto_dist.base.elsewhere import ELSEWHERE
from kto_dist.base.errors import UserError
from kto_dist.model.config import read_deepspeed_json
from kto_dist.training.config import Config

LEAST = {"model": {"path": "some/model"}, "data": {"train": "log.jsonl"}}


@pytest.fixture
def file(tmp_path):
    """Text (or a tree) -> a config file."""

    def write(content):
        path = tmp_path / "config.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
        return path

    return write


def load(file, *overrides, tree=LEAST):
    return Config.load(file(tree), overrides)


def mistake(file, *overrides, tree=LEAST):
    with pytest.raises(UserError) as caught:
        Config.load(file(tree), overrides)
    return str(caught.value)


def test_a_model_and_a_log_are_all_that_is_needed(file):
    config = load(file)
    assert config.model.path == "some/model" and config.data.train == ("log.jsonl",)


WRONG = [
    # value, rule, remedy
    (["train.lr=0"], ["train.lr", "0", "greater than 0", "peak learning rate"]),
    (["train.lr=-1e-6"], ["train.lr", "-1e-06", "greater than 0", "peak learning rate"]),
    (["train.lr=.inf"], ["train.lr", "inf", "finite", "peak learning rate"]),
    (["train.lr=.nan"], ["train.lr", "nan", "finite", "peak learning rate"]),
    (["train.lr=fast"], ["train.lr", "'fast'", "valid number", "peak learning rate"]),
    (["objective.beta=0"], ["objective.beta", "0", "greater than 0", "log-ratio"]),
    (["objective.beta=-0.1"], ["objective.beta", "-0.1", "greater than 0", "log-ratio"]),
    (["objective.loss=dpo2"], ["objective.loss", "'dpo2'", "'kto', 'apo_zero_unpaired', 'dpo', 'ipo' or 'sft'"]),
    (
        ["objective.loss=dpo", "objective.desirable_weight=2", "objective.kl_pairs_per_step=4"],
        ["loss dpo does not use desirable_weight (2.0) and kl_pairs_per_step (4)", "leave them out", "label_smoothing"],
    ),
    (["objective.pairs=one"], ["loss kto does not use pairs (one)", "leave it out", "it uses beta"]),
    (["objective.loss=sft", "objective.beta=0.2"], ["loss sft does not use beta (0.2)", "it uses router_loss"]),
    (["objective.loss=dpo", "train.global_batch=7"], ["train.global_batch (7)", "even", "a pair", "never cut"]),
    (
        ["objective.loss=dpo", "train.tokens_per_microbatch=2047"],
        ["train.tokens_per_microbatch (2047)", "2 times data.max_length (1024)", "longest pair"],
    ),
    (["objective.desirable_weight=-1"], ["objective.desirable_weight", "-1", "greater than or equal to 0"]),
    (["train.seed=-1"], ["train.seed", "-1", "greater than or equal to 0"]),
    (["train.global_batch=many"], ["train.global_batch", "'many'", "valid integer", "rows"]),
    (["train.global_batch=2.5"], ["train.global_batch", "2.5", "integer", "rows"]),
    (["train.betas=[0.9]"], ["train.betas", "AdamW"]),
    (["train.betas=[0.9, 1.0]"], ["train.betas", "1.0", "AdamW"]),
    (["train.betas=[-0.1, 0.9]"], ["train.betas", "-0.1", "AdamW"]),
    (["train.output="], ["train.output", "valid string", "folder"]),
    (["train.output=' '"], ["train.output", "blank"]),
    (["data.train=[]"], ["data.train", "at least 1"]),
    (["model.attention=flash"], ["model.attention", "'flash'", "'sdpa'"]),
    (["train.global_batch=1"], ["train.global_batch (1)", "at least 2", "apo_zero_unpaired"]),
    (
        ["objective.kl_pairs_per_step=33"],
        ["objective.kl_pairs_per_step (33)", "at most train.global_batch (32)", "one partner"],
    ),
    (
        ["data.max_length=9000"],
        ["reference.tokens_per_batch (8192)", "at least data.max_length (9000)", "lower data.max_length"],
    ),
    (
        ["reference.tokens_per_batch=1000"],
        ["reference.tokens_per_batch (1000)", "at least data.max_length (1024)", "raise it"],
    ),
    (["data.max_length=1"], ["max_length (1)", "at least 2", "one completion token"]),
    (
        ["data.max_prompt_length=1024"],
        ["max_prompt_length (1024)", "below max_length (1024)", "no completion token"],
    ),
    (["data.heldout=0.0"], ["heldout (0.0)", "between 0 and 1"]),
    (["data.heldout=1.0"], ["heldout (1.0)", "between 0 and 1"]),
    (["data.heldout=5"], ["heldout (5", "between 0 and 1"]),
    (["deepspeed.offload_parameters=cpu"], ["offload_parameters (cpu)", "zero_stage 3, not 2"]),
    (
        ["deepspeed.offload_optimizer=cpu", "deepspeed.zero_stage=0"],
        ["offload_optimizer (cpu)", "1, 2 or 3, not 0"],
    ),
    (["deepspeed.offload_optimizer=nvme"], ["offload_optimizer (nvme)", "zero_stage 3, not 2"]),
    (["deepspeed.zero_stage=3", "deepspeed.offload_parameters=nvme"], ["nvme_path", "folder on a fast local disk"]),
    (["deepspeed.zero_stage=4"], ["deepspeed.zero_stage", "4", "0, 1, 2 or 3"]),
    (["reference.offload=nvme"], ["offload (nvme)", "nvme_path", "folder on a fast local disk"]),
    (["reference.offload=cpu", "reference.zero_stage=0"], ["offload (cpu)", "zero_stage 3 or auto"]),
    (["reference.gguf_file=a.gguf"], ["gguf_file (a.gguf)", "reference.path"]),
    (["checkpoint.keep=0"], ["checkpoint.keep", "0", "greater than 0", "newest checkpoints"]),
    (["health.patience=0"], ["health.patience", "0", "greater than 0", "consecutive steps"]),
]


def test_a_wrong_value_is_named_with_its_rule_and_a_remedy(file):
    for overrides, parts in WRONG:
        message = mistake(file, *overrides)
        assert all(part in message for part in parts), (overrides, message)


RIGHT = [
    ["objective.loss=apo_zero_unpaired", "train.global_batch=1"],
    ["objective.kl_pairs_per_step=32"],
    ["objective.loss=dpo", "objective.pairs=best", "objective.label_smoothing=0.1", "objective.sft_weight=1"],
    ["objective.loss=dpo", "train.tokens_per_microbatch=2048"],
    ["objective.loss=sft", "objective.beta=0.1"],
    ["data.max_prompt_length=1023"],
    ["data.max_length=8192"],
    ["data.heldout=0.1"],
    ["data.heldout=heldout.jsonl"],
    ["data.train=[a.jsonl, b.jsonl]"],
    ["objective.desirable_weight=0"],
    ["objective.desirable_weight=auto"],
    ["train.packing=true"],
    ["deepspeed.zero_stage=3", "deepspeed.offload_parameters=nvme", "deepspeed.nvme_path=/disk"],
    ["reference.offload=cpu"],
    ["tracking.register=name"],
    ["health.max_kl=null"],
]


def test_a_value_just_within_its_rule_is_taken(file):
    for overrides in RIGHT:
        load(file, *overrides)


UNKNOWN = [
    # a slip of the pen
    ("trian.lr=1", "unknown section trian: did you mean train?"),
    ("train.global_bach=8", "unknown key train.global_bach: did you mean train.global_batch?"),
    ("objective.betta=1", "unknown key objective.betta: did you mean objective.beta?"),
    ("tracking.registr=x", "unknown key tracking.registr: did you mean tracking.register?"),
    ("checkpoint.every_step=1", "unknown key checkpoint.every_step: did you mean checkpoint.every_steps?"),
    # another library's word, or one that stands in another section
    ("train.learning_rate=1", "unknown key train.learning_rate: did you mean train.lr?"),
    ("train.learning_rat=1", "unknown key train.learning_rat: did you mean train.lr?"),
    (
        "train.per_device_train_batch_size=4",
        "unknown key train.per_device_train_batch_size: did you mean train.global_batch or "
        "train.tokens_per_microbatch?",
    ),
    ("train.beta=1", "unknown key train.beta: did you mean objective.beta? known: output, global_batch"),
    ("objective.max_length=1", "unknown key objective.max_length: did you mean data.max_length? known: loss, beta"),
    ("data.path=x", "unknown key data.path: did you mean model.path or reference.path? known: train, heldout"),
    ("learning_rate.x=1", "unknown section learning_rate: did you mean train.lr? known: model, reference"),
    # nothing like it
    ("train.qqq=1", "unknown key train.qqq: known: output, global_batch"),
]


def test_a_mistake_of_the_command_line_is_not_blamed_on_the_file(file):
    for overrides in [overrides for overrides, _ in WRONG] + [[override] for override, _ in UNKNOWN]:
        for line in mistake(file, *overrides).splitlines():
            assert line.startswith("on the command line: "), (overrides, line)


def test_a_mistake_of_the_file_is_not_blamed_on_the_command_line(file):
    for section, key, value in (
        ("train", "lr", 0),
        ("train", "lrr", 1),
        ("train", "global_batch", 1),
        ("data", "max_length", 1),
        ("trian", "lr", 1),
    ):
        tree = {**LEAST, section: {**LEAST.get(section, {}), key: value}}
        for line in mistake(file, "kto.beta=0.2", "train.seed=1", tree=tree).splitlines():
            assert "config.yaml: " in line and "command line" not in line, line


def test_an_unknown_name_is_an_error_that_says_what_it_may_have_meant(file):
    for override, said in UNKNOWN:
        assert said in mistake(file, override)


def test_another_librarys_flat_settings_are_told_where_they_stand_here(file):
    message = mistake(file, tree={"learning_rate": 1e-6, "beta": 0.1, "eval_steps": 9, "qqq": 1, **LEAST})
    assert "must hold sections" in message and "qqq" not in message
    for said in ("learning_rate is train.lr", "beta is objective.beta", "eval_steps is evaluate.every_steps"):
        assert said in message


def test_every_hint_at_a_setting_names_one_that_there_is():
    every = {f"{name}.{key}" for name, section in sections(Config).items() for key in keys(section)}
    words = {name.partition(".")[2] for name in every}
    for word, meant in ELSEWHERE.items():
        assert set(meant) <= every and word not in words, word


def test_the_section_of_the_loss_is_read_under_its_older_name(file):
    tree = {**LEAST, "kto": {"beta": 0.3, "desirable_weight": 1.2}}
    older = Config.load(file(tree), ["kto.beta=0.4", "objective.undesirable_weight=1.1"])
    newer = Config.load(file({**LEAST, "objective": tree["kto"]}), ["objective.beta=0.4", "kto.undesirable_weight=1.1"])
    assert older == newer == Config(**LEAST, kto=newer.objective.model_dump())
    assert older.objective.beta == 0.4
    with pytest.raises(UserError, match="kto is the older name of objective, and both are there"):
        Config.load(file({**tree, "objective": {"beta": 0.3}}))


def test_all_mistakes_are_reported_at_once(file):
    message = mistake(file, "train.lr=0", "objective.beta=0", "model.nmae=x")
    assert all(name in message for name in ("train.lr", "objective.beta", "model.nmae"))


@pytest.mark.parametrize("name", ("model.path", "data.train"))
def test_what_is_required_is_named_with_its_meaning(file, name):
    section, key = name.split(".")
    message = mistake(file, tree={**LEAST, section: {}})
    meaning = type(getattr(Config.build(LEAST), section)).model_fields[key].description
    assert f"{name} is required" in message and meaning in message


def test_a_missing_section_names_what_it_must_hold(file):
    assert "model.path" in mistake(file, tree={"data": LEAST["data"]})


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.yaml does not exist: give"):
        Config.load(tmp_path / "nowhere.yaml")


def test_a_folder_is_no_config(tmp_path):
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        Config.load(tmp_path)


@pytest.mark.parametrize("text", ("train: [", "train:\n\tlr: 1", "a: b: c"))
def test_broken_yaml_is_named_with_its_line(file, text):
    with pytest.raises(UserError, match="(?s)config.yaml is not readable as YAML.*line"):
        Config.load(file(text))


@pytest.mark.parametrize("text", ("just words", "- a\n- b", "train: 5"))
def test_yaml_without_sections_shows_what_they_look_like(file, text):
    with pytest.raises(UserError, match="must hold sections with keys below them"):
        Config.load(file(text))


def test_a_key_that_is_written_twice_is_an_error(file):
    with pytest.raises(UserError, match="train"):
        Config.load(file("model: {path: m}\ndata: {train: d}\ntrain: {lr: 1.0e-6}\ntrain: {seed: 3}\n"))


@pytest.mark.parametrize("override", ("train.lr", "lr=1", ".lr=1", "train.=1", "=1", ""))
def test_a_malformed_override_shows_the_right_form(file, override):
    message = mistake(file, override)
    assert repr(override) in message and "section.key=value" in message


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("max_steps=3", "train.max_steps=3"),
        ("max_step=3", "train.max_steps=3"),
        ("learning_rate=1e-6", "train.lr=1e-6"),
        ("beta=0.2", "objective.beta=0.2"),
        ("path=x", "model.path=x or reference.path=x"),
    ],
)
def test_an_override_without_its_section_is_told_which_it_may_be(file, override, meant):
    assert mistake(file, override).endswith(f": did you mean {meant}?")


def test_an_override_without_a_section_that_is_like_nothing_is_told_the_form_alone(file):
    assert mistake(file, "qqq=1").endswith("for example train.lr=1e-6")


@pytest.mark.parametrize("name", ("data.train", "train.lr", "kto.beta"))
def test_the_form_of_the_command_line_in_a_file_is_told_how_files_write_it(file, name):
    section, key = name.split(".")
    for value in (1e-6, {"app": "log.jsonl"}):
        message = mistake(file, tree={**LEAST, name: value})
        assert f"config.yaml: {name} at the top" in message and f"write `{section}:`, and `{key}: ...` below" in message


@pytest.mark.parametrize("override", ("train.betas=[0.9", "train.output=a: b: c", "model.path=*name", "model.path=@x"))
def test_an_override_that_is_no_yaml_is_named(file, override):
    assert override in mistake(file, override)


@pytest.mark.parametrize(("text", "value"), [("1e-6", 1e-6), ("5E-7", 5e-7), ("1e0", 1.0), ("1.5e-6", 1.5e-6)])
@pytest.mark.parametrize("way", ("file", "override"))
def test_an_exponent_without_a_dot_is_a_number(file, text, value, way):
    least = "model: {path: m}\ndata: {train: d}\n"
    if way == "file":
        config = Config.load(file(f"{least}train: {{lr: {text}}}\n"))
    else:
        config = Config.load(file(least), [f"train.lr={text}"])
    assert config.train.lr == value


def test_a_heldout_fraction_with_an_exponent_is_no_path(file):
    assert load(file, "data.heldout=1e-2").data.heldout == 0.01


def test_overrides_win_over_the_file_and_the_last_over_the_others(file):
    tree = {**LEAST, "train": {"lr": 1e-3, "seed": 4}}
    config = load(file, "train.lr=2e-3", "train.lr=3e-3", tree=tree)
    assert (config.train.lr, config.train.seed) == (3e-3, 4)


def test_every_setting_has_an_origin(file):
    path = file({**LEAST, "train": {"lr": 1e-3, "seed": 4}, "tracking": {"register": "name"}})
    config, origin = resolve(path, ["train.lr=2e-3", "objective.beta=0.2"], kind=Config)
    assert origin["train.lr"] == origin["objective.beta"] == "override"
    assert origin["train.seed"] == origin["model.path"] == origin["tracking.register"] == str(path)
    assert origin["train.clip"] == "default"
    assert {f"{section}.{key}" for section, key, _ in flatten(config)} == set(origin)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [
            "train.lr=1e-7",
            "train.eps=1e-12",
            "train.betas=[0.8, 0.95]",
            "train.packing=true",
            "objective.desirable_weight=1.5",
        ],
        ["data.train=[a, b]", "data.heldout=0.25", "tracking.register=name", "health.max_kl=null", "train.max_steps=7"],
    ],
    ids=("defaults", "numbers", "others"),
)
def test_a_config_survives_being_written_and_read_again(file, overrides):
    config = load(file, *overrides)
    assert Config.load(file(to_yaml(config))) == config


def test_a_config_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        Config.build(LEAST).train.lr = 1.0


def test_every_setting_says_what_it_is():
    for name, section in sections(Config).items():
        for key, meaning in keys(section).items():
            assert meaning, f"{name}.{key}"


def test_the_prompt_of_an_over_long_row_keeps_half_unless_set(file):
    assert load(file, "data.max_length=101").data.prompt_limit == 50
    assert load(file, "data.max_length=101", "data.max_prompt_length=70").data.prompt_limit == 70


@pytest.mark.parametrize(
    ("content", "rule"), [(None, "does not exist"), ("{", "not readable as JSON"), ("[1]", "JSON object")]
)
def test_unreadable_deepspeed_options_are_named_with_the_rule(tmp_path, content, rule):
    path = tmp_path / "options.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=f"deepspeed.config .*options.json.*{rule}"):
        read_deepspeed_json(str(path))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr=true", "train: lr (true) must be a number: peak learning rate"),
        ("train.betas=[0.9, false]", "betas ([0.9, false]) must be a number"),
        ("evaluate.every_steps=no", "every_steps (false) must be a number"),
        ('train.output="a\\0b"', "holds a NUL character"),
        (f"train.output={'a' * 300}", "train.output: must have no part of more than 255 bytes"),
        (f"data.train=[x, /data/{'a' * 300}]", "data.train: must have no part of more than 255 bytes"),
    ],
)
def test_what_is_no_number_or_no_name_is_the_users_mistake(tmp_path, override, message):
    path = tmp_path / "c.yaml"
    path.write_text("model: {path: x}\ndata: {train: y}\n")
    with pytest.raises(UserError) as refusal:
        Config.load(path, [override])
    assert message in str(refusal.value)


def test_a_config_whose_name_no_file_can_have_is_a_mistake():
    with pytest.raises(UserError, match="cannot be read: .*too long"):
        Config.load("a" * 300)
