"""What the tests of leases share: a clock to set, and holders that no process stands behind."""

import json

from kto_dist.base.processes import whereabouts
from kto_dist.store.leases import Lease, Patience, is_piece
from kto_dist.store.storage import LocalStorage, Storage


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def leases_in(folder: Storage) -> list[str]:
    return [file.name for file in folder.files() if is_piece(file.name)]


def of_another_machine(folder: Storage, piece: str, **changes: object) -> str:
    """A lease that a process elsewhere has taken, and says nothing of any more."""
    name = f"piece-{piece}.0.json"
    folder.write(name, json.dumps({**whereabouts(), "host": "elsewhere", "seconds": 10.0, **changes}).encode())
    return name


def held(folder: Storage, clock: Clock, seconds: float = 100.0, patience: Patience | None = None) -> Lease:
    """A lease of 100 seconds is renewed by nobody but `keep`, and a shorter one by its thread. While the clock stands
    still, no write takes too long on a busy machine."""
    lease = Lease(folder, "a", 0, seconds, clock, patience)
    assert lease.begin()
    return lease


def taken_over(folder: Storage) -> None:
    LocalStorage.create(folder, "piece-a.1.json", json.dumps({"token": "other", "seconds": 100.0}).encode())
    folder.remove("piece-a.0.json")
