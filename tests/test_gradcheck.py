"""Derivatives agree with finite differences in float64: backward, backward of the backward, forward mode, batches."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from .registry import Case, each_case, each_loss, each_reduction


def function_and_leaves(case, reduction, device):
    plain = case.make(torch.float64, device, reduction)
    return plain.requiring_grad(plain.differentiable).on(case.loss.function, plain.differentiable)


@each_reduction
@each_case
def test_backward(case, reduction, device):
    function, leaves = function_and_leaves(case, reduction, device)
    assert gradcheck(function, leaves)


@each_reduction
@each_case
def test_backward_of_the_backward(case, reduction, device):
    """Also with regard to the incoming gradient, which gradgradcheck draws at random."""
    function, leaves = function_and_leaves(case, reduction, device)
    assert gradgradcheck(function, leaves, fast_mode=True)


@each_reduction
@each_case
def test_forward_mode(case, reduction, device):
    function, leaves = function_and_leaves(case, reduction, device)
    # Along a random direction: along each axis it took 210 of the 247 s of this file.
    assert gradcheck(function, leaves, check_forward_ad=True, check_backward_ad=False, fast_mode=True)


@each_reduction
@each_case
def test_forward_mode_over_the_backward(case, reduction, device):
    function, leaves = function_and_leaves(case, reduction, device)
    only_forward = {"check_fwd_over_rev": True, "check_rev_over_rev": False, "check_undefined_grad": False}
    assert gradgradcheck(function, leaves, fast_mode=True, **only_forward)


@each_reduction
@each_case
def test_batches_of_incoming_gradients(case, reduction, device):
    """torch.autograd.grad(..., is_grads_batched=True) runs the backward under vmap."""
    function, leaves = function_and_leaves(case, reduction, device)
    value = function(*leaves)
    batch = torch.stack([torch.randn_like(value) for _ in range(3)])
    batched = torch.autograd.grad(value, leaves, batch, is_grads_batched=True, retain_graph=True)
    for k in range(3):
        single = torch.autograd.grad(value, leaves, batch[k], retain_graph=True)
        for one, other in zip(batched, single, strict=True):
            torch.testing.assert_close(one[k], other)


@each_loss
def test_a_wrong_gradient_is_seen(loss, device):
    """gradcheck would notice a factor that the backward forgets."""
    function, leaves = function_and_leaves(Case(loss, loss.typical[-1]), "none", device)

    class ForgetsAFactor(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value * 1.5

        @staticmethod
        def backward(ctx, grad_output):
            return grad_output

    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        gradcheck(lambda *tensors: ForgetsAFactor.apply(function(*tensors)), leaves)
