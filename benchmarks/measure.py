"""How long, and how much memory: passes, rounds, and the peak of the allocator.

torch.utils.benchmark.Timer is not used: it warms up twice before every sample, which would triple the run, and it
measures one statement to the end before the next, while here every round visits all of them. What it takes care of
(threads, garbage collection, statistics) is done below.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.providers import LossOfInput

# A sample shorter than this is repeated inside: clock and cache noise then stay below a percent.
SHORTEST_SAMPLE_S = 0.01
MOST_CALLS = 10_000
# Untimed calls before a sample.
SETTLED_S = 0.25

Run = Callable[[], object]
Prepare = Callable[[int], Run]  # of a number of calls: prepares what is not timed, returns what is
Key = tuple[str, str]  # provider and pass


# -- passes -----------------------------------------------------------------------------------------------------------
# Each takes the loss, the input and a number of calls, prepares what is not timed, and returns what is timed.
# What a call makes is freed within the timed part, gradient included: a training step frees it too, and giving pages
# back to the system takes time.


def forward(loss: LossOfInput, input: Tensor, calls: int) -> Run:
    def run() -> None:
        for _ in range(calls):
            loss(input)

    return run


def backward(loss: LossOfInput, input: Tensor, calls: int) -> Run:
    results = [loss(input) for _ in range(calls)]

    def run() -> None:
        for result in results:
            result.backward()
            input.grad = None

    return run


def both(loss: LossOfInput, input: Tensor, calls: int) -> Run:
    def run() -> None:
        for _ in range(calls):
            loss(input).backward()
            input.grad = None

    return run


def scaled(loss: LossOfInput, input: Tensor, calls: int) -> Run:
    incoming = torch.full_like(loss(input), 0.5)

    def run() -> None:
        for _ in range(calls):
            loss(input).backward(incoming)
            input.grad = None

    return run


def no_grad(loss: LossOfInput, input: Tensor, calls: int) -> Run:
    def run() -> None:
        with torch.no_grad():
            for _ in range(calls):
                loss(input)

    return run


@dataclass(frozen=True)
class Pass:
    name: str
    about: str
    prepare: Callable[[LossOfInput, Tensor, int], Run]
    has_forward: bool
    has_backward: bool
    default: bool = True


PASSES = {
    one.name: one
    for one in (
        Pass("forward", "the value, with the graph for a backward", forward, True, False),
        Pass("backward", "the gradient alone, a fresh tensor as in a training step", backward, False, True),
        Pass("both", "forward and backward, as a training step does them", both, True, True),
        Pass("scaled", "both, with an incoming gradient of 0.5 (loss scaling)", scaled, True, True, default=False),
        Pass("no_grad", "the value under torch.no_grad()", no_grad, True, False, default=False),
    )
}


# -- time -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Meter:
    """How a device is measured."""

    sample: Callable[[Prepare, int], float]  # seconds per call
    peak_allocated_bytes: Callable[[Prepare], int]
    peak_resident_bytes: Callable[[Prepare], int | None]


@dataclass(frozen=True)
class Subject:
    """Something to time: `prepare(calls)` returns the part that is timed."""

    prepare: Prepare
    calls: int


@dataclass(frozen=True)
class Times:
    """Seconds of one call over all rounds."""

    median_s: float
    first_quartile_s: float
    third_quartile_s: float
    fastest_s: float
    rounds: int
    calls: int

    @classmethod
    def of(cls, samples: list[float], calls: int) -> Times:
        quartiles = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
        low, middle, high = quartiles
        return cls(middle, low, high, min(samples), len(samples), calls)


def sample(prepare: Prepare, calls: int) -> float:
    """Seconds per call, after calls that are not timed: one, or as many as fit into SETTLED_S.

    They make the sample one of a row, as steps of a training are: what they free is what the timed part takes.
    Otherwise a round of many seconds lies in between, long enough for the host of a virtual machine to take free
    memory away (free page reporting): the first write to 2 MiB that it has to give back was seen to take 4.5 ms in
    place of 0.2. A single call is not always enough, because what it frees need not be what is handed out next.
    """
    settled = time.perf_counter() + SETTLED_S
    prepare(1)()
    while time.perf_counter() < settled:
        prepare(1)()
    run = prepare(calls)
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) / calls


def warm_up(prepare: Prepare, meter: Meter) -> Subject:
    """Call a few times (the first call may compile), and find how many calls make a sample long enough."""
    calls = 1
    while calls < MOST_CALLS and calls * meter.sample(prepare, calls) < SHORTEST_SAMPLE_S:
        calls *= 2
    return Subject(prepare, calls)


def repeated(function: Run, calls: int) -> Run:
    def run() -> None:
        for _ in range(calls):
            function()

    return run


def time_in_turn(subjects: Mapping[Key, Subject], rounds: int, after_round: Run, meter: Meter) -> dict[Key, Times]:
    """Every round takes one sample of every subject, in a new order: drift of the machine hits all alike, and nobody
    always runs after the same neighbor."""
    order = list(subjects)
    shuffle = random.Random(0).shuffle
    samples: dict[Key, list[float]] = {key: [] for key in order}
    with no_garbage_collection():
        for _ in range(rounds):
            shuffle(order)
            for key in order:
                samples[key].append(meter.sample(subjects[key].prepare, subjects[key].calls))
            after_round()
    return {key: Times.of(samples[key], subject.calls) for key, subject in subjects.items()}


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# -- memory -----------------------------------------------------------------------------------------------------------


@contextmanager
def memory_from_torch() -> Iterator[None]:
    """While bytes are counted: what fusedloss keeps of an earlier gradient, and lends again, nobody would see."""
    try:
        import fusedloss
    except ImportError:
        yield
        return
    before = fusedloss.set_memory_reuse(False)
    try:
        yield
    finally:
        fusedloss.set_memory_reuse(before)


def peak_allocated_bytes(prepare: Prepare) -> int:
    """The most that torch's allocator has handed out during one call, above what it had handed out before.

    The gradient counts. The profiler reports every allocation and every release with its size; they are added up in
    the order of time. Exact, and the same on every run.
    """
    run = prepare(1)
    with (
        quiet_stderr(),  # the profiler announces itself there
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event["name"] == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return peak


def peak_resident_bytes(prepare: Prepare) -> int | None:
    """The same seen by the system: growth of the resident memory's high-water mark during one call.

    It also sees what does not come from torch's allocator, so nobody can hide a buffer from the figure above. It counts
    whole pages and needs Linux with glibc; elsewhere None.
    """
    run = prepare(1)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory that glibc keeps from earlier calls would hide what this one needs
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to the present
    except (AttributeError, OSError):
        return None
    before = status_bytes("VmRSS")
    run()
    return max(0, status_bytes("VmHWM") - before)


def status_bytes(name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if match is None:
        raise RuntimeError(f"/proc/self/status has no {name}")
    return int(match[1]) * 1024


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Silence of C++ as well as Python, so at the level of the file descriptor."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


CPU = Meter(sample, peak_allocated_bytes, peak_resident_bytes)
