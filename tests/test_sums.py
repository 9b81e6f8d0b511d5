"""The table of sums that the losses over several processes exchange: of the op alone, on one process."""

import pytest
import torch

from fusedloss import _calls, _ops, reference

from .compare import random_like
from .registry import SEGMENTATION_CASES, Maker
from .tolerance import assert_no_worse

DEFAULTS = {"cross_entropy": 1.0, "iou": 1.0, "brier": 0.0, "label_smoothing": 0.0}
OF_THE_SUMS = ("cross_entropy", "iou", "brier", "label_smoothing", "activation", "ignore_index")


def sums_by_kernels(call):
    options = {"activation": "softmax", "pixel_weight": None, "ignore_index": -100, **DEFAULTS, **call.options}
    tensors = dict(call.tensors)
    options |= {name: tensors.pop(name) for name in ("pixel_weight", "pos_weight") if name in tensors}
    return _calls.segmentation(**tensors, output=_ops.SUMS, **options)[0]


def sums_by_reference(call):
    options = {**DEFAULTS, **call.options}
    tensors = call.tensors
    return reference.segmentation_sums(
        tensors["input"],
        tensors["target"],
        tensors.get("weight"),
        **{name: options[name] != 0.0 for name in ("cross_entropy", "iou", "brier")},
        label_smoothing=options["label_smoothing"],
        pos_weight=tensors.get("pos_weight"),
        pixel_weight=tensors.get("pixel_weight"),
        activation=options.get("activation", "softmax"),
        ignore_index=options.get("ignore_index", -100),
        per_image=options.get("per_image", False),
        intersection=options.get("intersection", "min"),
    )


def value_and_gradients(function, call):
    call = call.requiring_grad(call.differentiable)
    sums = function(call)
    gradients = torch.autograd.grad(sums, [call.tensors[n] for n in call.differentiable], random_like(sums))
    return sums, dict(zip(call.differentiable, gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SEGMENTATION_CASES)
def test_sums_and_their_gradients(name, dtype, device):
    call = SEGMENTATION_CASES[name](Maker(dtype, device))
    sums, gradients = value_and_gradients(sums_by_kernels, call)
    theirs, their_gradients = value_and_gradients(sums_by_reference, call)
    truth, true_gradients = value_and_gradients(sums_by_reference, call.to(torch.float64))
    assert sums.dtype == torch.float64
    label_weight = slice(-2, -1)
    if call.options.get("cross_entropy", 1.0) == 0.0:
        sums, theirs, truth = (s.clone() for s in (sums, theirs, truth))
        for s in (sums, theirs, truth):
            s[label_weight] = 0.0  # of a mean that is not asked for
    assert_no_worse(sums.float(), theirs.float(), truth, "sums")
    for operand in call.differentiable:
        assert gradients[operand].dtype == call.tensors[operand].dtype
        assert_no_worse(gradients[operand], their_gradients[operand], true_gradients[operand], operand)


def test_counts_are_exact_beyond_the_integers_of_float32(device):
    """T and m are of float64: a billion pixels of a class on each process add up to a number that is exact."""
    target = torch.zeros(1, 5, dtype=torch.uint8, device=device)
    pixel_weight = torch.full((1, 5), 2.0**24 + 2.0, device=device)
    sums = _calls.segmentation(
        torch.zeros(1, 2, 5, device=device),
        target,
        output=_ops.SUMS,
        activation="softmax",
        pixel_weight=pixel_weight,
        ignore_index=-100,
        iou=1.0,
    )[0]
    assert sums[4].item() == 5 * (2**24 + 2)
    assert sums[6].item() == 5 * (2**24 + 2)
