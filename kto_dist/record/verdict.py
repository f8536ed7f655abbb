"""What a run's figures come to: one sentence, how sure it is, and what to watch.

In:  the held-out figures before and after, as lines of heldout.jsonl have them, and the steps' metrics.
Out: `Verdict`, for people.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kto_dist.record.plots import Record, curve, is_finite

FIRST = (
    "accuracy/all",
    "accuracy/desirable",
    "accuracy/undesirable",
    "auc",
    "brier",
    "loss",
    "rewards/margin",
    "rewards/desirable",
    "rewards/undesirable",
    "accuracy/pairs",
    "rewards/margins",
    "kl_raw",
    "tokens/desirable",
    "tokens/undesirable",
)
"""Held-out figures in the order in which they matter; the others come after them."""
FEW = 50
"""Prompts below which a set of held-out rows says little."""
FAR = 50.0
"""Nats of `kl_raw` that are a long way from the reference."""
BY_HEART = 0.15
"""Accuracy on training rows above that on held-out rows."""
LENGTH = 0.3
"""A change of the answers' length, as a share of it."""
NO_SPREAD = "no spread"
"""In place of a range: every resample gave the same value, which says nothing of how sure it is."""
_LAST_STEPS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    tone: Literal["good", "unclear", "bad"]
    sentence: str
    watch: tuple[str, ...] = ()
    """What to worry about, the worst first."""


def verdict(
    before: Record | None, after: Record | None, metrics: Sequence[Record] = (), more: Sequence[str] = ()
) -> Verdict:
    """`before`: None where no evaluation came before the first update. `more`: what else is to be watched."""
    if not after or not is_finite(after.get("accuracy/all")):
        sentence = "No held-out rows: nothing says whether the model got better."
        return Verdict(tone="unclear", sentence=sentence, watch=tuple(more))
    changes = [
        f"{label} {_change(before, after, name)}"
        for name, label in (("accuracy/all", "accuracy on held-out thumbs"), ("auc", "AUC"))
        if name in after
    ]
    tone, opening = _tone(before, after)
    return Verdict(tone=tone, sentence=f"{opening}: {', '.join(changes)}.", watch=(*more, *_watch(after, metrics)))


def of_health(lines: Sequence[Record]) -> list[str]:
    """What the rules of health said, by the lines of health.jsonl; the page has their sentences."""
    stopped = [f"the run was stopped at step {line['step']} ({line['rule']})" for line in lines if line.get("stop")]
    warned = [str(line.get("rule")) for line in lines if not line.get("stop")]
    return stopped + ([f"health warned ({', '.join(dict.fromkeys(warned))})"] if warned else [])


def range_of(line: Mapping[str, Any] | None, name: str) -> tuple[float, float] | None:
    """The interval of a figure, where it has one that says how sure the figure is."""
    found = _interval(line, name)
    if found.get("method") == "constant" or not (is_finite(found.get("low")) and is_finite(found.get("high"))):
        return None
    return float(found["low"]), float(found["high"])


def shown_range(line: Mapping[str, Any] | None, name: str) -> str:
    """The interval in words; empty where there is none."""
    if _interval(line, name).get("method") == "constant":
        return NO_SPREAD
    found = range_of(line, name)
    return "" if found is None else f"{found[0]:.2f} to {found[1]:.2f}"


def _interval(line: Mapping[str, Any] | None, name: str) -> Mapping[str, Any]:
    found = ((line or {}).get("intervals") or {}).get(name)
    return found if isinstance(found, dict) else {}


def _tone(before: Record | None, after: Record) -> tuple[Literal["good", "unclear", "bad"], str]:
    """By the AUC, which no z0 moves; by accuracy where there is one class alone."""
    name = "auc" if "auc" in after else "accuracy/all"
    # before the first update all rewards are equal, which is chance
    bar = (before or {}).get(name, 0.5)
    found = range_of(after, name)
    if found is None:
        return "unclear", "How sure the figures are is not known"
    if found[0] > bar:
        return "good", "Better at telling liked from disliked answers"
    if found[1] < bar:
        return "bad", "Worse at telling liked from disliked answers"
    return "unclear", "Not surely better or worse: the difference may be chance"


def shortened(answers: tuple[Sequence[Record], Sequence[Record]]) -> list[str]:
    """Whether answers have become much shorter or longer. `answers`: to the same prompts, before and after."""
    counts = [[one["tokens"] for one in side if is_finite(one.get("tokens"))] for side in answers]
    if not counts[0] or len(counts[0]) != len(counts[1]) or not sum(counts[0]):
        return []
    change = sum(counts[1]) / sum(counts[0]) - 1
    if abs(change) <= LENGTH:
        return []
    return [f"answers {abs(change):.0%} {'shorter' if change < 0 else 'longer'} (of {len(counts[0])} prompts)"]


def _change(before: Record | None, after: Record, name: str) -> str:
    old = (before or {}).get(name)
    came = f"{old:.2f} → " if is_finite(old) else ""
    sure = shown_range(after, name)
    return f"{came}{after[name]:.2f}" + (f" ({sure})" if sure else "")


def _watch(after: Record, metrics: Sequence[Record]) -> list[str]:
    found = []
    for name, label in (("desirable", "liked"), ("undesirable", "disliked")):
        sure = range_of(after, f"accuracy/{name}")
        if sure is not None and sure[1] < 0.5:
            found.append(f"{label} answers are told worse than by chance ({after[f'accuracy/{name}']:.2f})")
    sure = range_of(after, "rewards/desirable")
    if sure is not None and sure[1] < 0:
        found.append(f"liked answers became less likely as well (reward {after['rewards/desirable']:.2f})")
    kl = after.get("kl_raw")
    if is_finite(kl) and abs(kl) > FAR:
        found.append(f"far from the reference (kl_raw {kl:.0f} nats)")
    if is_finite(after.get("saturated/all")) and after["saturated/all"] > 0.5:
        found.append(f"{after['saturated/all']:.0%} of the held-out rows are saturated")
    _, values = curve(metrics, "accuracy/all")
    if values:
        last = values[-_LAST_STEPS:]
        trained = sum(last) / len(last)
        if trained - after["accuracy/all"] > BY_HEART:
            found.append(f"learnt by heart: accuracy {trained:.2f} on training rows")
    prompts = ((after.get("intervals") or {}).get("accuracy/all") or {}).get("prompts")
    if is_finite(prompts) and prompts < FEW:
        found.append(f"only {prompts} held-out prompts")
    return found


def ordered(names: Sequence[str]) -> list[str]:
    """Figures, those that matter first."""
    return [name for name in FIRST if name in names] + [name for name in names if name not in FIRST]
