"""What all tables of figures are made of."""

from typing import Any

Content = dict[str, Any]
"""A file of results."""
PACKAGES = {"torch": "torch", "transformers": "transformers", "trl": "TRL", "liger-kernel": "Liger", "duckdb": "DuckDB"}


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(line) + " |" for line in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def about(content: Content, *more: str) -> str:
    """Where, when and with what."""
    found = content["versions"]
    versions = [f"{title} {found[name].partition('+')[0]}" for name, title in PACKAGES.items() if name in found]
    parts = [content["device"], *more, *versions, content["date"]]
    return "*" + "; ".join(part for part in parts if part) + ".*"


def counted(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
