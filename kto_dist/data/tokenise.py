"""Rows of a thumbs log -> tokens on disk, made once and memory-mapped by every rank.

In:  `DataConfig` and the policy's tokenizer.
Out: a folder a split (`prepare`, one process a file system), which every rank opens with `examples.load`.

1. `formats.read_rows`  files -> rows
2. `_encode_chunk`      1,000 rows -> prompt and completion tokens, cut to length, held-out rows apart
3. `_Split`             chunks -> one Arrow file, its fingerprint and its `DataReport`
4. `prepare`            the finished folder gets its final name: the key of all that its content depends on

Tokens. Messages are rendered with the chat template: the prompt with the header that starts an answer, so
that its tokens are the ones that the model sees when it generates; the completion is what the template writes
after that, up to the last EOS (what follows is never generated). Where the answer's header differs between
the two renderings (a template that opens a thought for new answers only), the prompt ends where they part; a
row whose earlier turns differ as well cannot be told apart into prompt and completion: it is a bad row. Text
prompts get the tokenizer's special tokens except a final EOS, text completions get one EOS. Both sides are
tokenised apart. The hash that holds prompts out is of the prompt before cutting, and knows no seed: a row
stays on its side as the log grows.
"""

import hashlib
import itertools
import json
import os
import shutil
import sys
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kto_dist.base.errors import UserError
from kto_dist.data.config import DataConfig
from kto_dist.data.examples import ClassReport, DataReport, fit, is_whole
from kto_dist.data.formats import BadRows, Messages, Row, read_rows
from kto_dist.data.sources import find_sources

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Part of every key: raise it when the same rows become other tokens or columns.
_VERSION = 2
_CHUNK = 1000
# Starting the processes takes about as long as it takes this one to tokenise so many chunks.
_CHUNKS_BEFORE_PROCESSES = 20
_QUANTILES = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
_SCHEMA = pa.schema(
    {
        "prompt_ids": pa.list_(pa.int32()),
        "completion_ids": pa.list_(pa.int32()),
        "desirable": pa.bool_(),
        "weight": pa.float64(),
        "prompt_group": pa.int64(),
        "prompt": pa.large_string(),
        "completion": pa.large_string(),
    }
)


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
    data: DataConfig, tokenizer: "PreTrainedTokenizerBase", fingerprint: str | None = None
) -> tuple[Path, Path | None]:
    """Folders of the tokenised training and held-out rows, made where `data.cache` lacks them.

    `fingerprint` is the tokenizer's (`tokenizer_fingerprint`). The same content under the same settings is
    tokenised once, whatever its path; processes that prepare it together get one folder. Raises `UserError`.
    """
    fingerprint = fingerprint or tokenizer_fingerprint(tokenizer)
    if isinstance(data.heldout, float):
        folder = _prepare(data, data.train, data.heldout, tokenizer, fingerprint)
        return folder / "rows", folder / "heldout"
    heldout = None
    if data.heldout is not None:
        heldout = _prepare(data, (data.heldout,), None, tokenizer, fingerprint) / "rows"
    return _prepare(data, data.train, None, tokenizer, fingerprint) / "rows", heldout


def _prepare(data: DataConfig, paths: Sequence[str], fraction: float | None, tokenizer: Any, fingerprint: str) -> Path:
    sources = find_sources(paths)
    settings = [data.max_length, data.prompt_limit, data.on_bad_row, fraction]
    key = _digest([_VERSION, [source.digest() for source in sources], fingerprint, settings])
    final, names = Path(data.cache) / key, ("rows",) if fraction is None else ("rows", "heldout")

    def is_made() -> bool:
        return all(is_whole(final / name) for name in names)

    if is_made():
        return final
    temporary = final.with_name(f".{key}.{uuid.uuid4().hex}")
    bad = BadRows()
    encoder = _Encoder(tokenizer, data.max_length, data.prompt_limit, data.on_bad_row, fraction)
    try:
        splits = [_Split(temporary / name) for name in names]
        rows = read_rows(sources, on_bad_row=data.on_bad_row, bad=bad)
        for parts, chunk_bad in _encode_all(encoder, rows, data.workers):
            bad.extend(chunk_bad)
            for split, part in zip(splits, parts, strict=True):
                split.add(part)
        for split in splits:
            split.close(bad)
        if not all(split.rows for split in splits):
            raise UserError(_why_empty(paths, fraction, [split.rows for split in splits], bad))
        if final.exists() and not is_made():
            shutil.rmtree(final)
        try:
            os.replace(temporary, final)
        except OSError:
            # A folder cannot replace one that has files: another process finished the same content first.
            if not is_made():
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


# Chunks of rows -> tokens. Everything below `_encode_all` runs in the worker processes too.

# per class: what `_Split` sums up
_COUNTS = ("kept", "prompts_cut", "completions_cut", "dropped", "prompt_tokens", "completion_tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """The rows of one chunk that belong to one split."""

    batch: pa.RecordBatch
    digests: bytes
    # 16 bytes a row
    contents: np.ndarray
    # (rows,) uint64, a hash: equal for rows with equal tokens, whatever their labels and weights
    counts: np.ndarray
    # (2, 6) int64: undesirable and desirable by _COUNTS
    shortened_headers: int


@dataclass(frozen=True, slots=True)
class _Encoder:
    tokenizer: Any
    max_length: int
    prompt_limit: int
    on_bad_row: str
    fraction: float | None


class _Process(SpawnProcess):
    """Starts afresh, without the script that was run.

    A fork is unsafe beside the threads of torch, NCCL and the tokenizer. A spawned process would first import the
    script again: seconds for a training script, and a hang where the script has no `if __name__ == "__main__"`.
    """

    def start(self) -> None:
        script = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            super().start()
        finally:
            sys.modules["__main__"] = script


class _Context(SpawnContext):
    Process = _Process


_worker_encoder: _Encoder | None = None


def _start_worker(encoder: _Encoder) -> None:
    # One process a core already: threads below it would only fight for the cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    global _worker_encoder
    _worker_encoder = encoder


def _encode_in_worker(rows: list[Row]) -> tuple[list[_Part], BadRows]:
    return _encode_chunk(_worker_encoder, rows)


def _encode_all(encoder: _Encoder, rows: Iterable[Row], workers: int | None) -> Iterator[tuple[list[_Part], BadRows]]:
    """Chunks in order: the first in this process, the rest in `workers` processes."""
    rows = iter(rows)
    chunks = iter(lambda: list(itertools.islice(rows, _CHUNK)), [])
    workers = workers or min(8, _cores())
    for chunk in chunks if workers == 1 else itertools.islice(chunks, _CHUNKS_BEFORE_PROCESSES):
        yield _encode_chunk(encoder, chunk)
    following = next(chunks, None)
    if following is None:
        return
    with ProcessPoolExecutor(workers, _Context(), _start_worker, (encoder,)) as pool:
        pending: deque[Any] = deque()
        try:
            for chunk in itertools.chain([following], chunks):
                pending.append(pool.submit(_encode_in_worker, chunk))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise UserError(
                "a process that tokenises ended early, most likely because memory ran out: "
                f"lower data.workers ({workers}); 1 starts no process"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _cores() -> int:
    # A job that shares its node may use fewer than the node has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _encode_chunk(encoder: _Encoder, rows: list[Row]) -> tuple[list[_Part], BadRows]:
    bad = BadRows()
    texts: list[tuple[Row, str, str, bool]] = []
    for row in rows:
        try:
            texts.append((row, *_texts(encoder.tokenizer, row)))
        except _Untemplatable as error:
            message = f"{row.source}: the chat template refuses this row: {error}"
            if encoder.on_bad_row == "error":
                raise UserError(f"{message}; correct the messages, or set data.on_bad_row to skip") from None
            bad.add("refused by the chat template", message)
    if encoder.fraction is None:
        return [_encode(encoder, texts)], bad
    limit = encoder.fraction * 2**64
    heldout = [_hash64(_canonical(row.prompt).encode()) < limit for row, *_ in texts]
    kept = [text for text, held in zip(texts, heldout, strict=True) if not held]
    held = [text for text, held in zip(texts, heldout, strict=True) if held]
    return [_encode(encoder, kept), _encode(encoder, held)], bad


class _Untemplatable(Exception):
    """The chat template rejects these messages, or hides where the completion starts."""


def _render(tokenizer: Any, messages: Sequence[dict[str, Any]], *, header: bool) -> str:
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=header)
    # Templates raise the first on purpose (roles must alternate); the second is `None + text` inside one.
    except (jinja2.TemplateError, TypeError) as error:
        raise _Untemplatable(str(error)) from None


def _texts(tokenizer: Any, row: Row) -> tuple[str, str, bool]:
    """Texts of prompt and completion, and whether the prompt ends before the answer's header does."""
    if isinstance(row.prompt, str):
        return row.prompt, row.completion, False
    if tokenizer.chat_template is None:
        raise UserError(
            f"{row.source} holds chat messages and the tokenizer has no chat template: use the "
            "instruction-tuned model's tokenizer, add a chat_template.jinja to the model's folder, or "
            "write prompts as text"
        )
    prompt = _render(tokenizer, row.prompt, header=True)
    full = _render(tokenizer, row.prompt + row.completion, header=False)
    if full.startswith(prompt):
        return prompt, full[len(prompt) :], False
    shorter = min(len(prompt), len(full))
    same = next((place for place in range(shorter) if prompt[place] != full[place]), shorter)
    if same < len(_render(tokenizer, row.prompt, header=False)):
        raise _Untemplatable("it renders the earlier turns differently once the answer follows them")
    return prompt[:same], full[same:], True


def _encode(encoder: _Encoder, texts: list[tuple[Row, str, str, bool]]) -> _Part:
    tokenizer = encoder.tokenizer
    rows = [row for row, *_ in texts]
    plain = np.array([isinstance(row.prompt, str) for row in rows], bool)
    prompts = _prompt_ids(tokenizer, [prompt for _, prompt, _, _ in texts], plain)
    completions = _token_ids(tokenizer, [completion for _, _, completion, _ in texts], special=False)
    for index, row in enumerate(rows):
        completions[index] = [] if _says_nothing(row) else _to_eos(completions[index], tokenizer, bool(plain[index]))

    lengths = np.array([[len(ids) for ids in side] for side in (prompts, completions)], np.int64).reshape(2, -1)
    prompt_kept, completion_kept = fit(*lengths, encoder.max_length, encoder.prompt_limit)
    kept = (completion_kept > 0) & (lengths[0] > 0)
    desirable = np.array([row.desirable for row in rows], bool)
    facts = np.stack(
        [
            kept,
            kept & (prompt_kept < lengths[0]),
            kept & (completion_kept < lengths[1]),
            ~kept,
            kept * prompt_kept,
            kept * completion_kept,
        ]
    ).astype(np.int64)
    indices = np.flatnonzero(kept)
    prompt_ids = [np.array(prompts[i][len(prompts[i]) - prompt_kept[i] :], np.int32) for i in indices]
    completion_ids = [np.array(completions[i][: completion_kept[i]], np.int32) for i in indices]
    groups = [_hash64(ids.tobytes()) for ids in prompt_ids]
    batch = pa.record_batch(
        [
            pa.array(prompt_ids, pa.list_(pa.int32())),
            pa.array(completion_ids, pa.list_(pa.int32())),
            pa.array(desirable[kept]),
            pa.array([rows[i].weight for i in indices], pa.float64()),
            pa.array(np.array(groups, np.uint64).view(np.int64)),
            pa.array([_canonical(rows[i].prompt) for i in indices], pa.large_string()),
            pa.array([_canonical(rows[i].completion) for i in indices], pa.large_string()),
        ],
        schema=_SCHEMA,
    )
    digests = b"".join(
        hashlib.blake2b(
            b"%d %d %r " % (len(prompt), rows[i].desirable, rows[i].weight) + prompt.tobytes() + completion.tobytes(),
            digest_size=16,
        ).digest()
        for i, prompt, completion in zip(indices, prompt_ids, completion_ids, strict=True)
    )
    contents = [
        _hash64(b"%d " % len(prompt) + prompt.tobytes() + completion.tobytes())
        for prompt, completion in zip(prompt_ids, completion_ids, strict=True)
    ]
    counts = np.stack([facts[:, ~desirable].sum(1), facts[:, desirable].sum(1)])
    return _Part(
        batch=batch,
        digests=digests,
        contents=np.array(contents, np.uint64),
        counts=counts,
        shortened_headers=sum(short for *_, short in texts),
    )


def _token_ids(tokenizer: Any, texts: list[str], *, special: bool) -> list[list[int]]:
    if not texts:
        return []
    # verbose=False: rows above the tokenizer's own length limit are cut here, not a reason to warn.
    return tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]


def _prompt_ids(tokenizer: Any, texts: list[str], plain: np.ndarray) -> list[list[int]]:
    prompts: list[list[int]] = [[]] * len(texts)
    for special in (False, True):
        places = np.flatnonzero(plain == special)
        for place, ids in zip(places, _token_ids(tokenizer, [texts[i] for i in places], special=special), strict=True):
            prompts[place] = ids
    if plain.any():
        eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
        probe = tokenizer("a")["input_ids"]
        appends_eos = len(probe) > 1 and probe[-1] == eos
        for place in np.flatnonzero(plain):
            ids = prompts[place][:-1] if appends_eos else prompts[place]
            # The text has its own BOS, and the tokenizer added another.
            prompts[place] = ids[1:] if probe[0] == bos and ids[:2] == [bos, bos] else ids
    return prompts


def _to_eos(ids: list[int], tokenizer: Any, plain: bool) -> list[int]:
    eos = tokenizer.eos_token_id
    if plain:
        return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]
    return ids[: len(ids) - ids[::-1].index(eos)] if eos in ids else ids


def _says_nothing(row: Row) -> bool:
    if isinstance(row.completion, str):
        return not row.completion.strip()
    return not any(turn["content"].strip() or turn.get("tool_calls") for turn in row.completion)


def _canonical(side: str | Messages) -> str:
    return json.dumps(side, ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=str)


def _hash64(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


class _Split:
    """Writes one split's folder: rows.arrow as chunks come; about.json last, so its presence means whole."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.rows = 0
        self._file = pa.OSFile(str(folder / "rows.arrow"), "wb")
        self._writer = pa.ipc.new_file(self._file, _SCHEMA)
        self._content = hashlib.blake2b(digest_size=16)
        self._contents: list[np.ndarray] = []
        self._counts = np.zeros((2, len(_COUNTS)), np.int64)
        self._shortened_headers = 0

    def add(self, part: _Part) -> None:
        self.rows += part.batch.num_rows
        if part.batch.num_rows:
            self._writer.write_batch(part.batch)
        self._content.update(part.digests)
        self._contents.append(part.contents)
        self._counts += part.counts
        self._shortened_headers += part.shortened_headers

    def close(self, bad: BadRows) -> None:
        self._writer.close()
        self._file.close()
        path = self.folder / "rows.arrow"
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        undesirable, desirable = (
            ClassReport(**dict(zip(_COUNTS, map(int, counts), strict=True))) for counts in self._counts
        )
        duplicates, contradictions = _repeated(self._contents, table["desirable"].to_numpy())
        report = DataReport(
            rows_read=undesirable.kept + undesirable.dropped + desirable.kept + desirable.dropped,
            skipped=dict(bad.counts),
            skipped_examples=bad.examples,
            shortened_headers=self._shortened_headers,
            duplicates=duplicates,
            contradictions=contradictions,
            desirable=desirable,
            undesirable=undesirable,
            prompt_lengths=_quantiles(table["prompt_ids"]),
            completion_lengths=_quantiles(table["completion_ids"]),
        )
        about = {
            "fingerprint": self._content.hexdigest(),
            "bytes": path.stat().st_size,
            "report": report.to_dict(),
        }
        (self.folder / "about.json").write_text(json.dumps(about, indent=1, ensure_ascii=False), encoding="utf-8")
        for file in (path, self.folder / "about.json"):
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())


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
