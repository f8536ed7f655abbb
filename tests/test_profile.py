"""`train.profile` and `train.deterministic` on whole runs."""

import contextlib
import gzip
import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny_runs import metrics_of, tiny_config, train_all

from kto_dist.model.footprint import Sharding, tokens_that_fit
from kto_dist.model.profile import DATA
from kto_dist.training import stepper
from kto_dist.training.config import Config
from kto_dist.training.loop import train
from kto_dist.training.profile import MAKING
from kto_dist.training.step import StepResult


def test_a_profile_leaves_a_trace_and_a_table_whose_parts_are_the_steps(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, train__profile=True, train__max_steps=6)
    run_ranks(train_all, 1, [config])
    folder = Path(config.train.output) / "profile"
    with gzip.open(folder / "trace.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"kto: KL forwards", "kto: forwards", "kto: head", "kto: backwards", "kto: optimizer"} <= names
    shares = shares_of(folder / "table.md")
    assert 0 < shares["KL forwards"] < 100 and 0 < shares["backwards"] < 100
    parts = (DATA, "KL forwards", "forwards", "backwards", "optimizer", "waiting and the rest")
    assert abs(sum(shares[name] for name in parts) - 100) < 1 or shares["waiting and the rest"] == 0


def shares_of(table: Path) -> dict[str, float]:
    rows = [line.split("|") for line in table.read_text().splitlines()[2:]]
    return {name.strip(): float(share.strip(" %")) for _, name, _, share, _ in rows}


def _with_slow_batches(config: Config) -> dict[str, float]:
    """In a rank of its own: each step's batches take about twice as long as the step before."""
    plain, asked, over = stepper.step_work, [0], [0]

    def slow(*arguments: Any) -> Any:
        asked[0], began = asked[0] + 1, time.monotonic()
        while over[0] < asked[0] - 1:
            time.sleep(1e-3)
        time.sleep(max(0.1, time.monotonic() - began))
        return plain(*arguments)

    def note(result: StepResult) -> None:
        over[0] = result.step

    stepper.step_work = slow
    train(config, watch=note)
    return shares_of(Path(config.train.output) / "profile" / "table.md")


def test_a_step_that_waits_for_its_batches_is_seen_to(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, train__profile=True, train__max_steps=5)
    (shares,) = run_ranks(_with_slow_batches, 1, config)
    assert shares[MAKING] > shares[DATA] > 5


@pytest.mark.parametrize(("steps", "looked_at"), [(1, 1), (2, 1), (4, 2)])
def test_a_short_run_has_a_profile_of_the_steps_that_it_has(tmp_path, tiny_model, tiny_log, steps, looked_at):
    config = tiny_config(tmp_path, tiny_model, tiny_log, train__profile=True, train__max_steps=steps)
    (said,) = run_ranks(_said, 1, config)
    assert f"profile of {looked_at} steps" in said
    assert said.count("train.profile looks at the run's last step") == (steps < 3)
    assert 0 < shares_of(Path(config.train.output) / "profile" / "table.md")["backwards"] < 100


def _said(config: Config) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        train_all([config])
    return " ".join(said.getvalue().split())


def test_two_deterministic_runs_agree_bit_for_bit(tmp_path, tiny_model, tiny_log):
    configs = [
        tiny_config(tmp_path, tiny_model, tiny_log, train__deterministic=True, train__output=str(tmp_path / name))
        for name in ("a", "b")
    ]
    assert run_ranks(_train_deterministic, 1, configs) == [True]
    for first, second in zip(*map(metrics_of, configs), strict=True):
        assert (first["loss"], first["grad_norm"]) == (second["loss"], second["grad_norm"])


def _train_deterministic(configs) -> bool:
    train_all(configs)
    return torch.are_deterministic_algorithms_enabled()


class Shape(torch.nn.Module):
    """A model's outline: what the estimate looks at."""

    def __init__(self, layers: int, hidden: int, inner: int, vocabulary: int):
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        self.config = LlamaConfig(
            num_hidden_layers=layers,
            hidden_size=hidden,
            intermediate_size=inner,
            vocab_size=vocabulary,
            num_attention_heads=32,
            num_key_value_heads=8,
            tie_word_embeddings=True,
        )
        with torch.device("meta"):
            self.lm = LlamaForCausalLM(self.config)

    def get_output_embeddings(self):
        return self.lm.get_output_embeddings()


def tokens(memory: float, **changes) -> int:
    sharding = {
        "stage": 2,
        "ranks": 1,
        "bf16": True,
        "offload_optimizer": False,
        "offload_parameters": False,
        "checkpointing": False,
        "logits_bytes": 2**31,
    }
    return tokens_that_fit(Shape(16, 2048, 8192, 128256), Sharding(**sharding | changes), int(memory * 2**30))


def test_the_estimate_holds_what_was_measured_and_moves_the_right_way():
    # 1.24 billion parameters took 51 GiB with 16,384 tokens a micro-batch
    assert 16384 <= tokens(64) <= 32768
    assert tokens(40) < tokens(80) <= tokens(140)
    assert tokens(64, checkpointing=True) > tokens(64)
    assert tokens(64, bf16=False) < tokens(64)
    assert tokens(40, stage=3, ranks=8) > tokens(40)
    assert tokens(8) >= 1
