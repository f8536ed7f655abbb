"""Rows -> `train.parquet` and `heldout.parquet`, as `kto-dist train` reads them.

    prompt, completion   chat messages, or text (`output.form`)
    label, weight        what the trainer takes
    votes_up, votes_down, users, first_time, last_time, models, prompt_key, response_key    where the row comes from

Rows stand in the order of their keys, which is no order of time, topic or class. All files of a run are written under
temporary names first and then renamed, so that a run which fails leaves the output as it was.
"""

import os
import uuid
from pathlib import Path

import duckdb

from kto_dist.errors import UserError
from kto_dist.feedback.config import MiningConfig
from kto_dist.feedback.readers import literal

SPLITS = ("train", "heldout")
_TURNS = '[{"role":"VARCHAR","content":"VARCHAR"}]'


def write(connection: duckdb.DuckDBPyConnection, config: MiningConfig, folder: Path) -> dict[str, int]:
    """Writes a file a split into `folder`, for `publish` to take; returns their rows.

    Raises `UserError` where a split would have none.
    """
    rows = {
        split: connection.execute("SELECT count(*) FROM rows WHERE split = ?", [split]).fetchone()[0]
        for split in SPLITS
    }
    if not rows["train"] or (config.split.heldout > 0 and not rows["heldout"]):
        taken = connection.execute(
            "SELECT step, sum(removed) FROM steps GROUP BY step, number HAVING sum(removed) > 0 ORDER BY number"
        ).fetchall()
        raise UserError(
            f"{rows['train']} rows to train on and {rows['heldout']} held out would be left, and both need some; the "
            f"steps took {', '.join(f'{step} {votes:,}' for step, votes in taken) or 'nothing'} votes: loosen them, "
            "change split.heldout (0: hold nothing out), or give a longer log"
        )
    if config.output.form == "messages":
        prompt = f"from_json(prompt, '{_TURNS}')"
        completion = "[{'role': 'assistant', 'content': completion}]"
    else:
        prompt, completion = "prompt", "completion"
    for split in SPLITS:
        if not rows[split]:
            continue
        path = folder / f"{split}.parquet"
        connection.execute(
            f"""COPY (
                SELECT {prompt} AS prompt, {completion} AS completion, label, weight, votes_up, votes_down, users,
                    first_time, last_time, models, replace(prompt_key::VARCHAR, '-', '') AS prompt_key,
                    replace(response_key::VARCHAR, '-', '') AS response_key
                FROM examples JOIN texts USING (vote) WHERE split = '{split}' ORDER BY examples.response_key
            ) TO {literal(str(path))} (FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE_BYTES 16777216)"""
        )
    return rows


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
