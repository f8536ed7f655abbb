"""A run's folder -> one self-contained page that says how the run went, and its plots as files.

In:  `config.yaml`, `metrics.jsonl`, `heldout.jsonl`, `summary.json`; any may be missing, short, or cut off.
Out: `plots/*.png` (light) and `report.html` with every plot inside it, in a light and a dark rendering.

It reads files only, so that a report can be made of a run that still goes, was killed, or ran elsewhere.

The page is report.html.j2, autoescaped: prompts and completions are other people's text.
"""

import base64
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from kto_dist.base.files import write_whole
from kto_dist.base.secrets import masked
from kto_dist.record.plots import PLOTS, Record, curve, is_finite, render
from kto_dist.record.theme import DARK, LIGHT


def write_report(run: str | Path) -> Path:
    """Writes the plots and `report.html` of a run's folder; returns the page's path. Raises `OSError`."""
    run = Path(run)
    metrics, heldout = read_steps(run / "metrics.jsonl"), read_steps(run / "heldout.jsonl")
    summary = _read_json(run / "summary.json")
    config = run / "config.yaml"

    plots = []
    (run / "plots").mkdir(parents=True, exist_ok=True)
    for plot in PLOTS:
        light, dark = (render(plot, metrics, heldout, theme) for theme in (LIGHT, DARK))
        if light is None or dark is None:
            continue
        write_whole(run / "plots" / f"{plot.name}.png", light)
        plots.append({"plot": plot, "light": _data_uri(light), "dark": _data_uri(dark)})

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        # Not select_autoescape: that goes by the name, and `.j2` would turn escaping off.
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["show"] = show
    page = environment.get_template("report.html.j2").render(
        name=run.resolve().name,
        steps=len(metrics),
        last_step=metrics[-1]["step"] if metrics else None,
        tiles=_tiles(metrics, heldout, summary),
        plots=plots,
        comparison=_comparison(summary, heldout),
        samples=[sample for sample in _listed(summary.get("samples")) if isinstance(sample, dict)],
        sections=_sections(summary),
        config=masked(config.read_text(encoding="utf-8")) if config.is_file() else None,
    )
    write_whole(run / "report.html", page.encode("utf-8"))
    return run / "report.html"


def read_steps(path: Path) -> list[Record]:
    """The records of a JSON-lines file by step; the last one of a step wins. A cut-off line is left out."""
    if not path.is_file():
        return []
    records: dict[int, Record] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records[record["step"]] = record
    return [records[step] for step in sorted(records)]


def show(value: Any) -> str:
    """A value for people: four digits, thousands apart, a dash for nothing."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    if isinstance(value, str):
        return masked(value)
    return masked(json.dumps(value, ensure_ascii=False, default=str))


def _tiles(metrics: list[Record], heldout: list[Record], summary: Record) -> list[tuple[str, str, str]]:
    """(label, value, note) of the figures that one looks at first."""
    rows = {name: (before, after) for name, before, after, _ in _comparison(summary, heldout)}
    tiles = []
    for key, label in (
        ("accuracy/all", "held-out accuracy"),
        ("auc", "held-out AUC"),
        ("rewards/margin", "held-out margin"),
    ):
        if key in rows:
            before, after = rows[key]
            tiles.append((label, show(after), "" if before is None else f"before: {show(before)}"))
    for key, label in (("loss", "training loss"), ("kl_raw", "kl_raw"), ("tokens_per_second", "tokens / s")):
        _, values = curve(metrics, key)
        if values:
            last = values[-10:]
            tiles.append((label, show(sum(last) / len(last)), f"mean of the last {len(last)} steps"))
    return tiles


def _comparison(summary: Record, heldout: list[Record]) -> list[tuple[str, Any, Any, float | None]]:
    """(metric, before, after, change) on held-out rows, from the summary or else the evaluations."""
    held = summary.get("heldout")
    before, after = (held.get("before"), held.get("after")) if isinstance(held, dict) else (None, None)
    if not isinstance(before, dict) and not isinstance(after, dict) and heldout:
        before, after = (heldout[0] if len(heldout) > 1 else None), heldout[-1]
    before, after = (side if isinstance(side, dict) else {} for side in (before, after))
    rows = []
    for key in dict.fromkeys([*before, *after]):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict | list) or isinstance(new, dict | list):
            continue  # intervals and the like
        rows.append((key, old, new, new - old if is_finite(old) and is_finite(new) else None))
    return rows


def _sections(summary: Record) -> list[tuple[str, list[tuple[str, Any]]]]:
    """(title, rows) of what else the summary holds; nested names are joined with dots."""
    sections: dict[str, list[tuple[str, Any]]] = {}
    for key, value in summary.items():
        compared = key == "heldout" and isinstance(value, dict) and not {"before", "after"}.isdisjoint(value)
        if key == "samples" or compared:
            continue
        if isinstance(value, dict):
            sections[key] = list(_leaves(value))
        else:
            sections.setdefault("run", []).append((key, value))
    return [(title, rows) for title, rows in sections.items() if rows]


def _leaves(tree: Record, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _read_json(path: Path) -> Record:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
