"""What a disk refuses in the middle of a run, as one sentence with the remedy."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kto_dist.base import hosts
from kto_dist.base.agree import OthersFailed
from kto_dist.base.errors import UserError

_FULL = re.compile("No space left|quota exceeded|File too large|unexpected pos|PytorchStreamWriter failed")
_READ_ONLY = re.compile(r"Read-only file system|Permission denied")
_NUMBERS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def refusals(what: str, setting: str, folder: Path) -> Iterator[None]:
    """Inside, an error of the disk becomes a `UserError`, also as torch, safetensors or another rank words it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = remedy(error)
        if reason is None:
            raise
        where = error.where if isinstance(error, OthersFailed) else hosts.here()
        raise UserError(f"{what} cannot be written: {setting} ({folder}){where} {reason}") from error


def remedy(error: Exception) -> str | None:
    """What is wrong with the disk, and what to do; None where the error is of another kind."""
    # in the words of the rank that met it, so that all ranks say the same
    text = " ".join((error.failure if isinstance(error, OthersFailed) else str(error)).split())[:200]
    if (isinstance(error, OSError) and error.errno in _NUMBERS) or _FULL.search(text):
        return f"is full: make room, and the same command goes on from the last checkpoint ({text})"
    if _READ_ONLY.search(text):
        return f"is read-only: make it writable, and the same command goes on from the last checkpoint ({text})"
    if isinstance(error, OSError) or (isinstance(error, OthersFailed) and error.of_disk):
        return f"fails: check the disk or the connection to it ({text})"
    return None
