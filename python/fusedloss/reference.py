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

import torch
from torch import Tensor

__all__ = ["cross_entropy", "mse_loss"]

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


def _result_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype that all of them promote to; inside autocast float32 in place of a half one."""
    given = [tensor for tensor in tensors if tensor is not None]
    dtype = functools.reduce(torch.promote_types, [tensor.dtype for tensor in given])
    if dtype in (torch.float16, torch.bfloat16) and torch.is_autocast_enabled(given[0].device.type):
        return torch.float32
    return dtype


def _compute_dtype(result_dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(result_dtype, torch.float32)
