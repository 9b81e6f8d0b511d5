"""The gradient is the truth's, for every incoming gradient and every choice of arguments that ask for one."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .compare import check, evaluate, random_like
from .registry import (
    OVERLAP_STATISTICS,
    REDUCTIONS,
    each_case,
    each_dtype,
    each_reduction,
    each_typical_case,
    without_weight,
)
from .tolerance import assert_no_worse


def subsets(names):
    return itertools.chain.from_iterable(itertools.combinations(names, k) for k in range(1, len(names) + 1))


@each_dtype
@each_reduction
@each_case
def test_gradient(case, reduction, dtype, device):
    check(case.loss, case.make(dtype, device, reduction))


@each_reduction
@each_case
def test_every_choice_of_arguments(case, reduction, device):
    plain = case.make(torch.float32, device, reduction)
    for wrt in subsets(plain.differentiable):
        check(case.loss, plain, wrt=wrt, what=f"for {wrt}")
        call = plain.requiring_grad(wrt)
        call.run(case.loss.function).sum().backward()
        for name, tensor in call.tensors.items():
            assert (tensor.grad is not None) == (name in wrt), f"{name} when {wrt} require grad"


@each_case
def test_incoming_gradient_of_any_strides(case, device):
    call = case.make(torch.float32, device, "none")
    shape = call.run(case.loss.function).shape
    dense = random_like(torch.empty(shape, device=device))
    check(case.loss, call, grad_output=torch.ones((), device=device).expand(shape), what="expanded")
    check(case.loss, call, grad_output=dense.mT.contiguous().mT if dense.dim() > 1 else dense, what="transposed")
    wide = torch.zeros(*shape, 2, device=device)
    wide[..., 1] = dense
    check(case.loss, call, grad_output=wide[..., 1], what="sliced")


@each_case
def test_sum_of_the_unreduced_is_the_sum(case, device):
    """The gradient that .sum() sends back is one number expanded over all pixels."""
    gradients = {}
    for reduction in ("none", "sum"):
        plain = case.make(torch.float64, device, reduction)
        if not case.loss.unreduced_is_weighted:
            plain = without_weight(plain)
        call = plain.requiring_grad(plain.differentiable)
        (call.run(case.loss.function).sum() * 0.7).backward()
        gradients[reduction] = [call.tensors[name].grad for name in plain.differentiable]
    for one, other in zip(gradients["none"], gradients["sum"], strict=True):
        assert_no_worse(one, None, other)


@each_reduction
@each_case
def test_backward_twice_through_one_graph(case, reduction, device):
    """What is saved for the backward is still there, and unchanged, after it ran."""
    plain = case.make(torch.float32, device, reduction)
    call = plain.requiring_grad(plain.differentiable)
    leaves = [call.tensors[name] for name in plain.differentiable]
    value = call.run(case.loss.function)
    grad_output = random_like(value)
    first = torch.autograd.grad(value, leaves, grad_output, retain_graph=True)
    second = torch.autograd.grad(value, leaves, grad_output)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
        assert one.data_ptr() != other.data_ptr()


@each_case
def test_gradients_of_two_calls_add_up(case, device):
    plain = case.make(torch.float64, device)
    ones = torch.ones_like(plain.run(case.loss.function))
    _, gradients = evaluate(case.loss.function, plain, plain.differentiable, ones)
    call = plain.requiring_grad(plain.differentiable)
    for _ in range(2):
        call.run(case.loss.function).backward(ones)
    for name in plain.differentiable:
        assert torch.equal(call.tensors[name].grad, 2 * gradients[name])


@each_reduction
@each_case
def test_changed_arguments_are_noticed(case, reduction, device):
    """An argument that is overwritten before the backward: refused, or it does not matter. Never a wrong gradient."""
    plain = case.make(torch.float64, device, reduction)
    _, expected = evaluate(case.loss.function, plain, plain.differentiable)
    for changed in plain.tensors:
        call = plain.with_tensors(target=plain.tensors["target"].clone()).requiring_grad(plain.differentiable)
        value = call.run(case.loss.function)
        call.tensors[changed].detach().zero_()
        leaves = [call.tensors[name] for name in plain.differentiable]
        try:
            gradients = torch.autograd.grad(value, leaves, random_like(value))
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)  # noqa: PT017 (raising is one of two right answers)
        else:
            for name, gradient in zip(plain.differentiable, gradients, strict=True):
                assert torch.equal(gradient, expected[name]), f"{name} after {changed} was overwritten"


@each_case
def test_zero_incoming_gradient(case, device):
    for reduction in REDUCTIONS:
        plain = case.make(torch.float32, device, reduction)
        shape = plain.run(case.loss.function).shape
        _, gradients = evaluate(case.loss.function, plain, plain.differentiable, torch.zeros(shape, device=device))
        for name, gradient in gradients.items():
            assert gradient.count_nonzero() == 0, (reduction, name)


class SendsNothing(torch.autograd.Function):
    """Its input, to which it gives no gradient back."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, grad_output):
        return None


@pytest.mark.parametrize("create_graph", [False, True], ids=["once", "create_graph"])
@each_reduction
@each_typical_case
def test_no_incoming_gradient(case, reduction, create_graph, device):
    """Nothing comes in and nothing goes out, as with PyTorch's own losses; the graph still gives the right gradient."""
    plain = case.make(torch.float32, device, reduction)
    _, expected = evaluate(case.loss.function, plain, plain.differentiable)
    call = plain.requiring_grad(plain.differentiable)
    leaves = [call.tensors[name] for name in plain.differentiable]
    value = call.run(case.loss.function)
    ends = SendsNothing.apply(value).sum()
    options = {"retain_graph": True, "create_graph": create_graph, "allow_unused": True}
    assert torch.autograd.grad(ends, leaves, **options) == (None,) * len(leaves)
    gradients = torch.autograd.grad(value, leaves, random_like(value))
    for name, gradient in zip(plain.differentiable, gradients, strict=True):
        assert torch.equal(gradient, expected[name]), name


class Operations(TorchDispatchMode):
    """Notes the name of each operation that runs."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.append(operation._schema.name)
        return operation(*args, **(kwargs or {}))


@each_reduction
@each_typical_case
def test_backward_is_one_operation(case, reduction, device):
    """Nothing is filled for a second result that has no gradient: on a GPU that would be one launch more."""
    if case.loss is OVERLAP_STATISTICS or case.name.startswith("broadcast"):
        pytest.skip("has operations of PyTorch around ours")
    call = case.make(torch.float32, device, reduction).requiring_grad(["input"])
    value = call.run(case.loss.function)
    grad_output = random_like(value)
    with Operations() as operations:
        torch.autograd.grad(value, call.tensors["input"], grad_output)
    (name,) = operations.names
    assert name.startswith("fusedloss::")


@each_case
def test_gradient_through_what_comes_before(case, device):
    """Arguments that are results themselves (not leaves), as the logits of a network are."""
    plain = case.make(torch.float64, device)
    leaves = plain.requiring_grad(plain.differentiable)
    scaled = leaves.map(lambda tensor: 0.5 * tensor, plain.differentiable)
    scaled.run(case.loss.function).sum().backward()
    halved = plain.map(lambda tensor: 0.5 * tensor, plain.differentiable)
    ones = torch.ones_like(halved.run(case.loss.function))
    _, expected = evaluate(case.loss.function, halved, plain.differentiable, ones)
    for name in plain.differentiable:
        assert_no_worse(leaves.tensors[name].grad, None, 0.5 * expected[name])


def test_a_wrong_gradient_is_seen(device):
    """The comparison itself can fail: one element off by a hundredth of a percent is enough."""
    truth = random_like(torch.empty(100, dtype=torch.float64, device=device))
    wrong = truth.float()
    wrong[37] *= 1.0001
    assert_no_worse(truth.float(), None, truth)
    with pytest.raises(AssertionError, match="first at \\(37,\\)"):
        assert_no_worse(wrong, None, truth)
    with pytest.raises(AssertionError):
        assert_no_worse(-truth.float(), None, truth)
