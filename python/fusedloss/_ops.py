"""The compiled ops: the only file that names the binaries.

For every op it gives the shapes and strides of the results (``register_fake``), so that torch.compile and torch.export
can trace it; ``_autograd.py`` gives the derivatives.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedloss import _C  # after torch, whose libraries it needs

cross_entropy: Callable[..., Tensor] = torch.ops.fusedloss.cross_entropy.default
cross_entropy_forward: Callable[..., tuple[Tensor, Tensor]] = torch.ops.fusedloss._cross_entropy_forward.default
cross_entropy_rescale: Callable[..., None] = torch.ops.fusedloss._cross_entropy_rescale_.default
cross_entropy_backward: Callable[..., Tensor] = torch.ops.fusedloss._cross_entropy_backward.default
segmentation: Callable[..., tuple[Tensor, Tensor]] = torch.ops.fusedloss.segmentation.default
segmentation_forward: Callable[..., tuple[Tensor, Tensor, Tensor]] = torch.ops.fusedloss._segmentation_forward.default
segmentation_backward: Callable[..., Tensor] = torch.ops.fusedloss._segmentation_backward.default
mse_loss: Callable[..., Tensor] = torch.ops.fusedloss.mse_loss.default
mse_loss_forward: Callable[..., tuple[Tensor, Tensor]] = torch.ops.fusedloss._mse_loss_forward.default
mse_loss_rescale: Callable[..., None] = torch.ops.fusedloss._mse_loss_rescale_.default
mse_loss_backward: Callable[..., Tensor] = torch.ops.fusedloss._mse_loss_backward.default

NONE, MEAN, SUM = 0, 1, 2  # torch's numbering of `reduction`
# Beside these three, what the segmentation op can be asked for (its `output`):
STATISTICS = 3  # I, P and T of each class
SUMS = 4  # all that the formulas need, see kSums in csrc/kernels/segmentation.h
ALL_CLASSES = [-1]  # as the op's list; classes_of in csrc/binding/segmentation_call.h says why
SOFTMAX, SIGMOID, NO_ACTIVATION = 0, 1, 2
KEEP_NOTHING, KEEP_STATISTICS, KEEP_GRADIENT = 0, 1, 2  # what a forward op gives as its second result


set_memory_reuse: Callable[[bool], None] = _C.set_memory_reuse
reuses_memory: Callable[[], bool] = _C.reuses_memory


# --- the second library: CUDA kernels ---------------------------------------------------------------------------------


def _load_cuda(library: Path, cuda_of_torch: str | None) -> str | None:
    """Load the CUDA kernels. Why they cannot run here, or None where they can."""
    if cuda_of_torch is None:
        return "the installed torch has no CUDA"
    if not library.exists():
        return "fusedloss was built without CUDA kernels"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        # torch says which library, and only what it caught says why.
        return f"{library.name} does not load ({' '.join(str(error.__cause__ or error).split())})"
    return None


CUDA_REFUSED: str | None = _load_cuda(Path(_C.__file__).with_name("_C_cuda.so"), torch.version.cuda)

# For the tests alone: a library of the CUDA sources compiled for the CPU, which takes the place of the CPU kernels.
_host_library = os.environ.get("FUSEDLOSS_TEST_CUDA_HOST")
if _host_library:
    torch.ops.load_library(_host_library)


def runs_cuda_kernels(device: torch.device) -> bool:
    """Whether the CUDA sources run there: a bad label is then recorded, not raised, and some limits are narrower."""
    return device.type == "cuda" or (device.type == "cpu" and bool(_host_library))


def gradient_in_forward(input: Tensor) -> bool:
    """Whether the forward can write the gradient where `input` lies (``KEEP_GRADIENT``): if no CUDA kernels run there.

    Not asked of its device, whose `type` is a string that takes 0.4 us to make.
    """
    return input.is_cpu and not _host_library


def has_kernels(device: torch.device) -> bool:
    """Whether anything of ours runs there."""
    return device.type == "cpu" or (device.type == "cuda" and CUDA_REFUSED is None)


def bad_label_record(device: torch.device) -> Tensor:
    """The device's memory of a bad label, itself and not a copy: (4,) int64; found, value, flat position, classes."""
    record: Tensor = torch.ops.fusedloss._bad_label_record.default(torch.empty(0, device=device))
    return record


def devices_with_records() -> list[torch.device]:
    """Those on which a bad label may have been recorded. Asking starts no device that is not in use."""
    devices = [torch.device("cpu")] if _host_library else []
    if CUDA_REFUSED is None and torch.cuda.is_initialized():
        is_in_use: Callable[[int], bool] = vars(torch._C)["_cuda_hasPrimaryContext"]  # a torch with CUDA has it
        devices += [torch.device("cuda", k) for k in range(torch.cuda.device_count()) if is_in_use(k)]
    return devices


def show_config() -> str:
    """Tell how the binary was built, which instruction-set level it runs, and whether it has CUDA kernels.

    Returns:
        A text of several lines, for bug reports.

    >>> print(show_config())  # doctest: +ELLIPSIS
    fusedloss ...
    """
    info = _C.build_info()
    lines = [f"fusedloss {info.pop('version')}"]
    lines += [f"  {name.replace('_', ' ')}: {value}" for name, value in info.items()]
    lines.append(f"  running torch: {torch.__version__}")
    lines.append(f"  cpu capability: {_C.get_cpu_capability()} (of {', '.join(_C.cpu_capabilities())})")
    lines.append(f"  threads: {torch.get_num_threads()}")
    refused = _C.memory_reuse_refused()
    lines.append(f"  memory reuse: {f'none, as {refused}' if refused else 'on' if _C.reuses_memory() else 'off'}")
    lines.append(f"  cuda kernels: {f'none, as {CUDA_REFUSED}' if CUDA_REFUSED else 'loaded'}")
    if _host_library:
        lines.append(f"  cpu kernels: replaced for tests by {_host_library}")
    return "\n".join(lines)


# --- shapes and strides -----------------------------------------------------------------------------------------------


def _class_dim(input: Tensor) -> int:
    return 0 if input.dim() == 1 else 1


def _pixel_shape(input: Tensor) -> list[Any]:
    shape = list(input.shape)
    del shape[_class_dim(input)]
    return shape


def _contiguous_strides(shape: list[Any]) -> list[Any]:
    strides = [1] * len(shape)
    for d in range(len(shape) - 2, -1, -1):
        strides[d] = strides[d + 1] * max(shape[d + 1], 1)
    return strides


def _logit_strides(input: Tensor) -> list[Any]:
    """Dense strides in the order that the kernels visit `input` in (dense_strides in csrc/binding/logits.cpp)."""
    shape, strides = list(input.shape), list(input.stride())
    contiguous = _contiguous_strides(shape)
    if any(n == 0 for n in shape):
        return contiguous
    if len(shape) == 1 or all(n == 1 or s == c for n, s, c in zip(shape, strides, contiguous, strict=True)):
        return contiguous
    pixels: Any = 1
    pixel_stride: Any = 1
    for d in range(len(shape) - 1, 1, -1):
        if shape[d] != 1:
            if pixels == 1:
                pixel_stride = strides[d]
            elif strides[d] != pixel_stride * pixels:
                return contiguous  # spatial dimensions out of order: copied
        pixels = pixels * shape[d]
    class_stride = 1 if shape[1] == 1 else strides[1]
    rows = pixels == 1
    if rows:
        pixels = shape[0]
        pixel_stride = strides[0] if pixels != 1 else (shape[1] if class_stride == 1 else 1)
    if pixel_stride == 1:
        if class_stride == 1 and shape[1] > 1 and pixels > 1:
            return contiguous  # expanded: copied
        if rows and shape[0] > 1:
            return [1, shape[0]] + [1] * (len(shape) - 2)
        return contiguous
    if class_stride != 1:
        return contiguous  # copied
    dense = [0] * len(shape)
    dense[1], stride = 1, shape[1]
    for d in range(len(shape) - 1, 1, -1):
        dense[d] = stride
        stride = stride * shape[d]
    dense[0] = stride
    return dense


def _dense_strides(tensor: Tensor) -> list[Any]:
    """The tensor's strides where it is dense, else contiguous: csrc/binding/mse_loss_call.cpp, dense_strides."""
    shape, strides = list(tensor.shape), list(tensor.stride())
    expected: Any = 1
    for stride, size in sorted((s, n) for s, n in zip(strides, shape, strict=True) if n != 1):
        if stride != expected:
            return _contiguous_strides(shape)
        expected = expected * size
    return strides


def _require_one_device(*tensors: Tensor | None) -> None:
    # Else an op on the CPU and on meta tensors would be shaped, and never run.
    devices = {tensor.device.type for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        raise RuntimeError(f"fusedloss: the tensors must be on one device, got {', '.join(sorted(devices))}")


def _like_logits(input: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(list(input.shape), _logit_strides(input), dtype=dtype, device=input.device)


def _promote(*tensors: Tensor | None) -> torch.dtype:
    given = [tensor.dtype for tensor in tensors if tensor is not None]
    dtype = given[0]
    for other in given[1:]:
        dtype = torch.promote_types(dtype, other)
    return dtype


def _loss_dtype(dtype: torch.dtype, float32_loss: bool) -> torch.dtype:
    return torch.float32 if float32_loss and dtype != torch.float64 else dtype


@torch.library.register_fake("fusedloss::_cross_entropy_forward")
def _cross_entropy_forward_fake(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    float32_loss: bool,
    keep: int,
) -> tuple[Tensor, Tensor]:
    _require_one_device(input, target, weight)
    soft = target.dtype.is_floating_point
    dtype = _loss_dtype(_promote(input, target if soft else None), float32_loss)
    shape = _pixel_shape(input)
    loss = input.new_empty(shape if reduction == NONE else [], dtype=dtype)
    if keep == KEEP_GRADIENT:
        return loss, _like_logits(input, input.dtype)
    compute = torch.float64 if input.dtype == torch.float64 else torch.float32
    return loss, input.new_empty([2 * math.prod(shape) + 2 if keep == KEEP_STATISTICS else 0], dtype=compute)


@torch.library.register_fake("fusedloss::_cross_entropy_backward")
def _cross_entropy_backward_fake(
    grad: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    operand: int,
) -> Tensor:
    _require_one_device(grad, input, target, weight, statistics)
    return _like_logits(input, input.dtype if operand == 0 else target.dtype)


@torch.library.register_fake("fusedloss::_segmentation_forward")
def _segmentation_forward_fake(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pixel_weight: Tensor | None,
    pos_weight: Tensor | None,
    activation: int,
    ignore_index: int,
    output: int,
    cross_entropy: float,
    iou: float,
    brier: float,
    alpha: float,
    beta: float,
    label_smoothing: float,
    classes: list[int],
    per_image: bool,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    _require_one_device(input, target, weight, pixel_weight, pos_weight)
    keep = arguments[-1]
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    groups = input.shape[0] if per_image else 1
    table = 3 * groups * input.shape[1] + groups + 3
    shape: list[Any] = []
    if output == STATISTICS:
        shape = [3, groups, input.shape[1]]
    elif output == SUMS:
        shape = [table]
    elif output == NONE:
        chosen = input.shape[1] if classes in ([], ALL_CLASSES) else len(classes)
        shape = [groups, chosen] if iou != 0.0 else _pixel_shape(input)
    kept: Any = 0
    if keep:
        pixels = 2 * math.prod(_pixel_shape(input)) if activation == SOFTMAX else 0
        kept = pixels + table * (1 if dtype == torch.float64 else 2)
    loss = input.new_empty(shape, dtype=torch.float64 if output == SUMS else dtype)
    terms, statistics = (input.new_empty(size, dtype=dtype) for size in ([3], [kept]))
    return loss, terms, statistics


@torch.library.register_fake("fusedloss::_segmentation_backward")
def _segmentation_backward_fake(grad: Tensor, input: Tensor, target: Tensor, *arguments: Any) -> Tensor:
    _require_one_device(grad, input, target)
    return _like_logits(input, input.dtype if arguments[-1] == 0 else target.dtype)


@torch.library.register_fake("fusedloss::_mse_loss_forward")
def _mse_loss_forward_fake(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    float32_loss: bool,
    keep: int,
) -> tuple[Tensor, Tensor]:
    _require_one_device(input, target, weight)
    dtype = _loss_dtype(_promote(input, target, weight), float32_loss)
    if reduction == NONE:
        loss = torch.empty_strided(list(input.shape), _dense_strides(input), dtype=dtype, device=input.device)
    else:
        loss = input.new_empty([], dtype=dtype)
    if keep == KEEP_GRADIENT:
        return loss, torch.empty_strided(
            list(input.shape), _dense_strides(input), dtype=input.dtype, device=input.device
        )
    kept = 2 if keep == KEEP_STATISTICS and weight is not None and reduction == MEAN else 0
    return loss, input.new_empty([kept], dtype=torch.float64)


@torch.library.register_fake("fusedloss::_mse_loss_backward")
def _mse_loss_backward_fake(
    grad: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    reduction: int,
    operand: int,
) -> Tensor:
    _require_one_device(grad, input, target, weight, statistics)
    wanted = (input, target, weight)[operand]
    assert wanted is not None
    return torch.empty_strided(list(wanted.shape), _dense_strides(wanted), dtype=wanted.dtype, device=wanted.device)


@torch.library.register_fake("fusedloss::_cross_entropy_rescale_")
@torch.library.register_fake("fusedloss::_mse_loss_rescale_")
def _rescale_fake(*arguments: Any) -> None:
    _require_one_device(*(argument for argument in arguments if isinstance(argument, Tensor)))


@torch.library.register_fake("fusedloss::cross_entropy")
def _cross_entropy_fake(*arguments: Any) -> Tensor:
    loss: Tensor = _cross_entropy_forward_fake(*arguments, KEEP_NOTHING)[0]
    return loss


@torch.library.register_fake("fusedloss::mse_loss")
def _mse_loss_fake(*arguments: Any) -> Tensor:
    loss: Tensor = _mse_loss_forward_fake(*arguments, KEEP_NOTHING)[0]
    return loss


@torch.library.register_fake("fusedloss::segmentation")
def _segmentation_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    loss, terms, _ = _segmentation_forward_fake(*arguments, False)
    return loss, terms
