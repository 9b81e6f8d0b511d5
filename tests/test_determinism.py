"""The same call gives the same bits: on every run and for every number of threads."""

import pytest
import torch

from .compare import evaluate
from .registry import (
    CROSS_ENTROPY,
    LOSSES,
    MSE_LOSS,
    OVERLAP_STATISTICS,
    SEGMENTATION_LOSS,
    Maker,
    difference,
    each_loss,
    each_reduction,
    indices,
    on_pixels,
    probabilities,
)

NUMBERS_OF_THREADS = (1, 2, 3, 7)


def calls(dtype, device):
    """One for each way through the kernels, each large enough to be shared by threads."""
    m = Maker(dtype, device)
    labels = m.labels(19, 2, 113, 127, ignored=-100)
    image = m.normal(2, 19, 113, 127)
    rows = m.normal(5000, 21)
    vocabulary = m.normal(40, 9001)
    options = {"label_smoothing": 0.1}
    yield "image", CROSS_ENTROPY, indices(image, labels, m.positive(19), **options)
    last = image.to(memory_format=torch.channels_last)
    yield "channels_last", CROSS_ENTROPY, indices(last, labels, m.positive(19), **options)
    yield "uint8", CROSS_ENTROPY, indices(image, labels.to(torch.uint8), ignore_index=156)
    yield "rows", CROSS_ENTROPY, indices(rows, m.labels(21, 5000), **options)
    yield "transposed rows", CROSS_ENTROPY, indices(rows.T.contiguous().T, m.labels(21, 5000), **options)
    yield "vocabulary", CROSS_ENTROPY, indices(vocabulary, m.labels(9001, 40), **options)
    yield "probabilities", CROSS_ENTROPY, probabilities(image, m.probabilities(2, 19, 113, 127))
    yield "probability rows", CROSS_ENTROPY, probabilities(rows, m.probabilities(5000, 21))
    weights = {"pixel_weight": m.positive(2, 113, 127), "brier": 0.5}
    yield "all terms", SEGMENTATION_LOSS, on_pixels(image, labels, m.positive(19), **weights, **options)
    yield "all terms, channels_last", SEGMENTATION_LOSS, on_pixels(last, labels, per_image=True, **weights)
    soft = m.probabilities(2, 19, 113, 127)
    yield "all terms, soft labels", SEGMENTATION_LOSS, on_pixels(image, soft, **weights)
    yield "all terms, rows", SEGMENTATION_LOSS, on_pixels(rows, m.labels(21, 5000), brier=0.5)
    yield "all terms, sigmoid", SEGMENTATION_LOSS, on_pixels(image, labels, activation="sigmoid", **weights)
    yield "overlap of many classes", OVERLAP_STATISTICS, on_pixels(vocabulary, m.labels(9001, 40))
    yield "squares", MSE_LOSS, difference(m.normal(300007), m.normal(300007))
    yield "weighted squares", MSE_LOSS, difference(m.normal(300007), m.normal(300007), m.positive(300007))
    yield "broadcast squares", MSE_LOSS, difference(m.normal(300, 1001), m.normal(1001))
    yield "squares of two layouts", MSE_LOSS, difference(m.normal(300, 1001), m.normal(1001, 300).T)


def bits(loss, call):
    value, gradients = evaluate(loss.function, call, call.differentiable)
    return [value, *gradients.values()]


@each_reduction
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_threads(dtype, reduction, threads, device):
    for name, loss, call in calls(dtype, device):
        if loss.reductions:
            call = call.with_options(reduction=reduction)
        elif reduction != "mean":
            continue
        threads(NUMBERS_OF_THREADS[0])
        expected = bits(loss, call)
        for number in NUMBERS_OF_THREADS[1:]:
            threads(number)
            for one, other in zip(bits(loss, call), expected, strict=True):
                assert torch.equal(one, other), f"{name} with {number} threads"


@each_loss
def test_every_run(loss, threads, device):
    threads(2)
    call = loss.large(Maker(torch.float32, device), 600_000)
    expected = bits(loss, call)
    for _ in range(10):
        for one, other in zip(bits(loss, call), expected, strict=True):
            assert torch.equal(one, other)


@each_loss
def test_deterministic_mode_is_not_refused(loss, device):
    call = loss.large(Maker(torch.float32, device), 10_000)
    torch.use_deterministic_algorithms(True)
    try:
        bits(loss, call)
    finally:
        torch.use_deterministic_algorithms(False)


@each_loss
def test_every_run_in_deterministic_mode(loss, threads, device):
    """The bits are those of the call outside this mode, whatever the number of threads.

    In it torch fills new memory with NaN, so that a number that nobody writes would show.
    """
    call = loss.large(Maker(torch.float32, device), 400_000)
    threads(1)
    expected = bits(loss, call)
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device=device).isnan().all()
        for number in (1, 2, 3, 4):
            threads(number)
            for _ in range(2):
                for one, other in zip(bits(loss, call), expected, strict=True):
                    assert torch.equal(one, other), f"{number} threads"
    finally:
        torch.use_deterministic_algorithms(False)


def test_calls_from_many_threads(device):
    """The function is called from several Python threads at once; none disturbs another."""
    from concurrent.futures import ThreadPoolExecutor

    jobs = [(loss, loss.large(Maker(torch.float32, device, seed), 20_000)) for seed in range(4) for loss in LOSSES]
    expected = [bits(loss, call) for loss, call in jobs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for results, wanted in zip(pool.map(lambda job: bits(*job), jobs), expected, strict=True):
                for one, other in zip(results, wanted, strict=True):
                    assert torch.equal(one, other)
