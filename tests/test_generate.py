"""Generation: the tokens that the model's own forward asks for, whatever stands beside a prompt in a batch."""

from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer
from transformers import GenerationConfig, PegasusConfig, PegasusForCausalLM, RwkvConfig, RwkvForCausalLM

from kto_dist.data.batch import Cutting
from kto_dist.evaluation.decoding import Decoding, choose
from kto_dist.evaluation.generate import Tried, extend, generate, stops_of, stream, tried
from kto_dist.model.causal_lm import ScoringModel
from kto_dist.model.memory import NeedsRestart

GREEDY = Decoding(max_tokens=12, stops=(1,))
DRAWN = Decoding(max_tokens=12, stops=(1,), temperature=0.8, top_p=0.95, seed=3)


def prompts(count: int = 7, longest: int = 30) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(2, 258, rng.integers(1, longest)).astype(np.int32) for _ in range(count)]


def by_hand(lm: Any, prompt: np.ndarray, decoding: Decoding) -> tuple[int, ...]:
    """The likeliest token of a forward over everything, again and again."""
    ids = prompt.tolist()
    while len(ids) < len(prompt) + decoding.max_tokens:
        with torch.no_grad():
            ids.append(int(lm(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in decoding.stops:
            break
    return tuple(ids[len(prompt) :])


@pytest.fixture(scope="module")
def lm() -> Any:
    return tiny_llama(initializer_range=0.5).eval()


@pytest.mark.parametrize("batch", [1, 4])
def test_greedy_answers_are_the_likeliest_tokens_of_the_models_own_forward(lm, batch):
    found = generate(lm, prompts(), GREEDY, batch=batch)
    assert [one.ids for one in found] == [by_hand(lm, prompt, GREEDY) for prompt in prompts()]


def test_an_answer_ends_with_a_stop_or_at_its_limit_and_says_which(lm):
    one = generate(lm, prompts(1), GREEDY, batch=1)[0]
    assert not one.finished and len(one.ids) == 12
    stopped = generate(lm, prompts(1), Decoding(max_tokens=12, stops=(1, one.ids[3])), batch=1)[0]
    assert stopped.finished and stopped.ids == one.ids[: one.ids.index(one.ids[3]) + 1]


def test_a_drawn_answer_is_a_function_of_seed_and_prompt_whatever_stands_beside_it(lm):
    together = generate(lm, prompts(), DRAWN, batch=7)
    alone = [generate(lm, [prompt], DRAWN, batch=1)[0] for prompt in prompts()]
    assert together == alone
    assert together != generate(lm, prompts(), Decoding(max_tokens=12, stops=(1,), temperature=0.8, seed=4), batch=7)


def test_tokens_are_drawn_as_often_as_the_model_says():
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0])
    grid = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    rows = logits.expand(len(grid), -1)
    for temperature in (1.0, 0.5):
        drawn = choose(rows, grid, Decoding(max_tokens=1, stops=(), temperature=temperature))
        shares = torch.bincount(drawn, minlength=4) / len(grid)
        assert torch.allclose(shares.double(), torch.softmax(logits.double() / temperature, -1), atol=2e-4)
    likeliest = choose(rows, grid, Decoding(max_tokens=1, stops=(), temperature=1.0, top_p=0.8))
    # 0.69 alone is not 0.8, and with the next one it is
    assert set(likeliest.tolist()) == {0, 2}


def test_a_prompt_near_the_models_context_gets_what_room_there_is(lm):
    long = np.full(254, 7, np.int32)
    made = generate(lm, [long, np.full(256, 7, np.int32), prompts(1)[0]], GREEDY, batch=4)
    assert [len(one.ids) for one in made] == [2, 0, 12] and not made[1].finished
    assert made[0].ids == by_hand(lm, long, Decoding(max_tokens=2, stops=(1,)))


def test_a_state_along_the_row_takes_in_no_padding():
    torch.manual_seed(0)
    lm = RwkvForCausalLM(
        RwkvConfig(
            vocab_size=258, hidden_size=32, num_hidden_layers=2, context_length=64, eos_token_id=1, rescale_every=0
        )
    ).eval()
    for parameter in lm.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    together = generate(lm, prompts(4), GREEDY, batch=4)
    assert together == [generate(lm, [prompt], GREEDY, batch=1)[0] for prompt in prompts(4)]


def test_positions_that_are_counted_along_the_row_count_no_padding():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 64, "decoder_attention_heads": 4}
    lm = PegasusForCausalLM(PegasusConfig(vocab_size=258, max_position_embeddings=64, **sizes)).eval()
    for parameter in lm.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    together = generate(lm, prompts(4), GREEDY, batch=4)
    assert together == [generate(lm, [prompt], GREEDY, batch=1)[0] for prompt in prompts(4)]


def test_a_model_is_left_as_it_was_and_so_are_torchs_random_numbers(lm):
    lm.set_attn_implementation("varlen")
    lm.generation_config = GenerationConfig(repetition_penalty=9.0, do_sample=True, max_length=20)
    before, settings = torch.random.get_rng_state(), lm.generation_config
    try:
        made = generate(lm, prompts(), DRAWN, batch=3)
        assert torch.equal(before, torch.random.get_rng_state())
        assert lm.generation_config is settings and lm.config._attn_implementation == "varlen"
    finally:
        lm.set_attn_implementation("sdpa")
        lm.generation_config = GenerationConfig()
    # none of the model's own settings for generation counted
    assert made == generate(lm, prompts(), DRAWN, batch=3)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("decoding", [GREEDY, DRAWN], ids=("greedy", "drawn"))
def test_without_keys_and_values_the_same_tokens_come(lm, packed, decoding):
    model = ScoringModel(tiny_llama(initializer_range=0.5).eval())
    if packed:
        model.lm.set_attn_implementation("varlen")
    cutting = Cutting(max_length=64, prompt_limit=32, tokens=70, packed=packed)
    assert extend(model, model, prompts(), decoding, cutting, batch=7) == generate(lm, prompts(), decoding, batch=4)


def with_room_for(lm: Any, most: int) -> Any:
    """Until it is removed, more prompts at once are out of memory after some tokens."""

    def full(module: Any, inputs: Any) -> None:
        if inputs[0].shape[0] > most and inputs[0].shape[1] == 1:
            raise torch.OutOfMemoryError("no room")

    return lm.model.layers[0].register_forward_pre_hook(full)


@pytest.mark.parametrize("decoding", [GREEDY, DRAWN], ids=("greedy", "drawn"))
def test_where_memory_runs_out_half_as_many_at_once_give_the_same_answers(lm, decoding):
    expected, lowered = generate(lm, prompts(), decoding, batch=7), []
    hook = with_room_for(lm, 2)
    try:
        found = tried(lm, prompts(), decoding, batch=5)
        assert generate(lm, prompts(), decoding, batch=7, lowered=lowered.append) == expected
    finally:
        hook.remove()
    assert found == Tried(made=expected, why=None, batch=2) and lowered == [3, 1]


def test_a_prompt_that_does_not_fit_alone_is_told(lm):
    hook = with_room_for(lm, 0)
    try:
        found = tried(lm, prompts(), GREEDY, batch=2)
    finally:
        hook.remove()
    assert found == Tried(made=[], why="out of memory with one prompt at a time", batch=1)


@pytest.mark.parametrize(
    ("batch", "settings"),
    [(5, {"answers.batch": 2}), (1, {"answers.while_training": 0, "answers.every_steps": None})],
)
def test_without_room_sharded_weights_need_a_restart_with_half_the_prompts_at_once_or_none(batch, settings):
    model = ScoringModel(tiny_llama(initializer_range=0.5).eval())

    def full(module: Any, inputs: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    model.lm.model.layers[0].register_forward_pre_hook(full)
    cutting = Cutting(max_length=64, prompt_limit=32, tokens=1000, packed=False)
    with pytest.raises(NeedsRestart, match="out of memory in answers") as raised:
        extend(model, model, prompts(), GREEDY, cutting, batch=batch)
    assert raised.value.settings == settings


def test_a_stream_tells_every_token_and_ends_with_the_same_answer(lm):
    told: list[list[int]] = []
    found = stream(lm, prompts(1)[0], GREEDY, told.append)
    assert found == generate(lm, prompts(1), GREEDY, batch=1)[0]
    assert [len(ids) for ids in told] == list(range(1, 13)) and tuple(told[-1]) == found.ids


def test_what_ends_an_answer_is_eos_the_templates_mark_and_what_the_model_names():
    tokenizer = tiny_tokenizer()
    assert stops_of(tokenizer, None) == (1,)
    assert stops_of(tokenizer, GenerationConfig(eos_token_id=[1, 7])) == (1, 7)
    tokenizer.eos_token = "<|im_start|>"
    assert stops_of(tokenizer, None) == (0, 1)
