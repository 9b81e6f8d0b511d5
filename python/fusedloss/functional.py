"""The losses as functions. The docstrings are their specification.

A call that is right pays for no check here: the op refuses what it cannot read, and only then is it worked out, in
``_check_...``, what to tell the user.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
from torch import Tensor

from fusedloss import _autograd

__all__ = ["cross_entropy", "mse_loss"]

_P = ParamSpec("_P")

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_HALF_DTYPES = (torch.float16, torch.bfloat16)
_FLOATING_DTYPES = (torch.float32, torch.float64, *_HALF_DTYPES)
_LABEL_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


def _without_retired(function: Callable[_P, Tensor]) -> Callable[_P, Tensor]:
    """The function, with a word for those who still pass what torch has retired."""

    @functools.wraps(function)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> Tensor:
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
            channels_last, and slices of them along N and C are read where they are; other strides cost one copy.
        target: class indices, (), (N,) or (N, d1, ..., dK), in [0, C) or ``ignore_index``; uint8, int16, int32 or
            int64. Or probabilities of ``input``'s shape in any floating dtype; another dtype than
            ``input``'s (but for float32 with half logits) or another memory format costs one copy.
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
        IndexError: a label that is neither in [0, C) nor ``ignore_index``; names it and its position.

    Note:
        Sums are formed in float32 within a chunk of pixels and in float64 across chunks (float64 inputs: float64
        throughout), in an order fixed by the shape: the same bits on every run and for every number of threads.
        Where the gradient of ``input`` alone is asked for and the loss is one number, the forward writes it at once, in
        the logits' memory format, and the backward hands it over; otherwise 8 bytes a pixel are kept (16 for float64).
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
        _check_cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing)
        return _cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing)
    try:
        return _cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing)
    except IndexError:
        raise
    except Exception:
        _check_cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing)
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
        Each operand is read once forward and once backward, whatever its strides and dtype; where the gradient of
        ``input`` alone is asked for, of one unweighted number, the forward writes it at once and nothing is read again.
        Gradients go to ``input``, ``target`` and ``weight``, and only those asked for are computed; that of a broadcast
        operand is first formed in the broadcast shape. Sums are formed as in :func:`cross_entropy`: the same bits for
        every number of threads.

    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> mse_loss(x, torch.tensor([0.0, 4.0]), weight=torch.tensor([3.0, 1.0]))
    tensor(1.7500, grad_fn=<_FunctionBackward>)
    """
    if torch.compiler.is_compiling():
        _check_mse_loss(input, target, reduction, weight)
        return _mse_loss(input, target, reduction, weight)
    try:
        return _mse_loss(input, target, reduction, weight)
    except Exception:
        _check_mse_loss(input, target, reduction, weight)
        raise


def _cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float
) -> Tensor:
    _require_kernels(input, target, weight)
    if ignore_index is True or ignore_index is False:
        raise TypeError("cross_entropy: `ignore_index` must be an int, got bool")
    float32_loss = input.dtype in _HALF_DTYPES and torch.is_autocast_enabled(input.device.type)
    if target.is_floating_point():
        dtype = torch.promote_types(input.dtype, target.dtype)
        if weight is not None:
            dtype = torch.promote_types(dtype, weight.dtype)
        if dtype == torch.float64:
            input, target = input.to(dtype), target.to(dtype)
        elif target.dtype is not input.dtype and not (target.dtype is torch.float32 and input.dtype in _HALF_DTYPES):
            target = target.to(torch.float32)
        float32_loss = float32_loss or dtype is torch.float32
    elif weight is not None and weight.requires_grad:
        raise ValueError("cross_entropy: `weight` must not require a gradient with class indices as `target`")
    elif input.dim() == 1 and target.dim() == 1:
        target = target.reshape(())  # one label in brackets, as torch takes it
    return _autograd.apply(
        _autograd.CROSS_ENTROPY,
        (input, target, weight),
        (ignore_index, _REDUCTIONS[reduction], label_smoothing),
        float32_loss,
    )


def _mse_loss(input: Tensor, target: Tensor, reduction: str, weight: Tensor | None) -> Tensor:
    _require_kernels(input, target, weight)
    if input.dtype is not target.dtype:
        if input.is_complex() or target.is_complex():
            raise TypeError("mse_loss: `input` and `target` must be real")
        if not target.is_floating_point():
            target = target.to(input.dtype)
        elif not input.is_floating_point():
            input = input.to(target.dtype)
    float32_loss = input.dtype in _HALF_DTYPES and torch.is_autocast_enabled(input.device.type)
    if input.shape != target.shape:
        return _broadcast_mse_loss(input, target, reduction, weight)
    return _autograd.apply(_autograd.MSE_LOSS, (input, target, weight), (_REDUCTIONS[reduction],), float32_loss)


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
    if dtype in _HALF_DTYPES and torch.is_autocast_enabled(input.device.type):
        dtype = torch.float32
    x, y = (
        (t.to(torch.float32) if t.dtype in _HALF_DTYPES and t.shape != shape else t).expand(shape)
        for t in (input, target)
    )
    if weight is None:
        return _mse_loss(x, y, reduction, None).to(dtype)
    if weight.shape != input.shape:
        raise ValueError("mse_loss: `weight` must have the shape of `input`")
    weight = weight.to(torch.promote_types(dtype, torch.float32))
    loss = _mse_loss(x, y, "sum" if reduction == "mean" else reduction, weight.expand(shape))
    # torch divides by the weights as they were given, each counted once.
    return (loss / weight.sum() if reduction == "mean" else loss).to(dtype)


def _require_kernels(input: Tensor, target: Tensor, weight: Tensor | None) -> None:
    # The ops alone would take meta tensors, for which tracing gave them shapes.
    if not (input.is_cpu and target.is_cpu and (weight is None or weight.is_cpu)):
        raise ValueError("no kernels for this device, or tensors on different ones")


# --- what to say of a wrong call --------------------------------------------------------------------------------------


def _check_tensor(name: str, argument: str, value: Any, like: Tensor | None = None) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: `{argument}` must be a Tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise ValueError(
            f"{name}: `{argument}` must be a dense tensor (use .to_dense() or .to_padded_tensor()), got {kind}"
        )
    if value.device.type != "cpu":
        raise ValueError(
            f"{name}: `{argument}` must be on the CPU, the only device that this build has kernels for, "
            f"got {value.device} (torch.nn.functional.{name} takes it)"
        )
    if like is not None and value.device != like.device:
        raise ValueError(f"{name}: `{argument}` must be on input's device, {like.device}, got {value.device}")


def _check_reduction(name: str, reduction: Any) -> None:
    if not isinstance(reduction, str):
        raise TypeError(f"{name}: `reduction` must be 'none', 'mean' or 'sum', got {type(reduction).__name__}")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"{name}: `reduction` must be 'none', 'mean' or 'sum', got {reduction!r}")


def _check_cross_entropy(
    input: Any, target: Any, weight: Any, ignore_index: Any, reduction: Any, label_smoothing: Any
) -> None:
    name = "cross_entropy"
    _check_tensor(name, "input", input)
    _check_tensor(name, "target", target, input)
    _check_reduction(name, reduction)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, (int, torch.SymInt)):
        raise TypeError(f"{name}: `ignore_index` must be an int, got {type(ignore_index).__name__}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"{name}: `ignore_index` must fit into 64 bits, got {ignore_index}")
    if isinstance(label_smoothing, bool) or not isinstance(label_smoothing, (int, float, torch.SymFloat)):
        raise TypeError(f"{name}: `label_smoothing` must be a float, got {type(label_smoothing).__name__}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{name}: `label_smoothing` must be in [0, 1], got {label_smoothing}")
    if input.dtype not in _FLOATING_DTYPES:
        raise TypeError(f"{name}: `input` must be float32, float64, float16 or bfloat16, got {input.dtype}")
    if input.dim() == 0:
        raise ValueError(f"{name}: `input` must have the shape (C,), (N, C) or (N, C, d1, ..., dK), got ()")
    class_dim = 0 if input.dim() == 1 else 1
    classes = input.shape[class_dim]
    pixel_shape = input.shape[:class_dim] + input.shape[class_dim + 1 :]
    if target.dtype in _FLOATING_DTYPES:
        if target.shape != input.shape:
            raise ValueError(
                f"{name}: `target` with probabilities must have the shape of `input`, {tuple(input.shape)}, "
                f"got {tuple(target.shape)} of {target.dtype} (class indices are of an integer dtype)"
            )
        if ignore_index >= 0:
            raise ValueError(
                f"{name}: `ignore_index` must be negative with probabilities as `target`, got {ignore_index}"
            )
    elif target.dtype in _LABEL_DTYPES:
        bracketed = input.dim() == 1 and target.shape == (1,)
        if target.shape != pixel_shape and not bracketed:
            raise ValueError(
                f"{name}: `target` with class indices must have the shape {tuple(pixel_shape)}, for `input` of shape "
                f"{tuple(input.shape)}, got {tuple(target.shape)}"
            )
    else:
        raise TypeError(
            f"{name}: `target` must be class indices (uint8, int16, int32, int64) or probabilities "
            f"(float32, float64, float16, bfloat16), got {target.dtype}"
        )
    if weight is not None:
        _check_tensor(name, "weight", weight, input)
        if weight.dtype not in _FLOATING_DTYPES:
            raise TypeError(f"{name}: `weight` must be float32, float64, float16 or bfloat16, got {weight.dtype}")
        if weight.shape != (classes,):
            raise ValueError(f"{name}: `weight` must have the shape ({classes},), got {tuple(weight.shape)}")
        if weight.requires_grad and target.dtype not in _FLOATING_DTYPES:
            raise ValueError(f"{name}: `weight` must not require a gradient with class indices as `target`")


def _check_mse_loss(input: Any, target: Any, reduction: Any, weight: Any) -> None:
    name = "mse_loss"
    _check_tensor(name, "input", input)
    _check_tensor(name, "target", target, input)
    _check_reduction(name, reduction)
    for argument, value in (("input", input), ("target", target)):
        if value.is_complex() or (value.is_floating_point() and value.dtype not in _FLOATING_DTYPES):
            raise TypeError(f"{name}: `{argument}` must be float32, float64, float16 or bfloat16, got {value.dtype}")
    if not (input.is_floating_point() or target.is_floating_point()):
        raise TypeError(
            f"{name}: `input` or `target` must be of a floating dtype, got {input.dtype} and {target.dtype}"
        )
    if weight is not None and torch.bool in (input.dtype, target.dtype):
        raise TypeError(f"{name}: `input` and `target` must not be bool with a `weight`, as torch cannot subtract them")
    try:
        torch.broadcast_shapes(input.shape, target.shape)
    except RuntimeError:
        raise ValueError(
            f"{name}: `target` must broadcast with `input` of shape {tuple(input.shape)}, got {tuple(target.shape)}"
        ) from None
    if weight is not None:
        _check_tensor(name, "weight", weight, input)
        if weight.dtype not in _FLOATING_DTYPES:
            raise TypeError(f"{name}: `weight` must be float32, float64, float16 or bfloat16, got {weight.dtype}")
        if weight.shape != input.shape:
            raise ValueError(
                f"{name}: `weight` must have the shape of `input`, {tuple(input.shape)}, got {tuple(weight.shape)}"
            )
