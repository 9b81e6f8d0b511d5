"""How the time grows: the same loss over many sizes, one of which is doubled and the others kept.

    classes   1 to 256 classes, doubled, of 4 images of 256 x 256
    pixels    2^10 to 2^26 pixels, four times as many each time, of 4 classes

for cross-entropy and cross-entropy + IoU in float32, every pixel labelled. One class is a sigmoid with a mask of
logits' size in cross-entropy + IoU; in cross-entropy it is a softmax, which is 1, and a loss of 0, so that point shows
what a call costs whatever it computes.

Capped is the number of logits: what takes at most BYTES_A_LOGIT (12 for the logits and the reference's gradient or the
floor's two arrays, 20 for eager PyTorch at its peak) of half of the machine's memory, and 2^28 on a GPU. So all sizes
are measured on a CPU with 20 GiB or more, and pixels up to 2^24 with 5.
"""

from __future__ import annotations

import math
import re

from benchmarks.machine import memory_gib
from benchmarks.workloads import Data, Workload

LOSSES = ("cross_entropy", "ce+iou")
SIZES = {
    "classes": tuple(2**power for power in range(9)),
    "pixels": tuple(2**power for power in range(10, 27, 2)),
}
BYTES_A_LOGIT = 32
LARGEST_ON_CUDA = 1 << 28  # logits
SMALLEST_MEMORY_GIB = 5.0  # where the machine does not say what it has
LARGEST_QUICK = 1 << 18
IMAGES, SIDE = 4, 256  # of the sweep of classes
FEW_CLASSES, LARGEST_SIDE = 4, 512  # of the sweep of pixels


def largest(device: str) -> int:
    """How many logits there may be."""
    if device == "cuda":
        return LARGEST_ON_CUDA
    memory = memory_gib() or SMALLEST_MEMORY_GIB
    return min(LARGEST_ON_CUDA, int(memory * 2**30 / 2 / BYTES_A_LOGIT))


def shape_of(sweep: str, size: int) -> tuple[int, ...]:
    """(N, C, H, W). Small images and more of them, because the reference takes one image at least in float64."""
    if sweep == "classes":
        return (IMAGES, size, SIDE, SIDE)
    side = min(math.isqrt(size), LARGEST_SIDE)
    return (size // side**2, FEW_CLASSES, side, side)


def workload_of(loss: str, sweep: str, size: int) -> Workload:
    return Workload(
        loss, Data(f"{sweep}-{size}", shape_of(sweep, size), f"sweep over {sweep}"), devices=("cpu", "cuda")
    )


def workloads(sweep: str, device: str, quick: bool = False) -> list[Workload]:
    """Loss by loss, from the smallest on; without those that have too many logits."""
    most = LARGEST_QUICK if quick else largest(device)
    return [
        workload_of(loss, sweep, size)
        for loss in LOSSES
        for size in SIZES[sweep]
        if math.prod(shape_of(sweep, size)) <= most
    ]


def left_out(sweep: str, device: str) -> list[int]:
    return [size for size in SIZES[sweep] if math.prod(shape_of(sweep, size)) > largest(device)]


def point(workload: str) -> tuple[str, str, int] | None:
    """Loss, sweep and size that a workload's name stands for; None for a workload that is of no sweep."""
    match = re.fullmatch(rf"(.+)/({'|'.join(SIZES)})-(\d+)", workload)
    return (match[1], match[2], int(match[3])) if match else None


def find(name: str) -> Workload | None:
    """The workload of that name, if a sweep has it."""
    of = point(name)
    return workload_of(*of) if of and of[0] in LOSSES and of[2] in SIZES[of[1]] else None
