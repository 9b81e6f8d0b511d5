"""The losses of other libraries, written out from their definitions: what tests/test_other_libraries.py compares with.

With the option names of their constructors, so that one set of arguments drives both the formula and, where the library
is installed, the library itself.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SMP, MONAI, NNUNET, JDT = "segmentation_models_pytorch", "MONAI", "nnU-Net", "JDTLosses"


def one_hot(index, classes):
    """(N, *spatial) as (N, C, *spatial). A label that is no class gives zeros."""
    return torch.stack([(index == c).double() for c in range(classes)], dim=1)


def flat(tensor):
    return tensor.reshape(*tensor.shape[:2], -1)


def soft_sums(p, y, dims):
    """I = (P + T - |p - y|) / 2, which is the sum of the smaller of p and y."""
    predicted, labelled = p.sum(dims), y.sum(dims)
    both = (predicted + labelled - (p - y).abs().sum(dims)) / 2
    return both, predicted - both, labelled - both


def product_sums(p, y, dims):
    both = (p * y).sum(dims)
    return both, p.sum(dims) - both, y.sum(dims) - both


def squared_sums(p, y, dims):
    """As :func:`soft_sums`, of squares."""
    predicted, labelled = (p**2).sum(dims), (y**2).sum(dims)
    both = (predicted + labelled - ((p - y) ** 2).sum(dims)) / 2
    return both, predicted - both, labelled - both


def smp_loss(
    input,
    target,
    *,
    mode,
    alpha,
    beta,
    classes=None,
    log_loss=False,
    from_logits=True,
    smooth=0.0,
    ignore_index=None,
    eps=1e-7,
    gamma=1.0,
    class_weights=None,
):
    p = input
    if from_logits:
        p = torch.softmax(input, 1) if mode == "multiclass" else torch.sigmoid(input)
    label_shape = (target.unsqueeze(1) if mode == "multiclass" else target).shape
    valid = torch.ones(label_shape) if ignore_index is None else (target != ignore_index).reshape(label_shape)
    y = one_hot(target, input.shape[1]) if mode == "multiclass" else target.reshape(label_shape)
    both, fp, fn = soft_sums(flat(p * valid), flat((y * valid).double()), (0, 2))
    score = (both + smooth) / (both + alpha * fp + beta * fn + smooth).clamp_min(eps)
    loss = -torch.log(score.clamp_min(eps)) if log_loss else 1 - score
    # A class without a pixel adds 0 to the mean, and is counted in it.
    loss = torch.where((y * valid).flatten(2).sum((0, 2)) > 0, loss, 0.0)
    w = torch.ones(len(loss)) if class_weights is None else torch.tensor(class_weights)
    if classes is not None:
        loss, w = loss[classes], w[classes]
    return ((w * loss).sum() / w.sum()) ** gamma


def monai_labels(input, target, to_onehot_y, ignore_index):
    """The labels with a channel for each class, and the pixels that count."""
    channels = input.shape[1]
    y = one_hot(target[:, 0], channels) if to_onehot_y and channels > 1 else target.double()
    if ignore_index is None:
        valid = torch.ones_like(target[:, :1])
    elif target.shape[1] == 1:
        valid = target != ignore_index
    elif 0 <= ignore_index < channels:
        valid = target[:, ignore_index : ignore_index + 1] == 0
    else:
        valid = target.sum(1, keepdim=True) > 0
    return y, valid


def monai_reduced(loss, reduction, dims):
    if reduction == "none":
        return loss.reshape(*loss.shape, *[1] * (dims - 2))
    return loss.sum() if reduction == "sum" else loss.mean()


def monai_score(
    input,
    target,
    include_background=True,
    to_onehot_y=False,
    sigmoid=False,
    softmax=False,
    other_act=None,
    squared_pred=False,
    batch=False,
    soft_label=False,
    ignore_index=None,
):
    """I, FP and FN of each image (without ``batch``) and class."""
    p = other_act(input) if other_act else input
    p = torch.softmax(p, 1) if softmax else torch.sigmoid(p) if sigmoid else p
    y, valid = monai_labels(input, target, to_onehot_y, ignore_index)
    first = 0 if include_background or input.shape[1] == 1 else 1
    sums = squared_sums if squared_pred else soft_sums if soft_label else product_sums
    return sums(flat(p * valid)[:, first:], flat(y * valid)[:, first:], (0, 2) if batch else (2,))


def monai_dice(
    input, target, *, jaccard=False, smooth_nr=1e-5, smooth_dr=1e-5, weight=None, reduction="mean", **options
):
    both, fp, fn = monai_score(input, target, **options)
    errors = fp + fn if jaccard else (fp + fn) / 2
    loss = 1 - (2 * both + smooth_nr) / (2 * (both + errors) + smooth_dr)
    if weight is not None and loss.shape[-1] > 1:
        loss = loss * torch.as_tensor(weight)
    return monai_reduced(loss, reduction, input.dim())


def monai_tversky(input, target, *, alpha, beta, smooth_nr=1e-5, smooth_dr=1e-5, reduction="mean", **options):
    both, fp, fn = monai_score(input, target, **options)
    loss = 1 - (both + smooth_nr) / (both + alpha * fp + beta * fn + smooth_dr)
    return monai_reduced(loss, reduction, 2)


def monai_dice_ce(
    input, target, *, lambda_dice=1.0, lambda_ce=1.0, label_smoothing=0.0, weight=None, reduction="mean", **options
):
    of_dice = weight[1:] if weight is not None and not options.get("include_background", True) else weight
    dice = monai_dice(input, target, weight=of_dice, reduction=reduction, **options)
    if input.shape[1] == 1:
        bce = F.binary_cross_entropy_with_logits
        return lambda_dice * dice + lambda_ce * bce(input, target.double(), pos_weight=weight, reduction=reduction)
    # Softmax, whatever the activation of the Dice part is.
    labels = target[:, 0] if target.shape[1] == 1 else target.double()
    ce = F.cross_entropy(input, labels, weight, reduction=reduction, label_smoothing=label_smoothing)
    return lambda_dice * dice + lambda_ce * ce


def nnunet_dice(
    input,
    target,
    *,
    apply_nonlin=None,
    batch_dice=False,
    do_bg=True,
    smooth=1.0,
    ddp=False,
    clip_tp=None,
    loss_mask=None,
):
    p = apply_nonlin(input) if apply_nonlin else input
    y = target.double() if target.shape == input.shape else one_hot(target[:, 0], input.shape[1])
    m = torch.ones(1, 1, 1) if loss_mask is None else flat(loss_mask)
    both, fp, fn = product_sums(flat(p) * m, flat(y) * m, (0, 2) if batch_dice else (2,))
    if clip_tp is not None:
        both = both.clamp_min(clip_tp)
    score = (2 * both + smooth) / (2 * both + fp + fn + smooth).clamp_min(1e-8)
    return -(score if do_bg else score[..., 1:]).mean()


def softmax_of_classes(logits):
    return torch.softmax(logits, 1)


def nnunet_dice_ce(input, target, *, soft_dice_kwargs, ce_kwargs, weight_ce=1, weight_dice=1, ignore_label=None):
    index, mask, ce = target[:, 0], None, 0.0
    if ignore_label is None:
        ce = F.cross_entropy(input, index, **ce_kwargs)
    else:
        mask = target != ignore_label
        if mask.any():
            ce = F.cross_entropy(input, index, ignore_index=ignore_label, **ce_kwargs)
    dice = nnunet_dice(input, target, apply_nonlin=softmax_of_classes, loss_mask=mask, **soft_dice_kwargs)
    return weight_ce * ce + weight_dice * dice


def nnunet_dice_bce(input, target, *, bce_kwargs, soft_dice_kwargs, weight_ce=1, weight_dice=1, use_ignore_label=False):
    mask = target[:, -1:] == 0 if use_ignore_label else torch.ones_like(target[:, :1], dtype=torch.bool)
    y = (target[:, :-1] if use_ignore_label else target).double()
    ce = F.binary_cross_entropy_with_logits(input, y, reduction="none", **bce_kwargs)
    # With a mask they sum over the classes; without one they take the mean over them.
    ce = (ce * mask).sum() / mask.sum() if use_ignore_label else ce.mean()
    return weight_ce * ce + weight_dice * nnunet_dice(
        input, y, apply_nonlin=torch.sigmoid, loss_mask=mask, **soft_dice_kwargs
    )


def jdt_loss(
    input,
    target,
    *,
    mIoUD=1.0,
    mIoUI=0.0,
    mIoUC=0.0,
    alpha=1.0,
    beta=1.0,
    gamma=1.0,
    smooth=1e-3,
    threshold=0.01,
    norm=1,
    log_loss=False,
    ignore_index=None,
    class_weights=None,
    active_classes_mode_hard="PRESENT",
    active_classes_mode_soft="ALL",
    keep_mask=None,
):
    hard = target.dtype == torch.int64
    if keep_mask is None:
        pixels = target if hard else target[:, 0]
        keep_mask = pixels != ignore_index if hard and ignore_index is not None else torch.ones_like(pixels)
    m = keep_mask.flatten(1).unsqueeze(1)
    classes = input.shape[1]
    p = flat(torch.softmax(input, 1)) * m
    y = flat(one_hot(target.clamp(0, classes - 1), classes) if hard else target) * m
    w = torch.ones(classes) if class_weights is None else torch.tensor(class_weights)

    def losses(dims):
        both, fp, fn = (soft_sums if norm == 1 else squared_sums)(p, y, dims)
        score = (both + smooth) / (both + alpha * fp + beta * fn + smooth)
        loss = w * (-torch.log(score) if log_loss else 1 - score) ** gamma
        if (active_classes_mode_hard if hard else active_classes_mode_soft) == "ALL":
            return loss, torch.ones_like(loss)
        return loss, (y.amax(dims) > threshold).double()

    def mean_of_means(loss, active, dim):
        some = active.sum(dim) > 0
        return ((loss * active).sum(dim)[some] / active.sum(dim)[some]).mean()

    loss, active = losses((0, 2))
    result = mIoUD * (loss * active).sum() / active.sum()
    loss, active = losses((2,))
    return result + mIoUI * mean_of_means(loss, active, 1) + mIoUC * mean_of_means(loss, active, 0)


FORMULAS: dict[tuple[str, str], Callable[..., Tensor]] = {
    (SMP, "JaccardLoss"): functools.partial(smp_loss, alpha=1.0, beta=1.0),
    (SMP, "DiceLoss"): functools.partial(smp_loss, alpha=0.5, beta=0.5),
    (SMP, "TverskyLoss"): smp_loss,
    (MONAI, "DiceLoss"): monai_dice,
    (MONAI, "TverskyLoss"): monai_tversky,
    (MONAI, "DiceCELoss"): monai_dice_ce,
    (NNUNET, "MemoryEfficientSoftDiceLoss"): nnunet_dice,
    (NNUNET, "SoftDiceLoss"): nnunet_dice,
    (NNUNET, "DC_and_CE_loss"): nnunet_dice_ce,
    (NNUNET, "DC_and_BCE_loss"): nnunet_dice_bce,
    (JDT, "JDTLoss"): jdt_loss,
}
