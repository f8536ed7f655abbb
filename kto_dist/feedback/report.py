"""An audit -> `audit.json`, and a page for the person who decides whether to spend GPU hours on this data.

In:  `Audit`. Out: JSON, and HTML without scripts and without anything from elsewhere; plots are SVG inside it, in a
light and a dark rendering.

The page is audit.html.j2, autoescaped: everything in it is other people's text. Users appear by the start of their
hash, or by a number where the mining config turned hashing off; samples were masked when the audit was made.
"""

import base64
import json
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from kto_dist.base.files import write_whole
from kto_dist.feedback.agreement import Estimate
from kto_dist.feedback.findings import Audit
from kto_dist.feedback.plots import PLOTS, render, user_names
from kto_dist.record.theme import DARK, LIGHT

_ORDER = {"warn": 0, "unknown": 1, "pass": 2}


def write_audit(audit: Audit, folder: str | Path) -> None:
    """`audit.json` and `report.html` in `folder`, each whole or not at all; the JSON last, since `train` reads it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "report.html", page(audit).encode("utf-8", "replace"))
    text = json.dumps(audit.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(folder / "audit.json", text.encode("utf-8", "replace"))


def page(audit: Audit) -> str:
    """The whole page."""
    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader([folder, folder.parent / "record"]),
        # Not select_autoescape: that goes by the name, and `.j2` would turn escaping off.
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent, "points": points, "estimate": estimate}
    return environment.get_template("audit.html.j2").render(
        audit=audit,
        title=_title(audit),
        checks=sorted(audit.checks, key=lambda check: _ORDER[check.status]),
        verdict=_verdict(audit),
        tiles=_tiles(audit),
        plots={plot.name: drawn for plot in PLOTS if (drawn := _drawn(plot, audit)) is not None},
        names=user_names(audit),
        settings=yaml.safe_dump(audit.settings, sort_keys=False, allow_unicode=True) if audit.settings else "",
    )


def number(value: float | None) -> str:
    """Counts with thousands apart, other figures to three digits; a dash for nothing."""
    if value is None:
        return "–"
    if float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def percent(share: float | None) -> str:
    if share is None:
        return "–"
    if 0 < share < 0.001:
        return "<0.1%"
    return f"{share:.1%}" if 0 < share < 0.1 else f"{share:.0%}"


def points(gap: float | None) -> str:
    """A difference of shares, signed, in percentage points."""
    return "–" if gap is None else f"{100 * gap:+.0f}".replace("-", "−")


def estimate(value: Estimate | None, form: str = "number") -> str:
    """A figure with its interval."""
    if value is None:
        return "–"
    show = percent if form == "percent" else lambda figure: f"{figure:.2f}"
    return f"{show(value.value)} ({show(value.low)} to {show(value.high)})"


def _title(audit: Audit) -> str:
    folder = (audit.settings.get("output") or {}).get("folder")
    return Path(str(folder)).name if folder else "thumbs"


def _verdict(audit: Audit) -> tuple[str, str]:
    """(class, sentence)"""
    failed = sum(check.status == "warn" for check in audit.checks)
    unknown = sum(check.status == "unknown" for check in audit.checks)
    if failed:
        return "fails", f"{failed} of {len(audit.checks)} checks {'wants' if failed == 1 else 'want'} a decision first"
    if unknown:
        return "unsure", f"Nothing found against training; {unknown} of {len(audit.checks)} checks could not be made"
    return "passes", f"All {len(audit.checks)} checks pass"


def _tiles(audit: Audit) -> list[tuple[str, str, str]]:
    """(label, value, note) of the figures that one looks at first."""
    log, balance, agreement, users = audit.log, audit.balance, audit.agreement, audit.users
    rows = balance.dataset.up + balance.dataset.down
    tiles = [
        ("votes in the log", number(log.votes), f"{number(log.kept)} support the dataset"),
        ("rows in the dataset", number(rows), f"{number(log.prompts)} prompts in the log"),
        ("thumbs up", percent(balance.dataset.up_share), f"log: {percent(balance.labelled.up_share)}"),
    ]
    if agreement.alpha and agreement.noise:
        tiles += [
            ("agreement (alpha)", f"{agreement.alpha.value:.2f}", f"{number(agreement.responses)} shared responses"),
            ("wrong single votes", percent(agreement.noise.value), f"labels now: {percent(agreement.wrong_labels)}"),
        ]
    if users:
        tiles.append(("users", number(users.users), f"heavy downvoters: {number(users.named)}"))
    return tiles


def _drawn(plot: Any, audit: Audit) -> dict[str, Any] | None:
    light, dark = (render(plot, audit, theme) for theme in (LIGHT, DARK))
    if light is None or dark is None:
        return None
    return {"plot": plot, "light": _data_uri(light), "dark": _data_uri(dark)}


def _data_uri(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode("ascii")
