"""Who is measured: a provider is a library's way of computing the losses.

To add one, write a function that imports the library and returns a builder per loss, and enter it in PROVIDERS.
A loss that it does not have is left out of the mapping.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.workloads import Case

# The loss as a function of the input alone: everything else, conversions done once included, is bound beforehand.
LossOfInput = Callable[[Tensor], Tensor]
Builder = Callable[[Case], LossOfInput]


@dataclass(frozen=True)
class Provider:
    name: str
    about: str
    load: Callable[[], Mapping[str, Builder]]  # an ImportError means that the library is not installed


def load_fusedloss() -> Mapping[str, Builder]:
    import fusedloss

    def builder(function: Callable[..., Tensor]) -> Builder:
        return lambda case: lambda input: function(input, case.target, **case.options)

    return {"cross_entropy": builder(fusedloss.cross_entropy), "mse_loss": builder(fusedloss.mse_loss)}


TORCH_LOSSES: dict[str, Callable[..., Tensor]] = {"cross_entropy": F.cross_entropy, "mse_loss": F.mse_loss}


def torch_loss(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    """torch.nn.functional's loss, with the conversion that it needs for labels that are not int64."""
    function = TORCH_LOSSES[case.workload.loss]
    options = case.options
    if not case.target.is_floating_point() and case.target.dtype != torch.int64:
        return lambda input, target: function(input, target.long(), **options)
    return lambda input, target: function(input, target, **options)


def build_eager(case: Case) -> LossOfInput:
    function = torch_loss(case)
    return lambda input: function(input, case.target)


def build_compiled(case: Case) -> LossOfInput:
    # dynamic=False: shapes are constants of the generated code, which is the best case for the compiler.
    function = torch.compile(torch_loss(case), dynamic=False, fullgraph=True)
    return lambda input: function(input, case.target)


OURS = "fusedloss"
EAGER = "eager"
COMPILE = "compile"

PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider(OURS, "this package", load_fusedloss),
        Provider(EAGER, "torch.nn.functional as it is", lambda: dict.fromkeys(TORCH_LOSSES, build_eager)),
        Provider(
            COMPILE, "torch.compile of the same, default options", lambda: dict.fromkeys(TORCH_LOSSES, build_compiled)
        ),
    )
}
