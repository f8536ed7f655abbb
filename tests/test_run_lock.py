"""Two runs never share a folder, wherever they run, and a dead one holds nothing."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from ranks import run_ranks
from tiny_runs import tiny_config, train_all

from kto_dist.base.errors import UserError
from kto_dist.base.processes import whereabouts
from kto_dist.training.lock import ABANDONED_AFTER, NAME, Patience, RunLock

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


def test_a_lock_says_who_holds_it_to_other_hosts_as_well(tmp_path, monkeypatch):
    """A network file system keeps what is not flushed to itself, and another host of the run would be refused."""
    sync, flushed = os.fsync, []

    def noting(descriptor: int) -> None:
        flushed.append(os.pread(descriptor, 4096, 0))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    lock = RunLock(tmp_path, "mine")
    lock.take()
    assert [json.loads(content)["job"] for content in flushed] == ["mine"]
    lock.release()


def test_hosts_of_one_run_may_share_the_folder(tmp_path):
    first, second = RunLock(tmp_path, "same"), RunLock(tmp_path, "same")
    first.take()
    second.take()
    second.release()
    assert (tmp_path / NAME).exists()


def of_another_machine(folder: Path, age: float) -> Path:
    """A lock that was renewed so many seconds ago."""
    lock = folder / NAME
    lock.write_text(json.dumps({**whereabouts(), "host": "elsewhere", "boot": "another", "job": "theirs"}))
    os.utime(lock, (time.time() - age,) * 2)
    return lock


def test_a_run_of_another_machine_counts_while_it_renews_its_lock(tmp_path):
    """Also where this machine's locks say nothing of that one's."""
    lock, over = of_another_machine(tmp_path, age=30.0), threading.Event()

    def renew() -> None:
        while not over.wait(0.1):
            os.utime(lock)

    thread, said = threading.Thread(target=renew), []
    thread.start()
    try:
        mine = RunLock(tmp_path, "mine", said.append, Patience(silence=60.0, between_looks=0.01))
        with pytest.raises(UserError, match=r"on elsewhere\).*or remove .*run.lock if that machine is gone"):
            mine.take()
    finally:
        over.set()
        thread.join()
    assert len(said) == 1 and "waiting 60 s for a sign of life" in said[0] and "on elsewhere" in said[0]
    assert json.loads(lock.read_text())["job"] == "theirs"


@pytest.mark.parametrize(("age", "words"), [(0.0, 1), (ABANDONED_AFTER + 60, 0)], ids=("fresh", "old"))
def test_a_machine_that_was_lost_holds_nothing(tmp_path, age, words):
    """A container that is killed leaves a fresh lock, and its scheduler starts the job again at once, elsewhere: an
    error of the user's would end all further starts."""
    of_another_machine(tmp_path, age)
    said: list[str] = []
    mine = RunLock(tmp_path, "mine", said.append, Patience(silence=0.3, between_looks=0.01))
    started = time.monotonic()
    mine.take()
    assert time.monotonic() - started > 0.3 * words and len(said) == words
    assert json.loads((tmp_path / NAME).read_text())["job"] == "mine"
    mine.release()


def test_of_two_that_start_at_once_without_locks_the_last_to_write_has_the_folder(tmp_path, monkeypatch):
    """As on a network disk without `flock`; whoever gives way leaves the other's lock where it is."""

    def no_locks(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    elsewhere = {"host": "elsewhere", "boot": "another"}
    lock, theirs = tmp_path / NAME, json.dumps({**whereabouts(), **elsewhere, "job": "theirs"})

    sleep, here = time.sleep, threading.current_thread()

    def write_too(seconds: float) -> None:
        """While the other one waits whether somebody does."""
        if threading.current_thread() is not here or "mine" not in lock.read_text():
            return sleep(seconds)
        lock.write_text(theirs)

    mine = RunLock(tmp_path, "mine")
    with monkeypatch.context() as patched:
        patched.setattr(time, "sleep", write_too)
        with pytest.raises(UserError, match=r"on elsewhere\) has started in train.output .* at the same time"):
            mine.take()
    mine.release()
    assert lock.read_text() == theirs


@pytest.mark.parametrize(
    "since", [{"boot": "before"}, {"namespace": "gone"}, {"namespace": "gone", "host": "container"}]
)
def test_what_a_machine_or_a_container_held_before_it_was_ended_is_free(tmp_path, monkeypatch, since):
    lock, clock = tmp_path / NAME, time.clock_gettime
    lock.write_text(json.dumps({**whereabouts(), "job": "theirs", **since}))
    if "boot" in since:  # the machine has just been started
        os.utime(lock, (time.time() - 5.0,) * 2)
        monkeypatch.setattr(time, "clock_gettime", lambda name: 2.0 if name == time.CLOCK_BOOTTIME else clock(name))
    said: list[str] = []
    mine = RunLock(tmp_path, "mine", said.append)
    mine.take()
    assert not said
    mine.release()


def test_machines_that_are_called_alike_do_not_share_a_folder(tmp_path):
    """As two containers of one name: this machine has been up for longer than the lock has not been renewed."""
    lock, said = tmp_path / NAME, list[str]()
    lock.write_text(json.dumps({**whereabouts(), "boot": "another", "job": "theirs"}))

    def renew(text: str) -> None:
        said.append(text)
        os.utime(lock, (time.time() + 1.0,) * 2)

    with pytest.raises(UserError, match="another run .* is at work"):
        RunLock(tmp_path, "mine", renew, Patience(silence=60.0, between_looks=0.01)).take()
    assert len(said) == 1


def test_who_has_lost_its_lock_leaves_that_of_another_run(tmp_path):
    """Stopped for so long that another machine went on without a sign of life."""
    mine = RunLock(tmp_path, "mine")
    mine.take()
    theirs = of_another_machine(tmp_path, age=0.0)
    mine.release()
    assert json.loads(theirs.read_text())["job"] == "theirs"


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
