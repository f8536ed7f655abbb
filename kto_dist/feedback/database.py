"""The one DuckDB connection of a run: a file in a folder of its own, bounded memory, spilling to disk.

Nothing is downloaded: no extension is installed or loaded beyond those that are built in.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import duckdb
import psutil
from duckdb.func import SPECIAL

from kto_dist.base.errors import UserError
from kto_dist.feedback.chat import Reader, answer_in
from kto_dist.feedback.config import MiningConfig, folder_of
from kto_dist.feedback.language import check_languages
from kto_dist.feedback.mapping import macros
from kto_dist.feedback.sql import literal, one

SALT = "KTO_FEEDBACK_SALT"
# of a write that fails for want of room
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# of the folders of runs, in a folder that may hold other things
_PREFIX = ".kto-mining-"


@contextmanager
def database(config: MiningConfig, salt: str) -> Iterator[tuple[duckdb.DuckDBPyConnection, Path]]:
    """A connection with the SQL functions of mapping.py, and its folder; both are gone afterwards."""
    resources = config.resources
    try:
        folder, lock = _make_folder(folder_of(resources.work))
    except OSError as error:
        raise UserError(
            f"resources.work ({resources.work}) cannot be written: {error}; give a folder with room for the log"
        ) from None
    memory = resources.memory_mebibytes or psutil.virtual_memory().total // 2**21
    connection = None
    try:
        connection = duckdb.connect(
            str(folder / "run.duckdb"),
            config={
                "memory_limit": f"{memory}MiB",
                "threads": resources.threads or os.cpu_count() or 1,
                "temp_directory": str(folder / "spilled"),
                "preserve_insertion_order": False,
                "autoinstall_known_extensions": False,
                "autoload_known_extensions": False,
            },
        )
        connection.execute("SET TimeZone = 'UTC'")
        connection.execute("SET enable_progress_bar = false")
        if one(connection, "SELECT count(*) FROM duckdb_settings() WHERE name = 'async_threads'")[0]:
            # DuckDB 2.0's threads that write Parquet behind the query's back lock each other out for ever when memory
            # is short (seen at 256 MiB)
            connection.execute("SET async_threads = 0")
        _check_patterns(connection, config)
        reading = partial(answer_in, Reader.of(config))
        connection.create_function("answer_in", reading, ["VARCHAR"], "VARCHAR", null_handling=SPECIAL)
        for macro in macros(config, salt):
            connection.execute(f"CREATE {macro}")
        yield connection, folder
    except duckdb.OutOfMemoryException as error:
        raise UserError(
            f"resources.memory_mebibytes ({memory}) is not enough for this log: {error}; raise it, or lower "
            "resources.threads"
        ) from None
    except duckdb.Error as error:
        if not any(os.strerror(number) in str(error) for number in NO_ROOM):
            raise
        raise UserError(
            f"resources.work ({resources.work}) has no room for the database: {error}; make room, or give another "
            "folder"
        ) from None
    finally:
        if connection is not None:
            connection.close()
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _make_folder(work: Path) -> tuple[Path, int]:
    """A folder that nobody else can look into, and its lock; what killed runs have left is removed first.

    A run holds the lock for as long as it lives, whatever machine or container its process number belongs to. A folder
    without a lock's file is somebody else's, whatever it is called: `work` may be any folder.
    """
    work.mkdir(parents=True, exist_ok=True)
    for left in work.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # it is not ours, it lives, or somebody else is removing it
            lock = _lock(left, os.O_WRONLY)
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)
    name = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
    new = work / f".new{_PREFIX}{name}"
    new.mkdir(mode=0o700)
    lock = _lock(new, os.O_WRONLY | os.O_CREAT)
    return new.rename(work / f"{_PREFIX}{name}"), lock  # under its name only once it is locked


def _lock(folder: Path, flags: int) -> int:
    descriptor = os.open(folder / "lock", flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _check_patterns(connection: duckdb.DuckDBPyConnection, config: MiningConfig) -> None:
    for name in ("errors", "refusals", "truncated"):
        for pattern in getattr(config.clean, name):
            try:
                connection.execute(f"SELECT regexp_matches('', {literal(pattern)})").fetchall()
            except duckdb.Error as error:
                raise UserError(
                    f"clean.{name}: {pattern!r} is no regular expression of RE2 ({error}): correct it; there is no "
                    "look-around and there are no back-references"
                ) from None
    for script in config.clean.scripts:
        pattern = rf"\p{{{script}}}"
        try:
            connection.execute(f"SELECT regexp_matches('', {literal(pattern)})").fetchall()
        except duckdb.Error:
            raise UserError(
                f"clean.scripts: {script!r} is no script that RE2 knows: write it as Unicode does (Latin, Cyrillic, "
                "Greek, Han, Hiragana, Arabic, Devanagari, ...)"
            ) from None
    check_languages(config.clean.languages)


def find_salt(config: MiningConfig) -> str:
    """The salt of user ids: from the config, the environment, or made once and kept where only its owner reads it."""
    given = config.users.salt or os.environ.get(SALT)
    if given:
        return given
    path = folder_of(config.resources.work) / "salt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            temporary = path.with_name(f".salt.{uuid.uuid4().hex}")
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_hex(16))
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(temporary, path)  # unlike a rename, it never replaces the salt of a run that was faster
            except FileExistsError:
                pass
            finally:
                temporary.unlink()
        salt = path.read_text().strip()
    except OSError as error:
        raise UserError(
            f"the salt of user ids cannot be kept in {path}: {error}; make resources.work writable, or set {SALT}"
        ) from None
    if not salt:
        raise UserError(f"{path} is empty: delete it for a new salt, or set {SALT} to the old one")
    return salt
