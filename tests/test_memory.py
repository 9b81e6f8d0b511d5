"""Nothing as large as the logits is allocated but their gradient. Bytes are counted, not measured."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import fusedloss

from .registry import Maker, each_reduction

SMALL = 64 * 1024  # what does not grow with the tensors: results, partial sums, converted class weights
DTYPES = [pytest.param(d, id=str(d).removeprefix("torch.")) for d in (torch.float32, torch.bfloat16, torch.float64)]
SHAPE = (2, 19, 64, 256)
PIXELS = 2 * 64 * 256


def peak_bytes(work):
    """The most bytes that were allocated at once while ``work`` ran, beyond what there was before."""
    work()  # what happens only once, like reading the instruction-set level, is no part of it
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    in_use = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        in_use += event.nbytes()
        peak = max(peak, in_use)
    del result
    return peak


def bytes_of(tensor):
    return tensor.numel() * tensor.element_size()


def pixel_bytes(dtype):
    return PIXELS * (16 if dtype == torch.float64 else 8)


def test_bytes_are_counted():
    x = torch.zeros(1000, 1000)
    assert 0 <= peak_bytes(lambda: x + 1) - bytes_of(x) < 1000
    assert 0 <= peak_bytes(lambda: (x + 1) * 2) - 2 * bytes_of(x) < 1000


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("label_dtype", [torch.int64, torch.uint8], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@each_reduction
def test_cross_entropy(dtype, label_dtype, memory_format, reduction):
    """Forward and backward: the gradient, and 8 bytes for every pixel (16 in float64). No copy for channels_last."""
    m = Maker(dtype)
    logits = m.normal(*SHAPE).contiguous(memory_format=memory_format).requires_grad_()
    labels = m.labels(19, 2, 64, 256, dtype=label_dtype, ignored=7)
    options = {"ignore_index": 7, "label_smoothing": 0.1, "reduction": reduction}
    weight = m.positive(19)
    result_bytes = PIXELS * logits.element_size() if reduction == "none" else 0
    grad_output = (
        torch.ones((PIXELS,), dtype=dtype).view(2, 64, 256) if reduction == "none" else torch.ones((), dtype=dtype)
    )

    def work():
        loss = fusedloss.cross_entropy(logits, labels, weight, **options)
        return torch.autograd.grad(loss, logits, grad_output)

    assert peak_bytes(work) <= bytes_of(logits) + pixel_bytes(dtype) + result_bytes + SMALL
    with torch.no_grad():
        assert peak_bytes(lambda: fusedloss.cross_entropy(logits, labels, weight, **options)) <= result_bytes + SMALL


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4096, 21), (64, 32000)], ids=str)
def test_cross_entropy_of_rows(dtype, shape):
    m = Maker(dtype)
    logits, labels = m.normal(*shape).requires_grad_(), m.labels(shape[1], shape[0])
    work = lambda: torch.autograd.grad(fusedloss.cross_entropy(logits, labels), logits)  # noqa: E731
    assert peak_bytes(work) <= bytes_of(logits) + shape[0] * (16 if dtype == torch.float64 else 8) + SMALL


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_cross_entropy_with_probabilities(dtype, memory_format):
    """One gradient for each that asks for one."""
    m = Maker(dtype)
    logits = m.normal(*SHAPE).contiguous(memory_format=memory_format).requires_grad_()
    target = m.probabilities(*SHAPE).contiguous(memory_format=memory_format)
    work = lambda: torch.autograd.grad(fusedloss.cross_entropy(logits, target), logits)  # noqa: E731
    assert peak_bytes(work) <= bytes_of(logits) + pixel_bytes(dtype) + SMALL
    target.requires_grad_()
    work = lambda: torch.autograd.grad(fusedloss.cross_entropy(logits, target), (logits, target))  # noqa: E731
    assert peak_bytes(work) <= 2 * bytes_of(logits) + pixel_bytes(dtype) + SMALL


@pytest.mark.parametrize("crop", [(slice(None), slice(2, 17)), (slice(1, 2),)], ids=["classes", "images"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_slices_are_read_where_they_are(crop, memory_format):
    m = Maker(torch.float32)
    logits = m.normal(*SHAPE).contiguous(memory_format=memory_format)[crop]
    labels = m.labels(logits.shape[1], logits.shape[0], 64, 256)
    assert peak_bytes(lambda: fusedloss.cross_entropy(logits, labels)) <= SMALL


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weight"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_mse_loss(dtype, weighted, reduction):
    """No temporary at all in the forward; in the backward one gradient for each that asks for one."""
    m = Maker(dtype)
    x, y = m.normal(*SHAPE), m.normal(*SHAPE)
    options = {"weight": m.positive(*SHAPE) if weighted else None, "reduction": reduction}
    assert peak_bytes(lambda: fusedloss.mse_loss(x, y, **options)) <= SMALL
    x.requires_grad_()
    work = lambda: torch.autograd.grad(fusedloss.mse_loss(x, y, **options), x)  # noqa: E731
    assert peak_bytes(work) <= bytes_of(x) + SMALL
    y.requires_grad_()
    work = lambda: torch.autograd.grad(fusedloss.mse_loss(x, y, **options), (x, y))  # noqa: E731
    assert peak_bytes(work) <= 2 * bytes_of(x) + SMALL


@pytest.mark.parametrize("layouts", ["channels_last", "two layouts", "two dtypes", "broadcast", "sliced"])
def test_mse_loss_makes_no_copy(layouts):
    """Each operand is read where it lies, in whatever layout and dtype."""
    m = Maker(torch.float32)
    x, y = m.normal(*SHAPE), m.normal(*SHAPE)
    if layouts == "channels_last":
        x, y = (t.contiguous(memory_format=torch.channels_last) for t in (x, y))
    elif layouts == "two layouts":
        y = y.contiguous(memory_format=torch.channels_last)
    elif layouts == "two dtypes":
        y = y.bfloat16()
    elif layouts == "broadcast":
        y = y[:1, :, :1]
    else:
        x, y = x[:, 3:], y[:, 3:]
    assert peak_bytes(lambda: fusedloss.mse_loss(x, y)) <= SMALL


def test_the_result_is_all_that_none_allocates():
    m = Maker(torch.float32)
    x, y = m.normal(*SHAPE), m.normal(*SHAPE)
    assert peak_bytes(lambda: fusedloss.mse_loss(x, y, reduction="none")) <= bytes_of(x) + SMALL


def test_memory_of_the_process():
    """The same, as the operating system sees it: nothing is hidden from torch's allocator."""
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc here to ask for the peak")
    program = """
import re, torch, fusedloss

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

def step(logits, labels):
    return torch.autograd.grad(fusedloss.cross_entropy(logits, labels), logits)

step(torch.randn(1, 19, 8, 8, requires_grad=True), torch.zeros(1, 8, 8, dtype=torch.int64))
logits = torch.zeros(2, 19, 1024, 1024).requires_grad_()
labels = torch.zeros(2, 1024, 1024, dtype=torch.int64)
logits.detach().add_(1)
before = peak()
step(logits, labels)
print(peak() - before, logits.numel() * 4 + labels.numel() * 8)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    used, allowed = map(int, done.stdout.split())
    assert used <= allowed + 16 * 1024 * 1024
