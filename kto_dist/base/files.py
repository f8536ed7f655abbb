"""Files: written whole or not at all, and known by their content."""

import errno
import hashlib
import os
import re
import uuid
from pathlib import Path

TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}")
"""`.<name>.<32 hex digits>`: what a writer that was killed leaves behind."""


_NO_FOLDERS = (errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV)


def write_whole(path: Path, data: bytes) -> None:
    """The file appears with all of its bytes or not at all, also when the machine stops in between."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        _write(temporary, data, "wb")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    flush(path.parent)


def create_whole(path: Path, data: bytes) -> bool:
    """As `write_whole` where there is no such file yet. False, and nothing is changed, where there is one: of several
    processes that create it at once, on one host or on many, one does.

    Where a file system has no hard links the file may be seen before all of its bytes are there.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        _write(temporary, data, "wb")
        try:
            os.link(temporary, path)
        except FileExistsError:
            # an NFS server that has made the link, and whose answer was lost, is asked again
            if temporary.stat().st_nlink == 1:
                return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            try:
                _write(path, data, "xb")
            except FileExistsError:
                return False
    finally:
        temporary.unlink(missing_ok=True)
    flush(path.parent)
    return True


def _write(path: Path, data: bytes, mode: str) -> None:
    with path.open(mode) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def flush(path: Path) -> None:
    """A file or a folder, from the system's memory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some file systems, such as those of SMB shares, sync files alone
        if error.errno not in _NO_FOLDERS or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Of a file's content, in hexadecimal; the file may be larger than memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
