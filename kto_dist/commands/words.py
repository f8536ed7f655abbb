"""The words of `kto-dist evaluate`: read once here, and once more by every rank, from the same line."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from kto_dist.training.judged import Request

_OPTIONS: tuple[Callable[[Callable[..., Any]], Callable[..., Any]], ...] = (
    click.argument("target", metavar="RUN_OR_MODEL"),
    click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]..."),
    click.option("--data", multiple=True, metavar="[NAME=]FILE", help="Rows; several are sets with figures each."),
    click.option("--reference", metavar="MODEL", help="What to compare with; default: the run's own reference."),
    click.option("--against", metavar="RUN_OR_MODEL", help="Another model on the same rows, with paired intervals."),
    click.option(
        "--output", metavar="FILE", help="The JSON file; default: evaluation.json in the run's folder, or here."
    ),
)


def options(job: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_OPTIONS):
        job = option(job)
    return job


def request(words: list[str]) -> "Request":
    """Raises `UserError`."""
    from kto_dist.base.errors import UserError
    from kto_dist.training.judged import Request

    @click.command("evaluate")
    @options
    def parsed(**values: Any) -> dict[str, Any]:
        return values

    try:
        values = parsed.main(words, standalone_mode=False)
    except click.ClickException as mistake:
        raise UserError(mistake.format_message()) from None
    return Request(**values)


def words_of(request: "Request") -> list[str]:
    """The command line that `request` came from."""
    words = [request.target]
    for file in request.data:
        words += ["--data", file]
    for name in ("reference", "against", "output"):
        value = getattr(request, name)
        words += [f"--{name}", value] if value is not None else []
    return [*words, *request.overrides]
