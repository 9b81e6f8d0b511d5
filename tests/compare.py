"""Runs a call three times (ours, PyTorch's, the float64 reference) and compares value and gradients."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .registry import Call, Loss
from .tolerance import assert_no_worse


def random_like(tensor: Tensor, seed: int = 1) -> Tensor:
    """An incoming gradient that is nowhere 1: with ones, a backward that forgets to multiply would pass."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    return numbers.to(tensor.device, tensor.dtype)


def evaluate(
    function: Callable[..., Tensor], call: Call, wrt: Iterable[str], grad_output: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The value, and the gradient with regard to each tensor called ``wrt``."""
    wrt = tuple(wrt)
    call = call.requiring_grad(wrt)
    value = call.run(function)
    if not wrt:
        return value, {}
    if grad_output is None:
        grad_output = random_like(value)
    gradients = torch.autograd.grad(value, [call.tensors[name] for name in wrt], grad_output.to(value.dtype))
    return value, dict(zip(wrt, gradients, strict=True))


def check(
    loss: Loss,
    call: Call,
    *,
    wrt: Iterable[str] | None = None,
    grad_output: Tensor | None = None,
    with_torch: bool = True,
    what: str = "",
    scale: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Ours is no worse than PyTorch, in value and gradients. ``with_torch=False``: where PyTorch means otherwise."""
    wrt = call.differentiable if wrt is None else tuple(wrt)
    value, gradients = evaluate(loss.function, call, wrt, grad_output)
    if grad_output is None:
        grad_output = random_like(value)
    true_value, true_gradients = evaluate(loss.reference, call.to(torch.float64), wrt, grad_output)
    their_value, their_gradients = evaluate(loss.torch, call, wrt, grad_output) if with_torch else (None, {})
    if their_value is not None:
        assert value.dtype == their_value.dtype, f"{what} result dtype"
    assert_no_worse(value, their_value, true_value, f"{what} value".strip(), scale)
    for name in wrt:
        gradient = gradients[name]
        assert gradient.dtype == call.tensors[name].dtype, f"{what} dtype of the gradient of {name}"
        assert_no_worse(
            gradient, their_gradients.get(name), true_gradients[name], f"{what} gradient of {name}".strip(), scale
        )
    return value, gradients
