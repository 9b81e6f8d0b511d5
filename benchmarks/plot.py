"""Pictures of a run: time and memory of a training step's loss as bars, and sweeps as lines."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import torch

matplotlib.use("Agg")  # draws into files; no window system needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import sweeps
from benchmarks.providers import OURS
from benchmarks.results import FLOOR, Row

COLORS = {
    "fusedloss": "#1f5fbf",
    "compile": "#e0a458",
    "eager": "#b8b8b8",
    "smp": "#7a9e7e",
    "monai": "#a05d56",
    "nnunet": "#8c7aa9",
    "kornia": "#5aa9a3",
    "jdt": "#c98bb9",
    "liger": "#6b6b3a",
}
NAMES = {"compile": "torch.compile", "eager": "eager PyTorch", "monai": "MONAI", "nnunet": "nnU-Net", "jdt": "JDT"}
MAIN = ("fusedloss", "compile", "eager")  # in the picture of time and memory
BAR = 0.27
GROUP = 0.82  # height of a workload's bars together, where there are many
FLOOR_COLOR = "black"

Rows = Sequence[Row]


def draw(rows: Rows, header: Mapping[str, Any], path: Path) -> list[Path]:
    """The picture of the workloads; of a run that has none but sweeps, that of the sweep."""
    named, swept = split(rows)
    if named or not swept:
        return [save(time_and_memory(named), header, path)]
    if len(swept) > 1:
        raise ValueError(f"there are two sweeps ({' and '.join(swept)}); name a folder in place of {path.name}")
    ((name, of),) = swept.items()
    return [save(sweep(of, name), header, path)]


def draw_all(rows: Rows, header: Mapping[str, Any], folder: Path) -> list[Path]:
    """Whatever the rows can give, each picture under its own name."""
    named, swept = split(rows)
    figures: dict[str, Callable[[], Figure]] = {}
    if named:
        figures["time_and_memory"] = partial(time_and_memory, named)
        figures["speed_up"] = partial(speed_up, named)
        figures["peak_memory"] = partial(peak_memory, named)
    for name, of in swept.items():
        figures[f"sweep_{name}"] = partial(sweep, of, name)
    drawn, reasons = [], []
    for stem, figure in figures.items():
        try:
            drawn.append(save(figure(), header, folder / f"{stem}.png"))
        except ValueError as error:  # one without the others' rows is no reason to draw nothing
            reasons.append(str(error))
    if not drawn:
        raise ValueError(reasons[0] if reasons else 'there is nothing to draw: no row of the pass "both"')
    return drawn


def split(rows: Rows) -> tuple[list[Row], dict[str, list[Row]]]:
    """The timed rows of the pass "both": those of named workloads, and those of each sweep."""
    named: list[Row] = []
    swept: dict[str, list[Row]] = {}
    for row in rows:
        if row.pass_name == "both" and row.provider != FLOOR and row.median_us:
            point = sweeps.point(row.workload)
            (swept.setdefault(point[1], []) if point else named).append(row)
    return named, swept


def save(figure: Figure, header: Mapping[str, Any], path: Path) -> Path:
    machine, software = header.get("machine", {}), header.get("software", {})
    place = machine["gpu"].get("name", "?") if "gpu" in machine else f"{machine.get('cpu', '?')}, "
    if "gpu" not in machine:
        place += f"{header.get('threads', '?')} threads"
    figure.suptitle(
        f"{place}, torch {software.get('torch', '?')}, "
        f"{str(header.get('date', '?'))[:10]}, commit {header.get('commit', '?')}",
        fontsize=9,
        color="#555555",
    )
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


# -- bars -------------------------------------------------------------------------------------------------------------


def time_and_memory(rows: Rows) -> Figure:
    """Side by side for the three that are always there, without workloads that are too small to have a floor."""
    both = [row for row in rows if row.floor_us]
    workloads = names_of(both)
    if not workloads:
        raise ValueError('there is nothing to draw: no workload with a floor and the pass "both"')

    figure, (time, memory) = plt.subplots(1, 2, figsize=(11, 0.62 * len(workloads) + 1.6), sharey=True)
    for place, provider in enumerate(name for name in MAIN if any(row.provider == name for row in both)):
        measured = {row.workload: row for row in both if row.provider == provider}
        at = [index + (place - 1) * BAR for index, name in enumerate(workloads) if name in measured]
        of = [measured[name] for name in workloads if name in measured]
        bars(time, at, [row.times_floor or 0.0 for row in of], provider, "{:.1f}")
        bars(memory, at, [mib(row) for row in of], provider, "{:.0f}")

    time.axvline(1.0, color=FLOOR_COLOR, linewidth=1)
    time.set_xlabel("time of forward + backward, in times of the floor\n(two reads and one write of the logits)")
    memory.set_xlabel("peak memory beside logits and labels, MiB\n(gradient included)")
    ticks(time, workloads)
    time.legend(loc="lower right", frameon=False)
    for axes in (time, memory):
        trim(axes)
    return figure


def speed_up(rows: Rows) -> Figure:
    """How many times faster than each other provider fusedloss is; left of 1 it is slower."""
    ours = {row.workload: row.median_us for row in rows if row.provider == OURS and row.median_us}
    others = [row for row in rows if row.provider != OURS and row.workload in ours]
    if not others:
        raise ValueError(f"there is nothing to draw: no workload of {OURS} and of another provider")
    # From 1 on, because a logarithmic axis has no 0 to start from.
    figure, axes = group_of_bars(others, lambda row: (row.median_us or 0.0) / (ours[row.workload] or 1.0), start=1.0)
    axes.axvline(1.0, color=FLOOR_COLOR, linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel(f"forward + backward: how many times faster {OURS} is than the others")
    return figure


def peak_memory(rows: Rows) -> Figure:
    """In times of the logits' own bytes, which the gradient takes in any case."""
    measured = [row for row in rows if row.peak_allocated_bytes and row.floor_us]
    if not measured:
        raise ValueError("there is nothing to draw: no peak memory of a workload with a floor")
    figure, axes = group_of_bars(measured, lambda row: (row.peak_allocated_bytes or 0) / bytes_of_input(row))
    axes.axvline(1.0, color=FLOOR_COLOR, linewidth=1)
    axes.set_xlabel(
        "peak memory of forward + backward beside logits and labels,\nin times of the logits' bytes (1: the gradient)"
    )
    return figure


def bytes_of_input(row: Row) -> int:
    dtype: torch.dtype = getattr(torch, row.dtype)
    return math.prod(int(size) for size in row.shape.split("x")) * dtype.itemsize


def group_of_bars(rows: Rows, value: Callable[[Row], float], start: float = 0.0) -> tuple[Figure, Axes]:
    """A group of bars for each workload, one for each provider that was measured in it."""
    workloads = names_of(rows)
    providers = [name for name in COLORS if any(row.provider == name for row in rows)]
    tallest = max(sum(row.workload == name for row in rows) for name in workloads)
    height = GROUP / tallest
    figure, axes = plt.subplots(figsize=(9, (0.2 * tallest + 0.15) * len(workloads) + 1.6))
    order = {name: sorted(providers_of(rows, name), key=providers.index) for name in workloads}
    for provider in providers:
        of = [row for row in rows if row.provider == provider]
        at = [
            workloads.index(row.workload)
            + (order[row.workload].index(provider) - (len(order[row.workload]) - 1) / 2) * height
            for row in of
        ]
        bars(axes, at, [value(row) for row in of], provider, "{:.3g}", height, start)
    ticks(axes, workloads)
    axes.set_ylim(len(workloads) - 0.5, -0.5)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=len(providers), frameon=False, fontsize=8)
    trim(axes)
    return figure, axes


def providers_of(rows: Rows, workload: str) -> list[str]:
    return [row.provider for row in rows if row.workload == workload and row.provider in COLORS]


def names_of(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row.workload for row in rows))


def mib(row: Row) -> float:
    return (row.peak_allocated_bytes or 0) / 2**20


def bars(
    axes: Axes,
    at: Sequence[float],
    values: Sequence[float],
    provider: str,
    text: str,
    height: float = BAR,
    start: float = 0.0,
) -> None:
    widths = [value - start for value in values]
    label = NAMES.get(provider, provider)
    container = axes.barh(at, widths, height, left=start, color=COLORS[provider], label=label)
    axes.bar_label(container, [text.format(value) for value in values], padding=3, fontsize=8)


def ticks(axes: Axes, workloads: Sequence[str]) -> None:
    axes.set_yticks(range(len(workloads)), workloads)
    axes.invert_yaxis()


def trim(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)


# -- lines ------------------------------------------------------------------------------------------------------------


def sweep(rows: Rows, name: str) -> Figure:
    """Time against size on two logarithmic axes, a panel a loss: medians, quartiles as a band, and the floor."""
    by_loss: dict[str, list[tuple[int, Row]]] = {}
    for row in rows:
        point = sweeps.point(row.workload)
        if point and point[1] == name:
            by_loss.setdefault(point[0], []).append((point[2], row))
    if not by_loss:
        raise ValueError(f"there is nothing to draw: no row of the sweep over {name}")

    figure, panels = plt.subplots(1, len(by_loss), figsize=(5.5 * len(by_loss), 4.4), sharey=True, squeeze=False)
    for axes, (loss, points) in zip(panels[0], by_loss.items(), strict=True):
        points.sort(key=lambda point: point[0])
        for provider in (one for one in COLORS if any(row.provider == one for _, row in points)):
            line(axes, [(size, row) for size, row in points if row.provider == provider], provider)
        floors = {size: row.floor_us / 1e3 for size, row in points if row.floor_us}
        if floors:
            label = "floor: two reads and one write"
            axes.plot(*zip(*floors.items(), strict=True), ".--", color=FLOOR_COLOR, linewidth=1, label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(loss, fontsize=10)
        axes.set_xlabel(f"number of {name}")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("forward + backward, ms")
    panels[0][0].legend(frameon=False, fontsize=8)
    return figure


def line(axes: Axes, points: Sequence[tuple[int, Row]], provider: str) -> None:
    sizes = [size for size, _ in points]
    low, middle, high = (
        [value / 1e3 for value in values]
        for values in zip(
            *((row.first_quartile_us or 0.0, row.median_us or 0.0, row.third_quartile_us or 0.0) for _, row in points),
            strict=True,
        )
    )
    axes.plot(sizes, middle, marker="o", markersize=3, color=COLORS[provider], label=NAMES.get(provider, provider))
    axes.fill_between(sizes, low, high, color=COLORS[provider], alpha=0.2, linewidth=0)
