"""A comparison's outcome -> one self-contained page, and lines for a terminal.

The page is comparison.html.j2, autoescaped; its plots come in a light and a dark rendering.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kto_dist.comparison.answers import Answered
from kto_dist.comparison.measure import Outcome, Row
from kto_dist.evaluation.intervals import Interval
from kto_dist.record import report
from kto_dist.record.theme import DARK, LIGHT, Theme, data_uri, finish, picture
from kto_dist.record.verdict import NO_SPREAD

TITLES = {
    "auc": "AUC",
    "accuracy/pairs": "pairs",
    "rewards/margin": "margin",
    "rewards/desirable": "good",
    "rewards/undesirable": "bad",
}
"""Of the columns; `MEANINGS` says more."""
MEANINGS = {
    "AUC": "chance that a good answer's log-ratio exceeds a bad one's, whatever their prompts",
    "pairs": "share of pairs of a good and a bad answer to one prompt with the higher log-ratio at the good one",
    "margin": "mean log-ratio of good answers minus that of bad ones, in nats",
    "good, bad": "mean log-ratio, policy to start, in nats: below 0 the answers have become less likely",
    "length": "Spearman's correlation of log-ratio and tokens of the answer",
}


def page_of(outcome: Outcome, answers: Answered | None, name: str, commands: list[str], config: str) -> bytes:
    environment = report.pages(Path(__file__).parent)
    environment.filters |= {"figure": _figure, "difference": _difference}
    template = environment.get_template("comparison.html.j2")
    page = template.render(
        name=name,
        outcome=outcome,
        titles=TITLES,
        meanings=MEANINGS,
        answers=answers,
        answer_rows=[] if answers is None else list(_answer_rows(answers)),
        answer_head=[] if answers is None else _answer_head(answers),
        answer_meanings=ANSWER_MEANINGS,
        plots=_plots(outcome, answers),
        commands=commands,
        config=config,
    )
    return page.encode("utf-8")


def lines_of(outcome: Outcome) -> list[str]:
    """The table, as text."""
    head = ["method", "lr", "beta", *TITLES.values(), "length", "seconds"]
    rows = [
        [
            row.method,
            "" if row.lr is None else f"{row.lr:g}",
            "" if row.beta is None else f"{row.beta:g}",
            *(_figure(row, name) for name in TITLES),
            "" if row.length is None else f"{row.length:+.2f}",
            "" if row.cost is None else f"{sum(row.cost.seconds.values()):,.0f}",
        ]
        for row in outcome.rows
    ]
    apart = [
        [f"{row.method} - {outcome.against}", "", "", *(_difference(row, name) for name in TITLES), "", ""]
        for row in outcome.rows
        if row.against
    ]
    return [
        f"{outcome.heldout:,} held-out rows of {outcome.prompts[1]:,} prompts, {outcome.pairs:,} pairs among them",
        f"lr and beta chosen by {outcome.choose_by} on {outcome.prompts[0]:,} other prompts, among "
        f"{len(outcome.tried)} runs",
        *_aligned([head, *rows, *apart]),
        *(f"{title}: {meaning}" for title, meaning in MEANINGS.items()),
    ]


ANSWER_MEANINGS = {
    "wins": "share of prompts at which the judge prefers this method's answer, both orders, a tie counting half",
    "at equal length": "the same for answers of equal length, by a logistic curve over the difference",
    "flips": "share of pairs whose winner changes with the order in which the judge sees them",
    "repeated": "share of an answer's runs of words that it has said before",
}


def _answer_head(answers: Answered) -> list[str]:
    rivals = list(dict.fromkeys(other for own in answers.contests.values() for other in own))
    return ["words", "finished", "repeated", *(f"{what} {other}" for other in rivals for what in _AGAINST)]


_AGAINST = {"wins against": "win_rate", "at equal length, against": "win_rate/equal_length", "flips against": "flips"}


def _answer_rows(answers: Answered) -> Iterator[tuple[str, list[str]]]:
    """(method, cells)"""
    rivals = list(dict.fromkeys(other for own in answers.contests.values() for other in own))
    for method, figures in answers.figures.items():
        cells = [_sure(figures.get(name)) for name in ("words", "finished", "repeated")]
        for other in rivals:
            contest = answers.contests.get(method, {}).get(other)
            of_both = {} if contest is None else contest.figures()
            cells += [_sure(of_both.get(name)) for name in _AGAINST.values()]
        yield method, cells


def _sure(figure: Interval | float | None) -> str:
    if figure is None:
        return "–"
    if isinstance(figure, Interval):
        return f"{figure.value:.3g} ({_range(figure, '.3g')})"
    return f"{figure:.3g}"


def answer_lines(answers: Answered) -> list[str]:
    """As text: the judge's table."""
    lines = [["method", *_answer_head(answers)], *([method, *cells] for method, cells in _answer_rows(answers))]
    contests = [found for own in answers.contests.values() for found in own.values()]
    lacking, every = sum(found.without_verdict for found in contests), sum(2 * found.first.size for found in contests)
    return [
        "",
        f"new answers to {len(answers.prompts):,} of the reported prompts; judge: {answers.judge}",
        *_aligned(lines),
        *([f"({lacking:,} of {every:,} verdicts were not given)"] if lacking else []),
        *(f"{title}: {meaning}" for title, meaning in ANSWER_MEANINGS.items()),
    ]


def _aligned(lines: list[list[str]]) -> list[str]:
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _figure(row: Row, name: str) -> str:
    if name not in row.figures:
        return "–"
    value, interval = row.figures[name], row.intervals.get(name)
    return f"{value:.3g}" + ("" if interval is None else f" ({_range(interval, '.3g')})")


def _difference(row: Row, name: str) -> str:
    interval = row.against.get(name)
    return "–" if interval is None else f"{interval.value:+.3g} ({_range(interval, '+.3g')})"


def _range(interval: Interval, form: str) -> str:
    return NO_SPREAD if interval.method == "constant" else f"{interval.low:{form}} to {interval.high:{form}}"


Draw = Callable[[Outcome, Axes, Theme], None]


def _plots(outcome: Outcome, answers: Answered | None) -> list[dict[str, str]]:
    found = [_plot(title, text, partial(draw, outcome)) for title, text, draw in _PLOTS]
    if answers is not None:
        title, text = _WORDS
        found.append(_plot(title, text, partial(_words, answers)))
    return found


def _plot(title: str, text: str, draw: Callable[[Axes, Theme], None]) -> dict[str, str]:
    light, dark = (_drawn(draw, theme) for theme in (LIGHT, DARK))
    return {"title": title, "text": text, "light": light, "dark": dark}


def _drawn(draw: Callable[[Axes, Theme], None], theme: Theme) -> str:
    def on(figure: Figure) -> bool:
        draw(figure.subplots(), theme)
        return True

    found = picture(on, theme)
    assert found is not None
    return data_uri(found)


def _told_apart(outcome: Outcome, axes: Axes, theme: Theme) -> None:
    """Each method's AUC and its accuracy on pairs, with their intervals."""
    names = [row.method for row in outcome.rows]
    for name, shift, colour in (("auc", -0.12, "desirable"), ("accuracy/pairs", 0.12, "plain")):
        rows = [(place, row) for place, row in enumerate(outcome.rows) if name in row.figures]
        for number, (place, row) in enumerate(rows):
            value, interval = row.figures[name], row.intervals.get(name)
            low, high = (value, value) if interval is None else (interval.low, interval.high)
            axes.errorbar(
                [value],
                [place + shift],
                xerr=[[max(0.0, value - low)], [max(0.0, high - value)]],
                fmt="o",
                color=theme.colours[colour],
                label=TITLES[name] if number == 0 else None,
            )
    axes.axvline(0.5, color=theme.ink, linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    finish(axes, theme, "", xlabel="share", whole_numbers=False)


def _rewards(outcome: Outcome, axes: Axes, theme: Theme) -> None:
    names = [row.method for row in outcome.rows]
    for name, shift in (("desirable", -0.18), ("undesirable", 0.18)):
        values = [row.figures.get(f"rewards/{name}", 0.0) for row in outcome.rows]
        places = [place + shift for place in range(len(names))]
        axes.barh(places, values, height=0.34, color=theme.colours[name], label=name)
    axes.axvline(0, color=theme.ink, linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    finish(axes, theme, "", xlabel="log-ratio to the start, nats", whole_numbers=False)


_MARKS = ("o", "s", "^", "D", "v")
_COLOURS = ("desirable", "undesirable", "all", "plain")


def _trained(outcome: Outcome) -> Iterator[tuple[Row, str, str]]:
    """Each method with its marker and the role of its colour, the same in every plot."""
    for number, row in enumerate(row for row in outcome.rows if row.cost is not None):
        yield row, _MARKS[number % len(_MARKS)], _COLOURS[number % len(_COLOURS)]


def _while_training(outcome: Outcome, axes: Axes, theme: Theme) -> None:
    for row, mark, colour in _trained(outcome):
        if row.curve:
            steps, margins = zip(*row.curve, strict=True)
            every = max(1, len(steps) // 8)
            axes.plot(steps, margins, marker=mark, markevery=every, color=theme.colours[colour], label=row.method)
    axes.axhline(0, color=theme.ink, linewidth=0.8)
    finish(axes, theme, "good minus bad, nats")


def _lengths(outcome: Outcome, axes: Axes, theme: Theme) -> None:
    for row, mark, colour in _trained(outcome):
        for name, style in (("desirable", "-"), ("undesirable", "--")):
            points = [(band["tokens"], band[name]) for band in row.bands if name in band]
            axes.plot(
                [tokens for tokens, _ in points],
                [ratio for _, ratio in points],
                style,
                marker=mark,
                color=theme.colours[colour],
                label=row.method if style == "-" else None,
            )
    axes.axhline(0, color=theme.ink, linewidth=0.8)
    finish(axes, theme, "log-ratio, nats", xlabel="tokens of the answer", whole_numbers=False)


def _words(answers: Answered, axes: Axes, theme: Theme) -> None:
    """Of new answers, by method: one mark an answer, and their mean."""
    names = list(answers.answers)
    for place, name in enumerate(names):
        words = [len(text.split()) for text in answers.answers[name]]
        axes.plot(words, [place] * len(words), "|", color=theme.colours["plain"], alpha=0.6, markersize=12)
        axes.plot([sum(words) / max(1, len(words))], [place], "o", color=theme.colours["desirable"])
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    finish(axes, theme, "", xlabel="words of a new answer")


_WORDS = (
    "Length of new answers",
    "A stroke an answer, a dot their mean. Methods that win by writing more, or less, are told from others by the win "
    "rate at equal length.",
)
_PLOTS: tuple[tuple[str, str, Draw], ...] = (
    (
        "Good told from bad",
        "Right is better; 0.5 is a coin. AUC asks across prompts and pairs within them: a loss on pairs is never "
        "taught the first. Bars are 95 % intervals over prompts.",
        _told_apart,
    ),
    (
        "What became likelier",
        "Good answers should move right of bad ones. Where both fall, the model has left these answers for others.",
        _rewards,
    ),
    (
        "Rewards while training",
        "Mean log-ratio of a step's good answers minus that of its bad ones; SFT takes no bad ones. A curve that still "
        "climbs at its end has not learned all it could; steps differ by their rows.",
        _while_training,
    ),
    (
        "Rewards by length",
        "Solid: good answers, dashed: bad ones. Lines that fall or rise together say that length is being learned.",
        _lengths,
    ),
)
