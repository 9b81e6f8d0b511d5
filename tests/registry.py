"""Every loss of the package, with what the tests need to know about it. A new loss is a new entry in ``LOSSES``.

A case is a recipe for one kind of call, named after what is special about it. It is small, because most tests run it
many times. ``reduction`` is no part of it: every loss has the same three, and the tests run through them.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedloss

from . import eager

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
    module: Callable[..., nn.Module] | None
    reference: Callable[..., Tensor]
    torch: Callable[..., Tensor]  # PyTorch's function, made to take what it would refuse but ours does not; or eager.py
    torch_module: type[nn.Module] | None  # of the two losses that PyTorch has
    cases: Mapping[str, Callable[[Maker], Call]]
    typical: tuple[str, ...]  # the cases that stand for all where a test is slow, the most telling one first
    large: Callable[[Maker, int], Call]  # a call of about so many elements, for memory and threads
    reductions: tuple[str, ...] = REDUCTIONS  # () for a loss that is one thing
    unreduced_is_weighted: bool = True  # "none" has the class weights in it
    required: Mapping[str, Any] = field(default_factory=dict)  # options that have no default

    def make_module(self, **options: Any) -> nn.Module:
        if self.module is None:
            pytest.skip(f"{self.name} is a function alone")
        return self.module(**self.required, **options)

    def make_torch_module(self, **options: Any) -> Callable[..., Tensor]:
        if self.torch_module is None:
            return functools.partial(self.torch, **self.required, **options)
        return self.torch_module(**options)

    def target(self, m: "Maker", samples: int, classes: int, *pixels: int) -> Tensor:
        """A target for an input (samples, classes, *pixels)."""
        return m.normal(samples, classes, *pixels) if self.name == "mse_loss" else m.labels(classes, samples, *pixels)


@dataclass(frozen=True)
class Case:
    """One loss with one of its cases: what a test is parametrized over."""

    loss: Loss
    name: str

    def make(
        self, dtype: torch.dtype = torch.float64, device: str = "cpu", reduction: str = "mean", seed: int = 0
    ) -> Call:
        call = self.loss.cases[self.name](Maker(dtype, device, seed))
        return call.with_options(reduction=reduction) if self.loss.reductions else call


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


def torch_mse_loss(input: Tensor, target: Tensor, weight: Tensor | None = None, **options: Any) -> Tensor:
    # torch 2.10 has no backward for two dtypes ("Found dtype Float but expected Double").
    dtype = torch.promote_types(input.dtype, target.dtype)
    return F.mse_loss(input.to(dtype), target.to(dtype), weight=weight, **options)


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


# ---- losses on probabilities -----------------------------------------------------------------------------------------


def on_pixels(input: Tensor, target: Tensor, weight: Tensor | None = None, **options: Any) -> Call:
    """A call whose options may be tensors too. Soft labels get a gradient."""
    tensors = {"input": input, "target": target} | ({} if weight is None else {"weight": weight})
    tensors |= {name: value for name, value in options.items() if isinstance(value, Tensor)}
    options = {name: value for name, value in options.items() if not isinstance(value, Tensor)}
    return Call(tensors, options, ("input", "target") if target.is_floating_point() else ("input",))


def mask(m: Maker, *shape: int) -> Tensor:
    return (m.positive(*shape) > 0.6).to(m.device)


# How classes are labelled and pixels weighed: of every loss on probabilities.
LABELS: dict[str, Callable[[Maker], Call]] = {
    "rows": lambda m: on_pixels(m.normal(7, 4), m.labels(4, 7)),
    "image": lambda m: on_pixels(m.normal(2, 5, 3, 4), m.labels(5, 2, 3, 4)),
    "image-everything": lambda m: on_pixels(
        m.normal(2, 5, 3, 4),
        m.labels(5, 2, 3, 4, ignored=-7),
        m.positive(5),
        ignore_index=-7,
        pixel_weight=m.positive(2, 3, 4),
    ),
    "image-uint8": lambda m: on_pixels(
        m.normal(2, 5, 3, 4), m.labels(5, 2, 3, 4, dtype=torch.uint8, ignored=255), ignore_index=255
    ),
    "image-ignored-class": lambda m: on_pixels(m.normal(2, 5, 3, 4), m.labels(5, 2, 3, 4, ignored=2), ignore_index=2),
    "image-pixel-mask": lambda m: on_pixels(
        m.normal(2, 5, 3, 4), m.labels(5, 2, 3, 4), m.positive(5), pixel_weight=mask(m, 2, 3, 4)
    ),
    "image-probabilities": lambda m: on_pixels(m.normal(2, 5, 3, 4), m.probabilities(2, 5, 3, 4)),
    "image-probabilities-everything": lambda m: on_pixels(
        m.normal(2, 5, 3, 4), m.probabilities(2, 5, 3, 4), m.positive(5), pixel_weight=m.positive(2, 3, 4)
    ),
    "image-channels-last": lambda m: on_pixels(
        m.normal(2, 5, 3, 4).to(memory_format=torch.channels_last), m.labels(5, 2, 3, 4, ignored=-100), m.positive(5)
    ),
    "sigmoid": lambda m: on_pixels(
        m.normal(2, 5, 3, 4), m.labels(5, 2, 3, 4, ignored=-100), m.positive(5), activation="sigmoid"
    ),
    "sigmoid-mask": lambda m: on_pixels(m.normal(2, 3, 3, 4), mask(m, 2, 3, 3, 4), activation="sigmoid"),
    "sigmoid-probabilities": lambda m: on_pixels(
        m.normal(2, 3, 3, 4), m.probabilities(2, 3, 3, 4), m.positive(3), activation="sigmoid"
    ),
    "binary": lambda m: on_pixels(
        m.normal(2, 1, 3, 4),
        m.labels(2, 2, 3, 4, dtype=torch.uint8, ignored=255),
        activation="sigmoid",
        ignore_index=255,
    ),
    "binary-mask": lambda m: on_pixels(
        m.normal(2, 1, 3, 4), mask(m, 2, 1, 3, 4), activation="sigmoid", pixel_weight=m.positive(2, 3, 4)
    ),
    "probabilities-in": lambda m: on_pixels(
        m.probabilities(2, 5, 3, 4), m.labels(5, 2, 3, 4), m.positive(5), activation="none"
    ),
    "probabilities-in-and-out": lambda m: on_pixels(
        m.probabilities(2, 5, 3, 4), m.probabilities(2, 5, 3, 4), activation="none"
    ),
    "volume": lambda m: on_pixels(m.normal(2, 3, 2, 3, 2), m.labels(3, 2, 2, 3, 2, ignored=-100), m.positive(3)),
}

# What the overlap has beside them. Labels of a third of the classes only, so that some are absent.
OVERLAPS: dict[str, Callable[[Maker], Call]] = {
    "per-image": lambda m: on_pixels(
        m.normal(3, 6, 3, 4), m.labels(3, 3, 3, 4, ignored=-100), m.positive(6), per_image=True
    ),
    "per-image-rows": lambda m: on_pixels(m.normal(7, 4), m.labels(4, 7), per_image=True, absent="count"),
    "per-image-channels-last": lambda m: on_pixels(
        m.normal(3, 6, 3, 4).to(memory_format=torch.channels_last), m.probabilities(3, 6, 3, 4), per_image=True
    ),
    "absent-count": lambda m: on_pixels(m.normal(2, 6, 3, 4), m.labels(2, 2, 3, 4), m.positive(6), absent="count"),
    "absent-zero": lambda m: on_pixels(m.normal(2, 6, 3, 4), m.labels(2, 2, 3, 4), m.positive(6), absent="zero"),
    "classes": lambda m: on_pixels(m.normal(2, 6, 3, 4), m.labels(6, 2, 3, 4), m.positive(6), classes=(4, 1, 3)),
    "smooth": lambda m: on_pixels(m.normal(2, 6, 3, 4), m.labels(6, 2, 3, 4), smooth=1.5, absent="count"),
    "log": lambda m: on_pixels(m.normal(2, 6, 3, 4), m.labels(6, 2, 3, 4), log=True, gamma=1.5),
    "gamma": lambda m: on_pixels(m.normal(2, 6, 3, 4), m.probabilities(2, 6, 3, 4), gamma=0.75),
    "product": lambda m: on_pixels(m.normal(2, 6, 3, 4), m.probabilities(2, 6, 3, 4), intersection="product"),
}


def large_on_probabilities(m: Maker, elements: int) -> Call:
    classes, width = 19, 256
    height = max(1, elements // (2 * classes * width))
    return on_pixels(
        m.normal(2, classes, height, width), m.labels(classes, 2, height, width, ignored=-100), m.positive(classes)
    )


def without_weight(call: Call) -> Call:
    return replace(call, tensors={name: tensor for name, tensor in call.tensors.items() if name != "weight"})


def some(
    cases: Mapping[str, Callable[[Maker], Call]], *names: str, **options: Any
) -> dict[str, Callable[[Maker], Call]]:
    return {name: lambda m, name=name: cases[name](m).with_options(**options) for name in names}


SEGMENTATION_CASES: dict[str, Callable[[Maker], Call]] = {
    **some(LABELS, "rows", "image", "image-uint8", "image-pixel-mask", "volume", brier=0.5),
    **some(LABELS, "image-channels-last", "image-probabilities", brier=0.5),
    **some(LABELS, "image-everything", "image-probabilities-everything", brier=0.5, label_smoothing=0.1),
    **some(LABELS, "sigmoid", "sigmoid-probabilities", "binary", "binary-mask", brier=0.5, label_smoothing=0.1),
    **some(OVERLAPS, "per-image", "classes", "product"),
    **some(LABELS, "probabilities-in", cross_entropy=0.0, brier=2.0),
    "tversky": lambda m: LABELS["image-everything"](m).with_options(alpha=0.3, beta=0.7, iou=0.5),
    "cross-entropy-alone": lambda m: LABELS["image-everything"](m).with_options(iou=0.0),
    "cross-entropy-and-brier": lambda m: LABELS["image-everything"](m).with_options(iou=0.0, brier=1.0),
    "iou-and-brier": lambda m: LABELS["image"](m).with_options(cross_entropy=0.0, brier=1.0),
    "pos-weight": lambda m: on_pixels(
        m.normal(2, 3, 3, 4), mask(m, 2, 3, 3, 4), m.positive(3), activation="sigmoid", pos_weight=m.positive(3)
    ),
}

# ---- the registry ----------------------------------------------------------------------------------------------------

CROSS_ENTROPY = Loss(
    name="cross_entropy",
    function=fusedloss.cross_entropy,
    module=fusedloss.CrossEntropyLoss,
    reference=fusedloss.reference.cross_entropy,
    torch=torch_cross_entropy,
    torch_module=nn.CrossEntropyLoss,
    cases=CROSS_ENTROPY_CASES,
    typical=("image-everything", "image-probabilities-everything", "rows"),
    large=large_cross_entropy,
)
MSE_LOSS = Loss(
    name="mse_loss",
    function=fusedloss.mse_loss,
    module=fusedloss.MSELoss,
    reference=fusedloss.reference.mse_loss,
    torch=torch_mse_loss,
    torch_module=nn.MSELoss,
    cases=MSE_LOSS_CASES,
    typical=("image-weight", "broadcast-target", "image"),
    large=large_mse_loss,
)
SOFT_IOU_LOSS = Loss(
    name="soft_iou_loss",
    function=fusedloss.soft_iou_loss,
    module=fusedloss.SoftIoULoss,
    reference=fusedloss.reference.soft_iou_loss,
    torch=eager.soft_iou_loss,
    torch_module=None,
    cases={**LABELS, **OVERLAPS},
    typical=("image-everything", "image-probabilities-everything", "per-image"),
    large=large_on_probabilities,
    unreduced_is_weighted=False,
)
DICE_LOSS = Loss(
    name="dice_loss",
    function=fusedloss.dice_loss,
    module=fusedloss.DiceLoss,
    reference=fusedloss.reference.dice_loss,
    torch=eager.dice_loss,
    torch_module=None,
    cases={**some(LABELS, "image-everything", "binary", "image-probabilities"), **some(OVERLAPS, "per-image")},
    typical=("image-everything",),
    large=large_on_probabilities,
    unreduced_is_weighted=False,
)
TVERSKY_LOSS = Loss(
    name="tversky_loss",
    function=fusedloss.tversky_loss,
    module=fusedloss.TverskyLoss,
    reference=fusedloss.reference.tversky_loss,
    torch=eager.tversky_loss,
    torch_module=None,
    cases={
        **some(LABELS, "image-everything", "image-probabilities", "sigmoid-mask", alpha=0.3, beta=0.7),
        **some(OVERLAPS, "per-image", "gamma", alpha=0.3, beta=0.7),
    },
    typical=("image-everything",),
    large=lambda m, elements: large_on_probabilities(m, elements).with_options(alpha=0.3, beta=0.7),
    unreduced_is_weighted=False,
    required={"alpha": 0.3, "beta": 0.7},
)
BRIER_LOSS = Loss(
    name="brier_loss",
    function=fusedloss.brier_loss,
    module=fusedloss.BrierLoss,
    reference=fusedloss.reference.brier_loss,
    torch=eager.brier_loss,
    torch_module=None,
    cases=LABELS,
    typical=("image-everything", "image-probabilities-everything"),
    large=large_on_probabilities,
)
SEGMENTATION_LOSS = Loss(
    name="segmentation_loss",
    function=fusedloss.segmentation_loss,
    module=fusedloss.SegmentationLoss,
    reference=fusedloss.reference.segmentation_loss,
    torch=eager.segmentation_loss,
    torch_module=None,
    cases=SEGMENTATION_CASES,
    typical=("image-everything", "image-probabilities-everything", "sigmoid"),
    large=lambda m, elements: large_on_probabilities(m, elements).with_options(brier=1.0),
    reductions=(),
)
OVERLAP_STATISTICS = Loss(
    name="overlap_statistics",
    function=lambda *tensors, **options: torch.stack(fusedloss.overlap_statistics(*tensors, **options)),
    module=None,
    reference=lambda *tensors, **options: torch.stack(fusedloss.reference.overlap_statistics(*tensors, **options)),
    torch=eager.overlap_statistics,
    torch_module=None,
    cases={
        name: lambda m, name=name: without_weight({**LABELS, **OVERLAPS}[name](m))
        for name in ("image", "image-everything", "image-probabilities", "binary", "per-image", "product")
    },
    typical=("image-everything",),
    large=lambda m, elements: without_weight(large_on_probabilities(m, elements)),
    reductions=(),
)
LOSSES = (
    CROSS_ENTROPY,
    MSE_LOSS,
    SOFT_IOU_LOSS,
    DICE_LOSS,
    TVERSKY_LOSS,
    BRIER_LOSS,
    SEGMENTATION_LOSS,
    OVERLAP_STATISTICS,
)
TWINS = (CROSS_ENTROPY, MSE_LOSS)  # of losses that PyTorch has

each_loss = pytest.mark.parametrize("loss", [pytest.param(loss, id=loss.name) for loss in LOSSES])
each_twin = pytest.mark.parametrize("loss", [pytest.param(loss, id=loss.name) for loss in TWINS])
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
each_dtype = pytest.mark.parametrize("dtype", [pytest.param(d, id=str(d).removeprefix("torch.")) for d in DTYPES])
each_typical_case = pytest.mark.parametrize(
    "case", [pytest.param(Case(loss, name), id=f"{loss.name}-{name}") for loss in LOSSES for name in loss.typical]
)
first_cases = pytest.mark.parametrize(
    "case", [pytest.param(Case(loss, loss.typical[0]), id=f"{loss.name}-{loss.typical[0]}") for loss in LOSSES]
)
# Dice and Tversky are the soft IoU with other numbers, and the Brier score is a term of the segmentation loss.
FORMULAS = tuple(loss for loss in LOSSES if loss not in (DICE_LOSS, TVERSKY_LOSS, BRIER_LOSS))
each_formula = pytest.mark.parametrize(
    "case", [pytest.param(Case(loss, loss.typical[0]), id=f"{loss.name}-{loss.typical[0]}") for loss in FORMULAS]
)
each_case = pytest.mark.parametrize(
    "case", [pytest.param(Case(loss, name), id=f"{loss.name}-{name}") for loss in LOSSES for name in loss.cases]
)
