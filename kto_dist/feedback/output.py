"""Rows -> `train.parquet` and `heldout.parquet`, as `kto-dist train` reads them.

    prompt, completion   chat messages, or text (`output.form`)
    label, weight        what the trainer takes; with `agreement.conflicts: soft` the label is a number from 0 to 1
    votes_up, votes_down, users, first_time, last_time, models, prompt_key, response_key    where the row comes from

Rows stand in the order of their keys, which is no order of time, topic or class. A database would sort the texts along
with the keys, in memory that it does not have: rows are dealt into buckets by their keys as they come, and each bucket
is sorted alone and becomes a row group. All files of a run are written under
temporary names first and then renamed, so that a run which fails leaves the output as it was.
"""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kto_dist.base.errors import UserError
from kto_dist.feedback.config import MiningConfig
from kto_dist.feedback.sql import one

SPLITS = ("train", "heldout")
# Of a bucket, which is sorted in memory; the number of buckets is bounded by the files that a process may have open.
_BUCKET_ROWS, _MOST_BUCKETS = 8192, 256
_BATCH_ROWS, _CHUNK_BYTES = 512, 2**23
_TURNS = '[{"role":"VARCHAR","content":"VARCHAR"}]'
# of a log whose conversations call tools; arguments are JSON text, as OpenAI's API has them
_CALLS = '[{"id":"VARCHAR","type":"VARCHAR","function":{"name":"VARCHAR","arguments":"VARCHAR"}}]'
_CALLING_TURNS = f'[{{"role":"VARCHAR","content":"VARCHAR","tool_calls":{_CALLS},"tool_call_id":"VARCHAR"}}]'


def write(connection: duckdb.DuckDBPyConnection, config: MiningConfig, folder: Path) -> dict[str, int]:
    """Writes a file a split into `folder`, for `publish` to take; returns their rows.

    Raises `UserError` where a split would have none.
    """
    rows = {split: one(connection, "SELECT count(*) FROM rows WHERE split = ?", [split])[0] for split in SPLITS}
    if not rows["train"] or (config.split.heldout > 0 and not rows["heldout"]):
        taken = connection.execute(
            "SELECT step, sum(removed) FROM steps GROUP BY step, number HAVING sum(removed) > 0 ORDER BY number"
        ).fetchall()
        raise UserError(
            f"{rows['train']} rows to train on and {rows['heldout']} held out would be left, and both need some; the "
            f"steps took {', '.join(f'{step} {votes:,}' for step, votes in taken) or 'no'} votes: loosen them, "
            "change split.heldout (0: hold nothing out), or give a longer log"
        )
    if config.output.form == "messages":
        calls = one(connection, "SELECT count(*) FROM seen WHERE name = 'tool_calls'")[0] > 0
        prompt = f"from_json(prompt, '{_CALLING_TURNS if calls else _TURNS}')"
        completion = "[{'role': 'assistant', 'content': completion}]"
    else:
        prompt, completion = "prompt", "completion"
    label = "probability AS label" if config.agreement.conflicts == "soft" else "label"
    for split in SPLITS:
        if rows[split]:
            query = f"""SELECT {prompt} AS prompt, {completion} AS completion, {label}, weight,
                    votes_up, votes_down, users, first_time, last_time, models,
                    replace(prompt_key::VARCHAR, '-', '') AS prompt_key,
                    replace(response_key::VARCHAR, '-', '') AS response_key
                FROM examples JOIN texts USING (vote) WHERE split = '{split}'"""
            with _folder(folder / f"{split}.buckets") as buckets:
                _write_sorted(connection, query, rows[split], buckets, folder / f"{split}.parquet")
    return rows


@contextmanager
def _folder(path: Path) -> Iterator[Path]:
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path)


def _write_sorted(connection: duckdb.DuckDBPyConnection, query: str, rows: int, buckets: Path, target: Path) -> None:
    """The query's rows by `response_key`. How they are cut into row groups is a function of their number and keys."""
    count = min(_MOST_BUCKETS, -(-rows // _BUCKET_ROWS))
    reader = (
        connection.cursor()
        .sql(f"SELECT *, ('0x' || left(response_key, 4))::INTEGER * {count} // 65536 AS bucket FROM ({query})")
        .to_arrow_reader(_BATCH_ROWS)
    )
    schema = reader.schema.remove(reader.schema.get_field_index("bucket"))
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with ExitStack() as stack:
        writers = [
            stack.enter_context(pa.ipc.new_stream(str(buckets / str(bucket)), schema, options=options))
            for bucket in range(count)
        ]
        for table in _in_chunks(reader):
            table = table.sort_by("bucket")
            starts = np.searchsorted(table.column("bucket").to_numpy(), np.arange(count + 1))
            table = table.drop_columns("bucket")
            for writer, start, stop in zip(writers, starts[:-1], starts[1:], strict=True):
                if stop > start:
                    writer.write_table(table.slice(start, stop - start))
    with pq.ParquetWriter(target, schema, compression="zstd") as parquet:
        for bucket in range(count):
            with pa.memory_map(str(buckets / str(bucket))) as file:
                table = pa.ipc.open_stream(file).read_all().sort_by("response_key")
            if table.num_rows:
                parquet.write_table(table.combine_chunks(), row_group_size=table.num_rows)


def _in_chunks(reader: pa.RecordBatchReader) -> Iterator[pa.Table]:
    """Batches put together to some megabytes, so that a bucket's share of one is worth a write."""
    waiting, size = [], 0
    for batch in reader:
        waiting.append(batch)
        size += batch.nbytes
        if size >= _CHUNK_BYTES:
            yield pa.Table.from_batches(waiting)
            waiting, size = [], 0
    if waiting:
        yield pa.Table.from_batches(waiting)


def publish(staged: Path, folder: Path) -> None:
    """Moves all files of `staged` into `folder`, each whole; what `folder` has of an earlier run's splits goes.

    Raises `UserError` where the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # the audit last: until it is there, the digests of the one before tell that it describes other files
        files = [path for path in staged.iterdir() if path.is_file()]
        files.sort(key=lambda path: (path.name == "audit.json", path.name))
        temporary = [folder / f".{path.name}.{uuid.uuid4().hex}" for path in files]
        try:
            for path, target in zip(files, temporary, strict=True):
                _copy(path, target)
            for path, target in zip(files, temporary, strict=True):
                os.replace(target, folder / path.name)
        finally:
            for target in temporary:
                target.unlink(missing_ok=True)
        for split in SPLITS:
            if not (staged / f"{split}.parquet").exists():
                (folder / f"{split}.parquet").unlink(missing_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UserError(f"output.folder ({folder}) cannot be written: {error}; give a folder with room") from None


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as reader, target.open("wb") as writer:
        while block := reader.read(1 << 20):
            writer.write(block)
        writer.flush()
        os.fsync(writer.fileno())
