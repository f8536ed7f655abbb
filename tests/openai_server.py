"""A server within the tests' process that speaks OpenAI's API; what it answers is a function of the test's."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Say = Callable[[dict[str, Any]], str]
"""The body of a request -> the text of the reply."""


@dataclass
class Server:
    url: str
    asked: list[tuple[str, dict[str, Any], str]] = field(default_factory=list)
    """Path, body and Authorization of every request that was answered."""
    refusals: list[int] = field(default_factory=list)
    """Statuses that the next requests get."""
    finish_reason: str = "stop"
    cut_short: int = 0
    """Replies to come of which half is sent."""


@contextmanager
def serving(say: Say, model: str = "tiny") -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send({"object": "list", "data": [{"id": model, "object": "model"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if server.refusals:
                self.send_response(server.refusals.pop(0))
                self.end_headers()
                self.wfile.write(b"not now")
                return
            server.asked.append((self.path, body, self.headers.get("Authorization", "")))
            text = say(body)
            choice: dict[str, Any] = {"index": 0, "finish_reason": server.finish_reason}
            choice |= {"message": {"role": "assistant", "content": text}} if "messages" in body else {"text": text}
            usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
            self._send(
                {"id": "1", "object": "chat.completion", "created": 1, "model": model, "choices": [choice]}
                | {"usage": usage}
            )

        def _send(self, answer: dict[str, Any]) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            content = json.dumps(answer).encode()
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if server.cut_short:
                server.cut_short -= 1
                content = content[: len(content) // 2]
            self.wfile.write(content)

        def log_message(self, *arguments: Any) -> None: ...

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = Server(url=f"http://127.0.0.1:{listening.server_port}/v1")
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        listening.shutdown()
        listening.server_close()
