"""A log is cut where its rows can be read from, and its parts together are the whole, row for row."""

import gzip
import itertools
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from thumbs_logs import GOOD, write

from kto_dist.base.errors import UserError
from kto_dist.data.columns import Mapped
from kto_dist.data.formats import FileSoFar, LogReader
from kto_dist.data.rows import BadRows, Row
from kto_dist.data.sources import Source, find_sources
from kto_dist.data.stretches import Stretch, joined, neighbours, share_out


def reader(sources: list[Source], **settings: object) -> LogReader:
    given = {"mapped": Mapped(names={}), "on_bad_row": "skip", "soft": False, **settings}
    return LogReader(sources=sources, origins=[*range(len(sources))], **given)


def thumb(number: int, **more: object) -> dict[str, object]:
    return {"prompt": f"ask {number}", "completion": f"é{number}", "label": number % 3 > 0, **more}


def test_things_are_shared_out_as_neighbours_of_about_equal_weight():
    assert neighbours([5, 1, 1, 5], 2) == [range(2), range(2, 4)]
    assert neighbours([10, 10, 10], 3) == [range(1), range(1, 2), range(2, 3)]
    assert neighbours([100, 1], 3) == [range(0), range(1), range(1, 2)]
    for sizes in ([1], [0, 0], [1, 0], [3, 9, 1, 1, 1, 30, 2]):
        for count in (1, 2, 5):
            shares = neighbours(sizes, count)
            assert len(shares) == count and [place for share in shares for place in share] == [*range(len(sizes))]


LINE = st.sampled_from([b"", b" ", b"{}", "{é}".encode(), b"x" * 70]) | st.binary(max_size=12)


@given(
    files=st.lists(st.tuples(st.lists(LINE, max_size=9), st.booleans()), min_size=1, max_size=3),
    count=st.integers(1, 12),
)
def test_stretches_of_json_lines_start_at_lines_and_are_the_whole_log(tmp_path_factory, files, count):
    folder = tmp_path_factory.mktemp("log")
    contents = [b"\n".join(lines) + b"\n" * ends for lines, ends in files]
    for number, content in enumerate(contents):
        (folder / f"{number}.jsonl").write_bytes(content)
    shares = share_out(find_sources([str(folder)]), count, 1)
    assert len(shares) == count
    stretches = [stretch for share in shares for stretch in share]
    for number, content in enumerate(contents):
        own = [stretch for stretch in stretches if stretch.file == number]
        assert b"".join(content[stretch.start : stretch.stop] for stretch in own) == content
        assert [stretch.stop for stretch in own] == [*(stretch.start for stretch in own[1:]), None]
        assert all(content[stretch.start - 1 : stretch.start] == b"\n" for stretch in own[1:])
    assert joined(stretches) == [Stretch(file=number) for number in range(len(files))]


def test_one_long_file_is_shared_evenly_and_a_short_one_is_not_cut(tmp_path):
    path = write(tmp_path / "log.jsonl", *(thumb(number) for number in range(2000)))
    size = Path(path).stat().st_size
    shares = share_out(find_sources([path]), 4, 1000)
    edges = [share[0].start for share in shares] + [size]
    assert all(abs((stop - start) - size / 4) < 200 for start, stop in itertools.pairwise(edges))
    # no part is smaller than what is asked for
    assert [len(share) for share in share_out(find_sources([path]), 4, size // 3)] == [0, 1, 0, 1]
    assert sum(map(len, share_out(find_sources([path]), 4, size // 2 + 1))) == 1
    # many files are shared out whole, however short
    (tmp_path / "many").mkdir()
    for number in range(6):
        write(tmp_path / "many" / f"{number}.jsonl", GOOD)
    shares = share_out(find_sources([str(tmp_path / "many")]), 3, 1000)
    assert [[stretch.file for stretch in share] for share in shares] == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("kind", ["array", "array after a mark", "gzip", "csv", "one row group"])
def test_what_has_to_be_read_from_its_start_stays_whole(tmp_path, kind):
    rows = [thumb(number) for number in range(50)]
    if kind == "csv":
        path = tmp_path / "log.csv"
        path.write_text("prompt,completion,label\n" + 'a,"two\nlines",true\n' * 50)
    elif kind == "one row group":
        path = tmp_path / "log.parquet"
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "gzip":
        path = tmp_path / "log.jsonl.gz"
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    else:
        path = tmp_path / "log.json"
        path.write_bytes((b"\xef\xbb\xbf\n \n" if "mark" in kind else b"") + json.dumps(rows, indent=1).encode())
    shares = share_out(find_sources([str(path)]), 3, 1)
    assert [stretch for share in shares for stretch in share] == [Stretch(file=0)]


def saved(folder: Path, kind: str, rows: list[dict[str, object]]) -> str:
    if kind == "dataset":
        datasets.Dataset.from_list(rows).save_to_disk(str(folder / "log"))
        return str(folder / "log")
    if kind == "parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), folder / "log.parquet", row_group_size=7)
        return str(folder / "log.parquet")
    return write(folder / "log.jsonl", *rows)


def read_in_parts(sources: list[Source], shares: list[tuple[Stretch, ...]]) -> tuple[list[Row], BadRows, FileSoFar]:
    rows, bad, so_far = [], BadRows(), FileSoFar()
    for share in shares:
        part = reader(sources)
        rows += part.read(share)
        bad.extend(part.bad)
        so_far = so_far.followed_by(part.files.get(0, FileSoFar()))
    return rows, bad, so_far


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "dataset"])
@pytest.mark.parametrize("count", [2, 5, 70])
def test_rows_places_and_counts_are_those_of_the_whole_file(tmp_path, kind, count):
    rows = [thumb(number, mood="good" if number % 4 else None) for number in range(60)]
    for number in (0, 7, 31, 32, 59):
        rows[number]["label"] = None
    for number in (3, 50):
        rows[number]["completion"] = None
    sources = find_sources([saved(tmp_path, kind, rows)])
    alone = reader(sources)
    whole = [*alone.read([Stretch(file=0)])]
    shares = share_out(sources, count, 1)
    assert sum(map(len, shares)) > 1
    found, bad, so_far = read_in_parts(sources, shares)
    assert len(whole) == 53 and found == whole
    assert bad == alone.bad and bad.counts.total() == 7 and bad.unused["mood"] > 0
    expected = alone.files[0]
    assert (so_far.records, so_far.rows, so_far.problem) == (60, 53, expected.problem) and so_far.begun


def test_a_stretch_is_read_in_the_layout_that_the_file_starts_with(tmp_path):
    """Later rows have columns of a pair beside the others, and alone they would be taken for pairs."""
    first = {"prompt": "nothing", "else": 1}
    pairs = [thumb(number, chosen="a", rejected="b") for number in range(20)]
    sources = find_sources([write(tmp_path / "log.jsonl", first, thumb(0), *pairs)])
    whole = [*reader(sources).read([Stretch(file=0)])]
    found, _, _ = read_in_parts(sources, share_out(sources, 3, 1))
    assert found == whole and len(whole) == 21
    sources = find_sources([write(tmp_path / "other.jsonl", first, *pairs)])
    whole = [*reader(sources).read([Stretch(file=0)])]
    assert len(whole) == 40 and {row.pair for row in whole} == {*range(20)}


def test_the_first_mistake_of_a_stretch_has_its_line_in_the_file(tmp_path):
    rows = [thumb(number) for number in range(40)]
    rows[30]["label"] = "perhaps"
    sources = find_sources([write(tmp_path / "log.jsonl", *rows)])
    first, second = share_out(sources, 2, 1)
    assert len([*reader(sources, on_bad_row="error").read(first)]) > 15
    with pytest.raises(UserError, match=r"log\.jsonl:31: "):
        [*reader(sources, on_bad_row="error").read(second)]
