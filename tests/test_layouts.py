"""Every way a tensor can lie in memory gives the same numbers, and the gradient lies as its tensor does."""

import itertools

import pytest
import torch

from .compare import check, evaluate, random_like
from .registry import (
    CROSS_ENTROPY,
    MSE_LOSS,
    SEGMENTATION_LOSS,
    SOFT_IOU_LOSS,
    Maker,
    difference,
    each_case,
    each_dtype,
    each_reduction,
    indices,
    probabilities,
)
from .tolerance import assert_no_worse

# ---- layouts: tensor -> the same numbers at other strides ------------------------------------------------------------


def sliced(tensor):
    """Every second element of the last dimension of something larger; what lies between is poison."""
    if tensor.dim() == 0:
        return offset(tensor)
    wide = poison(tensor, (*tensor.shape[:-1], 2 * tensor.shape[-1] + 3))
    wide[..., 1 : 2 * tensor.shape[-1] + 1 : 2] = tensor
    return wide[..., 1 : 2 * tensor.shape[-1] + 1 : 2]


def cropped(tensor):
    """A block out of the middle of something larger in every dimension."""
    wide = poison(tensor, tuple(size + 3 for size in tensor.shape))
    block = wide[tuple(slice(1, size + 1) for size in tensor.shape)]
    block.copy_(tensor)
    return block


def transposed(tensor):
    """The last two dimensions change places in memory."""
    return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor


def reversed_in_memory(tensor):
    """All dimensions in the opposite order in memory."""
    order = tuple(range(tensor.dim()))[::-1]
    return tensor.permute(order).contiguous().permute(order)


def channels_last(tensor):
    """Dimension 1 innermost in memory, for any number of dimensions."""
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1) if tensor.dim() > 1 else tensor


def classes_outermost(tensor):
    """As an einsum may leave it: (C, N, ...) in memory."""
    return tensor.transpose(0, 1).contiguous().transpose(0, 1) if tensor.dim() > 1 else tensor


def samples_innermost(tensor):
    return tensor.movedim(0, -1).contiguous().movedim(-1, 0) if tensor.dim() > 1 else tensor


def offset(tensor):
    """Starts one element into its storage: where the size of an element allows no better alignment."""
    storage = poison(tensor, (tensor.numel() + 1,))
    shifted = storage[1:].view(tensor.shape)
    shifted.copy_(tensor)
    return shifted


def offset_channels_last(tensor):
    return offset(tensor.movedim(1, -1)).movedim(-1, 1) if tensor.dim() > 1 else offset(tensor)


def cropped_channels_last(tensor):
    return cropped(tensor.movedim(1, -1)).movedim(-1, 1) if tensor.dim() > 1 else cropped(tensor)


def poison(tensor, shape):
    if tensor.dtype == torch.bool:
        return torch.ones(shape, dtype=tensor.dtype, device=tensor.device)
    filler = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    return torch.full(shape, filler, dtype=tensor.dtype, device=tensor.device)


LAYOUTS = (
    sliced,
    cropped,
    transposed,
    reversed_in_memory,
    channels_last,
    classes_outermost,
    samples_innermost,
    offset,
    offset_channels_last,
    cropped_channels_last,
)
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)


def check_in_layout(case_loss, call, names, layout, what=""):
    """The call with the tensors called ``names`` laid out anew gives the same value and gradients."""
    changed = call.map(layout, names)
    for name in names:
        assert torch.equal(changed.tensors[name], call.tensors[name])
    wrt = call.differentiable
    leaves = {name: tensor.detach().requires_grad_(name in wrt) for name, tensor in changed.tensors.items()}
    value = call.with_tensors(**leaves).run(case_loss.function)
    grad_output = random_like(value)
    gradients = torch.autograd.grad(value, [leaves[name] for name in wrt], grad_output)
    expected_value, expected = evaluate(case_loss.reference, call.to(torch.float64), wrt, grad_output)
    assert_no_worse(value, None, expected_value, f"{what} value")
    for name, gradient in zip(wrt, gradients, strict=True):
        assert_no_worse(gradient, None, expected[name], f"{what} gradient of {name}")
    return dict(zip(wrt, gradients, strict=True))


@each_layout
@each_reduction
@each_case
def test_one_tensor_at_a_time(case, reduction, layout, device):
    call = case.make(torch.float32, device, reduction)
    for name in call.tensors:
        check_in_layout(case.loss, call, [name], layout, name)


@each_layout
@each_reduction
@each_case
def test_all_tensors_at_once(case, reduction, layout, device):
    call = case.make(torch.bfloat16, device, reduction)
    check_in_layout(case.loss, call, list(call.tensors), layout)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("start", range(1, 9))
def test_misaligned_starts(dtype, start, device):
    """Vectors are loaded where the data begins, which need not be where a vector would like it to."""

    def shifted(tensor):
        storage = poison(tensor, (tensor.numel() + start,))
        storage[start:] = tensor.reshape(-1)
        return storage[start:].view(tensor.shape)

    for samples, classes, pixels in ((2, 3, 67), (1, 21, 16), (67, 5, 1)):
        m = Maker(dtype, device)
        for labels in (torch.int64, torch.uint8):
            call = indices(
                m.normal(samples, classes, pixels),
                m.labels(classes, samples, pixels, dtype=labels),
                m.positive(classes),
            )
            check_in_layout(CROSS_ENTROPY, call.with_options(reduction="none"), list(call.tensors), shifted)
        shape = (samples, classes, pixels)
        call = probabilities(m.normal(*shape), m.probabilities(*shape))
        check_in_layout(CROSS_ENTROPY, call.with_options(reduction="none"), list(call.tensors), shifted)
        call = difference(m.normal(*shape), m.normal(*shape), m.positive(*shape))
        check_in_layout(MSE_LOSS, call.with_options(reduction="none"), list(call.tensors), shifted)


# ---- memory formats --------------------------------------------------------------------------------------------------

FORMATS = [
    pytest.param(torch.contiguous_format, (2, 5, 3, 4), id="contiguous"),
    pytest.param(torch.channels_last, (2, 5, 3, 4), id="channels_last"),
    pytest.param(torch.channels_last, (1, 5, 3, 4), id="channels_last, one image"),
    pytest.param(torch.channels_last, (3, 2, 16, 17), id="channels_last, two classes"),
    pytest.param(torch.contiguous_format, (2, 5, 3, 2, 2), id="volume"),
    pytest.param(torch.channels_last_3d, (2, 5, 3, 2, 2), id="channels_last_3d"),
]


@pytest.mark.parametrize(("memory_format", "shape"), FORMATS)
@each_reduction
def test_gradient_has_the_memory_format_of_its_tensor(memory_format, shape, reduction, device):
    m = Maker(torch.float32, device)
    input = m.normal(*shape).contiguous(memory_format=memory_format)
    other = m.normal(*shape).contiguous(memory_format=memory_format)
    labels = m.labels(shape[1], shape[0], *shape[2:])
    for loss, call in (
        (CROSS_ENTROPY, indices(input, labels, m.positive(shape[1]))),
        (CROSS_ENTROPY, probabilities(input, other)),
        (MSE_LOSS, difference(input, other)),
        (MSE_LOSS, difference(input, other, m.positive(*shape).contiguous(memory_format=memory_format))),
    ):
        call = call.with_options(reduction=reduction)
        _, gradients = check(loss, call)
        for name, gradient in gradients.items():
            assert gradient.stride() == call.tensors[name].stride(), name


@each_reduction
def test_two_formats_in_one_call(reduction, device):
    """Each gradient lies as its own tensor does, not as the other."""
    m = Maker(torch.float32, device)
    planes, rows = m.normal(2, 5, 3, 4), m.normal(2, 5, 3, 4).contiguous(memory_format=torch.channels_last)
    for input, target in ((planes, rows), (rows, planes)):
        for loss, call in ((CROSS_ENTROPY, probabilities(input, target)), (MSE_LOSS, difference(input, target))):
            call = call.with_options(reduction=reduction)
            _, gradients = check(loss, call)
            assert gradients["input"].stride() == input.stride()
            if loss is MSE_LOSS:
                assert gradients["target"].stride() == target.stride()


@pytest.mark.parametrize("transform", ["transpose", "crop"])
def test_rows_in_any_order(transform, device):
    """(N, C) is read along C or along N."""
    m = Maker(torch.float32, device)
    input = m.normal(9, 40).T if transform == "transpose" else m.normal(60, 17)[3:43, 2:11]
    assert input.shape == (40, 9)
    call = indices(input, m.labels(9, 40, ignored=-100), m.positive(9), label_smoothing=0.1)
    _, gradients = check(CROSS_ENTROPY, call)
    if transform == "transpose":
        assert gradients["input"].stride() == input.stride()


# ---- tensors that share memory with themselves, or are not what their memory says ------------------------------------


@each_reduction
def test_expanded(reduction, device):
    """One row of memory for many rows of the tensor: stride 0."""
    m = Maker(torch.float32, device)
    shape = (4, 5, 3, 6)
    one = {d: m.normal(*(1 if k == d else n for k, n in enumerate(shape))).expand(shape) for d in range(4)}
    labels = m.labels(5, 1, 3, 1).expand(4, 3, 6)
    weight = m.positive(1).expand(5)
    for d, input in one.items():
        check(CROSS_ENTROPY, indices(input, labels, weight, reduction=reduction), what=f"dimension {d}")
        check(CROSS_ENTROPY, probabilities(input, one[3 - d], weight, reduction=reduction), what=f"dimension {d}")
        call = difference(input, one[3 - d], one[d]).with_options(reduction=reduction)
        check(MSE_LOSS, call, what=f"dimension {d}")


@each_reduction
@each_case
def test_negative_bit(case, reduction, device):
    """The imaginary part of a conjugate is a view that says "minus what lies here"."""

    def lazily_negative(tensor):
        if not tensor.is_floating_point():
            return tensor
        lazy = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
        assert lazy.is_neg()
        return lazy

    call = case.make(torch.float32, device, reduction)
    wrt = call.differentiable
    value, gradients = evaluate(case.loss.function, call, wrt)
    lazy = call.map(lazily_negative)
    leaves = lazy.map(lambda tensor: tensor.detach().requires_grad_(), wrt)
    lazy_value = leaves.run(case.loss.function)
    torch.testing.assert_close(lazy_value, value)
    lazy_gradients = torch.autograd.grad(lazy_value, [leaves.tensors[name] for name in wrt], random_like(value))
    for name, gradient in zip(wrt, lazy_gradients, strict=True):
        torch.testing.assert_close(gradient, gradients[name])


def test_one_tensor_as_both(device):
    """input and target are the same tensor: both its gradients add up."""
    m = Maker(torch.float64, device)
    for loss, x in ((CROSS_ENTROPY, m.probabilities(3, 4)), (MSE_LOSS, m.normal(3, 4))):
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        loss.function(ours, ours, reduction="sum").backward()
        loss.torch(theirs, theirs, reduction="sum").backward()
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_poisoned_neighbour_is_seen():
    """The layouts do put poison beside the numbers: read one element too many and the result is NaN."""
    x = torch.randn(3, 4)
    for layout in (sliced, cropped, offset):
        view = layout(x)
        storage = torch.as_strided(view, (view.untyped_storage().nbytes() // 4,), (1,), 0)
        assert storage.isnan().any()
        assert torch.equal(view, x)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_probabilities_beside_logits_of_another_layout(layout, device):
    """As one_hot(...).movedim(-1, 1) gives them, beside logits from any network."""
    for shape in ((2, 5, 3, 4), (3, 4), (1, 5, 7), (4, 1, 6)):
        m = Maker(torch.float32, device)
        call = probabilities(layout(m.normal(*shape)), channels_last(m.probabilities(*shape)), reduction="sum")
        check(CROSS_ENTROPY, call)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous logits", "channels_last logits"])
@pytest.mark.parametrize("classes", [1, 2, 3, 4, 7, 8, 9, 21, 40, 200])
def test_soft_labels_in_the_other_order(classes, last, dtype, device):
    """Class-innermost labels beside contiguous logits and the other way round, with blocks that end in whole vectors
    and in parts of one, alone and as views of something larger."""
    m = Maker(dtype, device)
    for columns, other in ((128, channels_last), (149, channels_last), (149, cropped_channels_last)):
        shape = (2, classes, 2, columns)
        input, target = m.normal(*shape), m.probabilities(*shape)
        if last:
            other = {channels_last: lambda t: t, cropped_channels_last: lambda t: torch.cat([t, t], 2)[:, :, 2:]}[other]
            input, target = channels_last(input), other(target)
        else:
            target = other(target)
        for loss, call in (
            (CROSS_ENTROPY, probabilities(input, target, m.positive(classes), label_smoothing=0.1)),
            (SEGMENTATION_LOSS, probabilities(input, target, brier=1.0, per_image=True)),
            (SOFT_IOU_LOSS, probabilities(input, target, activation="sigmoid", per_image=True)),
            (SOFT_IOU_LOSS, indices(input, target > 0.2, activation="sigmoid")),
        ):
            if classes == 1 and loss is SEGMENTATION_LOSS:
                call = call.with_options(activation="sigmoid")
            # Of cross-entropy's one class the gradient is the difference of two numbers alike.
            scale = 1.0 if classes == 1 and loss is CROSS_ENTROPY else 0.0
            check(loss, call, what=f"{loss.name}, {columns} columns", scale=scale)
            # The gradient lies as the logits do, whatever the labels.
            _, gradients = evaluate(loss.function, call, ["input"])
            assert gradients["input"].stride() == input.stride()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("classes", [2, 3, 21, 150, 257, 300])
def test_large_gradients(classes, last, dtype, device):
    """From 4 MiB on they are written past the caches, rows of classes while the next block is computed: the numbers
    are those of a quarter of the batch by itself. Samples that end in whole blocks, in parts of one and of a vector,
    or that have no whole one; classes whose blocks are eight vectors wide, seven or six."""
    m = Maker(dtype, device)
    numbers = (4 << 20) // dtype.itemsize
    for pixels in (1 << 12, 4093, 40):
        quarter = -(-numbers // (4 * classes * pixels))
        shape = (4 * quarter, classes, 1, pixels)
        input = channels_last(m.normal(*shape)) if last else m.normal(*shape)
        labels, soft = m.labels(classes, 4 * quarter, 1, pixels), m.probabilities(*shape)
        for target, loss in itertools.product((labels, soft), (CROSS_ENTROPY, SEGMENTATION_LOSS)):
            # The sum over the pixels; of a loss that is a mean over images and pixels, it times their number.
            of_images = {"brier": 1.0, "per_image": True, "absent": "count"}
            call = indices(input, target, **({"reduction": "sum"} if loss is CROSS_ENTROPY else of_images))

            def gradient_of(call, samples, loss=loss, pixels=pixels):
                factor = 1.0 if loss is CROSS_ENTROPY else float(samples * pixels)
                return evaluate(loss.function, call, ["input"], torch.tensor(factor, device=device))[1]["input"]

            gradient = gradient_of(call, 4 * quarter)
            assert gradient.nbytes >= 4 << 20
            close = 8 * torch.finfo(dtype).eps
            for start in range(0, 4 * quarter, quarter):
                part = call.map(lambda tensor, start=start, end=start + quarter: tensor[start:end])
                small = gradient_of(part, quarter)
                torch.testing.assert_close(gradient[start : start + quarter], small, rtol=close, atol=close)


@each_dtype
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("classes", [257, 8193, 50257])
def test_large_gradients_of_rows(classes, smoothing, dtype, device):
    """Rows that begin anywhere in a vector, of which long ones are written past the caches; ignored ones, and one whose
    gradient is NaN, in the midst of others."""
    m = Maker(dtype, device)
    rows = (4 << 20) // (classes * dtype.itemsize) + 3
    input, target = m.normal(rows, classes), m.labels(classes, rows, ignored=-100)
    input[rows // 2, classes // 3] = torch.nan
    target[rows // 2] = classes // 2
    input[0, 5] = torch.nan
    target[0] = -100
    call = indices(input, target, m.positive(classes), reduction="none", label_smoothing=smoothing)
    _, gradients = check(CROSS_ENTROPY, call, wrt=["input"], with_torch=False)
    assert gradients["input"].nbytes >= 4 << 20
    assert gradients["input"][rows // 2].isnan().all()
    assert (gradients["input"][0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "classes"), [(3, 300), (70, 50257)])
def test_half_gradients_of_rows_are_the_nearest(rows, classes, dtype, device):
    """To the gradient of the same logits in float32, which is off by far less than half a unit."""
    m = Maker(dtype, device)
    input, target = m.normal(rows, classes), m.labels(classes, rows)
    one = torch.tensor(1.0, device=device)

    def gradient_of(input):
        return evaluate(CROSS_ENTROPY.function, indices(input, target), ["input"], one)[1]["input"]

    half, single = gradient_of(input), gradient_of(input.float())
    unit = torch.finfo(dtype).eps * single.abs() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert ((half.float() - single).abs() <= 0.501 * unit).all()


@each_reduction
def test_many_dimensions_in_two_orders(reduction, device):
    """More than the kernel counts, none of which can be merged."""
    m = Maker(torch.float32, device)
    shape = (2,) * 10
    input = m.normal(*shape).permute(3, 1, 0, 2, 4, 6, 5, 9, 8, 7)
    target = m.normal(*shape).permute(9, 1, 0, 4, 2, 6, 8, 7, 5, 3)
    check(MSE_LOSS, difference(input, target).with_options(reduction=reduction))
