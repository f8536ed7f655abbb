"""What `kto-dist evaluate` found of a run's own answers, as tables of its report.

In:  evaluation.json, or {}. Out: (title, rows of (name, value, interval)), for people.
"""

from typing import Any

from kto_dist.record.plots import Record
from kto_dist.record.verdict import shown_range

Table = tuple[str, list[tuple[str, Any, str]]]


def tables_of(evaluation: Record) -> list[Table]:
    answers = evaluation.get("answers")
    if not isinstance(answers, dict):
        return []
    found = [(f"{answers.get('prompts', '')} held-out prompts answered", _rows(answers.get("figures")))]
    judged = answers.get("judged")
    for other, contest in judged.items() if isinstance(judged, dict) else ():
        if isinstance(contest, dict):
            title = f"the model against {other}, judged by {contest.get('judge')} in both orders"
            found.append((title, _rows(contest.get("figures"))))
    found.append(("answers that the model draws, in nats", _rows(answers.get("on_policy"))))
    return [(title, rows) for title, rows in found if rows]


def _rows(figures: Any) -> list[tuple[str, Any, str]]:
    if not isinstance(figures, dict):
        return []
    return [
        (name, figure.get("value"), shown_range({"intervals": {name: figure}}, name))
        if isinstance(figure, dict)
        else (name, figure, "")
        for name, figure in figures.items()
    ]
