"""Every size is right: around the vector lanes, the blocks and tiles of pixels, and the chunks given to threads."""

import pytest
import torch

import fusedloss

from .compare import check
from .conftest import CUDA_ON_HOST
from .registry import (
    CROSS_ENTROPY,
    MSE_LOSS,
    OVERLAP_STATISTICS,
    SEGMENTATION_LOSS,
    Maker,
    difference,
    each_reduction,
    indices,
    on_pixels,
    probabilities,
)
from .test_layouts import check_in_layout, offset
from .tolerance import COMPUTE_ROUNDINGS, compute_dtype

# Every count below two blocks of the widest kernels, then around powers of two: lanes, blocks, tiles, chunks.
PIXELS = (*range(1, 71), 127, 128, 129, 255, 256, 257, 511, 513, 1023, 1024, 1025)
if CUDA_ON_HOST:  # which plays a GPU's threads one by one: its vectors, warps and blocks, and what lies beside them
    PIXELS = (*range(1, 10), 16, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 513, 1023, 1025)
FEW_PIXELS = (1, 3, 4, 15, 16, 17, 33, 64, 65, 129, 257)
# Below, at and above a vector of each width; many classes; more than one visit's worth of them.
CLASSES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 21, 31, 32, 33, 63, 64, 65, 150, 1000)


def each_dtype(*dtypes):
    return pytest.mark.parametrize("dtype", [pytest.param(d, id=str(d).removeprefix("torch.")) for d in dtypes])


def logits(m, layout, samples, classes, pixels):
    if layout == "rows":
        return m.normal(samples * pixels, classes)
    if layout == "channels_last":
        return m.normal(samples, pixels, classes).transpose(1, 2)
    return m.normal(samples, classes, pixels)


def pixels_of(input):
    return (input.shape[0], *input.shape[2:])


@pytest.mark.parametrize("layout", ["planes", "rows", "channels_last"])
@pytest.mark.parametrize("classes", [2, 3, 17])
@each_dtype(torch.float64, torch.float32, torch.bfloat16)
def test_pixel_counts(dtype, classes, layout, device):
    for pixels in PIXELS:
        m = Maker(dtype, device, seed=pixels)
        input = logits(m, layout, 2, classes, pixels)
        labels = m.labels(classes, *pixels_of(input), ignored=-100)
        call = indices(input, labels, m.positive(classes), label_smoothing=0.1, reduction="none")
        check(CROSS_ENTROPY, call, what=f"{pixels} pixels")
        check(CROSS_ENTROPY, call.with_options(reduction="sum"), what=f"{pixels} pixels, sum")


@pytest.mark.parametrize("layout", ["planes", "rows", "channels_last"])
@pytest.mark.parametrize("classes", CLASSES)
@each_dtype(torch.float64, torch.float32, torch.float16)
def test_class_counts(dtype, classes, layout, device):
    for pixels in FEW_PIXELS if classes < 1000 else (1, 5, 33):
        m = Maker(dtype, device, seed=pixels)
        input = logits(m, layout, 2, classes, pixels)
        labels = m.labels(classes, *pixels_of(input))
        # With one class the gradient is a difference of equal numbers.
        scale = 4.0 if classes == 1 else 0.0
        plain = indices(input, labels, reduction="none")
        check(CROSS_ENTROPY, plain, what=f"{pixels} pixels", scale=scale)
        everything = indices(input, labels, m.positive(classes), label_smoothing=0.3, reduction="mean")
        check(CROSS_ENTROPY, everything, what=f"{pixels} pixels, everything", scale=scale)


@pytest.mark.parametrize("layout", ["planes", "channels_last"])
@pytest.mark.parametrize("classes", [16, 17, 24, 25, 48, 49, 96, 97, 192, 193])
@each_dtype(torch.float32, torch.bfloat16)
def test_classes_of_warps(dtype, classes, layout, device):
    """On CUDA a warp has up to 24 classes, and one, two, four or eight warps share the pixels."""
    for pixels in (2, 64, 130):
        m = Maker(dtype, device, seed=pixels)
        input = logits(m, layout, 2, classes, pixels)
        labels = m.labels(classes, *pixels_of(input), ignored=-100)
        for weight, per_image in ((None, False), (m.positive(classes), True)):
            call = on_pixels(input, labels, weight, brier=0.5, per_image=per_image)
            check(SEGMENTATION_LOSS, call, with_torch=False, what=f"{pixels} pixels, per_image={per_image}")


@pytest.mark.parametrize("layout", ["planes", "rows", "channels_last"])
@pytest.mark.parametrize("classes", [1, 2, 3, 16, 17, 33, 150])
@each_dtype(torch.float64, torch.float32, torch.bfloat16)
def test_probability_counts(dtype, classes, layout, device):
    for pixels in FEW_PIXELS:
        m = Maker(dtype, device, seed=pixels)
        input = logits(m, layout, 2, classes, pixels)
        labels = torch.softmax(logits(m, layout, 2, classes, pixels).double(), 1).to(dtype)
        call = probabilities(input, labels, m.positive(classes), label_smoothing=0.1, reduction="none")
        scale = 4.0 if classes == 1 else 0.0
        check(CROSS_ENTROPY, call, wrt=("input", "target"), what=f"{pixels} pixels", scale=scale)


@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["planes", "channels_last"]
)
@pytest.mark.parametrize("classes", [2, 21, 150])
@each_dtype(torch.float32, torch.bfloat16)
def test_images_of_many_chunks(dtype, classes, memory_format, threads, device):
    """More pixels than a thread gets at once, and a number of them that divides by nothing."""
    threads(2)
    height, width = (211, 307) if classes == 2 else (67, 83)
    m = Maker(dtype, device)
    input = m.normal(2, classes, height, width).to(memory_format=memory_format)
    labels = m.labels(classes, 2, height, width, ignored=-100)
    for reduction in ("none", "mean"):
        check(CROSS_ENTROPY, indices(input, labels, m.positive(classes), reduction=reduction), what=reduction)


@pytest.mark.parametrize("classes", [96, 97, 193, 4096, 4097, 8195])
@each_dtype(torch.float32, torch.bfloat16)
def test_rows_of_many_classes(dtype, classes, device):
    """Around the lengths at which a warp, then a block takes a row; rows that begin anywhere, and elsewhere than their
    gradient."""
    for rows in (1, 3, 9) if classes < 4096 else (3,):
        m = Maker(dtype, device, seed=rows)
        input, weight = m.normal(rows, classes), m.positive(classes)
        labels = m.labels(classes, rows, ignored=-100)
        for what, call in (
            ("plain", indices(input, labels, weight, reduction="none")),
            ("smoothing", indices(input, labels, weight, label_smoothing=0.3, reduction="mean")),
            ("probabilities", probabilities(input, m.probabilities(rows, classes), weight, label_smoothing=0.1)),
        ):
            check(CROSS_ENTROPY, call, what=f"{rows} rows, {what}")
            check_in_layout(CROSS_ENTROPY, call, ["input"], offset, what=f"{rows} rows, {what}, offset")


@pytest.mark.parametrize(("rows", "classes"), [(20001, 97), (2101, 4097)], ids=["short", "long"])
def test_many_rows_of_many_classes(rows, classes, device):
    """More rows than there are teams of threads on CUDA: each has several, one after the other."""
    m = Maker(torch.float32, device)
    call = indices(m.normal(rows, classes), m.labels(classes, rows, ignored=-100), label_smoothing=0.1)
    check(CROSS_ENTROPY, call.with_options(reduction="none"))
    check(CROSS_ENTROPY, call.with_options(reduction="mean"))


@each_dtype(torch.float32, torch.float16)
def test_rows_wider_than_a_tile(dtype, threads, device):
    """A vocabulary: one row alone is more than the cache of a core likes."""
    threads(2)
    m = Maker(dtype, device)
    for classes in (32000, 40001):
        call = indices(m.normal(5, classes), m.labels(classes, 5, ignored=-100), label_smoothing=0.1)
        check(CROSS_ENTROPY, call, what=f"{classes} classes")


@pytest.mark.parametrize("dimensions", range(1, 6))
@each_reduction
def test_dimensions(dimensions, reduction, device):
    shape = (2, 3, 4, 2, 3)[:dimensions] if dimensions > 1 else (3,)
    m = Maker(torch.float32, device)
    pixels = shape[:1] + shape[2:] if dimensions > 1 else ()
    check(CROSS_ENTROPY, indices(m.normal(*shape), m.labels(3, *pixels), m.positive(3), reduction=reduction))
    check(CROSS_ENTROPY, probabilities(m.normal(*shape), m.probabilities(*shape), m.positive(3), reduction=reduction))
    check(
        MSE_LOSS, difference(m.normal(*shape), m.normal(*shape), m.positive(*shape)).with_options(reduction=reduction)
    )


def test_six_dimensions_and_sizes_of_one(device):
    for shape in (
        (1, 1),
        (1, 5),
        (5, 1),
        (1, 5, 1, 1),
        (4, 5, 1, 1),
        (1, 5, 3, 1),
        (1, 5, 1, 3),
        (2, 1, 3, 3),
        (1,) * 6,
    ):
        m = Maker(torch.float32, device)
        pixels = shape[:1] + shape[2:]
        call = indices(m.normal(*shape), m.labels(shape[1], *pixels), m.positive(shape[1]), reduction="none")
        check(CROSS_ENTROPY, call, what=str(shape))
    m = Maker(torch.float32, device)
    check(CROSS_ENTROPY, indices(m.normal(2, 3, 2, 1, 2, 3), m.labels(3, 2, 2, 1, 2, 3), reduction="none"))


@each_dtype(torch.float64, torch.float32, torch.float16, torch.bfloat16)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weight"])
def test_element_counts(dtype, weighted, device):
    for elements in PIXELS:
        m = Maker(dtype, device, seed=elements)
        call = difference(m.normal(elements), m.normal(elements), m.positive(elements) if weighted else None)
        for reduction in ("none", "sum", "mean"):
            # The mean of one weighted element does not depend on its weight: a difference of equal numbers.
            scale = 30.0 if elements == 1 else 0.0
            check(MSE_LOSS, call.with_options(reduction=reduction), what=f"{elements}, {reduction}", scale=scale)


@each_dtype(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("elements", [4095, 4097, 32767, 65536, 65537, 131073, 300007])
def test_arrays_of_many_chunks(dtype, elements, threads, device):
    threads(2)
    m = Maker(dtype, device)
    call = difference(m.normal(elements), m.normal(elements), m.positive(elements))
    for reduction in ("none", "mean"):
        check(MSE_LOSS, call.with_options(reduction=reduction), what=reduction)


# ---- nothing at all --------------------------------------------------------------------------------------------------


@each_reduction
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0), (2, 3, 0, 4), (0, 3, 0), (0, 0)], ids=str)
def test_no_pixels(shape, reduction, device):
    m = Maker(torch.float32, device)
    pixels = shape[:1] + shape[2:]
    labels = torch.zeros(pixels, dtype=torch.int64, device=device)
    for call in (
        indices(m.normal(*shape), labels, reduction=reduction),
        indices(m.normal(*shape), labels, m.positive(shape[1]), reduction=reduction, label_smoothing=0.1),
        probabilities(m.normal(*shape), m.normal(*shape), reduction=reduction),
    ):
        value, _ = check(CROSS_ENTROPY, call)
        if reduction == "mean":
            assert value.isnan()
        # A slice of something, and a tensor in another order: their strides are not those of an empty contiguous one.
        for layout in (
            lambda tensor: torch.cat([tensor, tensor], -1)[..., : tensor.shape[-1]],
            lambda tensor: (
                tensor.permute(*reversed(range(tensor.dim()))).contiguous().permute(*reversed(range(tensor.dim())))
            ),
        ):
            check(CROSS_ENTROPY, call.map(layout, ["input"]))


@each_reduction
def test_no_classes(reduction, device):
    m = Maker(torch.float32, device)
    value, _ = check(CROSS_ENTROPY, probabilities(m.normal(4, 0), m.normal(4, 0), reduction=reduction))
    assert value.isnan().all() == (reduction == "mean")
    with pytest.raises(IndexError, match="target"):
        fusedloss.cross_entropy(m.normal(4, 0), m.labels(1, 4), reduction=reduction)


@each_reduction
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0, 4)], ids=str)
def test_no_elements(shape, reduction, device):
    m = Maker(torch.float32, device)
    for weight in (None, m.positive(*shape)):
        value, _ = check(
            MSE_LOSS, difference(m.normal(*shape), m.normal(*shape), weight).with_options(reduction=reduction)
        )
        if reduction == "mean":
            assert value.isnan()


@each_reduction
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_all_pixels_ignored(reduction, smoothing, device):
    """NaN for the mean, 0 for the others; the gradient is 0 for all three, as in PyTorch."""
    m = Maker(torch.float32, device)
    labels = torch.full((2, 4), -100, device=device)
    call = indices(m.normal(2, 3, 4), labels, m.positive(3), reduction=reduction, label_smoothing=smoothing)
    value, gradients = check(CROSS_ENTROPY, call, with_torch=False)
    their_value = call.run(CROSS_ENTROPY.torch)
    assert torch.equal(value.isnan(), their_value.isnan())
    assert gradients["input"].count_nonzero() == 0


# ---- losses on probabilities -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["planes", "rows", "channels_last"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
@each_dtype(torch.float64, torch.float32, torch.bfloat16)
def test_pixel_counts_of_all_terms(dtype, activation, layout, device):
    for pixels in PIXELS:
        m = Maker(dtype, device, seed=pixels)
        input = logits(m, layout, 2, 3, pixels)
        input = input.sigmoid() if activation == "none" else input
        shape = pixels_of(input)
        options = {"activation": activation, "brier": 0.5, "cross_entropy": 0.0 if activation == "none" else 1.0}
        hard = on_pixels(input, m.labels(3, *shape, ignored=-100), pixel_weight=m.positive(*shape), **options)
        check(SEGMENTATION_LOSS, hard, with_torch=False, what=f"{pixels} pixels")
        soft = on_pixels(input, m.probabilities(*input.shape), per_image=True, **options)
        check(SEGMENTATION_LOSS, soft, with_torch=False, what=f"{pixels} pixels, soft labels")


@pytest.mark.parametrize("layout", ["planes", "rows", "channels_last"])
@pytest.mark.parametrize("classes", [*CLASSES[1:], 193, 5000])
@each_dtype(torch.float64, torch.float32, torch.float16)
def test_class_counts_of_all_terms(dtype, classes, layout, device):
    for pixels in FEW_PIXELS if classes < 1000 else (1, 5, 33):
        m = Maker(dtype, device, seed=pixels)
        input = logits(m, layout, 2, classes, pixels)
        call = on_pixels(input, m.labels(classes, *pixels_of(input)), m.positive(classes), brier=0.5, absent="count")
        check(SEGMENTATION_LOSS, call, with_torch=False, what=f"{pixels} pixels")


@pytest.mark.parametrize("classes", [2, 21, 150])
def test_overlap_of_images_of_many_chunks(classes, threads, device):
    """More chunks than one, so tables are added up; per image and over the batch."""
    threads(2)
    m = Maker(torch.float32, device)
    side = 300 if classes < 100 else 120
    input, labels = m.normal(2, classes, side, side), m.labels(classes, 2, side, side)
    for per_image in (False, True):
        check(OVERLAP_STATISTICS, on_pixels(input, labels, per_image=per_image), with_torch=False)


def off_the_kink(labels, p):
    """The labels, but those halved that ``p`` (float64) meets to within the error that a kernel's p may have.

    min(p, y) has no derivative at p = y. So close to it, one rounding of p decides which of the two one-sided ones
    comes out, and each device and instruction-set level has roundings of its own. Moved, nothing is left uncompared.
    """
    error = COMPUTE_ROUNDINGS * torch.finfo(compute_dtype(labels.dtype)).eps * p
    meets = (p - labels.double()).abs() <= error
    assert meets.sum() <= labels.numel() // 100_000, "so many do not meet by chance"
    return torch.where(meets, labels / 2, labels)


@pytest.mark.parametrize("activation", ["sigmoid", "none"])
@pytest.mark.parametrize("classes", [1, 3])
@each_dtype(torch.float32, torch.bfloat16)
def test_probabilities_of_many_chunks(dtype, classes, activation, threads, device):
    """Classes by themselves with soft labels have wider blocks; more than one of them, and a tail that is no vector."""
    threads(2)
    m = Maker(dtype, device)
    input, labels = m.normal(2, classes, 301, 173), m.probabilities(2, 3, 301, 173)[:, :classes].contiguous()
    if activation == "sigmoid":  # else p is the input itself, and where it is a label, a tie that every kernel sees
        labels = off_the_kink(labels, input.double().sigmoid())
    for per_image in (False, True):
        for intersection in ("min", "product"):
            call = on_pixels(input, labels, activation=activation, per_image=per_image, intersection=intersection)
            check(OVERLAP_STATISTICS, call, with_torch=False, what=f"per_image={per_image}, {intersection}")
