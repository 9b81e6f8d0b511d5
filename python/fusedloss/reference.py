"""The losses in plain PyTorch operations: written to be read, not to be fast.

Each function here means exactly what the function of the same name in :mod:`fusedloss` means. It is the truth that
the tests compare the kernels with, and it is what runs under the transforms of :mod:`torch.func` and under forward-mode
differentiation, because every operation in it has a derivative, a batching rule and a derivative of its derivative.

Two rules hold throughout. No step looks at the data to decide what to do next (no Python ``if`` on a value, no
boolean-mask indexing), or ``vmap`` and ``torch.compile`` could not follow. And what is ignored is replaced *before* the
softmax: replaced afterwards, a NaN there would still reach the gradient as 0 * NaN.

Shapes and dtypes are checked only where PyTorch would broadcast or convert its way to a wrong number.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedloss import _table

__all__ = [
    "brier_loss",
    "cross_entropy",
    "dice_loss",
    "mse_loss",
    "overlap_statistics",
    "segmentation_loss",
    "soft_iou_loss",
    "tversky_loss",
]

_LABEL_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy between softmax(input) and labels, as :func:`torch.nn.functional.cross_entropy` defines it.

    For a pixel with logits z, label y (an index, or C probabilities), class weights w and smoothing e::

        lse   = log sum_c exp(z_c)
        y~_c  = (1 - e) y_c + e / C                  y_c = [c == y] for an index
        loss  = sum_c w_c y~_c (lse - z_c)           0 where the index is ignore_index

        "none": loss    "sum": sum loss    "mean": sum loss / sum w_y     for indices, over those not ignored
                                                   sum loss / pixels      for probabilities

    Args:
        input: logits, (C,), (N, C) or (N, C, d1, ..., dK), of any floating dtype.
        target: class indices, (), (N,) or (N, d1, ..., dK), of dtype uint8, int16, int32 or int64;
            or probabilities of ``input``'s shape in any floating dtype.
        weight: factor of each class, (C,).
        ignore_index: an index that adds nothing, neither to the value nor to the gradient. It may lie inside [0, C).
        reduction: "none", "sum" or "mean".
        label_smoothing: share of the label that is spread evenly over the classes, in [0, 1].

    Returns:
        A scalar, or with "none" a tensor of the shape that index labels have. Its dtype is ``input``'s; with
        probabilities the one that all arguments promote to. Half dtypes are computed, and under autocast returned,
        in float32.

    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    >>> cross_entropy(logits, torch.tensor([0, 1]), reduction="none")
    tensor([0.1269, 0.6931])
    >>> cross_entropy(logits, torch.tensor([0, 255], dtype=torch.uint8), ignore_index=255)
    tensor(0.1269)
    """
    class_dim = 0 if input.dim() == 1 else 1
    num_classes = input.shape[class_dim]
    pixels_shape = input.shape[:class_dim] + input.shape[class_dim + 1 :]
    if weight is not None and weight.shape != (num_classes,):
        raise ValueError(f"cross_entropy: `weight` must have shape ({num_classes},), got {tuple(weight.shape)}")

    soft = target.is_floating_point()
    result_dtype = _result_dtype(input, target, weight) if soft else _result_dtype(input)
    dtype = _compute_dtype(result_dtype)
    if weight is None:
        weight = torch.ones(num_classes, dtype=dtype, device=input.device)
    # (C, 1, ..., 1), to stand beside the logits.
    class_weight = weight.to(dtype).reshape((num_classes,) + (1,) * (input.dim() - class_dim - 1))

    if soft:
        if target.shape != input.shape:
            raise ValueError(
                f"cross_entropy: `target` with probabilities must have the shape of `input`, {tuple(input.shape)}, "
                f"got {tuple(target.shape)}"
            )
        if ignore_index >= 0:
            raise ValueError(f"cross_entropy: `ignore_index` must be negative with probabilities, got {ignore_index}")
        log_probability = torch.log_softmax(input.to(dtype), dim=class_dim)
        label = target.to(dtype)
        if label_smoothing > 0.0:
            label = (1.0 - label_smoothing) * label + label_smoothing / max(num_classes, 1)
        loss = -(class_weight * label * log_probability).sum(dim=class_dim)
        # The size as a tensor, so that no pixel at all, or no class, gives 0 / 0 = NaN and not a ZeroDivisionError.
        counted = pixels_shape.numel() if num_classes > 0 else 0
        normalizer = torch.full((), counted, dtype=dtype, device=input.device)
    else:
        if target.dtype not in _LABEL_DTYPES:
            raise TypeError(
                f"cross_entropy: `target` must be uint8, int16, int32, int64 or floating, got {target.dtype}"
            )
        if input.dim() == 1 and target.shape == (1,):
            target = target.reshape(())
        if target.shape != pixels_shape:
            raise ValueError(
                f"cross_entropy: `target` with indices must have shape {tuple(pixels_shape)}, got {tuple(target.shape)}"
            )
        # Widened first: as uint8, -100 would be 156.
        index = target.to(torch.int64)
        valid = index != ignore_index
        zero = torch.zeros((), dtype=dtype, device=input.device)
        index = torch.where(valid, index, 0).unsqueeze(class_dim)
        logits = torch.where(valid.unsqueeze(class_dim), input.to(dtype), zero)
        log_probability = torch.log_softmax(logits, dim=class_dim)
        weight_of_label = class_weight.expand(input.shape).gather(class_dim, index).squeeze(class_dim)
        loss = -weight_of_label * log_probability.gather(class_dim, index).squeeze(class_dim)
        if label_smoothing > 0.0:
            evenly = -(class_weight * log_probability).sum(dim=class_dim)
            loss = (1.0 - label_smoothing) * loss + (label_smoothing / max(num_classes, 1)) * evenly
        loss = torch.where(valid, loss, zero)
        normalizer = torch.where(valid, weight_of_label, zero).sum()

    if reduction == "none":
        result = loss
    elif reduction == "sum":
        result = loss.sum()
    elif reduction == "mean":
        result = loss.sum() / normalizer
    else:
        raise ValueError(f"cross_entropy: `reduction` must be 'none', 'mean' or 'sum', got {reduction!r}")
    return result.to(result_dtype)


def mse_loss(input: Tensor, target: Tensor, *, reduction: str = "mean", weight: Tensor | None = None) -> Tensor:
    """Squared difference of input and target, as :func:`torch.nn.functional.mse_loss` defines it.

    With elements x, y and weights w::

        loss  = w (x - y)^2

        "none": loss    "sum": sum loss    "mean": sum loss / number of elements
                                                   sum loss / sum w           if weight is given

    Args:
        input: any shape, any floating dtype.
        target: a shape that broadcasts with ``input``'s.
        reduction: "none", "sum" or "mean".
        weight: factor of each element, of ``input``'s shape.

    Returns:
        A scalar, or with "none" a tensor of the broadcast shape, in the dtype that all arguments promote to.
        Half dtypes are computed, and under autocast returned, in float32.

    >>> mse_loss(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0]))
    tensor(2.5000)
    >>> mse_loss(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0]), weight=torch.tensor([3.0, 1.0]))
    tensor(1.7500)
    """
    result_dtype = _result_dtype(input, target, weight)
    if not result_dtype.is_floating_point:
        raise TypeError(f"mse_loss: `input` or `target` must be floating, got {input.dtype} and {target.dtype}")
    if weight is not None and weight.shape != input.shape:
        raise ValueError(
            f"mse_loss: `weight` must have the shape of `input`, {tuple(input.shape)}, got {tuple(weight.shape)}"
        )
    dtype = _compute_dtype(result_dtype)

    difference = input.to(dtype) - target.to(dtype)
    loss = difference * difference
    if weight is not None:
        # Converted once: each conversion would round its own share of a half gradient.
        weight = weight.to(dtype)
        loss = weight * loss

    if reduction == "none":
        result = loss
    elif reduction == "sum":
        result = loss.sum()
    elif reduction == "mean":
        result = loss.mean() if weight is None else loss.sum() / weight.sum()
    else:
        raise ValueError(f"mse_loss: `reduction` must be 'none', 'mean' or 'sum', got {reduction!r}")
    return result.to(result_dtype)


def overlap_statistics(
    input: Tensor,
    target: Tensor,
    *,
    activation: str = "softmax",
    pixel_weight: Tensor | None = None,
    ignore_index: int = -100,
    per_image: bool = False,
    intersection: str = "min",
) -> tuple[Tensor, Tensor, Tensor]:
    """What every overlap score is made of: intersection, predicted and labelled area of each class, from logits.

    For pixels with probabilities p, labels y and pixel weights m (0 where ignored), over a group of pixels, which is an
    image or the whole batch::

        I = sum m min(p, y)    P = sum m p    T = sum m y        (I = sum m p y for intersection="product")

    Returns:
        I, P and T, each (G, C): G is the number of images with ``per_image``, else 1.

    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    >>> overlap_statistics(logits, torch.tensor([0, 1]))
    (tensor([[0.8808, 0.5000]]), tensor([[1.3808, 0.6192]]), tensor([[1., 1.]]))
    """
    view = _view("overlap_statistics", input, target, activation, pixel_weight, ignore_index)
    return _statistics(view, per_image, intersection)


def soft_iou_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    activation: str = "softmax",
    pixel_weight: Tensor | None = None,
    ignore_index: int = -100,
    classes: Sequence[int] | None = None,
    per_image: bool = False,
    absent: str = "skip",
    smooth: float = 0.0,
    eps: float = 1e-7,
    log: bool = False,
    gamma: float = 1.0,
    intersection: str = "min",
    reduction: str = "mean",
) -> Tensor:
    """One minus the soft intersection over union of each class: :func:`tversky_loss` with alpha = beta = 1.

    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    >>> soft_iou_loss(logits, torch.tensor([0, 1]))
    tensor(0.4830)
    """
    return tversky_loss(
        input,
        target,
        weight,
        alpha=1.0,
        beta=1.0,
        activation=activation,
        pixel_weight=pixel_weight,
        ignore_index=ignore_index,
        classes=classes,
        per_image=per_image,
        absent=absent,
        smooth=smooth,
        eps=eps,
        log=log,
        gamma=gamma,
        intersection=intersection,
        reduction=reduction,
    )


def dice_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    activation: str = "softmax",
    pixel_weight: Tensor | None = None,
    ignore_index: int = -100,
    classes: Sequence[int] | None = None,
    per_image: bool = False,
    absent: str = "skip",
    smooth: float = 0.0,
    eps: float = 1e-7,
    log: bool = False,
    gamma: float = 1.0,
    intersection: str = "min",
    reduction: str = "mean",
) -> Tensor:
    """One minus the soft Dice score of each class: :func:`tversky_loss` with alpha = beta = 1/2.

    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    >>> dice_loss(logits, torch.tensor([0, 1]))
    tensor(0.3212)
    """
    return tversky_loss(
        input,
        target,
        weight,
        alpha=0.5,
        beta=0.5,
        activation=activation,
        pixel_weight=pixel_weight,
        ignore_index=ignore_index,
        classes=classes,
        per_image=per_image,
        absent=absent,
        smooth=smooth,
        eps=eps,
        log=log,
        gamma=gamma,
        intersection=intersection,
        reduction=reduction,
    )


def tversky_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    alpha: float,
    beta: float,
    activation: str = "softmax",
    pixel_weight: Tensor | None = None,
    ignore_index: int = -100,
    classes: Sequence[int] | None = None,
    per_image: bool = False,
    absent: str = "skip",
    smooth: float = 0.0,
    eps: float = 1e-7,
    log: bool = False,
    gamma: float = 1.0,
    intersection: str = "min",
    reduction: str = "mean",
) -> Tensor:
    """Overlap loss of each class, alpha and beta weighing what is predicted too much and too little.

    With I, P and T of :func:`overlap_statistics`, FP = P - I and FN = T - I::

        score = (I + smooth) / max(I + alpha FP + beta FN + smooth, eps)
        loss  = max(1 - score, 0)^gamma               or, with log, max(-log(max(score, eps)), 0)^gamma

    A class counts in a group unless T = 0 there and ``absent`` is "skip" ("count": it counts by the formula; "zero": it
    counts with loss 0), and unless every pixel of the group has weight 0.

    Returns:
        "mean": of the groups in which a class counts, sum w loss / sum w over the classes that count; 0 without any.
        "sum": sum of w loss over groups and counting classes. "none": loss, (G, classes), 0 where one does not count.

    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    >>> tversky_loss(logits, torch.tensor([0, 1]), alpha=0.3, beta=0.7, reduction="none")
    tensor([[0.2095, 0.4355]])
    """
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"tversky_loss: `reduction` must be 'none', 'mean' or 'sum', got {reduction!r}")
    view = _view("tversky_loss", input, target, activation, pixel_weight, ignore_index)
    pixels = view.pixel_weight.sum(dim=1)
    loss, counts = _table.overlap_of(
        *_statistics(view, per_image, intersection),
        pixels if per_image else pixels.sum().reshape(1),
        alpha=alpha,
        beta=beta,
        classes=classes,
        absent=absent,
        smooth=smooth,
        eps=eps,
        log=log,
        gamma=gamma,
    )
    if reduction == "none":
        return loss
    class_weight = _table.chosen(_ones_or(weight, view), classes)
    total, groups = _table.add_classes(loss, counts, class_weight, mean=reduction == "mean")
    return total if reduction == "sum" else _table.divide(total, groups)


def brier_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    activation: str = "softmax",
    pixel_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Squared difference of probabilities and labels, summed over the classes.

    For a pixel with probabilities p, labels y, pixel weight m (0 where ignored) and class weights w::

        loss = m sum_c w_c (p_c - y_c)^2

        "none": loss, (N, *spatial)    "sum": sum loss    "mean": sum loss / sum m, 0 where that is 0

    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    >>> brier_loss(logits, torch.tensor([0, 1]), reduction="none")
    tensor([0.0284, 0.5000])
    """
    view = _view("brier_loss", input, target, activation, pixel_weight, ignore_index)
    loss = _brier(view, weight)
    if reduction == "none":
        return loss.reshape(view.pixel_shape)
    if reduction == "sum":
        return loss.sum()
    if reduction != "mean":
        raise ValueError(f"brier_loss: `reduction` must be 'none', 'mean' or 'sum', got {reduction!r}")
    return _table.divide(loss.sum(), view.pixel_weight.sum())


def segmentation_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    cross_entropy: float = 1.0,
    iou: float = 1.0,
    brier: float = 0.0,
    alpha: float = 1.0,
    beta: float = 1.0,
    label_smoothing: float = 0.0,
    pos_weight: Tensor | None = None,
    activation: str = "softmax",
    pixel_weight: Tensor | None = None,
    ignore_index: int = -100,
    classes: Sequence[int] | None = None,
    per_image: bool = False,
    absent: str = "skip",
    smooth: float = 0.0,
    eps: float = 1e-7,
    log: bool = False,
    gamma: float = 1.0,
    intersection: str = "min",
    return_terms: bool = False,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of cross-entropy, an overlap loss and the Brier loss.

    ``cross_entropy * CE + iou * overlap + brier * Brier``, where overlap is :func:`tversky_loss`, Brier is
    :func:`brier_loss`, and, with pixel weights m, class weights w and y~ = (1 - e) y + e / C::

        softmax  CE = sum m sum_c w_c y~_c (lse - z_c)  /  sum m w_y   (sum m for probabilities as labels)
        sigmoid  CE = sum m / C sum_c w_c (pos_weight_c y~_c softplus(-z_c) + (1 - y~_c) softplus(z_c))  /  sum m

    A term with factor 0 is not computed. Where a divisor is 0, so is the term.

    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    >>> loss, terms = segmentation_loss(logits, torch.tensor([0, 1]), return_terms=True)
    >>> loss, terms
    (tensor(0.8931), {'cross_entropy': tensor(0.4100), 'iou': tensor(0.4830)})
    """
    options: dict[str, Any] = {"activation": activation, "pixel_weight": pixel_weight, "ignore_index": ignore_index}
    view = _view("segmentation_loss", input, target, **options)
    terms: dict[str, Tensor] = {}
    if cross_entropy != 0.0:
        terms["cross_entropy"] = _table.divide(*_cross_entropy_sums(view, weight, label_smoothing, pos_weight))
    if iou != 0.0:
        terms["iou"] = tversky_loss(
            input,
            target,
            weight,
            alpha=alpha,
            beta=beta,
            classes=classes,
            per_image=per_image,
            absent=absent,
            smooth=smooth,
            eps=eps,
            log=log,
            gamma=gamma,
            intersection=intersection,
            **options,
        )
    if brier != 0.0:
        terms["brier"] = brier_loss(input, target, weight, **options)
    factors = {"cross_entropy": cross_entropy, "iou": iou, "brier": brier}
    loss = torch.zeros((), dtype=view.probabilities.dtype, device=input.device)
    for name, term in terms.items():
        loss = loss + factors[name] * term
    return (loss, {name: term.detach() for name, term in terms.items()}) if return_terms else loss


# ---- what the losses on probabilities share --------------------------------------------------------------------------


@dataclass
class _View:
    """A call as samples N of pixels S of classes C. Ignored pixels have weight 0, and logits and labels of 0."""

    logits: Tensor  # (N, C, S)
    probabilities: Tensor  # (N, C, S)
    labels: Tensor  # (N, C, S): soft, or one-hot
    pixel_weight: Tensor  # (N, S)
    index: Tensor | None  # (N, S) of int64, where the labels are class indices under softmax
    activation: str
    pixel_shape: list[int]


def _view(
    name: str, input: Tensor, target: Tensor, activation: str, pixel_weight: Tensor | None, ignore_index: int
) -> _View:
    if input.dim() < 2:
        raise ValueError(f"{name}: `input` must have the shape (N, C) or (N, C, d1, ..., dK), got {tuple(input.shape)}")
    samples, classes = input.shape[:2]
    if activation not in ("softmax", "sigmoid", "none"):
        raise ValueError(f"{name}: `activation` must be 'softmax', 'sigmoid' or 'none', got {activation!r}")
    if activation == "softmax" and classes == 1:
        raise ValueError(f"{name}: softmax of one class is 1 everywhere; use activation='sigmoid'")
    pixel_shape = [samples, *input.shape[2:]]
    dtype = _compute_dtype(_result_dtype(input, target) if target.is_floating_point() else input.dtype)

    pixels = torch.ones(pixel_shape, dtype=dtype, device=input.device)
    if pixel_weight is not None:
        pixels = pixels * pixel_weight.to(dtype)
    index = None
    if target.shape == input.shape and (target.is_floating_point() or activation != "softmax"):
        if not target.is_floating_point() and classes == 1:  # a mask, in which a value may say that a pixel is ignored
            target = target.squeeze(1).to(torch.int64)
            pixels = torch.where(target == ignore_index, 0.0, pixels)
            target = torch.where(target == ignore_index, 0, target).unsqueeze(1)
        elif ignore_index >= 0:
            raise ValueError(f"{name}: `ignore_index` must be negative with a label for each class, got {ignore_index}")
        labels = target.to(dtype)
    elif list(target.shape) == pixel_shape and not target.is_floating_point():
        index = target.to(torch.int64)
        ignored = index == ignore_index
        pixels = torch.where(ignored, 0.0, pixels)
        index = torch.where(ignored, 0, index)
        if classes == 1:
            labels = index.unsqueeze(1).to(dtype)
        else:
            labels = torch.zeros_like(input, dtype=dtype).scatter(1, index.unsqueeze(1), 1.0)
    else:
        raise ValueError(f"{name}: `target` must have the shape {tuple(pixel_shape)} or {tuple(input.shape)}")

    counts = (pixels != 0).unsqueeze(1)
    zero = torch.zeros((), dtype=dtype, device=input.device)
    logits = torch.where(counts, input.to(dtype), zero)
    if activation == "softmax":
        probabilities = torch.softmax(logits, dim=1)
    else:
        probabilities = torch.sigmoid(logits) if activation == "sigmoid" else logits
    flat = (samples, classes, math.prod(pixel_shape[1:]))
    return _View(
        logits.reshape(flat),
        probabilities.reshape(flat),
        torch.where(counts, labels, zero).reshape(flat),
        pixels.reshape(samples, flat[2]),
        None if index is None or activation != "softmax" else index.reshape(samples, flat[2]),
        activation,
        pixel_shape,
    )


def _ones_or(weight: Tensor | None, view: _View) -> Tensor:
    """(C,)"""
    like = view.probabilities
    return like.new_ones(like.shape[1]) if weight is None else weight.to(like.dtype)


def _brier(view: _View, weight: Tensor | None) -> Tensor:
    """(N, S)"""
    square = (view.probabilities - view.labels) ** 2
    return view.pixel_weight * (_ones_or(weight, view)[:, None] * square).sum(dim=1)


def _cross_entropy_sums(
    view: _View, weight: Tensor | None, label_smoothing: float, pos_weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The sum over the pixels, and what it is divided by in a mean."""
    classes = view.logits.shape[1]
    class_weight = _ones_or(weight, view)[:, None]
    if view.activation == "none":
        raise ValueError("segmentation_loss: `cross_entropy` must be 0 with activation='none'")
    if view.activation == "sigmoid":
        label = (1.0 - label_smoothing) * view.labels + label_smoothing / classes
        positive = label * _ones_or(pos_weight, view)[:, None]
        # log(exp(z) + exp(0)) and not softplus, which torch replaces by its argument above 20.
        zero = torch.zeros_like(view.logits)
        loss = positive * torch.logaddexp(-view.logits, zero) + (1.0 - label) * torch.logaddexp(view.logits, zero)
        loss = (class_weight * loss).sum(dim=1) / classes
        return (view.pixel_weight * loss).sum(), view.pixel_weight.sum()
    log_probability = torch.log_softmax(view.logits, dim=1)
    if view.index is None:
        label = view.labels
        if label_smoothing > 0.0:
            label = (1.0 - label_smoothing) * label + label_smoothing / classes
        loss = -(class_weight * label * log_probability).sum(dim=1)
        return (view.pixel_weight * loss).sum(), view.pixel_weight.sum()
    # By index and not by one-hot labels, whose 0 times a logarithm of -infinity would be NaN.
    index = view.index.unsqueeze(1)
    label_weight = class_weight.expand(view.logits.shape).gather(1, index).squeeze(1)
    loss = -label_weight * log_probability.gather(1, index).squeeze(1)
    if label_smoothing > 0.0:
        evenly = -(class_weight * log_probability).sum(dim=1)
        loss = (1.0 - label_smoothing) * loss + (label_smoothing / classes) * evenly
    return (view.pixel_weight * loss).sum(), (view.pixel_weight * label_weight).sum()


def _statistics(view: _View, per_image: bool, intersection: str) -> tuple[Tensor, Tensor, Tensor]:
    """I, P and T, each (G, C)."""
    m, p, y = view.pixel_weight.unsqueeze(1), view.probabilities, view.labels
    if intersection not in ("min", "product"):
        raise ValueError(f"`intersection` must be 'min' or 'product', got {intersection!r}")
    # At p = y, torch.minimum gives half of the gradient to each.
    both = torch.minimum(p, y) if intersection == "min" else p * y
    i, t, predicted = ((m * values).sum(dim=2) for values in (both, y, p))
    if not per_image:
        i, t, predicted = (values.sum(dim=0, keepdim=True) for values in (i, t, predicted))
    return i, predicted, t


def segmentation_sums(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    *,
    cross_entropy: bool,
    iou: bool,
    brier: bool,
    label_smoothing: float,
    pos_weight: Tensor | None,
    activation: str,
    pixel_weight: Tensor | None,
    ignore_index: int,
    per_image: bool,
    intersection: str,
) -> Tensor:
    """All that the formulas need: (3 G C + G + 3) of float64, in the order of kSums in csrc/kernels/segmentation.h."""
    view = _view("segmentation", input, target, activation, pixel_weight, ignore_index)
    pixels = view.pixel_weight.sum(dim=1)
    if not per_image:
        pixels = pixels.sum().reshape(1)
    zero = pixels.new_zeros(())
    sums = [zero, zero, zero]
    if cross_entropy:
        sums[0], divisor = _cross_entropy_sums(view, weight, label_smoothing, pos_weight)
        if view.index is not None:
            sums[1] = divisor
    if brier:
        sums[2] = _brier(view, weight).sum()
    if iou:
        table = torch.stack(_statistics(view, per_image, intersection))
    else:
        table = pixels.new_zeros((3, pixels.shape[0], view.logits.shape[1]))
    return torch.cat([table.reshape(-1), pixels, torch.stack(sums)]).to(torch.float64)


def _result_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype that all of them promote to; inside autocast float32 in place of a half one."""
    given = [tensor for tensor in tensors if tensor is not None]
    dtype = functools.reduce(torch.promote_types, [tensor.dtype for tensor in given])
    if dtype in (torch.float16, torch.bfloat16) and torch.is_autocast_enabled(given[0].device.type):
        return torch.float32
    return dtype


def _compute_dtype(result_dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(result_dtype, torch.float32)
