"""Which hosts take part, and how many ranks each has: the file that `deepspeed --hostfile` reads as well.

# a comment
node-0 slots=8
node-1 slots=8
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from kto_dist.base.errors import UserError

_LINE = re.compile(r"(?P<name>[\w.@:-]+)\s+slots\s*=\s*(?P<slots>\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One host."""

    name: str
    """As ssh and the other hosts call it; `user@` belongs to ssh alone."""
    slots: int
    """Its ranks."""

    @property
    def address(self) -> str:
        """Where other hosts find it."""
        return self.name.rpartition("@")[2]

    @property
    def is_loopback(self) -> bool:
        """Whether it means, on every host, that host itself."""
        return self.address in ("localhost", "::1") or self.address.startswith("127.")


def read(path: Path) -> list[Node]:
    """Raises `UserError`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the hostfile {path} cannot be read: {error}") from None
    nodes = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.partition("#")[0].strip()
        match = _LINE.fullmatch(line)
        if line and (match is None or int(match["slots"]) < 1):
            raise UserError(
                f"{path}, line {number} ({line}): must read `node-0 slots=8`, the host's name and its number of ranks"
            )
        if match is not None:
            nodes.append(Node(name=match["name"], slots=int(match["slots"])))
    if not nodes:
        raise UserError(f"the hostfile {path} names no host: a line each, such as `node-0 slots=8`")
    if twice := [name for name, count in Counter(node.name for node in nodes).items() if count > 1]:
        raise UserError(f"the hostfile {path} names {', '.join(twice)} twice: one line a host")
    return nodes
