"""Rows of a thumbs log -> tokens on disk, made once and memory-mapped by every rank.

In:  `DataConfig` and the policy's tokenizer.
Out: a folder a split (`prepare`, one process a file system), which every rank opens with `examples.load`.

1. `formats.LogReader`      files -> chunks of 1,000 records, as they lie there
2. `making.Maker`           a chunk -> rows -> prompt and completion tokens, cut to length, held-out rows apart
3. `processes.over_chunks`  2 in several processes
4. `split.Split`            what is made of the chunks, in order -> one Arrow file, its fingerprint and its `DataReport`
5. `prepare`                the finished folder gets its final name: the key of all that its content depends on
6. `ahead`                  the log shared out over hosts that see one cache, before 5 (`stretches.py`, `pieces.py`)
"""

import hashlib
import json
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kto_dist.base.errors import UserError
from kto_dist.data.columns import Mapped
from kto_dist.data.config import DataConfig
from kto_dist.data.encode import Encoder, Part
from kto_dist.data.examples import damage
from kto_dist.data.formats import LogReader, check_columns
from kto_dist.data.making import Maker
from kto_dist.data.pieces import (
    Hosts,
    PieceWriter,
    folder_of,
    forget_wrong,
    read_piece,
    remove_pieces,
    say_wrong,
    wrong_before,
)
from kto_dist.data.processes import CHUNKING, Chunking, ProcessLost, over_chunks
from kto_dist.data.rows import BadRows
from kto_dist.data.sources import Source, find_sources
from kto_dist.data.split import Split
from kto_dist.data.stretches import Stretch, joined, share_out
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


def folders(data: DataConfig, tokenizer: "PreTrainedTokenizerBase", fingerprint: str) -> list[Path]:
    """That `prepare` makes, the training rows' last. Raises `UserError`."""
    return [log.final for log in _logs(data, tokenizer, fingerprint, CHUNKING)]


def ahead(
    data: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    fingerprint: str,
    hosts: Hosts,
    chunking: Chunking = CHUNKING,
) -> None:
    """Tokenises this host's share of the logs that `data.cache` lacks, for the `prepare` that follows on the first host
    that sees it. Raises `UserError`, but not for rows that are wrong: `prepare` does, which meets them in order."""
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

    def shares(self, hosts: int) -> list[tuple[Stretch, ...]]:
        """What each host reads."""
        return share_out(self.sources, hosts, self.chunking.least)

    def ahead(self, hosts: Hosts) -> None:
        if self.final.exists():
            return
        shares = self.shares(hosts.count)
        own, folder = shares[hosts.number], folder_of(self.cache, self.key, hosts)
        if sum(map(len, shares)) < 2 or not own or read_piece(folder, self.splits, own, 0):
            return
        reading, looked = _Reading.of(self), -math.inf
        with PieceWriter(folder, self.splits, self.given) as writer:
            try:
                with closing(reading.parts(own)) as every:
                    for parts in every:
                        writer.add(parts)
                        if time.monotonic() - looked >= self.chunking.look:
                            if wrong_before(self.cache, self.key, hosts):
                                return
                            looked = time.monotonic()
            except ProcessLost:
                raise
            except UserError:
                say_wrong(folder)
                return
            writer.close(own, reading.rows.found())

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
            check_columns(reading.rows.mapped)
            for split in splits:
                split.close(reading.rows.bad)
            if not all(split.rows for split in splits):
                rows = [split.rows for split in splits]
                raise UserError(_why_empty(self.paths, self.fraction, rows, reading.rows.bad))
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
            forget_wrong(self.cache, self.key)
        remove_pieces(self.cache, self.key)
        return self.final


@dataclass(frozen=True, kw_only=True, slots=True)
class _Reading:
    """A log's rows on their way to tokens."""

    log: _Log
    maker: Maker
    rows: LogReader

    @classmethod
    def of(cls, log: _Log) -> "_Reading":
        rows = LogReader(
            sources=log.sources,
            origins=log.origins,
            mapped=Mapped(names=log.data.columns or {}, slices=log.slices),
            on_bad_row=log.data.on_bad_row,
            soft=log.data.soft_labels,
        )
        return cls(log=log, maker=Maker.of(rows, log.encoder()), rows=rows)

    def parts(self, stretches: Sequence[Stretch]) -> Generator[list[Part], None, None]:
        """A part a split, chunk by chunk, of these."""
        rows, chunking = self.rows, self.log.chunking
        chunks = rows.chunks(joined(stretches), chunking.rows)
        for chunk, made in over_chunks(self.maker, chunks, workers=self.log.data.workers, chunking=chunking):
            pairs = rows.pairs.taken
            if made is None or not rows.take_in(made.found):
                made = self.maker.made(chunk, rows.files.get(chunk.file))
                taken = rows.take_in(made.found)
                assert taken
            rows.ended(chunk)
            yield [part.numbered(pairs) for part in made.parts]

    def all(self, hosts: int) -> Iterator[list[Part]]:
        """Of the whole log; what is in pieces that hosts have made ahead is not read again."""
        missing: list[Stretch] = []
        for number, share in enumerate(self.log.shares(hosts)):
            folder = folder_of(self.log.cache, self.log.key, Hosts(number=number, count=hosts))
            if share and folder.exists():
                yield from self.parts(missing)  # the piece's pairs are numbered on from these
                missing = []
                piece = read_piece(folder, self.log.splits, share, self.rows.pairs.taken)
                ended = {stretch.file for stretch in share if stretch.stop is None}
                if piece is not None and self.rows.take_in(piece[1], ended):
                    yield from piece[0]
                    continue
            missing += share
        yield from self.parts(missing)


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
