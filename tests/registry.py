"""Every loss of the package, with what the tests need to know about it. A new loss is a new entry in ``LOSSES``.

A case is a recipe for one kind of call, named after what is special about it. It is small, because most tests run it
many times. ``reduction`` is no part of it: every loss has the same three, and the tests run through them.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedloss

REDUCTIONS = ("none", "sum", "mean")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Call:
    """The arguments of one call by name, and those of them that a gradient flows to."""

    tensors: Mapping[str, Tensor]
    options: Mapping[str, Any] = field(default_factory=dict)
    differentiable: tuple[str, ...] = ("input",)

    def run(self, function: Callable[..., Tensor]) -> Tensor:
        return function(**self.tensors, **self.options)

    def on(
        self, function: Callable[..., Tensor], names: Iterable[str]
    ) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """The call as a function of the tensors called ``names``, and these tensors, as torch.func wants it."""
        names = tuple(names)

        def of_tensors(*tensors: Tensor) -> Tensor:
            return self.with_tensors(**dict(zip(names, tensors, strict=True))).run(function)

        return of_tensors, tuple(self.tensors[name] for name in names)

    def with_tensors(self, **tensors: Tensor) -> "Call":
        return replace(self, tensors={**self.tensors, **tensors})

    def with_options(self, **options: Any) -> "Call":
        return replace(self, options={**self.options, **options})

    def map(self, change: Callable[[Tensor], Tensor], names: Iterable[str] | None = None) -> "Call":
        chosen = self.tensors if names is None else tuple(names)
        return self.with_tensors(**{name: change(self.tensors[name]) for name in chosen})

    def to(self, dtype: torch.dtype) -> "Call":
        """Floating tensors in ``dtype``; labels stay as they are."""
        return self.map(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)

    def requiring_grad(self, names: Iterable[str]) -> "Call":
        """The same numbers in new leaves, of which those called ``names`` require grad."""
        names = tuple(names)
        fresh = self.map(lambda tensor: tensor.detach().clone() if tensor.is_floating_point() else tensor)
        return fresh.map(lambda tensor: tensor.requires_grad_(), names)


class Maker:
    """Makes tensors that look random and are the same every time, with the same numbers in every dtype and device."""

    def __init__(self, dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0) -> None:
        self.dtype = dtype
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype)

    def normal(self, *shape: int, scale: float = 2.0) -> Tensor:
        return self._here(scale * torch.randn(shape, generator=self.generator, dtype=torch.float64))

    def positive(self, *shape: int) -> Tensor:
        """In [0.25, 1.25]; no two alike, so that a factor taken from the wrong place shows."""
        return self._here(0.25 + torch.rand(shape, generator=self.generator, dtype=torch.float64))

    def probabilities(self, *shape: int) -> Tensor:
        logits = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return self._here(logits.softmax(dim=0 if len(shape) == 1 else 1))

    def labels(self, classes: int, *shape: int, dtype: torch.dtype = torch.int64, ignored: int | None = None) -> Tensor:
        """Indices in [0, classes); with ``ignored``, that value at a quarter of the pixels, the first among them."""
        labels = torch.randint(classes, shape, generator=self.generator)
        if ignored is not None:
            chosen = torch.rand(shape, generator=self.generator) < 0.25
            chosen.view(-1)[:1] = True
            labels = labels.masked_fill(chosen, ignored)
        return labels.to(self.device, dtype)


@dataclass(frozen=True)
class Loss:
    name: str
    function: Callable[..., Tensor]
    module: type[nn.Module]
    reference: Callable[..., Tensor]
    torch: Callable[..., Tensor]  # PyTorch's function, made to take what it would refuse but ours does not
    torch_module: type[nn.Module]
    cases: Mapping[str, Callable[[Maker], Call]]
    typical: tuple[str, ...]  # the cases that stand for all where a test is slow, the most telling one first
    large: Callable[[Maker, int], Call]  # a call of about so many elements, for memory and threads


@dataclass(frozen=True)
class Case:
    """One loss with one of its cases: what a test is parametrized over."""

    loss: Loss
    name: str

    def make(
        self, dtype: torch.dtype = torch.float64, device: str = "cpu", reduction: str = "mean", seed: int = 0
    ) -> Call:
        return self.loss.cases[self.name](Maker(dtype, device, seed)).with_options(reduction=reduction)


# ---- cross_entropy ---------------------------------------------------------------------------------------------------


def torch_cross_entropy(input: Tensor, target: Tensor, weight: Tensor | None = None, **options: Any) -> Tensor:
    if not target.is_floating_point():
        # One label in a vector: PyTorch takes (1,) too, but its backward and its smoothing then fail.
        target = target.long().reshape(()) if input.dim() == 1 else target.long()
        weight = None if weight is None else weight.to(input.dtype)
    return F.cross_entropy(input, target, weight, **options)


def indices(input: Tensor, target: Tensor, weight: Tensor | None = None, **options: Any) -> Call:
    tensors = {"input": input, "target": target} | ({} if weight is None else {"weight": weight})
    return Call(tensors, options)


def probabilities(input: Tensor, target: Tensor, weight: Tensor | None = None, **options: Any) -> Call:
    call = indices(input, target, weight, **options)
    return replace(call, differentiable=tuple(call.tensors))


CROSS_ENTROPY_CASES: dict[str, Callable[[Maker], Call]] = {
    "vector": lambda m: indices(m.normal(5), m.labels(5)),
    "vector-weight-smoothing": lambda m: indices(m.normal(5), m.labels(5), m.positive(5), label_smoothing=0.2),
    "vector-probabilities": lambda m: probabilities(m.normal(5), m.probabilities(5), m.positive(5)),
    "one-label-in-a-vector": lambda m: indices(m.normal(5), m.labels(5, 1), m.positive(5)),
    "rows": lambda m: indices(m.normal(7, 4), m.labels(4, 7)),
    "rows-weight": lambda m: indices(m.normal(7, 4), m.labels(4, 7), m.positive(4)),
    "rows-smoothing": lambda m: indices(m.normal(7, 4), m.labels(4, 7), label_smoothing=0.1),
    "rows-everything": lambda m: indices(
        m.normal(7, 4), m.labels(4, 7, ignored=-100), m.positive(4), label_smoothing=0.3
    ),
    "rows-wide": lambda m: indices(m.normal(3, 37), m.labels(37, 3), m.positive(37), label_smoothing=0.1),
    "rows-probabilities": lambda m: probabilities(m.normal(7, 4), m.probabilities(7, 4)),
    "rows-probabilities-everything": lambda m: probabilities(
        m.normal(7, 4), m.probabilities(7, 4), m.positive(4), label_smoothing=0.3
    ),
    "one-class": lambda m: indices(m.normal(2, 1, 3), m.labels(1, 2, 3)),
    "sequence": lambda m: indices(m.normal(2, 3, 5), m.labels(3, 2, 5), m.positive(3)),
    "image": lambda m: indices(m.normal(2, 5, 3, 4), m.labels(5, 2, 3, 4)),
    "image-weight": lambda m: indices(m.normal(2, 5, 3, 4), m.labels(5, 2, 3, 4), m.positive(5)),
    "image-smoothing": lambda m: indices(m.normal(2, 5, 3, 4), m.labels(5, 2, 3, 4), label_smoothing=0.1),
    "image-all-smoothing": lambda m: indices(m.normal(2, 5, 3, 4), m.labels(5, 2, 3, 4), label_smoothing=1.0),
    "image-ignored": lambda m: indices(m.normal(2, 5, 3, 4), m.labels(5, 2, 3, 4, ignored=-100)),
    "image-ignored-class": lambda m: indices(m.normal(2, 5, 3, 4), m.labels(5, 2, 3, 4, ignored=2), ignore_index=2),
    "image-everything": lambda m: indices(
        m.normal(2, 5, 3, 4), m.labels(5, 2, 3, 4, ignored=-7), m.positive(5), ignore_index=-7, label_smoothing=0.1
    ),
    "image-uint8": lambda m: indices(
        m.normal(2, 5, 3, 4), m.labels(5, 2, 3, 4, dtype=torch.uint8, ignored=255), ignore_index=255
    ),
    "image-int16": lambda m: indices(
        m.normal(2, 5, 3, 4), m.labels(5, 2, 3, 4, dtype=torch.int16, ignored=-100), m.positive(5)
    ),
    "image-int32": lambda m: indices(
        m.normal(2, 5, 3, 4), m.labels(5, 2, 3, 4, dtype=torch.int32, ignored=-100), label_smoothing=0.1
    ),
    "image-channels-last": lambda m: indices(
        m.normal(2, 5, 3, 4).to(memory_format=torch.channels_last), m.labels(5, 2, 3, 4, ignored=-100), m.positive(5)
    ),
    "image-probabilities": lambda m: probabilities(m.normal(2, 5, 3, 4), m.probabilities(2, 5, 3, 4)),
    "image-probabilities-everything": lambda m: probabilities(
        m.normal(2, 5, 3, 4), m.probabilities(2, 5, 3, 4), m.positive(5), label_smoothing=0.2
    ),
    "image-any-numbers-as-probabilities": lambda m: probabilities(m.normal(2, 5, 3, 4), m.normal(2, 5, 3, 4)),
    "image-probabilities-channels-last": lambda m: probabilities(
        m.normal(2, 5, 3, 4).to(memory_format=torch.channels_last), m.probabilities(2, 5, 3, 4), m.positive(5)
    ),
    "volume": lambda m: indices(m.normal(2, 3, 2, 3, 2), m.labels(3, 2, 2, 3, 2, ignored=-100), m.positive(3)),
}


def large_cross_entropy(m: Maker, elements: int) -> Call:
    classes, width = 19, 256
    height = max(1, elements // (2 * classes * width))
    return indices(
        m.normal(2, classes, height, width),
        m.labels(classes, 2, height, width, ignored=-100),
        m.positive(classes),
        label_smoothing=0.1,
    )


# ---- mse_loss --------------------------------------------------------------------------------------------------------


def difference(input: Tensor, target: Tensor, weight: Tensor | None = None) -> Call:
    call = indices(input, target, weight)
    return replace(call, differentiable=tuple(call.tensors))


MSE_LOSS_CASES: dict[str, Callable[[Maker], Call]] = {
    "scalar": lambda m: difference(m.normal(), m.normal()),
    "vector": lambda m: difference(m.normal(7), m.normal(7)),
    "vector-weight": lambda m: difference(m.normal(7), m.normal(7), m.positive(7)),
    "image": lambda m: difference(m.normal(2, 3, 4, 5), m.normal(2, 3, 4, 5)),
    "image-weight": lambda m: difference(m.normal(2, 3, 4, 5), m.normal(2, 3, 4, 5), m.positive(2, 3, 4, 5)),
    "image-channels-last": lambda m: difference(
        m.normal(2, 3, 4, 5).to(memory_format=torch.channels_last),
        m.normal(2, 3, 4, 5).to(memory_format=torch.channels_last),
    ),
    "image-two-layouts": lambda m: difference(
        m.normal(2, 3, 4, 5).to(memory_format=torch.channels_last), m.normal(2, 3, 4, 5), m.positive(2, 3, 4, 5)
    ),
    "broadcast-target": lambda m: difference(m.normal(2, 3, 4), m.normal(3, 1)),
    "broadcast-input": lambda m: difference(m.normal(3, 1), m.normal(2, 3, 4)),
    "broadcast-both": lambda m: difference(m.normal(2, 1, 4), m.normal(3, 1)),
    "broadcast-scalar": lambda m: difference(m.normal(2, 3), m.normal()),
    "broadcast-target-weight": lambda m: difference(m.normal(2, 3, 4), m.normal(3, 1), m.positive(2, 3, 4)),
    "broadcast-input-weight": lambda m: difference(m.normal(3, 1), m.normal(2, 3, 4), m.positive(3, 1)),
}


def large_mse_loss(m: Maker, elements: int) -> Call:
    return difference(m.normal(elements), m.normal(elements))


# ---- the registry ----------------------------------------------------------------------------------------------------

LOSSES = (
    Loss(
        name="cross_entropy",
        function=fusedloss.cross_entropy,
        module=fusedloss.CrossEntropyLoss,
        reference=fusedloss.reference.cross_entropy,
        torch=torch_cross_entropy,
        torch_module=nn.CrossEntropyLoss,
        cases=CROSS_ENTROPY_CASES,
        typical=("image-everything", "image-probabilities-everything", "rows"),
        large=large_cross_entropy,
    ),
    Loss(
        name="mse_loss",
        function=fusedloss.mse_loss,
        module=fusedloss.MSELoss,
        reference=fusedloss.reference.mse_loss,
        torch=F.mse_loss,
        torch_module=nn.MSELoss,
        cases=MSE_LOSS_CASES,
        typical=("image-weight", "broadcast-target", "image"),
        large=large_mse_loss,
    ),
)

each_loss = pytest.mark.parametrize("loss", [pytest.param(loss, id=loss.name) for loss in LOSSES])
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
each_dtype = pytest.mark.parametrize("dtype", [pytest.param(d, id=str(d).removeprefix("torch.")) for d in DTYPES])
each_typical_case = pytest.mark.parametrize(
    "case", [pytest.param(Case(loss, name), id=f"{loss.name}-{name}") for loss in LOSSES for name in loss.typical]
)
first_cases = pytest.mark.parametrize(
    "case", [pytest.param(Case(loss, loss.typical[0]), id=f"{loss.name}-{loss.typical[0]}") for loss in LOSSES]
)
each_case = pytest.mark.parametrize(
    "case", [pytest.param(Case(loss, name), id=f"{loss.name}-{name}") for loss in LOSSES for name in loss.cases]
)
