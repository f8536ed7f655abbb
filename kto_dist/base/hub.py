"""Whether the hub of models and data sets answers: known within seconds, not after retries."""

import socket
from functools import cache
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants

SECONDS = 5.0
"""That a hub may take to answer."""


def trouble() -> str | None:
    """Why the hub does not answer; None where it does, where a proxy is asked in its place, or where none is wanted."""
    return None if constants.HF_HUB_OFFLINE else _trouble(constants.ENDPOINT)


@cache
def _trouble(endpoint: str) -> str | None:
    url = urlsplit(endpoint)
    if getproxies().get(url.scheme) or not url.hostname:
        return None
    try:
        socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), SECONDS).close()
    except OSError as error:
        return str(error) or type(error).__name__
    return None
