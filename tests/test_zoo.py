"""The zoo tells right from wrong, refused and failed, and its table says which."""

import pytest
import zoo
import zoo_table
from zoo_models import FAMILIES, config_of

SETTINGS = {"dtypes": ["fp32"], "ways": list(zoo.WAYS)}
RIGHT = {"off": 3e-7}
STEPS = {"losses": [0.5, 0.4], "missing": [], "moved": 3, "tensors": 3, "warnings": 0}


def line(family, **changes):
    ways = {"padded": RIGHT, "packed": RIGHT, "shared": RIGHT, "training": STEPS} | changes
    return {"family": family} | {f"{way} fp32": found for way, found in ways.items()}


@pytest.mark.parametrize(
    ("changes", "group"),
    [
        ({}, "works"),
        ({"packed": {"refused": "it carries a state"}, "shared": {"refused": "no mask"}}, "works"),
        ({"training": {"refused": "no linear head"}}, "refused"),
        ({"shared": {"off": 0.01}}, "wrong"),
        ({"shared": {"off": float("nan")}}, "wrong"),
        ({"packed": {"failed": "IndexError: 3"}}, "fails"),
        ({"training": STEPS | {"missing": ["lm_head.weight"]}}, "fails"),
        ({"training": STEPS | {"moved": 0}}, "fails"),
    ],
)
def test_a_family_is_counted_by_the_worst_that_became_of_it(changes, group):
    assert zoo_table.group_of(line("one", **changes), ["fp32"]) == group


def test_the_table_names_every_family_once_with_what_was_said_of_it():
    lines = [
        line("good"),
        line("headless", padded={"refused": "XForCausalLM has no linear LM head"}, training={"refused": "no"}),
        {"family": "dead", "crashed": "took more than 180 seconds"},
        {"family": "part", "unmade": "TypeError: it needs an image"},
    ]
    content = {"settings": SETTINGS, "results": lines, "date": "2026-01-02", "versions": {"transformers": "5.0"}}
    table = zoo_table.zoo(content)
    assert "3 families, 2026-01-02: 1 works, 1 refused, 1 fails, 0 wrong." in table
    assert "| good | 3e-07 | 3e-07 | 3e-07 | yes |" in table
    assert "- `headless`: It has no linear LM head" in table
    assert "- `dead`: padded fp32: took more than 180 seconds" in table
    assert "- `part`: TypeError: it needs an image" in table
    assert "1 of 3 families of transformers 5.0" in zoo_table.zoo_short(content)


def test_a_family_in_miniature_is_scored_as_its_own_class_does():
    found = zoo.examine("qwen3", ["fp32"], ["padded", "packed", "shared"])
    assert all(found[f"{way} fp32"]["off"] < 1e-4 for way in ("padded", "packed", "shared"))


def test_every_kind_of_layer_of_a_hybrid_is_in_its_miniature():
    assert len(FAMILIES) > 150
    config = config_of("qwen3_next")
    assert set(config.layer_types) == {"linear_attention", "full_attention"} and config.hidden_size == 32
