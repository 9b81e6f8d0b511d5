"""A picture of a run: how long a training step's loss takes, and how much memory, side by side for all providers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws into files; no window system needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.results import FLOOR, Row

COLORS = {"fusedloss": "#1f5fbf", "compile": "#e0a458", "eager": "#b8b8b8"}
LABELS = {"fusedloss": "fusedloss", "compile": "torch.compile", "eager": "eager PyTorch"}
BAR = 0.27


def draw(rows: Sequence[Row], header: dict[str, Any], path: Path) -> None:
    """Bars of time and of peak memory for the pass "both", without the workloads that are too small to have a floor."""
    both = [row for row in rows if row.pass_name == "both" and row.provider != FLOOR and row.median_us and row.floor_us]
    workloads = list(dict.fromkeys(row.workload for row in both))
    if not workloads:
        raise ValueError('there is nothing to draw: no workload with a floor and the pass "both"')

    figure, (time, memory) = plt.subplots(1, 2, figsize=(11, 0.62 * len(workloads) + 1.6), sharey=True)
    for place, provider in enumerate(name for name in COLORS if any(row.provider == name for row in both)):
        measured = {row.workload: row for row in both if row.provider == provider}
        at = [index + (place - 1) * BAR for index, name in enumerate(workloads) if name in measured]
        of = [measured[name] for name in workloads if name in measured]
        bars(time, at, [row.times_floor or 0.0 for row in of], provider, "{:.1f}")
        bars(memory, at, [(row.peak_allocated_bytes or 0) / 2**20 for row in of], provider, "{:.0f}")

    time.axvline(1.0, color="black", linewidth=1)
    time.set_yticks(range(len(workloads)), workloads)
    time.invert_yaxis()
    time.set_xlabel("time of forward + backward, in times of the floor\n(two reads and one write of the logits)")
    memory.set_xlabel("peak memory beside logits and labels, MiB\n(gradient included)")
    time.legend(loc="lower right", frameon=False)
    for axes in (time, memory):
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.12)
    machine, software = header.get("machine", {}), header.get("software", {})
    figure.suptitle(
        f"{machine.get('cpu', '?')}, {header.get('threads', '?')} threads, torch {software.get('torch', '?')}, "
        f"{str(header.get('date', '?'))[:10]}, commit {header.get('commit', '?')}",
        fontsize=9,
        color="#555555",
    )
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def bars(axes: Axes, at: Sequence[float], values: Sequence[float], provider: str, text: str) -> None:
    container = axes.barh(at, values, BAR, color=COLORS[provider], label=LABELS[provider])
    axes.bar_label(container, [text.format(value) for value in values], padding=3, fontsize=8)
