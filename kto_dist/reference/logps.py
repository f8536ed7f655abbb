"""The reference's log-prob of every pair that a run will meet: looked up, or scored by a reference that then leaves.

In:  `ReferenceSetup`, its fingerprint, and lists of pairs. Out: `ReferenceLogps`. The reference is loaded if the store
lacks something, and is gone afterwards. `fill_store` does the same as one of several workers, and keeps no log-prob.
"""

import contextlib
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial, reduce

import torch

from kto_dist.base import agree, comm, restart
from kto_dist.base.console import Console
from kto_dist.base.errors import UserError
from kto_dist.data.examples import check_ids
from kto_dist.model import ops
from kto_dist.model.adapters import from_folder
from kto_dist.model.checks import check_scoring
from kto_dist.model.engines import Reference
from kto_dist.model.memory import is_out_of_memory
from kto_dist.model.weights import Weights
from kto_dist.reference.pairs import PairList, RefLogps
from kto_dist.reference.prefix import sharing_is_exact
from kto_dist.reference.progress import Progress, Watch
from kto_dist.reference.scoring import LoadedReference, Outcome, look_up, reference_logps
from kto_dist.reference.setup import ReferenceSetup
from kto_dist.reference.worker import Worker, Working, join, note, own_terms
from kto_dist.store.fingerprint import Fingerprint
from kto_dist.store.leases import Leases, Patience, pieces_held
from kto_dist.store.store import Store
from kto_dist.store.tools import other_precisions

Engine = Callable[..., Reference]
"""`model.engines.Reference`, or what stands in its place."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceLogps:
    """The reference's side of a run."""

    train: RefLogps
    heldout: RefLogps | None
    fingerprint: Fingerprint
    outcome: Outcome
    weights: Weights
    """What the reference's files hold that is not used, or is rounded."""


def score_reference(
    lists: Sequence[PairList],
    setup: ReferenceSetup,
    fingerprint: Fingerprint,
    console: Console,
    watch: Watch = lambda progress: None,
    begin: Callable[[], None] = lambda: None,
    engine: Engine = Reference,
) -> ReferenceLogps:
    """Collective. Looks every pair up in the store and scores what is missing; no model is left in memory after.

    `lists`: the training pairs, then the held-out ones if there are any. `begin` is called on every rank when it is
    clear that something has to be scored, before the reference is loaded. Raises `UserError`.
    """
    _check_tokens(lists, setup)
    results: list[tuple[RefLogps, Outcome]] = []
    called = setup.role.removeprefix("the ")
    warnings = _Warnings(console)
    store = agree.together(lambda: Store(setup.store, fingerprint, warn=warnings.add, model=setup.path))

    def load_it() -> LoadedReference:
        _mention_workers(store, console)
        if comm.is_main():
            note(store.folder, own_terms(setup.settings), console.warn)
        return _load(setup, fingerprint, console, begin, engine)

    started = time.monotonic()
    with store, lazily(load_it) as load:
        looked_up = look_up(lists, store, setup.settings.cutting)
        for pairs in lists:
            before = sum(outcome.scored_once for _, outcome in results)
            with console.progress(f"{called}: {pairs.title}") as show:
                results.append(
                    reference_logps(
                        looked_up,
                        store=store,
                        load=load,
                        settings=setup.settings,
                        watch=_shown(show, watch, before),
                        warn=console.warn,
                    )
                )
            warnings.tell()
    total = reduce(operator.add, (outcome for _, outcome in results))
    total = replace(total, seconds=time.monotonic() - started)
    scored = f"{total.scored_once:,} scored{_how(total)}"
    repeats = f", {total.repeated:,} repeats of these" if total.repeated else ""
    found = f"{total.hits:,} from the store"
    console.say(f"{called}: {total.pairs:,} pairs, {found}, {scored}{repeats} in {total.seconds:.1f} s")
    return ReferenceLogps(
        train=results[0][0],
        heldout=results[1][0] if len(results) > 1 else None,
        fingerprint=fingerprint,
        outcome=total,
        weights=setup.weights,
    )


def _check_tokens(lists: Sequence[PairList], setup: ReferenceSetup) -> None:
    """Collective. Raises `UserError`."""
    vocabulary = getattr(setup.model_config.get_text_config(), "vocab_size", None)
    for pairs in lists:
        agree.together(partial(check_ids, pairs.examples, vocabulary, setup.name, pairs.title))


def fill_store(
    lists: Sequence[PairList],
    setup: ReferenceSetup,
    fingerprint: Fingerprint,
    console: Console,
    working: Working,
    watch: Watch = lambda progress: None,
    engine: Engine = Reference,
) -> Outcome:
    """Scores pieces of what the store lacks, beside other workers, in a process alone; returns when it lacks nothing.

    Raises `UserError`, also where the store's workers compute on another device, and `Stopped` after a SIGTERM.
    """
    _check_tokens(lists, setup)

    @contextmanager
    def shown(title: str) -> Iterator[Watch]:
        with console.progress(f"reference: {title}") as show:
            yield _shown(show, watch, 0)

    with (
        Store(setup.store, fingerprint, warn=console.warn, model=setup.path) as store,
        lazily(lambda: _load(setup, fingerprint, console, lambda: None, engine)) as load,
    ):
        for text in other_precisions(setup.store, fingerprint):
            console.warn(text)
        worker = Worker(lists, store=store, load=load, settings=setup.settings, say=console.say, warn=console.warn)
        # where nothing is missing no folder need be written, and any device will do
        if missing := worker.look():
            # loading, or waiting for others, may take long
            console.say(f"reference: the store lacks {missing:,} pairs, which workers score piece by piece")
            patience = Patience(least=working.patience, warn=console.warn)
            leases = Leases(store.folder, working.lease_seconds, patience=patience)
            terms = join(store.folder, own_terms(setup.settings, working.piece_tokens), any_device=working.any_device)
            with restart.before(lambda failed: leases.give_back()):
                worker.fill(leases, terms, shown)
        outcome = worker.outcome()
    console.say(
        f"reference: all of {outcome.pairs:,} pairs are stored, {outcome.scored_once:,} scored here{_how(outcome)} in "
        f"{outcome.seconds:.1f} s"
    )
    return outcome


def _how(outcome: Outcome) -> str:
    return " with shared prompts" if outcome.shared else ""


def _mention_workers(store: Store, console: Console) -> None:
    """A pass without leases scores again what workers have in hand."""
    with contextlib.suppress(OSError):
        if pieces := pieces_held(store.folder):
            console.warn(
                f"workers have {len(pieces):,} pieces of this reference in hand (kto-dist precompute --worker), or "
                "were killed with them on other machines, and this pass scores whatever is not stored yet, a second "
                "time: wait until they are done, or start one of them in place of this"
            )


def _shown(show: Callable[[int, int, float, float, float], None], watch: Watch, before: int) -> Watch:
    """`before`: pairs of the lists before this one, which were scored already."""

    def both(progress: Progress) -> None:
        show(
            progress.done,
            progress.total,
            progress.rows_per_second,
            progress.tokens_per_second,
            progress.seconds_left,
        )
        watch(replace(progress, before=before))

    return both


def _load(
    setup: ReferenceSetup, fingerprint: Fingerprint, console: Console, begin: Callable[[], None], engine: Engine
) -> LoadedReference:
    """Collective. The reference in memory; gone again where loading fails on some rank. Raises `UserError`."""
    agree.together(begin)
    if setup.placement.offload == "nvme":
        agree.once_per_host(lambda: ops.compile_ops(["async_io"], console.say))
    console.say(f"loading {setup.role} ({setup.path}, {fingerprint.dtype})")
    # kept even when another rank's fails
    loaded: list[Reference] = []
    try:
        agree.together(lambda: loaded.append(_engine(setup, engine)))
        now = agree.once_per_host(setup.fingerprint)
        agree.together(lambda: _refuse_unless_same(fingerprint, now, setup))
        return LoadedReference(engine=loaded[0], share_prefixes=_may_share_after_all(loaded[0], setup))
    except BaseException:
        for reference in loaded:
            reference.close(wait=False)
        raise


def _engine(setup: ReferenceSetup, engine: Engine) -> Reference:
    """Raises `UserError` where there is no memory for it."""
    try:
        return engine(
            setup.placement,
            path=str(setup.folder),
            gguf_file=setup.gguf_file,
            model_config=setup.model_config,
            dtype=setup.dtype,
            attention=setup.attention,
            kernels=setup.kernels,
            device=setup.device,
            trust_remote_code=setup.trust_remote_code,
            quantization=setup.quantization,
            adapter=None if setup.adapter is None else from_folder("the reference's adapter", setup.adapter),
        )
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        error.__traceback__ = None  # its frames hold the half of it that did fit
    dtype = str(setup.dtype).removeprefix("torch.")
    raise UserError(
        f"out of memory while {setup.role} ({setup.path}) was loaded in {dtype} onto {setup.device}: "
        f"{more_room(setup.device, sharded=setup.placement.sharded)}"
    )


def more_room(device: torch.device, *, sharded: bool) -> str:
    """What to do where a model does not fit."""
    if device.type == "cpu":  # its memory is the host's, where offloaded weights would lie as well
        more = "use more hosts" if sharded else "shard it over several hosts with reference.zero_stage=3"
        return f"{more}, or keep its weights on a disk with reference.offload=nvme"
    if sharded:
        return "use more devices, or keep its weights elsewhere with reference.offload=cpu or nvme"
    return (
        "shard it over several devices with reference.zero_stage=3, or keep its weights in the host's memory with "
        "reference.offload=cpu or nvme"
    )


def _may_share_after_all(reference: Reference, setup: ReferenceSetup) -> bool | None:
    """Whether prompts are shared, now that the model can show what it can; for all ranks alike."""
    forward, model, device = reference.forward, reference.model, setup.device
    longest = setup.settings.cutting.max_length
    rounding = agree.together(
        lambda: check_scoring(
            forward, model, device, packed=setup.packed, max_length=longest, setting="reference.packing"
        )
    )
    if setup.share is False or not comm.any_(not sharing_is_exact(forward, model, device, longest, rounding)):
        return setup.share
    if setup.share:
        raise UserError(
            f"reference.share_prefixes is true, but completions of one prompt see each other in "
            f"{type(model.lm).__name__}: use auto or false, which score them one by one"
        )
    return False


@contextmanager
def lazily(build: Callable[[], LoadedReference]) -> Iterator[Callable[[], LoadedReference]]:
    """A reference that is built on first use, shared by several passes, and freed at the end."""
    loaded: list[LoadedReference] = []

    def get() -> LoadedReference:
        if not loaded:
            loaded.append(build())
        return loaded[0]

    try:
        yield get
    except BaseException:
        while loaded:
            loaded.pop().engine.close(wait=False)
        raise
    while loaded:
        loaded.pop().engine.close()


class _Warnings:
    """What the store has to say: rank 0's at once, the other ranks' when all of them meet.

    Ranks look at one folder at once, and only the one that sets a damaged shard aside knows of it.
    """

    def __init__(self, console: Console):
        self._console = console
        self._waiting: list[str] = []
        self._told: set[str] = set()

    def add(self, text: str) -> None:
        self._waiting.append(text)
        if comm.is_main():
            self._console.warn(text)
            self._told.add(text)

    def tell(self) -> None:
        """Collective."""
        for text in dict.fromkeys(text for texts in comm.gather(self._waiting) for text in texts):
            if text not in self._told:
                self._console.warn(text)
        self._waiting.clear()


def _refuse_unless_same(before: Fingerprint, now: Fingerprint, setup: ReferenceSetup) -> None:
    if now != before:
        raise UserError(
            f"the weights in {setup.name} ({setup.path}) changed while they were loaded: their fingerprint was "
            f"{before.digest} and is {now.digest}, so nothing was scored. Start again, and let nobody write there "
            "meanwhile"
        )
