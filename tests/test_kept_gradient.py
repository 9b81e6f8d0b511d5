"""The gradient that the forward writes at once is handed over as if the backward had computed it."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from .registry import each_twin, each_typical_case

FACTORS = [1.0, -1.0, 0.5, 0.3, 0.0, 1024.0]


def gradient_of(case, dtype, device, reduction, factor, backwards=1):
    """The gradient of the input alone, which the forward keeps."""
    call = case.make(dtype, device, reduction).requiring_grad(["input"])
    value = call.run(case.loss.function)
    for _ in range(backwards):
        call.tensors["input"].grad = None
        value.backward(torch.full_like(value, factor), retain_graph=True)
    return call.tensors["input"].grad


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@each_typical_case
def test_equals_the_gradient_of_a_backward(case, dtype, factor, device):
    """Bit for bit what comes out where another operand asks for a gradient too, so that nothing is kept."""
    for reduction in ("mean", "sum"):
        kept = gradient_of(case, dtype, device, reduction, factor)
        call = case.make(dtype, device, reduction)
        if "target" not in call.differentiable:
            continue
        call = call.requiring_grad(["input", "target"])
        value = call.run(case.loss.function)
        value.backward(torch.full_like(value, factor))
        assert torch.equal(kept, call.tensors["input"].grad)


@each_twin
def test_a_loss_scale_brings_small_gradients_back(loss, device):
    """The float16 gradient for 1 is below the smallest normal number; the one for 1024 has all its digits."""
    torch.manual_seed(0)
    input = torch.randn(4, 8, 128, 128, device=device).half().float()
    target = torch.randint(0, 8, (4, 128, 128), device=device) if loss.name == "cross_entropy" else input + 0.01
    half, truth = (input.to(dtype).requires_grad_() for dtype in (torch.float16, torch.float64))
    for leaf in (half, truth):
        labels = target if loss.name == "cross_entropy" else target.to(torch.float16).to(leaf.dtype)
        value = loss.function(leaf, labels) if leaf is half else loss.reference(leaf, labels)
        value.backward(torch.full_like(value, 1024.0))
    error = (half.grad.double() - truth.grad).abs()
    assert bool((error <= 2e-3 * truth.grad.abs() + 1e-6).all())


@each_typical_case
def test_a_second_backward_computes_it_again(case, device):
    once = gradient_of(case, torch.float32, device, "mean", 0.5)
    for backwards in (2, 3):
        assert torch.equal(gradient_of(case, torch.float32, device, "mean", 0.5, backwards), once)


@each_typical_case
def test_is_nobody_elses(case, device):
    """Writing into .grad does not reach a later backward, nor a later .grad an earlier one."""
    call = case.make(torch.float32, device, "mean").requiring_grad(["input"])
    value = call.run(case.loss.function).sum()
    value.backward(retain_graph=True)
    first = call.tensors["input"].grad
    expected = first.clone()
    first.fill_(7.0)
    call.tensors["input"].grad = None
    value.backward()
    assert torch.equal(call.tensors["input"].grad, expected)
    assert bool((first == 7.0).all())


@each_twin
def test_no_grad_writes_none(loss, device):
    """Without a gradient asked for, nothing as large as the input is allocated."""
    input = torch.randn(4, 8, 64, 64, device=device, requires_grad=True)
    target = (
        torch.randint(0, 8, (4, 64, 64), device=device) if loss.name == "cross_entropy" else torch.randn_like(input)
    )
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.no_grad(), torch.profiler.profile(activities=cpu, profile_memory=True) as profiler:
        loss.function(input, target)
    largest = max(event.cpu_memory_usage for event in profiler.events())
    assert largest < input.nbytes / 4


@each_twin
def test_a_tracer_of_the_backward_reads_no_number(loss, device):
    """It records what is done for any incoming gradient, also where the one it is shown is 1."""
    torch.manual_seed(0)
    input = torch.randn(4, 3, 5, device=device, requires_grad=True)
    target = torch.randint(3, (4, 5), device=device) if loss.name == "cross_entropy" else torch.randn_like(input)
    value = loss.function(input, target)
    (wanted,) = torch.autograd.grad(loss.function(input, target), input)
    one, three = torch.tensor([1.0, 3.0], device=device)
    traced = make_fx(lambda grad: torch.autograd.grad(value, input, grad, retain_graph=True)[0])(one)
    torch.testing.assert_close(traced(three), 3 * wanted)
