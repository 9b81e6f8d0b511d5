"""The losses in PyTorch's own operations, as one writes them without a library: what eager PyTorch and torch.compile
run, and, in float64, the truth.

`soft_iou` is one softmax, one one-hot array and three sums; `ce+iou` and `ce+iou+brier` share the first two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

TERMS = {
    "cross_entropy": ("ce",),
    "soft_iou": ("iou",),
    "ce+iou": ("ce", "iou"),
    "ce+iou+brier": ("ce", "iou", "brier"),
}


class Sums(NamedTuple):
    """What a loss is made of: sums over pixels, so that a large batch can be summed a few samples at a time."""

    cross_entropy: Tensor
    squared_error: Tensor
    intersection: Tensor  # (C,), as the two that follow
    predicted: Tensor
    labelled: Tensor
    pixels: Tensor


def sums(loss: str, input: Tensor, target: Tensor, ignore_index: int = -100) -> Sums:
    """target: class indices (N, *spatial) under softmax; or of input's shape, one class, under sigmoid."""
    nothing = input.new_zeros(())
    terms = TERMS[loss]
    over = (0, *range(2, input.dim()))
    if target.shape == input.shape:
        p, y = torch.sigmoid(input), target
        return Sums(nothing, nothing, torch.minimum(p, y).sum(over), p.sum(over), y.sum(over), nothing)
    cross_entropy = nothing
    if "ce" in terms:
        cross_entropy = F.cross_entropy(input, target, ignore_index=ignore_index, reduction="sum")
    valid = target != ignore_index
    if terms == ("ce",):
        return Sums(cross_entropy, nothing, nothing, nothing, nothing, valid.sum())
    # Half logits in float32, as autocast does it.
    p = torch.softmax(input, 1, dtype=torch.promote_types(input.dtype, torch.float32))
    y = F.one_hot(torch.where(valid, target, 0), input.shape[1]).movedim(-1, 1).to(p.dtype)
    if ignore_index >= 0:
        p, y = p * valid.unsqueeze(1), y * valid.unsqueeze(1)
    squared_error = (p - y).square().sum() if "brier" in terms else nothing
    return Sums(cross_entropy, squared_error, (p * y).sum(over), p.sum(over), y.sum(over), valid.sum())


def value(loss: str, of: Sums) -> Tensor:
    terms = TERMS[loss]
    result = torch.zeros_like(of.cross_entropy)
    if "ce" in terms:
        result = result + of.cross_entropy / of.pixels
    if "iou" in terms:
        present = of.labelled > 0
        iou = of.intersection / torch.where(present, of.predicted + of.labelled - of.intersection, 1.0)
        result = result + (present * (1.0 - iou)).sum() / present.sum()
    if "brier" in terms:
        result = result + of.squared_error / of.pixels
    return result


def written_out(loss: str) -> Callable[..., Tensor]:
    return lambda input, target, ignore_index=-100: value(loss, sums(loss, input, target, ignore_index))
