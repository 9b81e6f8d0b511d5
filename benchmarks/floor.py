"""How fast it could be: reading and copying arrays of the input's size, and nothing else.

No implementation that keeps no second array of that size can do with less than
    forward   one read of each operand of the input's size,
    backward  the same reads, and one write of the gradient.
For cross-entropy that is 2 reads + 1 write of the logits, timed as a read and a copy; for mse_loss 4 reads + 1 write,
timed as three reads and a copy. Labels are left out: they would only raise the floor.

Both arrays exist and have been written before. A real gradient is a fresh array, whose pages the system has to zero
first, so no provider can quite reach the floor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.measure import Pass
from benchmarks.workloads import Case

# Below it the time of a read is the time of waking threads, and says nothing about memory.
SMALLEST_BYTES = 1 << 20


class Floor:
    """The two arrays, and the two functions to time.

    Of the readers tried (sum, amax, dot and norm of float32; sum of int64; NumPy's sum and max in threads) the good
    ones stand within a few percent of each other. The sum of int64 takes the bytes of any dtype, and no value makes it
    slower. Arrays on huge pages are copied at most 5 % faster than these.
    """

    def __init__(self, nbytes: int, device: str) -> None:
        # ones, not zeros or empty: pages that were never written are all the same page, and read at cache speed.
        self.source = torch.ones(nbytes // 8, dtype=torch.int64, device=device)
        self.destination = torch.ones_like(self.source)

    def functions(self) -> dict[str, Callable[[], object]]:
        return {"read": self.source.sum, "copy": lambda: self.destination.copy_(self.source)}

    def bytes_moved(self, name: str) -> int:
        return self.source.nbytes * {"read": 1, "copy": 2}[name]


def least_passes(case: Case, one: Pass) -> dict[str, int]:
    """How many reads and copies of the input's size the pass cannot do without."""
    reads = case.wide_operands * one.has_forward + (case.wide_operands - 1) * one.has_backward
    return {"read": reads, "copy": int(one.has_backward)}


def counted_bytes(case: Case, one: Pass) -> int:
    """What the pass cannot do without, labels included."""
    operands = case.input.nbytes + case.target.nbytes
    return operands * (one.has_forward + one.has_backward) + case.input.nbytes * one.has_backward
