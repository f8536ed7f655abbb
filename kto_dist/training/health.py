"""Rules that watch a run's metrics and say what to do; the loop asks after every step.

A rule looks at one step's line of metrics and counts the consecutive steps beyond its limit. It speaks once when the
count reaches its patience, and again when the trouble was over and has come back. One that stops the run makes the loop
save a checkpoint, where the figures are sound, and end.

A new rule is a row of `rules`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from kto_dist.training.config import HealthConfig

CLAMPED_STEPS = 50
"""z0 at 0 for this many steps: the KL estimate is negative throughout, and the loss has lost its anchor."""

Figures = Mapping[str, float]
"""A step's line of metrics."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """What is watched, and what is done about it."""

    name: str
    beyond: Callable[[Figures], bool]
    """Whether a step is beyond the limit."""
    patience: int
    """Consecutive steps beyond it before the rule acts."""
    reason: Callable[[Figures], str]
    """The value and the limit, of the step at which it acts."""
    remedy: str
    stops: bool
    """Ends the run, where others only warn."""


def rules(limits: HealthConfig) -> tuple[Rule, ...]:
    """Those that `limits` asks for."""
    always = (
        Rule(
            name="finite",
            beyond=lambda figures: bool(_broken(figures)),
            patience=1,
            reason=lambda figures: f"{', '.join(_broken(figures))} is not a finite number",
            remedy="lower train.lr, or use fp32",
            stops=True,
        ),
        Rule(
            name="clamped",
            beyond=lambda figures: figures.get("kl_clamped", 0.0) == 1.0,
            patience=CLAMPED_STEPS,
            reason=lambda figures: (
                f"kl_raw has been negative for {CLAMPED_STEPS} steps, so z0 sits at 0: desirable rows are scored "
                "against the reference itself"
            ),
            remedy="a larger global batch, a lower train.lr or apo_zero_unpaired (which has no z0) may suit this data "
            "better",
            stops=False,
        ),
    )
    watched = (*always, _dead(limits))
    return watched if limits.max_kl is None else (*watched, _runaway(limits.max_kl, limits))


def _dead(limits: HealthConfig) -> Rule:
    """No row has a slope any more, so no step changes anything: what is exported then is what one bad step left."""
    return Rule(
        name="dead",
        beyond=lambda figures: figures.get("grad_norm") == 0.0 and figures.get("saturated/all") == 1.0,
        patience=limits.patience,
        reason=lambda figures: (
            f"for {limits.patience} steps the gradient has been 0 and every row saturated (rewards "
            f"{figures.get('rewards/all', math.nan):.3g}): the model no longer learns"
        ),
        remedy="start again with a lower train.lr, a longer train.warmup or a train.clip",
        stops=limits.on_trouble == "stop",
    )


def _runaway(limit: float, limits: HealthConfig) -> Rule:
    return Rule(
        name="max_kl",
        beyond=lambda figures: abs(figures.get("kl_raw", 0.0)) > limit,
        patience=limits.patience,
        reason=lambda figures: (
            f"kl_raw ({figures['kl_raw']:.1f} nats) has been beyond health.max_kl ({limit}) for {limits.patience} "
            "steps: the policy runs away from its reference"
        ),
        remedy="lower train.lr or raise objective.beta, and look at the noise in the labels",
        stops=limits.on_trouble == "stop",
    )


def _broken(figures: Figures) -> list[str]:
    return sorted(name for name, value in figures.items() if not math.isfinite(value))


@dataclass(frozen=True, kw_only=True, slots=True)
class Advice:
    """A rule that acts."""

    rule: str
    stop: bool
    message: str
    """The step, the value, the limit, and what to try."""


@dataclass
class Monitor:
    """The rules of a run, and for how many steps each has been beyond its limit."""

    limits: HealthConfig
    counts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rules = rules(self.limits)

    def check(self, step: int, figures: Figures) -> list[Advice]:
        advice = []
        for rule in self.rules:
            self.counts[rule.name] = self.counts.get(rule.name, 0) + 1 if rule.beyond(figures) else 0
            if self.counts[rule.name] == rule.patience:
                message = f"step {step}: {rule.reason(figures)}; {rule.remedy}"
                advice.append(Advice(rule=rule.name, stop=rule.stops, message=message))
        return advice
