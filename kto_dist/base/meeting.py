"""Ranks meet: all of them are there and say the same number, or it is said who has not come, and from where.

In:  the launcher's environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT). Out: the store that a process group is
made with. `torch.distributed` itself says how many are missing.
"""

import json
import os
import time
from datetime import timedelta

from torch.distributed import (  # type: ignore[attr-defined]  # torch does not re-export them
    PrefixStore,
    Store,
    TCPStore,
)

from kto_dist.base.errors import UserError
from kto_dist.base.processes import START, host

_SECONDS_TO_READ = 3.0
"""That rank 0 stays, with the store, after something was found wrong."""


def meet(rank: int, size: int, wait: timedelta) -> Store:
    """Returns when all are there. Raises `UserError` where that cannot be."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # torchrun's agent serves the store itself
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        server = TCPStore(address, port, is_master=serves, wait_for_workers=False, timeout=wait)
    except RuntimeError as error:
        if serves and "address already in use" in str(error).lower():
            raise UserError(
                f"MASTER_PORT {port} is taken on {host()}, where rank 0 is, as by another job: name another port, by "
                "--master-port of kto-dist launch, --master_port of deepspeed, or MASTER_PORT under a scheduler"
            ) from error
        raise UserError(
            f"rank {rank} on {host()} does not reach rank 0 at MASTER_ADDR {address}, MASTER_PORT {port} "
            f"({_first_line(error)}): check that its host runs the job, that the name leads there from here and not to "
            "a loopback address, and that no firewall is between"
        ) from error
    # one that starts again by torchrun meets at the same store once more
    number, start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), os.environ.get(START, "")
    store = PrefixStore(f"meeting-{number}-{start}", server)
    _gather(store, rank, size, wait.total_seconds())
    return store


def _gather(store: Store, rank: int, size: int, seconds: float) -> None:
    store.set(f"here {rank}", json.dumps({"host": host(), "size": size}))
    store.add("come", 1)
    deadline, pause, compared = time.monotonic() + seconds, 0.01, rank == 0
    while store.add("come", 0) < size:
        if not compared and store.check(["here 0"]):
            compared = True
            _compare(store, rank, size)
        if store.check(["wrong"]):
            _refuse(store, rank)
        if time.monotonic() > deadline:
            there = [other for other in range(size) if store.check([f"here {other}"])]
            missing = [other for other in range(size) if other not in there]
            names = sorted({json.loads(store.get(f"here {other}"))["host"] for other in there})
            store.set(
                "wrong",
                f"{len(missing)} of {size} ranks have not come within {seconds:.0f} s: "
                f"{', '.join(map(str, missing[:20]))}{', ...' if len(missing) > 20 else ''}. There are those of "
                f"{', '.join(names)}: check that the job was started on every host, with the same number of ranks",
            )
            _refuse(store, rank)
        time.sleep(pause)
        pause = min(0.5, 1.5 * pause)
    _compare(store, rank, size)


def _compare(store: Store, rank: int, size: int) -> None:
    first = json.loads(store.get("here 0"))
    if first["size"] != size:
        store.set(
            "wrong",
            f"the job has {first['size']} ranks by rank 0 on {first['host']}, and {size} by rank {rank} on {host()} "
            "(WORLD_SIZE): start every host with the same number",
        )
        _refuse(store, rank)


def _refuse(store: Store, rank: int) -> None:
    text = store.get("wrong").decode()
    if rank == 0:
        time.sleep(_SECONDS_TO_READ)
    raise UserError(text)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
