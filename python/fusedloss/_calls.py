"""From a call to the op: dtype promotion, shapes that mean the same, numbers for words.

What is wrong with a call is not asked here: the op refuses what it cannot read.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from fusedloss import _autograd, _ops, labels
from fusedloss._checks import (
    ABSENT,
    ACTIVATIONS,
    FLOATING_DTYPES,
    HALF_DTYPES,
    INTERSECTIONS,
    LABEL_DTYPES,
    REDUCTIONS,
)


def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float
) -> Tensor:
    _require_kernels(input, target, weight)
    if ignore_index is True or ignore_index is False:
        raise TypeError("cross_entropy: `ignore_index` must be an int, got bool")
    float32_loss = input.dtype in HALF_DTYPES and torch.is_autocast_enabled(input.device.type)
    if target.is_floating_point():
        _require_floating(input, target)
        dtype = torch.promote_types(input.dtype, target.dtype)
        if weight is not None:
            dtype = torch.promote_types(dtype, weight.dtype)
        if dtype == torch.float64:
            input, target = input.to(dtype), target.to(dtype)
        elif target.dtype is not input.dtype and not (target.dtype is torch.float32 and input.dtype in HALF_DTYPES):
            target = target.to(torch.float32)
        float32_loss = float32_loss or dtype is torch.float32
    elif weight is not None and weight.requires_grad:
        raise ValueError("cross_entropy: `weight` must not require a gradient with class indices as `target`")
    elif input.dim() == 1 and target.dim() == 1:
        target = target.reshape(())  # one label in brackets, as torch takes it
    loss: Tensor = _autograd.apply(
        _autograd.CROSS_ENTROPY,
        (input, target, weight),
        (ignore_index, REDUCTIONS[reduction], label_smoothing),
        float32_loss,
    )
    if labels.checked_in_each_call:
        labels.check_call("cross_entropy", input, target, ignore_index)
    return loss


def mse_loss(input: Tensor, target: Tensor, reduction: str, weight: Tensor | None) -> Tensor:
    _require_kernels(input, target, weight)
    if input.dtype is not target.dtype:
        if input.is_complex() or target.is_complex():
            raise TypeError("mse_loss: `input` and `target` must be real")
        if not target.is_floating_point():
            target = target.to(input.dtype)
        elif not input.is_floating_point():
            input = input.to(target.dtype)
    float32_loss = input.dtype in HALF_DTYPES and torch.is_autocast_enabled(input.device.type)
    if input.shape != target.shape:
        return _broadcast_mse_loss(input, target, reduction, weight)
    loss: Tensor = _autograd.apply(_autograd.MSE_LOSS, (input, target, weight), (REDUCTIONS[reduction],), float32_loss)
    return loss


def _broadcast_mse_loss(input: Tensor, target: Tensor, reduction: str, weight: Tensor | None) -> Tensor:
    shape = torch.broadcast_shapes(input.shape, target.shape)
    if not torch.compiler.is_compiling():  # which cannot trace a warning
        warnings.warn(
            f"Using a target size ({target.size()}) that is different to the input size ({input.size()}). "
            "This will likely lead to incorrect results due to broadcasting. "
            "Please ensure they have the same size.",
            stacklevel=5,
        )
    # What is smaller than the result goes in as float32: a broadcast operand has the sum of many gradients, and so
    # is the divisor of a weighted mean. Both are rounded once, at the end.
    given = [tensor.dtype for tensor in (input, target, weight) if tensor is not None]
    dtype = functools.reduce(torch.promote_types, given)
    if dtype in HALF_DTYPES and torch.is_autocast_enabled(input.device.type):
        dtype = torch.float32
    x, y = (
        (t.to(torch.float32) if t.dtype in HALF_DTYPES and t.shape != shape else t).expand(shape)
        for t in (input, target)
    )
    if weight is None:
        return mse_loss(x, y, reduction, None).to(dtype)
    if weight.shape != input.shape:
        raise ValueError("mse_loss: `weight` must have the shape of `input`")
    weight = weight.to(torch.promote_types(dtype, torch.float32))
    loss = mse_loss(x, y, "sum" if reduction == "mean" else reduction, weight.expand(shape))
    # torch divides by the weights as they were given, each counted once.
    return (loss / weight.sum() if reduction == "mean" else loss).to(dtype)


def _require_floating(input: Tensor, target: Tensor) -> None:
    # Before one is converted to the other's dtype: afterwards integers and float8 could be read too.
    if input.dtype not in FLOATING_DTYPES or target.dtype not in FLOATING_DTYPES:
        raise TypeError("logits and soft labels of a dtype that the op does not read")


def _require_kernels(input: Tensor, target: Tensor, weight: Tensor | None) -> None:
    # The ops alone would take meta tensors, for which tracing gave them shapes.
    if not (input.is_cpu and target.is_cpu and (weight is None or weight.is_cpu)):
        device = input.device
        if not _ops.has_kernels(device) or any(t is not None and t.device != device for t in (target, weight)):
            raise ValueError("no kernels for this device, or tensors on different ones")


def segmentation(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    output: int,
    activation: str,
    pixel_weight: Tensor | None,
    ignore_index: int,
    cross_entropy: float = 0.0,
    iou: float = 0.0,
    brier: float = 0.0,
    alpha: float = 1.0,
    beta: float = 1.0,
    label_smoothing: float = 0.0,
    pos_weight: Tensor | None = None,
    classes: Sequence[int] | None = None,
    per_image: bool = False,
    absent: str = "skip",
    smooth: float = 0.0,
    eps: float = 1e-7,
    log: bool = False,
    gamma: float = 1.0,
    intersection: str = "min",
) -> tuple[Tensor, Tensor]:
    """Loss and terms (3,); `output` is a number of _ops.py."""
    _require_kernels(input, target, weight)
    device = input.device
    if not all(w is None or (w.device == device and not w.requires_grad) for w in (weight, pixel_weight, pos_weight)):
        raise ValueError("weights on another device, or that ask for a gradient")
    if _would_be_misread(
        ignore_index, classes, per_image, log, (cross_entropy, iou, brier, alpha, beta, smooth, eps, gamma)
    ):
        raise ValueError("an option that the op would misread")
    if target.is_floating_point():
        _require_floating(input, target)
        if ignore_index >= 0:
            raise ValueError("ignore_index is for class indices")
        if torch.float64 in (input.dtype, target.dtype):
            input, target = input.to(torch.float64), target.to(torch.float64)
    elif target.shape == input.shape:
        target = _mask(target, activation, ignore_index)
    result: tuple[Tensor, Tensor] = _autograd.apply(
        _autograd.SEGMENTATION,
        (input, target, weight, pixel_weight, pos_weight),
        (
            ACTIVATIONS[activation],
            ignore_index,
            output,
            cross_entropy,
            iou,
            brier,
            alpha,
            beta,
            label_smoothing,
            _ops.ALL_CLASSES if classes is None else list(classes),
            per_image,
            ABSENT[absent],
            smooth,
            eps,
            log,
            gamma,
            INTERSECTIONS[intersection],
        ),
        False,
    )
    if labels.checked_in_each_call:
        labels.check_call("segmentation", input, target, ignore_index)
    return result


def _would_be_misread(
    ignore_index: int, classes: Sequence[int] | None, per_image: bool, log: bool, numbers: tuple[float, ...]
) -> bool:
    """Bools are numbers to the op, numbers are bools, and neither no classes nor a class of -1 mean all of them."""
    if type(per_image) is not bool or type(log) is not bool or type(ignore_index) is bool:
        return True
    if any(type(number) is bool for number in numbers):
        return True
    return classes is not None and (
        not isinstance(classes, Sequence)
        or isinstance(classes, (str, bytes))
        or len(classes) == 0
        or any(type(c) is bool or c == -1 for c in classes)
    )


def _mask(target: Tensor, activation: str, ignore_index: int) -> Tensor:
    """A label of input's shape as the kernels read it."""
    if activation == "softmax":
        raise ValueError("softmax has one label a pixel")
    if target.dtype not in (*LABEL_DTYPES, torch.bool):
        raise TypeError("a mask is of bool or an integer dtype")
    if target.shape[1] == 1:
        return target.squeeze(1)  # class indices 0 and 1, so a value may say that a pixel is ignored
    if ignore_index >= 0:
        raise ValueError("ignore_index is for class indices")
    if target.dtype in (torch.bool, torch.uint8):
        return target
    return torch.where((target == 0) | (target == 1), target, 2).to(torch.uint8)  # 2 is refused by the kernel


def bad_mask_value(target: Tensor, ignore_index: int) -> tuple[tuple[int, ...], int]:
    """Position and value of the first number in a mask that is neither 0 nor 1 nor, of one class, ignored."""
    bad = (target != 0) & (target != 1)
    if target.shape[1] == 1:
        bad &= target != ignore_index
    position = tuple(int(i) for i in bad.nonzero()[0])
    return position, int(target[position])
