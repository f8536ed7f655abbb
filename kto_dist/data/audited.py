"""Whether the data that a run trains on was audited, and what the audit found.

In:  the paths of `data.train`. Out: an `Audited` for each audit.json that describes one of the files, and whether
     these audits describe all of the data.

An audit.json beside a Parquet file belongs to it only if it names the file's sha256: a file that was replaced, filtered
or appended to is other data than the one that passed. Only what is on this machine's disk is looked at.
"""

import glob
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kto_dist.base.remembered import sha256_once
from kto_dist.data.sources import files_below

VERSION = 1
"""Of audit.json, that this module reads; docs/audit.md."""
_TAG_LENGTH = 500  # what a tag of MLflow's datasets holds


@dataclass(frozen=True, kw_only=True, slots=True)
class Audited:
    """An audit, and the files of this run that it describes."""

    path: Path
    """Of audit.json."""
    report: Path | None
    """report.html beside it."""
    sha256: str
    """Of audit.json."""
    files: dict[str, str]
    """Name -> sha256."""
    failed: tuple[str, ...]
    """Each check that warns, with its number and what to do."""
    classes: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Of the split for training, and of the whole dataset: rows that are desirable, and undesirable."""

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
            if content["version"] > VERSION:
                warn(
                    f"{audit} has layout {content['version']}, and this version of kto_dist reads {VERSION}: update it"
                )
                continue
            known = {entry["sha256"] for entry in content["files"]}
            failed = tuple(line_of(check) for check in content["checks"] if check["status"] == "warn")
            described_by = sha256_once(audit)
            classes = _classes(content)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            warn(f"{audit} is not readable as an audit ({error!r}): run `kto-dist mine` again")
            continue
        except OSError as error:
            warn(
                f"{audit} cannot be read ({error}), so nothing is known of {file.name}: "
                "make it readable, or move it away"
            )
            continue
        digest = sha256_once(file)
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
                classes=classes,
            )
            for line in failed:
                warn(f"audit of {file}: {line}")
        found[audit].files[file.name] = digest
    return list(found.values())


def _classes(content: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """An audit of an older version may lack some of it."""
    balance = content.get("balance") or {}
    found = {name: balance.get(name) or {} for name in ("train", "dataset")}
    return {name: (int(of["up"]), int(of["down"])) for name, of in found.items() if {"up", "down"} <= of.keys()}


def desirable_share(audits: Sequence[Audited]) -> float | None:
    """Of the audited rows that are trained on; None where no audit says."""
    up = down = 0
    for audit in audits:
        ups, downs = audit.classes.get("dataset" if "heldout.parquet" in audit.files else "train", (0, 0))
        up, down = up + ups, down + downs
    return up / (up + down) if up + down else None


def line_of(check: Mapping[str, Any]) -> str:
    """A check of audit.json as one line: its figures and, where it doesn't pass, what to do."""
    return f"{check['message']}; {check['remedy']}" if check["remedy"] else check["message"]


def describes_all(audits: Sequence[Audited], paths: Sequence[str]) -> bool:
    """Whether `audits`, as found among `paths`, describe every file that these lead to.

    They describe no JSONL, no saved dataset and no name of a hub, nor Parquet whose audit is missing or of other data.
    """
    described = {audit.path.with_name(name) for audit in audits for name in audit.files}
    found = [_files(path) for path in paths]
    return all(files and described.issuperset(files) for files in found)


def audit_tags(audits: list[Audited]) -> dict[str, str]:
    """What leads from a run, and from its dataset, to the audits of its data.

    Digests stand there one by one as long as they fit; of more, how many they are and the sha256 of their list (sorted,
    joined by commas). The audits that are kept with the run name them all.
    """
    if not audits:
        return {}
    return {
        "audit.sha256": _listed([audit.sha256 for audit in audits]),
        "audit.files": _listed([digest for audit in audits for digest in audit.files.values()]),
        "audit.failed": str(sum(len(audit.failed) for audit in audits)),
    }


def _listed(digests: list[str]) -> str:
    listed = ",".join(digests)
    if len(listed) <= _TAG_LENGTH:
        return listed
    return f"{len(digests)} in a list of sha256 {hashlib.sha256(','.join(sorted(digests)).encode()).hexdigest()}"


def audit_files(audits: list[Audited]) -> Iterator[tuple[Path, str]]:
    """Files to keep with a run, and the artifact folder of each."""
    for number, audit in enumerate(audits, 1):
        folder = "audit" if len(audits) == 1 else f"audit/{number}"
        yield from ((path, folder) for path in (audit.path, audit.report) if path is not None)


def _parquet_files(paths: Sequence[str]) -> Iterator[Path]:
    for path in paths:
        yield from (file for file in _files(path) if file.name.endswith(".parquet"))


def _files(path: str) -> list[Path]:
    """The files on this machine's disk that training reads from `path`."""
    here = Path(path)
    if here.is_file():
        return [here]
    if here.is_dir():
        return files_below(here)
    return sorted(file for match in glob.glob(path, recursive=True) if (file := Path(match)).is_file())
