"""Whether a model that is named, and lies in no folder here, can be had: known within seconds, not after retries."""

import socket
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants, try_to_load_from_cache

from kto_dist.base.errors import UserError

SECONDS = 5.0
"""That a hub may take to answer."""


def require(name: str, path: str) -> None:
    """Raises `UserError` where `path` is neither a folder, nor in the cache, nor on a hub that answers.

    Without a hub what is in the cache is used as it is.
    """
    if Path(path).exists() or constants.HF_HUB_OFFLINE:
        return
    trouble = _trouble(constants.ENDPOINT)
    if trouble is None:
        return
    if not isinstance(try_to_load_from_cache(path, "config.json"), str):
        raise UserError(
            f"{name} ({path}) is no folder here and not in the cache, and the hub ({constants.ENDPOINT}) cannot be "
            f"reached: {trouble}; check the name and the network, or give a folder"
        )
    constants.HF_HUB_OFFLINE = True


@cache
def _trouble(endpoint: str) -> str | None:
    """Why the hub does not answer; None where it does, or where a proxy is asked in its place."""
    url = urlsplit(endpoint)
    if getproxies().get(url.scheme) or not url.hostname:
        return None
    try:
        socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), SECONDS).close()
    except OSError as error:
        return str(error) or type(error).__name__
    return None
