"""Where a store's files lie: a folder, or a prefix in an object store, behind the same few operations.

A file appears whole or not at all on both: in a folder by a temporary name, fsync and rename; in an object store, which
has neither, by one PUT, which shows nothing until its last byte has arrived. Files are never changed once they are
there, so a reader needs no lock; it only has to bear that a file which was listed is gone when it is read.

Everything here raises `OSError`, whatever a cloud's library calls its troubles, and `FileNotFoundError` for what isn't
there.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import fsspec

from kto_dist.base.errors import UserError
from kto_dist.base.files import create_whole, write_whole

_WHOLE_PUT = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "memory"}
"""Object stores whose PUT is whole or not at all. Others (sftp, smb, http ...) show a file while it is written."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, kw_only=True, slots=True)
class File:
    name: str
    size: int
    """Bytes."""
    modified: float | None
    """Seconds since 1970 by the file system's clock; None where only object stores know."""


class Storage(Protocol):
    """A folder of files; `/` leads to a sub-folder, which need not exist."""

    concurrency: int
    """Reads that are worth having in flight at a time."""

    def __truediv__(self, name: str) -> "Storage": ...
    def files(self) -> list[File]:
        """In the order of their names; empty where the folder does not exist."""
        ...

    def folders(self) -> list[str]: ...
    def read(self, name: str) -> bytes: ...
    def open(self, name: str) -> BinaryIO:
        """For the end of a file, where a Parquet file says what it holds."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Whole or not at all; creates the folder."""
        ...

    def create(self, name: str, data: bytes) -> bool:
        """As `write`, where there is no such file. False, and nothing is changed, where there is one: of several that
        create it at once, one does."""
        ...

    def rename(self, name: str, to: str) -> None: ...
    def remove(self, name: str) -> None:
        """No error where it is gone already."""
        ...

    def remove_folder(self) -> None:
        """If it is empty."""
        ...

    def free(self) -> int | None:
        """Bytes that still fit, where there is such a limit."""
        ...


Root = str | Path | Storage
"""A folder, a URL, or the storage itself."""


def open_storage(root: Root) -> Storage:
    """Raises `UserError` for a URL that this package cannot use, or whose library is not installed."""
    if not isinstance(root, str | Path):
        return root
    text = str(root)
    protocol, separator, _ = text.partition("://")
    if not separator:
        return LocalStorage(Path(text))
    if protocol in ("file", "local"):
        return LocalStorage(Path(text.partition("://")[2]))
    if protocol not in _WHOLE_PUT:
        raise UserError(
            f"reference.store ({text}) must be a folder or a URL of an object store ({', '.join(sorted(_WHOLE_PUT))}), "
            f"where a file appears whole or not at all; mount what {protocol}:// names, and give the folder"
        )
    try:
        # no cache of listings: other jobs write as well; no shared instance: its threads would not outlive a fork
        system, path = fsspec.core.url_to_fs(text, use_listings_cache=False, skip_instance_cache=True)
    except ImportError as error:
        raise UserError(f"reference.store ({text}) needs a library: {error}") from None
    except Exception as error:  # each cloud's library has exceptions of its own
        raise UserError(f"reference.store ({text}) cannot be reached: {error}") from None
    return ObjectStorage(system, path.rstrip("/"), f"{protocol}://")


class LocalStorage:
    """A folder, on a local disk or a shared file system."""

    concurrency = min(8, 2 * (os.cpu_count() or 1))

    def __init__(self, path: Path):
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> "LocalStorage":
        return type(self)(self.path / name)

    def files(self) -> list[File]:
        found = []
        try:
            with os.scandir(self.path) as entries:
                for entry in entries:
                    try:
                        if entry.is_file():
                            stat = entry.stat()
                            found.append(File(name=entry.name, size=stat.st_size, modified=stat.st_mtime))
                    except OSError as error:
                        # another process has removed it since
                        if error.errno not in (errno.ENOENT, errno.ESTALE):
                            raise
        except FileNotFoundError:
            return []
        return sorted(found, key=lambda file: file.name)

    def folders(self) -> list[str]:
        try:
            with os.scandir(self.path) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir())
        except FileNotFoundError:
            return []

    def read(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
        # NFS: it was replaced while it was read, and is looked up again
        return (self.path / name).read_bytes()

    def open(self, name: str) -> BinaryIO:
        return (self.path / name).open("rb")

    def write(self, name: str, data: bytes) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self.path / name, data)

    def create(self, name: str, data: bytes) -> bool:
        self.path.mkdir(parents=True, exist_ok=True)
        return create_whole(self.path / name, data)

    def rename(self, name: str, to: str) -> None:
        os.replace(self.path / name, self.path / to)

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def remove_folder(self) -> None:
        if self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()

    def free(self) -> int | None:
        present = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.is_dir())
        return shutil.disk_usage(present).free


class ObjectStorage:
    """A prefix in an object store, through fsspec."""

    concurrency = 32  # latency, not the processor, is what one waits for

    def __init__(self, system: fsspec.AbstractFileSystem, path: str, scheme: str):
        self._system, self._path, self._scheme = system, path, scheme

    def __str__(self) -> str:
        return self._scheme + self._path.lstrip("/")

    def __truediv__(self, name: str) -> "ObjectStorage":
        return ObjectStorage(self._system, f"{self._path}/{name}", self._scheme)

    def _list(self, kind: str) -> list[dict[str, Any]]:
        with _os_errors():
            try:
                found = self._system.ls(self._path, detail=True)
            except FileNotFoundError:
                return []
        # some list the prefix itself as an empty file
        return [item for item in found if item["type"] == kind and item["name"].strip("/") != self._path.strip("/")]

    def files(self) -> list[File]:
        listed = ((item["name"].rstrip("/").rpartition("/")[2], item["size"]) for item in self._list("file"))
        return [File(name=name, size=size or 0, modified=None) for name, size in sorted(listed)]

    def folders(self) -> list[str]:
        return sorted(item["name"].rstrip("/").rpartition("/")[2] for item in self._list("directory"))

    def read(self, name: str) -> bytes:
        with _os_errors():
            return self._system.cat_file(f"{self._path}/{name}")

    def open(self, name: str) -> BinaryIO:
        with _os_errors():
            return self._system.open(f"{self._path}/{name}", "rb")

    def write(self, name: str, data: bytes) -> None:
        with _os_errors():
            self._system.pipe_file(f"{self._path}/{name}", data)

    def create(self, name: str, data: bytes) -> bool:
        try:
            with _os_errors():
                # a PUT that the server refuses where there is an object of that name
                self._system.pipe_file(f"{self._path}/{name}", data, mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            if _was_beaten(error):
                return False
            raise
        return True

    def rename(self, name: str, to: str) -> None:
        # a copy and a removal: killed in between both are there, and the next reader does it again
        self.write(to, self.read(name))
        self.remove(name)

    def remove(self, name: str) -> None:
        with _os_errors():
            try:
                self._system.rm_file(f"{self._path}/{name}")
            except FileNotFoundError:
                return

    def remove_folder(self) -> None:
        """There are none: a prefix is gone with its last file."""

    def free(self) -> int | None:
        return None


def _was_beaten(error: OSError) -> bool:
    """Whether another PUT of the name came first, at the same moment: S3's answer 409, which s3fs does not know."""
    answer = getattr(error.__cause__, "response", None)
    return isinstance(answer, dict) and answer.get("Error", {}).get("Code") == "ConditionalRequestConflict"


@contextmanager
def _os_errors() -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # such as botocore's NoCredentialsError: what it is depends on the cloud
        raise OSError(f"{type(error).__name__}: {error}") from error
