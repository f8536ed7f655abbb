"""Answers that are nearly the same, by MinHash.

In:  `responses` (with the vote whose text stands for each) and the texts in `parts`.
Out: `near_duplicates` (response_key): answers that are near one that stays and has more votes (among equals, a smaller
     key).

1. shingles    every 8 bytes of the normalised, lower-cased text, hashed in one go over a batch's buffer
2. sketches    128 minima a text (rensa); 16 bands of 8 for finding, the lowest byte of each minimum for checking
3. candidates  texts of one prompt (or of the whole log) that share a band; in a large bucket each with its best only
4. near        the share of equal bytes estimates the Jaccard similarity (standard error 0.03 near 0.85)
5. chains      where a is near b and b near c, but a not c, b leaves for a, and c stays: nothing that is left is like it

Two texts of similarity s meet in a band with probability 1 - (1 - s^8)^16: 0.99 at 0.85, 0.62 at 0.7.
"""

import duckdb
import numpy as np
import pyarrow as pa
import rensa

_MINIMA, _BANDS = 128, 16
_SEED = 42
_TEXTS = 2048
_SMALL_BUCKET = 16
_SHINGLE = 8
_MIX = np.uint64(0x9E3779B97F4A7C15)
# odd multipliers that fold a band's eight minima into one number
_FOLD = (
    np.random.default_rng(_SEED).integers(0, 2**63, _MINIMA // _BANDS).astype(np.uint64) << np.uint64(1)
) | np.uint64(1)


def find_near_duplicates(connection: duckdb.DuckDBPyConnection, threshold: float, scope: str) -> None:
    """Makes `near_duplicates`."""
    connection.execute("CREATE TABLE near_duplicates (response_key UUID)")
    # answers without another one to compare with need no sketch
    alone = "" if scope == "log" else "QUALIFY count(*) OVER (PARTITION BY prompt_key) > 1"
    connection.execute(
        f"""CREATE TABLE candidates AS
        SELECT row_number() OVER (ORDER BY votes DESC, response_key) AS id, response_key, representative,
            {"0::UBIGINT" if scope == "log" else "md5_number_lower(prompt_key::VARCHAR)"} AS family
        FROM (SELECT r.response_key, any_value(r.prompt_key) AS prompt_key,
                any_value(r.representative) AS representative, count(*) AS votes
            FROM ballots b JOIN responses r USING (response_key) WHERE removed IS NULL GROUP BY r.response_key)
        {alone}"""
    )
    bands = ", ".join(f"b{band} UBIGINT" for band in range(_BANDS))
    connection.execute(f"CREATE TABLE sketches (id BIGINT, sketch BLOB, {bands})")
    if connection.execute("SELECT count(*) FROM candidates").fetchall() == [(0,)]:
        return
    _sketch_all(connection)
    connection.execute("CREATE TABLE pairs (better BIGINT, worse BIGINT)")
    for band in range(_BANDS):
        _pair(connection, f"b{band}")
    _check(connection, threshold)
    _choose(connection)
    for table in ("pairs", "near_pairs", "sketches", "candidates"):
        connection.execute(f"DROP TABLE {table}")


def _sketch_all(connection: duckdb.DuckDBPyConnection) -> None:
    reader = (
        connection.cursor()
        .sql(
            """SELECT c.id, c.family, encode(lower(norm(completion)) || repeat(chr(0), 8)) AS text
        FROM parts JOIN candidates c ON parts.vote = c.representative"""
        )
        .to_arrow_reader(_TEXTS)
    )
    for batch in reader:
        minima = sketch(batch.column("text").cast(pa.large_binary()))
        table = pa.table(
            {
                "id": batch.column("id"),
                "sketch": pa.array([row.tobytes() for row in minima.astype(np.uint8)], pa.binary()),
                **{f"b{i}": column for i, column in enumerate(_fold(minima, batch.column("family").to_numpy()))},
            }
        )
        connection.register("batch", table)
        connection.execute("INSERT INTO sketches SELECT * FROM batch")
        connection.unregister("batch")


def sketch(texts: pa.LargeBinaryArray) -> np.ndarray:  # -> (N, 128) uint32
    """Minima of each text's shingles; every text ends with eight zero bytes, so that no shingle spans two texts."""
    offsets = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]
    buffer = np.frombuffer(texts.buffers()[2], np.uint8)[offsets[0] : offsets[-1]]
    count = len(buffer) - _SHINGLE + 1
    shingles = np.lib.stride_tricks.as_strided(buffer[:_SHINGLE].view("<u8"), (count,), (1,)).copy()
    shingles *= _MIX
    shingles ^= shingles >> np.uint64(32)
    shingles[buffer[:count] == 0] = 0  # what starts in the zero bytes would reach into the next text
    rows = np.minimum(offsets - offsets[0], count)
    digests = rensa.RMinHash.digest_matrix_from_flat_token_hashes(shingles, rows.tolist(), _MINIMA, _SEED)
    return np.array(digests.to_rows(), np.uint32)


def _fold(minima: np.ndarray, family: np.ndarray) -> np.ndarray:  # (N, 128), (N,) -> (16, N) uint64
    """A number a band that texts of the same family share when their minima in the band are equal."""
    bands = minima.reshape(len(minima), _BANDS, -1).astype(np.uint64)
    folded = (bands * _FOLD).sum(axis=2, dtype=np.uint64) ^ family.astype(np.uint64)[:, None]
    folded *= _MIX
    return np.ascontiguousarray((folded ^ (folded >> np.uint64(29))).T)


def _pair(connection: duckdb.DuckDBPyConnection, band: str) -> None:
    """Adds the pairs of a band: all of a small bucket, of a large one each with the best."""
    connection.execute(
        f"""INSERT INTO pairs
        WITH buckets AS (
            SELECT {band} AS bucket, count(*) AS texts, min(id) AS best FROM sketches GROUP BY ALL HAVING texts > 1
        ),
        members AS (SELECT id, bucket, texts, best FROM sketches JOIN buckets ON {band} = bucket)
        SELECT best, id FROM members WHERE id <> best
        UNION ALL
        SELECT a.id, b.id FROM members a JOIN members b USING (bucket)
        WHERE a.texts BETWEEN 3 AND {_SMALL_BUCKET} AND a.id <> a.best AND a.id < b.id"""
    )


def _check(connection: duckdb.DuckDBPyConnection, threshold: float) -> None:
    """Makes `near_pairs`: the pairs that are near."""
    connection.execute("CREATE TABLE near_pairs (better BIGINT, worse BIGINT)")
    reader = (
        connection.cursor()
        .sql(
            """SELECT better, worse, a.sketch AS one, b.sketch AS other FROM (SELECT DISTINCT better, worse FROM pairs)
        JOIN sketches a ON a.id = better JOIN sketches b ON b.id = worse"""
        )
        .to_arrow_reader(_TEXTS * 16)
    )
    for batch in reader:
        equal = (_bytes(batch.column("one")) == _bytes(batch.column("other"))).mean(axis=1)
        # bytes of unequal minima are equal once in 256
        similar = (equal - 1 / 256) / (1 - 1 / 256) >= threshold
        near = pa.Table.from_batches([batch.select(["better", "worse"])]).filter(pa.array(similar))
        connection.register("batch", near)
        connection.execute("INSERT INTO near_pairs SELECT better, worse FROM batch")
        connection.unregister("batch")


def _choose(connection: duckdb.DuckDBPyConnection) -> None:
    """Answers from the best one down: each leaves if it is near one that has not left."""
    gone = bytearray(connection.execute("SELECT coalesce(max(worse), 0) + 1 FROM near_pairs").fetchall()[0][0])
    ordered = connection.cursor().sql("SELECT better, worse FROM near_pairs ORDER BY worse, better")
    for batch in ordered.to_arrow_reader(_TEXTS * 16):
        # a better one has a smaller id: whether it has left is known
        for better, worse in zip(batch.column("better").to_pylist(), batch.column("worse").to_pylist(), strict=True):
            gone[worse] |= not gone[better]
    table = pa.table({"id": np.flatnonzero(np.frombuffer(gone, np.uint8))})
    connection.register("batch", table)
    connection.execute("INSERT INTO near_duplicates SELECT response_key FROM candidates JOIN batch USING (id)")
    connection.unregister("batch")


def _bytes(sketches: pa.BinaryArray) -> np.ndarray:  # -> (N, 128) uint8
    start = np.frombuffer(sketches.buffers()[1], np.int32)[sketches.offset]
    data = np.frombuffer(sketches.buffers()[2], np.uint8)[start : start + len(sketches) * _MINIMA]
    return data.reshape(len(sketches), _MINIMA)
