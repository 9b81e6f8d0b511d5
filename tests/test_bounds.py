"""Nothing is read past the end of a tensor: behind each lies a page of memory that may not be touched.

Reading it kills the process, so each level has one of its own, which runs this file.
"""

import ctypes
import itertools
import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fusedloss
from fusedloss import _C

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mprotect() as Linux has it")

PROT_NONE = 0


def at_the_end(tensor: Tensor) -> Tensor:
    """A copy with the same strides, whose last element is the last before a page that may not be read."""
    elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    size = elements * tensor.element_size()
    readable = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    region = mmap.mmap(-1, readable + mmap.PAGESIZE)
    copy = torch.frombuffer(region, dtype=tensor.dtype, count=elements, offset=readable - size)
    copy = copy.as_strided(tensor.shape, tensor.stride()).copy_(tensor)
    behind = ctypes.addressof(ctypes.c_char.from_buffer(region)) + readable
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(behind), ctypes.c_size_t(mmap.PAGESIZE), PROT_NONE) == 0
    return copy


def run_everything(input: Tensor, labels: Tensor, soft: Tensor) -> None:
    logits, soft = at_the_end(input).requires_grad_(), at_the_end(soft)
    activation = "softmax" if input.shape[1] > 1 else "sigmoid"
    for target in (at_the_end(labels), soft):
        fusedloss.cross_entropy(logits, target).backward()
        fusedloss.segmentation_loss(
            logits, target, cross_entropy=1.0, iou=1.0, brier=1.0, activation=activation
        ).backward()
    for target in (soft, at_the_end(soft.detach() > 0.2), at_the_end((soft.detach() > 0.2).byte())):
        fusedloss.soft_iou_loss(logits, target, activation="sigmoid").backward()
    fusedloss.mse_loss(logits, soft).backward()


def main(level: str) -> None:
    _C.set_cpu_capability(level)
    torch.set_num_threads(1)
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    for dtype, classes in itertools.product(dtypes, (1, 2, 3, 5, 7, 8, 9, 21)):
        for pixels in (1, 2, 15, 16, 17, 31, 64, 127, 128, 129, 160):
            input = torch.randn(2, classes, pixels).to(dtype)
            soft = torch.rand(2, classes, pixels).softmax(1).to(dtype)
            labels = torch.randint(classes, (2, pixels))
            input_rows, soft_rows = (t.mT.contiguous().mT for t in (input, soft))
            run_everything(input, labels.byte(), soft)
            run_everything(input_rows, labels, soft_rows)
            run_everything(input, labels, soft_rows)
            run_everything(input_rows, labels, soft)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, __file__, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)


@pytest.mark.parametrize("level", _C.cpu_capabilities())
def test_nothing_is_read_past_the_end(level):
    done = run(level)
    assert done.returncode == 0, done.stderr


def test_the_page_behind_cannot_be_read():
    """Or the test above could not fail."""
    assert run("--read-behind").returncode < 0


if __name__ == "__main__":
    if sys.argv[1] == "--read-behind":
        ctypes.string_at(at_the_end(torch.zeros(3)).data_ptr() + 3 * 4, 1)
    main(sys.argv[1])
