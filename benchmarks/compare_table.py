"""The table of `make compare`: methods side by side, and their differences to one of them."""

from table_parts import Content, about, table

from kto_dist.record.verdict import NO_SPREAD

TITLES = {
    "auc": "AUC",
    "accuracy/pairs": "pairs",
    "rewards/margin": "margin",
    "rewards/desirable": "good",
    "rewards/undesirable": "bad",
}


def _range(found: Content, form: str) -> str:
    value, low, high = (form.format(found[name]) for name in ("value", "low", "high"))
    return f"{value} ({NO_SPREAD if found['method'] == 'constant' else f'{low} to {high}'})"


def _form(name: str) -> str:
    return "{:+.2f}" if name.startswith("rewards/") else "{:.3f}"


def _figure(row: Content, name: str) -> str:
    if name in row["intervals"]:
        return _range(row["intervals"][name], _form(name))
    return _form(name).format(row["figures"][name]) if name in row["figures"] else ""


def compare(content: Content) -> str:
    settings, lines = content["settings"], []
    for row in content["results"]:
        cost = row["cost"]
        lines.append(
            [
                row["method"],
                "" if row["lr"] is None else f"{row['lr']:g}",
                *(_figure(row, name) for name in TITLES),
                "" if row["length"] is None else f"{row['length']:+.2f}",
                "" if cost is None else f"{cost['tokens']:,}",
                "" if cost is None else f"{cost['seconds'].get('training', 0):.0f}",
            ]
        )
    for row in content["results"]:
        if row["against"]:
            apart = (row["against"].get(name) for name in TITLES)
            cells = ["" if found is None else _range(found, "{:+.3f}") for found in apart]
            lines.append([f"*{row['method']} − {settings['against']}*", "", *cells, "", "", ""])
    lr, beta = (" and ".join(f"{value:g}" for value in settings[name]) for name in ("lr", "beta"))
    job = (
        f"the demo's model, {settings['dtype']}; {len(content['tried'])} runs of {settings['steps']} steps of "
        f"{settings['global_batch']} rows: learning rates {lr}, beta {beta}"
    )
    prompts = settings["prompts"]
    held = (
        f"Reported: {settings['rows']} rows of {prompts[1]} held-out prompts, {settings['pairs']} pairs among them; "
        f"the learning rate is chosen by {settings['choose_by']} on {prompts[0]} others."
    )
    ranks = "one rank" if settings["ranks"] == 1 else f"{settings['ranks']} ranks"
    beside = f", {settings['beside']}" if settings["beside"] else ""
    time = (
        f"All of it took {content['seconds']['all'] / 60:.0f} minutes ({ranks}{beside}); "
        f"{content['scored']:,} log-probs of the reference were scored, each once."
    )
    head = ["", "learning rate", *TITLES.values(), "length", "tokens trained", "s of training"]
    parts = [about(content, job), table(head, lines), f"{held} {time}"]
    return "\n\n".join([*parts, *_answers(content.get("answers"))])


def _answers(found: Content | None) -> list[str]:
    """What the chosen models answer, and which a judge prefers."""
    if found is None:
        return []
    rivals, lines = list(dict.fromkeys(other for own in found["judged"].values() for other in own)), []
    for method, own in found["figures"].items():
        won = [found["judged"].get(method, {}).get(other, {}) for other in rivals]
        lines.append(
            [
                method,
                *(_sure(own.get(name), form) for name, form in (("words", "{:.0f}"), ("finished", "{:.2f}"))),
                *(_sure(figures.get("win_rate"), "{:.2f}") for figures in won),
                *(_sure(figures.get("win_rate/equal_length"), "{:.2f}") for figures in won),
            ]
        )
    head = ["answers of", "words", "ended", *(f"wins against {other}" for other in rivals)]
    head += [f"at equal length, against {other}" for other in rivals]
    count = found["prompts"]
    said = f"Greedy answers to {count} of the reported prompts; the judge: {found['judge']}. Half is no difference."
    return [table(head, lines), said]


def _sure(figure: Content | float | None, form: str) -> str:
    if isinstance(figure, dict):
        return _range(figure, form)
    return "" if figure is None else form.format(figure)
