"""Steps within the memory that there is: the largest micro-batch is tried first, and where it fails half of it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from kto_dist.base import comm
from kto_dist.base.console import Console
from kto_dist.data.batch import Cutting, MicroBatch, collate, pair_lengths, pair_tokens
from kto_dist.evaluation.figures import Evaluated
from kto_dist.evaluation.heldout import Logps, evaluate_rows, under
from kto_dist.evaluation.sample import Remembering, sample_of
from kto_dist.model.causal_lm import completion_logps
from kto_dist.model.checks import Rounding
from kto_dist.model.engines import Policy
from kto_dist.model.footprint import Sharding, tokens_that_fit
from kto_dist.model.loading import shortened
from kto_dist.model.memory import Memory, NeedsRestart, attempt, ends_suddenly
from kto_dist.model.options import zero_stage
from kto_dist.objective.objective import batch_loss, labels_of, survey
from kto_dist.reference.logps import ReferenceLogps
from kto_dist.reference.pairs import RefLogps
from kto_dist.training.config import Config
from kto_dist.training.largest import largest_kl_pairs, largest_rows
from kto_dist.training.prepare import PreparedTraining
from kto_dist.training.schedule import learning_rate
from kto_dist.training.start import StartCheck
from kto_dist.training.step import StepResult, StepWork, run_step, step_work


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """One evaluation."""

    whole: Evaluated | None
    """All held-out rows; None where a part was looked at alone."""
    part: Evaluated | None
    """The part that `evaluate.tokens` leaves; None where it leaves all."""


def sharding_of(config: Config, dtype: torch.dtype, kernels: str, attention: str, ranks: int) -> Sharding:
    """What of a run on GPUs decides their memory. `kernels`, `attention`: as they were picked."""
    return Sharding(
        stage=zero_stage(config.deepspeed, dtype),
        ranks=ranks,
        bf16=dtype == torch.bfloat16,
        offload_optimizer=config.deepspeed.offload_optimizer != "none",
        offload_parameters=config.deepspeed.offload_parameters != "none",
        checkpointing=config.model.gradient_checkpointing,
        logits_bytes=(config.train.logits_mebibytes or 2048) * 2**20,
        fused=kernels == "liger",
        eager_row=config.data.max_length if attention == "eager" else 0,
    )


@dataclass
class Stepper:
    """What a loop asks for its steps."""

    prepared: PreparedTraining
    refs: ReferenceLogps
    policy: Policy
    console: Console
    rounding: Rounding
    """Of the policy, as `check_scoring` measured it."""
    memory: Memory = field(init=False)

    def __post_init__(self) -> None:
        self.memory = Memory(
            cutting=self.prepared.cutting,
            longest=self.prepared.config.data.max_length * self.prepared.plan.unit,
            setting="train.tokens_per_microbatch",
            warn=self.console.warn,
        )
        if self.prepared.config.train.tokens_per_microbatch == "auto" and comm.device().type == "cuda":
            tokens = max(self._estimate(), self.memory.longest)
            self.memory.cutting = replace(self.memory.cutting, tokens=tokens)
            self.console.say(f"{tokens:,} tokens a micro-batch, by an estimate of what the device's memory holds")

    def _estimate(self) -> int:
        """Collective. What the smallest device is estimated to hold."""
        prepared = self.prepared
        sharding = sharding_of(prepared.config, prepared.dtype, prepared.kernels, prepared.attention, comm.world_size())
        memory = torch.cuda.get_device_properties(comm.device()).total_memory
        own = tokens_that_fit(self.policy.model.lm, sharding, memory)
        return int(comm.min_(torch.tensor([own]), comm.WORLD)[0])

    def work(self, step: int) -> StepWork:
        """What the step (from 0) takes. Safe to call from another thread."""
        return step_work(self.prepared, self.refs.train, step, self.memory.cutting)

    def run(self, work: StepWork) -> StepResult:
        """Collective. One update, with as many tokens a micro-batch as there is memory for. Raises `UserError`."""
        lr = learning_rate(work.step, self.prepared.plan.steps, self.prepared.config.train)
        start = self._start_check() if work.step == 0 else None

        def update(cutting: Cutting) -> StepResult:
            # made ahead, before a step ran out of memory
            fresh = work if work.cutting == cutting else self.work(work.step)
            return run_step(fresh, self.policy, self.prepared.objective, lr=lr, start=start)

        try:
            result = self.memory.within(update, self.policy.forget)
        except NeedsRestart as failure:
            failure.step = work.step
            raise
        if work.step == 0:
            self._look_at_adapter()
        return result

    def _look_at_adapter(self) -> None:
        """Collective, after the first update. What a family computes with a layer's weight past the layer's forward
        never sees the adapter, which then learns nothing, and nothing else would say so."""
        adapter = self.prepared.adapter
        if adapter is None or adapter.start is not None:
            return
        if unmoved := self.policy.unmoved():
            self.console.warn(
                f"adapter: the first update has left {len(unmoved)} of the adapted layers as they were "
                f"({shortened(unmoved)}), since they got no gradient. No token came to them, as to an expert that none "
                "was routed to; or this family reads their weights past their forward, and they will never learn: then "
                "leave them out of adapter.targets"
            )

    def try_largest(self) -> None:
        """Collective. Runs the largest micro-batches that a step can have, where memory ends suddenly."""
        if ends_suddenly(comm.device()):
            self.memory.within(self._try, self.policy.forget)

    def _try(self, cutting: Cutting) -> bool:
        """As in a step: KL pairs without gradient, then rows forward and backward, head and all."""
        self._try_kl_pairs(cutting)
        self._try_rows(cutting)
        return True

    def _try_kl_pairs(self, cutting: Cutting) -> None:
        prompts, completions = largest_kl_pairs(self.prepared, self.refs.train, cutting)
        if not prompts.size:
            return
        batch = self._one(prompts, completions, cutting)

        def once() -> bool:
            reserved = self._to_come()
            refs = torch.zeros(prompts.size, dtype=torch.float64, device=comm.device())
            survey(self.policy.forward, [batch], refs, [], self.prepared.objective)
            del reserved
            return True

        attempt(once, "the largest micro-batch of KL pairs", again=not self.policy.waits_in_forward)

    def _try_rows(self, cutting: Cutting) -> None:
        prepared, device = self.prepared, comm.device()
        rows = largest_rows(prepared, cutting)
        labels = labels_of(prepared.train, rows, np.zeros(rows.size), prepared.class_weights, prepared.objective)

        def once() -> bool:
            reserved = self._to_come()
            batch = self._one(rows, rows, cutting).to(device)
            z0 = torch.zeros((), dtype=torch.float64, device=device)
            own = batch_loss(self.policy.forward, batch, labels.to(device), z0, prepared.objective)
            loss = own.loss if own.router is None else own.loss + own.router
            # a gradient of 0 leaves no trace in the step's sums
            self.policy.backward(loss * 0.0, last=False)
            del reserved
            return True

        attempt(once, "the largest micro-batch of rows", again=not self.policy.waits_in_backward)

    def _to_come(self) -> Tensor:
        """As much memory as the optimizer's states are going to take beside the micro-batches."""
        return torch.empty(self.policy.bytes_to_come(), dtype=torch.uint8, device=comm.device())

    def _one(self, prompts: np.ndarray, completions: np.ndarray, cutting: Cutting) -> MicroBatch:
        """All of these pairs in one, on the host; the same on every rank."""
        examples = self.prepared.train
        kept = pair_lengths(examples, prompts, completions, cutting.max_length, cutting.prompt_limit)
        pairs = [
            pair_tokens(examples, int(prompt), int(completion), *lengths)
            for prompt, completion, *lengths in zip(prompts, completions, *kept, strict=True)
        ]
        return collate(pairs, np.arange(len(pairs)), packed=cutting.packed)

    def evaluate(self, step: int, *, whole: bool = True, stop: Callable[[], bool] | None = None) -> HeldOut | None:
        """Collective. Held-out rows under the policy as it is, after `step` updates; None without such rows.

        `whole`: all of them, where `evaluate.tokens` may leave a part. Raises `Interrupted` where `stop` says so.
        """
        prepared, refs = self.prepared, self.refs.heldout
        heldout, objective, part = prepared.heldout, prepared.objective, self.part
        if heldout is None or refs is None:
            return None
        # before the first update the policy is its reference (see `StartCheck`), which has scored these rows
        is_reference = step == 0 and prepared.config.reference.path is None

        def of(model: Logps, among: np.ndarray | None) -> Evaluated:
            return evaluate_rows(
                model,
                refs,
                heldout,
                units=prepared.heldout_units,
                seed=prepared.config.train.seed,
                loss=objective.loss,
                beta=objective.beta,
                label_smoothing=objective.label_smoothing,
                sft_weight=objective.sft_weight,
                class_weights=prepared.class_weights,
                among=among,
            )

        def evaluated(cutting: Cutting) -> HeldOut:
            again = not self.policy.waits_in_forward
            forward = self.policy.forward
            model = Remembering(
                refs if is_reference else under(forward, heldout, objective, cutting, again=again, stop=stop)
            )
            if not whole and part is not None:
                return HeldOut(whole=None, part=of(model, part))
            rows = of(model, None)
            # the part's log-probs are among those of all
            return HeldOut(whole=rows, part=None if part is None else of(RefLogps(heldout, *model.seen()), part))

        return self.memory.within(evaluated, lambda: None)

    @cached_property
    def part(self) -> np.ndarray | None:  # (S,)
        """Held-out rows that are looked at between the first evaluation and the last; None: all."""
        prepared = self.prepared
        if prepared.heldout is None:
            return None
        return sample_of(
            prepared.heldout,
            seed=prepared.config.train.seed,
            tokens=prepared.config.evaluate.tokens,
            with_z0=prepared.objective.loss.has_z0,
        )

    def _start_check(self) -> StartCheck | None:
        """None where the reference is another model than the policy's start."""
        reference = self.prepared.config.reference
        if reference.path is not None:
            return None
        prepared, found = self.prepared, self.refs.fingerprint
        default = torch.float32 if comm.device().type == "cuda" else prepared.dtype
        dtypes = (prepared.dtype, prepared.objective.logits_dtype or default)
        return StartCheck(
            policy_dtype=_precision(*(str(dtype).removeprefix("torch.") for dtype in dtypes)),
            reference_dtype=_precision(found.dtype, found.logits),
            rounding=self.rounding,
            packed=self.memory.cutting.packed,
            store=reference.store,
            from_store=self.refs.outcome.hits,
            alone=self._alone,
        )

    def _alone(self, row: int) -> Tensor:
        """Collective. (1,) log-prob of a training row, with gradients as in training: only then is some dropout on."""
        objective, place = self.prepared.objective, np.array([row])
        batch = self._one(place, place, self.prepared.cutting).to(comm.device())
        logps = completion_logps(
            self.policy.forward, batch, objective.transform, objective.logits_bytes, objective.logits_dtype
        )
        return logps.detach().cpu()


def _precision(dtype: str, logits: str) -> str:
    return dtype if dtype == logits else f"{dtype} with logits in {logits}"
