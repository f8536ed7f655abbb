"""Whether the data that a run trains on was audited, and what the audit found.

In:  the paths of `data.train`. Out: an `Audited` for each audit.json that describes one of the files.

An audit.json beside a Parquet file belongs to it only if it names the file's sha256: a file that was replaced, filtered
or appended to is other data than the one that passed. Only what is on this machine's disk is looked at.
"""

import glob
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kto_dist.files import sha256_of

_VERSION = 1  # of audit.json, that this module reads; docs/audit.md


@dataclass(frozen=True, kw_only=True, slots=True)
class Audited:
    """An audit, and the files of this run that it describes."""

    path: Path
    # of audit.json
    report: Path | None
    # report.html beside it
    sha256: str
    # of audit.json
    files: dict[str, str]
    # name -> sha256
    failed: tuple[str, ...]
    # each check that warns, with its number and what to do

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "sha256": self.sha256,
            "files": self.files,
            "failed": list(self.failed),
        }


def find_audits(paths: Sequence[str], warn: Callable[[str], None]) -> list[Audited]:
    """The audits of the Parquet files among `paths`; warns of audits of other content, and of checks that failed."""
    found: dict[Path, Audited] = {}
    for file in _parquet_files(paths):
        audit = file.parent / "audit.json"
        if not audit.is_file():
            continue
        try:
            content = json.loads(audit.read_text(encoding="utf-8"))
            # first of all: a newer layout may lack every other key
            if content["version"] > _VERSION:
                warn(
                    f"{audit} has layout {content['version']}, and this version of kto_dist reads {_VERSION}: update it"
                )
                continue
            known = {entry["sha256"] for entry in content["files"]}
            failed = tuple(
                f"{check['message']}; {check['remedy']}" for check in content["checks"] if check["status"] == "warn"
            )
            described_by = sha256_of(audit)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            warn(f"{audit} is not readable as an audit ({error!r}): run `kto-dist mine` again")
            continue
        except OSError as error:
            warn(
                f"{audit} cannot be read ({error}), so nothing is known of {file.name}: "
                "make it readable, or move it away"
            )
            continue
        digest = sha256_of(file)
        if digest not in known:
            warn(
                f"{audit} describes other data than {file.name} beside it (sha256 {digest[:12]}... is not among its "
                "files), so nothing is known of this file: run `kto-dist mine` again, or move the audit away"
            )
            continue
        if audit not in found:
            report = audit.with_name("report.html")
            found[audit] = Audited(
                path=audit,
                report=report if report.is_file() else None,
                sha256=described_by,
                files={},
                failed=failed,
            )
            for line in failed:
                warn(f"audit of {file}: {line}")
        found[audit].files[file.name] = digest
    return list(found.values())


def audit_tags(audits: list[Audited]) -> dict[str, str]:
    """What leads from a run, and from its dataset, to the audits of its data."""
    if not audits:
        return {}
    return {
        "audit.sha256": ",".join(audit.sha256 for audit in audits),
        "audit.files": ",".join(digest for audit in audits for digest in audit.files.values()),
        "audit.failed": str(sum(len(audit.failed) for audit in audits)),
    }


def audit_files(audits: list[Audited]) -> Iterator[tuple[Path, str]]:
    """Files to keep with a run, and the artifact folder of each."""
    for number, audit in enumerate(audits, 1):
        folder = "audit" if len(audits) == 1 else f"audit/{number}"
        yield from ((path, folder) for path in (audit.path, audit.report) if path is not None)


def _parquet_files(paths: Sequence[str]) -> Iterator[Path]:
    for path in paths:
        here = Path(path)
        if here.is_file():
            files = [here]
        elif here.is_dir():
            files = sorted(here.rglob("*.parquet"))
        else:
            files = sorted(Path(match) for match in glob.glob(path, recursive=True))
        yield from (file for file in files if file.name.endswith(".parquet") and file.is_file())
