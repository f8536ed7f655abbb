"""`kto-dist store ls|verify|gc|export`: what they say is so, and what they do loses nothing."""

import csv
import errno
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from fake_scorer import IDENTITY, OTHER, fill, found_in, keys_of, of_format, run_fill, shards_of, value_of

from kto_dist.base.errors import UserError
from kto_dist.commands.cli import main
from kto_dist.store.gc import collect, plan_gc
from kto_dist.store.shards import KEY
from kto_dist.store.storage import LocalStorage
from kto_dist.store.store import FORMAT, Store
from kto_dist.store.tools import export, summarise, verify


def command(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["store", *map(str, arguments)])
    return result.exit_code, result.output


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def two_models(tmp_path: Path) -> Path:
    """100 pairs in five shards, and 30 in one."""
    first, second = Store(tmp_path, IDENTITY, model="first/model"), Store(tmp_path, OTHER)
    for start in range(0, 100, 20):
        fill(first, range(start, start + 20))
    fill(second, range(30))
    return tmp_path


def test_ls_says_what_is_in_a_store_and_for_which_model(two_models):
    status, said = command("ls", two_models)
    rows = [line.split() for line in said.splitlines()]
    assert status == 0 and rows[-1][:2] == ["130", "pairs,"]
    by_model = {row[0]: row for row in rows[1:-1]}
    first, second = by_model[IDENTITY.digest[:12]], by_model[OTHER.digest[:12]]
    assert first[1:6] == ["first/model", "float32", "sdpa", "100", "5"]
    assert second[1:6] == ["unknown", "bfloat16", "sdpa", "30", "1"]
    # created, and last used
    now = time.time()
    hours = [time.strftime("%Y-%m-%d %H:00", time.localtime(now - ago)) for ago in (0, 3600)]
    assert {" ".join(first[-4:-2]), " ".join(first[-2:]), " ".join(second[-2:])} <= set(hours)
    whole = [row.fingerprint for row in summarise(two_models)]
    assert sorted(whole) == sorted([IDENTITY.digest, OTHER.digest])


def test_ls_names_the_jobs_that_use_a_model(two_models):
    with Store(two_models, OTHER) as store:
        store.begin()
        (row,) = summarise(two_models, OTHER.digest[:6])
        assert row.users == [f"process {os.getpid()} on {os.uname().nodename}"]
    (row,) = summarise(two_models, OTHER.digest[:6])
    assert row.users == []


def test_verify_finds_each_damaged_shard_and_changes_nothing(two_models):
    assert command("verify", two_models)[0] == 0
    shards = shards_of(Store(two_models, IDENTITY))
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    before = tree(two_models)
    status, said = command("verify", two_models)
    assert status == 1 and f"{shards[1].name} is damaged" in said and "80 pairs, 4 of 5 shards are good" in said
    assert tree(two_models) == before


def test_verify_tells_how_far_two_values_of_a_pair_are_apart(two_models):
    fill(Store(two_models, IDENTITY), range(5, 15), noise=0.125)
    verdict = next(verdict for verdict in verify(two_models) if verdict.repeated)
    assert (verdict.pairs, verdict.repeated, verdict.good) == (100, 10, True)
    assert verdict.difference == pytest.approx(0.125)


def test_gc_shows_and_does_nothing_until_it_is_told_to(two_models):
    store = Store(two_models, IDENTITY)
    fill(store, range(100))  # all of them again
    (store.folder.path / "x.damaged").write_bytes(b"damaged")
    before = tree(two_models)
    status, said = command("gc", two_models)
    assert status == 0 and "100 pairs stand there more than once" in said and "set aside as damaged" in said
    assert "nothing was changed: add --yes" in said and tree(two_models) == before
    status, said = command("gc", two_models, "--yes")
    assert status == 0 and "done: 2 of 2" in said
    assert len(shards_of(store)) == 1 and not (store.folder.path / "x.damaged").exists()
    logps, found = found_in(two_models, 100)
    assert found.all() and (logps == value_of(IDENTITY, range(100))).all()
    assert command("gc", two_models) == (0, "nothing to do\n")


def test_gc_merges_many_small_shards_and_keeps_every_pair(tmp_path):
    store = Store(tmp_path, IDENTITY)
    for start in range(0, 200, 10):
        fill(store, range(start, start + 10))
    assert [done for _, done in collect(tmp_path, plan_gc(tmp_path), largest=64)] == [True]
    sizes = [pq.read_metadata(shard).num_rows for shard in shards_of(store)]
    assert sorted(sizes) == [8, 64, 64, 64]
    logps, found = found_in(tmp_path, 200)
    assert found.all() and (logps == value_of(IDENTITY, range(200))).all()
    assert not plan_gc(tmp_path)


def test_a_merge_that_is_killed_loses_nothing_and_the_next_one_ends_it(two_models):
    store = Store(two_models, IDENTITY)
    fill(store, range(100), noise=1e-3)

    class Killed(LocalStorage):
        def remove(self, name):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(collect(Killed(two_models), plan_gc(two_models)))
    assert len(shards_of(store)) == 7
    for _ in range(2):
        logps, found = found_in(two_models, 100)
        assert found.all() and (logps == value_of(IDENTITY, range(100))).all()
        list(collect(two_models, plan_gc(two_models)))
    assert len(shards_of(store)) == 1


def test_gc_leaves_alone_what_a_running_job_uses_and_says_who_it_is(tmp_path):
    job = run_fill(tmp_path, 0, 100_000, shard=5)
    stored = [int(job.stdout.readline()) for _ in range(30)][-1]
    status, said = command("gc", tmp_path, "--fingerprint", IDENTITY.digest[:8], "--yes")
    assert status == 0 and f"left alone, in use by process {job.pid}" in said
    assert found_in(tmp_path, stored)[1].all()
    job.send_signal(signal.SIGKILL)
    job.wait()
    job.stdout.close()
    # its mark is still there, but the process is not
    status, said = command("gc", tmp_path, "--fingerprint", IDENTITY.digest[:8], "--yes")
    assert "done: 1 of 1" in said and not list(tmp_path.iterdir())


def test_gc_asks_again_before_it_removes(two_models):
    removals = plan_gc(two_models, prefix=OTHER.digest[:8])
    with Store(two_models, OTHER) as store:
        store.begin()
        assert [done for _, done in collect(two_models, removals)] == [False]
        assert len(shards_of(store)) == 1
    assert [done for _, done in collect(two_models, removals)] == [True]


@pytest.mark.parametrize(("age", "alive"), [(3600, True), (25 * 3600, False)])
def test_a_job_of_another_machine_counts_until_it_has_said_nothing_for_a_day(two_models, age, alive):
    folder = Store(two_models, OTHER).folder.path
    use = {"time": time.time() - age, "host": "elsewhere", "boot": "b", "namespace": "n", "pid": 1, "started": "5"}
    (folder / "use-1.json").write_text(json.dumps(use))
    assert bool(plan_gc(two_models, prefix=OTHER.digest[:8])) != alive


def test_gc_by_age_takes_only_models_that_nobody_used_for_so_long(two_models):
    used = Store(two_models, OTHER).folder.path / "used.json"
    used.write_text(json.dumps({"time": time.time() - 40 * 86400}))
    assert not plan_gc(two_models, unused_days=41)
    (removal,) = plan_gc(two_models, unused_days=39)
    assert removal.folder == OTHER.digest[:32] and removal.why == "not used for 40 days"
    # using it makes it young again
    Store(two_models, OTHER)
    assert not plan_gc(two_models, unused_days=39)


@pytest.mark.parametrize("used", ("by a job", "by nobody", "nobody knows when"))
def test_gc_by_age_asks_for_the_last_use_again_before_it_removes(two_models, used):
    """A job that finds all its pairs leaves no mark that it is at work, only that the model was used."""
    note = Store(two_models, OTHER).folder.path / "used.json"
    note.write_text(json.dumps({"time": time.time() - 40 * 86400}))
    removals = plan_gc(two_models, unused_days=39)
    if used == "by a job":
        Store(two_models, OTHER).lookup(keys_of(range(30)))
    elif used == "nobody knows when":
        note.unlink()
    before = tree(two_models)
    assert [done for _, done in collect(two_models, removals)] == [used == "by nobody"]
    assert (tree(two_models) == before) == (used != "by nobody")


@pytest.mark.parametrize("ahead", (-1, 1))
@pytest.mark.parametrize("how", ((), ("--unused-days", 1)))
def test_models_of_another_format_stay_and_are_named_until_one_asks_for_their_removal(two_models, ahead, how):
    path = Store(two_models, OTHER).folder.path / "manifest.json"
    path.write_text(json.dumps(of_format(path, FORMAT + ahead)))
    (path.parent / "x.damaged").write_bytes(b"as that version says")
    before = tree(two_models)
    status, said = command("gc", two_models, "--yes", *how)
    names = f"names format {FORMAT + ahead}, and this version knows {FORMAT}"
    assert status == 0 and tree(two_models) == before
    assert f"{OTHER.digest[:32]}: left alone, manifest.json {names}: --fingerprint or --unused-days remove it" in said


@pytest.mark.parametrize("how", ("--fingerprint", "--unused-days"))
def test_a_model_of_an_older_format_goes_when_one_asks_for_it(two_models, how):
    path = Store(two_models, OTHER).folder.path / "manifest.json"
    path.write_text(json.dumps(of_format(path, FORMAT - 1)))
    (path.parent / "used.json").write_text(json.dumps({"time": time.time() - 40 * 86400}))
    status, said = command("gc", two_models, "--yes", how, OTHER.digest[:8] if how == "--fingerprint" else 39)
    assert status == 0 and "done: 1 of 1" in said and not path.parent.exists()
    assert found_in(two_models, 100)[1].all()


def test_a_reader_finds_everything_while_shards_are_merged_under_it(tmp_path):
    store = Store(tmp_path, IDENTITY)
    for start in range(0, 200, 10):
        fill(store, range(start, start + 10))
    merged = []

    class ListedBeforeTheMerge(LocalStorage):
        def files(self):
            listed = super().files()
            if not merged:
                merged.extend(collect(tmp_path, plan_gc(tmp_path)))
            return listed

    logps, found = Store(ListedBeforeTheMerge(tmp_path), IDENTITY).lookup(keys_of(range(200)))
    assert merged and found.all() and (logps == value_of(IDENTITY, range(200))).all()


@pytest.mark.parametrize("suffix", ("parquet", "csv"))
def test_export_writes_every_pair_once(two_models, suffix):
    fill(Store(two_models, IDENTITY), range(50), noise=1.0)
    target = two_models / "elsewhere" / f"pairs.{suffix}"
    status, said = command("export", two_models, target, "--fingerprint", IDENTITY.digest[:5])
    assert (status, said) == (0, f"100 pairs written to {target}\n")
    if suffix == "parquet":
        rows = pq.read_table(target).to_pylist()
    else:
        rows = [
            {"key": bytes.fromhex(row["key"]), "logp": float(row["logp"]), "tokens": int(row["tokens"])}
            for row in csv.DictReader(target.open())
        ]
    keys = np.frombuffer(b"".join(row["key"] for row in rows), KEY)
    logps, _ = found_in(two_models, 100)
    order = np.argsort(keys_of(range(100))["high"])
    assert (keys == keys_of(range(100))[order]).all()
    assert [row["logp"] for row in rows] == logps[order].tolist() and {row["tokens"] for row in rows} == {1}


def test_export_refuses_what_it_cannot_tell_apart_or_trust(two_models):
    with pytest.raises(UserError, match="holds 2 models .*choose one by --fingerprint"):
        export(two_models, two_models / "x.csv")
    with pytest.raises(UserError, match=r"x.json\) must end in .parquet or .csv"):
        export(two_models, two_models / "x.json")
    shards_of(Store(two_models, OTHER))[0].write_bytes(b"")
    with pytest.raises(UserError, match="1 shards of .* cannot be trusted .*is damaged"):
        export(two_models, two_models / "x.csv", OTHER.digest[:4])
    assert not (two_models / "x.csv").exists()


@pytest.mark.parametrize("name", ("ls", "verify", "gc"))
def test_what_is_no_store_is_refused(tmp_path, name):
    status, said = command(name, tmp_path / "nowhere")
    assert status == 2 and "nowhere holds no reference store: give the folder or URL" in said
    Store(tmp_path, IDENTITY)
    status, said = command(name, tmp_path, "--fingerprint", "zzz")
    assert status == 2 and "no model" in said and IDENTITY.digest[:32] in said


def unreadable(root: Path, names: set[str]) -> LocalStorage:
    """The disk gives no answer for these, as one does that is failing or was cut off."""

    class Failing(LocalStorage):
        def read(self, name):
            if name in names:
                raise OSError(errno.EIO, os.strerror(errno.EIO), name)
            return super().read(name)

    return Failing(root)


def test_what_cannot_be_read_is_no_damage_and_nothing_of_its_model_is_removed(two_models):
    shards, said = shards_of(Store(two_models, IDENTITY)), []
    shards[0].write_bytes(b"damaged")
    failing = unreadable(two_models, {shards[1].name})
    (verdict,) = verify(failing, IDENTITY.digest[:6])
    assert not verdict.good and verdict.pairs == 60
    assert verdict.unjudged[0][0] == shards[1].name and "cannot be read: " in verdict.unjudged[0][1]
    assert not plan_gc(failing, warn=said.append)
    assert f"{IDENTITY.digest[:32]}: left alone, 1 shards cannot be judged ({shards[1].name}" in said[0]
    with pytest.raises(UserError, match="1 shards of .* cannot be exported: .*cannot be read"):
        export(failing, two_models / "x.csv", IDENTITY.digest[:6])


def test_a_verdict_on_damage_and_on_what_cannot_be_judged_is_told(two_models):
    shards = shards_of(Store(two_models, IDENTITY))
    shards[0].write_bytes(b"damaged")
    status, said = command("verify", two_models, "--fingerprint", IDENTITY.digest[:6])
    assert status == 1 and "4 of 5 shards are good" in said and f"{shards[0].name} is damaged" in said


def test_a_shard_that_has_recovered_since_it_looked_damaged_stays(two_models):
    shards = shards_of(Store(two_models, IDENTITY))
    whole = shards[0].read_bytes()
    for shard in shards[:2]:
        shard.write_bytes(b"damaged")
    removals = plan_gc(two_models)
    shards[0].write_bytes(whole)
    assert [done for _, done in collect(two_models, removals)] == [False]
    assert shards_of(Store(two_models, IDENTITY)) == [shards[0], *shards[2:]]


MANIFESTS = ("another model's", "of other bytes", "without a format", "of a later format", "damaged", "missing")


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_a_manifest_that_is_not_the_models_own_costs_no_shard(two_models, manifest):
    path = Store(two_models, IDENTITY).folder.path / "manifest.json"
    content = json.loads(path.read_text())
    new = {
        "another model's": json.loads((Store(two_models, OTHER).folder.path / "manifest.json").read_text()),
        "of other bytes": {**content, "dtype": "float16"},
        "without a format": {key: value for key, value in content.items() if key not in ("format", "checksum")},
        "of a later format": of_format(path, FORMAT + 1),
        "damaged": [],
    }
    path.unlink() if manifest == "missing" else path.write_text(json.dumps(new[manifest]))
    before = tree(two_models)
    status, said = command("gc", two_models, "--yes")
    assert status == 0 and f"{IDENTITY.digest[:32]}: left alone" in said and tree(two_models) == before
    status, said = command("verify", two_models)
    if manifest != "of a later format":
        assert status == 1 and "0 of 5 shards are good" in said and "cannot be judged: manifest.json is" in said


def test_gc_by_fingerprint_and_age_needs_both(two_models):
    used = Store(two_models, OTHER).folder.path / "used.json"
    used.write_text(json.dumps({"time": time.time() - 40 * 86400}))
    assert not plan_gc(two_models, unused_days=41, prefix=OTHER.digest[:8])
    assert not plan_gc(two_models, unused_days=39, prefix=IDENTITY.digest[:8])
    assert [removal.folder for removal in plan_gc(two_models, unused_days=39, prefix=OTHER.digest[:8])] == [
        OTHER.digest[:32]
    ]


def test_gc_refuses_digits_that_several_models_start_with(tmp_path):
    names = [start + IDENTITY.digest[2:32] for start in ("ab", "ac")]
    for name in names:
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"2 models of .* starts with a: {names[0]}, {names[1]}; give more"):
        plan_gc(tmp_path, prefix="a")
    assert len(plan_gc(tmp_path, prefix="ab")) == 1


class Refusing(LocalStorage):
    """A disk that refuses one operation."""

    def __init__(self, path: Path, call: str):
        super().__init__(path)
        self.call = call

    def __truediv__(self, name):
        return Refusing(self.path / name, self.call)

    def refuse(self, call: str) -> None:
        if self.call == call:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def remove(self, name):
        self.refuse("remove")
        super().remove(name)

    def files(self):
        self.refuse("files")
        return super().files()

    def free(self):
        self.refuse("free")
        return super().free()


@pytest.mark.parametrize(
    ("call", "what"), [("remove", "could not be cleared out to the end"), ("files", "cannot be read")]
)
def test_what_a_disk_refuses_is_told_with_the_store_and_a_remedy(two_models, call, what):
    shards_of(Store(two_models, IDENTITY))[0].write_bytes(b"damaged")
    disk = Refusing(two_models, call)
    with pytest.raises(UserError, match=rf"the store \({two_models}\) {what}: .*check the path"):
        list(collect(disk, plan_gc(disk)))


def test_a_disk_that_does_not_tell_its_free_space_is_refused_before_any_work(two_models):
    with pytest.raises(UserError, match="its free space is unknown: .*give a folder"):
        Store(Refusing(two_models, "free"), IDENTITY).begin(5)


def test_a_mark_that_cannot_be_read_counts_as_a_job_at_work(two_models):
    with Store(two_models, OTHER) as store:
        store.begin()
        (mark,) = store.folder.path.glob("use-*.json")
        failing = unreadable(two_models, {mark.name})
        assert not plan_gc(failing, prefix=OTHER.digest[:8])
        assert "someone whose mark" in summarise(failing, OTHER.digest[:8])[0].users[0]


def test_a_reader_finds_what_a_listing_missed_while_shards_were_merged(tmp_path):
    """A listing takes its time: one entry is gone before it is reached, its replacement came behind."""
    store = Store(tmp_path, IDENTITY)
    for start in range(0, 60, 10):
        fill(store, range(start, start + 10))
    missed, calls = shards_of(store)[2].name, []

    class WithoutOne(LocalStorage):
        def files(self):
            calls.append(1)
            return [file for file in super().files() if len(calls) > 1 or file.name != missed]

    logps, found = Store(WithoutOne(tmp_path), IDENTITY).lookup(keys_of(range(60)))
    assert found.all() and (logps == value_of(IDENTITY, range(60))).all()


def test_damage_that_is_found_while_the_listing_changes_is_told(tmp_path):
    store = Store(tmp_path, IDENTITY)
    for start in range(0, 30, 10):
        fill(store, range(start, start + 10))
    shards, said, gone = shards_of(store), [], []
    shards[0].write_bytes(b"damaged")

    class GoneAtFirst(LocalStorage):
        def read(self, name):
            if name == shards[1].name and not gone:
                gone.append(name)
                raise FileNotFoundError(name)
            return super().read(name)

    reader = Store(GoneAtFirst(tmp_path), IDENTITY, warn=said.append)
    assert reader.lookup(keys_of(range(30)))[1].sum() == 20
    assert len(said) == 1 and said[0].startswith(f"{shards[0].name} in the reference store is damaged")
