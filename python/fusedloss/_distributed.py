"""A batch whose parts lie on several processes: the losses of the whole, by one exchange of their sums.

Every process visits its own pixels, forward and backward, as for a batch of its own. Between the visits lies the table
of sums, I, P and T of each class and a few numbers more: that is added up over the processes, and the formula on the
table, a few dozen operations on (G, C) numbers, is the reference's (``_table.py``).

The loss is then the same number on every process, and its gradient with regard to the process's own logits is
multiplied by the number of processes, because DistributedDataParallel and FSDP divide by it when they average.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusedloss import _autograd, _calls, _ops, _table


class _SumOverProcesses(torch.autograd.Function):
    """The sum of every process's tensor, on each of them.

    Its backward exchanges nothing: the loss, and with it the incoming gradient, is the same everywhere.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, process_group: Any) -> Tensor:
        ctx.processes = dist.get_world_size(process_group)
        total = own.clone()
        dist.all_reduce(total, group=process_group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.processes, None


_sum_over_processes: Callable[..., Tensor] = _SumOverProcesses.apply


def is_process_group(value: Any) -> bool:
    return dist.is_available() and isinstance(value, dist.ProcessGroup)


def segmentation(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    process_group: Any,
    output: int,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """As ``_calls.segmentation``, over the pixels of all processes of the group."""
    per_image = options["per_image"]
    if not is_process_group(process_group) or (per_image and output in (_ops.NONE, _ops.STATISTICS)):
        raise ValueError("not a process group, or nothing to exchange")
    if _autograd.is_transformed():
        raise RuntimeError(
            "segmentation: `process_group` must be None under a transform of torch.func and in forward mode, which "
            "cannot exchange sums with other processes"
        )
    if output == _ops.STATISTICS:
        options["iou"] = 1.0
    own, _ = _calls.segmentation(input, target, weight, output=_ops.SUMS, **options)
    sums = own if per_image else _sum_over_processes(own, process_group)

    groups, classes = (input.shape[0] if per_image else 1), input.shape[1]
    table, pixels, rest = sums.split([3 * groups * classes, groups, 3])
    intersection, predicted, labelled = table.reshape(3, groups, classes).unbind(0)
    given = [input, target] if target.is_floating_point() else [input]
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in given) else torch.float32
    if output == _ops.STATISTICS:
        return table.reshape(3, groups, classes).to(dtype), sums.new_zeros(3)

    loss, counts = _table.overlap_of(
        intersection,
        predicted,
        labelled,
        pixels,
        alpha=options.get("alpha", 1.0),
        beta=options.get("beta", 1.0),
        **{name: options[name] for name in ("classes", "absent", "smooth", "eps", "log", "gamma")},
    )
    if output == _ops.NONE:
        return loss.to(dtype), sums.new_zeros(3)
    class_weight = _class_weight(weight, options["classes"], loss)
    overlap, counting = _table.add_classes(loss, counts, class_weight, mean=output == _ops.MEAN)
    cross_entropy, label_weight, squared_error = rest.unbind(0)
    pixel_weight = pixels.sum()
    if per_image:
        own = torch.stack([overlap, counting, cross_entropy, label_weight, squared_error, pixel_weight])
        overlap, counting, cross_entropy, label_weight, squared_error, pixel_weight = _sum_over_processes(
            own, process_group
        ).unbind(0)
    if output == _ops.SUM:
        return overlap.to(dtype), sums.new_zeros(3)
    by_label = options["activation"] == "softmax" and not target.is_floating_point()
    terms = {
        "cross_entropy": _table.divide(cross_entropy, label_weight if by_label else pixel_weight),
        "iou": _table.divide(overlap, counting),
        "brier": _table.divide(squared_error, pixel_weight),
    }
    # What is not asked for is not multiplied by 0: it may be NaN.
    factors = {name: options.get(name, 0.0) for name in terms}
    parts = [factors[name] * term for name, term in terms.items() if factors[name] != 0.0]
    value = functools.reduce(torch.add, parts, sums.new_zeros(()))
    return value.to(dtype), torch.stack(list(terms.values())).detach().to(dtype)


def _class_weight(weight: Tensor | None, chosen: Any, loss: Tensor) -> Tensor:
    """(classes,)"""
    if weight is None:
        return loss.new_ones(loss.shape[1])
    return _table.chosen(weight.to(loss.dtype), chosen)
