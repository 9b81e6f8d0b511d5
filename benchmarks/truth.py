"""Is the answer right: value and gradient of a provider against PyTorch's own operations in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import formulas
from benchmarks.providers import LossOfInput, torch_loss
from benchmarks.workloads import Case

# Relative errors that are rounding and not mistakes: some units in the last place of what the provider computes in,
# and of the dtype in which it has to return value and gradient.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
# For other libraries: large enough for sums over millions of pixels in the input's own dtype, small enough to tell that
# another loss was computed. Their errors stand in the results beside ours.
SAME_LOSS = TOLERANCE | {torch.float32: 1e-3}

# Elements that are in float64 at one time. The reference needs five such arrays; whole workloads would need gigabytes.
CHUNK = 1 << 24


@dataclass(frozen=True)
class Truth:
    value: float
    gradient: Tensor  # float64, on the input's shape


@dataclass(frozen=True)
class Errors:
    """Relative errors: of the value, and of the gradient (the larger one of the 2-norm and the maximum norm)."""

    value: float
    gradient: float
    tolerance: float

    @property
    def right(self) -> bool:
        return self.value <= self.tolerance and self.gradient <= self.tolerance


def chunks(input: Tensor) -> Iterator[slice]:
    """Slices of dimension 0 that hold at most CHUNK elements (at least one sample)."""
    step = max(1, CHUNK // max(1, input[0].numel()))
    for start in range(0, len(input), step):
        yield slice(start, start + step)


def find_truth(case: Case) -> Truth:
    """Every loss is a function of sums over samples, so the truth can be found a few samples at a time."""
    if case.workload.loss != "mse_loss":
        return find_truth_of_sums(case)
    count = case.input.numel()
    summed = torch_loss(Case(case.workload, case.input, case.target, {**case.options, "reduction": "sum"}))
    value = 0.0
    gradient = torch.empty(case.input.shape, dtype=torch.float64, device=case.input.device)
    for part in chunks(case.input):
        input = case.input.detach()[part].double().requires_grad_()
        target = case.target[part]
        loss = summed(input, target.double() if target.is_floating_point() else target) / count
        loss.backward()
        assert input.grad is not None
        value += loss.item()
        gradient[part] = input.grad
    return Truth(value, gradient)


def find_truth_of_sums(case: Case) -> Truth:
    """First the sums of the whole batch and the loss's derivative with regard to them, then that of the logits."""
    loss = case.workload.loss

    def sums_of(part: slice, input: Tensor) -> formulas.Sums:
        target = case.target[part]
        labels = target.double() if target.is_floating_point() else target.long()
        return formulas.sums(loss, input, labels, **case.options)

    with torch.no_grad():
        parts = [sums_of(part, case.input.detach()[part].double()) for part in chunks(case.input)]
    total = formulas.Sums(*(sum(numbers[1:], numbers[0]) for numbers in zip(*parts, strict=True)))
    leaves = formulas.Sums(*(number.double().requires_grad_() for number in total))
    value = formulas.value(loss, leaves)
    factors = torch.autograd.grad(value, leaves, allow_unused=True)
    gradient = torch.empty(case.input.shape, dtype=torch.float64, device=case.input.device)
    for part in chunks(case.input):
        input = case.input.detach()[part].double().requires_grad_()
        terms = [(f * s).sum() for f, s in zip(factors, sums_of(part, input), strict=True) if f is not None]
        (gradient[part],) = torch.autograd.grad(sum(terms[1:], terms[0]), input)
    return Truth(value.item(), gradient)


def check(loss: LossOfInput, case: Case, truth: Truth, tolerance: float) -> Errors:
    """Run the loss once, forward and backward, and compare. Leaves no gradient behind."""
    case.input.grad = None
    result = loss(case.input)
    result.backward()
    gradient, case.input.grad = case.input.grad, None
    if gradient is None or gradient.shape != case.input.shape or gradient.dtype != case.input.dtype:
        raise RuntimeError(f"{case.workload.name}: the gradient has another shape or dtype than the input")

    largest_error = largest = squared_error = squared = 0.0
    for part in chunks(gradient):
        wanted = truth.gradient[part]
        difference = gradient[part].double() - wanted
        largest_error = max_or_nan(largest_error, difference.abs().max().item())
        largest = max(largest, wanted.abs().max().item())
        squared_error += difference.square().sum().item()
        squared += wanted.square().sum().item()
    return Errors(
        value=relative(abs(result.item() - truth.value), abs(truth.value)),
        gradient=max_or_nan(relative(largest_error, largest), relative(squared_error, squared) ** 0.5),
        tolerance=tolerance,
    )


def relative(error: float, of: float) -> float:
    """Of nothing the error is absolute: the softmax of a single class has no loss and no gradient."""
    return error / of if of else error


def max_or_nan(first: float, second: float) -> float:
    """Python's max drops a NaN that stands second; here it must stay, because it is a wrong answer."""
    return second if second != second else max(first, second)
