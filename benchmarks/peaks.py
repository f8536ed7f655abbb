"""How much memory training takes: of the allocator on a GPU, of tensors on a CPU.

A CPU has no allocator that counts. There a peak is what the tensors that live between two steps have in memory, and
what the steps from there on allocate and free, as torch's profiler has seen it. What else lies in a process is in
neither: libraries, compiled matmuls, free blocks that the C library keeps for the next tensor.

    meter = Meter(); meter.begin(); ...; meter.bytes()
"""

import ctypes
import gc
from collections.abc import Iterable
from typing import Any

import machine

_PAGE, _DONT_NEED = 4096, 4
"""Bytes; MADV_DONTNEED."""


class Meter:
    """Of one process. Steps take longer while it looks, on a CPU."""

    def __init__(self, untouched: Iterable[int] = ()):
        """`untouched`: bytes of buffers that are allocated and written to in part or never: on a CPU the rest of them
        takes no memory. What they hold between two steps nobody reads."""
        self._untouched = frozenset(untouched)
        self._libc = ctypes.CDLL(None)
        self._profiler: Any = None
        self._buffers: list[tuple[int, int]] = []
        self.held = 0

    def begin(self) -> None:
        """Between two steps: what was before does not count."""
        import torch

        gc.collect()
        if machine.has_gpu():
            machine.reset_peak()
            return
        # pages that something else has left where a buffer lies are none of its own
        self._buffers = [block for block in _blocks() if block[1] in self._untouched]
        for block in self._buffers:
            self._let_go(*block)
        self.held = sum(self._in_memory(*block) for block in _blocks() if block[1] not in self._untouched)
        activities = [torch.profiler.ProfilerActivity.CPU]
        self._profiler = torch.profiler.profile(activities=activities, profile_memory=True)
        self._profiler.start()

    def bytes(self) -> int:
        """Ends it."""
        if machine.has_gpu():
            return machine.peak()
        self._profiler.stop()
        events = self._profiler.profiler.kineto_results.events()
        changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
        taken = most = 0
        for _, change in sorted(changes, key=lambda found: found[0]):
            if abs(change) not in self._untouched:
                taken += change
                most = max(most, taken)
        return self.held + most + sum(self._in_memory(*block) for block in self._buffers)

    def _let_go(self, start: int, size: int) -> None:
        first, end = -(-start // _PAGE) * _PAGE, (start + size) // _PAGE * _PAGE
        if hasattr(self._libc, "madvise") and end > first:
            self._libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _DONT_NEED)

    def _in_memory(self, start: int, size: int) -> int:
        """Of a block, those pages that something was written to."""
        if not hasattr(self._libc, "mincore"):
            return size
        first = start // _PAGE * _PAGE
        pages = -(-(start + size - first) // _PAGE)
        there = (ctypes.c_ubyte * pages)()
        if self._libc.mincore(ctypes.c_void_p(first), ctypes.c_size_t(pages * _PAGE), there):
            return size
        return min(size, _PAGE * sum(byte & 1 for byte in bytes(there)))


def _blocks() -> set[tuple[int, int]]:
    """(address, bytes) of the memory of all tensors of this process, each once."""
    import torch

    found: dict[int, int] = {}
    for thing in gc.get_objects():
        # not isinstance: some objects do work when they are asked for their class
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is None or tensor.layout is not torch.strided:
                    continue
                storage = tensor.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return {(start, size) for start, size in found.items() if start and size}
