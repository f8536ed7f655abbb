"""A pass of several ranks or hosts: one's trouble is everyone's, and nobody needs a shared file system."""

import os
import resource
from pathlib import Path

import pytest
from ranks import run_ranks
from reference_runs import as_hosts, logps_of_pairs, score, scored_and_found, with_a_store_of_its_own, with_forward
from tiny import save_tiny, thumbs, write_jsonl
from tiny_runs import tiny_config

from kto_dist.base.console import Console
from kto_dist.base.errors import UserError
from kto_dist.training.config import Config


def _with_no_room_on_one_rank(config: Config) -> str:
    """Rank 1 may write no file of more than a few hundred bytes."""
    if os.environ["RANK"] == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
    try:
        scored_and_found(config)
    except UserError as error:
        return str(error)
    return "nothing"


def test_trouble_of_one_rank_with_its_store_ends_all_of_them_with_its_message(tmp_path, tiny_model, tiny_log):
    said = run_ranks(_with_no_room_on_one_rank, 2, tiny_config(tmp_path, tiny_model, tiny_log))
    assert said[0] == said[1] and "is full: make room; what has been scored so far is kept" in said[0]


def test_hosts_may_differ_in_what_the_policy_alone_uses(tmp_path, tiny_model, tiny_log):
    configs = [
        tiny_config(tmp_path / name, tiny_model, tiny_log, train__dtype=dtype, train__max_steps=1)
        for name, dtype in (("a", "fp32"), ("b", "bf16"))
    ]
    assert run_ranks(as_hosts, 2, configs) == ["nothing", "nothing"]


def _on_a_host_of_its_own(config: Config) -> tuple[int, int, float]:
    own = with_a_store_of_its_own(config)
    scored, found = scored_and_found(own)
    return scored, found, float(logps_of_pairs(own).sum())


def test_hosts_need_no_shared_file_system(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log)
    (scored, _, first), (_, _, second) = run_ranks(_on_a_host_of_its_own, 2, config)
    assert scored and first == second
    shards = [list(Path(f"{tmp_path}/store-{rank}").glob("*/*.parquet")) for rank in (0, 1)]
    assert all(shards) and len(shards[0]) == len(shards[1])
    # each host holds what it scored, and together they miss nothing
    again = run_ranks(_on_a_host_of_its_own, 2, config)
    assert [(scored, total) for scored, _, total in again] == [(0, first), (0, first)]


def _with_a_rank_that_differs(config: Config, trouble: str) -> tuple[str, bool | None, int]:
    """What was said, whether prompts were shared, and how many references were loaded but not closed."""
    still_open, second = [], os.environ["RANK"] == "1"

    def strange(forward):
        def changed(**batch):
            if trouble == "checking" and batch.get("head") is not None:
                return forward(**batch) + 9.0  # not what the model's own logits say
            return forward(**batch)

        return changed if second else forward

    def refuse_trees(module, inputs, batch):
        mask = batch.get("attention_mask")
        if mask is not None and mask.dim() == 4:
            raise RuntimeError("no such mask")

    class Watched(with_forward(strange)):
        def __init__(self, *arguments, **settings):
            if trouble == "loading" and second:
                raise UserError("the weights are damaged")
            super().__init__(*arguments, **settings)
            still_open.append(self)
            if trouble == "sharing" and second:
                self.model.register_forward_pre_hook(refuse_trees, with_kwargs=True)

        def close(self, **settings):
            super().close(**settings)
            still_open.remove(self)

    try:
        outcome = score(config, engine=Watched).outcome
    except UserError as error:
        return str(error), None, len(still_open)
    return "", outcome.shared, len(still_open)


@pytest.mark.parametrize(
    ("trouble", "share", "said", "shared"),
    [
        ("none", "auto", "", True),
        ("loading", "auto", "the weights are damaged", None),
        ("checking", "auto", "LlamaForCausalLM changes the logits after its LM head", None),
        ("sharing", True, "reference.share_prefixes is true, but completions of one prompt see each other", None),
        ("sharing", "auto", "", False),
    ],
)
def test_one_ranks_trouble_with_its_model_is_everyones_and_leaves_none_in_memory(
    tmp_path, tiny_model, tiny_log, trouble, share, said, shared
):
    config = tiny_config(tmp_path, tiny_model, tiny_log, reference__share_prefixes=share)
    for message, decided, still_open in run_ranks(_with_a_rank_that_differs, 2, config, trouble):
        assert message.startswith(said) and bool(message) == bool(said)
        assert decided == shared and still_open == 0


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("the reference's weights", {}),
        ("what data.train gives as tokens", {}),
        ("reference.dtype", {"reference__dtype": "bf16"}),
        ("reference.attention", {"reference__attention": "eager"}),
        ("reference.packing", {"reference__packing": True}),
        ("reference.share_prefixes", {"reference__share_prefixes": True}),
    ],
)
def test_hosts_that_differ_are_refused_before_anything_is_stored(tmp_path, tiny_model, tiny_log, what, changes):
    """`auto` may pick differently on hosts with different devices, and a copy of a model may be an older one."""
    model, log = tiny_model, tiny_log
    if what == "the reference's weights":
        model = save_tiny(tmp_path / "model", seed=1)
    elif what == "what data.train gives as tokens":
        log = write_jsonl(tmp_path / "log.jsonl", thumbs(60, 20, seed=7))
    plain = {"reference__share_prefixes": False, "reference__packing": False}
    configs = [
        tiny_config(tmp_path / "a", tiny_model, tiny_log, **plain),
        tiny_config(tmp_path / "b", model, log, **{**plain, **changes}),
    ]
    said = run_ranks(as_hosts, 2, configs)
    assert said[0] == said[1]
    if what in ("the reference's weights", "what data.train gives as tokens"):
        assert said[0].startswith(f"{what} differs between hosts (")
    else:
        assert said[0].startswith("hosts disagree") and f"  {what}: " in said[0]
    assert not list(tmp_path.rglob("*.parquet"))


def _warnings_of_rank_0(config: Config) -> list[str]:
    """Where each rank has a store of its own."""
    said, console = [], Console()
    console.warn = said.append
    score(with_a_store_of_its_own(config), console)
    return said


def test_what_another_ranks_store_has_to_say_is_told_once(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, train__max_steps=1)
    run_ranks(_on_a_host_of_its_own, 2, config)
    for rank in (0, 1):
        (folder,) = Path(f"{config.reference.store}-{rank}").iterdir()
        (folder / f"{0:064x}.parquet").write_bytes(b"damaged on both")
        if rank == 1:
            (folder / f"{1:064x}.parquet").write_bytes(b"damaged on this one alone")
    said = run_ranks(_warnings_of_rank_0, 2, config)[0]
    assert [text.partition(" in the reference store is damaged")[0] for text in said] == [
        f"{0:064x}.parquet",
        f"{1:064x}.parquet",
    ]
