"""Every row of docs/other_libraries.md: the settings it names give the other library's numbers, or it says why not.

The other library's loss is written out in other_libraries.py; where the library is installed, that is checked too.
"""

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedloss

from .compare import random_like
from .other_libraries import (
    FORMULAS,
    JDT,
    MONAI,
    NNUNET,
    SMP,
    jdt_loss,
    one_hot,
    softmax_of_classes,
)

# ---- numbers ---------------------------------------------------------------------------------------------------------

N, C, SIZE = 3, 4, (4, 5)
_GENERATOR = torch.Generator().manual_seed(0)


def uniform(*shape):
    return torch.rand(shape, generator=_GENERATOR, dtype=torch.float64)


LOGITS = 2 * torch.randn(N, C, *SIZE, generator=_GENERATOR, dtype=torch.float64)
ONE_LOGIT = LOGITS[:, :1]
# Class 3 is nowhere, and class 2 not in image 0: each policy for absent classes gives another number.
INDEX = (uniform(N, *SIZE) * torch.tensor([2, 3, 3]).reshape(N, 1, 1)).long()
PRESENT = one_hot(INDEX, C).flatten(2).any(2)
MASKS = (uniform(N, C, *SIZE) > 0.6).long() * PRESENT.reshape(N, C, 1, 1)
BINARY = (uniform(N, 1, *SIZE) > 0.6).long() * torch.tensor([0, 1, 1]).reshape(N, 1, 1, 1)
SOFT = uniform(N, C, *SIZE).log() * PRESENT.reshape(N, C, 1, 1)
SOFT = SOFT / SOFT.sum(1, keepdim=True)
KEEP = uniform(N, *SIZE) > 0.3
KEEP_TWO = KEEP & torch.tensor([True, False, True]).reshape(N, 1, 1)  # nothing of image 1
PARTLY = torch.where(KEEP, INDEX, 255)
W = torch.tensor([0.5, 2.0, 1.25, 0.75], dtype=torch.float64)  # the same numbers in float32
FOREGROUND = range(1, C)


def ignoring(target):
    """``target`` (N, C, ...) with 255 in each channel of the pixels that are not kept."""
    return torch.where(KEEP.unsqueeze(1), target, 255)


# ---- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A row of a table: ``cell`` is its first cell, ``ours`` what its second and third say."""

    library: str
    cell: str
    name: str
    arguments: Mapping[str, Any]
    input: Tensor
    target: Tensor
    ours: Callable[[Tensor], Tensor]
    of_call: Mapping[str, Any] = field(default_factory=dict)
    reproducible: bool = True

    def formula(self, input):
        return FORMULAS[self.library, self.name](input, self.target, **self.arguments, **self.of_call)


ROWS: list[Row] = []


def row(library, cell, name, arguments, ours, target, *, input=LOGITS, **fields):
    ROWS.append(Row(library, cell, name, arguments, input, target, ours, **fields))


# segmentation_models_pytorch ------------------------------------------------------------------------------------------

PRICES = {"alpha": 0.3, "beta": 0.7}
SMP_LOSSES = {
    "JaccardLoss": ({}, functools.partial(fusedloss.soft_iou_loss, absent="zero")),
    "DiceLoss": ({}, functools.partial(fusedloss.dice_loss, absent="zero")),
    "TverskyLoss": (PRICES, functools.partial(fusedloss.tversky_loss, absent="zero", **PRICES)),
}


def smp(cell, arguments, ours, target, mode="multiclass", **fields):
    """A row for each of the three losses; ``ours`` is a function of our loss and the input."""
    for name, (prices, loss) in SMP_LOSSES.items():
        row(SMP, cell, name, {"mode": mode, **prices, **arguments}, functools.partial(ours, loss), target, **fields)


smp('`mode="multiclass"`', {}, lambda loss, x: loss(x, INDEX), INDEX)
for binary in (BINARY, torch.zeros_like(BINARY)):
    smp(
        '`mode="binary"`',
        {},
        lambda loss, x, y=binary: loss(x, y, activation="sigmoid"),
        binary,
        mode="binary",
        input=ONE_LOGIT,
    )
smp('`mode="multilabel"`', {}, lambda loss, x: loss(x, MASKS, activation="sigmoid"), MASKS, mode="multilabel")
smp(
    "soft labels (binary, multilabel)",
    {},
    lambda loss, x: loss(x, SOFT, activation="sigmoid"),
    SOFT,
    mode="multilabel",
)
smp(
    "`from_logits=False`",
    {"from_logits": False},
    lambda loss, x: loss(x, INDEX, activation="none"),
    INDEX,
    input=torch.softmax(LOGITS, 1),
)
smp("`smooth=s`", {"smooth": 2.0}, lambda loss, x: loss(x, INDEX, smooth=2.0), INDEX)
# So large that it is the denominator of some classes, and with log the score of some.
smp("`eps=e`", {"eps": 40.0}, lambda loss, x: loss(x, INDEX, eps=40.0), INDEX)
smp("`eps=e`", {"eps": 0.3, "log_loss": True}, lambda loss, x: loss(x, INDEX, eps=0.3, log=True), INDEX)
smp("`log_loss=True`", {"log_loss": True}, lambda loss, x: loss(x, INDEX, log=True), INDEX)
smp("`classes=c`", {"classes": [3, 1]}, lambda loss, x: loss(x, INDEX, classes=[3, 1]), INDEX)
smp(
    "`ignore_index=k` (binary, multiclass)",
    {"ignore_index": 255},
    lambda loss, x: loss(x, PARTLY, ignore_index=255),
    PARTLY,
)
smp("`ignore_index=k` (binary, multiclass)", {"ignore_index": 1}, lambda loss, x: loss(x, INDEX, ignore_index=1), INDEX)
smp(
    "`ignore_index=k` (binary, multiclass)",
    {"ignore_index": 255},
    lambda loss, x: loss(x, ignoring(BINARY), activation="sigmoid", ignore_index=255),
    ignoring(BINARY),
    mode="binary",
    input=ONE_LOGIT,
)
smp(
    "`ignore_index=k` (multilabel), of pixels",
    {"ignore_index": 255},
    lambda loss, x: loss(
        x,
        ignoring(MASKS).masked_fill(ignoring(MASKS) == 255, 0),
        activation="sigmoid",
        pixel_weight=ignoring(MASKS)[:, 0] != 255,
    ),
    ignoring(MASKS),
    mode="multilabel",
)
SCATTERED = torch.where(uniform(N, C, *SIZE) > 0.3, MASKS, 255)
smp(
    "`ignore_index=k` (multilabel), of single channels",
    {"ignore_index": 255},
    lambda loss, x: torch.stack(
        [loss(x[:, c : c + 1], SCATTERED[:, c : c + 1], activation="sigmoid", ignore_index=255) for c in range(C)]
    ).mean(),
    SCATTERED,
    mode="multilabel",
)
smp("`class_weights=w`", {"class_weights": W.tolist()}, lambda loss, x: loss(x, INDEX, W), INDEX)
smp(
    "`class_weights=w`",
    {"class_weights": W.tolist(), "classes": [3, 1]},
    lambda loss, x: loss(x, INDEX, W, classes=[3, 1]),
    INDEX,
)
row(
    SMP,
    "`TverskyLoss(gamma=g)`",
    "TverskyLoss",
    {"mode": "multiclass", "gamma": 1.5, **PRICES},
    lambda x: fusedloss.tversky_loss(x, INDEX, absent="zero", **PRICES) ** 1.5,
    INDEX,
)
row(
    SMP,
    "`TverskyLoss(gamma=g)`, one class",
    "TverskyLoss",
    {"mode": "binary", "gamma": 1.5, **PRICES},
    lambda x: fusedloss.tversky_loss(x, BINARY, activation="sigmoid", absent="zero", gamma=1.5, **PRICES),
    BINARY,
    input=ONE_LOGIT,
)

# MONAI ----------------------------------------------------------------------------------------------------------------

CHANNEL = INDEX.unsqueeze(1)
SOFTMAX = {"softmax": True, "to_onehot_y": True}
JACCARD = {"jaccard": True}
EACH = {"absent": "count", "per_image": True, "intersection": "product"}  # what MONAI and nnU-Net do in every row
MONAI_LOSSES = {  # cell: (class, its arguments, our loss, our smooth for a smooth of 1)
    "`DiceLoss`": ("DiceLoss", {}, fusedloss.dice_loss, 0.5),
    "`DiceLoss(jaccard=True)`": ("DiceLoss", JACCARD, fusedloss.soft_iou_loss, 0.5),
    "`TverskyLoss(alpha=a, beta=b)`": (
        "TverskyLoss",
        PRICES,
        functools.partial(fusedloss.tversky_loss, **PRICES),
        1.0,
    ),
}
TVERSKY = list(MONAI_LOSSES)[2]


def monai(cell, arguments, ours, target, losses=tuple(MONAI_LOSSES), smooth=1e-5, **fields):
    """A row for each of ``losses``; ``ours`` is a function of our loss and the input."""
    for loss in losses:
        name, kind, function, scale = MONAI_LOSSES[loss]
        function = functools.partial(function, **{**EACH, "smooth": scale * smooth})
        row(MONAI, cell, name, {**kind, **arguments}, functools.partial(ours, function), target, **fields)


WEIGHED = tuple(MONAI_LOSSES)[:2]  # Tversky has no weight and no squared_pred
PROBABILITIES = torch.softmax(LOGITS, 1)

for loss in MONAI_LOSSES:
    monai(loss, SOFTMAX, lambda loss, x: loss(x, INDEX), CHANNEL, [loss])
monai("`softmax=True`", {"softmax": True}, lambda loss, x: loss(x, INDEX), one_hot(INDEX, C))
monai("`sigmoid=True`", {"sigmoid": True}, lambda loss, x: loss(x, MASKS, activation="sigmoid"), MASKS)
monai(
    "`sigmoid=True`",
    {"sigmoid": True},
    lambda loss, x: loss(x, BINARY, activation="sigmoid"),
    BINARY,
    input=ONE_LOGIT,
)
monai(
    "neither, `to_onehot_y=True`",
    {"to_onehot_y": True},
    lambda loss, x: loss(x, INDEX, activation="none"),
    CHANNEL,
    input=PROBABILITIES,
)
monai(
    "`other_act=f`",
    {"other_act": torch.erf, "to_onehot_y": True},
    lambda loss, x: loss(torch.erf(x), INDEX, activation="none"),
    CHANNEL,
    input=PROBABILITIES,
)
monai("`batch=True`", {"batch": True, **SOFTMAX}, lambda loss, x: loss(x, INDEX, per_image=False), CHANNEL)
monai(
    "`include_background=False`",
    {"include_background": False, **SOFTMAX},
    lambda loss, x: loss(x, INDEX, classes=FOREGROUND),
    CHANNEL,
)
monai(
    "`smooth_nr=s, smooth_dr=s`",
    {"smooth_nr": 2.0, "smooth_dr": 2.0, **SOFTMAX},
    lambda loss, x: loss(x, INDEX),
    CHANNEL,
    smooth=2.0,
)


def dice_of_statistics(_, x):
    both, predicted, labelled = fusedloss.overlap_statistics(x, INDEX, per_image=True)
    return (1 - (2 * both + 0.0) / (predicted + labelled + 1.0)).mean()


monai(
    "`smooth_nr=n, smooth_dr=d`",
    {"smooth_nr": 0.0, "smooth_dr": 1.0, **SOFTMAX},
    dice_of_statistics,
    CHANNEL,
    ["`DiceLoss`"],
)
monai(
    "`soft_label=False`, soft labels",
    {"softmax": True},
    lambda loss, x: loss(x, SOFT),
    SOFT,
)
monai(
    "`soft_label=True`", {"soft_label": True, "softmax": True}, lambda loss, x: loss(x, SOFT, intersection="min"), SOFT
)
for classes in (None, FOREGROUND):
    monai(
        "`ignore_index=k`",
        {"ignore_index": 255, "include_background": classes is None, **SOFTMAX},
        lambda loss, x, classes=classes: loss(x, PARTLY, ignore_index=255, classes=classes),
        PARTLY.unsqueeze(1),
    )
monai("`ignore_index=k`", {"ignore_index": 1, **SOFTMAX}, lambda loss, x: loss(x, INDEX, ignore_index=1), CHANNEL)
monai(
    "`ignore_index=k`",
    {"ignore_index": 255, "sigmoid": True},
    lambda loss, x: loss(x, ignoring(BINARY), activation="sigmoid", ignore_index=255),
    ignoring(BINARY),
    input=ONE_LOGIT,
)
monai(
    "`ignore_index=k`, k a class, one-hot labels",
    {"ignore_index": 1, "softmax": True},
    lambda loss, x: loss(x, INDEX, pixel_weight=one_hot(INDEX, C)[:, 1] == 0),
    one_hot(INDEX, C),
)
monai(
    "`ignore_index=k`, k no class, one-hot labels",
    {"ignore_index": 255, "softmax": True},
    lambda loss, x: loss(x, one_hot(PARTLY, C), pixel_weight=one_hot(PARTLY, C).any(1)),
    one_hot(PARTLY, C),
)
TWO_IMAGES = torch.where(KEEP_TWO, INDEX, 255)
monai(
    "an image without a pixel that counts",
    {"ignore_index": 255, **SOFTMAX},
    lambda loss, x: loss(x, TWO_IMAGES, ignore_index=255) * 2 / N,
    TWO_IMAGES.unsqueeze(1),
)
monai(
    "`weight=w`",
    {"weight": W.tolist(), **SOFTMAX},
    lambda loss, x: loss(x, INDEX, W) * W.sum() / C,
    CHANNEL,
    WEIGHED,
)
monai(
    "`weight=w`",
    {"weight": W[1:].tolist(), "include_background": False, "batch": True, **SOFTMAX},
    lambda loss, x: loss(x, INDEX, W, classes=FOREGROUND, per_image=False) * W[1:].sum() / (C - 1),
    CHANNEL,
    WEIGHED,
)
monai('`reduction="sum"`', {"reduction": "sum", **SOFTMAX}, lambda loss, x: loss(x, INDEX, reduction="sum"), CHANNEL)
monai(
    '`reduction="sum"`',
    {"reduction": "sum", "weight": W.tolist(), **SOFTMAX},
    lambda loss, x: loss(x, INDEX, W, reduction="sum"),
    CHANNEL,
    WEIGHED,
)
monai(
    '`reduction="none"`',
    {"reduction": "none", "weight": W.tolist(), **SOFTMAX},
    lambda loss, x: (W * loss(x, INDEX, reduction="none"))[..., None, None],
    CHANNEL,
    WEIGHED,
)
monai(
    '`reduction="none"`',
    {"reduction": "none", **SOFTMAX},
    lambda loss, x: loss(x, INDEX, reduction="none"),
    CHANNEL,
    [TVERSKY],
)
monai(
    "`squared_pred=True`",
    {"squared_pred": True, **SOFTMAX},
    lambda loss, x: loss(x, INDEX),
    CHANNEL,
    WEIGHED,
    reproducible=False,
)

DICE_AND_CE = {"alpha": 0.5, "beta": 0.5, "smooth": 0.5e-5, **EACH}


def monai_ce(cell, arguments, target, *, input=LOGITS, labels=None, ours=None, **options):
    """A row of DiceCELoss, whose settings here are ``options`` of segmentation_loss unless ``ours`` says otherwise."""
    labels = target[:, 0] if labels is None else labels
    if ours is None:
        ours = lambda x: fusedloss.segmentation_loss(x, labels, **{**DICE_AND_CE, **options})  # noqa: E731
    row(MONAI, cell, "DiceCELoss", arguments, ours, target, input=input)


monai_ce("`DiceCELoss(softmax=True)`", SOFTMAX, CHANNEL)
monai_ce("`DiceCELoss(jaccard=True)`", {"jaccard": True, **SOFTMAX}, CHANNEL, alpha=1.0, beta=1.0)
monai_ce(
    "`DiceCELoss(lambda_dice=d, lambda_ce=c)`",
    {"lambda_dice": 0.3, "lambda_ce": 1.7, **SOFTMAX},
    CHANNEL,
    iou=0.3,
    cross_entropy=1.7,
)
monai_ce("`DiceCELoss(label_smoothing=e)`", {"label_smoothing": 0.2, **SOFTMAX}, CHANNEL, label_smoothing=0.2)
monai_ce(
    "`DiceCELoss(weight=w)`",
    {"lambda_dice": 0.3, "weight": W, "label_smoothing": 0.2, **SOFTMAX},
    CHANNEL,
    weight=W,
    iou=0.3 * W.mean().item(),
    label_smoothing=0.2,
)
monai_ce(
    "`DiceCELoss(weight=w, include_background=False)`",
    {"weight": W, "include_background": False, "batch": True, **SOFTMAX},
    CHANNEL,
    weight=W,
    iou=W[1:].mean().item(),
    classes=FOREGROUND,
    per_image=False,
)
monai_ce(
    "`DiceCELoss`, labels with channels",
    {"softmax": True, "weight": W, "label_smoothing": 0.2},
    SOFT,
    labels=SOFT,
    weight=W,
    iou=W.mean().item(),
    label_smoothing=0.2,
)
monai_ce(
    "`DiceCELoss(sigmoid=True, weight=w)`, one channel",
    {"sigmoid": True, "weight": W[1:2]},
    BINARY,
    input=ONE_LOGIT,
    activation="sigmoid",
    pos_weight=W[1:2],
)
monai_ce(
    "`DiceCELoss(sigmoid=True)`, more channels",
    {"sigmoid": True, "to_onehot_y": True, "lambda_dice": 0.3, "lambda_ce": 1.7},
    CHANNEL,
    ours=lambda x: (
        0.3 * fusedloss.dice_loss(x, INDEX, activation="sigmoid", smooth=0.5e-5, **EACH)
        + 1.7 * fusedloss.cross_entropy(x, INDEX)
    ),
)
monai_ce(
    '`DiceCELoss(reduction="sum")`',
    {"reduction": "sum", "weight": W, **SOFTMAX},
    CHANNEL,
    ours=lambda x: (
        fusedloss.dice_loss(x, INDEX, W, smooth=0.5e-5, reduction="sum", **EACH)
        + fusedloss.cross_entropy(x, INDEX, W, reduction="sum")
    ),
)

# nnU-Net --------------------------------------------------------------------------------------------------------------

nnunet_dice_here = functools.partial(fusedloss.dice_loss, eps=0.5e-8, **EACH)
NNUNET_TERMS = {"alpha": 0.5, "beta": 0.5, "smooth": 0.5e-5, "eps": 0.5e-8, **EACH}
TRAINER = {"batch_dice": False, "do_bg": False, "smooth": 1e-5, "ddp": False}  # what the trainer passes
SMALL = {"smooth": 1e-5, "ddp": False}
CLASSES = {"apply_nonlin": softmax_of_classes, "ddp": False}

for soft_dice in ("MemoryEfficientSoftDiceLoss", "SoftDiceLoss"):
    cell = f"`{soft_dice}(smooth=s)`"
    row(
        NNUNET,
        cell,
        soft_dice,
        {"smooth": 3.0, **CLASSES},
        lambda x: nnunet_dice_here(x, INDEX, smooth=1.5) - 1,
        CHANNEL,
    )
    # The floor of the denominator acts where nobody predicts a class that is absent.
    row(
        NNUNET,
        cell,
        soft_dice,
        {"smooth": 1e-10, **CLASSES},
        lambda x: nnunet_dice_here(x, INDEX, smooth=0.5e-10) - 1,
        CHANNEL,
        input=LOGITS - 40 * one_hot(torch.full_like(INDEX, 3), C),
    )


def nnunet(cell, arguments, ours, target=CHANNEL, **fields):
    row(NNUNET, cell, "MemoryEfficientSoftDiceLoss", {**CLASSES, **SMALL, **arguments}, ours, target, **fields)


nnunet_dice_here = functools.partial(nnunet_dice_here, smooth=0.5e-5)
nnunet(
    "`apply_nonlin=f`",
    {"apply_nonlin": torch.sigmoid},
    lambda x: nnunet_dice_here(x, MASKS, activation="sigmoid") - 1,
    MASKS,
)
nnunet(
    "`apply_nonlin=f`",
    {"apply_nonlin": None},
    lambda x: nnunet_dice_here(x, INDEX, activation="none") - 1,
    input=PROBABILITIES,
)
nnunet("`batch_dice=True`", {"batch_dice": True}, lambda x: nnunet_dice_here(x, INDEX, per_image=False) - 1)
nnunet("`do_bg=False`", {"do_bg": False}, lambda x: nnunet_dice_here(x, INDEX, classes=FOREGROUND) - 1)
nnunet(
    "`loss_mask=m`",
    {},
    lambda x: nnunet_dice_here(x, INDEX, pixel_weight=KEEP) - 1,
    of_call={"loss_mask": KEEP.unsqueeze(1)},
)
nnunet("soft labels", {}, lambda x: nnunet_dice_here(x, SOFT) - 1, SOFT)
nnunet(
    "an image without a pixel that counts",
    {},
    lambda x: nnunet_dice_here(x, INDEX, pixel_weight=KEEP_TWO) * 2 / N - 1,
    of_call={"loss_mask": KEEP_TWO.unsqueeze(1)},
)
row(
    NNUNET,
    "`SoftDiceLoss(clip_tp=t)`",
    "SoftDiceLoss",
    {"clip_tp": 2.0, **CLASSES, **SMALL},
    lambda x: nnunet_dice_here(x, INDEX) - 1,
    CHANNEL,
    reproducible=False,
)


def nnunet_ce(cell, arguments, target=CHANNEL, *, ours=None, minus=1.0, **options):
    arguments = {"soft_dice_kwargs": TRAINER, "ce_kwargs": {}, **arguments}
    options = {"classes": FOREGROUND, **NNUNET_TERMS, **options}
    if ours is None:
        ours = lambda x: fusedloss.segmentation_loss(x, target[:, 0], **options) - minus  # noqa: E731
    row(NNUNET, cell, "DC_and_CE_loss", arguments, ours, target)


nnunet_ce("`DC_and_CE_loss`, as the trainer makes it", {})
nnunet_ce(
    "`DC_and_CE_loss`, as the trainer makes it",
    {"soft_dice_kwargs": {**TRAINER, "batch_dice": True}},
    per_image=False,
)
nnunet_ce(
    "`weight_ce=c, weight_dice=d`",
    {"weight_ce": 0.3, "weight_dice": 1.7},
    cross_entropy=0.3,
    iou=1.7,
    minus=1.7,
)
nnunet_ce(
    "`ignore_label=k`",
    {"ignore_label": 255, "weight_dice": 1.7},
    PARTLY.unsqueeze(1),
    ignore_index=255,
    iou=1.7,
    minus=1.7,
)
nnunet_ce(
    "`ignore_label=k`, an image without another pixel",
    {"ignore_label": 255, "weight_dice": 1.7},
    TWO_IMAGES.unsqueeze(1),
    ignore_index=255,
    iou=1.7 * 2 / N,
    minus=1.7,
)
nnunet_ce(
    "`ignore_label=k`, no other pixel at all", {"ignore_label": 255}, torch.full_like(CHANNEL, 255), ignore_index=255
)
nnunet_ce('`ce_kwargs={"label_smoothing": e}`', {"ce_kwargs": {"label_smoothing": 0.2}}, label_smoothing=0.2)
nnunet_ce(
    '`ce_kwargs={"weight": w}`',
    {"ce_kwargs": {"weight": W}},
    ours=lambda x: fusedloss.cross_entropy(x, INDEX, W) + nnunet_dice_here(x, INDEX, classes=FOREGROUND) - 1,
)
row(
    NNUNET,
    "`DC_and_BCE_loss`",
    "DC_and_BCE_loss",
    {"bce_kwargs": {}, "soft_dice_kwargs": SMALL},
    lambda x: fusedloss.segmentation_loss(x, MASKS, activation="sigmoid", **NNUNET_TERMS) - 1,
    MASKS,
)
row(
    NNUNET,
    "`DC_and_BCE_loss(use_ignore_label=True)`",
    "DC_and_BCE_loss",
    {"bce_kwargs": {}, "soft_dice_kwargs": SMALL, "use_ignore_label": True, "weight_ce": 0.3},
    lambda x: (
        fusedloss.segmentation_loss(
            x, MASKS, activation="sigmoid", pixel_weight=KEEP, cross_entropy=0.3 * C, **NNUNET_TERMS
        )
        - 1
    ),
    torch.cat([MASKS, 1 - KEEP.long().unsqueeze(1)], 1),
)

# JDTLosses ------------------------------------------------------------------------------------------------------------

jdt_iou = functools.partial(fusedloss.soft_iou_loss, smooth=1e-3)


def jdt(cell, arguments, ours, target=INDEX, **fields):
    row(JDT, cell, "JDTLoss", arguments, ours, target, **fields)


def over_classes_that_count(x, loss, weight, dims):
    """Mean over one dimension of (N, C), then over the other, of those (image, class) where the class is present."""
    labelled = fusedloss.overlap_statistics(x.detach(), INDEX, per_image=True)[2]
    counts = labelled > 0
    mean = (weight * loss(x, INDEX, per_image=True, reduction="none")).sum(dims) / counts.sum(dims)
    return mean[counts.any(dims)].mean()


IMAGES = {"mIoUD": 0.0, "mIoUI": 1.0}
OF_CLASSES = {"mIoUD": 0.0, "mIoUC": 1.0}
SOFT_PRESENT = {"active_classes_mode_soft": "PRESENT"}
# Class 3 has a little of every pixel: less than a threshold of 0.01, and more than nothing.
NEARLY_ABSENT = 0.995 * SOFT + 0.005 * one_hot(torch.full_like(INDEX, 3), C)

jdt("`alpha=1, beta=1`", {}, lambda x: jdt_iou(x, INDEX))
jdt("`alpha=0.5, beta=0.5`", {"alpha": 0.5, "beta": 0.5}, lambda x: fusedloss.dice_loss(x, INDEX, smooth=1e-3))
jdt("`alpha=a, beta=b`", PRICES, lambda x: fusedloss.tversky_loss(x, INDEX, smooth=1e-3, **PRICES))
jdt("`smooth=s`", {"smooth": 2.0}, lambda x: jdt_iou(x, INDEX, smooth=2.0))
jdt('`active_classes_mode_hard="PRESENT"`', {}, lambda x: jdt_iou(x, INDEX, absent="skip"))
jdt(
    '`active_classes_mode_hard="ALL"`',
    {"active_classes_mode_hard": "ALL"},
    lambda x: jdt_iou(x, INDEX, absent="count"),
)
jdt('`active_classes_mode_soft="ALL"`, soft labels', {}, lambda x: jdt_iou(x, SOFT, absent="count"), SOFT)
jdt(
    '`active_classes_mode_soft="PRESENT", threshold=0`',
    {"threshold": 0.0, **SOFT_PRESENT},
    lambda x: jdt_iou(x, SOFT),
    SOFT,
)
jdt(
    '`active_classes_mode_soft="PRESENT", threshold=t`',
    SOFT_PRESENT,
    lambda x: jdt_iou(x, NEARLY_ABSENT),
    NEARLY_ABSENT,
    reproducible=False,
)
jdt("`mIoUD=0, mIoUI=1`", IMAGES, lambda x: jdt_iou(x, INDEX, per_image=True))
jdt("`mIoUD=0, mIoUC=1`", OF_CLASSES, lambda x: over_classes_that_count(x, jdt_iou, 1.0, 0))
jdt(
    '`active_classes_mode_hard="ALL", mIoUD=0, mIoUI=1`, an image without a pixel that counts',
    {"active_classes_mode_hard": "ALL", "ignore_index": 255, **IMAGES},
    lambda x: jdt_iou(x, TWO_IMAGES, per_image=True, absent="count", ignore_index=255) * 2 / N,
    TWO_IMAGES,
)
jdt(
    "`mIoUD=a, mIoUI=b`",
    {"mIoUD": 0.3, "mIoUI": 0.7},
    lambda x: 0.3 * jdt_iou(x, INDEX) + 0.7 * jdt_iou(x, INDEX, per_image=True),
)
jdt("`gamma=g`", {"gamma": 1.5}, lambda x: jdt_iou(x, INDEX, gamma=1.5))
jdt("`log_loss=True`", {"log_loss": True, "gamma": 2.0}, lambda x: jdt_iou(x, INDEX, log=True, gamma=2.0))
jdt("`ignore_index=k`", {"ignore_index": 255}, lambda x: jdt_iou(x, PARTLY, ignore_index=255), PARTLY)
jdt(
    "`keep_mask=m`",
    {},
    lambda x: jdt_iou(x, SOFT, pixel_weight=KEEP, absent="count"),
    SOFT,
    of_call={"keep_mask": KEEP},
)
jdt(
    "`class_weights=w`",
    {"class_weights": W.tolist()},
    lambda x: jdt_iou(x, INDEX, W, reduction="sum") / INDEX.unique().numel(),
)
jdt(
    "`class_weights=w, mIoUD=0, mIoUI=1`",
    {"class_weights": W.tolist(), **IMAGES},
    lambda x: over_classes_that_count(x, jdt_iou, W, 1),
)
jdt("`norm=2`", {"norm": 2}, lambda x: jdt_iou(x, INDEX), reproducible=False)

# ---- tests -----------------------------------------------------------------------------------------------------------


def parametrize(rows):
    return pytest.mark.parametrize("row", rows, ids=[f"{row.name}, {row.cell.replace('`', '')}" for row in rows])


each_row = parametrize(ROWS)
each_row_of_a_package = parametrize([row for row in ROWS if row.library != JDT])  # JDTLosses is files in a repository


def value_and_gradient(function, input):
    leaf = input.detach().clone().requires_grad_()
    value = function(leaf)
    return value, *torch.autograd.grad(value, leaf, random_like(value))


@each_row
def test_the_settings_give_the_numbers_that_the_table_says(row):
    ours = value_and_gradient(row.ours, row.input)
    theirs = value_and_gradient(row.formula, row.input)
    if row.reproducible:
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    else:
        # Not by a hair: what the table calls impossible has to matter.
        assert (ours[0] - theirs[0]).abs() > 1e-3


def installed(library):
    """The library's losses by name. Skips where it is not installed."""
    if library == SMP:
        return pytest.importorskip("segmentation_models_pytorch").losses
    if library == MONAI:
        return pytest.importorskip("monai.losses")
    if library == NNUNET:
        return pytest.importorskip("nnunetv2.training.loss.compound_losses")
    raise AssertionError(library)


@each_row_of_a_package
def test_the_formula_here_is_the_librarys_own(row):
    losses = installed(row.library)
    arguments = copy.deepcopy(dict(row.arguments))  # nnU-Net writes into some
    if row.name.startswith("DC_and"):
        arguments["dice_class"] = losses.MemoryEfficientSoftDiceLoss
    loss = getattr(losses, row.name)(**arguments)
    theirs = value_and_gradient(lambda x: loss(x, row.target, **row.of_call), row.input)
    # In float32 are all sums of nnU-Net, and with squared_pred the norm of MONAI's labels.
    float32 = row.library == NNUNET or "squared_pred" in row.arguments
    rtol, atol = (1e-5, 1e-7) if float32 else (1e-9, 1e-12)
    for function in [row.formula, row.ours] if row.reproducible else [row.formula]:
        value, gradient = value_and_gradient(function, row.input)
        expected = theirs[0].to(value.dtype)
        torch.testing.assert_close((value, gradient), (expected, theirs[1]), rtol=rtol, atol=atol)


def test_the_tables_have_these_rows_and_no_others():
    page = Path(__file__).parents[1] / "docs" / "other_libraries.md"
    if not page.exists():
        pytest.skip("the documentation is not here")
    library, said = "", {}
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            library = line[3:]
        elif library and line.startswith("| ") and not line.startswith("| theirs"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert len(cells) == 3, line
            said[library, cells[0]] = not cells[2].startswith("no")
    assert said == {(row.library, row.cell): row.reproducible for row in ROWS}


def test_a_label_that_is_no_class_is_refused_and_not_clamped_as_in_jdt():
    assert jdt_loss(LOGITS, PARTLY) == jdt_loss(LOGITS, PARTLY.clamp(0, C - 1))
    with pytest.raises(IndexError, match="255"):
        jdt_iou(LOGITS, PARTLY)
