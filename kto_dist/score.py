"""Which reference a run has, and its log-prob of every pair that the run will meet.

In:  `Prepared`: the rows and which of them every step takes. Out: `ReferenceSetup` and its fingerprint, known without a
model; from them `Scores`, for which the reference is loaded if the store lacks something, and is gone afterwards.
"""

import operator
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from functools import cached_property, reduce
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import snapshot_download
from transformers import PretrainedConfig

from kto_dist import comm
from kto_dist.causal_lm import (
    ROUNDING,
    check_scoring,
    load_config,
    pick_attention,
    pick_dtype,
    pick_logits,
    pick_packing,
)
from kto_dist.config import ReferenceConfig
from kto_dist.console import Console
from kto_dist.errors import UserError
from kto_dist.evaluate import heldout_pairs
from kto_dist.examples import Examples
from kto_dist.fingerprint import Fingerprint, fingerprint
from kto_dist.models import Reference, reference_device
from kto_dist.prefix import T0_OVER_HIDDEN, can_share, sharing_is_exact
from kto_dist.prepare import Prepared, bytes_of
from kto_dist.reference import (
    Outcome,
    Progress,
    RefLogps,
    Scorer,
    Scoring,
    Watch,
    lazily,
    reference_logps,
    together,
    wanted_pairs,
)
from kto_dist.store import Store


@dataclass(frozen=True, kw_only=True)
class ReferenceSetup:
    """The reference as it is going to be loaded: from its own settings, and from which weights."""

    name: str
    # the setting that names it
    path: str
    gguf_file: str | None
    model_config: PretrainedConfig
    device: torch.device
    dtype: torch.dtype
    attention: str
    packed: bool
    logits_dtype: torch.dtype | None
    # None: fp32 where the device's matmul gives it
    share: bool | None
    # `Scorer.share_prefixes`, as far as it is known without the model

    @property
    def logits(self) -> str:
        """In which precision the logits come."""
        default = torch.float32 if self.device.type == "cuda" else self.dtype
        return _named(self.logits_dtype or default)

    @cached_property
    def folder(self) -> Path:
        """Of the weights: what is hashed is what is loaded, whatever a hub's name means by then."""
        return local_folder(self.path, self.gguf_file)

    def fingerprint(self) -> Fingerprint:
        """Of the weights as they lie there now; files that are as they were are not read again."""
        return fingerprint(
            self.folder,
            self.gguf_file,
            self.model_config.to_dict(),
            dtype=_named(self.dtype),
            logits=self.logits,
            attention=self.attention,
        )


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def pick_reference(prepared: Prepared) -> ReferenceSetup:
    """Raises `UserError` where a setting of the reference cannot be had on this rank."""
    config, section = prepared.config, prepared.config.reference
    name, path, gguf_file = ("reference.path", section.path, section.gguf_file)
    if not path:
        name, path, gguf_file = ("model.path", config.model.path, config.model.gguf_file)
    model_config = load_config(path, gguf_file, name)
    device = reference_device(section)
    dtype = pick_dtype(section.dtype, device)
    attention = pick_attention(section.attention, device, dtype)
    packed = pick_packing(section.packing, attention)
    return ReferenceSetup(
        name=name,
        path=path,
        gguf_file=gguf_file,
        model_config=model_config,
        device=device,
        dtype=dtype,
        attention=attention,
        packed=packed,
        logits_dtype=pick_logits("reference.logits_dtype", section.logits_dtype, dtype, device),
        share=_may_share(section, model_config, attention, device, packed, config.data.max_length),
    )


def find_reference(prepared: Prepared, console: Console) -> tuple[ReferenceSetup, Fingerprint]:
    """Collective. Hashes the weights, and raises `UserError` where hosts differ or a setting cannot be had."""
    setup = together(lambda: pick_reference(prepared))
    console.phase("reference")
    identity = comm.once_per_host(setup.fingerprint)

    # One value of a pair counts for all ranks, and all of them read equally many micro-batches.
    again = f"copy the model in {setup.name} to each of them again"
    for what, value, remedy in (
        ("the reference's weights", identity.weights, again),
        ("the reference's config.json", identity.config, again),
        ("reference.dtype", _named(setup.dtype), "set it to one that all of them can use"),
        ("reference.logits_dtype", setup.logits, "set it, or reference.device"),
        ("reference.attention", setup.attention, "set it to one that all of them have"),
        ("reference.packing", setup.packed, "set it"),
        ("reference.share_prefixes", setup.share, "set it to false, or reference.device"),
    ):
        comm.same_everywhere(value, what, remedy)
    return setup, identity


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """The reference's side of a run."""

    train: RefLogps
    heldout: RefLogps | None
    identity: Fingerprint
    outcome: Outcome


def score_reference(
    prepared: Prepared,
    setup: ReferenceSetup,
    identity: Fingerprint,
    console: Console,
    watch: Watch = lambda progress: None,
    begin: Callable[[], None] = lambda: None,
) -> Scores:
    """Collective. Looks every pair up in the store and scores what is missing; no model is left in memory after.

    Nothing of the policy's settings reaches it but which rows and pairs the run takes. `begin` is called on every rank
    when it is clear that something has to be scored, before the reference is loaded. Raises `UserError`.
    """
    config, section, device, share = prepared.config, prepared.config.reference, setup.device, setup.share

    def build() -> Scorer:
        together(begin)
        console.say(f"loading the reference ({setup.path}, {identity.dtype})")
        # kept even when another rank's fails
        loaded: list[Reference] = []
        try:
            together(
                lambda: loaded.append(
                    Reference(
                        section,
                        path=str(setup.folder),
                        gguf_file=setup.gguf_file,
                        model_config=setup.model_config,
                        dtype=setup.dtype,
                        attention=setup.attention,
                        device=device,
                    )
                )
            )
            now = comm.once_per_host(setup.fingerprint)
            together(lambda: _refuse_unless_same(identity, now, setup))
            return Scorer(reference=loaded[0], share_prefixes=tried(loaded[0]))
        except BaseException:
            for reference in loaded:
                reference.close(wait=False)
            raise

    def tried(reference: Reference) -> bool | None:
        """Whether prompts are shared, now that the model can show what it can; for all ranks alike."""
        forward, model = reference.forward, reference.model
        together(lambda: check_scoring(forward, model, device, packed=setup.packed, setting="reference.packing"))
        if share is False or not comm.any_(not sharing_is_exact(forward, model, device, ROUNDING[setup.dtype])):
            return share
        if share:
            raise UserError(
                f"reference.share_prefixes is true, but completions of one prompt see each other in "
                f"{type(model.lm).__name__}: use auto or false, which score them one by one"
            )
        return False

    lists: list[tuple[Examples, np.ndarray, np.ndarray]] = [
        (prepared.train, *wanted_pairs(prepared.plan, prepared.train))
    ]
    if prepared.heldout is not None:
        rows = np.arange(len(prepared.heldout))
        pairs = heldout_pairs(config.train.seed, prepared.heldout) if config.kto.loss == "kto" else (rows[:0], rows[:0])
        lists.append((prepared.heldout, *(np.concatenate([rows, more]) for more in pairs)))
    scoring = Scoring(
        max_length=prepared.plan.max_length,
        prompt_limit=prepared.plan.prompt_limit,
        tokens_per_batch=section.tokens_per_batch,
        packed=setup.packed,
        logits_bytes=bytes_of(section.logits_mebibytes),
        logits_dtype=setup.logits_dtype,
        t0=T0_OVER_HIDDEN * setup.model_config.get_text_config().hidden_size,
        device=device,
    )
    results: list[tuple[RefLogps, Outcome]] = []
    warnings = _Warnings(console)
    store = together(lambda: Store(section.store, identity, warn=warnings.add, model=setup.path))
    with store, lazily(build) as engine:
        for (examples, prompts, completions), title in zip(lists, ("training pairs", "held-out pairs"), strict=False):
            with console.progress(f"reference: {title}") as show:
                scored_before = sum(outcome.scored_once for _, outcome in results)

                def both(
                    progress: Progress, show: Callable[..., None] = show, scored_before: int = scored_before
                ) -> None:
                    show(*astuple(progress)[:-1])
                    watch(replace(progress, before=scored_before))

                results.append(
                    reference_logps(
                        examples, prompts, completions, store=store, engine=engine, scoring=scoring, watch=both
                    )
                )
            warnings.tell()
    total = reduce(operator.add, (outcome for _, outcome in results))
    scored = f"{total.pairs - total.hits:,} scored" + (" with shared prompts" if total.shared else "")
    console.say(f"reference: {total.pairs:,} pairs, {total.hits:,} from the store, {scored} in {total.seconds:.1f} s")
    return Scores(
        train=results[0][0], heldout=results[1][0] if len(results) > 1 else None, identity=identity, outcome=total
    )


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


def _may_share(
    section: ReferenceConfig,
    model_config: PretrainedConfig,
    attention: str,
    device: torch.device,
    packed: bool,
    max_length: int,
) -> bool | None:
    """`Scorer.share_prefixes` as far as it is known before the model is loaded. Raises `UserError`.

    `auto` is for the CPU alone: there sharing was measured to be faster.
    """
    if section.share_prefixes is False:
        return False
    if section.share_prefixes == "auto" and (packed or device.type != "cpu"):
        return False
    reason = can_share(model_config, attention, max_length)
    if reason and section.share_prefixes is True:
        raise UserError(f"reference.share_prefixes is true, but {reason}; use auto or false")
    if reason:
        return False
    return True if section.share_prefixes is True else None


def local_folder(path: str, gguf_file: str | None) -> Path:
    """The folder of a model given by folder or hub name; of a hub's model the files that are going to be loaded."""
    if Path(path).is_dir():
        return Path(path)
    # in the order of `fingerprint.weight_files`: many a model is there twice, and is tens of gigabytes
    kinds = [[gguf_file]] if gguf_file else [["*.safetensors", "*.safetensors.index.json"], ["pytorch_model*.bin*"]]
    try:
        for wanted in kinds:
            folder = Path(snapshot_download(path, allow_patterns=wanted, ignore_patterns=["*/*"]))
            if any(folder.glob(wanted[0])):
                break
        return folder
    except OSError as error:
        raise UserError(f"the weights of {path} cannot be fetched: {error}; give a folder that holds them") from None
