"""Workers: processes on any number of machines, which come and go, and score what one store lacks.

1. `join`   what the workers of one store must have in common; the first of them writes it
2. `fill`   piece by piece: take one that nobody has (`store/leases.py`), read what has come, score what is missing of
            it, give it back; at the end wait for the pieces of others, and take those whose holder is gone

A worker is a process alone: no launcher starts it, and it meets the others in the store only. Each cuts the pairs into
the same pieces (`pieces.py`). One that is killed costs its piece, or what of it was not yet stored; one that comes late
takes what is left. A pass without workers (`scoring.reference_logps`) takes no pieces, and leaves a note as well
(`note`) of what it computes on.
"""

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from kto_dist.base.errors import UserError
from kto_dist.base.exits import TERMINATED, Stopped
from kto_dist.base.signals import before_sigterm, sigterm_noted
from kto_dist.model.devices import named_device
from kto_dist.reference.pairs import PairList
from kto_dist.reference.pieces import CUT, Pieces, Tally, cut_pieces
from kto_dist.reference.progress import Progress, Watch
from kto_dist.reference.scoring import LoadedReference, Outcome, PassSettings, Sought, score_work, seek
from kto_dist.store.contents import told
from kto_dist.store.leases import SECONDS, Lease, LeaseLost, Leases, pieces_held
from kto_dist.store.shards import distinct
from kto_dist.store.storage import Storage
from kto_dist.store.store import Store

TERMS = "workers.json"
BATCHES_A_PIECE = 32
"""Micro-batches of the first worker: a minute or less of a model that is worth a GPU."""
MOST_PIECES = 2000
"""Of all pairs that a run needs: each is a shard or more, and a worker lists them between any two pieces."""
SECONDS_BETWEEN_LINES = 600.0
"""While a worker waits."""
PATIENCE = 600.0
"""Seconds without a micro-batch, after which a worker leaves its piece to others; more where they take long."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """What the workers of one store have in common."""

    device: str
    """On which the reference runs."""
    torch: str
    """With what it was built for: other kernels round otherwise."""
    piece_tokens: int
    """That a piece is cut at, or at more (`tokens_a_piece`): with other pieces they would score the same pairs."""
    cut: int = 1
    """How pieces are cut, a number that rises with `cut_pieces`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Working:
    """How a worker goes about it."""

    any_device: bool = False
    """Also where its device or torch is not that of the others, and rounds otherwise."""
    piece_tokens: int | None = None
    """That the first worker of a store cuts pieces at; None: by its micro-batches."""
    lease_seconds: float = SECONDS
    """Of silence, after which others take its piece."""
    patience: float = PATIENCE
    """Seconds."""


def own_terms(settings: PassSettings, piece_tokens: int | None = None) -> Terms:
    """Of this process."""
    return Terms(
        device=named_device(settings.device),
        torch=torch.__version__,
        piece_tokens=piece_tokens or BATCHES_A_PIECE * settings.cutting.tokens,
        cut=CUT,
    )


def tokens_a_piece(terms: Terms, tokens: int) -> int:
    """Of all `tokens` that a run needs, which may be far more than whoever wrote the terms has seen."""
    return max(terms.piece_tokens, -(-tokens // MOST_PIECES))


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
    if found.cut != own.cut:
        raise UserError(
            f"another version of kto_dist cuts the pairs of {folder} into other pieces ({found.cut} there and "
            f"{own.cut} here): use one version for all workers, or remove {TERMS} there once none is at work"
        )
    if (differing := _differing(found, own)) and not any_device:
        raise UserError(
            f"the pairs of this store were scored where numbers round otherwise than here ({differing}): use the same "
            "devices and torch for one model, or add --any-device, which mixes log-probs that differ by a rounding"
        )
    return found


def note(folder: Storage, own: Terms, warn: Callable[[str], None]) -> None:
    """What a pass without leases computes on, for workers that come after it; `warn` where they were there before it,
    and it rounds otherwise. Never an error: who may not write will hear of it when there is something to store."""
    with contextlib.suppress(OSError):
        found = _read_terms(folder)
        if found is None:
            folder.create(TERMS, json.dumps(asdict(own), indent=1).encode())
        elif differing := _differing(found, own):
            warn(
                f"pairs of this reference were scored where numbers round otherwise than here ({differing}), so its "
                "log-probs differ by a rounding: for numbers of one kind give another reference.store"
            )


def _differing(found: Terms, own: Terms) -> str:
    return "; ".join(
        f"{name} is {theirs} there and {mine} here"
        for name in ("device", "torch")
        if (theirs := getattr(found, name)) != (mine := getattr(own, name))
    )


def _read_terms(folder: Storage) -> Terms | None:
    """None where there are none, or they are damaged."""
    for attempt in range(5):  # where there are no hard links its writer may be in the middle of it
        try:
            said = json.loads(folder.read(TERMS))
            # another version may say more
            return Terms(**{name: said[name] for name in Terms.__slots__ if name in said})
        except FileNotFoundError:
            return None
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
    tokens: np.ndarray
    """(D,)"""
    tally: Tally

    def missing(self) -> int:
        return int((~self.tally.found).sum())

    def cut(self, piece_tokens: int) -> Pieces:
        group = distinct(self.sought.prompt_keys[self.places])[1]
        return cut_pieces(self.sought.keys[self.places], group, self.tokens, most=piece_tokens)


def _list(pairs: PairList, settings: PassSettings) -> _List:
    sought = seek(pairs.examples, pairs.prompts, pairs.completions, settings.cutting)
    places = distinct(sought.keys)[0]
    return _List(
        title=pairs.title,
        sought=sought,
        places=places,
        tokens=(sought.prompt_kept + sought.completion_kept)[places],
        tally=Tally(sought.keys[places]),
    )


class Worker:
    """What one process does for a store, list by list: `look`, and `fill` where something is missing."""

    def __init__(
        self,
        lists: Sequence[PairList],
        *,
        store: Store,
        load: Callable[[], LoadedReference],
        settings: PassSettings,
        say: Callable[[str], None],
        warn: Callable[[str], None],
    ):
        self._started = time.monotonic()
        self._lists = [_list(pairs, settings) for pairs in lists]
        self._store, self._load, self._settings = store, load, settings
        self._say, self._warn = say, warn
        self._stopping: Callable[[], bool] = lambda: False
        self._scored = self._read = 0
        self._scoring_seconds = 0.0
        self._shared = False

    def look(self) -> int:
        """Pairs that the store lacks. Raises `UserError`."""
        for shard in self._store.news():
            for each in self._lists:
                each.tally.add(shard)
        return sum(each.missing() for each in self._lists)

    def fill(
        self,
        leases: Leases,
        terms: Terms,
        watch: Callable[[str], contextlib.AbstractContextManager[Watch]],
    ) -> None:
        """Returns when the store holds every pair. `watch`: what shows the progress of a list, by its title.

        Raises `UserError`, and `Stopped` after the micro-batch during which a SIGTERM came: what was scored is stored
        then, and the piece given back.
        """
        tokens = sum(int(each.tokens.sum()) for each in self._lists)
        cut = [each.cut(tokens_a_piece(terms, tokens)) for each in self._lists]
        names = {name for pieces in cut for name in pieces.names}
        with contextlib.suppress(OSError):
            if others := pieces_held(self._store.folder) - names:
                self._warn(
                    f"{len(others):,} pieces that other workers have, or were killed with, are none of this config's: "
                    "pairs that both need may be scored twice; workers share them where log, model and settings are "
                    "the same"
                )
        with sigterm_noted() as self._stopping:
            while missing := self.look():
                self._store.begin(missing)
                for each, pieces in zip(self._lists, cut, strict=True):
                    with watch(each.title) as shown:
                        self._fill(each, pieces, leases, _Speed(each, shown))
                if self._store.has_lost():
                    self._warn(
                        "shards are gone from the reference store that were there: what is in no other is scored again"
                    )
                    for each in self._lists:
                        each.tally.forget()
        leases.sweep(names)

    def outcome(self) -> Outcome:
        """Of all until now."""
        pairs = sum(each.places.size for each in self._lists)
        return Outcome(
            pairs=pairs,
            hits=max(0, pairs - self._scored),
            scored_once=self._scored,
            scored_tokens=self._read,
            scoring_seconds=self._scoring_seconds,
            seconds=time.monotonic() - self._started,
            shared=self._shared,
        )

    def _fill(self, listed: _List, pieces: Pieces, leases: Leases, speed: "_Speed") -> None:
        said: float | None = None
        of_pair = pieces.of_pair
        # those that lack pairs, the longest first
        while names := [pieces.names[number] for number in np.unique(of_pair[~listed.tally.found])]:
            self._stop_if_asked()
            lease = leases.take(names)
            if lease is None:
                if said is None or time.monotonic() - said > SECONDS_BETWEEN_LINES:
                    said = time.monotonic()
                    self._say(_waiting(listed.title, names, leases))
                time.sleep(leases.pause)
            else:
                with lease:
                    # whoever had it before has stored what it scored by now
                    self.look()
                    speed.refreshed()
                    piece = pieces[pieces.names.index(lease.piece)]
                    # in the order of a pass: one worker with one piece stores the same, to the last bit
                    missing = np.sort(piece[~listed.tally.found[piece]])
                    try:
                        self._score(listed, missing, lease, speed)
                    except LeaseLost:
                        self._warn(
                            "a lease was not renewed in time, and another worker may have its piece: what was scored "
                            "of it and not yet stored is given up"
                        )
            self.look()
            speed.refreshed()

    def _score(self, listed: _List, missing: np.ndarray, lease: Lease, speed: "_Speed") -> None:
        """`missing`: (M,) of the different pairs. Raises `LeaseLost` where another worker has the piece by now; what is
        stored of it stays."""
        if not missing.size:
            return
        work = listed.sought.work(listed.places[missing])
        self._stop_if_asked()
        # loading may take longer than a machine has that is taken away
        with before_sigterm(lease.end):
            reference = self._load()
        began, tokens = time.monotonic(), int(work.tokens.sum())

        def watch(progress: Progress) -> None:
            speed.tell((progress.done, tokens * progress.done // progress.total))
            # last, since a write may follow
            lease.keep()
            self._stop_if_asked()

        scored = score_work(work, reference, self._settings, self._store, watch, self._warn)
        # stored, whatever a listing shows: one may lag behind
        listed.tally.found[missing] = True
        self._settings = scored.settings
        self._scored += work.keys.size
        self._read += tokens
        self._scoring_seconds += time.monotonic() - began
        self._shared |= scored.shared

    def _stop_if_asked(self) -> None:
        if self._stopping():
            raise Stopped("a signal ended this worker: what it has scored is stored, and its piece is free", TERMINATED)


def _waiting(title: str, names: list[str], leases: Leases) -> str:
    holders = leases.holders(names)
    who = f" ({', '.join(holders[:3])}{' ...' if len(holders) > 3 else ''})" if holders else ""
    return (
        f"{title}: waiting for {len(names):,} {'piece' if len(names) == 1 else 'pieces'} that other workers have{who}; "
        "one is taken over when its worker ends, or says nothing for the time of its lease"
    )


class _Speed:
    """What all workers together do for a list, as this one sees it in the store."""

    def __init__(self, listed: _List, watch: Watch):
        self._listed, self._watch = listed, watch
        self._all = listed.places.size, int(listed.tokens.sum())
        self._started = time.monotonic()
        self._before = self._stored = self._look()

    def _look(self) -> tuple[int, int]:
        found = self._listed.tally.found
        return int(found.sum()), int(self._listed.tokens[found].sum())

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
