"""What `train` and `precompute` do before any of them runs a model: checks, rows, plan.

In:  the config. Out: `Prepared`, or `PreparedTraining` for who is going to train.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kto_kernels import LogitTransform
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from kto_dist.base import agree, comm, hosts
from kto_dist.base import class_weights as rule
from kto_dist.base.console import Console
from kto_dist.base.errors import UserError
from kto_dist.data import tokenise as data
from kto_dist.data.batch import Cutting, Plan
from kto_dist.data.examples import Examples, check, check_ids, load
from kto_dist.data.pieces import Hosts
from kto_dist.data.preference import Preferences
from kto_dist.model.adapters import Adapter, Rehearsed, pick_adapter, rehearse
from kto_dist.model.attention import pick_attention, pick_packing, switch_length
from kto_dist.model.causal_lm import logit_transform, pick_dtype, pick_logits, round_width
from kto_dist.model.kernels import pick_kernels
from kto_dist.model.loading import (
    check_context,
    load_config,
    load_tokenizer,
    model_class,
    own_config,
    pick_quantization,
)
from kto_dist.model.router import Routing, routing_of
from kto_dist.model.weights import Weights, check_weights
from kto_dist.objective.losses import LOSSES, Loss
from kto_dist.objective.objective import Objective
from kto_dist.objective.taken import taken
from kto_dist.reference.pairs import PairList, evaluation_pairs, training_pairs
from kto_dist.reference.setup import ReferenceSetup, find_reference, local_folder
from kto_dist.store.fingerprint import Fingerprint
from kto_dist.training.beside import beside, unreadable
from kto_dist.training.config import Config

TOKENS_PER_MICROBATCH = 8192
"""Where nothing is known of the device's memory: on the CPU."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What the reference pass and training share: the rows, and which of them every step takes."""

    config: Config
    tokenizer: PreTrainedTokenizerBase
    model_config: PretrainedConfig
    """Of the policy."""
    train: Examples
    heldout: Examples | None
    plan: Plan
    heldout_units: np.ndarray | None
    """(U, unit) held-out rows that the loss takes; None: all."""
    pairs: Preferences | None
    """Of the training rows, for a loss on pairs."""


@dataclass(frozen=True, kw_only=True)
class PreparedTraining(Prepared):
    """And what is decided of the policy before it is loaded."""

    dtype: torch.dtype
    attention: str
    kernels: str
    cutting: Cutting
    class_weights: tuple[float, float]
    """(undesirable, desirable)"""
    objective: Objective
    adapter: Adapter | None
    """What is trained; None: the whole model."""
    weights: Weights
    """What the policy's files hold that is not used, or is rounded."""
    source: Path | None
    """Where what goes along into the export lies; on rank 0."""


Turn = Callable[[Callable[[], list[Path]]], AbstractContextManager[None]]
"""Inside, it is this process's turn to make the folders that it is given a question for."""


def prepare(config: Config, console: Console, turn: Turn = lambda folders: nullcontext()) -> Prepared:
    """Collective. Raises `UserError` for whatever can be known to be wrong of the rows before long work starts.

    Nothing here asks whether this machine could run the policy: the reference pass may have one of its own. `turn`: for
    processes that know nothing of each other, and would make tokens of the same rows.
    """
    model_config, tokenizer = agree.together(lambda: _models(config))

    console.phase("data")
    print_name = data.tokenizer_fingerprint(tokenizer)
    damaged: list[str] = []
    share = _share(hosts.by_rank())
    if share.count > 1:
        agree.side_by_side(
            lambda: data.ahead(config.data, tokenizer, print_name, share) if comm.local_rank() == 0 else None
        )
    with turn(lambda: data.folders(config.data, tokenizer, print_name)):
        folder, apart = agree.once_per_host(
            lambda: data.prepare(config.data, tokenizer, print_name, warn=damaged.append, hosts=share.count)
        )
    for text in dict.fromkeys(text for texts in comm.gather(damaged) for text in texts):
        console.warn(text)
    train, heldout = load(folder), None if apart is None else load(apart)
    for setting, examples in (("data.train", train), ("data.heldout", heldout)):
        agree.same_everywhere(
            "none" if examples is None else examples.fingerprint,
            f"what {setting} gives as tokens",
            "copy the rows, and the tokenizer in model.path, to each of them again",
        )
    loss = LOSSES[config.objective.loss]
    if len(tokenizer) > (vocabulary := _vocabulary(model_config)):
        check_ids(train, vocabulary, "model.path")
        if heldout is not None:
            check_ids(heldout, vocabulary, "model.path", "data.heldout")
    check(train, needs_both=loss.takes != "desirable", needs_pairs=loss.has_z0)
    _say(config, train, heldout, console)
    units, pairs = _taken(loss, train, config, "train", console)
    apart_units = None if heldout is None else _taken(loss, heldout, config, "held-out", console)[0]
    if units is not None and not units.size:
        assert pairs is not None
        raise UserError(
            f"data.train has no pair for objective.loss {loss.name}: {pairs.line()}. A pair is a good and a bad "
            "answer to one prompt (`kto-dist pairs` counts them): collect several answers a prompt, or use kto, "
            "which needs none"
        )
    if tokenizer.chat_template and isinstance(train.original(0)[0], str):
        console.warn(
            "the rows are plain text, which is taken as it is, but the tokenizer has a chat template: if the model is "
            'going to be asked through it, write prompts as messages ([{"role": "user", "content": ...}])'
        )
    plan = Plan(
        seed=config.train.seed,
        rows=len(train),
        global_batch=config.train.global_batch,
        epochs=config.train.epochs,
        max_steps=config.train.max_steps,
        kl_pairs_per_step=config.objective.kl_pairs_per_step if loss.has_z0 else 0,
        max_length=config.data.max_length,
        prompt_limit=config.data.prompt_limit,
        units=units,
    )
    if plan.taken < plan.global_batch:
        console.warn(
            f"train.global_batch ({plan.global_batch}) exceeds the {plan.taken} training rows: every step takes them "
            "all"
        )
    return Prepared(
        config=config,
        tokenizer=tokenizer,
        model_config=model_config,
        train=train,
        heldout=heldout,
        plan=plan,
        heldout_units=apart_units,
        pairs=pairs,
    )


def _share(everyone: Sequence[hosts.Host]) -> Hosts:
    """Which of the job's hosts this is."""
    heads = sorted({host.head for host in everyone})
    return Hosts(number=heads.index(hosts.own().head), count=len(heads))


def _taken(
    loss: Loss, examples: Examples, config: Config, what: str, console: Console
) -> tuple[np.ndarray | None, Preferences | None]:
    """(U, unit) rows that the loss takes, None: all; and the account of pairs, which is said."""
    units, pairs = taken(loss, examples, config.objective.pairs)
    if pairs is not None:
        console.say(f"{what}: {pairs.line()}")
    elif units is not None:
        kind = "possibly desirable" if examples.is_soft else "desirable"
        console.say(f"{what}: {loss.name} takes the {len(units):,} {kind} rows of {len(examples):,}")
    return units, pairs


def _say(config: Config, train: Examples, heldout: Examples | None, console: Console) -> None:
    """What the rows are, and what was seen and not used."""
    names = [name for name, _ in config.data.train_sources]
    apart = [name for name, _ in config.data.heldout_sources]
    for line in train.report.lines(names):
        console.say(f"train: {line}")
    for line in () if heldout is None else heldout.report.lines(apart or names):
        console.say(f"held-out: {line}")
    for line in train.report.noticed():
        console.warn(line)
    # rows held out by a fraction come from the same log
    for line in heldout.report.noticed() if heldout is not None and apart else ():
        console.warn(f"held-out: {line}")


def prepare_training(config: Config, console: Console) -> PreparedTraining:
    """Collective. `prepare`, and what the policy needs. Raises `UserError`."""
    weights = agree.once_per_host(lambda: _policy_weights(config))
    source = agree.on_main(lambda: beside(config.model.path))
    for text in (*weights.warnings("model.path", exported=True), unreadable(source)):
        if text:
            console.warn(text)
    adapter, rehearsed = agree.together(lambda: adapter_of(config))
    agree.together(lambda: pick_quantization("model.quantization", config.model.quantization))
    if config.model.quantization != "none" and comm.device().type == "cpu":
        console.warn(
            f"model.quantization ({config.model.quantization}) on a CPU unpacks weights for every product: it is slow "
            "there, and good for trying out alone"
        )
    prepared = prepare(config, console)
    device = comm.device()
    if adapter is not None and rehearsed is not None:
        for line in rehearsed.lines(adapter):
            console.say(line)

    def picks() -> tuple[torch.dtype, str, str, torch.dtype | None]:
        dtype = pick_dtype(config.train.dtype, device)
        attention = pick_attention("model.attention", config.model.attention, prepared.model_config, device, dtype)
        kernels = pick_kernels("model.kernels", config.model.kernels, prepared.model_config, device)
        return dtype, attention, kernels, pick_logits("train.logits_dtype", config.train.logits_dtype, dtype, device)

    dtype, attention, kernels, logits_dtype = agree.together(picks)
    for setting, value in (("train.dtype", dtype), ("model.attention", attention), ("model.kernels", kernels)):
        agree.same_everywhere(value, setting, "set it to one that all of them can use")
    transform: LogitTransform = logit_transform(prepared.model_config)
    return PreparedTraining(
        **vars(prepared),
        dtype=dtype,
        attention=attention,
        kernels=kernels,
        cutting=Cutting(
            max_length=config.data.max_length,
            prompt_limit=config.data.prompt_limit,
            tokens=_tokens_to_start_with(config),
            packed=pick_packing(
                "train.packing", config.train.packing, attention, prepared.model_config, config.data.max_length
            ),
            apart=_apart(config, prepared.model_config),
            multiple=round_width(device),
        ),
        class_weights=class_weights(prepared.train, config, console.warn),
        objective=Objective(
            loss=LOSSES[config.objective.loss],
            beta=config.objective.beta,
            label_smoothing=config.objective.label_smoothing,
            sft_weight=config.objective.sft_weight,
            transform=transform,
            logits_bytes=None if config.train.logits_mebibytes is None else config.train.logits_mebibytes * 2**20,
            logits_dtype=logits_dtype,
            routing=_routing(config, prepared.model_config, console),
        ),
        adapter=adapter,
        weights=weights,
        source=source,
    )


def _routing(config: Config, model_config: PretrainedConfig, console: Console) -> Routing | None:
    """Collective. What balances the experts of the policy, which is said. Raises `UserError`."""
    setting, kind = config.objective.router_loss, model_class(model_config)
    found = agree.together(lambda: routing_of(setting, own_config(model_config), kind))
    loss = LOSSES[config.objective.loss]
    if found is not None:
        extra = f"; {loss.name} has no KL pairs to count their load on, so each step takes a forward more"
        more = "" if loss.has_z0 else extra
        console.say(f"experts are balanced by {found.coefficient:g} times their router's loss{more}")
    return found


def _vocabulary(model_config: PretrainedConfig) -> int:
    """Rows of the embedding."""
    return int(getattr(model_config.get_text_config(), "vocab_size", None) or sys.maxsize)


def _policy_weights(config: Config) -> Weights:
    """Raises `UserError` where the policy lacks weights, or what its settings ask for."""
    model = config.model
    model_config = load_config(model.path, model.gguf_file, trust_remote_code=model.trust_remote_code)
    if model.gradient_checkpointing and not getattr(
        model_class(model_config), "supports_gradient_checkpointing", False
    ):
        raise UserError(
            f"model.gradient_checkpointing (true) cannot be had: {model_config.model_type} in transformers recomputes "
            "no layers; set it to false, and save memory by train.tokens_per_microbatch or deepspeed.zero_stage"
        )
    folder = local_folder(model.path, model.gguf_file, code=model.trust_remote_code)
    dtype = pick_dtype(config.train.dtype, comm.device())
    return check_weights("model.path", model.path, folder, model.gguf_file, model_config, dtype)


def adapter_of(config: Config) -> tuple[Adapter | None, Rehearsed | None]:
    """What is trained, and what it comes to in the model. Raises `UserError` where the two do not fit."""
    model = config.model
    adapter = pick_adapter(config.adapter, base=model.path, seed=config.train.seed)
    if adapter is None:
        return None, None
    model_config = load_config(model.path, model.gguf_file, trust_remote_code=model.trust_remote_code)
    return adapter, rehearse(model_config, adapter, trust_remote_code=model.trust_remote_code)


def _models(config: Config) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """The policy's config and tokenizer; raises `UserError` where a model's context is too short for the rows."""
    model, reference = config.model, config.reference
    trust = model.trust_remote_code
    model_config = load_config(model.path, model.gguf_file, trust_remote_code=trust)
    check_context(model_config, config.data.max_length)
    if reference.path:
        other = load_config(
            reference.path, reference.gguf_file, "reference.path", trust_remote_code=reference.trust_remote_code
        )
        check_context(other, config.data.max_length)
    return model_config, load_tokenizer(model.path, model.gguf_file, trust_remote_code=trust)


def _apart(config: Config, model_config: PretrainedConfig) -> int | None:
    """`Cutting.apart` of the policy. Raises `UserError` where a loss keeps rows together that would have to part."""
    switch = switch_length(model_config, config.data.max_length)
    if switch and LOSSES[config.objective.loss].unit > 1:
        raise UserError(
            f"data.max_length ({config.data.max_length}) exceeds the {switch} tokens beyond which longrope scores all "
            f"rows of a forward by other frequencies, and objective.loss ({config.objective.loss}) scores a pair's "
            f"two rows in one: set data.max_length to {switch}"
        )
    return switch


def _tokens_to_start_with(config: Config) -> int:
    """`auto` is decided for good when the policy is on its device (`Stepper`)."""
    tokens = config.train.tokens_per_microbatch
    longest = config.data.max_length * LOSSES[config.objective.loss].unit
    return max(TOKENS_PER_MICROBATCH, longest) if tokens == "auto" else tokens


def find(prepared: Prepared, console: Console) -> tuple[ReferenceSetup, Fingerprint]:
    """Collective. `find_reference` for what is prepared."""
    config = prepared.config
    return find_reference(
        config.reference,
        config.model,
        max_length=config.data.max_length,
        prompt_limit=config.data.prompt_limit,
        console=console,
        known=prepared.weights if isinstance(prepared, PreparedTraining) and not config.reference.path else None,
        adapter=Path(config.adapter.start) if config.adapter.start and not config.reference.path else None,
    )


def wanted(prepared: Prepared, console: Console) -> list[PairList]:
    """Collective. The pairs whose reference log-probs the run will need."""
    lists = [training_pairs(prepared.plan, prepared.train, console.say)]
    if prepared.heldout is not None:
        with_z0 = LOSSES[prepared.config.objective.loss].has_z0
        lists.append(evaluation_pairs(prepared.config.train.seed, prepared.heldout, with_z0=with_z0))
    return lists


def class_weights(train: Examples, config: Config, warn: Callable[[str], None]) -> tuple[float, float]:
    """(undesirable, desirable) loss weights of the config, by the paper's rule where it says `auto`.

    1 for a loss that does not balance classes.
    """
    section = config.objective
    if "desirable_weight" not in LOSSES[section.loss].settings:
        return 1.0, 1.0
    # expected counts, where labels are probabilities
    shares = (1 - train.probability, train.probability)
    mass = [float((train.weights * share)[share > 0].sum()) for share in shares]
    if not all(mass):
        raise UserError("every row of one class has weight 0: KTO needs both classes; give them a weight above 0")
    down, up = rule.class_weights(mass[1], mass[0], up=section.desirable_weight, down=section.undesirable_weight)
    balance = up * mass[1] / (down * mass[0]) if down else float("inf")
    if not rule.BALANCE[0] - 1e-9 <= balance <= rule.BALANCE[1] + 1e-9:
        warn(
            f"desirable_weight * n_desirable / (undesirable_weight * n_undesirable) is {balance:.3g}, outside "
            f"[{rule.BALANCE[0]}, {rule.BALANCE[1]}] (Eq. 8 of the KTO paper): with {mass[1]:g} desirable and "
            f"{mass[0]:g} undesirable rows, auto would set both weights within it"
        )
    return down, up


def account(examples: Examples, names: Sequence[str]) -> dict[str, Any]:
    """For the summary: counts by class and source, and what was seen and not used."""
    by_source = zip(names, examples.report.sources, strict=False)
    return {
        **counts(examples),
        "sources": {name: {"desirable": up, "undesirable": down} for name, (up, down) in by_source},
        "unused": examples.report.unused,
        "noticed": examples.report.notes,
    }


def counts(examples: Examples) -> dict[str, Any]:
    """A row whose label is a probability counts to the likelier class, and once more to those that are `soft`."""
    up = int(examples.desirable.sum())
    found: dict[str, Any] = {"rows": len(examples), "desirable": up, "undesirable": len(examples) - up}
    if examples.is_soft:
        probability = examples.probability
        soft = int(((probability > 0) & (probability < 1)).sum())
        found |= {"soft": soft, "expected_desirable": float(probability.sum())}
    return found
