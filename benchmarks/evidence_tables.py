"""The tables of `evidence.py`: one a question, each from the same file of results."""

from evidence import QUESTIONS, RUNS, Question, numbers
from table_parts import Content, about, table

FIGURES = {
    "auc": ("AUC", "{:.3f}"),
    "pairs": ("pairs", "{:.3f}"),
    "accuracy": ("accuracy", "{:.3f}"),
    "good": ("good, nats", "{:+.1f}"),
    "bad": ("bad, nats", "{:+.1f}"),
}
"""Name -> the column's title, and how it is written."""


def _cell(line: Content, name: str, form: str) -> str:
    found = line[name]
    span = f" ({form.format(found['low'])} to {form.format(found['high'])})" if "low" in found else ""
    return form.format(found["value"]) + span


def _runs(content: Content, arm: str) -> list[Content]:
    return [run for run in content["runs"] if run["arm"] == arm]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _question(content: Content, question: Question, more: dict[str, dict[str, str]]) -> str:
    """`more`: title of a column -> arm -> its cell, between the seeds and the figures."""
    of_arm = {line["arm"]: line for line in content["results"] if "minus" not in line}
    of_two = {(line["arm"], line["minus"]): line for line in content["results"] if "minus" in line}
    titles = {arm: title for title, arm in question.arms.items()}
    rows = []
    for title, arm in question.arms.items():
        if arm not in of_arm:
            continue
        line = of_arm[arm]
        by_seed = ", ".join(f"{value:.3f}" for value in line["auc_by_seed"])
        rows.append(
            [
                title,
                *(cells.get(arm, "") for cells in more.values()),
                by_seed,
                *(_cell(line, name, form) for name, (_, form) in FIGURES.items()),
            ]
        )
    for first, second in question.pairs:
        if (first, second) in of_two:
            line = of_two[first, second]
            signed = (form.replace("{:.", "{:+.") for _, form in FIGURES.values())
            cells = [_cell(line, name, form) for name, form in zip(FIGURES, signed, strict=True)]
            rows.append([f"*{titles[first]}* − *{titles[second]}*", *("" for _ in more), "", *cells])
    if not rows:
        return "*None of these runs has been made yet.*"
    return table(["", *more, "AUC by seed", *(title for title, _ in FIGURES.values())], rows)


def _job(content: Content) -> str:
    settings = content["settings"]
    held = f"{len(numbers(content['heldout']['desirable']))} held-out rows of {settings['heldout_prompts']} prompts"
    return (
        f"the demo's model, {settings['dtype']}; {settings['steps']} steps of "
        f"{settings['global_batch']} rows, constant learning rate {settings['lr']:g}, beta {settings['beta']:g}; {held}"
    )


def _labels(content: Content, question: Question) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {"rows (good)": {}, "wrong labels": {}}
    for arm in question.arms.values():
        if own := _runs(content, arm):
            good = _mean([run["desirable"] for run in own])
            found["rows (good)"][arm] = f"{_mean([run['rows'] for run in own]):,.0f} ({good:.0%})"
            found["wrong labels"][arm] = f"{_mean([run['wrong_labels'] for run in own]):.0%}"
    return found


def _weights(content: Content, question: Question) -> dict[str, str]:
    cells = {}
    for arm in question.arms.values():
        if own := _runs(content, arm):
            of_class = [_mean([run["class_weights"][name] for run in own]) for name in ("desirable", "undesirable")]
            cells[arm] = " : ".join(f"{weight:.3g}" for weight in of_class)
    return cells


def _z0(content: Content, question: Question) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {"steps with z0 at 0": {}}
    for arm in question.arms.values():
        if own := _runs(content, arm):
            steps = [numbers(run.get("kl_raw", run.get("kl", ""))) for run in own]
            if all(of_run.size for of_run in steps):
                found["steps with z0 at 0"][arm] = f"{_mean([float((of_run <= 0).mean()) for of_run in steps]):.0%}"
            else:
                found["steps with z0 at 0"][arm] = "has none"
    return found


def _one(name: str) -> Question:
    (found,) = (question for question in QUESTIONS if question.name == name)
    return found


def imbalance(content: Content) -> str:
    question = _one("imbalance")
    more = {**_labels(content, question), "weights, good : bad": _weights(content, question)}
    del more["wrong labels"]
    return _question(content, question, more)


def flips(content: Content) -> str:
    question = _one("flips")
    return _question(content, question, _labels(content, question))


def downvoters(content: Content) -> str:
    question = _one("downvoters")
    return _question(content, question, _labels(content, question))


def z0(content: Content) -> str:
    question = _one("z0")
    return _question(content, question, _z0(content, question))


def peer(content: Content) -> str:
    question = _one("peer")
    return _question(content, question, _z0(content, question))


def runs(content: Content) -> str:
    """Where all of it was run, and how many runs there are."""
    done, wanted = len(content["runs"]), sum(len(arm.seeds) for arm in RUNS.values())
    seconds = sum(run["seconds"]["all"] for run in content["runs"])
    missing = "" if done == wanted else f" of {wanted}"
    return f"{about(content, _job(content))}\n\n{done}{missing} runs, {seconds / 60:.0f} minutes together."


KINDS = {
    "evidence": runs,
    "evidence-imbalance": imbalance,
    "evidence-flips": flips,
    "evidence-downvoters": downvoters,
    "evidence-z0": z0,
    "evidence-peer": peer,
}
