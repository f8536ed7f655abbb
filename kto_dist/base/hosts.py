"""Which ranks are on which host, and how a message names them.

Ranks of one host are neighbours: its first one has local rank 0. A host is called as the launcher calls it, else as it
calls itself.
"""

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from kto_dist.base import comm
from kto_dist.base.errors import UserError
from kto_dist.base.processes import host, whereabouts


@dataclass(frozen=True, slots=True)
class Host:
    """Of a rank."""

    head: int
    """Its first rank."""
    name: str


def own() -> Host:
    return Host(comm.rank() - comm.local_rank(), host())


def here() -> str:
    """` on node-b` in a job of several hosts, for a message; else nothing. Not collective."""
    local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    return f" on {host()}" if local is not None and int(local) < comm.world_size() else ""


def by_rank() -> list[Host]:
    """Collective."""
    return comm.gather(own())


def named(ranks: Collection[int], hosts: Sequence[Host]) -> str:
    """`node-a (ranks 0 to 7), node-b (rank 9)`; without hosts where there is one alone."""
    by_head: dict[int, list[int]] = {}
    for rank in sorted(ranks):
        by_head.setdefault(hosts[rank].head, []).append(rank)
    several = len({host.head for host in hosts}) > 1
    return ", ".join(
        f"{hosts[head].name if 0 <= head < len(hosts) else hosts[own[0]].name} ({_numbers(own)})"
        if several
        else _numbers(own)
        for head, own in by_head.items()
    )


def _numbers(ranks: list[int]) -> str:
    """`rank 3`, `ranks 0 to 3`, `ranks 0, 2, 3`."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks))}"


def check_layout() -> None:
    """Collective. Raises `UserError` where the ranks of a host are not neighbours: files would be looked for where
    nobody has written them."""
    who = whereabouts()
    own_machine = (who["host"], who["boot"], who["namespace"])
    found = comm.gather((comm.local_rank(), own_machine, host()))
    for rank, (local, machine, name) in enumerate(found):
        neighbours = found[max(0, rank - local) : rank]
        numbers = [number for number, other, _ in neighbours if other == machine]
        if numbers != list(range(local)):
            raise UserError(
                f"rank {rank} on {name} has LOCAL_RANK {local}, but the {local} ranks before it are not those of this "
                "host with LOCAL_RANK from 0 on: number the ranks host by host, as deepspeed and torchrun do"
            )
