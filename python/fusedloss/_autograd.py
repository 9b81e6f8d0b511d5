"""One wrapper that makes every loss differentiable, everywhere in PyTorch.

A call comes in by one of three doors, asked in this order:

1. A transform of :mod:`torch.func` or a forward-mode level is active: the reference formula runs, in plain PyTorch
   operations that every transform knows. An op of ours would be silently wrong there (its tangent would be zero).
2. torch.compile or torch.export is tracing: the public op, for which this file registers a derivative, becomes one
   node.
3. Otherwise: an autograd Function on the private op. Its backward runs the hand-written kernel, or, where a graph of
   the backward is wanted (``create_graph=True``), differentiates the reference formula.

A loss is described by a :class:`Loss`; nothing here knows which one it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from fusedloss import _ops, reference

_transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active

Tensors = tuple[Tensor | None, ...]


@dataclass(frozen=True, eq=False)
class Loss:
    """What the wrapper has to know of a loss.

    tensors: its tensor arguments in the order of the op's schema. options: those that are not tensors, likewise.

    Attributes:
        name: of the public function.
        traced: the public op ``(*tensors, *options, float32_loss, save_statistics) -> (loss, statistics)``.
        forward: the private op with the same signature.
        backward: ``(grad, *tensors, statistics, *options, operand) -> gradient of tensors[operand]``.
        reference: ``(*tensors, *options) -> loss`` in plain PyTorch operations.
    """

    name: str
    traced: Callable[..., tuple[Tensor, Tensor]]
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., Tensor]
    reference: Callable[..., Tensor]


def apply(loss: Loss, tensors: Tensors, options: tuple[Any, ...], float32_loss: bool) -> Tensor:
    """The value of `loss`, differentiable with respect to each of `tensors` that requires a gradient.

    float32_loss: two-byte inputs give a float32 result (inside autocast).
    """
    if _transforms_active() or forward_ad._current_level >= 0:
        return loss.reference(*tensors, *options)
    if torch.compiler.is_compiling():
        return loss.traced(*tensors, *options, float32_loss, True)[0]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _apply_function(loss, options, float32_loss, *tensors)
    return loss.forward(*tensors, *options, float32_loss, False)[0]


class _Function(torch.autograd.Function):
    # `forward(ctx, ...)` instead of `setup_context`: half the time per call, and no transform comes through this door.
    @staticmethod
    def forward(ctx: Any, loss: Loss, options: tuple[Any, ...], float32_loss: bool, *tensors: Tensor | None) -> Tensor:
        result, statistics = loss.forward(*tensors, *options, float32_loss, True)
        ctx.save_for_backward(*tensors, statistics)
        ctx.loss = loss
        ctx.options = options
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        *tensors, statistics = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3:]
        return None, None, None, *_gradients(ctx.loss, ctx.options, tuple(tensors), statistics, grad, wanted)


_apply_function: Callable[..., Tensor] = _Function.apply


def _gradients(
    loss: Loss, options: tuple[Any, ...], tensors: Tensors, statistics: Tensor, grad: Tensor, wanted: tuple[bool, ...]
) -> list[Tensor | None]:
    """Gradients of the tensors that are wanted, None for the others."""
    if torch.is_grad_enabled():
        return _differentiable_gradients(loss, options, tensors, grad, wanted)
    return [
        loss.backward(grad, *tensors, statistics, *options, operand) if needed else None
        for operand, needed in enumerate(wanted)
    ]


def _differentiable_gradients(
    loss: Loss, options: tuple[Any, ...], tensors: Tensors, grad: Tensor, wanted: tuple[bool, ...]
) -> list[Tensor | None]:
    """The same, as a graph that can be differentiated again: for ``create_graph=True``."""
    # Views, so that a target that was computed from the input does not lend the input its own gradient.
    leaves = [t if t is None or not needed else t.view_as(t) for t, needed in zip(tensors, wanted, strict=True)]
    result = loss.reference(*leaves, *options)
    operands = [leaf for leaf, needed in zip(leaves, wanted, strict=True) if leaf is not None and needed]
    found = iter(torch.autograd.grad(result, operands, grad.to(result.dtype), create_graph=True))
    return [next(found) if needed else None for needed in wanted]


def _register_derivative(loss: Loss, tensor_count: int) -> None:
    """Gives the public op the derivative that torch.compile and torch.export trace."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)  # or `statistics` would get a gradient of zeros as large as itself
        ctx.save_for_backward(*inputs[:tensor_count], output[1])
        ctx.options = inputs[tensor_count:-2]

    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
        *tensors, statistics = ctx.saved_tensors
        others = (None,) * (len(ctx.options) + 2)
        if grad is None:
            return (None,) * tensor_count + others
        wanted = ctx.needs_input_grad[:tensor_count]
        return *_gradients(loss, ctx.options, tuple(tensors), statistics, grad, wanted), *others

    torch.library.register_autograd(f"fusedloss::{loss.name}", backward, setup_context=setup_context)


_REDUCTIONS = ("none", "mean", "sum")


def _reference_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: int, label_smoothing: float
) -> Tensor:
    return reference.cross_entropy(
        input,
        target,
        weight,
        ignore_index=ignore_index,
        reduction=_REDUCTIONS[reduction],
        label_smoothing=label_smoothing,
    )


def _reference_mse_loss(input: Tensor, target: Tensor, weight: Tensor | None, reduction: int) -> Tensor:
    return reference.mse_loss(input, target, reduction=_REDUCTIONS[reduction], weight=weight)


def _cross_entropy_backward(
    grad: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    operand: int,
) -> Tensor:
    if operand != 2:
        return _ops.cross_entropy_backward(
            grad, input, target, weight, statistics, ignore_index, reduction, label_smoothing, operand
        )
    # The gradient of the class weights (with probabilities as target): a sum per class, wanted so seldom that it has no
    # kernel. dw_c = sum g y~_c (lse - z_c).
    assert weight is not None
    class_dim = 0 if input.dim() == 1 else 1
    classes = input.shape[class_dim]
    dtype = torch.promote_types(torch.promote_types(weight.dtype, input.dtype), torch.float32)
    label = (1.0 - label_smoothing) * target.to(dtype) + label_smoothing / classes
    g = grad.to(dtype)
    if reduction == _ops.NONE:
        g = g.unsqueeze(class_dim)
    elif reduction == _ops.MEAN:
        g = g * classes / input.numel()
    share = -g * label * torch.log_softmax(input.to(dtype), dim=class_dim)
    gradient: Tensor = share.movedim(class_dim, 0).reshape(classes, -1).sum(dim=1).to(weight.dtype)
    return gradient


CROSS_ENTROPY = Loss(
    "cross_entropy",
    _ops.cross_entropy,
    _ops.cross_entropy_forward,
    _cross_entropy_backward,
    _reference_cross_entropy,
)
MSE_LOSS = Loss("mse_loss", _ops.mse_loss, _ops.mse_loss_forward, _ops.mse_loss_backward, _reference_mse_loss)

for _loss in (CROSS_ENTROPY, MSE_LOSS):
    _register_derivative(_loss, tensor_count=3)
