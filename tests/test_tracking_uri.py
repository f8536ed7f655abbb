"""What is read from a tracking URI without MLflow; tests/test_tracking.py has the URIs that cannot work."""

from pathlib import Path

import pytest

from kto_dist.base.secrets import masked
from kto_dist.record.tracking_uri import absolute, artifact_location, ui_command


def test_the_ui_command_quotes_the_path_and_hides_the_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    assert ui_command("sqlite:///all runs/mlflow.db") == "mlflow ui --backend-store-uri 'sqlite:////all runs/mlflow.db'"
    assert "secret" not in ui_command("http://me:secret@host:5000")


def test_passwords_are_masked_wherever_they_stand_in_a_text() -> None:
    text = "from http://me:secret@host:5000/x to postgresql://me:secret@db/runs, see me@example.com"
    assert masked(text) == "from http://***@host:5000/x to postgresql://***@db/runs, see me@example.com"
    assert (
        masked("mysql://me:p@ss@db/runs?ssl_password=a&x=1&Token=b'")
        == "mysql://***@db/runs?ssl_password=***&x=1&Token=***'"
    )
    assert masked("s3://bucket/a@b/c?x=1") == "s3://bucket/a@b/c?x=1"


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///:memory:", "http://host:5000", "postgresql://db/runs"])
def test_only_a_database_file_depends_on_the_working_directory(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    assert absolute(uri) == uri
    assert absolute("sqlite+pysqlite:///runs.db?timeout=9") == "sqlite+pysqlite:////runs.db?timeout=9"


@pytest.mark.parametrize(
    ("uri", "location"),
    [
        ("sqlite:////all/mlflow.db", "file:///all/mlflow-artifacts"),
        ("postgresql+psycopg2://db/runs", "file:///runs/mlflow-artifacts"),
        ("http://host:5000", None),
    ],
)
def test_files_lie_beside_the_database_unless_a_server_keeps_them(uri: str, location: str | None) -> None:
    assert artifact_location(uri, Path("/runs")) == location
