"""A real MLflow server within the tests' process, whose answers a test can hold back, or replace by a failure."""

import io
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kto_dist.record import tracking
from kto_dist.record.tracker import Tracker
from kto_dist.training.config import Config

DIGEST = "0123456789abcdef" * 4


def begin(config: Config, **more: Any) -> Tracker:
    """The run's tracker, as training asks for it."""
    output = Path(config.train.output).resolve()
    return tracking.start(config.tracking, settings=config, name=output.name, folder=output.parent, **more)


def wait_until(happened: Callable[[], bool]) -> None:
    while not happened():
        time.sleep(0.02)


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
        self.loses_answers = False
        """Those requests are done, and get a 503 all the same."""
        self._listening: Any = None
        # nobody else gets the port while the server is down
        self._reserved = socket.socket()
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reserved.bind(("127.0.0.1", 0))
        self._port = self._reserved.getsockname()[1]

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = io.BytesIO(body)
        if b'"loss"' in body:
            self.asked += 1
            if self.away:
                start_response("503 Service Unavailable", [])
                return [b""]
            if self.loses_answers:
                list(self._app(environ, lambda *answer: None))
                start_response("503 Service Unavailable", [])
                return [b""]
            self.answers.wait()
        return self._app(environ, start_response)

    def start(self) -> None:
        """Again at the same port, if it was stopped."""
        from werkzeug.serving import make_server

        while not self._port_is_free():  # of connections that are being closed
            time.sleep(0.02)
        self._listening = make_server("127.0.0.1", self._port, self, threaded=True)
        self.uri = f"http://127.0.0.1:{self._port}"
        threading.Thread(target=self._listening.serve_forever, daemon=True).start()

    def _port_is_free(self) -> bool:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", self._port))
                probe.listen()
            except OSError:
                return False
        return True

    def stop(self) -> None:
        """Nobody listens any more."""
        if self._listening is not None:
            self._listening.shutdown()
            self._listening.server_close()
            self._listening = None

    def release(self) -> None:
        self._reserved.close()


@contextmanager
def serving(database: Path) -> Iterator[Server]:
    """One a process, since MLflow's handlers keep the first store that they are given."""
    import mlflow
    from mlflow import MlflowClient
    from mlflow.server import app

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = Server(app)
    server.answers.set()
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        # read at the first request
        patch.setenv("_MLFLOW_SERVER_FILE_STORE", f"sqlite:///{database}")
        patch.setenv("_MLFLOW_SERVER_ARTIFACT_ROOT", str(database.parent / "artifacts"))
        MlflowClient(server.uri).search_experiments()
    try:
        yield server
    finally:
        server.answers.set()
        server.stop()
        server.release()
        mlflow.set_tracking_uri(None)  # its handlers have set it, for the whole process
