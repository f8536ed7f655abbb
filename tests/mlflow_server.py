"""A real MLflow server within the tests' process, whose answers a test can hold back, or replace by a failure."""

import io
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


class Server:
    """Counts the requests that send a metric named `loss`; those of the system's load pass by."""

    def __init__(self, app: Callable[..., Iterable[bytes]]) -> None:
        self._app = app
        self.uri = ""
        self.asked = 0
        self.answers = threading.Event()
        """While it is not set, those requests wait."""
        self.away = False
        """Those requests get a 503."""

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = io.BytesIO(body)
        if b'"loss"' in body:
            self.asked += 1
            if self.away:
                start_response("503 Service Unavailable", [])
                return [b""]
            self.answers.wait()
        return self._app(environ, start_response)


@contextmanager
def serving(database: Path) -> Iterator[Server]:
    """One a process, since MLflow's handlers keep the first store that they are given."""
    import mlflow
    from mlflow import MlflowClient
    from mlflow.server import app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = Server(app)
    server.answers.set()
    listening = make_server("127.0.0.1", 0, server, threaded=True)
    server.uri = f"http://127.0.0.1:{listening.server_port}"
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        # read at the first request
        patch.setenv("_MLFLOW_SERVER_FILE_STORE", f"sqlite:///{database}")
        patch.setenv("_MLFLOW_SERVER_ARTIFACT_ROOT", str(database.parent / "artifacts"))
        MlflowClient(server.uri).search_experiments()
    try:
        yield server
    finally:
        server.answers.set()
        listening.shutdown()
        listening.server_close()
        mlflow.set_tracking_uri(None)  # its handlers have set it, for the whole process
