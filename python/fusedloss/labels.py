"""What becomes of labels outside their range on a GPU, where a call cannot raise without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedloss import _ops

__all__ = ["check_labels", "set_label_checks"]

checked_in_each_call = False


def check_labels(device: torch.device | str | int | None = None) -> None:
    """Raise an error if a label was out of range in a call on CUDA so far; waits for the device.

    On the CPU a call with a label that is neither in its range nor ``ignore_index`` raises at once. On CUDA it would
    have to wait for the device to know. There, value and gradient of the pixel are NaN, so the mean or sum is NaN too,
    and the device remembers value and position until they are asked for. Of several such labels it remembers one.

    Call it where the program waits anyway: once an epoch, beside ``loss.item()``, or where a loss is NaN.

    Args:
        device: whose labels to check; an int is the index of a CUDA device. None: all CUDA devices in use. On the CPU
            there is nothing to check.

    Raises:
        IndexError: a label was out of range; names its value and position. What it names is forgotten with it, so that
            the next check is about the calls since. Where several devices remember one, the others keep theirs.
        RuntimeError: a CUDA graph is being captured, so that nothing may wait for the device. Check after a replay.

    Note:
        The position is the flat one, in the order of the target's dimensions; ``torch.unravel_index`` takes it apart.
        Under a transform of :mod:`torch.func` and in forward mode the pixel is NaN too, but nothing is remembered.

    >>> check_labels()
    >>> check_labels("cpu")
    """
    if device is None:
        devices = _ops.devices_with_records()
    else:
        chosen = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        # "cuda" without an index is the current device.
        devices = [one for one in _ops.devices_with_records() if _is_meant(one, chosen)]
    if any(one.type == "cuda" for one in devices) and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("check_labels: the device cannot be waited for while a CUDA graph is being captured")
    for one in devices:
        if one.type == "cuda":
            torch.cuda.synchronize(one)  # other streams too
        bad = _take(one)
        if bad is not None:
            raise IndexError(_words(one, *bad))


def set_label_checks(mode: str) -> None:
    """Choose whether calls on CUDA check their labels themselves.

    Args:
        mode: "async", as at the start: no call waits, and :func:`check_labels` tells of bad labels. "sync": each call
            waits for the device and raises IndexError as it would on the CPU; for finding the call that is wrong. While
            a CUDA graph is being captured, and in code that ``torch.compile`` has compiled, no call waits in either
            mode.

    Raises:
        ValueError: another mode.

    Note:
        On the CPU calls always raise at once. The mode holds for the process, in all its threads.

    >>> set_label_checks("sync")
    >>> set_label_checks("async")
    """
    global checked_in_each_call
    if mode not in ("async", "sync"):
        raise ValueError(f"set_label_checks: `mode` must be 'async' or 'sync', got {mode!r}")
    checked_in_each_call = mode == "sync"


def check_call(name: str, input: Tensor, target: Tensor, ignore_index: int) -> None:
    """Raise for the labels of a call that was just made, in the words of the CPU's error."""
    if torch.compiler.is_compiling() or target.is_floating_point() or not _ops.runs_cuda_kernels(input.device):
        return
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack() > 0:
        return  # no kernel ran that would have recorded anything
    if input.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    recorded = _take(input.device)
    if recorded is None:
        return
    _, _, classes = recorded
    if target.shape == input.shape:
        wanted, bad = "0 or 1 in a mask", (target != 0) & (target != 1)
    else:
        wanted = f"in [0, {classes}) or ignore_index ({ignore_index})"
        bad = ((target < 0) | (target >= classes)) & (target != ignore_index)
    # The first one, as on the CPU; the device remembers any.
    found = bad.nonzero()[:1].tolist()
    if not found:
        raise IndexError(_words(input.device, *recorded))
    position = tuple(found[0])
    raise IndexError(f"{name}: target at {position} must be {wanted}, got {int(target[position])}")


def _is_meant(device: torch.device, chosen: torch.device) -> bool:
    if device.type != chosen.type:
        return False
    index = chosen.index
    if index is None and chosen.type == "cuda":
        index = torch.cuda.current_device()
    return index is None or device.index is None or device.index == index


def _take(device: torch.device) -> tuple[int, int, int] | None:
    """Value, flat position and classes of the label that the device remembers, which it then forgets."""
    record = _ops.bad_label_record(device)
    found, value, position, classes = record.tolist()
    if not found:
        return None
    record.zero_()
    return value, position, classes


def _words(device: torch.device, value: int, position: int, classes: int) -> str:
    return (
        f"check_labels: target at flat position {position} must be in [0, {classes}) or ignore_index, "
        f"got {value} in an earlier call on {device}"
    )
