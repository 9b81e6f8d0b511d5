"""One wrapper that makes every loss differentiable, everywhere in PyTorch.

A call comes in by one of three doors, asked in this order:

1. A transform of :mod:`torch.func` or a forward-mode level is active: the reference formula runs, in plain PyTorch
   operations that every transform knows. An op of ours would be silently wrong there (its tangent would be zero).
2. torch.compile or torch.export is tracing: the public op becomes one node. Whatever is done to that node later asks
   the doors again (``_kernel_of_public_op``).
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
_is_legacy_batched: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor
_unwrap_if_dead: Callable[[Tensor], Tensor] = torch._C._functorch.unwrap_if_dead

Tensors = tuple[Tensor | None, ...]
# A loss, or with it what is given beside it and has no derivative.
Value = Tensor | tuple[Tensor, Tensor]
# What _Function is told beside the tensors: loss, options, float32_loss, and whether this is an eager call. In one
# argument, because autograd looks at each: 0.7 us of 24 for a small input.
_Told = tuple["Loss", tuple[Any, ...], bool, bool]
_ONLY_INPUT = (False, True, False, False)  # of its arguments (_Told and three tensors), requires a gradient


@dataclass(frozen=True, eq=False)
class Loss:
    """What the wrapper has to know of a loss.

    tensors: its tensor arguments (or None) in the order of the op's schema. options: those that are not tensors,
    likewise. value: the loss, or a tuple of the loss and what has no derivative.

    Attributes:
        name: of the public op.
        tensor_count: how many tensors there are.
        public: the op ``(*tensors, *options, float32_loss) -> value``, with a derivative.
        forward: the private op ``(*tensors, *options, float32_loss, keep) -> (value, what keep asks for)``.
        rescale: ``(gradient, grad, *tensors, *options)``: turns the gradient of tensors[0] that a forward kept, for an
            incoming gradient of 1, into the one for `grad`, in place.
        backward: ``(grad, *tensors, statistics, *options, operand) -> gradient of tensors[operand]``.
        can_keep_gradient: whether the forward can, for these ``(tensors, options)``.
        reference: ``(*tensors, *options) -> value`` in plain PyTorch operations.
    """

    name: str
    tensor_count: int
    public: Callable[..., Any]
    forward: Callable[..., tuple[Value, Tensor]]
    rescale: Callable[..., None]
    backward: Callable[..., Tensor]
    can_keep_gradient: Callable[[Tensors, tuple[Any, ...]], bool]
    reference: Callable[..., Any]


def apply(loss: Loss, tensors: Tensors, options: tuple[Any, ...], float32_loss: bool) -> Any:
    """The value of `loss`, differentiable with respect to each of `tensors` that requires a gradient.

    float32_loss: two-byte inputs give a float32 result (inside autocast).
    """
    if is_transformed():
        return loss.reference(*tensors, *options)
    if torch.compiler.is_compiling():
        return loss.public(*tensors, *options, float32_loss)
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return _apply_function((loss, options, float32_loss, True), tensors)
    if _is_traced():
        # make_fx or jit.trace: what they record is differentiated later, and the private op has no derivative.
        return loss.public(*tensors, *options, float32_loss)
    return loss.forward(*tensors, *options, float32_loss, _ops.KEEP_NOTHING)[0]


def is_transformed() -> bool:
    """Whether a transform of torch.func or a forward-mode level is active."""
    return _transforms_active() or forward_ad._current_level >= 0


def _is_traced() -> bool:
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._get_tracing_state() is not None


def _saved_tensors_are_hooked() -> bool:
    # Non-reentrant checkpointing, save_on_cpu: what is kept beside the saved tensors would escape them.
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _is_plain_one(grad: Tensor) -> bool:
    """Whether the number can be read here and now, and is 1, as of loss.backward(): a tenth of the time of an op."""
    # What is traced is done for other numbers too, and dynamo, of compiled autograd, cannot read one.
    traced = torch.compiler.is_compiling() or _is_traced()
    return not traced and type(grad) is Tensor and grad.is_cpu and grad.item() == 1.0


class _Function(torch.autograd.Function):
    """Two ways to the gradient of the input.

    On the CPU, where it is the only one asked for, and the loss one number, the forward writes it at once, for an
    incoming gradient of 1: one read of the logits less. That is the usual call, ``loss(...).backward()``. For another
    one it is written again, which costs what the other way costs. Otherwise, where hooks wait for what is saved, and
    where a tracer looks on (which would copy what is written in place), the forward keeps statistics and the backward
    reads the input again.
    """

    # `forward(ctx, ...)` instead of `setup_context`: half the time per call, and no transform comes through this door.
    @staticmethod
    def forward(ctx: Any, told: _Told, *tensors: Tensor | None) -> Value:
        loss, options, float32_loss, eager = told
        ctx.loss = loss
        ctx.options = options
        # Or each backward fills zeros for a second result, which has no gradient: on a GPU one launch more.
        ctx.set_materialize_grads(False)
        if (
            eager
            and ctx.needs_input_grad == _ONLY_INPUT
            and loss.can_keep_gradient(tensors, options)
            and not _saved_tensors_are_hooked()
        ):
            result, ctx.gradient = loss.forward(*tensors, *options, float32_loss, _ops.KEEP_GRADIENT)
            ctx.save_for_backward(*tensors)
        else:
            result, statistics = loss.forward(*tensors, *options, float32_loss, _ops.KEEP_STATISTICS)
            ctx.save_for_backward(*tensors, statistics)
        if type(result) is tuple:
            ctx.mark_non_differentiable(result[1])
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *others: Tensor | None) -> tuple[Any, ...]:
        if grad is None:  # nothing comes, so nothing goes on, as with torch's own losses
            return (None,) * len(ctx.needs_input_grad)
        loss, options, saved = ctx.loss, ctx.options, ctx.saved_tensors
        # A transform or a tangent may also meet a graph that was built before: in the incoming gradient.
        if torch.is_grad_enabled() or is_transformed():
            ctx.gradient = None
            tensors, wanted = saved[: loss.tensor_count], ctx.needs_input_grad[1:]
            return None, *_formula_gradients(loss, options, tensors, grad, wanted)
        if len(saved) == loss.tensor_count:
            if not _is_legacy_batched(grad):
                # Handed over, not lent: what becomes .grad must not be changed by a second backward.
                gradient, ctx.gradient = ctx.gradient, None
                if gradient is None:
                    gradient = loss.forward(*saved, *options, False, _ops.KEEP_GRADIENT)[1]
                if not _is_plain_one(grad):
                    loss.rescale(gradient, grad, *saved, *options)
                return None, gradient, None, None
            # torch.autograd.grad(is_grads_batched=True) runs an op once for each, but none that writes in place.
            saved = (*saved, loss.forward(*saved, *options, False, _ops.KEEP_STATISTICS)[1])
        wanted = ctx.needs_input_grad[1:]
        return None, *(
            loss.backward(grad, *saved, *options, operand) if needed else None for operand, needed in enumerate(wanted)
        )


_apply_without_asking: Callable[..., Any] = super(torch.autograd.Function, _Function).apply


def _apply_function(told: _Told, tensors: Tensors) -> Any:
    """_Function.apply() where no transform is active, in two thirds of its time: it asks as the doors do.

    What has outlived a transform has its own history inside a wrapper, which comes off as it does there.
    """
    return _apply_without_asking(told, *[tensor if tensor is None else _unwrap_if_dead(tensor) for tensor in tensors])


def _formula_gradients(
    loss: Loss, options: tuple[Any, ...], tensors: Tensors, grad: Tensor, wanted: tuple[bool, ...]
) -> list[Tensor | None]:
    """Gradients of the tensors that are wanted, None for the others, by the reference formula.

    They can be differentiated again (``create_graph=True``) and transformed.
    """

    # A function of its operands alone: a target that was computed from the input does not lend the input its gradient.
    def value_of(*operands: Tensor) -> Any:
        given = iter(operands)
        value = loss.reference(
            *(next(given) if needed else t for t, needed in zip(tensors, wanted, strict=True)), *options
        )
        return value[0] if isinstance(value, tuple) else value

    operands = [t for t, needed in zip(tensors, wanted, strict=True) if t is not None and needed]
    value, pull_back, *_ = torch.func.vjp(value_of, *operands)
    found = iter(pull_back(grad.to(value.dtype)))
    return [next(found) if needed else None for needed in wanted]


def _kernel_of_public_op(loss: Loss) -> Callable[..., Any]:
    """What the public op does where autograd is on: asks the doors again.

    Tracers meet the op inside a module that was compiled or exported, and may then transform or differentiate that.
    """

    def kernel(*arguments: Any) -> Any:
        count = loss.tensor_count
        tensors, options, float32_loss = arguments[:count], arguments[count:-1], arguments[-1]
        if is_transformed():
            return loss.reference(*tensors, *options)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            return _apply_function((loss, options, float32_loss, False), tensors)
        with torch._C._AutoDispatchBelowAutograd():
            return loss.public(*arguments)

    return kernel


_REDUCTIONS = ("none", "mean", "sum")


def _with_nan_for_bad_labels(
    input: Tensor, target: Tensor, ignore_index: int, classes: int, class_dim: int
) -> tuple[Tensor, Tensor]:
    """What the reference may be given on a GPU: there, indexing with a bad label would end every use of the device.

    The pixel of a bad label has NaN as logits, so that its value and gradient are NaN, as the kernels make them. (In a
    transform this cannot be recorded.)
    """
    if target.is_floating_point() or target.dtype is torch.bool or not _ops.runs_cuda_kernels(input.device):
        return input, target
    if target.shape == input.shape and input.shape[class_dim] != 1:
        bad = of_input = (target != 0) & (target != 1)
    else:
        bad = ((target < 0) | (target >= classes)) & (target != ignore_index)
        of_input = bad if target.dim() == input.dim() else bad.unsqueeze(class_dim)
    # Added, since what where() leaves out would have a gradient of 0.
    input = input + torch.where(of_input, torch.nan, 0.0).to(input.dtype)
    return input, torch.where(bad, 1 if ignore_index == 0 and classes > 1 else 0, target)


def _reference_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: int, label_smoothing: float
) -> Tensor:
    class_dim = 0 if input.dim() == 1 else 1
    input, target = _with_nan_for_bad_labels(input, target, ignore_index, input.shape[class_dim], class_dim)
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


_ACTIVATIONS = ("softmax", "sigmoid", "none")
_ABSENT = ("skip", "count", "zero")
_INTERSECTIONS = ("min", "product")


def _reference_segmentation(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pixel_weight: Tensor | None,
    pos_weight: Tensor | None,
    activation: int,
    ignore_index: int,
    output: int,
    cross_entropy: float,
    iou: float,
    brier: float,
    alpha: float,
    beta: float,
    label_smoothing: float,
    classes: list[int],
    per_image: bool,
    absent: int,
    smooth: float,
    eps: float,
    log: bool,
    gamma: float,
    intersection: int,
) -> tuple[Tensor, Tensor]:
    input, target = _with_nan_for_bad_labels(input, target, ignore_index, max(input.shape[1], 2), 1)
    shared: dict[str, Any] = {
        "activation": _ACTIVATIONS[activation],
        "pixel_weight": pixel_weight,
        "ignore_index": ignore_index,
    }
    groups: dict[str, Any] = {"per_image": per_image, "intersection": _INTERSECTIONS[intersection]}
    overlap: dict[str, Any] = {
        "alpha": alpha,
        "beta": beta,
        "classes": None if classes in ([], _ops.ALL_CLASSES) else classes,
        "absent": _ABSENT[absent],
        "smooth": smooth,
        "eps": eps,
        "log": log,
        "gamma": gamma,
        **groups,
    }
    terms: dict[str, Tensor] = {}
    if output == _ops.SUMS:
        loss = reference.segmentation_sums(
            input,
            target,
            weight,
            cross_entropy=cross_entropy != 0.0,
            iou=iou != 0.0,
            brier=brier != 0.0,
            label_smoothing=label_smoothing,
            pos_weight=pos_weight,
            **shared,
            **groups,
        )
    elif output == _ops.STATISTICS:
        loss = torch.stack(reference.overlap_statistics(input, target, **shared, **groups))
    elif output == _ops.MEAN:
        loss, terms = reference.segmentation_loss(
            input,
            target,
            weight,
            cross_entropy=cross_entropy,
            iou=iou,
            brier=brier,
            label_smoothing=label_smoothing,
            pos_weight=pos_weight,
            return_terms=True,
            **shared,
            **overlap,
        )
    else:
        reduction = _REDUCTIONS[output]
        parts = []
        if iou != 0.0:
            parts.append(iou * reference.tversky_loss(input, target, weight, reduction=reduction, **shared, **overlap))
        if brier != 0.0:
            parts.append(brier * reference.brier_loss(input, target, weight, reduction=reduction, **shared))
        loss = sum(parts[1:], parts[0])
    given = (terms.get(name) for name in ("cross_entropy", "iou", "brier"))
    return loss, torch.stack([loss.new_zeros(()) if term is None else term for term in given])


def _segmentation_forward(*arguments: Any) -> tuple[tuple[Tensor, Tensor], Tensor]:
    *passed, _, keep = arguments
    loss, terms, statistics = _ops.segmentation_forward(*passed, keep != _ops.KEEP_NOTHING)
    return (loss, terms), statistics


def _segmentation_rescale(*arguments: Any) -> None:
    raise AssertionError("the gradient of an overlap is not known in the forward")


def _gradient_in_forward(tensors: Tensors) -> bool:
    input = tensors[0]
    return input is not None and _ops.gradient_in_forward(input)


CROSS_ENTROPY = Loss(
    "cross_entropy",
    3,
    _ops.cross_entropy,
    _ops.cross_entropy_forward,
    _ops.cross_entropy_rescale,
    _cross_entropy_backward,
    lambda tensors, options: options[1] != _ops.NONE and _gradient_in_forward(tensors),
    _reference_cross_entropy,
)
MSE_LOSS = Loss(
    "mse_loss",
    3,
    _ops.mse_loss,
    _ops.mse_loss_forward,
    _ops.mse_loss_rescale,
    _ops.mse_loss_backward,
    lambda tensors, options: options[0] != _ops.NONE and tensors[2] is None and _gradient_in_forward(tensors),
    _reference_mse_loss,
)

# Its result is float32 for two-byte input anyway, so float32_loss says nothing here.
SEGMENTATION = Loss(
    "segmentation",
    5,
    lambda *arguments: _ops.segmentation(*arguments[:-1]),
    _segmentation_forward,
    _segmentation_rescale,
    _ops.segmentation_backward,
    lambda tensors, options: False,
    _reference_segmentation,
)

_library = torch.library.Library("fusedloss", "FRAGMENT")  # holds the registrations: they end with it
for _loss in (CROSS_ENTROPY, MSE_LOSS):
    _library.impl(_loss.name, _kernel_of_public_op(_loss), "Autograd")
_segmentation_kernel = _kernel_of_public_op(SEGMENTATION)
_library.impl(SEGMENTATION.name, lambda *arguments: _segmentation_kernel(*arguments, False), "Autograd")
