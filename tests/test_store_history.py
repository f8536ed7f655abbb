"""Random histories of a store, (run, kill, damage, add rows, change config, clear out), against what it must answer.

The scorer is a function of the pair's number, so that a history takes milliseconds. A kill stops a write where SIGKILL
would: before the file is safe, before it has its name, after; nothing is tidied up. After every step a fresh reader
must find exactly the pairs of the shards that are whole, with exactly their numbers.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from fake_scorer import IDENTITY, OTHER, keys_of, shards_of, value_of
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from kto_dist.store.gc import collect, plan_gc
from kto_dist.store.store import Store
from kto_dist.store.tools import verify

PAIRS = 40
KEYS = keys_of(range(PAIRS))
NUMBER = {key.tobytes(): number for number, key in enumerate(KEYS)}
identities = st.sampled_from((IDENTITY, OTHER))
MOMENTS = ("not yet safe", "not yet named", "named")


class Killed(BaseException):
    pass


@contextmanager
def killed_at(moment: str, left: float) -> Iterator[None]:
    """The first write ends at that moment; of a file that was not yet safe a part is left."""
    fsync, replace, unlink = os.fsync, os.replace, Path.unlink
    seen = []

    def fsync_or_die(descriptor: int) -> None:
        seen.append(1)
        if moment == "not yet safe" and len(seen) == 1:
            os.ftruncate(descriptor, int(left * os.fstat(descriptor).st_size))
            raise Killed
        if moment == "named" and len(seen) == 2:  # the folder's
            raise Killed
        fsync(descriptor)

    def replace_or_die(*names: object) -> None:
        if moment == "not yet named":
            raise Killed
        replace(*names)

    os.fsync, os.replace, Path.unlink = fsync_or_die, replace_or_die, lambda *_, **__: None
    try:
        yield
    finally:
        os.fsync, os.replace, Path.unlink = fsync, replace, unlink


class History(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="kto-store-"))
        self.shards: dict[str, dict[Path, dict[int, float]]] = {IDENTITY.digest: {}, OTHER.digest: {}}
        # what each whole shard holds

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    def expected(self, identity) -> dict[int, float]:
        answers: dict[int, float] = {}
        for held in self.shards[identity.digest].values():
            for pair, value in held.items():
                answers[pair] = min(value, answers.get(pair, value))
        return answers

    def reader(self, identity) -> Store:
        return Store(self.root, identity, warn=lambda text: None)

    def check(self, store: Store, identity) -> np.ndarray:
        expected = self.expected(identity)
        logps, found = store.lookup(KEYS)
        assert set(np.flatnonzero(found)) == set(expected)
        assert all(logps[pair] == value for pair, value in expected.items())
        return found

    @rule(
        identity=identities,
        first=st.integers(0, PAIRS - 1),
        rows=st.integers(1, PAIRS),
        shard=st.integers(1, 20),
        noise=st.sampled_from((0.0, 1e-6, -1e-6)),
        kill=st.none() | st.tuples(st.integers(0, 3), st.sampled_from(MOMENTS), st.floats(0, 1)),
    )
    def run(self, identity, first, rows, shard, noise, kill):
        store = self.reader(identity)
        found = self.check(store, identity)
        missing = [pair for pair in range(first, min(first + rows, PAIRS)) if not found[pair]]
        store.begin(len(missing))
        for number, start in enumerate(range(0, len(missing), shard)):
            pairs = missing[start : start + shard]
            values = value_of(identity, pairs) + noise
            before = set(shards_of(store))
            dies = kill is not None and kill[0] == number
            try:
                if dies:
                    with killed_at(kill[1], kill[2]):
                        store.add(KEYS[pairs], values, np.ones(len(pairs)))
                else:
                    store.add(KEYS[pairs], values, np.ones(len(pairs)))
            except Killed:
                pass
            new = set(shards_of(store)) - before
            assert len(new) == (not dies or kill[1] == "named")
            self.shards[identity.digest] |= {path: dict(zip(pairs, values.tolist(), strict=True)) for path in new}
            if dies:
                return  # its mark of use stays behind
        self.check(store, identity)
        store.close()

    @rule(identity=identities, rows=st.integers(0, 12))
    def two_jobs_at_once(self, identity, rows):
        stores = [self.reader(identity), self.reader(identity)]
        found = [self.check(store, identity) for store in stores]
        missing = np.flatnonzero(~found[0])[:rows]
        for number, store in enumerate(stores):
            before = set(shards_of(store))
            values = value_of(identity, missing) + number * 1e-6
            store.add(KEYS[missing], values, np.ones(missing.size))
            held = dict(zip(missing.tolist(), values.tolist(), strict=True))
            self.shards[identity.digest] |= {path: held for path in set(shards_of(store)) - before}

    def one_of(self, identity, choice: int) -> Path | None:
        """A whole shard, by age: names are chance, and a history must be the same when it is played again."""
        whole = list(self.shards[identity.digest])
        return whole[choice % len(whole)] if whole else None

    @rule(
        identity=identities,
        choice=st.integers(0, 1000),
        kind=st.sampled_from(("truncated", "flipped", "deleted", "emptied")),
        place=st.floats(0, 1, exclude_max=True),
        bit=st.integers(0, 7),
    )
    def damage(self, identity, choice, kind, place, bit):
        shard = self.one_of(identity, choice)
        if shard is None:
            return
        content = bytearray(shard.read_bytes())
        where = int(place * len(content))
        if kind == "deleted":
            shard.unlink()
        elif kind == "flipped":
            content[where] ^= 1 << bit
            shard.write_bytes(content)
        else:
            shard.write_bytes(content[: where if kind == "truncated" else 0])
        del self.shards[identity.digest][shard]

    @rule(identity=identities, choice=st.integers(0, 1000), name=st.integers(0, 9))
    def copy(self, identity, choice, name):
        """Of a shard, into the other model's folder, and under another name into its own."""
        shard = self.one_of(identity, choice)
        if shard is not None:
            other = self.reader(OTHER if identity is IDENTITY else IDENTITY)
            shutil.copy(shard, other.folder.path / shard.name)
            shutil.copy(shard, shard.with_name(f"{name:064x}.parquet"))

    @rule(identity=identities, content=st.sampled_from((None, b"", b"{")))
    def lose_manifest(self, identity, content):
        manifest = self.reader(identity).folder.path / "manifest.json"
        manifest.unlink() if content is None else manifest.write_bytes(content)

    @rule(identity=identities)
    def clear_out(self, identity):
        store = self.reader(identity)
        for path in store.folder.path.glob("use-*.json"):
            path.unlink()  # this process lives, unlike the jobs that it has played
        removals = [removal for removal in plan_gc(self.root) if removal.folder == store.folder.path.name]
        assert all(done for _, done in collect(self.root, removals))
        self.check(self.reader(identity), identity)
        assert not [removal for removal in plan_gc(self.root) if removal.folder == store.folder.path.name]
        held = {}
        for path in shards_of(store):
            table = pq.read_table(path)
            numbers = map(NUMBER.get, table["key"].to_pylist())
            held[path] = dict(zip(numbers, table["logp"].to_pylist(), strict=True))
        by_content = sorted(held, key=lambda path: sorted(held[path].items()))
        self.shards[identity.digest] = {path: held[path] for path in by_content}

    @invariant()
    def a_fresh_reader_finds_what_is_whole(self):
        for identity in (IDENTITY, OTHER):
            self.check(self.reader(identity), identity)
            # and has set aside what is not
        assert all(verdict.good for verdict in verify(self.root))


@pytest.mark.parametrize("histories", [45, pytest.param(2000, marks=pytest.mark.soak)])
def test_after_any_history_a_store_answers_with_what_is_whole_and_nothing_else(histories):
    run_state_machine_as_test(
        History,
        settings=settings(
            max_examples=histories,
            stateful_step_count=12,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
            derandomize=histories == 45,
        ),
    )
