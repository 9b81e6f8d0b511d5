"""The losses that PyTorch lacks, as one would write them with its operations: class by class, in the dtype that comes.

A second opinion beside ``fusedloss.reference``, written from the definitions and not from it, and what "no worse than
PyTorch" means for them.
"""

import torch
import torch.nn.functional as F


def of_class(input, target, activation, c):
    """Probability and label of class ``c``, each (N, *spatial)."""
    p = {"softmax": lambda: input.softmax(1), "sigmoid": input.sigmoid, "none": lambda: input}[activation]()[:, c]
    if target.dim() == input.dim():
        return p, target[:, c].to(p.dtype)
    foreground = target == (1 if input.shape[1] == 1 else c)
    return p, foreground.to(p.dtype)


def pixels_of(input, target, pixel_weight, ignore_index):
    """What each pixel counts, (N, *spatial)."""
    m = torch.ones_like(input[:, 0])
    if pixel_weight is not None:
        m = m * pixel_weight.to(m.dtype)
    if target.is_floating_point():
        return m
    if target.dim() < input.dim():
        return m * (target != ignore_index)
    return m * (target[:, 0] != ignore_index) if input.shape[1] == 1 else m


def areas(input, target, activation, pixel_weight, ignore_index, per_image, intersection, c):
    """I, P and T of class ``c``: (G,)"""
    p, y = of_class(input, target, activation, c)
    m = pixels_of(input, target, pixel_weight, ignore_index)
    over = tuple(range(1 if per_image else 0, m.dim()))

    def total(x):
        return (m * x).sum(over).reshape(-1) if over else m * x

    return (
        total(p * y if intersection == "product" else torch.minimum(p, y)),
        total(p),
        total(y),
        total(torch.ones_like(p)),
    )


def overlap_statistics(
    input, target, activation="softmax", pixel_weight=None, ignore_index=-100, per_image=False, intersection="min"
):
    given = (input, target, activation, pixel_weight, ignore_index, per_image, intersection)
    of_classes = [areas(*given, c)[:3] for c in range(input.shape[1])]
    return in_float32(torch.stack([torch.stack(list(one), 1) for one in zip(*of_classes, strict=True)]))


def tversky_loss(
    input,
    target,
    weight=None,
    alpha=1.0,
    beta=1.0,
    activation="softmax",
    pixel_weight=None,
    ignore_index=-100,
    classes=None,
    per_image=False,
    absent="skip",
    smooth=0.0,
    eps=1e-7,
    log=False,
    gamma=1.0,
    intersection="min",
    reduction="mean",
):
    losses, counting, weights = [], [], []
    for c in range(input.shape[1]) if classes is None else classes:
        i, p, t, pixels = areas(input, target, activation, pixel_weight, ignore_index, per_image, intersection, c)
        score = (i + smooth) / torch.clamp(i + alpha * (p - i) + beta * (t - i) + smooth, min=eps)
        loss = -score.clamp(min=eps).log() if log else 1 - score
        loss = loss.clamp(min=0) ** gamma if gamma != 1 else loss.clamp(min=0)
        valid, present = (pixels > 0).to(i.dtype), (t > 0).to(i.dtype)
        counts = valid * present if absent == "skip" else valid
        losses.append(torch.where((counts if absent == "count" else counts * present) > 0, loss, 0))
        counting.append(counts)
        weights.append(torch.ones_like(i) if weight is None else weight[c].to(i.dtype).expand(i.shape))
    loss, counts, weights = (torch.stack(one, 1) for one in (losses, counting, weights))
    if reduction == "none":
        return in_float32(loss)
    if reduction == "sum":
        return in_float32((counts * weights * loss).sum())
    of_groups = (counts * weights * loss).sum(1) / (counts * weights).sum(1).clamp(min=1e-30)
    groups = (counts.sum(1) > 0).to(loss.dtype).sum()
    return in_float32(of_groups.sum() / groups.clamp(min=1))


def soft_iou_loss(input, target, weight=None, **options):
    return tversky_loss(input, target, weight, 1.0, 1.0, **options)


def dice_loss(input, target, weight=None, **options):
    return tversky_loss(input, target, weight, 0.5, 0.5, **options)


def brier_loss(
    input, target, weight=None, activation="softmax", pixel_weight=None, ignore_index=-100, reduction="mean"
):
    m = pixels_of(input, target, pixel_weight, ignore_index)
    loss = torch.zeros_like(m)
    for c in range(input.shape[1]):
        p, y = of_class(input, target, activation, c)
        loss = loss + (1 if weight is None else weight[c].to(m.dtype)) * (p - y) ** 2
    loss = m * loss
    if reduction == "none":
        return in_float32(loss)
    return in_float32(loss.sum() if reduction == "sum" else loss.sum() / m.sum().clamp(min=1e-30))


def cross_entropy(input, target, weight, label_smoothing, pos_weight, activation, pixel_weight, ignore_index):
    m = pixels_of(input, target, pixel_weight, ignore_index)
    weight = None if weight is None else weight.to(input.dtype)
    if activation == "sigmoid":
        y = torch.stack([of_class(input, target, activation, c)[1] for c in range(input.shape[1])], 1)
        shape = (-1,) + (1,) * (input.dim() - 2)
        y = y * (1 - label_smoothing) + label_smoothing / input.shape[1]
        positive = y if pos_weight is None else y * pos_weight.to(input.dtype).view(shape)
        loss = -positive * F.logsigmoid(input) - (1 - y) * F.logsigmoid(-input)
        loss = (loss if weight is None else loss * weight.view(shape)).mean(1)
        return (m * loss).sum() / m.sum().clamp(min=1e-30)
    if target.is_floating_point():
        loss = F.cross_entropy(input, target, weight, reduction="none", label_smoothing=label_smoothing)
        return (m * loss).sum() / m.sum().clamp(min=1e-30)
    loss = F.cross_entropy(
        input, target.long(), weight, reduction="none", label_smoothing=label_smoothing, ignore_index=ignore_index
    )
    valid = target.long().clamp(0, input.shape[1] - 1)
    of_label = torch.ones_like(m) if weight is None else weight[valid]
    return (m * loss).sum() / (m * of_label).sum().clamp(min=1e-30)


def segmentation_loss(
    input,
    target,
    weight=None,
    cross_entropy=1.0,
    iou=1.0,
    brier=0.0,
    alpha=1.0,
    beta=1.0,
    label_smoothing=0.0,
    pos_weight=None,
    activation="softmax",
    pixel_weight=None,
    ignore_index=-100,
    **overlap,
):
    shared = {"activation": activation, "pixel_weight": pixel_weight, "ignore_index": ignore_index}
    loss = 0.0
    if cross_entropy:
        loss = loss + cross_entropy * globals()["cross_entropy"](
            input, target, weight, label_smoothing, pos_weight, **shared
        )
    if iou:
        loss = loss + iou * tversky_loss(input, target, weight, alpha, beta, **shared, **overlap)
    if brier:
        loss = loss + brier * brier_loss(input, target, weight, **shared)
    return in_float32(loss)


def in_float32(value):
    return value.to(torch.promote_types(value.dtype, torch.float32))
