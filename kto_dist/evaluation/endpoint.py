"""A server that speaks OpenAI's API (vLLM, SGLang, llama.cpp, OpenAI's own), asked over HTTP.

In:  messages, or the text that a model goes on from. Out: `Reply`. Several questions are asked at once (`all_of`), and
one that meets a busy or a starting server is asked again.
"""

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from kto_dist.base.errors import UserError
from kto_dist.base.secrets import masked

T = TypeVar("T")
R = TypeVar("R")
TRIES = 5
SECONDS = 300.0
"""Longest that one answer may take."""
_AGAIN = {408, 409, 429, 500, 502, 503, 504}
"""Statuses of a server that is busy, or not there yet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    text: str
    finished: bool
    """Whether the model ended it; one that met its limit of tokens did not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    url: str
    """Up to the version, as http://localhost:8000/v1."""
    model: str
    key: str | None = field(default=None, repr=False)
    pause: float = 1.0
    """Seconds before the second try; each further one waits twice as long."""

    @classmethod
    def of(cls, url: str, model: str | None, key_name: str) -> "Endpoint":
        """`model` None: the first that the server has. `key_name`: of the environment variable. Raises `UserError`."""
        found = cls(url=url.rstrip("/"), model=model or "", key=os.environ.get(key_name))
        return found if model else cls(url=found.url, model=found.models()[0], key=found.key)

    def models(self) -> list[str]:
        """Their names, one at least. Raises `UserError`."""
        listed = self._sent("models", None).get("data")
        names = [str(entry["id"]) for entry in listed or [] if isinstance(entry, dict) and entry.get("id")]
        if not names:
            raise UserError(f"{masked(self.url)} lists no model: say which one is meant by its name")
        return names

    def chat(self, messages: Sequence[Mapping[str, Any]], **settings: Any) -> Reply:
        """Raises `UserError`."""
        found = self._choice("chat/completions", {"messages": list(messages), **settings})
        return Reply(text=str((found.get("message") or {}).get("content") or ""), finished=_ended(found))

    def complete(self, prompt: str, **settings: Any) -> Reply:
        """Raises `UserError`."""
        found = self._choice("completions", {"prompt": prompt, **settings})
        return Reply(text=str(found.get("text") or ""), finished=_ended(found))

    def _choice(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = self._sent(path, {"model": self.model, **body})
        choices = answer.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise UserError(f"{masked(self.url)}/{path} gave no choices: {json.dumps(answer)[:300]}")
        found: dict[str, Any] = choices[0]
        return found

    def _sent(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        url = f"{self.url}/{path}"
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
        for tries in range(1, TRIES + 1):
            try:
                with urllib.request.urlopen(request, timeout=SECONDS) as response:
                    answer = json.load(response)
                if not isinstance(answer, dict):
                    raise UserError(
                        f"{masked(url)} gave no JSON object; is it the address of an OpenAI-compatible API?"
                    )
                return answer
            except urllib.error.HTTPError as error:
                said = error.read(2000).decode(errors="replace").strip()
                problem, again = f"{error.code} {error.reason}: {said[:300]}", error.code in _AGAIN
            except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
                # an address that is none will be none in a while
                problem, again = str(getattr(error, "reason", error)), not isinstance(error, http.client.InvalidURL)
            except ValueError as error:
                problem, again = f"no JSON ({error})", False
            if not again or tries == TRIES:
                break
            time.sleep(self.pause * 2 ** (tries - 1))
        raise UserError(
            f"{masked(url)} cannot be used ({masked(problem)}): give the address up to /v1 of a running server"
        )


def _ended(choice: Mapping[str, Any]) -> bool:
    return choice.get("finish_reason") != "length"


def all_of(work: Callable[[T], R], asked: Sequence[T], parallel: int) -> list[R]:
    """What `work` makes of each, in order, several at a time; raises the first failure."""
    with ThreadPoolExecutor(parallel) as pool:
        waiting = [pool.submit(work, one) for one in asked]
        try:
            return [one.result() for one in waiting]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
