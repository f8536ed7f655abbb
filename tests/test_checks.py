"""What a run finds out of a family before it trusts its log-probs: leaks small and far away, and no false alarm."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import FAMILIES, UNPACKABLE, from_own_logits, neighbourly, scored, tiny
from transformers import AutoConfig, LlamaConfig

from kto_dist.base.errors import UserError
from kto_dist.data.batch import collate, cut
from kto_dist.model.attention import switch_length
from kto_dist.model.causal_lm import ScoringModel
from kto_dist.model.checks import Observed, Rounding, check_scoring, chooses, first_layers, leaks, rounding_of, thinned
from kto_dist.objective.losses import LOSSES
from kto_dist.training.start import StartCheck

CPU = torch.device("cpu")
DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)


def check(model, *, packed, max_length=96):
    return check_scoring(model, model, CPU, packed=packed, max_length=max_length)


@DTYPES
@pytest.mark.parametrize("name", FAMILIES)
def test_sound_families_pass_packed_in_every_dtype(name, dtype):
    rounding = check(ScoringModel(tiny(FAMILIES[name]).to(dtype)), packed=True)
    assert rounding.spread < rounding.limit <= 0.25


@DTYPES
@pytest.mark.parametrize("name", UNPACKABLE)
def test_packing_is_refused_where_sequences_would_see_each_other(name, dtype):
    model = ScoringModel(tiny(UNPACKABLE[name]).to(dtype))
    check(model, packed=False)
    with pytest.raises(UserError, match="train.packing"):
        check(model, packed=True)


@DTYPES
def test_a_leak_of_a_hundredth_of_what_was_rounding_is_found(dtype):
    """0.5 nats over the root of a token once passed in bf16."""
    model = ScoringModel(tiny(FAMILIES["llama"]).to(dtype))
    model.lm.model.layers[0].register_forward_hook(lambda module, arguments, out: neighbourly(out, 0.02))
    check(model, packed=False)
    with pytest.raises(UserError, match=r"packed sequences see each other in LlamaForCausalLM.*train.packing=false"):
        check(model, packed=True)


@DTYPES
@pytest.mark.parametrize("packed", (False, True), ids=("padded", "packed"))
def test_what_only_long_rows_show_is_found_at_their_length(dtype, packed):
    """As windows, longrope and sparse attention do; the checks once had 13 positions."""
    model = ScoringModel(tiny(FAMILIES["llama"], "varlen" if packed else "sdpa").to(dtype))

    def beyond(module, arguments, out):
        return neighbourly(out, 0.5) if out.shape[1] > 90 or (not packed and out.shape[0] > 1) else out

    model.lm.model.layers[0].register_forward_hook(beyond)
    if packed:
        check(model, packed=True, max_length=80)
    with pytest.raises(UserError, match="see each other in|change each other's"):
        check(model, packed=packed, max_length=120)


def test_a_random_model_is_refused_as_such():
    model = ScoringModel(tiny(FAMILIES["llama"]))
    model.lm.model.layers[0].register_forward_hook(lambda module, arguments, out: torch.nn.functional.dropout(out, 0.2))
    with pytest.raises(UserError, match="gives one row two log-probs: it is random"):
        check(model, packed=False)


@DTYPES
def test_a_model_that_sees_later_tokens_is_refused_as_such(dtype):
    model = ScoringModel(tiny(FAMILIES["llama"]).to(dtype))
    model.lm.model.layers[0].register_forward_hook(lambda module, arguments, out: out + 0.02 * out.flip(1))
    with pytest.raises(UserError, match=r"sees tokens that come later.*is_decoder"):
        check(model, packed=False)


def test_a_model_that_counts_its_positions_otherwise_is_refused_as_such():
    model = ScoringModel(tiny(FAMILIES["llama"]))
    forward = model.lm.model.forward

    def other(input_ids, position_ids=None, **more):
        count = torch.arange(input_ids.shape[1])[None] if position_ids is None else 3 * position_ids
        return forward(input_ids=input_ids, position_ids=count, **more)

    model.lm.model.forward = other
    with pytest.raises(UserError, match="counts positions in another way"):
        check(model, packed=False)


@pytest.mark.parametrize("scale", (2.0, 1.02, 1.002, 1.00025))
def test_a_head_that_the_config_does_not_describe_is_refused(scale):
    lm = tiny(FAMILIES["llama"])
    lm.register_forward_hook(lambda module, arguments, output: type(output)(logits=scale * output.logits))
    with pytest.raises(UserError, match="LM head"):
        check(ScoringModel(lm), packed=False)


def test_a_family_whose_choices_depend_on_padding_is_refused_beyond_them():
    from transformers import DogeConfig, DogeForCausalLM

    settings = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = DogeConfig(**settings, num_attention_heads=4, num_key_value_heads=2, keep_window_size=20)
    model = ScoringModel(DogeForCausalLM(config).eval())
    check(model, packed=False, max_length=20)
    with pytest.raises(UserError, match=r"data.max_length \(21\) must be at most doge's keep_window_size \(20\)"):
        check(model, packed=False, max_length=21)


LONGROPE = {
    "original_max_position_embeddings": 24,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": 24,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
    },
}


@pytest.mark.parametrize("packed", (False, True), ids=("padded", "packed"))
def test_rows_beyond_longropes_switch_are_scored_apart_as_if_alone(packed):
    lm = tiny(("phi3", LONGROPE, "varlen" if packed else "sdpa"))
    own, model = tiny(("phi3", LONGROPE, "sdpa")), ScoringModel(lm)
    draw = np.random.default_rng(0)
    pairs = [(draw.integers(3, 99, 3), draw.integers(3, 99, count)) for count in (5, 40, 21, 22, 30)]
    check(model, packed=packed, max_length=64)
    lengths, apart = np.array([len(p) + len(c) for p, c in pairs]), switch_length(lm.config, 64)
    assert apart == 24 and switch_length(lm.config, 24) is None
    together = []
    for share in cut(lengths, tokens=500, ranks=1, packed=packed, apart=apart)[0]:
        together += [
            (place, value) for place, value in zip(share, scored(model, [pairs[n] for n in share], packed), strict=True)
        ]
    found = torch.stack([value for _, value in sorted(together, key=lambda item: item[0])])
    wanted = from_own_logits(own, pairs)
    torch.testing.assert_close(found, wanted, rtol=0, atol=5e-5)
    # what stood in stores before
    mixed = scored(model, pairs, packed)
    assert (mixed - wanted).abs().max() > 0.01


def test_the_first_layers_run_alone_and_all_are_back_afterwards():
    kind, _, attention = FAMILIES["gemma3_window"]
    lm = tiny((kind, {"head_dim": 8, "sliding_window": 4, "num_hidden_layers": 12}, attention))
    ran = []
    for layer in lm.model.layers:
        layer.register_forward_hook(lambda module, arguments, out: ran.append(1))
    with first_layers(lm):
        lm(input_ids=torch.arange(3, 9)[None])
    # five with a window, and the first without
    assert len(ran) == 6 and len(lm.model.layers) == 12
    with pytest.raises(ZeroDivisionError), first_layers(lm):
        raise ZeroDivisionError
    assert len(lm.model.layers) == 12


def test_rows_that_are_looked_at_are_few_and_hold_the_first_and_the_last():
    pairs = [(np.arange(2), np.arange(500)), (np.arange(1), np.arange(900, 903)), (np.arange(1), np.arange(0))]
    whole = collate(pairs, np.arange(3), packed=True)
    batch = thinned(whole)
    first, second, third = batch.lengths.tolist()
    assert first <= 64 and (second, third) == (3, 0)
    found = batch.target[:first].tolist()
    assert found[:16] == list(range(16)) and found[-16:] == list(range(484, 500)) and found == sorted(set(found))
    # rows of a sequence are counted from its own start
    assert batch.target[first:].tolist() == [900, 901, 902]
    assert batch.gather.tolist() == [*whole.gather[:500][batch.target[:first]].tolist(), *whole.gather[500:].tolist()]


def test_an_expert_that_rounding_chose_has_more_room_and_nothing_has_more_than_the_cap():
    dense, experts = (ScoringModel(tiny(FAMILIES[name]).bfloat16()) for name in ("llama", "mixtral_experts"))
    assert rounding_of(dense, 0.0).limit == rounding_of(experts, 0.0).limit == 0.2
    assert rounding_of(dense, 9.0).limit == 0.25 and rounding_of(experts, 9.0).limit == 0.5
    assert rounding_of(experts, 0.0).jumps and not rounding_of(dense, 0.0).jumps


EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok")
TOKENS = ("index_topk", "indexer_budget", "index_topk_blocks", "keep_window_size")


@pytest.mark.parametrize("name", (*EXPERTS, *TOKENS))
def test_a_model_that_chooses_is_known_by_any_name_that_families_have_for_it(name):
    config = LlamaConfig()
    assert not chooses(config)
    setattr(config, name, 1)
    assert not chooses(config)
    setattr(config, name, 2)
    assert chooses(config)


@pytest.mark.parametrize("kind", ("mixtral", "dbrx", "deepseek_v3", "qwen3_moe", "ernie4_5_moe", "llama4"))
def test_families_with_experts_are_known_as_such_wherever_their_config_counts_them(kind):
    """dbrx counts them in a config of its own: its rows had the room of a model that chooses nothing."""
    assert chooses(AutoConfig.for_model(kind))
    assert not any(chooses(AutoConfig.for_model(other)) for other in ("llama", "gpt2", "gemma3", "qwen2"))


@DTYPES
def test_what_a_neighbour_moves_is_found_however_much_room_rounding_has(dtype):
    """As in trocr, whose positions run on: in bf16 the limits of both were widened together once, and it passed."""
    rounding = rounding_of(ScoringModel(tiny(FAMILIES["llama"]).to(dtype)), 9.0)
    none, apart = Observed(apart=0.0, moved=0.0), rounding.limit / 3
    assert leaks(Observed(apart=apart, moved=0.00128), rounding, none)
    assert not leaks(Observed(apart=apart, moved=0.0), rounding, none)
    assert leaks(Observed(apart=rounding.limit * 1.01, moved=0.0), rounding, none)


def start(alone, *, limit=0.1, jumps=False, reference="bfloat16", from_store=0, packed=True):
    values = iter(alone)
    return StartCheck(
        policy_dtype="bfloat16",
        reference_dtype=reference,
        rounding=Rounding(spread=0.01, limit=limit, jumps=jumps),
        packed=packed,
        store="runs/store",
        from_store=from_store,
        alone=lambda row: torch.tensor([next(values)]),
    )


def ask(check, off, *, others=(0.0, 0.0, 0.0)):
    """Rows of 4 tokens, the third one's log-prob `off` nats off its reference's and the others' by `others`."""
    moved = torch.tensor([*others[:2], off, *others[2:]], dtype=torch.float64)
    refs = -5.0 - torch.arange(len(moved), dtype=torch.float64)
    work = SimpleNamespace(
        answers=np.full(len(moved), 4),
        rows=np.array([3, 1, 9, 0, *range(10, 6 + len(moved))]),
        labels=SimpleNamespace(ref_logps=refs),
        kl_answers=np.zeros(0),
    )
    losses = torch.full((len(moved),), 0.5, dtype=torch.float64)
    check.check(work, SimpleNamespace(loss=LOSSES["apo_zero_unpaired"], beta=0.1), losses, refs + moved)


def test_a_start_within_rounding_passes_and_beyond_it_does_not():
    ask(start([]), 0.298)
    with pytest.raises(UserError, match=r"1 of 4 rows differ, the worst by 0.151 nats .*limit 0.15, of all .* 0.1:"):
        ask(start([-6.698, -6.698], from_store=4), 0.302)


def rounded(deviation, rows=15):
    """Nats of rows of 4 tokens that round by so much per root of a token."""
    return (2 * deviation * np.random.default_rng(0).standard_normal(rows)).tolist()


def test_a_row_that_rounds_like_the_others_passes_and_one_that_sees_its_neighbours_does_not():
    """In bf16 the worst of 16 rows of SmolLM2 was 0.132 off, and half a nat once passed in a single row."""
    for limit in (0.2, 0.1):
        ask(start([], limit=limit), 2 * 0.132, others=rounded(0.047))
        with pytest.raises(UserError, match=r"1 of 16 rows differ, the worst by 0.45 nats"):
            ask(start([-7.0, -7.0], limit=limit), 2 * 0.45, others=rounded(0.047))
    # where the others hardly round, so much is no rounding
    with pytest.raises(UserError, match=r"1 of 16 rows differ, the worst by 0.16 nats .*limit 0.15,"):
        ask(start([-7.0, -7.0], limit=0.1), 2 * 0.16, others=rounded(0.005))


def test_one_row_in_the_tail_of_rounding_passes_and_two_of_them_do_not():
    """As SmolLM2 gave one of 8 rows in bf16: 0.217, the same by itself as beside others."""
    ask(start([], limit=0.2), 2 * 0.217, others=rounded(0.047, 7))
    with pytest.raises(UserError, match=r"2 of 8 rows differ, the worst by 0.217 nats .*limit 0.2,"):
        ask(start([-6.8, -6.8], limit=0.2), 2 * 0.217, others=[2 * 0.21, *rounded(0.03, 6)])


def test_a_row_whose_rounding_chose_other_experts_may_jump_to_the_cap():
    ask(start([], limit=0.2, jumps=True), 2 * 0.45, others=rounded(0.03))
    with pytest.raises(UserError, match=r"1 of 16 rows differ, the worst by 0.45 nats"):
        ask(start([-7.0, -7.0], limit=0.2), 2 * 0.45, others=rounded(0.03))


def test_some_wrong_rows_do_not_widen_the_limit_and_all_together_are_found():
    with pytest.raises(UserError, match=r"5 of 16 rows differ"):
        ask(start([-7.0, -7.0], limit=0.2), 2 * 0.3, others=[*[0.6] * 4, *rounded(0.03, 11)])
    with pytest.raises(UserError, match=r"of all rows' root mean square 0.2:"):
        ask(start([-7.0, -7.0], limit=0.2), 2 * 0.3, others=[0.5] * 15)


@pytest.mark.parametrize(
    ("alone", "changes", "cause"),
    [
        ((-6.0, -6.5), {}, "Scored twice it has two log-probs: the policy is random"),
        ((-7.0, -7.0), {}, "By itself the row agrees, .*train.packing=false"),
        ((-7.0, -7.0), {"packed": False}, "By itself the row agrees, .*rows of one batch change each other"),
        ((-5.0, -5.0), {"reference": "float32"}, "different precisions: set reference.dtype"),
        ((-5.0, -5.0), {"from_store": 4}, "store .runs/store. holds values of other text or weights.*delete"),
        ((-5.0, -5.0), {}, "in this very run: the two compute in different ways.*share_prefixes=false"),
    ],
)
def test_a_start_that_fails_names_the_cause_that_was_observed(alone, changes, cause):
    with pytest.raises(UserError, match=cause):
        ask(start(alone, **changes), 2.0)


def test_no_single_row_is_beyond_the_cap():
    ask(start([], limit=0.4), 0.98, others=[0.6] * 15)
    with pytest.raises(UserError, match=r"1 of 16 rows differ, the worst by 0.51 nats"):
        ask(start([-5.98, -5.98], limit=0.4), 1.02, others=[0.6] * 15)
