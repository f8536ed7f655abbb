"""What a tracking URI tells before MLflow is asked: whether it can work, where files go, how to show it to people."""

import fcntl
import re
import shlex
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from kto_dist.base.secrets import masked

_DEFAULT_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


class Unusable(OSError):
    """What a tracking URI leads to cannot work; the message is the reason."""


def ui_command(uri: str) -> str:
    """The shell command that shows the runs of a tracking URI in a browser."""
    if urlsplit(uri).scheme in ("http", "https"):
        return f"python -m webbrowser {shlex.quote(masked(uri))}"
    return f"mlflow ui --backend-store-uri {shlex.quote(absolute(uri))}"


def check(uri: str) -> None:
    """Raises for a URI that cannot work, where MLflow would retry for minutes, or fail at a later step."""
    url = urlsplit(uri)
    scheme = url.scheme.partition("+")[0]
    if scheme == "file" or ("://" not in uri and not uri.startswith(("databricks", "uc"))):
        raise Unusable(
            "a folder as the store cannot hold metrics such as loss beside loss/desirable, and MLflow has "
            "deprecated it; use a SQLite file or a server"
        )
    database = _sqlite_path(uri)
    if database is not None:
        with closing(sqlite3.connect(database, timeout=20, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
    elif scheme in _DEFAULT_PORTS and url.hostname:
        socket.create_connection((url.hostname, url.port or _DEFAULT_PORTS[scheme]), timeout=5).close()


def is_elsewhere(uri: str) -> bool:
    """Whether a server has it, which may be away for a while; a file that cannot be used now can't be later."""
    url = urlsplit(uri)
    scheme = url.scheme.partition("+")[0]
    served = scheme in ("http", "https") or (scheme in _DEFAULT_PORTS and bool(url.hostname))
    return served or uri.startswith("databricks")


@contextmanager
def alone(uri: str) -> Iterator[None]:
    """One process at a time: MLflow fails where two create the tables of the same new SQLite file."""
    path = _sqlite_path(uri)
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _sqlite_path(uri: str) -> Path | None:
    match = re.fullmatch(r"sqlite(?:\+\w+)?:///([^?]+)(?:\?.*)?", uri)
    return Path(match[1]).absolute() if match and match[1] != ":memory:" else None


def absolute(uri: str) -> str:
    """The same store from any working directory."""
    path = _sqlite_path(uri)
    return uri if path is None else re.sub(r":///[^?]+", lambda _: f":///{path}", uri, count=1)


def artifact_location(uri: str, runs: Path) -> str | None:
    """Where a new experiment keeps its files: beside the database file, or in `runs`. A server decides for itself."""
    path = _sqlite_path(uri)
    if path is not None:
        return (path.parent / "mlflow-artifacts").as_uri()
    if urlsplit(uri).scheme.partition("+")[0] in _DEFAULT_PORTS:
        return (runs.absolute() / "mlflow-artifacts").as_uri()
    return None
