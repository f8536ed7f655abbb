"""What a model's folder may not do or lack, each told in one sentence before a run begins."""

import builtins
import json
from pathlib import Path

import pytest
import torch
from misfits import edit_config
from ranks import run_ranks
from tiny import save_tiny, tiny_tokenizer
from tiny_runs import tiny_config, train_all
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from kto_dist.base.console import Console
from kto_dist.base.errors import UserError
from kto_dist.model.attention import pick_attention
from kto_dist.model.causal_lm import ScoringModel
from kto_dist.model.loading import load_config, load_tokenizer, refuse_packed, shortened
from kto_dist.model.trial import check_runs
from kto_dist.reference.setup import pick_reference
from kto_dist.training.prepare import prepare, prepare_training

CPU = torch.device("cpu")

CONFIGURATION = "from transformers import LlamaConfig\n\nclass MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
MODELLING = (
    "from transformers import LlamaForCausalLM\nfrom .configuration_mine import MineConfig\n\n"
    "class MineForCausalLM(LlamaForCausalLM):\n    config_class = MineConfig\n"
)
AUTO_MAP = {"AutoConfig": "configuration_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}


def with_code(folder: Path) -> Path:
    """A model that only its own Python files can make."""
    edit_config(save_tiny(folder), model_type="mine", auto_map=AUTO_MAP, architectures=["MineForCausalLM"])
    (folder / "configuration_mine.py").write_text(CONFIGURATION)
    (folder / "modeling_mine.py").write_text(MODELLING)
    return folder


def test_code_that_a_model_brings_along_is_not_run_unasked_and_nobody_is_asked_on_stdin(tmp_path, monkeypatch):
    monkeypatch.setattr(builtins, "input", lambda *question: pytest.fail("asked on stdin"))
    model = with_code(tmp_path / "model")
    (model / "configuration_mine.py").write_text("raise SystemExit('it ran')\n")
    for name in ("model.path", "reference.path"):
        section = name.partition(".")[0]
        with pytest.raises(UserError, match=rf"{name} .*auto_map.*read it, then set {section}.trust_remote_code=true"):
            load_config(str(model), name=name)


def test_a_tokenizer_with_code_is_refused_likewise(tmp_path, monkeypatch):
    monkeypatch.setattr(builtins, "input", lambda *question: pytest.fail("asked on stdin"))
    save_tiny(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    named = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **named}))
    (tmp_path / "mine.py").write_text("raise SystemExit('it ran')\n")
    with pytest.raises(UserError, match=r"the tokenizer in model.path .*set model.trust_remote_code=true"):
        load_tokenizer(str(tmp_path))


def test_trusted_code_trains_goes_along_into_the_export_and_is_part_of_the_fingerprint(tmp_path, tiny_log):
    model = with_code(tmp_path / "model")
    config = tiny_config(tmp_path, model, tiny_log, model__trust_remote_code=True, train__max_steps=1)
    ((summary,),) = run_ranks(train_all, 1, [config])
    export = Path(summary["export"])
    assert {"configuration_mine.py", "modeling_mine.py"} <= {file.name for file in export.iterdir()}
    assert json.loads((export / "config.json").read_text())["auto_map"].keys() >= AUTO_MAP.keys()
    loaded = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True)
    assert type(loaded).__name__ == "MineForCausalLM"

    def digest() -> str:
        setup = pick_reference(config.reference, config.model, max_length=96, prompt_limit=48)
        return setup.fingerprint().digest

    before = digest()
    (model / "modeling_mine.py").write_text(MODELLING + "\n# another function\n")
    assert digest() != before


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_hidden_layers": "two"}, "'num_hidden_layers' expected int, got str"),
        ({"hidden_size": None}, "'hidden_size' expected int, got NoneType"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"dtype": "bf17"}, "bf17"),
        ({"model_type": "nonsense"}, "nonsense"),
        ({"model_type": "t5"}, "is a t5 model, and transformers .* has no causal language model of that kind"),
    ],
    ids=str,
)
def test_a_field_of_the_wrong_kind_is_named_in_one_sentence(tmp_path, values, message):
    edit_config(save_tiny(tmp_path), **values)
    with pytest.raises(UserError, match=rf"model.path .*{message}") as caught:
        load_config(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ("[]", "5", "\0", '"model"'))
def test_a_config_that_is_no_object_is_an_error(tmp_path, text):
    (save_tiny(tmp_path) / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"model.path .*holds no Hugging Face model"):
        load_config(str(tmp_path))


def test_families_without_sdpa_get_eager_by_themselves():
    kinds = [kind for kind, cls in MODEL_FOR_CAUSAL_LM_MAPPING.items() if not getattr(cls, "_supports_sdpa", False)]
    assert len(kinds) > 30
    for kind in kinds:
        config = AutoConfig.for_model(kind.model_type)
        assert pick_attention("model.attention", "auto", config, CPU, torch.float32) == "eager", kind


def test_gradient_checkpointing_where_there_is_none_is_refused_before_anything_else(tmp_path, tiny_log):
    config = AutoConfig.for_model("ctrl", vocab_size=258, n_embd=16, n_layer=1, n_head=2, dff=16, n_positions=256)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    run = tiny_config(tmp_path, tmp_path / "model", tiny_log, model__gradient_checkpointing=True)
    with pytest.raises(UserError, match=r"model.gradient_checkpointing \(true\) cannot be had: ctrl"):
        prepare_training(run, Console())


def test_a_token_beyond_the_embedding_is_refused_with_both_numbers(tmp_path, tiny_log):
    model = save_tiny(tmp_path / "model", vocab_size=80)
    config = tiny_config(tmp_path, model, tiny_log)
    with pytest.raises(UserError, match=r"data.train has token \d+, and the embedding of model.path has 80 rows"):
        prepare(config, Console())


def test_a_family_whose_own_code_fails_is_told_in_one_sentence(tiny_model):
    lm = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="eager")
    model = ScoringModel(lm)
    check_runs(model, model, CPU)
    lm.model.layers[0].mlp.to(torch.bfloat16)
    with pytest.raises(UserError, match=r"LlamaForCausalLM does not run in float32 with attention eager: RuntimeError"):
        check_runs(model, model, CPU)


def test_weights_that_stay_quantised_are_not_trained(tiny_model):
    lm = AutoModelForCausalLM.from_pretrained(tiny_model)
    refuse_packed(lm, "here")
    lm.lm_head.weight = torch.nn.Parameter(lm.lm_head.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(UserError, match=r"model.path \(here\) is quantised, and 1 of its tensors stay so .*lm_head"):
        refuse_packed(lm, "here")


def test_names_that_differ_by_a_number_are_one():
    names = [f"model.layers.{n}.mlp.weight" for n in range(30)] + ["lm_head.weight"]
    assert shortened(names) == "lm_head.weight, model.layers.N.mlp.weight"
    assert shortened([f"a{letter}" for letter in "bcdefghij"]) == "ab, ac, ad, ae, af, ag and 3 more"
