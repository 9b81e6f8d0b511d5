"""The losses in PyTorch's own operations, as one writes them without a library: what eager PyTorch and torch.compile
run, and, in float64, the truth.

`soft_iou` and `dice` are one softmax, one one-hot array and three sums; the sums with `ce` and `brier` share the first
two. Last, `jdt`: another library's way to the same numbers.
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
    "dice": ("dice",),
    "ce+iou": ("ce", "iou"),
    "ce+dice": ("ce", "dice"),
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
    """target: class indices (N, *spatial) under softmax; or of input's shape, one class, under sigmoid; or, of
    cross-entropy alone, probabilities under softmax."""
    nothing = input.new_zeros(())
    terms = TERMS[loss]
    over = (0, *range(2, input.dim()))
    if target.shape == input.shape and terms == ("ce",):
        pixels = torch.full_like(nothing, target.numel() // target.shape[1])
        return Sums(F.cross_entropy(input, target, reduction="sum"), nothing, nothing, nothing, nothing, pixels)
    if target.shape == input.shape:
        p, y = torch.sigmoid(input), target
        both, pixels = torch.minimum(p, y).sum(over), nothing
        cross_entropy = nothing
        if "ce" in terms:
            cross_entropy = F.binary_cross_entropy_with_logits(input, target, reduction="sum")
            pixels = torch.full_like(nothing, target.numel())
        return Sums(cross_entropy, nothing, both, p.sum(over), y.sum(over), pixels)
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
    present = of.labelled > 0
    total = of.predicted + of.labelled
    if "iou" in terms:
        iou = of.intersection / torch.where(present, total - of.intersection, 1.0)
        result = result + (present * (1.0 - iou)).sum() / present.sum()
    if "dice" in terms:
        dice = 2.0 * of.intersection / torch.where(present, total, 1.0)
        result = result + (present * (1.0 - dice)).sum() / present.sum()
    if "brier" in terms:
        result = result + of.squared_error / of.pixels
    return result


def written_out(loss: str) -> Callable[..., Tensor]:
    return lambda input, target, ignore_index=-100: value(loss, sums(loss, input, target, ignore_index))


# Wang et al., "Jaccard Metric Losses: Optimizing the Jaccard Index with Soft Labels", NeurIPS 2023 (arXiv 2302.05666),
# as its authors' JDTLosses computes it by default (github.com/zifuwanggg/JDTLosses; not on PyPI, so written anew here):
# sums per image and class first, the intersection from 1-norms, 2 I = |p| + |y| - |p - y|, then I / (I + a FP + b FN)
# of the batch, and the mean over the classes that have a label. Their `smooth` of 1e-3 is left out: another loss.
def jdt(alpha: float, beta: float) -> Callable[..., Tensor]:
    """alpha = beta = 1: Jaccard; 1/2: Dice."""

    def loss(input: Tensor, target: Tensor, ignore_index: int = -100) -> Tensor:
        if target.shape == input.shape:
            p, y = torch.sigmoid(input).flatten(2), target.flatten(2)
        else:
            valid = target != ignore_index
            p = torch.softmax(input, 1).flatten(2)
            y = F.one_hot(torch.where(valid, target, 0).flatten(1), input.shape[1]).transpose(1, 2).to(p.dtype)
            keep = valid.flatten(1).unsqueeze(1)
            p, y = p * keep, y * keep
        predicted, labelled, difference = (torch.linalg.vector_norm(one, 1, dim=-1) for one in (p, y, p - y))
        both = (predicted + labelled - difference) / 2.0
        both, too_much, too_little = (one.sum(0) for one in (both, predicted - both, labelled - both))
        score = both / (both + alpha * too_much + beta * too_little)
        active: Tensor = (1.0 - score)[y.amax((0, 2)) > 0]
        return active.mean()

    return loss
