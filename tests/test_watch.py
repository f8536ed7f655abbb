"""A rank that is silent, or that the others wait for, ends the job by name, within `cluster.timeout`."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from ranks import run_ranks

from kto_dist.base import comm, doing, restart, watch
from kto_dist.base.doing import Place
from kto_dist.base.hosts import Host
from kto_dist.commands import entry

HOSTS = [Host(0, "a"), Host(0, "a"), Host(2, "b"), Host(2, "b")]


def beats(*waits: bool, still: float = 0.0) -> list[watch.Beat]:
    return [
        watch.Beat(number=1, place=Place(phase="training", at=f"x.py:{rank}", waits=wait, still=still))
        for rank, wait in enumerate(waits)
    ]


def test_silent_ranks_are_named_with_host_phase_and_place():
    said = watch.verdict(beats(True, True, True, True), [0, 0, 0, 61.0], HOSTS, 60)
    assert said == (
        "b (rank 3): nothing was heard for 61 s: killed, stopped or cut off. "
        "b (rank 3): last seen in phase training, at x.py:3"
    )
    assert watch.verdict(beats(True, True, True, True), [0, 0, 0, 59.0], HOSTS, 60) is None


def test_ranks_that_the_others_wait_for_are_named():
    said = watch.verdict(beats(True, False, True, True, still=70), [0] * 4, HOSTS, 60)
    assert said.startswith("a (rank 1): the other ranks have waited 70 s.") and said.endswith("at x.py:1")
    assert watch.verdict(beats(True, False, True, True, still=50), [0] * 4, HOSTS, 60) is None
    # unless it is itself silent
    said = watch.verdict(beats(True, False, True, True, still=70), [0, 9, 0, 0], HOSTS, 60)
    assert said.startswith("a (rank 1): nothing was heard for 9 s")
    # who works for long while nobody waits is left alone
    assert watch.verdict(beats(False, False, False, False, still=1e6), [0] * 4, HOSTS, 60) is None


def test_ranks_that_all_wait_are_named_with_their_places():
    said = watch.verdict(beats(True, True, True, True, still=70), [0] * 4, HOSTS, 60)
    assert "all ranks have waited 70 s for each other" in said and "b (rank 2): last seen" in said


def test_the_job_ends_before_its_timeout():
    assert watch.limit(600) == 590 and watch.limit(10) == 8


def test_a_beat_survives_its_way():
    (beat,) = beats(True)
    assert watch.Beat.of(beat.text()) == beat


def test_a_thread_sees_where_the_main_thread_is_and_whether_it_moves():
    observer = doing.Observer()
    doing.enter("here")
    first = observer.place()
    assert first.phase == "here" and not first.waits
    doing.count()
    assert observer.place().still < 5


def _told_twice(phase: str) -> threading.Event:
    """Is set when this rank has said, from its thread, that it is in this phase, and says so again."""
    told, real, count = threading.Event(), watch.Beat.text, [0]

    def text(beat: watch.Beat) -> str:
        count[0] += beat.place.phase == phase
        if count[0] > 1:  # the one before has been sent
            told.set()
        return real(beat)

    watch.Beat.text = text
    return told


def _job(folder: Path, role: str) -> int:
    """Rank 1 stops, dies or hangs in the midst of a run, while the others wait for it in a collective."""
    rank = comm.rank()
    os.environ["KTO_DIST_HOST"] = f"node-{rank}"
    os.environ["LOCAL_RANK"] = "0"
    os.dup2(os.open(folder / f"said-{rank}", os.O_WRONLY | os.O_CREAT), 2)
    which, told = 0 if role == "first stopped" else 1, _told_twice("training")

    def work() -> None:
        # one that is killed is missed at once; of one that stops after some looks it is nearly over by then
        comm.set_timeout(120 if role == "killed" else 20)
        doing.enter("training")
        if rank == which:
            (folder / "pid").write_text(str(os.getpid()))
            told.wait()
            if role == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if role.endswith("stopped"):
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(300)
        comm.barrier()

    return entry.main(["train"], work_of=lambda job, words: work)


@pytest.mark.parametrize(
    ("role", "words"),
    [
        ("killed", "node-1 (rank 1): nothing was heard for"),
        pytest.param("stopped", "node-1 (rank 1): nothing was heard for", marks=pytest.mark.soak),
        pytest.param("first stopped", "node-0 (rank 0): nothing was heard for", marks=pytest.mark.soak),
        pytest.param("hung", "node-1 (rank 1): the other ranks have waited", marks=pytest.mark.soak),
    ],
)
def test_a_rank_that_is_lost_ends_the_job_and_is_named(tmp_path, role, words):
    with pytest.raises((RuntimeError, TimeoutError)):
        run_ranks(_job, 3, tmp_path, role, timeout=100 if role == "stopped" else 250)
    # whoever of the others is first says it, each for its host, and ends the job
    told = "".join((tmp_path / f"said-{rank}").read_text() for rank in range(3))
    assert words in told, told
    if role != "first stopped":
        assert "in phase training" in told
    if role == "hung":
        assert "test_watch.py" not in told  # the project's own code is named
    if role == "stopped" and (pid := int((tmp_path / "pid").read_text())):
        assert not Path(f"/proc/{pid}").exists() or os.kill(pid, signal.SIGKILL) is None


def _timeout_of_groups(model: Path, log: Path, folder: Path) -> list[float]:
    import torch.distributed as dist
    from tiny_runs import tiny_config

    from kto_dist.training.loop import train

    config = tiny_config(folder, model, log, train__max_steps=1, cluster__timeout=77)
    found: list[float] = []

    def look(result: object) -> None:
        for group in dist.distributed_c10d._world.pg_map:
            found.append(group._get_backend(comm.device()).options._timeout.total_seconds())

    train(config, watch=look)
    return found


def test_groups_that_deepspeed_makes_wait_as_long_as_ours(tmp_path, tiny_model, tiny_log):
    for found in run_ranks(_timeout_of_groups, 2, tiny_model, tiny_log, tmp_path):
        assert len(found) > 1 and set(found) == {77.0}


def test_a_restart_is_not_taken_for_a_loss():
    assert restart.SECONDS_OF_SILENCE > 2 * restart.SECONDS_BETWEEN_LOOKS
