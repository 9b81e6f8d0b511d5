"""Results that were never measured, and the program called without a process of its own."""

import io
import sys

import torch
from rich.console import Console

from benchmarks import __main__ as program
from benchmarks import results
from benchmarks.results import FLOOR, Row

HEADER = {
    "machine": {"cpu": "one", "architecture": "x86_64", "cores": 2},
    "software": {"torch": "2.13.0"},
    "threads": 2,
    "date": "2026-11-27",
}
NAME = "cross_entropy/voc"
SHAPE = "8x21x512x512"


def row_of(workload, provider, pass_name, median_us, spread, **more):
    """Quartiles `spread` below and above the median, by the median."""
    times = {}
    if median_us is not None:
        times = {
            "median_us": median_us,
            "first_quartile_us": median_us * (1 - spread),
            "third_quartile_us": median_us * (1 + spread),
            "fastest_us": median_us * (1 - spread),
            "rounds": 15,
            "calls_per_sample": 1,
        }
    more = {"shape": SHAPE, "right": True, **more}
    return Row(
        workload=workload,
        dtype="float32",
        memory_format="contiguous_format",
        target_dtype="int64",
        provider=provider,
        pass_name=pass_name,
        **times,
        **more,
    )


def rows_of(median_us, *, floor_us=10_000.0, spread=0.02, floor_spread=0.02, workload=NAME, pass_name="both", **more):
    """fusedloss in one pass, and the floor: a third of it a read, the rest a copy."""
    rows = [row_of(workload, "fusedloss", pass_name, median_us, spread, floor_us=floor_us, **more)]
    if floor_us is not None:
        rows.append(row_of(workload, FLOOR, "read", floor_us / 3, floor_spread))
        rows.append(row_of(workload, FLOOR, "copy", 2 * floor_us / 3, floor_spread))
    return rows


def written(folder, name, rows, header=HEADER):
    path = folder / f"{name}.csv"
    results.write(path, header, rows)
    return path


def call(monkeypatch, *arguments):
    """The program's exit status and what it printed."""
    output = io.StringIO()
    monkeypatch.setattr(program, "Console", lambda **_: Console(file=output, width=160))
    monkeypatch.setattr(sys, "argv", ["benchmarks", *map(str, arguments)])
    return program.main(), " ".join(output.getvalue().split())


# A fast stand-in for the measurement itself, in the places where the program takes it from.
def measured(monkeypatch, median_us):
    calls = []

    def run(workload, providers, passes, rounds, device, advance):
        calls.append((workload.name, list(providers), [one.name for one in passes], rounds))
        return [row for one in passes for row in rows_of(median_us, workload=workload.name, pass_name=one.name)]

    monkeypatch.setattr(program, "run", run)
    monkeypatch.setattr(program.machine, "describe", lambda *_: HEADER)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    return calls
