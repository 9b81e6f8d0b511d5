"""The losses as functions. The docstrings are their specification.

A call that is right pays for no check here: the op refuses what it cannot read, and only then is it worked out, in
``_checks.py``, what to tell the user.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from fusedloss import _calls, _checks, _distributed, _ops

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

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

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _without_retired(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function, with a word for those who still pass what torch has retired."""

    @functools.wraps(function)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        for argument in ("size_average", "reduce"):
            if argument in kwargs:
                raise TypeError(
                    f"{function.__name__}: `{argument}` is retired: use `reduction` ('none', 'mean' or 'sum')"
                )
        return function(*args, **kwargs)

    return checked


@_without_retired
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy between softmax(input) and labels: :func:`torch.nn.functional.cross_entropy`, in one pass.

    For a pixel with logits z, label y (an index, or C probabilities), class weights w and smoothing e::

        lse   = log sum_c exp(z_c)
        y~_c  = (1 - e) y_c + e / C                  y_c = [c == y] for an index
        loss  = sum_c w_c y~_c (lse - z_c)           0 where the index is ignore_index

        "none": loss    "sum": sum loss    "mean": sum loss / sum w_y     for indices, over those not ignored
                                                   sum loss / pixels      for probabilities

    Args:
        input: logits, (C,), (N, C) or (N, C, d1, ..., dK); float32, float64, float16 or bfloat16. Contiguous,
            channels_last, and slices of them along N, C and d1 are read where they are; other strides cost one copy.
        target: class indices, (), (N,) or (N, d1, ..., dK), in [0, C) or ``ignore_index``; uint8, int16, int32 or
            int64; any that are not contiguous cost a copy of their size. Or probabilities of ``input``'s shape in any
            floating dtype, contiguous or channels_last beside either; another dtype than ``input``'s (but for float32
            with half logits) costs one copy; so does another memory format on CUDA and with more than 192 classes, and
            a contiguous target beside channels_last images of less than 128 pixels.
        weight: factor of each class, (C,), any floating dtype.
        ignore_index: a label that adds exactly nothing to value and gradient, whatever the logits there hold. It is
            compared after widening (-100 never equals a uint8 label) and may lie inside [0, C).
        reduction: "none", "mean" or "sum".
        label_smoothing: share of the label that is spread evenly over the classes, in [0, 1].

    Returns:
        A scalar, or with "none" a tensor of the shape that index labels have. Its dtype is ``input``'s; with
        probabilities the one that all arguments promote to; inside autocast float32 for half inputs. No pixel, or none
        that is not ignored: NaN for "mean", 0 for "sum".

    Raises:
        ValueError: a wrong shape, option or mix of devices.
        TypeError: a wrong type or dtype.
        IndexError: a label that is neither in [0, C) nor ``ignore_index``; names it and its position. On CUDA the
            pixel's value and gradient are NaN instead, and :func:`fusedloss.check_labels` raises.

    Note:
        Sums are formed in float32 within a chunk of pixels and in float64 across chunks (float64 inputs: float64
        throughout), in an order fixed by the shape: the same bits on every run and for every number of threads.
        On the CPU, where the gradient of ``input`` alone is asked for and the loss is one number, the forward writes it
        at once, in the logits' memory format, and the backward hands it over; otherwise, and on CUDA, 8 bytes a pixel
        are kept (16 for float64).
        As everywhere in autograd, ``input`` must not be changed in place between forward and backward.
        Double backward, forward mode and the transforms of :mod:`torch.func` run the formula of
        :func:`fusedloss.reference.cross_entropy`.

    Source: Goodfellow, Bengio and Courville, Deep Learning (2016), 6.2.2.3; label smoothing: Szegedy et al.,
    Rethinking the Inception Architecture (2016), section 7.

    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]], requires_grad=True)
    >>> loss = cross_entropy(logits, torch.tensor([0, 255], dtype=torch.uint8), ignore_index=255)
    >>> loss
    tensor(0.1269, grad_fn=<_FunctionBackward>)
    >>> loss.backward()
    >>> logits.grad
    tensor([[-0.1192,  0.1192],
            [ 0.0000,  0.0000]])
    """
    if torch.compiler.is_compiling():
        _checks.check_cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing)
        return _calls.cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing)
    try:
        return _calls.cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing)
    except IndexError:
        raise
    except Exception:
        _checks.check_cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing)
        raise


@_without_retired
def mse_loss(input: Tensor, target: Tensor, *, reduction: str = "mean", weight: Tensor | None = None) -> Tensor:
    """Squared difference of input and target: :func:`torch.nn.functional.mse_loss`, in one pass.

    With elements x, y and weights w::

        loss  = w (x - y)^2

        "none": loss    "sum": sum loss    "mean": sum loss / number of elements
                                                   sum loss / sum w           if weight is given

    Args:
        input: any shape; float32, float64, float16 or bfloat16. One of ``input`` and ``target`` may also be of an
            integer dtype, which costs a copy.
        target: a shape that broadcasts with ``input``'s (with a warning where they differ, as in PyTorch).
        reduction: "none", "mean" or "sum".
        weight: factor of each element, of ``input``'s shape, any floating dtype.

    Returns:
        A scalar, or with "none" a tensor of the broadcast shape, in the dtype that all arguments promote to; inside
        autocast float32 in place of a half dtype. No element: NaN for "mean", 0 for "sum".

    Raises:
        ValueError: shapes that do not broadcast, a wrong option or mix of devices.
        TypeError: a wrong type or dtype.

    Note:
        Each operand is read once forward and once backward, whatever its strides and dtype; on the CPU, where the
        gradient of ``input`` alone is asked for, of one unweighted number, the forward writes it at once and nothing is
        read again.
        Gradients go to ``input``, ``target`` and ``weight``, and only those asked for are computed; that of a broadcast
        operand is first formed in the broadcast shape. Sums are formed as in :func:`cross_entropy`: the same bits for
        every number of threads.

    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> mse_loss(x, torch.tensor([0.0, 4.0]), weight=torch.tensor([3.0, 1.0]))
    tensor(1.7500, grad_fn=<_FunctionBackward>)
    """
    if torch.compiler.is_compiling():
        _checks.check_mse_loss(input, target, reduction, weight)
        return _calls.mse_loss(input, target, reduction, weight)
    try:
        return _calls.mse_loss(input, target, reduction, weight)
    except Exception:
        _checks.check_mse_loss(input, target, reduction, weight)
        raise


@_without_retired
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
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """One minus the soft intersection over union (Jaccard index) of each class, from logits, in one pass.

    For pixels with probabilities p, labels y and pixel weights m (0 where ignored), of each class over a group of
    pixels, which is the batch or an image::

        I = sum m min(p, y)    P = sum m p    T = sum m y
        score = (I + smooth) / max(P + T - I + smooth, eps)
        loss  = max(1 - score, 0)^gamma          or, with log, max(-log(max(score, eps)), 0)^gamma

        "none": loss of each group and class, (G, classes), 0 where a class does not count
        "sum":  sum of w loss over groups and the classes that count
        "mean": mean, over the groups in which a class counts, of sum w loss / sum w over the classes that count

    The minimum makes the loss right for soft labels too: it is 0 exactly where p = y.

    Args:
        input: logits, (N, C) or (N, C, d1, ..., dK); float32, float64, float16 or bfloat16. Contiguous, channels_last,
            and slices of them along N, C and d1 are read where they are; other strides cost a copy, forward and again
            backward.
        target: class indices, (N,) or (N, d1, ..., dK), in [0, C) or ``ignore_index``; uint8, int16, int32 or int64
            (any that are not contiguous cost a copy of their size). Or probabilities of ``input``'s shape in any
            floating dtype, contiguous or channels_last beside either (float64 beside another ``input`` costs a copy, as
            does another memory format on CUDA, and a contiguous target beside channels_last images of less than 128
            pixels). With "sigmoid" and "none" also a mask of ``input``'s shape, of bool or an integer dtype, each class
            with a 0 or 1 of its own; and for C = 1 class indices are 0, background, or 1.
        weight: factor of each class in the mean over classes, (C,), any floating dtype.
        activation: "softmax" over the classes, "sigmoid" of each, or "none" for probabilities as ``input``.
        pixel_weight: factor of each pixel, (N, d1, ..., dK); any floating dtype, or bool: False ignores. One that is
            not contiguous costs a copy of its size.
        ignore_index: a class index that adds exactly nothing to value and gradient, whatever the logits there hold. It
            is compared after widening (-100 never equals a uint8 label) and may lie inside [0, C). With a label for
            each class it has to be negative: use ``pixel_weight``.
        classes: the different classes to count, in the order of the result of "none"; None for all. On CUDA ``input``
            has at most 1024 classes where some are chosen.
        per_image: each image is a group of its own, instead of the whole batch being one.
        absent: a class that no pixel of its group is labelled with (T = 0) does not count ("skip"), counts by the
            formula ("count"), or counts with loss 0 ("zero"). In a group whose pixels are all ignored no class counts.
        smooth: added to numerator and denominator, 0 or more, in pixels.
        eps: least denominator, and with ``log`` least score; more than 0.
        log: minus the logarithm of the score instead of one minus the score.
        gamma: power of the loss of a class, more than 0; the derivative at a loss of 0 is 0 unless it is 1.
        intersection: "min", or "product": sum m p y, which other libraries use and which is the same for hard labels.
        reduction: "none", "mean" or "sum".
        process_group: of :mod:`torch.distributed`: the batch is that of all its processes together, each of which calls
            this with its own images (any number of them). The sums I, P and T are exchanged, nothing else. The loss is
            the same on each process; gradients are multiplied by the number of processes, so that averaged, as by
            DistributedDataParallel and FSDP, they are those of one process with the whole batch. None: this process's
            images alone.

    Returns:
        A scalar, or (G, classes) with "none", where G is N with ``per_image`` and else 1; of float64 for float64 logits
        or labels, else float32. 0 where nothing counts.

    Raises:
        ValueError: a wrong shape, option or mix of devices; a weight that requires a gradient.
        TypeError: a wrong type or dtype.
        RuntimeError: ``process_group`` under a transform of :mod:`torch.func`, in forward mode or a double backward.
        IndexError: a label that is neither in its range nor ``ignore_index``; names it and its position. On CUDA the
            pixel's value and gradient are NaN instead, and :func:`fusedloss.check_labels` raises.

    Note:
        Gradients go to ``input`` and to soft labels; at p = y the derivative of the minimum is half for each. Sums are
        formed in float32 within a chunk of pixels and in float64 across chunks (counts of pixels are exact; float64
        inputs: float64 throughout), in an order fixed by the shape: the same bits on every run and for every number of
        threads. The backward keeps 8 bytes a pixel under softmax (16 for float64), nothing a pixel under the others.
        Double backward, forward mode and the transforms of :mod:`torch.func` run the formula of
        :func:`fusedloss.reference.soft_iou_loss`.

    Source: Rahman and Wang, Optimizing Intersection-Over-Union in Deep Neural Networks for Image Segmentation (2016);
    the minimum: Wang et al., Jaccard Metric Losses: Optimizing the Jaccard Index with Soft Labels (2023).

    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]], requires_grad=True)
    >>> loss = soft_iou_loss(logits, torch.tensor([0, 1]))
    >>> loss
    tensor(0.4830, grad_fn=<_FunctionBackward>)
    >>> soft_iou_loss(logits.detach(), torch.tensor([0, 1]), reduction="none")
    tensor([[0.4128, 0.5533]])
    """
    options = {
        "activation": activation,
        "pixel_weight": pixel_weight,
        "ignore_index": ignore_index,
        "classes": classes,
        "per_image": per_image,
        "absent": absent,
        "smooth": smooth,
        "eps": eps,
        "log": log,
        "gamma": gamma,
        "intersection": intersection,
        "reduction": reduction,
        "iou": 1.0,
        "process_group": process_group,
    }
    return _segmentation("soft_iou_loss", input, target, weight, options)[0]


@_without_retired
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
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """One minus the soft Dice score (F1) of each class, from logits, in one pass.

    As :func:`soft_iou_loss`, with::

        score = (I + smooth) / max((P + T) / 2 + smooth, eps)

    Args:
        input: as all other arguments, those of :func:`soft_iou_loss`. ``smooth`` and ``eps`` are on the scale of I: a
            library that computes (2 I + s) / (P + T + s) has twice as much of both.

    Returns:
        As :func:`soft_iou_loss`.

    Raises:
        ValueError, TypeError, IndexError: as :func:`soft_iou_loss`.

    Note:
        As :func:`soft_iou_loss`.

    Source: Milletari, Navab and Ahmadi, V-Net (2016), with P and T in place of the sums of squares; the minimum: Wang
    et al., Dice Semimetric Losses: Optimizing the Dice Score with Soft Labels (2023).

    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    >>> dice_loss(logits, torch.tensor([0, 1]))
    tensor(0.3212)
    """
    options = {
        "activation": activation,
        "pixel_weight": pixel_weight,
        "ignore_index": ignore_index,
        "classes": classes,
        "per_image": per_image,
        "absent": absent,
        "smooth": smooth,
        "eps": eps,
        "log": log,
        "gamma": gamma,
        "intersection": intersection,
        "reduction": reduction,
        "iou": 1.0,
        "alpha": 0.5,
        "beta": 0.5,
        "process_group": process_group,
    }
    return _segmentation("dice_loss", input, target, weight, options)[0]


@_without_retired
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
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """One minus the Tversky index of each class, from logits, in one pass: overlap with two prices for two errors.

    As :func:`soft_iou_loss`, with FP = P - I (predicted too much) and FN = T - I (too little)::

        score = (I + smooth) / max(I + alpha FP + beta FN + smooth, eps)

    alpha = beta = 1 is :func:`soft_iou_loss`, alpha = beta = 1/2 is :func:`dice_loss`.

    Args:
        alpha: price of what is predicted too much, 0 or more.
        beta: price of what is predicted too little, 0 or more.
        input: as all other arguments, those of :func:`soft_iou_loss`.

    Returns:
        As :func:`soft_iou_loss`.

    Raises:
        ValueError, TypeError, IndexError: as :func:`soft_iou_loss`.

    Note:
        As :func:`soft_iou_loss`.

    Source: Salehi, Erdogmus and Gholipour, Tversky Loss Function for Image Segmentation (2017); gamma: Abraham and
    Khan, A Novel Focal Tversky Loss Function (2018), whose exponent is 1 / gamma.

    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    >>> tversky_loss(logits, torch.tensor([0, 1]), alpha=0.3, beta=0.7, reduction="none")
    tensor([[0.2095, 0.4355]])
    """
    options = {
        "activation": activation,
        "pixel_weight": pixel_weight,
        "ignore_index": ignore_index,
        "classes": classes,
        "per_image": per_image,
        "absent": absent,
        "smooth": smooth,
        "eps": eps,
        "log": log,
        "gamma": gamma,
        "intersection": intersection,
        "alpha": alpha,
        "beta": beta,
        "reduction": reduction,
        "iou": 1.0,
        "process_group": process_group,
    }
    return _segmentation("tversky_loss", input, target, weight, options)[0]


@_without_retired
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
    """Squared difference of probabilities and labels, summed over the classes (Brier score), from logits, in one pass.

    For a pixel with probabilities p, labels y, pixel weight m (0 where ignored) and class weights w::

        loss = m sum_c w_c (p_c - y_c)^2

        "none": loss, (N, d1, ..., dK)    "sum": sum loss    "mean": sum loss / sum m

    This is C times the mean squared error of the probabilities.

    Args:
        input: as ``target``, ``activation``, ``pixel_weight`` and ``ignore_index``, those of :func:`soft_iou_loss`.
        weight: factor of each class, (C,), any floating dtype.
        reduction: "none", "mean" or "sum".

    Returns:
        A scalar, or (N, d1, ..., dK) with "none"; of float64 for float64 logits or labels, else float32. 0 where every
        pixel is ignored.

    Raises:
        ValueError, TypeError, IndexError: as :func:`soft_iou_loss`.

    Note:
        As :func:`soft_iou_loss`.

    Source: Brier, Verification of Forecasts Expressed in Terms of Probability (1950).

    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    >>> brier_loss(logits, torch.tensor([0, 1]), reduction="none")
    tensor([0.0284, 0.5000])
    """
    options = {
        "activation": activation,
        "pixel_weight": pixel_weight,
        "ignore_index": ignore_index,
        "reduction": reduction,
        "brier": 1.0,
    }
    return _segmentation("brier_loss", input, target, weight, options)[0]


@_without_retired
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
    process_group: ProcessGroup | None = None,
) -> Any:
    """Weighted sum of cross-entropy, an overlap loss and the Brier loss: one pass over the logits for all of them.

    ``cross_entropy * CE + iou * overlap + brier * Brier``, where overlap is :func:`tversky_loss` (with alpha = beta = 1
    the soft IoU loss), Brier is :func:`brier_loss`, and, with pixel weights m (0 where ignored), class weights w and
    smoothed labels y~ = (1 - e) y + e / C::

        softmax  CE = sum m sum_c w_c y~_c (lse - z_c)  /  sum m w_y    (sum m for probabilities as labels)
        sigmoid  CE = sum m / C sum_c w_c (pos_weight_c y~_c softplus(-z_c) + (1 - y~_c) softplus(z_c))  /  sum m

    A term with factor 0 is not computed.

    Args:
        input: as ``target``, ``activation``, ``pixel_weight`` and ``ignore_index``, those of :func:`soft_iou_loss`.
            With "none" there are no logits, and ``cross_entropy`` has to be 0.
        weight: factor of each class in all three terms, (C,), any floating dtype.
        cross_entropy: factor of the cross-entropy.
        iou: factor of the overlap loss.
        brier: factor of the Brier loss.
        alpha: price of what is predicted too much, in the overlap alone. 1/2 and 1/2 make it the Dice loss.
        beta: price of what is predicted too little, in the overlap alone.
        label_smoothing: share of the label that is spread evenly over the classes, in [0, 1]; in the cross-entropy
            alone.
        pos_weight: factor of the positive part, (C,), any floating dtype; in the cross-entropy of "sigmoid" alone.
        classes: as ``per_image``, ``absent``, ``smooth``, ``eps``, ``log``, ``gamma`` and ``intersection``, those of
            :func:`soft_iou_loss`; of the overlap alone.
        return_terms: also return the terms.
        process_group: that of :func:`soft_iou_loss`, for all three terms: their divisors too are those of the whole
            batch.

    Returns:
        A scalar; of float64 for float64 logits or labels, else float32. With ``return_terms`` a tuple of it and of a
        dictionary with those of "cross_entropy", "iou" and "brier" that were computed: the terms before their factors,
        detached, for logging. A term without a pixel that counts is 0.

    Raises:
        ValueError, TypeError, IndexError: as :func:`soft_iou_loss`.

    Note:
        As :func:`soft_iou_loss`. Peak memory is the gradient, 8 bytes a pixel (16 for float64), and at most 4 MB.

    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]], requires_grad=True)
    >>> loss, terms = segmentation_loss(logits, torch.tensor([0, 1]), brier=0.5, return_terms=True)
    >>> loss
    tensor(1.0252, grad_fn=<_FunctionBackward>)
    >>> terms
    {'cross_entropy': tensor(0.4100), 'iou': tensor(0.4830), 'brier': tensor(0.2642)}
    """
    options = {
        "cross_entropy": cross_entropy,
        "iou": iou,
        "brier": brier,
        "alpha": alpha,
        "beta": beta,
        "label_smoothing": label_smoothing,
        "pos_weight": pos_weight,
        "activation": activation,
        "pixel_weight": pixel_weight,
        "ignore_index": ignore_index,
        "classes": classes,
        "per_image": per_image,
        "absent": absent,
        "smooth": smooth,
        "eps": eps,
        "log": log,
        "gamma": gamma,
        "intersection": intersection,
        "return_terms": return_terms,
        "process_group": process_group,
    }
    loss, terms = _segmentation("segmentation_loss", input, target, weight, options)
    if not return_terms:
        return loss
    factors = {"cross_entropy": cross_entropy, "iou": iou, "brier": brier}
    return loss, {name: terms[i] for i, (name, factor) in enumerate(factors.items()) if factor != 0.0}


def overlap_statistics(
    input: Tensor,
    target: Tensor,
    *,
    activation: str = "softmax",
    pixel_weight: Tensor | None = None,
    ignore_index: int = -100,
    per_image: bool = False,
    intersection: str = "min",
    process_group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What every overlap score is made of: intersection, predicted and labelled area of each class, in one pass.

    For pixels with probabilities p, labels y and pixel weights m (0 where ignored), over a group of pixels, which is
    the batch or an image::

        I = sum m min(p, y)    P = sum m p    T = sum m y        (I = sum m p y for intersection="product")

    They are differentiable, so that a formula of one's own can be written on them.

    Args:
        input: as all other arguments, those of :func:`soft_iou_loss`.
        process_group: that of :func:`soft_iou_loss`; without ``per_image``.

    Returns:
        I, P and T, each (G, C): G is the number of images with ``per_image``, else 1. Of float64 for float64 logits or
        labels, else float32.

    Raises:
        ValueError, TypeError, IndexError: as :func:`soft_iou_loss`.

    Note:
        As :func:`soft_iou_loss`.

    The generalised Dice loss (Sudre et al., 2017), which weighs classes by the inverse square of their area:

    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 0.0], [1.0, 0.0]], requires_grad=True)
    >>> both, predicted, labelled = overlap_statistics(logits, torch.tensor([0, 1, 0]))
    >>> class_weight = 1 / labelled.clamp_min(1) ** 2
    >>> loss = 1 - 2 * (class_weight * both).sum() / (class_weight * (predicted + labelled)).sum()
    >>> loss
    tensor(0.3807, grad_fn=<RsubBackward1>)
    >>> loss.backward()
    """
    options = {
        "activation": activation,
        "pixel_weight": pixel_weight,
        "ignore_index": ignore_index,
        "per_image": per_image,
        "intersection": intersection,
        "process_group": process_group,
    }
    loss, _ = _segmentation("overlap_statistics", input, target, None, options)
    intersected, predicted, labelled = loss.unbind(0)
    return intersected, predicted, labelled


def _segmentation(
    name: str, input: Tensor, target: Tensor, weight: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Loss and terms."""
    if torch.compiler.is_compiling():
        _checks.check_segmentation(name, input, target, weight, options)
    passed = {key: value for key, value in options.items() if key not in ("reduction", "return_terms", "process_group")}
    process_group = options.get("process_group")
    try:
        if type(options.get("return_terms", False)) is not bool:
            raise TypeError("return_terms is a bool")
        if name == "overlap_statistics":
            output = _ops.STATISTICS
        else:
            output = _checks.REDUCTIONS[options.get("reduction", "mean")]
        if process_group is not None:
            return _distributed.segmentation(
                input, target, weight, process_group=process_group, output=output, **passed
            )
        return _calls.segmentation(input, target, weight, output=output, **passed)
    except IndexError as error:
        if str(error).startswith("check_labels:"):
            raise  # about another call
        if target.shape == input.shape:
            ignore_index = options["ignore_index"]
            position, value = _calls.bad_mask_value(target, ignore_index)
            wanted = f"0, 1 or ignore_index ({ignore_index})" if input.shape[1] == 1 else "0 or 1"
            raise IndexError(f"{name}: target at {position} must be {wanted} in a mask, got {value}") from None
        raise IndexError(str(error).replace("segmentation:", f"{name}:", 1)) from None
    except Exception as error:
        _checks.check_segmentation(name, input, target, weight, options)
        if type(error) in (ValueError, RuntimeError) and str(error).startswith("segmentation:"):
            raise type(error)(str(error).replace("segmentation:", f"{name}:", 1)) from None
        raise
