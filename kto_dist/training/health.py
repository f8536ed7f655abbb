"""Rules that watch a run's metrics and say what to do; the loop asks after every step. `trends.py` has those that look
at many steps, and those of the user.

A rule looks at one step's line of metrics and counts the consecutive steps beyond its limit. It speaks when the count
reaches its patience. One that stops the run makes the loop save a checkpoint, where the figures are sound, and end. One
that warns speaks once in a run, and not at all where another rule has told of the same cause.

A new rule is a row of `rules`, or of `trends.trends`.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from kto_dist.base import agree
from kto_dist.training.config import HealthConfig
from kto_dist.training.trends import SPIKE, Figures, Trend, asked, drifted, kept, own_rules, trends, usual_norm

CLAMPED_STEPS = 50
"""z0 at 0 for this many steps: the KL estimate is negative throughout, and the loss has lost its anchor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """What is watched, and what is done about it."""

    name: str
    beyond: Callable[[Figures, Sequence[Figures]], bool]
    """(the step, the steps before) -> whether the step is beyond the limit."""
    patience: int
    """Consecutive steps beyond it before the rule acts."""
    reason: Callable[[Figures], str]
    """The value and the limit, of the step at which it acts."""
    remedy: str
    stops: bool
    """Ends the run, where others only warn."""
    same_as: frozenset[str] = frozenset()
    """Rules that tell of the same cause: where one has spoken, this one does not warn as well."""


def rules(limits: HealthConfig) -> tuple[Rule, ...]:
    """Those that `limits` asks for."""
    always = (
        Rule(
            name="finite",
            beyond=lambda figures, _: bool(_broken(figures)),
            patience=1,
            reason=lambda figures: f"{', '.join(_broken(figures))} is not a finite number",
            remedy="lower train.lr, or use fp32",
            stops=True,
        ),
        Rule(
            name="clamped",
            beyond=lambda figures, _: figures.get("kl_clamped", 0.0) == 1.0,
            patience=CLAMPED_STEPS,
            reason=lambda figures: (
                f"kl_raw has been negative for {CLAMPED_STEPS} steps, so z0 sits at 0: desirable rows are scored "
                "against the reference itself"
            ),
            remedy="a larger global batch, a lower train.lr or apo_zero_unpaired (which has no z0) may suit this data "
            "better",
            stops=False,
            same_as=frozenset({"falling", "max_kl"}),
        ),
    )
    watched = (*always, _dead(limits), _spikes(limits))
    return watched if limits.max_kl is None else (*watched, _runaway(limits.max_kl, limits))


def _dead(limits: HealthConfig) -> Rule:
    """No row has a slope any more, so no step changes anything: what is exported then is what one bad step left."""
    return Rule(
        name="dead",
        beyond=lambda figures, _: figures.get("grad_norm") == 0.0 and figures.get("saturated/all") == 1.0,
        patience=limits.patience,
        reason=lambda figures: (
            f"for {limits.patience} steps the gradient has been 0 and every row saturated (rewards "
            f"{figures.get('rewards/all', math.nan):.3g}): the model no longer learns"
        ),
        remedy="start again with a lower train.lr, a longer train.warmup or a train.clip",
        stops=limits.on_trouble == "stop",
    )


def _spikes(limits: HealthConfig) -> Rule:
    """A norm that stays high, where one that jumps once is clipped and told by a trend."""

    def beyond(figures: Figures, past: Sequence[Figures]) -> bool:
        usual = usual_norm(past)
        return usual is not None and figures.get("grad_norm", 0.0) > SPIKE * usual

    return Rule(
        name="spikes",
        beyond=beyond,
        patience=limits.patience,
        reason=lambda figures: (
            f"for {limits.patience} steps the gradient norm has been beyond {SPIKE:.0f} times its median (now "
            f"{figures['grad_norm']:.3g}): updates have thrown the model off"
        ),
        remedy="go on from an earlier checkpoint with a lower train.lr or a train.clip, and look at the rows of these "
        "steps (long or repeated answers)",
        stops=limits.on_trouble == "stop",
    )


def _runaway(limit: float, limits: HealthConfig) -> Rule:
    return Rule(
        name="max_kl",
        beyond=lambda figures, _: abs(figures.get("kl_raw", 0.0)) > limit,
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
    past: list[Figures] = field(default_factory=list)
    """The steps so far, as `trends.kept` keeps them; those of a run that goes on included."""
    audited: float | None = None
    """The share of desirable rows that the audit of the training data found."""
    counts: dict[str, int] = field(default_factory=dict)
    said: set[str] = field(default_factory=set)
    """Rules that have spoken; those of a run that goes on included."""

    def __post_init__(self) -> None:
        """Raises `UserError` where a rule of the user's own cannot be had."""
        self.rules, self.trends = rules(self.limits), trends(self.audited)
        self.own = own_rules(self.limits.rules)

    def check(self, step: int, figures: Figures) -> list[Advice]:
        """Collective where there are rules of the user's own: what they say on rank 0 counts for all."""
        advice = []
        for rule in self.rules:
            beyond = rule.beyond(figures, self.past)
            self.counts[rule.name] = self.counts.get(rule.name, 0) + 1 if beyond else 0
            if self.counts[rule.name] == rule.patience and (rule.stops or self._is_news(rule.name, rule.same_as)):
                self.said.add(rule.name)
                message = f"step {step}: {rule.reason(figures)}; {rule.remedy}"
                advice.append(Advice(rule=rule.name, stop=rule.stops, message=message))
        self.past = kept([*self.past, figures])
        # one at a time: what happens at once has one cause
        advice += [] if advice else self._first_of(self.trends, step)
        return advice + self._own(step)

    def answered(self, step: int, lengths: Sequence[float]) -> list[Advice]:
        """What is said of sampled answers: mean tokens at each evaluation so far, the first being the start's."""
        reason = drifted(lengths) if self._is_news("length", ()) else None
        if reason is None:
            return []
        self.said.add("length")
        remedy = (
            "read some of them (answers.jsonl), and look whether liked answers of the data have another length than "
            "disliked ones, which the reward may have learnt; a lower train.lr or a higher objective.beta helps"
        )
        return [Advice(rule="length", stop=False, message=f"step {step}: {reason}; {remedy}")]

    def _first_of(self, watched: Sequence[Trend], step: int) -> list[Advice]:
        for trend in watched:
            if self._is_news(trend.name, trend.same_as) and (reason := trend.reason(self.past)) is not None:
                self.said.add(trend.name)
                return [Advice(rule=trend.name, stop=False, message=f"step {step}: {reason}; {trend.remedy}")]
        return []

    def _is_news(self, name: str, same_as: Collection[str]) -> bool:
        return self.said.isdisjoint({name, *same_as})

    def _own(self, step: int) -> list[Advice]:
        def answers() -> list[tuple[str, tuple[str, bool] | None]]:
            return [(name, asked(name, rule, self.past)) for name, rule in self.own if name not in self.said]

        found = agree.on_main(answers) if self.own else []
        told = [(name, answer) for name, answer in found if answer is not None]
        self.said |= {name for name, _ in told}
        return [Advice(rule=name, stop=stop, message=f"step {step}: {text}") for name, (text, stop) in told]
