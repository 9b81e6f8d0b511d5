"""Whether the memory of a large gradient is kept for the next one."""

from __future__ import annotations

import os
import warnings

from fusedloss import _ops

__all__ = ["set_memory_reuse"]

VARIABLE = "FUSEDLOSS_REUSE_MEMORY"


def set_memory_reuse(enabled: bool) -> bool:
    """Choose whether the memory of a large tensor on the CPU, mostly a gradient, is kept for the next one.

    At first it is. The system clears each page that it hands out, which for a gradient that is made anew in each step
    takes about as long as the loss itself. Memory that is kept is not cleared again.

    Kept memory is offered to the system, which takes it back where memory gets short. Together with what is alive it is
    never more than was once alive at the same time. A fork gives it up: pages that processes share are slow to write.

    Args:
        enabled: False: from now on memory comes from torch's allocator, and what is kept goes back to the system. True:
            memory is kept again. In all threads.

    Returns:
        Whether it was kept until now, to set it back.

    Raises:
        TypeError: `enabled` is not a bool.

    Note:
        Tensors from 32 MiB on; smaller ones malloc keeps itself. On Linux, under torch 2.11 or newer, where no limit is
        set on the address space and the system does not count commitments (``vm.overcommit_memory=2``), for both of
        which kept memory would count; elsewhere memory comes from torch's allocator. :func:`show_config` tells which it
        is. ``FUSEDLOSS_REUSE_MEMORY=0`` in the environment turns it off at start.

        A tensor of such memory is as any other, but torch's profiler does not count it, its storage cannot be resized,
        and a process's resident memory, as the system reports it, includes what is kept until it is taken back.

    >>> before = set_memory_reuse(False)
    >>> set_memory_reuse(before)
    False
    """
    if not isinstance(enabled, bool):
        raise TypeError(f"set_memory_reuse: `enabled` must be True or False, got {enabled!r}")
    before = _ops.reuses_memory()
    _ops.set_memory_reuse(enabled)
    return before


def _follow_environment() -> None:
    """A wrong value must not take the program down at import, nor pass unseen."""
    value = os.environ.get(VARIABLE, "")
    if value == "0":
        _ops.set_memory_reuse(False)
    elif value not in ("", "1"):
        warnings.warn(f"fusedloss: {VARIABLE}: expected 0 or 1, got {value!r}; memory is reused", RuntimeWarning, 2)


_follow_environment()
