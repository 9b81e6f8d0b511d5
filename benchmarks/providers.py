"""Who is measured: a provider is a library's way of computing the losses.

To add one, write a function that imports the library and returns a builder per loss, and enter it in PROVIDERS.
A loss that it does not have is left out of the mapping.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import formulas
from benchmarks.workloads import Case

# The loss as a function of the input alone: everything else, conversions done once included, is bound beforehand.
LossOfInput = Callable[[Tensor], Tensor]
Builder = Callable[[Case], LossOfInput | None]  # None: the library cannot do this one


@dataclass(frozen=True)
class Provider:
    name: str
    about: str
    load: Callable[[], Mapping[str, Builder]]  # an ImportError means that the library is not installed
    is_peer: bool = False  # another library: its precision is its own affair, see truth.SAME_LOSS


def load_fusedloss() -> Mapping[str, Builder]:
    import fusedloss

    def builder(function: Callable[..., Tensor]) -> Builder:
        return lambda case: lambda input: function(input, case.target, **case.options)

    def soft_iou(input: Tensor, target: Tensor, **options: Any) -> Tensor:
        activation = "sigmoid" if target.shape == input.shape else "softmax"
        return fusedloss.soft_iou_loss(input, target, activation=activation, **options)

    def all_three(input: Tensor, target: Tensor, **options: Any) -> Tensor:
        loss: Tensor = fusedloss.segmentation_loss(input, target, brier=1.0, **options)
        return loss

    return {
        "cross_entropy": builder(fusedloss.cross_entropy),
        "mse_loss": builder(fusedloss.mse_loss),
        "soft_iou": builder(soft_iou),
        "ce+iou": builder(fusedloss.segmentation_loss),
        "ce+iou+brier": builder(all_three),
    }


TORCH_LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "mse_loss": F.mse_loss,
    **{loss: formulas.written_out(loss) for loss in ("soft_iou", "ce+iou", "ce+iou+brier")},
}


def torch_loss(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    """torch.nn.functional's loss or the formula written out, with the conversion that labels other than int64 need."""
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


def load_smp() -> Mapping[str, Builder]:
    try:
        import segmentation_models_pytorch as smp
    except RuntimeError as error:  # it imports torchvision, whose binary fits one build of torch only
        raise ImportError(str(error)) from error

    def soft_iou(case: Case) -> LossOfInput:
        mode = "binary" if case.target.shape == case.input.shape else "multiclass"
        loss = smp.losses.JaccardLoss(mode, **case.options)
        return lambda input: loss(input, case.target)

    return {"soft_iou": soft_iou}


def load_monai() -> Mapping[str, Builder]:
    import monai.losses

    # No smoothing, and sums over the batch: the same loss as the others compute.
    options = {"jaccard": True, "batch": True, "smooth_nr": 0.0, "smooth_dr": 1e-7}

    def soft_iou(case: Case) -> LossOfInput:
        if case.target.shape == case.input.shape:
            loss = monai.losses.DiceLoss(sigmoid=True, soft_label=True, **options)
            return lambda input: loss(input, case.target)
        loss = monai.losses.DiceLoss(softmax=True, to_onehot_y=True, **options, **case.options)
        return lambda input: loss(input, case.target.unsqueeze(1))

    def ce_iou(case: Case) -> LossOfInput | None:
        if case.options:  # DiceCELoss has no ignore_index
            return None
        loss = monai.losses.DiceCELoss(softmax=True, to_onehot_y=True, **options)
        return lambda input: loss(input, case.target.unsqueeze(1))

    return {"soft_iou": soft_iou, "ce+iou": ce_iou}


OURS = "fusedloss"
EAGER = "eager"
COMPILE = "compile"
SMP = "smp"
MONAI = "monai"

PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider(OURS, "this package", load_fusedloss),
        Provider(
            EAGER, "torch.nn.functional as it is, or formulas.py", lambda: dict.fromkeys(TORCH_LOSSES, build_eager)
        ),
        Provider(
            COMPILE, "torch.compile of the same, default options", lambda: dict.fromkeys(TORCH_LOSSES, build_compiled)
        ),
        Provider(SMP, "segmentation_models_pytorch", load_smp, is_peer=True),
        Provider(MONAI, "MONAI", load_monai, is_peer=True),
    )
}
