"""`kto-dist chat RUN`: the trained model and its reference answer what is typed, side by side."""

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click
import rich.console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from kto_dist.evaluation.chat import Chat, Said


@click.command(short_help="Ask the trained model and its reference, side by side.")
@click.argument("run", metavar="RUN_OR_MODEL")
@click.option("--reference", metavar="MODEL", help="What to compare with; default: the run's own reference.")
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="Asked in place of what is typed; repeatable.")
@click.option("--system", metavar="TEXT", help="A system message before the conversation.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Of an answer.")
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0: the likeliest token."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of what is drawn.")
def chat(run: str, reference: str | None, prompts: Sequence[str], **settings: Any) -> None:
    """Ask the trained model of a run and its reference the same thing; both answers come side by side, with log-ratios.

    RUN_OR_MODEL is a run's folder (train.output), or a Hugging Face folder or hub name, which needs --reference. The
    log-ratio says how much likelier the trained model makes an answer than the reference does, in nats: what training
    has taught stands high in the answers of the trained model, and low in those of the reference. Each side goes on
    from its own answers. /new starts over; /quit, or an empty line, ends. What is piped in is asked line by line.
    """
    from kto_dist.commands.entry import quiet
    from kto_dist.training.chatting import chat_with

    quiet()
    out = rich.console.Console(highlight=False)
    opened = chat_with(run, reference, **settings)
    for text in prompts or _typed(out):
        if text == "/new":
            opened.begin()
        else:
            _answer(opened, text, out)


def _typed(out: rich.console.Console) -> Iterator[str]:
    """Until nothing more comes."""
    asks = sys.stdin.isatty()
    while True:
        try:
            text = out.input("[bold]> [/bold]") if asks else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            return
        if not text.strip() or text.strip() == "/quit":
            return
        yield text.strip()


def _answer(opened: "Chat", text: str, out: rich.console.Console) -> None:
    if not out.is_terminal:
        out.print(f"> {text}", markup=False, soft_wrap=True)
        for side, said in opened.ask(text).items():
            out.print(f"{side} ({_note(said)}): {said.text}", markup=False, soft_wrap=True)
        return
    so_far: dict[str, str] = {}
    notes: dict[str, str] = {}
    with Live(console=out, get_renderable=lambda: _beside(so_far, notes), refresh_per_second=8) as live:
        found = opened.ask(text, so_far.__setitem__)
        so_far.update({side: said.text for side, said in found.items()})
        notes.update({side: _note(said) for side, said in found.items()})
        live.refresh()


def _beside(so_far: dict[str, str], notes: dict[str, str]) -> Table:
    table = Table.grid(expand=True, padding=(0, 1))
    for _ in ("trained", "reference"):
        table.add_column(ratio=1)
    table.add_row(
        *(
            Panel(Text(so_far.get(side, "")), title=side, subtitle=notes.get(side, "…"))
            for side in ("trained", "reference")
        )
    )
    return table


def _note(said: "Said") -> str:
    each = f", {said.log_ratio / said.tokens:+.2f} a token" if said.tokens else ""
    cut = "" if said.finished else ", cut"
    return f"log-ratio {said.log_ratio:+.1f}{each}; {said.tokens} tokens{cut}"
