"""Ports at which ranks are going to meet, and which nobody else has by the time that they do.

Between the look for a port and rank 0, which listens there, lie the seconds of a start. The system gives a port that is
merely free to whoever asks for any meanwhile, as each connection does.
"""

import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SYSTEMS = Path("/proc/sys/net/ipv4/ip_local_port_range")
_DRAWN = 10_000
"""Ports right below the system's own, among which one is drawn."""
_TRIES = 100


@contextmanager
def held_port() -> Iterator[int]:
    """Inside, it goes to those alone who ask for this very one, as ranks of this host do that are told of it."""
    with socket.socket() as holder:
        # rank 0's store sets it as well: two sockets may then have the port, of which one listens
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("", 0))
        yield int(holder.getsockname()[1])


def free_port() -> int:
    """For ranks that come when this process may have gone: free, and none of those that the system gives away."""
    first = _first_of_system()
    # whoever has seeded `random` alike would draw alike
    for port in random.SystemRandom().sample(range(max(1024, first - _DRAWN), first), _TRIES):
        if (found := _bound(port)) is not None:
            return found
    found = _bound(0)
    assert found is not None
    return found


def _first_of_system() -> int:
    try:
        first = int(_SYSTEMS.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        first = 0
    return first if first >= 1024 + _TRIES else 32768


def _bound(port: int) -> int | None:
    """None where somebody has it. 0: any."""
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return None
        return int(probe.getsockname()[1])
