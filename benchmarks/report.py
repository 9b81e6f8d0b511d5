"""What is shown: the table of a run, and how it stands against the targets."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.providers import COMPILE, EAGER, MONAI, OURS, SMP
from benchmarks.results import FLOOR, Row

Rows = Mapping[tuple[str, str, str], Row]  # by workload, provider and pass
MAIN_PASS = "both"


@dataclass(frozen=True)
class Target:
    """Of forward+backward. `faster_than`: at least so many times faster; others: at most so many times the time."""

    faster_than: Mapping[str, float]
    times_eager: float | None = None
    times_floor: float | None = None
    bytes_per_pixel: float | None = None  # at the peak, beside the gradient
    share_of_copy: float | None = None  # at least: speed at which the counted bytes are moved, by the copy's


TARGETS = {
    "cross_entropy/voc": Target({EAGER: 7.0, COMPILE: 3.3}, times_floor=2.5, bytes_per_pixel=8),
    "cross_entropy/voc-bfloat16": Target({EAGER: 5.0}, bytes_per_pixel=8),
    "cross_entropy/voc-channels_last": Target({EAGER: 9.0, COMPILE: 4.5}, bytes_per_pixel=8),
    "cross_entropy/ade20k": Target({EAGER: 5.0, COMPILE: 2.5}, bytes_per_pixel=8),
    "cross_entropy/vocabulary": Target({EAGER: 5.0, COMPILE: 2.5}, bytes_per_pixel=8),
    "soft_iou/voc": Target({EAGER: 12.0, COMPILE: 4.0, SMP: 15.0}, times_floor=3.0, bytes_per_pixel=8),
    "soft_iou/binary": Target({EAGER: 5.0, COMPILE: 1.5}),
    "ce+iou/nnunet": Target({EAGER: 14.0, COMPILE: 7.0, MONAI: 12.0}, times_floor=3.0, bytes_per_pixel=8),
    "ce+iou+brier/voc": Target({EAGER: 14.0, COMPILE: 5.0}, times_floor=3.0, bytes_per_pixel=8),
    "mse_loss/50m": Target({EAGER: 4.0, COMPILE: 2.0}),
    "cross_entropy/tiny": Target({}, times_eager=1.3),
    "mse_loss/tiny": Target({}, times_eager=1.3),
}

# On a GPU; at least so much of the copy's speed.
CUDA_TARGETS = {
    "cross_entropy/voc16": Target({EAGER: 3.0, COMPILE: 1.2}, share_of_copy=0.85),
    "cross_entropy/voc16-bfloat16": Target({EAGER: 3.0, COMPILE: 1.2}, share_of_copy=0.85),
    "cross_entropy/vocabulary32k-bfloat16": Target({EAGER: 2.0, COMPILE: 1.2}, share_of_copy=0.85),
    "cross_entropy/vocabulary128k-bfloat16": Target({EAGER: 2.0, COMPILE: 1.2}, share_of_copy=0.85),
    "ce+iou/nnunet": Target({EAGER: 8.0, COMPILE: 2.5}, share_of_copy=0.80, bytes_per_pixel=8),
    "ce+iou/nnunet-bfloat16-autocast": Target({EAGER: 12.0, COMPILE: 2.5}, share_of_copy=0.80),
    "ce+iou/ade20k8-bfloat16": Target({EAGER: 6.0, COMPILE: 2.0}, share_of_copy=0.75),
    "ce+iou+brier/voc16": Target({EAGER: 8.0, COMPILE: 2.5}, share_of_copy=0.80),
    "ce+iou+brier/voc16-bfloat16": Target({EAGER: 8.0, COMPILE: 2.5}, share_of_copy=0.80),
    "mse_loss/100m": Target({EAGER: 1.6, COMPILE: 1.0}, share_of_copy=0.90),
    "cross_entropy/tiny": Target({}, times_eager=1.2),
}


def targets_of(row: Row) -> Target | None:
    return (CUDA_TARGETS if row.device == "cuda" else TARGETS).get(row.workload)


def index(rows: Sequence[Row]) -> Rows:
    return {(row.workload, row.provider, row.pass_name): row for row in rows}


def show(console: Console, rows: Sequence[Row]) -> None:
    """A line per workload and provider. Right of the times, the columns are of one pass: `both`, if it was measured."""
    by_key = index(rows)
    passes = list(dict.fromkeys(row.pass_name for row in rows if row.provider != FLOOR))
    main = MAIN_PASS if MAIN_PASS in passes else passes[-1]

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("workload", "provider"):
        table.add_column(name, no_wrap=True)
    for name in (*passes, "spread", f"x {EAGER}", "/ floor", "GB/s", "peak"):
        table.add_column(name, justify="right", no_wrap=True)
    for workload in dict.fromkeys(row.workload for row in rows):
        label = workload
        for provider in dict.fromkeys(row.provider for row in rows if row.workload == workload):
            if provider == FLOOR:
                cells = floor_cells(by_key, workload, passes, main)
            else:
                cells = provider_cells(by_key, workload, provider, passes, main)
            table.add_row(label, provider, *cells, style="bold" if provider == OURS else "")
            label = ""
        table.add_section()
    console.print(table)
    console.print(
        f"Medians; everything right of them is about '{main}'. spread: half the distance of the quartiles.\n"
        f"x {EAGER}: how many times faster than {EAGER}. GB/s: the bytes that have to be moved, by the time.\n"
        "peak: the most that was allocated above what stood before, gradient included.\n"
        "floor: reads and copies of existing arrays of the input's size, timed in the same rounds.",
        style="dim",
        highlight=False,
    )


def provider_cells(by_key: Rows, workload: str, provider: str, passes: Sequence[str], main: str) -> list[str]:
    rows = {name: by_key[workload, provider, name] for name in passes}
    row = rows[main]
    if not row.right:
        return ["wrong"] * len(passes) + ["-"] * 5
    return [
        *(duration(one.median_us) for one in rows.values()),
        spread(row),
        number(speed_up(by_key, workload, EAGER, provider, main)),
        number(row.times_floor),
        number(row.gb_per_s, 1),
        size(row.peak_allocated_bytes),
    ]


def floor_cells(by_key: Rows, workload: str, passes: Sequence[str], main: str) -> list[str]:
    """The floor's times are those of the passes, composed of its reads and copies; its speed is that of the copy."""
    floors = {key[2]: row.floor_us for key, row in by_key.items() if key[0] == workload and key[1] != FLOOR}
    copy = by_key[workload, FLOOR, "copy"]
    eager = by_key.get((workload, EAGER, main))
    against_eager = eager.times_floor if eager else None
    times = [duration(floors.get(name)) for name in passes]
    return [*times, spread(copy), number(against_eager), "1.00", number(copy.gb_per_s, 1), "-"]


def show_targets(console: Console, rows: Sequence[Row]) -> None:
    """A line per target of the workloads that were measured."""
    by_key = index(rows)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("workload", f"{OURS}, forward+backward"):
        table.add_column(name, no_wrap=True)
    for name in ("measured", "target"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for workload, target in {row.workload: targets_of(row) for row in rows}.items():
        if target is not None:
            for line in judge(by_key, workload, target):
                table.add_row(workload, *line)
    console.print(table)


def judge(by_key: Rows, workload: str, target: Target) -> Iterator[tuple[str, str, str, str]]:
    """What is compared, the figure, the target, and the verdict."""
    row = by_key.get((workload, OURS, MAIN_PASS))
    for other, wanted in target.faster_than.items():
        ratio = speed_up(by_key, workload, other, OURS, MAIN_PASS)
        yield f"times faster than {other}", number(ratio), f">= {wanted:g}", verdict(ratio, at_least=wanted)
    if target.times_eager is not None:
        ratio = speed_up(by_key, workload, OURS, EAGER, MAIN_PASS)
        at_most = target.times_eager
        yield f"time over {EAGER}'s", number(ratio), f"<= {at_most:g}", verdict(ratio, at_most=at_most)
    if target.times_floor is not None:
        ratio, at_most = row.times_floor if row else None, target.times_floor
        yield f"time over the {FLOOR}", number(ratio), f"<= {at_most:g}", verdict(ratio, at_most=at_most)
    if target.share_of_copy is not None:
        copy = by_key.get((workload, FLOOR, "copy"))
        speeds = [one.gb_per_s if one else None for one in (row, copy)]
        ratio = speeds[0] / speeds[1] if speeds[0] and speeds[1] else None
        yield (
            "share of the copy's speed",
            number(ratio),
            f">= {target.share_of_copy:g}",
            verdict(ratio, at_least=target.share_of_copy),
        )
    if target.bytes_per_pixel is not None:
        ratio, at_most = bytes_per_pixel(row) if row else None, target.bytes_per_pixel
        yield "bytes a pixel beside the gradient", number(ratio), f"<= {at_most:g}", verdict(ratio, at_most=at_most)


def verdict(measured: float | None, *, at_least: float = float("-inf"), at_most: float = float("inf")) -> str:
    if measured is None:
        return "[yellow]not measured"
    return "[green]met" if at_least <= measured <= at_most else "[bold red]falls short"


def bytes_per_pixel(row: Row) -> float | None:
    """Peak memory beside the gradient, by the number of pixels of (N, C, *spatial) logits."""
    if row.peak_allocated_bytes is None:
        return None
    shape = [int(size) for size in row.shape.split("x")]
    elements = math.prod(shape)
    dtype: torch.dtype = getattr(torch, row.dtype)
    gradient_bytes = elements * dtype.itemsize
    # Rounded, because the loss and the incoming gradient, a few bytes in all, belong to no pixel.
    return round((row.peak_allocated_bytes - gradient_bytes) / (elements / shape[1]), 1)


def speed_up(by_key: Rows, workload: str, slow: str, fast: str, pass_name: str) -> float | None:
    """How many times `fast` is faster than `slow`."""
    rows = [by_key.get((workload, provider, pass_name)) for provider in (slow, fast)]
    times = [row.median_us for row in rows if row is not None and row.median_us is not None]
    return times[0] / times[1] if len(times) == 2 else None


def spread(row: Row) -> str:
    if row.median_us is None or row.first_quartile_us is None or row.third_quartile_us is None:
        return "-"
    return f"±{50 * (row.third_quartile_us - row.first_quartile_us) / row.median_us:.0f} %"


def duration(us: float | None) -> str:
    if us is None:
        return "-"
    return f"{us:.1f} us" if us < 1000 else f"{us / 1000:.{2 if us < 10_000 else 1}f} ms"


def size(nbytes: int | None) -> str:
    if nbytes is None:
        return "-"
    return f"{nbytes / 2**20:.1f} MiB" if nbytes >= 2**20 else f"{nbytes / 2**10:.1f} KiB"


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
