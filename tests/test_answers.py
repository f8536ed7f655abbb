"""Answers side by side: kept by content, counted, judged, and what drawn ones say of KL and entropy."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from openai_server import serving
from ranks import run_ranks
from tiny import save_tiny, thumbs, tiny_tokenizer, write_jsonl
from tiny_memory import room_for_one_prompt
from transformers import AutoModelForCausalLM

from kto_dist.base import comm
from kto_dist.data.config import DataConfig
from kto_dist.data.examples import load, on_the_spot
from kto_dist.data.tokenise import prepare
from kto_dist.evaluation import generate
from kto_dist.evaluation.answers import Answer, Kept, asked_of, figures_of, pick_prompts, repeated
from kto_dist.evaluation.intervals import Interval
from kto_dist.training.evaluate import evaluate
from kto_dist.training.judged import Request


def answers(*texts: str) -> list[Answer]:
    return [Answer(text=text, finished=text.endswith("."), ids=tuple(range(len(text)))) for text in texts]


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("one two three", 0.0),
        ("one two three four five six", 0.0),
        # five runs of four words, of which "one two three four" comes twice
        ("one two three four one two three four", 0.2),
        ("no no no no no no no", 0.75),
        ("是" * 24, 16 / 17),
    ],
)
def test_what_is_said_again_counts_once_more(text, share):
    assert repeated(text) == pytest.approx(share)


def test_figures_are_of_each_model_and_of_their_difference():
    ours, theirs = answers("a b.", "c d.", "c d.") * 20, answers("a b.", "c d e", "c d e") * 20
    found = figures_of({"model": ours, "reference": theirs})
    value = {name: figure.value for name, figure in found.items() if isinstance(figure, Interval)}
    expected = {"words/model": 2, "words/reference": 8 / 3, "words/difference": -2 / 3, "finished/model": 1}
    expected |= {"finished/reference": 1 / 3, "identical": 1 / 3}
    assert {name: value[name] for name in expected} == pytest.approx(expected)
    assert found["identical"].low < 1 / 3 < found["identical"].high
    assert figures_of({"model": []}) == {}


def test_what_is_kept_is_found_again_and_a_broken_line_is_made_again(tmp_path):
    kept = Kept(tmp_path, "some model")
    kept.add({"a": answers("é.")[0], "b": Answer(text="from a server", finished=False)})
    (file,) = tmp_path.iterdir()
    lines = file.read_text(encoding="utf-8").splitlines()
    file.write_text(lines[0] + "\n" + lines[1][:20], encoding="utf-8")
    again = Kept(tmp_path, "some model")
    assert again.get("a") == answers("é.")[0] and again.get("b") is None
    assert Kept(tmp_path, "another").get("a") is None


def test_prompts_are_each_another_and_a_function_of_the_seed():
    prompts = [np.array([1, number % 5], np.int32) for number in range(20)]
    rows = on_the_spot(prompts, [np.array([2])] * 20)
    chosen = pick_prompts(rows, 3, seed=0)
    assert len({prompts[row][1] for row in chosen}) == 3 and (chosen == pick_prompts(rows, 3, seed=0)).all()
    assert pick_prompts(rows, 99, seed=1).size == 5 and pick_prompts(rows, 0, seed=1).size == 0


def asked(folder: Path, model: Path, reference: Path, *words: str) -> Request:
    log = write_jsonl(folder / "rows.jsonl", thumbs(40, 12))
    (folder / "longer.py").write_text("def score(prompt, answer):\n    return len(answer)\n")
    settings = (
        f"reference.store={folder / 'store'}",
        f"data.cache={folder / 'cache'}",
        f"answers.cache={folder / 'answers'}",
        f"judge.cache={folder / 'verdicts'}",
        *("data.max_length=96", "reference.dtype=fp32", "data.workers=1", "answers.in_evaluate=6"),
        *("answers.max_tokens=20", "answers.batch=4"),
    )
    return Request(
        target=str(model),
        reference=str(reference),
        data=(str(log),),
        output=str(folder / "out.json"),
        overrides=(*settings, *words),
    )


def all_of(*requests: Request) -> tuple[list[dict[str, Any]], str]:
    """What was found of each, and what was said."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        found = [evaluate(request) for request in requests]
    return found, " ".join(said.getvalue().split())


def test_both_models_answer_once_ever_and_a_judge_sees_both_orders(tmp_path, tiny_model):
    other = save_tiny(tmp_path / "other", seed=1)
    judge = ("judge.by=function", f"judge.function={tmp_path / 'longer.py'}:score")
    requests = asked(tmp_path, other, tiny_model, *judge), asked(tmp_path, other, tiny_model)
    (first, second), said = run_ranks(all_of, 2, *requests)[0]
    found = first["answers"]
    assert found["prompts"] == 6 and found["figures"]["words/model"]["prompts"] == 6
    assert found["judged"]["reference"]["pairs"] == 6
    lengths = [len(one["model"]) - len(one["reference"]) for one in found["samples"]]
    won = np.mean([(difference > 0) + (difference == 0) / 2 for difference in lengths])
    assert found["judged"]["reference"]["figures"]["win_rate"]["value"] == pytest.approx(won)
    # 6 prompts of each, and 6 drawn of the model; then none
    assert "answers of model: 0 kept, 12 to make" in said and "answers of model: 12 kept, 0 to make" in said
    assert "longer.py:score): 0 scores kept, 12 to ask for" in said and found["judged"]["reference"]["kept"] == 0
    assert second["answers"]["samples"] == found["samples"] and second["answers"]["judged"] == {}
    assert second["answers"]["on_policy"] == found["on_policy"]
    assert json.loads((tmp_path / "out.json").read_text()) == second


def _on_a_small_device(request: Request) -> tuple[list[dict[str, Any]], str]:
    room_for_one_prompt()
    return all_of(request)


def test_where_a_rank_lacks_memory_half_the_prompts_at_once_give_the_same_answers(tmp_path, tiny_model):
    other = save_tiny(tmp_path / "other", seed=1)
    request = asked(tmp_path, other, tiny_model)
    (found,), said = run_ranks(_on_a_small_device, 2, request)[0]
    # both models, and what one of them draws
    assert said.count("out of memory while prompts were answered: going on with 1 at once") == 1
    again = asked(tmp_path, other, tiny_model, f"answers.cache={tmp_path / 'elsewhere'}")
    (expected,), _ = run_ranks(all_of, 2, again)[0]
    assert found["answers"] == expected["answers"] and found["answers"]["prompts"] == 6


def test_kl_and_entropy_of_drawn_answers_are_those_of_the_models_own_chances(tmp_path, tiny_model):
    """One token an answer: both are sums over the vocabulary, which many drawn tokens come close to."""
    other = save_tiny(tmp_path / "other", seed=1)
    log = write_jsonl(tmp_path / "many.jsonl", thumbs(800, 800, seed=2))
    words = (
        "answers.in_evaluate=800",
        "answers.max_tokens=1",
        "answers.batch=200",
        "objective.loss=apo_zero_unpaired",
    )
    request = asked(tmp_path, other, tiny_model, *words)
    request = Request(**{**{name: getattr(request, name) for name in request.__slots__}, "data": (str(log),)})
    (((found,), _),) = run_ranks(all_of, 1, request)
    rows = [json.loads(line)["prompt"] for line in log.read_text().splitlines()]
    tokenizer = tiny_tokenizer()
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (other, tiny_model)]
    kl, entropy = [], []
    for prompt in dict.fromkeys(rows):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            ours, theirs = (torch.log_softmax(lm(ids).logits[0, -1].double(), -1) for lm in models)
        kl.append(float((ours.exp() * (ours - theirs)).sum()))
        entropy.append(float(-(ours.exp() * ours).sum()))
    on_policy = found["answers"]["on_policy"]
    for name, exact in (("kl/answer", np.mean(kl)), ("entropy/token", np.mean(entropy))):
        # 95 % intervals, and this is one draw of a fixed seed
        width = on_policy[name]["high"] - on_policy[name]["low"]
        assert abs(on_policy[name]["value"] - exact) < width, name
        assert width < 0.3 * exact, name


def test_answers_come_from_servers_where_these_are_given(tmp_path, tiny_model):
    with (
        serving(lambda body: f" served: {body['prompt'][-3:]} ", model="ours") as ours,
        serving(lambda body: "theirs", model="theirs") as theirs,
    ):
        words = (f"answers.model_url={ours.url}", f"answers.reference_url={theirs.url}", "answers.reference_name=other")
        request = asked(tmp_path, tiny_model, tiny_model, *words)
        (((found,), _),) = run_ranks(all_of, 1, request)
    assert found["answers"]["samples"][0]["model"].startswith("served: ")
    assert found["answers"]["figures"]["identical"]["value"] == 0 and found["answers"]["on_policy"] == {}
    path, body, _ = ours.asked[0]
    assert (path, body["model"], body["max_tokens"]) == ("/v1/completions", "ours", 20)
    assert {body["model"] for _, body, _ in theirs.asked} == {"other"}


def test_models_that_do_not_fit_whole_are_told_first_and_evaluated_without_answers(tmp_path, tiny_model):
    request = asked(tmp_path, tiny_model, tiny_model, "reference.zero_stage=3")
    (((found,), said),) = run_ranks(all_of, 1, request)
    assert "answers" not in found and "auc" in found["heldout"]
    assert said.count("serve it, and give answers.model_url") == 1
    assert said.index("serve it, and give answers.model_url") < said.index("loading the reference")


def _without_room(request: Request) -> tuple[list[dict[str, Any]], str]:
    """In ranks of their own: the second one's device is too small."""
    plain = generate.load_model

    def load(*arguments: Any, **named: Any) -> Any:
        if comm.rank() == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 130.00 GiB")
        return plain(*arguments, **named)

    generate.load_model = load
    return all_of(request)


def test_a_model_that_a_device_has_no_room_for_is_told_and_evaluated_without_answers(tmp_path, tiny_model):
    request = asked(tmp_path, tiny_model, tiny_model)
    ((found,), said), ((other,), _) = run_ranks(_without_room, 2, request)
    for line in (found, other):
        assert "answers" not in line and "auc" in line["heldout"]
    why = f"out of memory while the reference ({tiny_model}) was loaded in float32 onto cpu to answer"
    assert f"{why}, and the evaluation goes on without answers: take a device with more memory, or serve it" in said


def _failing(request: Request) -> tuple[list[dict[str, Any]], str]:
    """In a rank of its own, which ends with it."""

    def broken(*arguments: Any, **named: Any) -> Any:
        raise AttributeError("this family has no cache")

    generate.generate = broken
    return all_of(request)


def test_a_family_that_cannot_generate_has_its_figures_all_the_same(tmp_path, tiny_model):
    for (found,), said in run_ranks(_failing, 2, asked(tmp_path, tiny_model, tiny_model)):
        assert "answers" not in found and "auc" in found["heldout"]
        assert (
            not said or said.count("answers no prompts (AttributeError: this family has no cache), and the eval") == 1
        )


def test_a_single_users_message_is_asked_in_its_bare_words(tmp_path):
    """By those who judge, and for those who read: roles stand where there are several turns."""
    said = [{"role": "user", "content": "abc"}]
    rows = [
        {"prompt": prompt, "completion": [{"role": "assistant", "content": answer}], "label": answer == "yes"}
        for prompt in ([{"role": "system", "content": "be brief"}, *said], said)
        for answer in ("yes", "no")
    ]
    log = write_jsonl(tmp_path / "log.jsonl", rows)
    examples = load(prepare(DataConfig(train=str(log), cache=str(tmp_path / "cache"), workers=1), tiny_tokenizer())[0])
    texts = {asked_of(examples, row) for row in range(len(examples))}
    assert texts == {"abc", "system: be brief\n\nuser: abc"}
