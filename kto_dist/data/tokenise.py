"""Rows of a thumbs log -> tokens on disk, made once and memory-mapped by every rank.

In:  `DataConfig` and the policy's tokenizer.
Out: a folder a split (`prepare`, one process a file system), which every rank opens with `examples.load`.

1. `formats.read_some`      files -> rows
2. `encode.Encoder`         1,000 rows -> prompt and completion tokens, cut to length, held-out rows apart
3. `processes.over_chunks`  2 in several processes
4. `split.Split`                chunks -> one Arrow file, its fingerprint and its `DataReport`
5. `prepare`                the finished folder gets its final name: the key of all that its content depends on
6. `ahead`                  the files shared out over hosts that see one cache, before 5 (`pieces.py`)
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kto_dist.base.errors import UserError
from kto_dist.data.columns import Mapped
from kto_dist.data.config import DataConfig
from kto_dist.data.encode import Encoder, Part
from kto_dist.data.examples import damage
from kto_dist.data.formats import PairNumbers, check_columns, read_some
from kto_dist.data.pieces import Hosts, PieceWriter, Read, folder_of, read_piece, remove_pieces, share_out
from kto_dist.data.processes import CHUNKING, Chunking, over_chunks
from kto_dist.data.rows import BadRows
from kto_dist.data.sources import Source, find_sources
from kto_dist.data.split import Split
from kto_dist.data.template import look_at

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Part of every key: raise it when the same rows become other tokens or columns.
_VERSION = 7


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
    hosts: int = 1,
) -> tuple[Path, Path | None]:
    """Folders of the tokenised training and held-out rows, made where `data.cache` lacks them, or has them damaged.

    `fingerprint` is the tokenizer's (`tokenizer_fingerprint`); `hosts`: how many have gone `ahead`. The same content
    under the same settings is tokenised once, whatever its path; processes that prepare it together get one folder.
    Raises `UserError`.
    """
    rows, heldout = None, None
    for log in _logs(data, tokenizer, fingerprint, chunking):
        folder = log.prepare(warn, hosts)
        if log.heldout:
            heldout = folder / "rows"
        else:
            rows, heldout = folder / "rows", folder / "heldout" if len(log.splits) > 1 else heldout
    assert rows is not None
    return rows, heldout


def ahead(
    data: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    fingerprint: str,
    hosts: Hosts,
    chunking: Chunking = CHUNKING,
) -> None:
    """Tokenises this host's part of the files that `data.cache` lacks, for the `prepare` that follows on the first host
    that sees it. Raises `UserError`."""
    for log in _logs(data, tokenizer, fingerprint, chunking):
        log.ahead(hosts)


def _logs(
    data: DataConfig, tokenizer: "PreTrainedTokenizerBase", fingerprint: str | None, chunking: Chunking
) -> "Iterator[_Log]":
    """The held-out rows' log where they have one of their own, then the training rows'."""
    more: dict[str, Any] = {"data": data, "tokenizer": tokenizer, "chunking": chunking}
    fingerprint = fingerprint or tokenizer_fingerprint(tokenizer)
    fraction = data.heldout if isinstance(data.heldout, float) else None
    apart = data.heldout is not None and fraction is None
    if apart:
        yield _Log.of(data.heldout_sources, None, True, fingerprint, heldout=True, **more)
    # rows without others that are held out may be those that a model is evaluated on
    yield _Log.of(data.train_sources, fraction, not apart, fingerprint, heldout=False, **more)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Log:
    """Files that become one folder of the cache."""

    data: DataConfig
    tokenizer: "PreTrainedTokenizerBase"
    chunking: Chunking
    heldout: bool
    """Whether it is held out as a whole."""
    fraction: float | None
    slices: tuple[str, ...] | None
    paths: tuple[str, ...]
    """As they were given."""
    sources: tuple[Source, ...]
    origins: tuple[int, ...]
    """The number of each file's source in the config."""
    given: int
    """Sources."""
    key: str

    @classmethod
    def of(
        cls,
        given: Sequence[tuple[str, tuple[str, ...]]],
        fraction: float | None,
        sliced: bool,  # whether rows keep what they are told apart by
        fingerprint: str,
        *,
        data: DataConfig,
        heldout: bool,
        **more: Any,
    ) -> "_Log":
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
        return cls(
            data=data,
            heldout=heldout,
            fraction=fraction,
            slices=None if slices is None else tuple(slices),
            paths=tuple(path for _, listed in given for path in listed),
            sources=tuple(source for sources in found for source in sources),
            origins=tuple(origin for origin, sources in enumerate(found) for _ in sources),
            given=len(given),
            key=_digest([_VERSION, digests, fingerprint, settings]),
            **more,
        )

    @property
    def cache(self) -> Path:
        return Path(self.data.cache)

    @property
    def final(self) -> Path:
        return self.cache / self.key

    @property
    def splits(self) -> tuple[str, ...]:
        return ("rows",) if self.fraction is None else ("rows", "heldout")

    def encoder(self) -> Encoder:
        return Encoder(
            tokenizer=self.tokenizer,
            template=look_at(self.tokenizer, self.data.template_kwargs),
            max_length=self.data.max_length,
            prompt_limit=self.data.prompt_limit,
            on_bad_row=self.data.on_bad_row,
            fraction=self.fraction,
            sources=self.given,
            files=tuple(source.name for source in self.sources),
        )

    def wrong(self) -> str | None:
        """What is damaged of the finished folder."""
        return next((text for name in self.splits if (text := damage(self.final / name))), None)

    def ahead(self, hosts: Hosts) -> None:
        own = share_out([source.size() for source in self.sources], hosts.count)[hosts.number]
        folder = folder_of(self.cache, self.key, hosts)
        if len(self.sources) < 2 or not own or self.final.exists() or read_piece(folder, self.splits, 0):
            return
        reading = _Reading.of(self)
        with PieceWriter(folder, self.splits, self.given) as writer:
            for parts in reading.files(own):
                writer.add(parts)
            writer.close(reading.so_far())

    def prepare(self, warn: Callable[[str], None], hosts: int) -> Path:
        if self.final.exists():
            trouble = self.wrong()
            if trouble is None:
                return self.final
            warn(f"tokenised data {self.final} is damaged ({trouble}): it is made anew")
        temporary = self.final.with_name(f".{self.key}.{uuid.uuid4().hex}")
        reading = _Reading.of(self)
        try:
            splits = [Split(temporary / name, self.given) for name in self.splits]
            for parts in reading.all(hosts):
                for split, part in zip(splits, parts, strict=True):
                    split.add(part)
            check_columns(reading.mapped)
            for split in splits:
                split.close(reading.bad)
            if not all(split.rows for split in splits):
                rows = [split.rows for split in splits]
                raise UserError(_why_empty(self.paths, self.fraction, rows, reading.bad))
            if self.final.exists() and self.wrong():
                shutil.rmtree(self.final)
            try:
                os.replace(temporary, self.final)
            except OSError:
                # A folder cannot replace one that has files: another process finished the same content first.
                if self.wrong():
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        remove_pieces(self.cache, self.key)
        return self.final


@dataclass(frozen=True, kw_only=True, slots=True)
class _Reading:
    """A log's rows on their way to tokens, and what is found out of them meanwhile."""

    log: _Log
    encoder: Encoder
    mapped: Mapped
    pairs: PairNumbers
    bad: BadRows

    @classmethod
    def of(cls, log: _Log) -> "_Reading":
        mapped = Mapped(names=log.data.columns or {}, slices=log.slices)
        return cls(log=log, encoder=log.encoder(), mapped=mapped, pairs=PairNumbers(), bad=BadRows())

    def files(self, own: range) -> Iterator[list[Part]]:
        """A part a split, chunk by chunk, of these files."""
        rows = read_some(
            self.log.sources[own.start : own.stop],
            self.log.origins[own.start : own.stop],
            mapped=self.mapped,
            pairs=self.pairs,
            on_bad_row=self.log.data.on_bad_row,
            bad=self.bad,
            soft=self.log.data.soft_labels,
        )
        chunks = over_chunks(self.encoder, rows, workers=self.log.data.workers, chunking=self.log.chunking)
        for parts, bad in chunks:
            self.bad.extend(bad)
            yield parts

    def all(self, hosts: int) -> Iterator[list[Part]]:
        """Of all files; those of pieces that hosts have made ahead are not read again."""
        start = 0  # of the files that were in no piece
        shares = share_out([source.size() for source in self.log.sources], hosts) if hosts > 1 else []
        for number, share in enumerate(shares):
            folder = folder_of(self.log.cache, self.log.key, Hosts(number=number, count=hosts))
            if not share or not folder.exists():
                continue
            # its pairs' numbers go on from those before
            yield from self.files(range(start, share.start)) if start < share.start else ()
            start = share.start
            piece = read_piece(folder, self.log.splits, self.pairs.taken)
            if piece is not None:
                yield from piece[0]
                self._take_in(piece[1])
                start = share.stop
        if start < len(self.log.sources):
            yield from self.files(range(start, len(self.log.sources)))

    def _take_in(self, read: Read) -> None:
        self.mapped.found.update(read.found)
        self.mapped.cut.update(read.cut)
        self.pairs.taken += read.pairs
        self.bad.extend(read.bad)

    def so_far(self) -> Read:
        mapped = self.mapped
        return Read(pairs=self.pairs.taken, found=frozenset(mapped.found), cut=frozenset(mapped.cut), bad=self.bad)


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
