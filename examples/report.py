"""What a training run leaves behind: tables on the screen, metrics as JSON and CSV, two PNGs."""

from __future__ import annotations

import colorsys
import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.patches import Patch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")  # draws into files, so no screen is needed
from matplotlib import pyplot as plt

Color = tuple[float, float, float]
# Far apart for the eye; the first ones also fit what usually comes first in street scenes.
PALETTE = [
    "#7db3e8",
    "#a9c46c",
    "#6e6e76",
    "#c98150",
    "#2f7d3b",
    "#2f4fc4",
    "#e0334f",
    "#f2cd3c",
    "#9b59b6",
    "#41c7b9",
    "#e88fc0",
]
VOID_COLOR: Color = (0.0, 0.0, 0.0)
LOSS_STYLE = {"torch": {"linewidth": 4.0, "alpha": 0.55}, "fused": {"linewidth": 1.6}}
# As many as there are combinations of terms to compare.
LOSS_COLORS = {
    "torch": ["#e08a2e", "#8fc46c", "#e88fc0", "#b5b5bd", "#c9b23c", "#7db3e8", "#b48ad0"],
    "fused": ["#2f4fc4", "#2f7d3b", "#c42f6b", "#3c3c42", "#8a6d10", "#1b7fa8", "#6b2fa0"],
}


@dataclass
class Epoch:
    epoch: int
    train_loss: float
    loss: float
    pixel_accuracy: float
    mean_iou: float
    seconds: float
    # Where the loss has several terms, each of them; like the losses, means over the batches.
    train_terms: dict[str, float] = field(default_factory=dict)
    terms: dict[str, float] = field(default_factory=dict)

    def row(self) -> dict[str, float]:
        """Flat, the terms as train_ce, ce, ... behind everything else."""
        values = asdict(self)
        train_terms, terms = values.pop("train_terms"), values.pop("terms")
        return values | {f"train_{term}": value for term, value in train_terms.items()} | terms


@dataclass
class Run:
    """One network trained with one loss. Everything but what is named `train_` and the times is on the held-out images.

    The held-out loss is the mean over the batches, each counted by its images. For the soft IoU loss, which is no sum
    over pixels, this is not the loss of all images at once.
    """

    name: str  # what tables and pictures call it
    loss: str  # fused or torch
    terms: tuple[str, ...]
    epochs: list[Epoch] = field(default_factory=list)
    class_iou: list[float | None] = field(default_factory=list)  # None: no held-out pixel has this class
    loss_ms: float = float("nan")  # median over the steps, forward and backward
    step_ms: float = float("nan")
    loss_share: float = float("nan")  # of the time of all steps
    loss_peak_bytes: int = 0  # most that was allocated at once on top of logits and labels
    logits_bytes: int = 0


# ---- scores ----------------------------------------------------------------------------------------------------------


def scores(confusion: NDArray[np.int64]) -> tuple[float, float, list[float | None]]:
    """(pixel accuracy, mean IoU, IoU per class) from counts [label, prediction] of the pixels that are not ignored.

    The mean is over the classes that appear in the labels, so that it is over the same classes in every run.
    """
    hits, labelled, predicted = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    union = labelled + predicted - hits
    class_iou = [float(h / u) if n else None for h, u, n in zip(hits, union, labelled, strict=True)]
    present = [iou for iou in class_iou if iou is not None]
    total = int(confusion.sum())
    nan = float("nan")
    return float(hits.sum() / total) if total else nan, sum(present) / len(present) if present else nan, class_iou


# ---- screen ----------------------------------------------------------------------------------------------------------


def bytes_text(count: int) -> str:
    return f"{count / 2**20:.2f} MiB" if count >= 2**18 else f"{count / 2**10:.1f} KiB"


def print_summary(
    console: Console, runs: Sequence[Run], class_names: Sequence[str], pixel_share: Sequence[float]
) -> None:
    table = Table(title="Held-out IoU after the last epoch", title_justify="left")
    table.add_column("class")
    table.add_column("share of pixels", justify="right")
    for run in runs:
        table.add_column(run.name, justify="right", overflow="fold")
    for number, name in enumerate(class_names):
        ious = [run.class_iou[number] for run in runs]
        table.add_row(name, f"{pixel_share[number]:.1%}", *("-" if iou is None else f"{iou:.3f}" for iou in ious))
    table.add_section()
    table.add_row("mean IoU", "", *(f"{run.epochs[-1].mean_iou:.3f}" for run in runs), style="bold")
    table.add_row("pixel accuracy", "", *(f"{run.epochs[-1].pixel_accuracy:.3f}" for run in runs))
    console.print(table)

    table = Table(title="What the loss costs", title_justify="left")
    table.add_column("loss", no_wrap=True)
    for column in ("loss per step", "share of step", "step", "peak memory", "of the logits"):
        table.add_column(column, justify="right")
    for run in runs:
        table.add_row(
            run.name,
            f"{run.loss_ms:.2f} ms",
            f"{run.loss_share:.1%}",
            f"{run.step_ms:.1f} ms",
            bytes_text(run.loss_peak_bytes),
            f"{run.loss_peak_bytes / run.logits_bytes:.2f} x" if run.logits_bytes else "-",
        )
    console.print(table)
    console.print(
        "Times are medians over the training steps: forward and backward of the loss alone; a step is the network, the "
        "loss and the optimizer, without reading images. torch takes only int64 labels, so turning the uint8 maps into "
        "int64 counts as part of its loss, in time and memory. Peak memory is what PyTorch's allocator handed out on "
        "top of logits and labels (torch.profiler), the gradient of the logits included.",
        style="dim",
    )


# ---- files -----------------------------------------------------------------------------------------------------------


def save_metrics(folder: Path, setup: dict[str, Any], class_names: Sequence[str], runs: Sequence[Run]) -> None:
    """metrics.json holds everything; metrics.csv has a line per run and epoch, empty where a run lacks a term."""
    runs_content = [asdict(run) | {"epochs": [epoch.row() for epoch in run.epochs]} for run in runs]
    content = {"setup": setup, "class_names": list(class_names), "runs": runs_content}
    (folder / "metrics.json").write_text(json.dumps(content, indent=2) + "\n")
    with (folder / "metrics.csv").open("w", newline="") as file:
        rows = [{"run": run.name, **epoch.row()} for run in runs for epoch in run.epochs]
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def class_color(number: int) -> Color:
    if number < len(PALETTE):
        red, green, blue = matplotlib.colors.to_rgb(PALETTE[number])
        return red, green, blue
    # Steps of the golden ratio never come close to a hue that was there before.
    return colorsys.hsv_to_rgb(0.05 + number * 0.618 % 1.0, 0.45 + 0.5 * (number % 2), 0.95 - 0.3 * (number % 3 == 0))


def paint(labels: NDArray[np.uint8], classes: int, ignore_index: int) -> NDArray[np.float64]:
    colors = np.array([class_color(n) if n < classes else VOID_COLOR for n in range(256)])
    if 0 <= ignore_index < 256:
        colors[ignore_index] = VOID_COLOR
    return colors[labels]


def draw_predictions(
    path: Path,
    images: NDArray[np.uint8],
    labels: NDArray[np.uint8],
    predictions: dict[str, NDArray[np.uint8]],
    class_names: Sequence[str],
    ignore_index: int,
) -> None:
    """A row per image: image | label | prediction (one per run). Void is black."""
    titles = ["image", "label", *(f"prediction ({name})" for name in predictions)]
    height, width = labels.shape[1:]
    panel_width = 2.6
    legend_height = 0.3 * (1 + len(class_names) // 9)
    size = (panel_width * len(titles), panel_width * height / width * len(images) + legend_height + 0.3)
    figure, axes = plt.subplots(len(images), len(titles), figsize=size, squeeze=False, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    for row, (image, label) in enumerate(zip(images, labels, strict=True)):
        classes = len(class_names)
        painted = [paint(maps[row], classes, -1) for maps in predictions.values()]
        panels = [image, paint(label, classes, ignore_index), *painted]
        for axis, panel, title in zip(axes[row], panels, titles, strict=True):
            axis.imshow(panel, interpolation="nearest")
            axis.set_axis_off()
            if row == 0:
                axis.set_title(title, fontsize=9)
    patches = [Patch(color=class_color(number), label=name) for number, name in enumerate(class_names)]
    patches.append(Patch(color=VOID_COLOR, label="void"))
    figure.legend(handles=patches, loc="outside lower center", ncols=min(9, len(patches)), fontsize=8, frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_curves(path: Path, runs: Sequence[Run]) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    combinations = list(dict.fromkeys(run.terms for run in runs))
    # Torch first and wide: where both agree, the thin line lies on the wide one and both are seen.
    for run in sorted(runs, key=lambda run: run.loss, reverse=True):
        epochs = [epoch.epoch for epoch in run.epochs]
        color = LOSS_COLORS[run.loss][combinations.index(run.terms)]
        style: dict[str, Any] = {"color": color, "marker": "." if len(epochs) == 1 else None, **LOSS_STYLE[run.loss]}
        left.plot(epochs, [epoch.loss for epoch in run.epochs], label=f"{run.name}, held-out", **style)
        left.plot(
            epochs, [epoch.train_loss for epoch in run.epochs], label=f"{run.name}, training", linestyle=":", **style
        )
        right.plot(epochs, [epoch.mean_iou for epoch in run.epochs], label=run.name, **style)
    left.set(xlabel="epoch", ylabel="cross-entropy" if combinations == [("ce",)] else "loss, the sum of its terms")
    right.set(xlabel="epoch", ylabel="mean IoU on held-out images", ylim=(0, 1))
    for axis in (left, right):
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)
