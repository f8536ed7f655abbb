"""Rows of a thumbs log -> tokens on disk, made once and memory-mapped by every rank.

In:  `DataConfig` and the policy's tokenizer.
Out: a folder a split (`prepare`, one process a file system), which every rank opens with `examples.load`.

1. `formats.read_rows`      files -> rows
2. `encode.Encoder`         1,000 rows -> prompt and completion tokens, cut to length, held-out rows apart
3. `processes.over_chunks`  2 in several processes
4. `_Split`                 chunks -> one Arrow file, its fingerprint and its `DataReport`
5. `prepare`                the finished folder gets its final name: the key of all that its content depends on
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kto_dist.base.errors import UserError
from kto_dist.base.files import flush
from kto_dist.data.config import DataConfig
from kto_dist.data.encode import COUNTS, SCHEMA, Encoder, Part
from kto_dist.data.examples import ClassReport, DataReport, damage, write_about
from kto_dist.data.formats import read_rows
from kto_dist.data.processes import CHUNKING, Chunking, over_chunks
from kto_dist.data.rows import BadRows
from kto_dist.data.sources import find_sources
from kto_dist.data.template import look_at

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Part of every key: raise it when the same rows become other tokens or columns.
_VERSION = 7
_QUANTILES = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Hash of what decides the tokens: vocabulary, rules, special tokens, chat template. Never a path."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # Truncation and padding are left behind by whoever called the tokenizer last.
        rules = {
            key: value for key, value in json.loads(backend.to_str()).items() if key not in ("truncation", "padding")
        }
    else:
        file = getattr(tokenizer, "vocab_file", None)
        content = hashlib.blake2b(Path(file).read_bytes()).hexdigest() if file and Path(file).is_file() else None
        rules = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab(), "file": content}
    return _digest([rules, tokenizer.special_tokens_map, tokenizer.eos_token_id, tokenizer.chat_template])


def prepare(
    data: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    fingerprint: str | None = None,
    chunking: Chunking = CHUNKING,
    warn: Callable[[str], None] = lambda text: None,
) -> tuple[Path, Path | None]:
    """Folders of the tokenised training and held-out rows, made where `data.cache` lacks them, or has them damaged.

    `fingerprint` is the tokenizer's (`tokenizer_fingerprint`). The same content under the same settings is
    tokenised once, whatever its path; processes that prepare it together get one folder. Raises `UserError`.
    """
    fingerprint = fingerprint or tokenizer_fingerprint(tokenizer)
    if isinstance(data.heldout, float):
        folder = _prepare(data, data.train_sources, data.heldout, True, tokenizer, fingerprint, chunking, warn)
        return folder / "rows", folder / "heldout"
    heldout, apart = None, data.heldout is not None
    if apart:
        heldout = _prepare(data, data.heldout_sources, None, True, tokenizer, fingerprint, chunking, warn) / "rows"
    # rows without others that are held out may be those that a model is evaluated on
    rows = _prepare(data, data.train_sources, None, not apart, tokenizer, fingerprint, chunking, warn) / "rows"
    return rows, heldout


def _prepare(
    data: DataConfig,
    given: Sequence[tuple[str, tuple[str, ...]]],
    fraction: float | None,
    sliced: bool,  # whether rows keep what they are told apart by
    tokenizer: "PreTrainedTokenizerBase",
    fingerprint: str,
    chunking: Chunking,
    warn: Callable[[str], None],
) -> Path:
    found = [find_sources(paths) for _, paths in given]
    slices = data.slices if sliced else None
    settings: list[Any] = [
        data.max_length,
        data.prompt_limit,
        data.on_bad_row,
        fraction,
        data.columns,
        data.template_kwargs,
    ]
    settings.append(slices)
    settings.append(data.soft_labels)
    digests = [[source.digest() for source in sources] for sources in found]
    key = _digest([_VERSION, digests, fingerprint, settings])
    final, names = Path(data.cache) / key, ("rows",) if fraction is None else ("rows", "heldout")

    def wrong() -> str | None:
        return next((text for name in names if (text := damage(final / name))), None)

    if final.exists():
        trouble = wrong()
        if trouble is None:
            return final
        warn(f"tokenised data {final} is damaged ({trouble}): it is made anew")
    temporary = final.with_name(f".{key}.{uuid.uuid4().hex}")
    bad = BadRows()
    encoder = Encoder(
        tokenizer=tokenizer,
        template=look_at(tokenizer, data.template_kwargs),
        max_length=data.max_length,
        prompt_limit=data.prompt_limit,
        on_bad_row=data.on_bad_row,
        fraction=fraction,
        sources=len(given),
        files=tuple(source.name for sources in found for source in sources),
    )
    try:
        splits = [_Split(temporary / name, len(given)) for name in names]
        rows = read_rows(
            [source for sources in found for source in sources],
            on_bad_row=data.on_bad_row,
            bad=bad,
            columns=data.columns,
            soft=data.soft_labels,
            origins=[origin for origin, sources in enumerate(found) for _ in sources],
            slices=slices,
        )
        for parts, chunk_bad in over_chunks(encoder, rows, workers=data.workers, chunking=chunking):
            bad.extend(chunk_bad)
            for split, part in zip(splits, parts, strict=True):
                split.add(part)
        for split in splits:
            split.close(bad)
        if not all(split.rows for split in splits):
            paths = [path for _, listed in given for path in listed]
            raise UserError(_why_empty(paths, fraction, [split.rows for split in splits], bad))
        if final.exists() and wrong():
            shutil.rmtree(final)
        try:
            os.replace(temporary, final)
        except OSError:
            # A folder cannot replace one that has files: another process finished the same content first.
            if wrong():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def _why_empty(paths: Sequence[str], fraction: float | None, rows: list[int], bad: BadRows) -> str:
    if fraction is not None and any(rows):
        kept, heldout = rows
        return (
            f"data.heldout ({fraction}) leaves {kept} rows to train on and {heldout} held out: both need "
            "some; change the fraction, add prompts, or give data.heldout a file"
        )
    return (
        f"{', '.join(paths)}: no row has a completion to train on ({bad.counts.total()} skipped, the others "
        "empty); check the completion column"
    )


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


class _Split:
    """Writes one split's folder: rows.arrow as chunks come; about.json last."""

    def __init__(self, folder: Path, sources: int) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.rows = 0
        self._file = pa.OSFile(str(folder / "rows.arrow"), "wb")
        self._writer = pa.ipc.new_file(self._file, SCHEMA)
        self._content = hashlib.blake2b(digest_size=16)
        self._contents: list[np.ndarray] = []
        self._counts = np.zeros((2, len(COUNTS)), np.int64)
        self._sources = np.zeros((sources, 2), np.int64)
        self._shortened_headers = 0

    def add(self, part: Part) -> None:
        self.rows += part.batch.num_rows
        if part.batch.num_rows:
            self._writer.write_batch(part.batch)
        self._content.update(part.digests)
        self._contents.append(part.contents)
        self._counts += part.counts
        self._sources += part.sources
        self._shortened_headers += part.shortened_headers

    def close(self, bad: BadRows) -> None:
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
            skipped=dict(bad.counts),
            skipped_examples=bad.examples,
            unused=dict(bad.unused),
            notes=dict(bad.notes),
            first=bad.first,
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
    if not len(desirable):
        return 0, 0
    _, content, rows = np.unique(np.concatenate(contents), return_inverse=True, return_counts=True)
    up = np.bincount(content, weights=desirable).astype(np.int64)
    down = rows - up
    first = np.count_nonzero(up) + np.count_nonzero(down)
    return int(rows.sum() - first), int(rows[(up > 0) & (down > 0)].sum())


def _quantiles(column: pa.ChunkedArray) -> dict[str, int]:
    if not len(column):
        return {}
    lengths = pc.list_value_length(column).to_numpy()
    values = np.quantile(lengths, list(_QUANTILES.values()), method="nearest")
    return dict(zip(_QUANTILES, map(int, values), strict=True))
