"""The policy engine: DeepSpeed's options from ours and the user's, and settings that must not change the result."""

import fcntl
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from ranks import run_ranks
from tiny_runs import metrics_of, tiny_config, train_all, weights_of

from kto_dist.base.errors import UserError
from kto_dist.model.options import claim_swap_folders, deepspeed_options, release_swap_folder
from kto_dist.training.config import Config


def options_of(config: Config, dtype: torch.dtype) -> dict:
    return deepspeed_options(config.deepspeed, dtype, config.train.clip)


def with_file(tmp_path, options: object, **changes: object) -> Config:
    file = tmp_path / "deepspeed.json"
    file.write_text(options if isinstance(options, str) else json.dumps(options))
    return tiny_config(tmp_path, tmp_path, tmp_path, deepspeed__config=str(file), **changes)


def test_the_users_options_are_merged_into_ours(tmp_path):
    mine = {"zero_optimization": {"overlap_comm": False, "reduce_bucket_size": 1000}, "wall_clock_breakdown": True}
    options = options_of(with_file(tmp_path, mine), torch.float32)
    assert options["zero_optimization"] == {"stage": 2, "overlap_comm": False, "reduce_bucket_size": 1000}
    assert options["wall_clock_breakdown"] is True
    assert options["gradient_clipping"] == 1.0


def test_a_file_made_for_another_trainer_means_ours_where_it_says_auto(tmp_path):
    theirs = {
        "bf16": {"enabled": "auto"},
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": 2},
        "fp16": {"enabled": False},
    }
    options = options_of(with_file(tmp_path, theirs), torch.bfloat16)
    assert options == options_of(tiny_config(tmp_path, tmp_path, tmp_path), torch.bfloat16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"zero_optimization": {"stage": 3}},
            r"zero_optimization.stage \(3\) contradicts this run's 2.*deepspeed.zero_st",
        ),
        ({"bf16": {"enabled": True}}, r"bf16.enabled \(true\) contradicts this run's false.*train.dtype"),
        ({"fp16": {"enabled": True}}, r"fp16.enabled \(true\) contradicts this run's \"unset\".*train.dtype"),
        ({"train_batch_size": 64}, r"train_batch_size \(64\) contradicts.*train.global_batch"),
        ({"gradient_clipping": 0.5}, r"gradient_clipping \(0.5\) contradicts this run's 1.0.*train.clip"),
        ({"optimizer": {"type": "Adam"}}, r"optimizer .*contradicts.*train.lr"),
        ({"scheduler": {"type": "WarmupLR"}}, r"scheduler .*contradicts.*train.schedule"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            r"zero_optimization.offload_optimizer.device \(\"cpu\"\) contradicts.*deepspeed.offload_optimizer",
        ),
    ],
)
def test_a_contradiction_names_both_values_and_the_setting_to_change(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        options_of(with_file(tmp_path, options), torch.float32)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is not readable as JSON"), ("[]", "must hold a JSON object")],
)
def test_a_broken_options_file_is_an_error(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        options_of(with_file(tmp_path, content), torch.float32)


def test_a_missing_options_file_is_an_error(tmp_path):
    config = tiny_config(tmp_path, tmp_path, tmp_path, deepspeed__config="nowhere.json")
    with pytest.raises(UserError, match=r"deepspeed.config \(nowhere.json\) does not exist"):
        options_of(config, torch.float32)


@pytest.fixture(scope="module")
def plain(tmp_path_factory, tiny_model, tiny_log) -> Config:
    config = tiny_config(tmp_path_factory.mktemp("plain"), tiny_model, tiny_log)
    run_ranks(train_all, 1, [config])
    return config


needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++")), reason="no C++ compiler"
)


@pytest.mark.timeout(1000)
@pytest.mark.parametrize(
    "changes",
    [
        {"model__gradient_checkpointing": True, "deepspeed__zero_stage": 2},
        {"model__gradient_checkpointing": True, "deepspeed__zero_stage": 3},
        {"model__attention": "eager"},
        {"train__logits_mebibytes": 1},
        {"deepspeed__zero_stage": 1},
        {"deepspeed__zero_stage": 3, "deepspeed__offload_parameters": "cpu"},
        pytest.param({"deepspeed__zero_stage": 2, "deepspeed__offload_optimizer": "cpu"}, marks=needs_compiler),
        pytest.param(
            {
                "deepspeed__zero_stage": 3,
                "deepspeed__offload_optimizer": "cpu",
                "deepspeed__offload_parameters": "cpu",
                "train__packing": True,
            },
            marks=needs_compiler,
        ),
    ],
    ids=lambda changes: ",".join(f"{key}={value}" for key, value in changes.items()),
)
def test_what_saves_memory_leaves_the_trajectory_alone(tmp_path, tiny_model, tiny_log, plain, changes):
    config = tiny_config(tmp_path, tiny_model, tiny_log, **changes)
    # long enough for the first build of DeepSpeed's CPU optimizer
    run_ranks(train_all, 2, [config], timeout=900)
    for expected, found in zip(metrics_of(plain), metrics_of(config), strict=True):
        for name in ("loss", "kl_raw", "grad_norm"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), (expected["step"], name)
    found_weights = weights_of(config)
    for name, tensor in weights_of(plain).items():
        assert torch.norm(found_weights[name] - tensor) <= 1e-4 * torch.norm(tensor), name


@pytest.mark.parametrize("clip", (0.0, 0.05))
def test_clipping_bounds_the_update_and_the_norm_is_reported_unclipped(tmp_path, tiny_model, tiny_log, plain, clip):
    config = tiny_config(tmp_path, tiny_model, tiny_log, train__clip=clip, train__max_steps=2, train__warmup=0)
    unclipped = tiny_config(
        tmp_path, tiny_model, tiny_log, train__output=str(tmp_path / "b"), train__max_steps=2, train__warmup=0
    )
    run_ranks(train_all, 1, [config, unclipped])
    first, reference = metrics_of(config)[0], metrics_of(unclipped)[0]
    assert first["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-6)
    assert first["grad_norm"] > 0.05
    # the second step sees the first one's update
    same = metrics_of(config)[1]["loss"] == pytest.approx(metrics_of(unclipped)[1]["loss"], rel=1e-7)
    assert same == (clip == 0.0 and reference["grad_norm"] <= 1.0)


def test_training_in_bf16_follows_training_in_fp32(tmp_path, tiny_model, tiny_log, plain):
    config = tiny_config(tmp_path, tiny_model, tiny_log, train__dtype="bf16", reference__dtype="bf16")
    run_ranks(train_all, 2, [config])
    for expected, found in zip(metrics_of(plain), metrics_of(config), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=0.02)


def test_the_learned_rule_shows_on_held_out_rows(tmp_path, tiny_model, tiny_log):
    config = tiny_config(
        tmp_path, tiny_model, tiny_log, data__heldout=0.3, train__max_steps=30, train__lr=3e-3, objective__beta=0.2
    )
    ((summary,),) = run_ranks(train_all, 1, [config])
    before, after = summary["heldout"]["before"], summary["heldout"]["after"]
    assert after["auc"] > max(0.8, before["auc"])
    assert after["rewards/desirable"] > after["rewards/undesirable"]
    assert after["loss"] < before["loss"]


def train_and_count(config):
    """The summary, and in how many evaluations the policy ran."""
    from kto_dist import train
    from kto_dist.training import stepper

    ran, under = [], stepper.under

    def counted(*arguments, **named):
        ran.append(1)
        return under(*arguments, **named)

    stepper.under = counted
    return train(config), len(ran)


@pytest.mark.parametrize("same", (True, False))
def test_held_out_rows_before_training_are_those_of_the_reference_where_it_is_the_start(
    tmp_path, tiny_model, tiny_log, same
):
    changes = {} if same else {"reference__path": str(shutil.copytree(tiny_model, tmp_path / "other"))}
    config = tiny_config(tmp_path, tiny_model, tiny_log, data__heldout=0.3, train__max_steps=2, **changes)
    ((summary, evaluations),) = run_ranks(train_and_count, 1, config)
    assert evaluations == (1 if same else 2)
    before = summary["heldout"]["before"]
    assert before["rewards/desirable"] == pytest.approx(0.0, abs=0.0 if same else 1e-5)
    assert before["rewards/desirable"] != summary["heldout"]["after"]["rewards/desirable"]


def test_swap_folders_of_killed_jobs_are_removed_and_those_of_living_ones_stay(tmp_path):
    for name in ("kto-1-1", "kto-2-2", "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights.swp").touch()
    (tmp_path / "kto-1-1.lock").touch()
    own = str(tmp_path / "kto-3-3")
    options = {"zero_optimization": {"offload_param": {"nvme_path": own}, "offload_optimizer": {"nvme_path": own}}}
    with open(tmp_path / "kto-2-2.lock", "w") as living:
        fcntl.flock(living, fcntl.LOCK_SH)
        assert claim_swap_folders(options) == {own}
        assert {path.name for path in tmp_path.iterdir()} == {"kto-2-2", "kto-2-2.lock", "kto-3-3.lock", "mine"}
        release_swap_folder(own)
        assert not (tmp_path / "kto-3-3.lock").exists()
    assert claim_swap_folders({"zero_optimization": {"stage": 2}}) == set()


def test_a_swap_folder_that_cannot_be_made_is_told_with_its_path(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"nvme_path \(.*file\) cannot be used"):
        claim_swap_folders({"zero_optimization": {"offload_param": {"nvme_path": str(tmp_path / "file" / "kto-1-1")}}})


def test_a_rank_starts_without_compilers_and_without_what_only_some_runs_need():
    """Each of these takes every rank's start longer; MLflow and the report's plots come when they are needed."""
    code = (
        "import sys\n"
        "started = []\n"
        "sys.addaudithook(lambda event, about: started.append(about[0]) if event == 'subprocess.Popen' else None)\n"
        "import kto_dist.training.loop\n"
        "needless = {'mlflow', 'pandas', 'matplotlib', 'scipy.stats'} & set(sys.modules)\n"
        "print('started:', [program for program in started if program != 'uname'], 'needless:', needless)\n"
        "import mlflow\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr  # MLflow can be imported afterwards
    assert "started: [] needless: set()" in done.stdout
