"""Files: written whole or not at all, and known by their content."""

import hashlib
import os
import re
import uuid
from pathlib import Path

TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}")
"""`.<name>.<32 hex digits>`: what a writer that was killed leaves behind."""


def write_whole(path: Path, data: bytes) -> None:
    """The file appears with all of its bytes or not at all, also when the machine stops in between."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    flush(path.parent)


def flush(path: Path) -> None:
    """A file or a folder, from the system's memory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Of a file's content, in hexadecimal; the file may be larger than memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
