"""A start never waits in silence for a compiled op: not for a lock that nobody holds, and not for ever."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kto_dist.base.errors import UserError
from kto_dist.model.config import DeepspeedConfig
from kto_dist.model.ops import Patience, compile_ops, needed

HASTY = Patience(between_looks=0.02, between_words=0.1, quiet=600.0, bound=240.0)


@pytest.fixture
def extensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    return tmp_path / "extensions"


def building(extensions: Path, code: str = "pass") -> Callable[[str], list[str]]:
    """A build in place of DeepSpeed's: it makes the op, and adds a line to `builds`."""
    made = f"import pathlib; p = pathlib.Path({str(extensions)!r}); {code}; (p / 'op' / 'op.so').touch(); "
    return lambda op: [sys.executable, "-c", made + "(p / 'builds').open('a').write('built\\n')"]


def builds(extensions: Path) -> int:
    return len((extensions / "builds").read_text().splitlines())


def lock_of(extensions: Path, age: float) -> Path:
    lock = extensions / "op" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    for path in (lock, lock.parent):
        os.utime(path, (time.time() - age,) * 2)
    return lock


def test_an_op_is_built_once_for_its_versions(extensions):
    said: list[str] = []
    for _ in range(3):
        compile_ops(["op"], said.append, build=building(extensions))
    assert builds(extensions) == 1 and len(said) == 1 and "compiling DeepSpeed's op" in said[0]
    note = extensions / "op" / "built.json"
    note.write_text(note.read_text().replace('"torch": "', '"torch": "0.'))
    compile_ops(["op"], said.append, build=building(extensions))
    assert builds(extensions) == 2


def test_a_lock_that_a_killed_build_left_is_removed_and_said(extensions):
    lock, said = lock_of(extensions, age=3600.0), []
    compile_ops(["op"], said.append, build=building(extensions), patience=HASTY)
    assert not lock.exists() and builds(extensions) == 1
    assert said[0] == f"removing {lock}: a build of DeepSpeed's op was killed there"


def test_a_build_of_ours_that_was_killed_is_known_to_be_gone_at_once(extensions):
    """Its lock is as young as can be."""
    killed = "(p / 'op' / 'lock').touch(); import os; os.kill(os.getppid(), 9)"
    code = (
        "import sys; sys.path[:0] = ['tests']\n"
        "from test_ops import *\n"
        f"compile_ops(['op'], print, build=building(Path({str(extensions)!r}), {killed!r}), patience=HASTY)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == -9
    lock = extensions / "op" / "lock"
    while not (extensions / "builds").exists():  # the build itself lives on a little
        time.sleep(0.05)
    assert lock.exists()
    compile_ops(["op"], lambda text: None, build=building(extensions), patience=HASTY)
    assert not lock.exists()


def test_a_build_at_work_is_waited_for_and_named(extensions):
    """It ends when it was named some times."""
    lock_of(extensions, age=3600.0).unlink()
    hold = (
        "import os, sys\n"
        "fd = os.open(sys.argv[1], os.O_CREAT | os.O_EXCL)\n"
        "print('held', flush=True); sys.stdin.read(); os.remove(sys.argv[1])\n"
    )
    command = [sys.executable, "-c", hold, str(extensions / "op" / "lock")]
    said: list[str] = []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"

        def say(text: str) -> None:
            said.append(text)
            if len(said) == 4:
                holder.stdin.close()

        compile_ops(["op"], say, build=building(extensions), patience=HASTY)
    assert f"waiting since 0 s: process {holder.pid} compiles DeepSpeed's op" in said[0]
    assert len(said) > 3 and builds(extensions) == 1


def test_a_build_at_work_is_seen_through_a_link_and_beside_the_note_of_one_that_ended(extensions, monkeypatch):
    """Such a note names a process that is gone, and a lock was taken for its."""
    link = extensions.with_name("link")
    extensions.mkdir()
    link.symlink_to(extensions)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(link))
    compile_ops(["op"], lambda text: None, build=building(extensions))
    note = extensions / "op" / "built.json"
    content = json.loads(note.read_text())
    note.write_text(json.dumps({"by": content["by"] | {"pid": 2**22 + 1}, "for": {}}))
    lock, said = extensions / "op" / "lock", []
    with lock.open("w"), pytest.raises(UserError, match="for more than 0 s: end it"):
        compile_ops(["op"], said.append, build=building(extensions), patience=Patience(between_looks=0.02, bound=0.3))
    assert lock.exists() and f"process {os.getpid()} compiles DeepSpeed's op" in said[0]
    # of a build on another machine, which nobody here has open
    patience = Patience(between_looks=0.02, quiet=600.0, bound=0.3)
    with pytest.raises(UserError, match="somebody compiles DeepSpeed's op"):
        compile_ops(["op"], said.append, build=building(extensions), patience=patience)
    assert lock.exists() and builds(extensions) == 1


def test_a_place_that_cannot_be_written_is_told_with_its_setting(extensions):
    extensions.write_text("a file in place of the folder")
    with pytest.raises(UserError, match=r"op has no place to be compiled: .*TORCH_EXTENSIONS_DIR.*set the offload"):
        compile_ops(["op"], print, build=building(extensions))


def test_a_build_by_nobody_knows_whom_is_waited_for_while_it_writes_and_not_for_ever(extensions):
    lock_of(extensions, age=0.0)
    said: list[str] = []
    with pytest.raises(UserError, match="somebody compiles DeepSpeed's op: .*, for more than 0 s: end it"):
        compile_ops(["op"], said.append, build=building(extensions), patience=Patience(between_looks=0.02, bound=0.3))
    quick = Patience(between_looks=0.02, quiet=0.2, bound=240.0)
    compile_ops(["op"], said.append, build=building(extensions), patience=quick)
    assert builds(extensions) == 1


def test_of_two_starts_at_once_one_builds_and_the_other_says_that_it_waits(extensions, tmp_path):
    """The build ends when that was said."""
    waited = tmp_path / "waited"
    slow = building(extensions, f"import os, time\nwhile not os.path.exists({str(waited)!r}): time.sleep(0.01)\n0")

    def say(text: str) -> None:
        if "another start compiles DeepSpeed's op" in text:
            waited.touch()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: compile_ops(["op"], say, build=slow, patience=HASTY), range(2)))
    assert builds(extensions) == 1 and waited.exists()


@pytest.mark.parametrize(
    ("code", "bound", "message"),
    [
        ("raise SystemExit('no compiler')", 240.0, "op cannot be compiled: no compiler. It needs a C.. compiler"),
        ("import time; time.sleep(1000)", 1.0, "DeepSpeed's op was not compiled within 1 s: try again"),
    ],
)
def test_a_build_that_fails_or_does_not_end_is_a_message(extensions, code, bound, message):
    with pytest.raises(UserError, match=message):
        compile_ops(["op"], print, build=building(extensions, code), patience=Patience(bound=bound))


def test_ops_are_needed_where_something_is_offloaded():
    assert needed(DeepspeedConfig()) == []
    assert needed(DeepspeedConfig(zero_stage=2, offload_optimizer="cpu")) == ["cpu_adam"]
    nvme = {"zero_stage": 3, "nvme_path": "/disk"}
    assert needed(DeepspeedConfig(offload_parameters="nvme", **nvme)) == ["async_io"]
    assert needed(DeepspeedConfig(offload_optimizer="nvme", **nvme)) == ["cpu_adam", "async_io"]
