"""What to say of a wrong call: in one sentence who, what was wanted and what came.

Nothing here runs for a call that is right, except under torch.compile, where an op cannot raise.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedloss import _ops

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
ACTIVATIONS = {"softmax": 0, "sigmoid": 1, "none": 2}
ABSENT = {"skip": 0, "count": 1, "zero": 2}
INTERSECTIONS = {"min": 0, "product": 1}
HALF_DTYPES = (torch.float16, torch.bfloat16)
FLOATING_DTYPES = (torch.float32, torch.float64, *HALF_DTYPES)
LABEL_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)
REBUILD = "FORCE_CUDA=1 pip install --no-build-isolation ."
MOST_CHOSEN_FROM_ON_CUDA = 1024  # ChosenClasses::kMost in csrc/kernels/cuda/segmentation.h


def _tensor(name: str, argument: str, value: Any, like: Tensor | None = None) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: `{argument}` must be a Tensor, got {type(value).__name__}")
    tensors_of_torch = sys.modules.get("torch.distributed.tensor")
    if tensors_of_torch is not None and isinstance(value, tensors_of_torch.DTensor):
        hint = "" if name in ("cross_entropy", "mse_loss", "brier_loss") else ", and process_group= for the whole batch"
        raise TypeError(
            f"{name}: `{argument}` must be the tensor of one process (use .to_local(){hint}), got a DTensor"
        )
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise ValueError(
            f"{name}: `{argument}` must be a dense tensor (use .to_dense() or .to_padded_tensor()), got {kind}"
        )
    if not _ops.has_kernels(value.device):
        other = (
            f"torch.nn.functional.{name}" if name in ("cross_entropy", "mse_loss") else f"fusedloss.reference.{name}"
        )
        if value.device.type == "cuda":
            raise ValueError(
                f"{name}: `{argument}` must be on the CPU, got {value.device}, and {_ops.CUDA_REFUSED}: "
                f"beside a torch that has CUDA, `{REBUILD}` in fusedloss's sources builds its kernels"
            )
        where = "on the CPU, the only device that this build has kernels for"
        if _ops.CUDA_REFUSED is None:
            where = "on the CPU or a CUDA device, which alone have kernels"
        raise ValueError(f"{name}: `{argument}` must be {where}, got {value.device} ({other} takes it)")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name}: `{argument}` must be on input's device, {like.device}, got {value.device}")


def _reduction(name: str, reduction: Any) -> None:
    if not isinstance(reduction, str):
        raise TypeError(f"{name}: `reduction` must be 'none', 'mean' or 'sum', got {type(reduction).__name__}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{name}: `reduction` must be 'none', 'mean' or 'sum', got {reduction!r}")


def check_cross_entropy(
    input: Any, target: Any, weight: Any, ignore_index: Any, reduction: Any, label_smoothing: Any
) -> None:
    name = "cross_entropy"
    _tensor(name, "input", input)
    _tensor(name, "target", target, input)
    _reduction(name, reduction)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, (int, torch.SymInt)):
        raise TypeError(f"{name}: `ignore_index` must be an int, got {type(ignore_index).__name__}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"{name}: `ignore_index` must fit into 64 bits, got {ignore_index}")
    if isinstance(label_smoothing, bool) or not isinstance(label_smoothing, (int, float, torch.SymFloat)):
        raise TypeError(f"{name}: `label_smoothing` must be a float, got {type(label_smoothing).__name__}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{name}: `label_smoothing` must be in [0, 1], got {label_smoothing}")
    if input.dtype not in FLOATING_DTYPES:
        raise TypeError(f"{name}: `input` must be float32, float64, float16 or bfloat16, got {input.dtype}")
    if input.dim() == 0:
        raise ValueError(f"{name}: `input` must have the shape (C,), (N, C) or (N, C, d1, ..., dK), got ()")
    class_dim = 0 if input.dim() == 1 else 1
    classes = input.shape[class_dim]
    pixel_shape = input.shape[:class_dim] + input.shape[class_dim + 1 :]
    if target.dtype in FLOATING_DTYPES:
        if target.shape != input.shape:
            raise ValueError(
                f"{name}: `target` with probabilities must have the shape of `input`, {tuple(input.shape)}, "
                f"got {tuple(target.shape)} of {target.dtype} (class indices are of an integer dtype)"
            )
        if ignore_index >= 0:
            raise ValueError(
                f"{name}: `ignore_index` must be negative with probabilities as `target`, got {ignore_index}"
            )
    elif target.dtype in LABEL_DTYPES:
        bracketed = input.dim() == 1 and target.shape == (1,)
        if target.shape != pixel_shape and not bracketed:
            raise ValueError(
                f"{name}: `target` with class indices must have the shape {tuple(pixel_shape)}, for `input` of shape "
                f"{tuple(input.shape)}, got {tuple(target.shape)}"
            )
    else:
        raise TypeError(
            f"{name}: `target` must be class indices (uint8, int16, int32, int64) or probabilities "
            f"(float32, float64, float16, bfloat16), got {target.dtype}"
        )
    if weight is not None:
        _tensor(name, "weight", weight, input)
        if weight.dtype not in FLOATING_DTYPES:
            raise TypeError(f"{name}: `weight` must be float32, float64, float16 or bfloat16, got {weight.dtype}")
        if weight.shape != (classes,):
            raise ValueError(f"{name}: `weight` must have the shape ({classes},), got {tuple(weight.shape)}")
        if weight.requires_grad and target.dtype not in FLOATING_DTYPES:
            raise ValueError(f"{name}: `weight` must not require a gradient with class indices as `target`")


def check_mse_loss(input: Any, target: Any, reduction: Any, weight: Any) -> None:
    name = "mse_loss"
    _tensor(name, "input", input)
    _tensor(name, "target", target, input)
    _reduction(name, reduction)
    for argument, value in (("input", input), ("target", target)):
        if value.is_complex() or (value.is_floating_point() and value.dtype not in FLOATING_DTYPES):
            raise TypeError(f"{name}: `{argument}` must be float32, float64, float16 or bfloat16, got {value.dtype}")
    if not (input.is_floating_point() or target.is_floating_point()):
        raise TypeError(
            f"{name}: `input` or `target` must be of a floating dtype, got {input.dtype} and {target.dtype}"
        )
    if weight is not None and torch.bool in (input.dtype, target.dtype):
        raise TypeError(f"{name}: `input` and `target` must not be bool with a `weight`, as torch cannot subtract them")
    try:
        torch.broadcast_shapes(input.shape, target.shape)
    except RuntimeError:
        raise ValueError(
            f"{name}: `target` must broadcast with `input` of shape {tuple(input.shape)}, got {tuple(target.shape)}"
        ) from None
    if weight is not None:
        _tensor(name, "weight", weight, input)
        if weight.dtype not in FLOATING_DTYPES:
            raise TypeError(f"{name}: `weight` must be float32, float64, float16 or bfloat16, got {weight.dtype}")
        if weight.shape != input.shape:
            raise ValueError(
                f"{name}: `weight` must have the shape of `input`, {tuple(input.shape)}, got {tuple(weight.shape)}"
            )


# --- the losses on probabilities --------------------------------------------------------------------------------------


def check_segmentation(name: str, input: Any, target: Any, weight: Any, options: dict[str, Any]) -> None:
    """options: the keyword arguments by name, those that the function has."""
    _tensor(name, "input", input)
    _tensor(name, "target", target, input)
    for argument, words in (
        ("reduction", REDUCTIONS),
        ("activation", ACTIVATIONS),
        ("absent", ABSENT),
        ("intersection", INTERSECTIONS),
    ):
        if argument in options:
            _word(name, argument, options[argument], words)
    _integer(name, "ignore_index", options["ignore_index"])
    for argument, least, wanted in (
        ("cross_entropy", -math.inf, "finite"),
        ("iou", -math.inf, "finite"),
        ("brier", -math.inf, "finite"),
        ("alpha", 0.0, "finite and 0 or more"),
        ("beta", 0.0, "finite and 0 or more"),
        ("smooth", 0.0, "finite and 0 or more"),
    ):
        if argument in options:
            _number(name, argument, options[argument], least, wanted)
    for argument in ("eps", "gamma"):
        if argument in options:
            _number(name, argument, options[argument], 5e-324, "finite and more than 0")
    smoothing = options.get("label_smoothing", 0.0)
    _number(name, "label_smoothing", smoothing, 0.0, "in [0, 1]")
    if smoothing > 1.0:
        raise ValueError(f"{name}: `label_smoothing` must be in [0, 1], got {smoothing}")
    for argument in ("per_image", "log", "return_terms"):
        if not isinstance(options.get(argument, False), bool):
            raise TypeError(f"{name}: `{argument}` must be a bool, got {type(options[argument]).__name__}")
    if options.get("process_group") is not None:
        _process_group(name, options)

    if input.dtype not in FLOATING_DTYPES:
        raise TypeError(f"{name}: `input` must be float32, float64, float16 or bfloat16, got {input.dtype}")
    if input.dim() < 2:
        raise ValueError(f"{name}: `input` must have the shape (N, C) or (N, C, d1, ..., dK), got {tuple(input.shape)}")
    classes = input.shape[1]
    activation = options["activation"]
    if activation == "softmax" and classes == 1:
        raise ValueError(
            f"{name}: `activation` must be 'sigmoid' for an `input` of one class, whose softmax is 1, got 'softmax'"
        )
    if activation == "none" and options.get("cross_entropy", 0.0) != 0.0:
        raise ValueError(
            f"{name}: `cross_entropy` must be 0 with activation='none', as it needs logits, "
            f"got {options['cross_entropy']}"
        )
    _segmentation_target(name, input, target, activation, options["ignore_index"])
    _weights(name, "weight", weight, (classes,), input)
    _weights(name, "pos_weight", options.get("pos_weight"), (classes,), input)
    pixel_shape = (input.shape[0], *input.shape[2:])
    _weights(name, "pixel_weight", options["pixel_weight"], pixel_shape, input, (*FLOATING_DTYPES, torch.bool))
    if options.get("classes") is not None:
        _classes(name, options["classes"], classes)
        if classes > MOST_CHOSEN_FROM_ON_CUDA and _ops.runs_cuda_kernels(input.device):
            raise ValueError(
                f"{name}: `classes` must be None on CUDA with more than {MOST_CHOSEN_FROM_ON_CUDA} classes, "
                f"got {len(options['classes'])} of {classes} (fusedloss.reference.{name} takes them)"
            )


def _segmentation_target(name: str, input: Tensor, target: Tensor, activation: str, ignore_index: int) -> None:
    pixel_shape = (input.shape[0], *input.shape[2:])
    one_class = input.shape[1] == 1
    shape = tuple(target.shape)
    if target.dtype in FLOATING_DTYPES:
        if target.shape != input.shape:
            raise ValueError(
                f"{name}: `target` with probabilities must have the shape of `input`, {tuple(input.shape)}, "
                f"got {shape} of {target.dtype} (class indices are of an integer dtype)"
            )
    elif target.dtype not in (*LABEL_DTYPES, torch.bool):
        raise TypeError(
            f"{name}: `target` must be class indices (uint8, int16, int32, int64), a mask (bool or those) or "
            f"probabilities (float32, float64, float16, bfloat16), got {target.dtype}"
        )
    elif target.shape == input.shape:
        if activation == "softmax":
            raise ValueError(
                f"{name}: `target` with class indices must have the shape {pixel_shape}, for `input` of shape "
                f"{tuple(input.shape)}, got {shape} (a mask for each class is for activation='sigmoid')"
            )
    elif shape != pixel_shape:
        raise ValueError(
            f"{name}: `target` with class indices must have the shape {pixel_shape}, for `input` of shape "
            f"{tuple(input.shape)}, got {shape}"
        )
    elif target.dtype == torch.bool and not one_class:
        raise TypeError(
            f"{name}: `target` of dtype bool must have the shape of `input`, {tuple(input.shape)}, got {shape}"
        )
    indices = shape == pixel_shape or (one_class and not target.dtype.is_floating_point)
    if not indices and ignore_index >= 0:
        raise ValueError(
            f"{name}: `ignore_index` must be negative with a label for each class (use `pixel_weight`), "
            f"got {ignore_index}"
        )


def _weights(
    name: str,
    argument: str,
    value: Any,
    shape: tuple[int, ...],
    like: Tensor,
    dtypes: tuple[torch.dtype, ...] = FLOATING_DTYPES,
) -> None:
    if value is None:
        return
    _tensor(name, argument, value, like)
    if value.dtype not in dtypes:
        names = "float32, float64, float16, bfloat16" + (" or bool" if torch.bool in dtypes else "")
        raise TypeError(f"{name}: `{argument}` must be {names}, got {value.dtype}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name}: `{argument}` must have the shape {shape}, got {tuple(value.shape)}")
    if value.requires_grad:
        raise ValueError(f"{name}: `{argument}` must not require a gradient, for it gets none")


def _classes(name: str, chosen: Any, classes: int) -> None:
    if not isinstance(chosen, Sequence) or isinstance(chosen, (str, bytes)):
        raise TypeError(f"{name}: `classes` must be a sequence of class indices, got {type(chosen).__name__}")
    for c in chosen:
        _integer(name, "classes", c)
        if not 0 <= c < classes:
            raise ValueError(f"{name}: `classes` must be in [0, {classes}), got {c}")
    if len(chosen) == 0 or len(set(chosen)) != len(chosen):
        raise ValueError(f"{name}: `classes` must be one or more different classes, got {list(chosen)}")


def _process_group(name: str, options: dict[str, Any]) -> None:
    process_group = options["process_group"]
    if not torch.distributed.is_available():
        raise ValueError(f"{name}: `process_group` must be None, as the installed torch has no torch.distributed")
    if not isinstance(process_group, torch.distributed.ProcessGroup):
        raise TypeError(
            f"{name}: `process_group` must be a torch.distributed.ProcessGroup that this process belongs to, "
            f"got {type(process_group).__name__}"
        )
    if options.get("per_image", False) and (name == "overlap_statistics" or options.get("reduction") == "none"):
        raise ValueError(
            f"{name}: `process_group` must be None with per_image=True and a result for each image, "
            "which has nothing to exchange"
        )


def _word(name: str, argument: str, value: Any, words: dict[str, int]) -> None:
    wanted = ", ".join(f"'{word}'" for word in list(words)[:-1]) + f" or '{list(words)[-1]}'"
    if not isinstance(value, str):
        raise TypeError(f"{name}: `{argument}` must be {wanted}, got {type(value).__name__}")
    if value not in words:
        raise ValueError(f"{name}: `{argument}` must be {wanted}, got {value!r}")


def _integer(name: str, argument: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: `{argument}` must be an int, got {type(value).__name__}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: `{argument}` must fit into 64 bits, got {value}")


def _number(name: str, argument: str, value: Any, least: float, wanted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat)):
        raise TypeError(f"{name}: `{argument}` must be a number, got {type(value).__name__}")
    if not least <= value <= sys.float_info.max or value < -sys.float_info.max:
        text = "an int of more than 1024 bits" if isinstance(value, int) and value.bit_length() > 1024 else value
        raise ValueError(f"{name}: `{argument}` must be {wanted}, got {text}")
