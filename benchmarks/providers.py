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
    devices: tuple[str, ...] = ("cpu", "cuda")
    overwrites_input: bool = False  # gets logits of its own, because the others need what it overwrites


def load_fusedloss() -> Mapping[str, Builder]:
    import fusedloss

    def builder(function: Callable[..., Tensor]) -> Builder:
        return lambda case: lambda input: function(input, case.target, **case.options)

    def activation(input: Tensor, target: Tensor) -> str:
        return "sigmoid" if target.shape == input.shape else "softmax"

    def soft_iou(input: Tensor, target: Tensor, **options: Any) -> Tensor:
        return fusedloss.soft_iou_loss(input, target, activation=activation(input, target), **options)

    def ce_iou(input: Tensor, target: Tensor, **options: Any) -> Tensor:
        loss: Tensor = fusedloss.segmentation_loss(input, target, activation=activation(input, target), **options)
        return loss

    def ce_dice(input: Tensor, target: Tensor, **options: Any) -> Tensor:
        loss: Tensor = fusedloss.segmentation_loss(input, target, alpha=0.5, beta=0.5, **options)
        return loss

    def all_three(input: Tensor, target: Tensor, **options: Any) -> Tensor:
        loss: Tensor = fusedloss.segmentation_loss(input, target, brier=1.0, **options)
        return loss

    return {
        "cross_entropy": builder(fusedloss.cross_entropy),
        "mse_loss": builder(fusedloss.mse_loss),
        "soft_iou": builder(soft_iou),
        "dice": builder(fusedloss.dice_loss),
        "ce+iou": builder(ce_iou),
        "ce+dice": builder(ce_dice),
        "ce+iou+brier": builder(all_three),
    }


TORCH_LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "mse_loss": F.mse_loss,
    **{loss: formulas.written_out(loss) for loss in formulas.TERMS if loss != "cross_entropy"},
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

    def dice(case: Case) -> LossOfInput:
        loss = smp.losses.DiceLoss("multiclass", **case.options)
        return lambda input: loss(input, case.target)

    return {"soft_iou": soft_iou, "dice": dice}


def load_monai() -> Mapping[str, Builder]:
    import monai.losses

    # No smoothing, and sums over the batch: the same loss as the others compute.
    same = {"batch": True, "smooth_nr": 0.0, "smooth_dr": 1e-7}

    def overlap(jaccard: bool) -> Builder:
        def build(case: Case) -> LossOfInput:
            if case.target.shape == case.input.shape:
                loss = monai.losses.DiceLoss(sigmoid=True, soft_label=True, jaccard=jaccard, **same)
                return lambda input: loss(input, case.target)
            loss = monai.losses.DiceLoss(softmax=True, to_onehot_y=True, jaccard=jaccard, **same, **case.options)
            return lambda input: loss(input, case.target.unsqueeze(1))

        return build

    def with_ce(jaccard: bool) -> Builder:
        def build(case: Case) -> LossOfInput | None:
            # DiceCELoss has no ignore_index, and no soft labels.
            if case.options or case.target.shape == case.input.shape:
                return None
            loss = monai.losses.DiceCELoss(softmax=True, to_onehot_y=True, jaccard=jaccard, **same)
            return lambda input: loss(input, case.target.unsqueeze(1))

        return build

    return {"soft_iou": overlap(True), "dice": overlap(False), "ce+iou": with_ce(True), "ce+dice": with_ce(False)}


def load_kornia() -> Mapping[str, Builder]:
    import kornia.losses

    def dice(case: Case) -> LossOfInput | None:
        # Images only, and sums of each image by itself: those of the batch when it is one image. "macro" is the mean
        # over the classes; its tversky_loss and its default "micro" divide sums over all classes, another loss.
        if case.input.dim() != 4 or len(case.input) != 1:
            return None
        return lambda input: kornia.losses.dice_loss(input, case.target, average="macro", **case.options)

    return {"dice": dice}


def load_nnunet() -> Mapping[str, Builder]:
    from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
    from nnunetv2.utilities.helpers import softmax_helper_dim1

    # The trainer has smooth 1e-5 and, for 2-d, sums of each image; these settings make it the loss of the others.
    # Its loss is minus the score, so 1 is added to it.
    same = {"batch_dice": True, "do_bg": True, "smooth": 0.0, "ddp": False}

    def dice(case: Case) -> LossOfInput | None:
        if case.options:  # the mask that stands for an ignored label is made by DC_and_CE_loss alone
            return None
        loss = MemoryEfficientSoftDiceLoss(apply_nonlin=softmax_helper_dim1, **same)
        return lambda input: loss(input, case.target.unsqueeze(1)) + 1.0

    def ce_dice(case: Case) -> LossOfInput:
        loss = DC_and_CE_loss(
            same, {}, ignore_label=case.options.get("ignore_index"), dice_class=MemoryEfficientSoftDiceLoss
        )
        return lambda input: loss(input, case.target.unsqueeze(1)) + 1.0

    return {"dice": dice, "ce+dice": ce_dice}


def load_jdt() -> Mapping[str, Builder]:
    def build(alpha: float, beta: float, with_ce: bool) -> Builder:
        overlap = formulas.jdt(alpha, beta)

        def builder(case: Case) -> LossOfInput | None:
            target, options = case.target, case.options
            if not with_ce:
                return lambda input: overlap(input, target, **options)
            if target.shape == case.input.shape:
                return None
            return lambda input: F.cross_entropy(input, target, **options) + overlap(input, target, **options)

        return builder

    return {
        "soft_iou": build(1.0, 1.0, False),
        "dice": build(0.5, 0.5, False),
        "ce+iou": build(1.0, 1.0, True),
        "ce+dice": build(0.5, 0.5, True),
    }


def load_liger() -> Mapping[str, Builder]:
    from liger_kernel.transformers.functional import liger_cross_entropy

    def cross_entropy(case: Case) -> LossOfInput | None:
        if case.input.dim() != 2:  # rows of classes only
            return None
        return lambda input: liger_cross_entropy(input, case.target, **case.options)

    return {"cross_entropy": cross_entropy}


OURS = "fusedloss"
EAGER = "eager"
COMPILE = "compile"
SMP = "smp"
MONAI = "monai"
KORNIA = "kornia"
NNUNET = "nnunet"
JDT = "jdt"
LIGER = "liger"

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
        Provider(KORNIA, "kornia: Dice of one image", load_kornia, is_peer=True),
        Provider(NNUNET, "nnU-Net's MemoryEfficientSoftDiceLoss and DC_and_CE_loss", load_nnunet, is_peer=True),
        Provider(JDT, "the Jaccard metric loss, in formulas.py", load_jdt, is_peer=True),
        Provider(
            LIGER,
            "Liger's cross-entropy of rows; GPU only",
            load_liger,
            is_peer=True,
            devices=("cuda",),
            overwrites_input=True,
        ),
    )
}
