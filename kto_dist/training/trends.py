"""Rules over a stretch of steps: a class that does not learn, a loss that stays, rewards that fall together, rows that
contradict each other, classes mixed otherwise than the audit saw; and rules of the user's own, Python functions that
the config names.

Each looks at the steps so far and gives its reason, or None. Each speaks once in a run.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
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
CONTRADICTED = 0.25
"""Share of the loss that rows with a twin of the other label may have."""
MIXED = 0.1
"""How far the share of desirable rows may be from the audit's, where chance does not explain it."""
DRIFTED = 0.5
"""How much longer or shorter sampled answers may become, as a share of the first ones' length."""
_SURE = 4.0
"""Standard errors that chance does not explain."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trend:
    """What is watched over many steps."""

    name: str
    reason: Callable[[Sequence[Figures]], str | None]
    """The steps so far -> what is wrong, with its values; None where nothing is."""
    remedy: str
    same_as: frozenset[str] = frozenset()
    """Rules that tell of the same cause: where one has spoken, this one is silent."""


def trends(audited: float | None = None) -> tuple[Trend, ...]:
    """`audited`: the share of desirable rows by the data's audit; None where it has none, or the loss takes others."""
    of_the_run = (
        Trend(
            name="one_class",
            reason=_one_class,
            remedy="look at that class's labels, and at objective.desirable_weight and undesirable_weight",
            same_as=frozenset({"falling", "clamped", "dead"}),
        ),
        Trend(
            name="falling",
            reason=_falling,
            remedy="lower train.lr or raise objective.desirable_weight: disliked answers are unlearned by making "
            "everything less likely",
            same_as=frozenset({"clamped", "max_kl", "dead"}),
        ),
        Trend(
            name="flat",
            reason=_flat,
            remedy="raise train.lr, or look whether the labels depend on the answers at all (kto-dist audit)",
            same_as=frozenset({"saturated", "dead", "contradicted"}),
        ),
        Trend(
            name="saturated",
            reason=_saturated,
            remedy="lower objective.beta or train.lr, or stop earlier (checkpoint.best): most rows teach nothing more",
            same_as=frozenset({"max_kl", "dead", "spikes"}),
        ),
        Trend(
            name="spike",
            reason=_spike,
            remedy="lower train.lr, set train.clip, and look at the rows of that step (long or repeated answers)",
            same_as=frozenset({"spikes", "max_kl", "dead"}),
        ),
        Trend(
            name="contradicted",
            reason=_contradicted,
            remedy="`kto-dist mine` settles such conflicts by majority",
        ),
    )
    if audited is None:
        return of_the_run
    mixed = Trend(
        name="class_mix",
        reason=lambda past: _mixed(past, audited),
        remedy="look at what data.train reads beside the audited files, at rows that were skipped or dropped, and "
        "audit what is trained on",
    )
    return (*of_the_run, mixed)


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


def usual_norm(past: Sequence[Figures]) -> float | None:
    """The median gradient norm of the newest steps, or of the first ones where that is higher: a model that has learnt
    most rows has small norms, next to which an ordinary one looks like a jump. None where steps are few, or it is 0."""
    norms = [figures["grad_norm"] for figures in past if "grad_norm" in figures]
    if len(norms) < STRETCH:
        return None
    return max(median(norms[:STRETCH]), median(norms[-AFTER:])) or None


def _spike(past: Sequence[Figures]) -> str | None:
    """Told when it is over: one that stays is another rule's."""
    if len(past) < 3 or (usual := usual_norm(past[:-2])) is None:
        return None
    jumped, now = (figures.get("grad_norm", 0.0) for figures in past[-2:])
    if not jumped > SPIKE * usual >= now:
        return None
    return f"the gradient norm jumped to {jumped:.3g} and came back to {now:.3g}, its median being {usual:.3g}"


def _contradicted(past: Sequence[Figures]) -> str | None:
    newest = past[-STRETCH:]
    rows, loss = _sums(newest, "rows/contradicted", "loss/contradicted")
    all_rows, all_loss = _sums(newest, "rows/all", "loss")
    if len(newest) < STRETCH or all_loss <= 0 or loss <= CONTRADICTED * all_loss:
        return None
    return (
        f"rows that have a twin with the other label are {rows / all_rows:.0%} of the rows and have "
        f"{loss / all_loss:.0%} of the loss of the last {STRETCH} steps: the model is pulled both ways"
    )


def _mixed(past: Sequence[Figures], audited: float) -> str | None:
    rows, up = _sums(past, "rows/all", "rows/all")[0], _sums(past, "rows/desirable", "rows/desirable")[0]
    if len(past) < STRETCH or not rows:
        return None
    apart = up / rows - audited
    if abs(apart) <= max(MIXED, _SURE * (audited * (1 - audited) / rows) ** 0.5):
        return None
    return (
        f"{up / rows:.0%} of the rows of {len(past)} steps are desirable, and the audit of the data says "
        f"{audited:.0%}: what is trained on is not what was audited"
    )


def _sums(past: Sequence[Figures], rows: str, mean: str) -> tuple[float, float]:
    """Rows, and the sum over them of what the steps have as a mean."""
    counted = [figures for figures in past if rows in figures]
    return sum(figures[rows] for figures in counted), sum(figures[rows] * figures.get(mean, 0.0) for figures in counted)


def _ends(past: Sequence[Figures], name: str) -> tuple[float | None, float | None]:
    """Means of the first and of the last stretch of the steps that have the metric."""
    values = [figures[name] for figures in past if name in figures]
    if len(values) < STRETCH:
        return None, None
    return sum(values[:STRETCH]) / STRETCH, sum(values[-STRETCH:]) / STRETCH


def drifted(lengths: Sequence[float]) -> str | None:
    """Of answers to the same prompts: their mean tokens at each evaluation so far, the first being the start's.

    Two evaluations in a row, so that no single draw decides.
    """
    if len(lengths) < 3 or lengths[0] <= 0:
        return None
    changes = [length / lengths[0] - 1 for length in lengths[-2:]]
    if not (min(changes) > DRIFTED or max(changes) < -DRIFTED):
        return None
    return (
        f"sampled answers are {abs(changes[-1]):.0%} {'longer' if changes[-1] > 0 else 'shorter'} than before training "
        f"({lengths[-1]:.0f} tokens, {lengths[0]:.0f} before)"
    )


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
