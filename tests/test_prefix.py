"""A prompt scored once for all of its completions: the same values, and refused where it would be wrong."""

import re

import numpy as np
import pytest
import torch
import transformers
from families import neighbourly
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_llama
from transformers import LlamaConfig, MambaConfig, MambaForCausalLM

from kto_dist.base.errors import UserError
from kto_dist.data.batch import Cutting, collate
from kto_dist.model import causal_lm
from kto_dist.model.causal_lm import ScoringModel, completion_logps
from kto_dist.model.checks import rounding_of
from kto_dist.reference.config import ReferenceConfig
from kto_dist.reference.prefix import can_share, cost, grow, lay_out, sharing_is_exact
from kto_dist.reference.scoring import PassSettings, Work
from kto_dist.reference.setup import may_share

CPU = torch.device("cpu")
SMALL = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
FAMILIES = {
    "llama": ("Llama", SMALL),
    "qwen3": ("Qwen3", {**SMALL, "head_dim": 8}),
    "gpt_neox": ("GPTNeoX", SMALL),
    # positions are learned, and looked up by position id
    "gpt2": (
        "GPT2",
        {
            "bos_token_id": 0,
            "eos_token_id": 1,
            "vocab_size": 60,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "initializer_range": 0.3,
        },
    ),
}


def family(name: str) -> ScoringModel:
    kind, settings_ = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**settings_)
    config._attn_implementation = "sdpa"
    return ScoringModel(transformers.AutoModelForCausalLM.from_config(config).eval())


def some_trees(seed: int = 0, vocabulary: int = 60) -> list[tuple[np.ndarray, list[np.ndarray]]]:
    rng = np.random.default_rng(seed)

    def ids(count):
        return rng.integers(vocabulary, size=count)

    return [(ids(p), [ids(c) for c in rng.integers(1, 12, size=k)]) for p, k in ((7, 4), (1, 3), (5, 1), (12, 2))]


def logps_alone(model: ScoringModel, trees) -> torch.Tensor:
    pairs = [(prompt, completion) for prompt, completions in trees for completion in completions]
    batches = [collate([pair], np.zeros(1), packed=False) for pair in pairs]
    with torch.no_grad():
        return torch.cat([completion_logps(model, batch, model.transform, 2**28) for batch in batches])


@pytest.mark.parametrize("name", FAMILIES)
def test_completions_of_a_tree_score_as_they_do_alone(name):
    model, trees = family(name), some_trees()
    batch = lay_out(trees, np.arange(10))
    with torch.no_grad():
        together = completion_logps(model, batch, model.transform, 2**28)
    assert torch.allclose(together, logps_alone(model, trees), rtol=1e-5, atol=1e-4)
    assert batch.tokens == sum(len(p) + sum(map(len, cs)) for p, cs in trees)


@pytest.mark.parametrize(("name", "attention"), [*((name, "sdpa") for name in FAMILIES), ("llama", "varlen")])
def test_where_widths_are_rounded_up_those_of_trees_are_and_score_the_same(name, attention, monkeypatch):
    model, trees, masks = family(name), some_trees(), []
    model.lm.set_attn_implementation(attention)
    decoder = getattr(model.lm, model.lm.base_model_prefix)
    decoder.register_forward_pre_hook(lambda _, __, named: masks.append(named["attention_mask"]), with_kwargs=True)
    batch = lay_out(trees, np.arange(10))
    with torch.no_grad():
        expected = completion_logps(model, batch, model.transform, 2**28)
        monkeypatch.setitem(causal_lm.ROUND_WIDTH, "cpu", 64)
        found = completion_logps(model, batch, model.transform, 2**28)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert [mask.shape[1:] for mask in masks] == [(1, width, width) for width in (batch.input_ids.shape[1], 64)]
    # not every kernel takes a position that sees nothing
    assert batch.input_ids.shape[1] < 64 and masks[1].any(-1).all()


def test_another_completion_of_the_tree_changes_nothing():
    model, (prompt, completions) = family("llama"), some_trees()[0]
    other = [completions[0], *(59 - c for c in completions[1:])]
    with torch.no_grad():
        one, two = (
            completion_logps(model, lay_out([(prompt, cs)], np.arange(4)), model.transform, 2**28)
            for cs in (completions, other)
        )
    assert one[0] == two[0] and (one[1:] != two[1:]).all()


def test_a_rank_without_trees_runs_the_model_all_the_same():
    model = family("llama")
    with torch.no_grad():
        assert completion_logps(model, lay_out([], np.zeros(0)), model.transform, 2**28).numel() == 0


@settings(max_examples=200, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40)), min_size=1, max_size=60),
    widest=st.integers(60, 300),
    t0=st.floats(1, 1e6),
)
def test_trees_hold_every_pair_once_with_one_prompt_and_within_the_width(pairs, widest, t0):
    prompt = np.array([p for p, _ in pairs])
    completion_tokens = np.array([c for _, c in pairs])
    prompt_tokens = 3 * prompt + 1
    trees = grow(prompt, prompt_tokens, completion_tokens, widest=widest, t0=t0)
    members = [trees[i] for i in range(len(trees))]
    assert sorted(np.concatenate(members).tolist()) == list(range(len(pairs)))
    for pairs_of_tree, tokens in zip(members, trees.tokens, strict=True):
        assert len(set(prompt[pairs_of_tree].tolist())) == 1
        assert tokens == prompt_tokens[pairs_of_tree[0]] + completion_tokens[pairs_of_tree].sum() <= widest


def test_sharing_a_long_prompt_costs_less_and_no_sharing_costs_no_more():
    t0 = 1000.0
    prompt, completion = np.full(8, 500), np.full(8, 50)
    one = grow(np.zeros(8, np.int64), prompt, completion, widest=4096, t0=t0)
    assert cost(one.tokens, t0) < 0.5 * cost(prompt + completion, t0)
    # every prompt another: trees of one pair each
    apart = grow(np.arange(8), prompt, completion, widest=4096, t0=t0)
    assert cost(apart.tokens, t0) == cost(prompt + completion, t0)


def exact(model, max_length=96):
    return sharing_is_exact(model, model, CPU, max_length, rounding_of(model, 0.0))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_sound_families_share_in_every_dtype(name, dtype):
    assert exact(family(name).to(dtype))


def test_models_in_which_completions_see_each_other_are_found():
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, initializer_range=0.3, state_size=8)
    lm = MambaForCausalLM(config).eval()
    forward = lm.backbone.forward
    # it takes no positions, and no mask of four dimensions: a state runs along the row whatever one says
    lm.backbone.forward = lambda input_ids, position_ids, attention_mask, **more: forward(input_ids, **more)
    assert not exact(ScoringModel(lm))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_sibling_that_shows_by_a_hundredth_of_what_was_rounding_is_found(dtype):
    """0.5 nats over the root of a token once passed in bf16."""
    model = family("llama").to(dtype)
    assert exact(model)
    model.lm.model.layers[0].register_forward_hook(lambda module, arguments, out: neighbourly(out, 0.02))
    assert not exact(model)


def test_a_model_that_takes_no_mask_of_this_form_is_no_model_to_share_in():
    model = family("llama")
    forward = model.lm.model.forward

    def strict(*arguments, attention_mask=None, **more):
        if attention_mask is not None and attention_mask.dim() == 4:
            raise ValueError("attention_mask must have two dimensions")
        return forward(*arguments, attention_mask=attention_mask, **more)

    model.lm.model.forward = strict
    assert not exact(model)


STATES = ("bamba", "falcon_h1", "zamba", "zamba2", "jamba", "mamba2", "recurrent_gemma", "opt", "bart", "llama4_text")


@pytest.mark.parametrize("kind", STATES)
def test_families_with_a_state_or_a_count_along_the_row_share_nothing_whatever_is_measured(kind):
    config = transformers.AutoConfig.for_model(kind)
    assert re.search("along the row|run on over the end|a tree", can_share(config, "sdpa", 32) or "")


@pytest.mark.parametrize(("answers", "prompt", "pays"), [(8, 200, True), (1, 200, False), (8, 1, False)])
def test_prompts_are_shared_where_the_cost_model_says_that_it_pays(answers, prompt, pays):
    pairs = 8 * answers
    work = Work(
        examples=None,
        prompts=np.arange(pairs),
        completions=np.arange(pairs),
        prompt_kept=np.full(pairs, prompt),
        completion_kept=np.full(pairs, 50),
        keys=np.zeros(pairs),
        prompt_group=np.arange(pairs) // answers,
    )
    how = PassSettings(
        cutting=Cutting(max_length=512, prompt_limit=256, tokens=4096, packed=False),
        logits_bytes=None,
        logits_dtype=None,
        t0=1440.0,
        device=CPU,
    )
    assert (work.trees(how, None) is not None) == pays
    assert work.trees(how, False) is None and work.trees(how, True) is not None


@pytest.mark.parametrize(
    ("setting", "device", "attention", "packing", "may"),
    [
        ("auto", "cpu", "sdpa", "auto", None),
        ("auto", "cpu", "varlen", "auto", None),
        ("auto", "cpu", "varlen", True, False),
        ("auto", "cpu", "eager", "auto", False),
        ("auto", "cuda", "varlen", "auto", False),
        (True, "cuda", "sdpa", "auto", True),
        (False, "cpu", "sdpa", "auto", False),
    ],
)
def test_auto_shares_prompts_on_the_cpu_alone_where_it_was_measured(setting, device, attention, packing, may):
    section = ReferenceConfig(share_prefixes=setting, packing=packing)
    assert may_share(section, LlamaConfig(), attention, torch.device(device), 512) is may


def test_sharing_that_was_asked_for_and_cannot_be_had_is_refused():
    with pytest.raises(UserError, match="reference.share_prefixes is true, but attention eager takes no mask"):
        may_share(ReferenceConfig(share_prefixes=True), LlamaConfig(), "eager", CPU, 512)


@pytest.mark.parametrize(
    ("changes", "attention", "reason"),
    [
        ({}, "eager", "eager takes no mask"),
        ({}, "flash_attention_2", "takes no mask"),
        ({"sliding_window": 8}, "sdpa", "see 8 positions back .sliding_window"),
    ],
)
def test_what_a_trees_mask_cannot_say_is_refused(changes, attention, reason):
    kind = transformers.MistralConfig if changes else transformers.LlamaConfig
    config = kind(**SMALL, **changes)
    assert re.search(reason, can_share(config, attention, 96))
    assert can_share(tiny_llama().config, "sdpa", 96) is None


def test_a_window_that_no_row_exceeds_is_no_obstacle():
    assert can_share(transformers.MistralConfig(**SMALL, sliding_window=96), "sdpa", 96) is None
