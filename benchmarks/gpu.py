"""The same on a GPU: its own clock in place of the host's, and the figures that its allocator keeps."""

from __future__ import annotations

import time
from functools import cache

import torch
from torch import Tensor

from benchmarks.measure import Meter, Prepare

MILLISECOND = 1e-3
# Several times the last cache of any GPU (50 MB on Hopper): what was there before a call is gone after writing so much.
FLUSHED_BYTES = 256 << 20
# For so long the device does nothing before what is timed begins, about a millisecond: within it the host hands over
# forward and backward. Emptying the cache takes a tenth of that, and a host that comes late would be timed as well.
HEAD_START_CYCLES = 2_000_000


@cache
def flushed() -> Tensor:
    return torch.empty(FLUSHED_BYTES // 4, dtype=torch.int32, device="cuda")


def sample(prepare: Prepare, calls: int) -> float:
    """Seconds per call between two events on the stream, each call with a cold cache and after one that is not timed.

    The host is ahead of the device by HEAD_START_CYCLES, so that what is timed is the device alone.
    """
    prepare(1)()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for start, end in events:
        run = prepare(1)
        flushed().zero_()
        torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return sum(start.elapsed_time(end) for start, end in events) * MILLISECOND / calls


def sample_of_host(prepare: Prepare, calls: int) -> float:
    """Seconds per call that the host is busy; what it has asked for is not waited for."""
    prepare(1)()
    run = prepare(calls)
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return seconds / calls


def peak_allocated_bytes(prepare: Prepare) -> int:
    run = prepare(1)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_resident_bytes(prepare: Prepare) -> None:
    """Not known: what does not come from torch's allocator is not seen."""


EVENTS = Meter(sample, peak_allocated_bytes, peak_resident_bytes)
HOST = Meter(sample_of_host, peak_allocated_bytes, peak_resident_bytes)
