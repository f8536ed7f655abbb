"""Two runs never share a folder, wherever they run, and a dead one holds nothing."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import run_ranks
from tiny_runs import tiny_config, train_all

from kto_dist.base.errors import UserError
from kto_dist.base.processes import whereabouts
from kto_dist.training.lock import ABANDONED_AFTER, NAME, RunLock

HOLD = """
import sys, time
from pathlib import Path
from kto_dist.training.lock import RunLock
RunLock(Path(sys.argv[1]), "theirs").take()
print("held", flush=True)
time.sleep(1000)
"""


def held_by_another(folder: Path) -> subprocess.Popen:
    job = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert job.stdout.readline() == "held\n"
    return job


def end(job: subprocess.Popen) -> None:
    job.kill()
    job.wait()
    job.stdout.close()


def test_a_second_run_in_a_folder_is_refused_with_the_first_ones_process(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, train__max_steps=1)
    job = held_by_another(tmp_path / "run")
    try:
        with pytest.raises(UserError, match=rf"another run \(process {job.pid} on .*wait until it has ended, stop it"):
            run_ranks(train_all, 2, [config])
        assert [path.name for path in (tmp_path / "run").iterdir()] == [NAME]
    finally:
        end(job)
    # killed, it holds nothing any more
    run_ranks(train_all, 2, [config])
    assert not (tmp_path / "run" / NAME).exists()


def test_two_runs_of_one_process_exclude_each_other(tmp_path):
    first, second = RunLock(tmp_path / "run", "a"), RunLock(tmp_path / "run", "b")
    first.take()
    with pytest.raises(UserError, match=f"process {os.getpid()} "):
        second.take()
    first.release()
    second.take()
    second.release()
    assert not (tmp_path / "run").exists()


def test_hosts_of_one_run_may_share_the_folder(tmp_path):
    first, second = RunLock(tmp_path, "same"), RunLock(tmp_path, "same")
    first.take()
    second.take()
    second.release()
    assert (tmp_path / NAME).exists()


@pytest.mark.parametrize(("age", "held"), [(0.0, True), (ABANDONED_AFTER + 60, False)])
def test_a_run_of_another_machine_counts_while_it_renews_its_lock(tmp_path, age, held):
    """Also where this machine's locks say nothing of that one's."""
    lock = tmp_path / NAME
    lock.write_text(json.dumps({**whereabouts(), "host": "elsewhere", "boot": "another", "job": "theirs"}))
    os.utime(lock, (time.time() - age,) * 2)
    mine = RunLock(tmp_path, "mine")
    if held:
        with pytest.raises(UserError, match=r"on elsewhere\).*or remove .*run.lock if that machine is gone"):
            mine.take()
    else:
        mine.take()
        mine.release()


@pytest.mark.parametrize(
    "since", [{"boot": "before"}, {"namespace": "gone"}, {"namespace": "gone", "host": "container"}]
)
def test_what_a_machine_or_a_container_held_before_it_was_ended_is_free(tmp_path, since):
    lock = tmp_path / NAME
    lock.write_text(json.dumps({**whereabouts(), "job": "theirs", **since}))
    mine = RunLock(tmp_path, "mine")
    mine.take()
    mine.release()


def test_another_container_of_this_machine_that_is_at_work_is_seen(tmp_path):
    job = held_by_another(tmp_path)
    lock = tmp_path / NAME
    lock.write_text(json.dumps({**json.loads(lock.read_text()), "namespace": "other", "host": "container"}))
    try:
        with pytest.raises(UserError, match="another run .* is at work"):
            RunLock(tmp_path, "mine").take()
    finally:
        end(job)


@pytest.mark.parametrize("content", (b"", b"{", b"[]", b"\xff", json.dumps({"pid": 1}).encode()))
def test_a_damaged_lock_that_nobody_holds_stops_nobody(tmp_path, content):
    (tmp_path / NAME).write_bytes(content)
    mine = RunLock(tmp_path, "mine")
    mine.take()
    mine.release()


def test_a_process_that_starts_again_in_place_takes_its_own_lock(tmp_path):
    code = HOLD.replace("time.sleep(1000)", "import os; os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])")
    again = code.replace("import os", "import os; os.environ.get('AGAIN') and sys.exit(); os.environ['AGAIN'] = 'yes'")
    done = subprocess.run([sys.executable, "-c", again, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "held\nheld\n", done.stderr


def test_a_lock_leaves_no_folder_where_nothing_was_written(tmp_path):
    lock = RunLock(tmp_path / "new" / "run", "mine")
    lock.take()
    assert (tmp_path / "new" / "run").exists()
    lock.release()
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_made_is_refused_with_its_setting(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"train.output \(.*file/run\) cannot be written: .*give a folder"):
        RunLock(tmp_path / "file" / "run", "mine").take()
