"""Files of a folder that hosts without a shared file system have parts of: brought together on the first, handed out.

Needed where another number of ranks goes on from a checkpoint: its parts are cut anew from all of them at once. Files
travel over the process group in pieces, every rank in step, so that terabytes meet no time-out.
"""

import os
import shutil
from pathlib import Path

import torch

from kto_dist.base import agree, comm
from kto_dist.training import manifest

_PIECE = 64 * 2**20


def bring_together(source: Path, target: Path) -> None:
    """Collective. `target`, on rank 0's host, holds the files of `source` on all hosts; its own are links."""
    own = agree.side_by_side(lambda: _sizes(source))

    def begin() -> None:
        target.mkdir(parents=True, exist_ok=True)
        for name in own[0]:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source / name, target / name)
            except OSError:  # of a file system that has no links, or not between these two
                shutil.copyfile(source / name, target / name)

    agree.on_main(begin)
    for name in sorted(set().union(*own) - set(own[0]) - {manifest.NAME}):
        sender = next(rank for rank, files in enumerate(own) if name in files)
        _send(source / name, own[sender][name], sender, target / name if comm.is_main() else None)


def hand_out(folder: Path) -> None:
    """Collective. Every host gets the folder of rank 0."""
    first = manifest.neighbours(folder.parent)[0] == comm.rank()
    sizes = agree.on_main(lambda: _sizes(folder))
    for name, size in sorted(sizes.items()):
        _send(folder / name, size, 0, folder / name if first and not comm.is_main() else None)


def _sizes(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def _send(source: Path, size: int, sender: int, target: Path | None) -> None:
    """Collective. A file of one rank, written by those that name a target."""

    def begin() -> None:
        if target is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(b"")

    agree.together(begin)
    for start in range(0, size, _PIECE):
        piece = torch.zeros(min(_PIECE, size - start), dtype=torch.uint8)

        def read(start: int = start, piece: torch.Tensor = piece) -> None:
            if comm.rank() == sender:
                with source.open("rb") as file:
                    file.seek(start)
                    piece.copy_(torch.frombuffer(bytearray(file.read(len(piece))), dtype=torch.uint8))

        def write(piece: torch.Tensor = piece) -> None:
            if target is not None:
                with target.open("ab") as file:
                    file.write(piece.numpy().tobytes())

        agree.together(read)
        comm.from_(sender, piece)
        agree.together(write)
