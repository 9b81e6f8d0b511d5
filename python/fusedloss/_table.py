"""The overlap formulas on the table of sums, in tensor operations: (G, C) numbers, not one a pixel.

Of the reference, and of the losses over several processes, whose table is the sum of many (``_distributed.py``). The
kernels have them from csrc/math/overlap.h.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def chosen(of_classes: Tensor, classes: Sequence[int] | None) -> Tensor:
    """Of (..., C), the classes that are asked for."""
    return of_classes if classes is None else of_classes[..., list(classes)]


def divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Quotient, 0 where the denominator is; written so that its derivative there is 0 too."""
    some = denominator != 0
    return torch.where(some, numerator / torch.where(some, denominator, 1.0), 0.0)


def overlap_of(
    intersection: Tensor,
    predicted: Tensor,
    labelled: Tensor,
    pixels: Tensor,
    *,
    alpha: float,
    beta: float,
    classes: Sequence[int] | None,
    absent: str,
    smooth: float,
    eps: float,
    log: bool,
    gamma: float,
) -> tuple[Tensor, Tensor]:
    """Loss of each chosen class in each group, 0 where it does not count, and whether it counts: (G, classes).

    Of I, P and T, each (G, C), and the sum of the pixels' weights in each group, (G,).
    """
    i, p, t = (chosen(of_classes, classes) for of_classes in (intersection, predicted, labelled))
    score = (i + smooth) / (i + alpha * (p - i) + beta * (t - i) + smooth).clamp_min(eps)
    loss = -torch.log(score.clamp_min(eps)) if log else 1.0 - score
    # Not clamp_min(0.0): at 0, where a perfect prediction is, its derivative is 1 up to torch 2.13 and another in 2.14.
    loss = torch.where(loss < 0.0, 0.0, loss)
    if gamma != 1.0:
        positive = loss > 0.0  # at 0 the power may have an infinite derivative
        loss = torch.where(positive, torch.where(positive, loss, 1.0) ** gamma, 0.0)

    counts = (pixels != 0).unsqueeze(1).expand(loss.shape)
    present = t != 0
    if absent == "skip":
        counts = counts & present
        loss = torch.where(counts, loss, 0.0)
    elif absent == "zero":
        loss = torch.where(counts & present, loss, 0.0)
    elif absent == "count":
        loss = torch.where(counts, loss, 0.0)
    else:
        raise ValueError(f"`absent` must be 'skip', 'count' or 'zero', got {absent!r}")
    return loss, counts


def add_classes(loss: Tensor, counts: Tensor, class_weight: Tensor, *, mean: bool) -> tuple[Tensor, Tensor]:
    """Sum over the groups of sum w loss, or, for a mean, of sum w loss / sum w; and how many groups have a class.

    Of loss and counts, each (G, classes), and the weights of the classes, (classes,).
    """
    class_weight = class_weight * counts
    of_group = (class_weight * loss).sum(dim=1)
    if mean:
        of_group = divide(of_group, class_weight.sum(dim=1))
    return of_group.sum(), counts.any(dim=1).to(loss.dtype).sum()
