"""What is measured: real sizes with a name and a reason, and the tensors made from them."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SEED = 0
# What Pascal VOC, Cityscapes and ADE20K loaders call a pixel without a label; it fits into uint8.
IGNORED_LABEL = 255
# Labels of photographs come in regions. Labels drawn pixel by pixel would send every reader of `logits[label]` to
# another class plane for every pixel, which is unfair to those that gather. Patches are so long along a row that 16
# pixels have 1.25 classes, as in CamVid (1.24), and short across rows, so that no class is absent from a small image.
PATCH_LENGTH = 60
PATCH_WIDTH = 16


@dataclass(frozen=True)
class Data:
    """The shape of a training batch: (N, C, *spatial) logits, or any shape for losses without classes."""

    name: str
    shape: tuple[int, ...]
    reason: str
    ignored: float = 0.0  # share of pixels without a label


DATA = {
    data.name: data
    for data in (
        Data("voc", (8, 21, 512, 512), "Pascal VOC: 20 classes and background, the usual crop", ignored=0.05),
        Data("ade20k", (2, 150, 512, 512), "ADE20K: so many classes that a tile leaves the L1 cache", ignored=0.05),
        Data("cityscapes", (2, 19, 1024, 2048), "Cityscapes: whole frames, the largest images in use", ignored=0.05),
        Data("camvid", (4, 11, 360, 480), "CamVid: a batch that a laptop trains with", ignored=0.05),
        Data(
            "frame",
            (1, 19, 512, 1024),
            "half a Cityscapes frame, alone and labelled throughout: every library means the same",
        ),
        Data("nnunet", (2, 14, 128, 128, 128), "nnU-Net patches: 3-d, 13 organs and background"),
        Data("imagenet", (1024, 1000), "ImageNet rows: few long rows, near the size of the last cache"),
        Data("vocabulary", (2048, 32000), "language-model rows: a row no longer fits into the L1 cache"),
        Data("gpt2", (2048, 50257), "GPT-2's vocabulary: rows of an odd length begin anywhere in a cache line"),
        Data(
            "binary",
            (16, 1, 512, 512),
            "a mask for each image, soft labels: one class, so labels are half of the bytes",
        ),
        Data("50m", (50_000_000,), "regression on large maps (depth, heat maps): memory speed and nothing else"),
        Data("voc16", (16, 21, 512, 512), "Pascal VOC in batches of a GPU", ignored=0.05),
        Data("ade20k8", (8, 150, 512, 512), "ADE20K in batches of a GPU", ignored=0.05),
        Data("vocabulary32k", (16384, 32768), "language-model rows: a row is 64 KiB of bfloat16"),
        Data("vocabulary128k", (8192, 131072), "the largest vocabularies: a row is more than shared memory holds"),
        Data("100m", (100_000_000,), "regression on large maps: memory speed and nothing else"),
        Data("frame-small", (1, 5, 128, 128), "one image, to see that the Dice losses of all libraries agree"),
        Data("tiny", (64, 10), "a small classifier: what a call costs before any work is done"),
    )
}


def short_name(value: torch.dtype | torch.memory_format) -> str:
    return str(value).removeprefix("torch.")


@dataclass(frozen=True)
class Workload:
    """A loss on a batch in one dtype and layout."""

    loss: str
    data: Data
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format
    label_dtype: torch.dtype = torch.int64
    one_hot: bool = False  # labels as soft ones of the input's dtype, every pixel with a class
    autocast: bool = False  # called under torch.autocast to the input's dtype
    devices: tuple[str, ...] = ("cpu",)  # where it is measured by default
    default: bool = True  # measured unless --workloads names others
    quick: bool = False  # measured by --quick

    @property
    def name(self) -> str:
        parts = [self.data.name]
        if self.dtype != torch.float32:
            parts.append(short_name(self.dtype))
        if self.memory_format != torch.contiguous_format:
            parts.append(short_name(self.memory_format))
        if self.label_dtype != torch.int64:
            parts.append(short_name(self.label_dtype))
        if self.one_hot:
            parts.append("one_hot")
        if self.autocast:
            parts.append("autocast")
        return f"{self.loss}/{'-'.join(parts)}"

    @property
    def reason(self) -> str:
        if self.one_hot:
            return "soft labels as one_hot(...).movedim(-1, 1) leaves them: class innermost, beside contiguous logits"
        if self.memory_format == torch.channels_last:
            return "class innermost: what convolutions in channels_last hand over"
        if self.autocast:
            return "half-precision logits in a region that casts to float32 where PyTorch thinks it must"
        if self.dtype != torch.float32:
            return "half the bytes: what mixed-precision training hands over"
        if self.label_dtype != torch.int64:
            return "labels as image files hold them, an eighth of int64's bytes"
        return self.data.reason


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("cross_entropy", DATA["voc"]),
        Workload("cross_entropy", DATA["voc"], dtype=torch.bfloat16),
        Workload("cross_entropy", DATA["voc"], memory_format=torch.channels_last),
        Workload("cross_entropy", DATA["voc"], label_dtype=torch.uint8, default=False),
        Workload("cross_entropy", DATA["voc"], one_hot=True, default=False),
        Workload("cross_entropy", DATA["ade20k"]),
        Workload("cross_entropy", DATA["vocabulary"]),
        Workload("cross_entropy", DATA["vocabulary"], dtype=torch.bfloat16, default=False),
        Workload("cross_entropy", DATA["gpt2"], default=False),
        Workload("cross_entropy", DATA["gpt2"], dtype=torch.bfloat16, default=False),
        Workload("cross_entropy", DATA["cityscapes"], default=False),
        Workload("cross_entropy", DATA["camvid"], default=False, quick=True),
        Workload("cross_entropy", DATA["nnunet"], default=False),
        Workload("cross_entropy", DATA["imagenet"], default=False),
        Workload("cross_entropy", DATA["tiny"], quick=True, devices=("cpu", "cuda")),
        Workload("soft_iou", DATA["voc"]),
        Workload("soft_iou", DATA["voc"], dtype=torch.bfloat16),
        Workload("soft_iou", DATA["binary"]),
        Workload("soft_iou", DATA["binary"], dtype=torch.bfloat16),
        Workload("ce+iou", DATA["nnunet"], devices=("cpu", "cuda")),
        Workload("ce+iou", DATA["nnunet"], dtype=torch.bfloat16),
        Workload("ce+iou", DATA["camvid"], default=False, quick=True),
        Workload("ce+iou", DATA["ade20k"], default=False),
        Workload("ce+iou+brier", DATA["voc"]),
        Workload("ce+iou+brier", DATA["voc"], dtype=torch.bfloat16),
        Workload("ce+iou+brier", DATA["voc"], memory_format=torch.channels_last),
        Workload("dice", DATA["frame"], default=False),
        Workload("dice", DATA["frame-small"], default=False),
        Workload("ce+dice", DATA["nnunet"], default=False),
        Workload("mse_loss", DATA["50m"]),
        Workload("mse_loss", DATA["tiny"], quick=True, devices=("cpu", "cuda")),
        Workload("cross_entropy", DATA["voc16"], devices=("cuda",)),
        Workload("cross_entropy", DATA["voc16"], dtype=torch.bfloat16, devices=("cuda",)),
        Workload("cross_entropy", DATA["vocabulary32k"], dtype=torch.bfloat16, devices=("cuda",)),
        Workload("cross_entropy", DATA["vocabulary128k"], dtype=torch.bfloat16, devices=("cuda",)),
        Workload("soft_iou", DATA["voc16"], devices=("cuda",)),
        Workload("ce+iou", DATA["nnunet"], dtype=torch.bfloat16, autocast=True, devices=("cuda",)),
        Workload("ce+iou", DATA["ade20k8"], dtype=torch.bfloat16, devices=("cuda",)),
        Workload("ce+iou+brier", DATA["voc16"], devices=("cuda",)),
        Workload("ce+iou+brier", DATA["voc16"], dtype=torch.bfloat16, devices=("cuda",)),
        Workload("mse_loss", DATA["100m"], devices=("cuda",)),
    )
}


@dataclass
class Case:
    """A workload's tensors; `options` are keyword arguments that every provider's loss of that name takes."""

    workload: Workload
    input: Tensor
    target: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def wide_operands(self) -> int:
        """How many operands are as large as the input."""
        return 2 if self.target.shape == self.input.shape else 1


def make_case(workload: Workload, device: str) -> Case:
    """Normally distributed logits; labels in patches, or a normally distributed target. The same on every call, and
    drawn on the device, where a billion logits take no time."""
    generator = torch.Generator(device).manual_seed(SEED)
    data = workload.data

    def normal() -> Tensor:
        return torch.randn(data.shape, dtype=workload.dtype, device=device, generator=generator)

    input = normal().to(memory_format=workload.memory_format).requires_grad_()
    if workload.loss == "mse_loss":
        return Case(workload, input, normal())
    if data.shape[1] == 1 and workload.loss != "cross_entropy":  # under a sigmoid, with a mask of soft labels
        smooth = torch.rand(data.shape, dtype=torch.float32, device=device, generator=generator)
        return Case(workload, input, smooth.to(workload.dtype))
    if workload.one_hot:
        labels = make_labels(replace(data, ignored=0.0), workload.label_dtype, generator)
        return Case(workload, input, F.one_hot(labels, data.shape[1]).movedim(-1, 1).to(workload.dtype))
    target = make_labels(data, workload.label_dtype, generator)
    return Case(workload, input, target, {"ignore_index": IGNORED_LABEL} if data.ignored else {})


def make_labels(data: Data, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Class indices (N, *spatial), constant in patches: PATCH_LENGTH pixels of a row, PATCH_WIDTH across."""
    batch, classes, *spatial = data.shape
    sides = [PATCH_WIDTH] * (len(spatial) - 1) + [PATCH_LENGTH] * min(len(spatial), 1)
    patches = (batch, *(-(-size // side) for size, side in zip(spatial, sides, strict=True)))
    labels = torch.randint(classes, patches, device=generator.device, generator=generator)
    if data.ignored:
        labels[torch.rand(patches, device=generator.device, generator=generator) < data.ignored] = IGNORED_LABEL
    for dim, (size, side) in enumerate(zip(spatial, sides, strict=True), start=1):
        labels = labels.repeat_interleave(side, dim).narrow(dim, 0, size)
    return labels.to(dtype).contiguous()


def choose(patterns: Sequence[str], device: str, table: Mapping[str, Workload] = WORKLOADS) -> list[Workload]:
    """The device's workloads whose name matches one of the shell patterns, in the table's order; any by its name."""
    of_device = [name for name, workload in table.items() if device in workload.devices]
    chosen: set[str] = set()
    for pattern in patterns:
        found = [pattern] if pattern in table else fnmatch.filter(of_device, pattern)
        if not found:
            raise ValueError(f"no workload for {device} matches {pattern!r}; --list shows their names")
        chosen.update(found)
    return [workload for name, workload in table.items() if name in chosen]
