"""Workers: processes on any number of machines, which come and go, and score what one store lacks.

1. `join`   what the workers of one store must have in common; the first of them writes it
2. `fill`   piece by piece: take one that nobody has (`store/leases.py`), read what has come, score what is missing of
            it, give it back; at the end wait for the pieces of others, and take those whose holder is gone

A worker is a process alone: no launcher starts it, and it meets the others in the store only. Each cuts the pairs into
the same pieces (`pieces.py`). One that is killed costs its piece, or what of it was not yet stored; one that comes late
takes what is left. A pass without workers (`scoring.reference_logps`) is one piece that nobody else can take.
"""

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from kto_dist.base.errors import UserError
from kto_dist.reference.pairs import PairList
from kto_dist.reference.pieces import Pieces, Tally, cut_pieces
from kto_dist.reference.progress import Progress, Watch
from kto_dist.reference.scoring import LoadedReference, Outcome, PassSettings, Sought, distinct, score_work, seek
from kto_dist.store.contents import told
from kto_dist.store.leases import SECONDS, Lease, LeaseLost, Leases
from kto_dist.store.storage import Storage
from kto_dist.store.store import Store

TERMS = "workers.json"
BATCHES_A_PIECE = 32
"""Micro-batches of the first worker: a minute or less of a model that is worth a GPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """What the workers of one store have in common."""

    device: str
    """On which the reference runs."""
    torch: str
    """With what it was built for: other kernels round otherwise."""
    piece_tokens: int
    """That a piece is cut at: with other pieces they would score the same pairs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Working:
    """How a worker goes about it."""

    any_device: bool = False
    """Also where its device or torch is not that of the others, and rounds otherwise."""
    piece_tokens: int | None = None
    """That the first worker of a store cuts pieces at; None: by its micro-batches."""
    lease_seconds: float = SECONDS
    """Of silence, after which others take its piece."""


def join(folder: Storage, own: Terms, *, any_device: bool) -> Terms:
    """The terms of the store's workers, which are `own` for the first. Raises `UserError` where those of others
    differ."""
    with told(folder, "cannot be worked on"):
        if folder.create(TERMS, json.dumps(asdict(own), indent=1).encode()):
            return own
        found = _read_terms(folder)
    if found is None:
        raise UserError(
            f"{TERMS} in {folder} is damaged, so it is unknown on which device its pairs were scored: remove it, and "
            "the next worker writes its own"
        )
    differing = [
        f"{name} is {theirs} there and {mine} here"
        for name in ("device", "torch")
        if (theirs := getattr(found, name)) != (mine := getattr(own, name))
    ]
    if differing and not any_device:
        raise UserError(
            f"the workers of this store round otherwise than this one would ({'; '.join(differing)}): use the same "
            "devices and torch for one model, or add --any-device, which mixes log-probs that differ by a rounding"
        )
    return found


def _read_terms(folder: Storage) -> Terms | None:
    for attempt in range(5):  # where there are no hard links its writer may be in the middle of it
        try:
            return Terms(**json.loads(folder.read(TERMS)))
        except (ValueError, TypeError):
            time.sleep(0.2 * attempt)
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class _List:
    """The different pairs of one list, and how far they are."""

    title: str
    sought: Sought
    places: np.ndarray
    """(D,) of the different ones."""
    pieces: Pieces
    of_pair: np.ndarray
    """(D,) which piece each is in."""
    tokens: np.ndarray
    """(D,)"""
    tally: Tally

    def open(self) -> list[str]:
        """Names of the pieces that lack pairs, the longest first."""
        return [self.pieces.names[number] for number in np.unique(self.of_pair[~self.tally.found])]

    def missing(self, name: str) -> np.ndarray:
        """(M,) places of a piece's pairs that are to be scored."""
        piece = self.pieces[self.pieces.names.index(name)]
        return self.places[piece[~self.tally.found[piece]]]


def _list(pairs: PairList, settings: PassSettings, piece_tokens: int) -> _List:
    sought = seek(pairs.examples, pairs.prompts, pairs.completions, settings.cutting)
    places = distinct(sought.keys)[0]
    tokens = (sought.prompt_kept + sought.completion_kept)[places]
    group = distinct(sought.prompt_keys[places])[1]
    pieces = cut_pieces(sought.keys[places], group, tokens, most=piece_tokens)
    return _List(
        title=pairs.title,
        sought=sought,
        places=places,
        pieces=pieces,
        of_pair=pieces.of_pair,
        tokens=tokens,
        tally=Tally(sought.keys[places]),
    )


class Worker:
    """What one process does for a store, list by list; `fill` is the whole of it."""

    def __init__(
        self,
        lists: Sequence[PairList],
        *,
        store: Store,
        leases: Leases,
        load: Callable[[], LoadedReference],
        settings: PassSettings,
        piece_tokens: int,
        say: Callable[[str], None],
        warn: Callable[[str], None],
    ):
        self._lists = [_list(pairs, settings, piece_tokens) for pairs in lists]
        self._store, self._leases, self._load, self._settings = store, leases, load, settings
        self._say, self._warn = say, warn
        self._scored = self._read = 0
        self._scoring_seconds = 0.0
        self._shared = False

    def fill(self, watch: Callable[[str], contextlib.AbstractContextManager[Watch]]) -> Outcome:
        """Returns when the store holds every pair. `watch`: what shows the progress of a list, by its title.

        Raises `UserError`.
        """
        started = time.monotonic()
        self._refresh()
        missing = sum(int((~each.tally.found).sum()) for each in self._lists)
        if missing:
            self._store.begin(missing)
        for each in self._lists:
            with watch(each.title) as shown:
                self._fill(each, _Speed(each, shown))
        self._leases.sweep({name for each in self._lists for name in each.pieces.names})
        pairs = sum(each.places.size for each in self._lists)
        return Outcome(
            pairs=pairs,
            hits=pairs - self._scored,
            scored_once=self._scored,
            scored_tokens=self._read,
            scoring_seconds=self._scoring_seconds,
            seconds=time.monotonic() - started,
            shared=self._shared,
        )

    def _refresh(self) -> None:
        shards = self._store.news()
        for each in self._lists:
            each.tally.add(shards)

    def _fill(self, each: _List, speed: "_Speed") -> None:
        waiting = False
        while names := each.open():
            lease = self._leases.take(names)
            if lease is None:
                if not waiting:
                    self._say(f"{each.title}: waiting for {len(names):,} pieces that other workers have")
                waiting = True
                time.sleep(self._leases.pause)
            else:
                with lease:
                    # whoever had it before has stored what it scored by now
                    self._refresh()
                    speed.refreshed()
                    try:
                        self._score(each, lease, speed)
                    except LeaseLost:
                        self._warn(
                            "a lease was not renewed in time, and another worker may have its piece: what was scored "
                            "of it and not yet stored is given up"
                        )
            self._refresh()
            speed.refreshed()

    def _score(self, each: _List, lease: Lease, speed: "_Speed") -> None:
        """Raises `LeaseLost` where another worker has the piece by now; what is stored of it stays."""
        work = each.sought.work(each.missing(lease.piece))
        if not work.keys.size:
            return
        reference = self._load()
        began, tokens = time.monotonic(), int(work.tokens.sum())

        def watch(progress: Progress) -> None:
            lease.keep()
            speed.tell((progress.done, tokens * progress.done // progress.total))

        scored = score_work(work, reference, self._settings, self._store, watch, self._warn)
        self._settings = scored.settings
        self._scored += work.keys.size
        self._read += tokens
        self._scoring_seconds += time.monotonic() - began
        self._shared |= scored.shared


class _Speed:
    """What all workers together do for a list, as this one sees it in the store."""

    def __init__(self, each: _List, watch: Watch):
        self._each, self._watch = each, watch
        self._all = each.places.size, int(each.tokens.sum())
        self._started = time.monotonic()
        self._before = self._stored = self._look()

    def _look(self) -> tuple[int, int]:
        found = self._each.tally.found
        return int(found.sum()), int(self._each.tokens[found].sum())

    def refreshed(self) -> None:
        self._stored = self._look()
        self.tell()

    def tell(self, own: tuple[int, int] = (0, 0)) -> None:
        """`own`: pairs and tokens of the piece at hand."""
        pairs, read = (min(a + b, most) for a, b, most in zip(self._stored, own, self._all, strict=True))
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = (read - self._before[1]) / seconds
        if not rate:  # nothing has come yet that would tell one
            return
        self._watch(
            Progress(
                done=pairs,
                total=self._all[0],
                rows_per_second=(pairs - self._before[0]) / seconds,
                tokens_per_second=rate,
                seconds_left=(self._all[1] - read) / rate,
            )
        )
