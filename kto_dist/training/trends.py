"""Rules over a stretch of steps: a class that does not learn, a loss that stays, rewards that fall together; and rules
of the user's own, Python functions that the config names.

Each looks at the steps so far and gives its reason, or None. Each speaks once in a run.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kto_dist.base.errors import UserError
from kto_dist.base.own_code import function_named

Figures = Mapping[str, float]
"""A step's line of metrics."""
STRETCH = 50
"""Steps whose mean is looked at, so that no single batch decides."""
AFTER = 300
"""Steps before a rule says that something did not happen."""
FLAT = 0.005
"""A loss that has changed by a smaller share than this has not changed."""
LEARNT = 0.05
"""A loss that has fallen by this share has."""
FALLEN = -1.0
"""A mean reward of liked answers below which they have become much less likely."""
SATURATED = 0.8
SPIKE = 30.0
"""Times the median gradient norm."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trend:
    """What is watched over many steps."""

    name: str
    reason: Callable[[Sequence[Figures]], str | None]
    """The steps so far -> what is wrong, with its values; None where nothing is."""
    remedy: str


def trends() -> tuple[Trend, ...]:
    return (
        Trend(
            name="one_class",
            reason=_one_class,
            remedy="look at that class's labels, and at objective.desirable_weight and undesirable_weight",
        ),
        Trend(
            name="falling",
            reason=_falling,
            remedy="lower train.lr or raise objective.desirable_weight: disliked answers are unlearned by making "
            "everything less likely",
        ),
        Trend(
            name="flat",
            reason=_flat,
            remedy="raise train.lr, or look whether the labels depend on the answers at all (kto-dist audit)",
        ),
        Trend(
            name="saturated",
            reason=_saturated,
            remedy="lower objective.beta or train.lr, or stop earlier (checkpoint.best): most rows teach nothing more",
        ),
        Trend(
            name="spikes",
            reason=_spikes,
            remedy="lower train.lr, set train.clip, and look at the rows of that step (long or repeated answers)",
        ),
    )


def kept(past: Sequence[Figures]) -> list[Figures]:
    """Of the steps of a run those that rules look at: the first stretch, and the newest ones."""
    return [*past] if len(past) <= STRETCH + AFTER else [*past[:STRETCH], *past[-AFTER:]]


def _steps(past: Sequence[Figures]) -> int:
    """How many there were; figures that do not say are counted."""
    return int(past[-1].get("step", len(past))) if past else 0


def _one_class(past: Sequence[Figures]) -> str | None:
    if _steps(past) < AFTER:
        return None
    fallen = {}
    for name in ("desirable", "undesirable"):
        first, last = _ends(past, f"loss/{name}")
        if first is None or last is None or first <= 0:
            return None
        fallen[name] = 1 - last / first
    for name, other in (("desirable", "undesirable"), ("undesirable", "desirable")):
        if fallen[name] < FLAT and fallen[other] > LEARNT:
            return (
                f"the loss of {name} rows has not fallen in {_steps(past)} steps ({-fallen[name]:+.1%}), while that of "
                f"{other} rows has ({-fallen[other]:+.1%})"
            )
    return None


def _falling(past: Sequence[Figures]) -> str | None:
    means = [_ends(past, f"rewards/{name}")[1] for name in ("desirable", "undesirable")]
    if len(past) < STRETCH or any(mean is None or mean > FALLEN for mean in means):
        return None
    return (
        f"rewards of both classes have fallen together: {means[0]:.2f} of desirable and {means[1]:.2f} of undesirable "
        f"rows, as means of {STRETCH} steps, so that liked answers became unlikely as well"
    )


def _flat(past: Sequence[Figures]) -> str | None:
    first, last = _ends(past, "loss")
    if _steps(past) < AFTER or first is None or last is None or first <= 0 or abs(last / first - 1) >= FLAT:
        return None
    return f"the loss is where it was ({first:.4f}, now {last:.4f}) after {_steps(past)} steps"


def _saturated(past: Sequence[Figures]) -> str | None:
    share = _ends(past, "saturated/all")[1]
    if len(past) < STRETCH or share is None or share <= SATURATED:
        return None
    return f"{share:.0%} of the rows of the last {STRETCH} steps are saturated: they hardly move the model any more"


def _spikes(past: Sequence[Figures]) -> str | None:
    norms = [figures["grad_norm"] for figures in past[-AFTER:] if "grad_norm" in figures]
    if len(norms) <= STRETCH:
        return None
    *before, now = norms
    usual = sorted(before)[len(before) // 2]
    if usual <= 0 or not now > SPIKE * usual:
        return None
    return f"the gradient norm jumped to {now:.3g}, from {usual:.3g} as its median of {len(before)} steps"


def _ends(past: Sequence[Figures], name: str) -> tuple[float | None, float | None]:
    """Means of the first and of the last stretch of the steps that have the metric."""
    values = [figures[name] for figures in past if name in figures]
    if len(values) < STRETCH:
        return None, None
    return sum(values[:STRETCH]) / STRETCH, sum(values[-STRETCH:]) / STRETCH


OwnRule = Callable[[dict[str, float], list[dict[str, float]]], Any]
"""(this step's metrics, those of the steps before) -> None, a text that warns, or (text, True), which stops the run.
Of a long run the steps before are the first 50 and the newest 300."""


def own_rules(names: Sequence[str]) -> list[tuple[str, OwnRule]]:
    """The functions that `health.rules` names, as module:function or file.py:function. Raises `UserError`."""
    return [(name, function_named("health.rules", name)) for name in names]


def asked(name: str, rule: OwnRule, past: Sequence[Figures]) -> tuple[str, bool] | None:
    """(what it says, whether it stops the run), or None where it says nothing. Raises `UserError` for its mistakes."""
    try:
        answer = rule(dict(past[-1]), [dict(figures) for figures in past[:-1]])
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"health.rules ({name}) failed: {what}; mend it or leave it out") from error
    if answer is None:
        return None
    text, stop = answer if isinstance(answer, tuple) and len(answer) == 2 else (answer, False)
    if not isinstance(text, str):
        raise UserError(f"health.rules ({name}) must return None, a text, or (text, True); it gave {answer!r}")
    return text, bool(stop)
