"""The loss that balances a mixture's experts: transformers' own, whatever the micro-batches and ranks."""

import ast
import importlib
import inspect

import pytest
import torch
from mixtures import MIXTURES, mixture, save_mixture
from ranks import run_ranks
from step_cases import MAX_LENGTH, cut_pair, perturbed, relative_error, run_one, some_examples
from tiny_runs import metrics_of, tiny_config, train_all, weights_of
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from kto_dist.base.errors import UserError
from kto_dist.model.loading import model_class, own_config
from kto_dist.model.router import Routing, routing_of
from kto_dist.objective import metrics

COEFFICIENT = 0.3
ROUTING = Routing(coefficient=COEFFICIENT, top_k=2)


@pytest.fixture(scope="module")
def examples():
    return some_examples()


def router_logits(policy, examples, pairs):
    """Of each layer those of all tokens of some pairs, each alone: nothing is padded."""
    layers = []
    for prompt, completion in pairs:
        asked, answered = cut_pair(examples.prompt(prompt), examples.completion(completion))
        ids = asked + answered
        layers.append(policy(input_ids=torch.tensor([ids]), output_router_logits=True).router_logits)
    return tuple(torch.cat(layer) for layer in zip(*layers, strict=True))


def balanced(logits):
    """Eq. 4 to 6 of arXiv 2101.03961, over all layers."""
    p = torch.cat(logits).softmax(-1)
    load = torch.nn.functional.one_hot(p.topk(2).indices, 4).sum(1).double().mean(0)
    return 4 * (load * p.mean(0)).sum()


@pytest.mark.parametrize(("packed", "tokens"), [(False, MAX_LENGTH), (False, 1000), (True, 60)])
@pytest.mark.parametrize("kind", MIXTURES)
def test_without_kl_pairs_it_is_transformers_own_on_the_step_as_one_batch(examples, kind, packed, tokens):
    reference = mixture(kind).double()
    models = perturbed(reference, 0.02), reference
    options = {"loss": "apo_zero_unpaired", "beta": 0.3, "packed": packed, "tokens": tokens}
    # rows of weight 0 leave the balance's gradients alone
    result, policy, rows, _ = run_one(models, examples, class_weights=(0.0, 0.0), **options, routing=ROUTING)
    found = policy.gradients()
    # transformers sums in fp32, which the gradients of the first layers show; the same in fp64 agrees to what the norms
    # round, which are fp32 in every model
    for balance, tolerance in ((lambda logits: load_balancing_loss_func(logits, 4, 2), 1e-4), (balanced, 1e-6)):
        models[0].zero_grad()
        wanted = balance(router_logits(models[0], examples, [(row, row) for row in rows]))
        (COEFFICIENT * wanted).backward()
        assert result.routed.loss == pytest.approx(float(wanted.detach()), rel=min(tolerance, 1e-5))
        gradients = {name: p.grad for name, p in models[0].named_parameters() if p.grad is not None}
        assert relative_error({name: found[name] for name in gradients}, gradients) < tolerance
    models[0].zero_grad()
    assert not found["lm_head.weight"].any()


def test_the_rows_own_figures_know_nothing_of_it(examples):
    reference = mixture("mixtral").double()
    models = perturbed(reference, 0.02), reference
    options = {"loss": "kto", "class_weights": (0.7, 1.3), "beta": 0.3, "packed": True, "tokens": 60}
    result, policy, _, _ = run_one(models, examples, **options, routing=ROUTING)
    plain, without, _, _ = run_one(models, examples, **options)
    assert metrics.step_metrics(result.sums, result.kl) == metrics.step_metrics(plain.sums, plain.kl)
    assert plain.routed is None
    name = "model.layers.0.mlp.gate.weight"
    assert not policy.gradients()[name].allclose(without.gradients()[name])


def test_with_kl_pairs_the_load_is_theirs_and_the_probabilities_are_the_rows(examples):
    reference = mixture("mixtral").double()
    models = perturbed(reference, 0.02), reference
    options = {"loss": "kto", "class_weights": (0.7, 1.3), "beta": 0.3, "packed": True, "tokens": 60}
    result, _, rows, pairs = run_one(models, examples, **options, routing=ROUTING)
    with torch.no_grad():
        asked = torch.cat([*router_logits(models[0], examples, pairs)]).softmax(-1)
        own = torch.cat([*router_logits(models[0], examples, [(row, row) for row in rows])]).softmax(-1)
    load = torch.nn.functional.one_hot(asked.topk(2).indices, 4).sum(1).double().mean(0)
    assert result.routed.loss == pytest.approx(4 * float((load * own.mean(0)).sum()), rel=1e-9)
    of_layer = torch.nn.functional.one_hot(asked.topk(2).indices, 4).sum(1).view(3, -1, 4).sum(1)
    assert result.routed.counts.equal(of_layer.double())
    figures = metrics.router_metrics(result.routed.loss, result.routed.counts)
    assert figures["router/max_load/1"] == pytest.approx(float(4 * of_layer[1].max() / of_layer[1].sum()))
    assert figures["router/loss"] == result.routed.loss and len(figures) == 4


def test_a_config_that_makes_all_layers_dense_has_nothing_to_balance(examples):
    model = mixture("qwen3_moe", mlp_only_layers=[0, 1, 2]).double()
    options = {"loss": "kto", "class_weights": (0.7, 1.3), "beta": 0.3, "packed": True, "tokens": 60}
    result, policy, _, _ = run_one((model, model), examples, **options, routing=ROUTING)
    assert result.routed is None
    assert policy.gradients()["model.layers.0.mlp.up_proj.weight"].any()


def test_an_even_load_is_1_and_a_single_expert_has_all():
    counts = torch.tensor([[3.0, 3.0, 3.0, 3.0], [12.0, 0.0, 0.0, 0.0]])
    assert list(metrics.router_metrics(2.0, counts).values()) == [2.0, 1.0, 4.0]


# ---- which models have it ----


@pytest.mark.parametrize(
    ("kind", "more", "setting", "wanted"),
    [
        ("mixtral", {"router_aux_loss_coef": 0.02}, "auto", 0.02),
        ("mixtral", {"router_aux_loss_coef": 0.02}, 0.0, None),
        ("mixtral", {"router_aux_loss_coef": 0.0}, "auto", None),
        ("olmoe", {}, "auto", 0.01),
        ("qwen3_moe", {}, 0.5, 0.5),
        ("jetmoe", {"aux_loss_coef": 0.03}, "auto", 0.03),
        ("dbrx", {"ffn_config": {"moe_loss_weight": 0.04, "moe_top_k": 3}}, "auto", 0.04),
        ("deepseek_v3", {}, "auto", None),
        ("llama", {}, "auto", None),
        ("llama", {}, 0.0, None),
    ],
)
def test_auto_is_the_coefficient_of_the_models_config(kind, more, setting, wanted):
    found = routing_of(setting, config := AutoConfig.for_model(kind, **more), model_class(config))
    assert (found.coefficient if found else None) == wanted
    if kind == "dbrx":
        assert found.top_k == 3


@pytest.mark.parametrize("kind", ("llama", "deepseek_v3"))
def test_a_family_without_it_is_refused_where_it_is_asked_for(kind):
    with pytest.raises(UserError, match=rf"objective.router_loss \(0.1\) cannot be had.*{kind}"):
        routing_of(0.1, config := AutoConfig.for_model(kind), model_class(config))


def test_every_family_that_is_taken_has_the_loss_of_the_three_above():
    def body(function):
        (definition,) = ast.parse(inspect.getsource(function)).body
        return ast.unparse(ast.Module(definition.body[1:], []))  # without its docstring

    taken = []
    for config in MODEL_FOR_CAUSAL_LM_MAPPING:
        try:
            routing = routing_of("auto", own_config(config()), model_class(config()))
        except Exception:  # a config that cannot be made without settings
            continue
        if routing is not None:
            kind = MODEL_FOR_CAUSAL_LM_MAPPING[config]
            taken.append(config.model_type)
            module = importlib.import_module((kind[0] if isinstance(kind, tuple) else kind).__module__)
            assert body(module.load_balancing_loss_func) == body(load_balancing_loss_func), config.model_type
    assert {*MIXTURES} < {*taken}


# ---- whole runs ----


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_mixture(tmp_path_factory.mktemp("mixtral"), "mixtral", router_aux_loss_coef=COEFFICIENT)


@pytest.mark.parametrize("loss", ("kto", pytest.param("apo_zero_unpaired", marks=pytest.mark.soak)))
def test_the_batch_decides_and_not_the_cluster(tmp_path, saved, tiny_log, loss):
    settings = {"train__max_steps": 3, "objective__loss": loss}
    configs = {
        name: tiny_config(tmp_path, saved, tiny_log, train__output=str(tmp_path / name), **settings, **more)
        for name, more in {
            "plain": {"train__packing": False, "train__tokens_per_microbatch": 4096, "deepspeed__zero_stage": 0},
            "sharded": {"train__packing": True, "train__tokens_per_microbatch": 96, "deepspeed__zero_stage": 3},
            "recomputed": {"train__tokens_per_microbatch": 200, "model__gradient_checkpointing": True},
            "off": {"objective__router_loss": 0.0},
        }.items()
    }
    run_ranks(train_all, 2, [configs["sharded"]])
    run_ranks(train_all, 1, [config for name, config in configs.items() if name != "sharded"])
    plain = metrics_of(configs["plain"])
    for name in ("sharded", "recomputed"):
        for expected, found in zip(plain, metrics_of(configs[name]), strict=True):
            assert found.keys() == expected.keys()
            for figure in ("loss", "grad_norm", "rewards/desirable", "router/loss", "router/max_load/2"):
                assert found[figure] == pytest.approx(expected[figure], rel=1e-3, abs=1e-6), (name, figure)
        for key, tensor in weights_of(configs["plain"]).items():
            assert torch.norm(weights_of(configs[name])[key] - tensor) <= 1e-3 * torch.norm(tensor), (name, key)
    off = metrics_of(configs["off"])
    assert not [name for name in off[0] if name.startswith("router/")]
    # the rows' loss at step 0 is that of a run without it, and what it changes comes after
    assert off[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-6)
    assert off[0]["grad_norm"] != pytest.approx(plain[0]["grad_norm"], rel=1e-3)
    assert plain[-1]["router/loss"] < plain[0]["router/loss"]
