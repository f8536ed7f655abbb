"""Whether a model that is named, and lies in no folder here, can be had: known within seconds, not after retries."""

from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache

from kto_dist.base import hub
from kto_dist.base.errors import UserError


def require(name: str, path: str) -> None:
    """Raises `UserError` where `path` is neither a folder, nor in the cache, nor on a hub that answers.

    Without a hub what is in the cache is used as it is.
    """
    trouble = None if Path(path).exists() else hub.trouble()
    if trouble is None:
        return
    try:
        cached = isinstance(try_to_load_from_cache(path, "config.json"), str)
    except ValueError:  # no name that a hub could have
        cached = False
    if not cached:
        raise UserError(
            f"{name} ({path}) is no folder here and not in the cache, and the hub ({constants.ENDPOINT}) cannot be "
            f"reached: {trouble}; check the name and the network, or give a folder"
        )
    constants.HF_HUB_OFFLINE = True
