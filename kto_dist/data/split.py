"""One split's rows as they come -> rows.arrow, and about.json, which is written last.

In:  `Part`s of the encoder, in order. Out: a folder that `examples.load` opens. Its bytes depend on the rows alone, and
     not on how they came in parts.
"""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kto_dist.base.files import flush
from kto_dist.data.encode import COUNTS, SCHEMA, Part
from kto_dist.data.examples import ClassReport, DataReport, write_about
from kto_dist.data.rows import BadRows

_BATCH = 1000
"""Rows of a record batch."""
_QUANTILES = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


class Split:
    """Writes one split's folder: rows.arrow as chunks come; about.json last."""

    def __init__(self, folder: Path, sources: int) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.rows = 0
        self._file = pa.OSFile(str(folder / "rows.arrow"), "wb")
        self._writer = pa.ipc.new_file(self._file, SCHEMA)
        self._waiting: list[pa.RecordBatch] = []
        """Less than a batch."""
        self._content = hashlib.blake2b(digest_size=16)
        self._contents: list[np.ndarray] = []
        self._counts = np.zeros((2, len(COUNTS)), np.int64)
        self._sources = np.zeros((sources, 2), np.int64)
        self._shortened_headers = 0

    def add(self, part: Part) -> None:
        self.rows += part.batch.num_rows
        if part.batch.num_rows:
            self._waiting.append(part.batch)
            if sum(batch.num_rows for batch in self._waiting) >= _BATCH:
                self._write()
        self._content.update(part.digests)
        self._contents.append(part.contents)
        self._counts += part.counts
        self._sources += part.sources
        self._shortened_headers += part.shortened_headers

    def _write(self, last: bool = False) -> None:
        table = pa.Table.from_batches(self._waiting, SCHEMA)
        whole = table.num_rows if last else table.num_rows - table.num_rows % _BATCH
        for start in range(0, whole, _BATCH):
            # taken and not sliced: Arrow writes a slice's texts in other bytes than the same texts on their own
            rows = table.take(np.arange(start, min(start + _BATCH, whole)))
            self._writer.write_batch(rows.combine_chunks().to_batches()[0])
        self._waiting = [batch for batch in table.slice(whole).to_batches() if batch.num_rows]

    def close(self, bad: BadRows) -> None:
        self._write(last=True)
        self._writer.close()
        self._file.close()
        path = self.folder / "rows.arrow"
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        undesirable, desirable = (
            ClassReport(**dict(zip(COUNTS, map(int, counts), strict=True))) for counts in self._counts
        )
        duplicates, contradictions = _repeated(self._contents, table["desirable"].to_numpy())
        probability = table["probability"].to_numpy()
        soft = int(((probability > 0) & (probability < 1)).sum())
        report = DataReport(
            rows_read=undesirable.kept + undesirable.dropped + desirable.kept + desirable.dropped,
            skipped=dict(sorted(bad.counts.items())),
            skipped_examples=bad.examples,
            unused=dict(sorted(bad.unused.items())),
            notes=dict(sorted(bad.notes.items())),
            first=dict(sorted(bad.first.items())),
            sources=[(int(up), int(down)) for down, up in self._sources],
            shortened_headers=self._shortened_headers,
            duplicates=duplicates,
            contradictions=contradictions,
            desirable=desirable,
            undesirable=undesirable,
            soft=soft,
            expected=float(probability.sum()) if soft else None,
            prompt_lengths=_quantiles(table["prompt_ids"]),
            completion_lengths=_quantiles(table["completion_ids"]),
        )
        flush(path)
        write_about(self.folder, self._content.hexdigest(), report)


def _repeated(contents: list[np.ndarray], desirable: np.ndarray) -> tuple[int, int]:
    """Rows that repeat another's tokens and label, and rows whose tokens stand there with both labels."""
    every = np.concatenate(contents) if contents else np.zeros(0, np.uint64)
    up, down = np.sort(every[desirable]), np.sort(every[~desirable])
    again = sum(int(np.count_nonzero(side[1:] == side[:-1])) for side in (up, down))
    return again, _held(up, down) + _held(down, up)


def _held(those: np.ndarray, others: np.ndarray) -> int:
    """How many are among the others; both are sorted."""
    if not others.size:
        return 0
    place = np.minimum(np.searchsorted(others, those), others.size - 1)
    return int(np.count_nonzero(others[place] == those))


def _quantiles(column: pa.ChunkedArray) -> dict[str, int]:
    if not len(column):
        return {}
    lengths = pc.list_value_length(column).to_numpy()
    values = np.quantile(lengths, list(_QUANTILES.values()), method="nearest")
    return dict(zip(_QUANTILES, map(int, values), strict=True))
