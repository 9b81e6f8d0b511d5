"""Every mix of dtypes gives PyTorch's result dtype, and numbers that are no worse than PyTorch's in that dtype."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import fusedloss

from .compare import check, evaluate
from .registry import (
    CROSS_ENTROPY,
    DTYPES,
    MSE_LOSS,
    Maker,
    difference,
    each_case,
    each_dtype,
    each_reduction,
    indices,
    probabilities,
)
from .tolerance import assert_no_worse

TWO_DTYPES = list(itertools.product(DTYPES, DTYPES))
LABEL_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)
HALF = [pytest.param(d, id=str(d).removeprefix("torch.")) for d in (torch.float16, torch.bfloat16)]


# ---- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label_dtype", LABEL_DTYPES, ids=str)
@each_dtype
@each_reduction
def test_label_dtypes(dtype, label_dtype, reduction, device):
    m = Maker(dtype, device)
    for shape in ((7, 4), (2, 4, 9), (2, 4, 3, 5)):
        labels = m.labels(4, shape[0], *shape[2:], dtype=label_dtype, ignored=3)
        call = indices(m.normal(*shape), labels, m.positive(4), ignore_index=3, label_smoothing=0.1)
        check(CROSS_ENTROPY, call.with_options(reduction=reduction))


@pytest.mark.parametrize(
    ("label_dtype", "label", "ignore_index"),
    [
        (torch.uint8, 156, -100),  # -100 as a uint8
        (torch.uint8, 255, -1),
        (torch.uint8, 0, 256),
        (torch.int16, -100, 65436),
        (torch.int32, 0, 2**32),
        (torch.int64, 5, 2**32 + 5),
    ],
    ids=str,
)
def test_ignore_index_is_compared_after_widening(label_dtype, label, ignore_index, device):
    """The label looks like ignore_index in its own dtype, but is not it: used where it is a class, else refused."""
    logits = Maker(torch.float32, device).normal(3, 200)
    labels = torch.tensor([0, label, 1], dtype=label_dtype, device=device)
    if 0 <= label < 200:
        call = indices(logits, labels, ignore_index=ignore_index, reduction="none")
        value, _ = check(CROSS_ENTROPY, call)
        assert value[1] != 0
    else:
        with pytest.raises(IndexError, match=str(label)):
            fusedloss.cross_entropy(logits, labels, ignore_index=ignore_index)


def test_all_labels_of_a_byte(device):
    """256 classes and uint8 labels: 255 is a class like any other unless it is ignored."""
    m = Maker(torch.float32, device)
    labels = torch.arange(256, dtype=torch.uint8, device=device)
    value, _ = check(CROSS_ENTROPY, indices(m.normal(256, 256), labels, reduction="none"))
    assert value[255] != 0
    value, _ = check(CROSS_ENTROPY, indices(m.normal(256, 256), labels, ignore_index=255, reduction="none"))
    assert value[255] == 0


# ---- mixes -----------------------------------------------------------------------------------------------------------


@each_reduction
@pytest.mark.parametrize(("of_input", "of_target"), TWO_DTYPES, ids=str)
def test_probabilities_of_another_dtype(of_input, of_target, reduction, device):
    m = Maker(torch.float64, device)
    for shape in ((5, 4), (2, 4, 9)):
        call = probabilities(m.normal(*shape).to(of_input), m.probabilities(*shape).to(of_target))
        call = call.with_options(reduction=reduction, label_smoothing=0.1)
        value, _ = check(CROSS_ENTROPY, call)
        assert value.dtype == torch.promote_types(of_input, of_target)


@pytest.mark.parametrize(("of_input", "of_weight"), TWO_DTYPES, ids=str)
def test_class_weight_of_another_dtype(of_input, of_weight, device):
    """With labels the result has the input's dtype (PyTorch refuses the mix); with probabilities all dtypes promote."""
    m = Maker(torch.float64, device)
    weight = m.positive(4).to(of_weight)
    call = indices(m.normal(2, 4, 9).to(of_input), m.labels(4, 2, 9), weight, label_smoothing=0.1)
    # PyTorch is not asked: it would have to be given a rounded weight.
    value, _ = check(CROSS_ENTROPY, call, with_torch=False)
    assert value.dtype == of_input
    input, target = m.normal(2, 4, 9).to(of_input), m.probabilities(2, 4, 9).to(of_input)
    value, _ = check(CROSS_ENTROPY, probabilities(input, target, weight), wrt=("input", "target"))
    assert value.dtype == torch.promote_types(of_input, of_weight)


@each_reduction
@pytest.mark.parametrize(("of_input", "of_target"), TWO_DTYPES, ids=str)
def test_squared_error_of_two_dtypes(of_input, of_target, reduction, device):
    m = Maker(torch.float64, device)
    for target_shape in ((3, 17), (17,)):
        call = difference(m.normal(3, 17).to(of_input), m.normal(*target_shape).to(of_target))
        value, _ = check(MSE_LOSS, call.with_options(reduction=reduction))
        assert value.dtype == torch.promote_types(of_input, of_target)


@each_reduction
@pytest.mark.parametrize(("of_input", "of_weight"), TWO_DTYPES, ids=str)
def test_squared_error_with_a_weight_of_another_dtype(of_input, of_weight, reduction, device):
    m = Maker(torch.float64, device)
    call = difference(m.normal(3, 17).to(of_input), m.normal(3, 17).to(of_input), m.positive(3, 17).to(of_weight))
    value, _ = check(MSE_LOSS, call.with_options(reduction=reduction))
    assert value.dtype == torch.promote_types(of_input, of_weight)


@each_reduction
@each_dtype
@pytest.mark.parametrize("integer", [torch.int64, torch.int32, torch.uint8, torch.bool], ids=str)
def test_squared_error_from_integers(dtype, integer, reduction, device):
    """A target of class numbers or a mask, as PyTorch takes it."""
    m = Maker(dtype, device)
    target = m.labels(2, 3, 17).to(integer)
    call = difference(m.normal(3, 17), target).with_options(reduction=reduction)
    value, _ = check(MSE_LOSS, call, wrt=("input",))
    assert value.dtype == dtype


@pytest.mark.parametrize("integer", [torch.int64, torch.uint8, torch.bool], ids=str)
def test_autocast_of_an_integer_input(integer, device):
    input = torch.ones(3, 17, device=device).to(integer)
    target = Maker(torch.bfloat16, device).normal(3, 17)
    with torch.autocast(device, dtype=torch.bfloat16):
        value = MSE_LOSS.function(input, target)
        assert value.dtype == MSE_LOSS.reference(input, target).dtype == torch.float32


def test_weights_of_many_are_summed_in_the_result_dtype(device):
    """The divisor of a broadcast weighted mean: 1e-9 beside 1 is lost in float32 only."""
    weight = torch.full((1000, 1), 1e-9, dtype=torch.float32, device=device)
    weight[0] = 1.0
    call = difference(
        torch.zeros(1000, 1, device=device), torch.ones(1000, 2, dtype=torch.float64, device=device), weight
    )
    check(MSE_LOSS, call, wrt=())


# ---- autocast --------------------------------------------------------------------------------------------------------


@each_reduction
@each_dtype
@each_case
def test_autocast(case, reduction, dtype, device):
    """Half inputs give a float32 result, which is not rounded to half on the way; others are as without autocast."""
    call = case.make(dtype, device, reduction)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        value, gradients = evaluate(case.loss.function, call, call.differentiable)
        assert call.run(case.loss.reference).dtype == value.dtype
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    true_value, true_gradients = evaluate(case.loss.reference, call.to(torch.float64), call.differentiable)
    assert_no_worse(value, None, true_value)
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        # The incoming gradient is drawn in the result's dtype, so only a rough comparison is fair.
        torch.testing.assert_close(gradient.double(), true_gradients[name], rtol=3e-2, atol=1e-2)


# ---- numbers at the edge ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF)
def test_a_half_image_of_equal_logits(dtype, device):
    """300 x 300 pixels, two classes, logits 0: log 2. Summed in float16, the count of the pixels is infinite."""
    logits = torch.zeros(1, 2, 300, 300, dtype=dtype, device=device, requires_grad=True)
    labels = torch.zeros(1, 300, 300, dtype=torch.int64, device=device)
    value = fusedloss.cross_entropy(logits, labels)
    assert value.item() == pytest.approx(math.log(2), rel=torch.finfo(dtype).eps)
    value.backward()
    expected = torch.tensor(-0.5 / 90000, dtype=torch.float64).to(dtype)
    assert torch.equal(logits.grad[:, 0], expected.expand(1, 300, 300).to(device))


@pytest.mark.parametrize("dtype", HALF)
def test_half_means_of_many(dtype, device):
    m = Maker(dtype, device)
    check(MSE_LOSS, difference(m.normal(200000), m.normal(200000)))
    check(MSE_LOSS, difference(m.normal(200000), m.normal(200000), m.positive(200000)))
    check(CROSS_ENTROPY, indices(m.normal(70000, 3), m.labels(3, 70000), m.positive(3)))


@pytest.mark.parametrize("dtype", HALF)
def test_half_squares_may_be_larger_than_half_numbers(dtype, device):
    """(300 - 0)^2 is infinite in float16; the weighted mean of it with weights of 1e-3 is not."""
    x = torch.full((1000,), 300.0, dtype=dtype, device=device)
    weight = torch.full((1000,), 1e-3, dtype=dtype, device=device)
    value = fusedloss.mse_loss(x, torch.zeros_like(x), weight=weight, reduction="none")
    assert value[0].item() == pytest.approx(90.0, rel=2e-2)
    call = difference(x, torch.zeros_like(x))
    value, _ = evaluate(MSE_LOSS.function, call, ())
    assert value.item() == (math.inf if dtype == torch.float16 else pytest.approx(90000, rel=1e-2))


def test_float32_means_of_many(device):
    """A million equal terms: a running sum in float32 would be off in the third digit."""
    x = torch.full((1_000_000,), 0.1, device=device)
    call = difference(x, torch.zeros_like(x))
    check(MSE_LOSS, call, with_torch=False)
    check(MSE_LOSS, call.with_options(reduction="sum"), with_torch=False)
    logits = torch.zeros(300_000, 3, device=device)
    call = indices(logits, torch.ones(300_000, dtype=torch.int64, device=device))
    check(CROSS_ENTROPY, call, with_torch=False)


@each_dtype
@each_reduction
@pytest.mark.parametrize("shift", [0.0, 1.0, -1.0, 50.0], ids=["none", "up", "down", "a bit"])
@pytest.mark.parametrize("layout", ["planes", "rows"])
def test_large_logits(dtype, reduction, shift, layout, device):
    """The largest logit is taken off before the exponential, so a constant far away from 0 changes nothing."""
    m = Maker(dtype, device)
    far = shift if shift == 50.0 else shift * (3e4 if dtype == torch.float16 else 1e5)
    logits = (m.normal(2, 7, 33).double() * 4 + far).to(dtype)
    if layout == "rows":
        logits = logits.movedim(1, 2).reshape(66, 7)
    labels = m.labels(7, *logits.shape[:1], *logits.shape[2:])
    check(CROSS_ENTROPY, indices(logits, labels, reduction=reduction))


@each_dtype
@pytest.mark.parametrize("layout", ["planes", "rows"])
def test_logits_far_apart(dtype, layout, device):
    """Probabilities of 0 and 1, losses of 0 and thousands; exponentials that underflow, none that overflows."""
    m = Maker(dtype, device)
    spread = 1e4 if dtype == torch.float16 else 1e6
    logits = m.normal(2, 5, 33) * torch.tensor([0.0, 1.0, 30.0, 100.0, spread], dtype=dtype, device=device)[:, None]
    if layout == "rows":
        logits = logits.movedim(1, 2).reshape(66, 5)
    labels = m.labels(5, *logits.shape[:1], *logits.shape[2:])
    check(CROSS_ENTROPY, indices(logits, labels, reduction="none"))
    check(CROSS_ENTROPY, indices(logits, labels, label_smoothing=0.1, reduction="none"))


@each_dtype
def test_exponential_everywhere(dtype, device):
    """Two classes, one logit 0, the other everything from -110 to 110: the whole range of the exponential."""
    other = torch.linspace(-110, 110, 4001, dtype=torch.float64).to(dtype)
    logits = torch.stack([torch.zeros_like(other), other], 1).to(device)
    for label in (0, 1):
        labels = torch.full((4001,), label, device=device)
        value, gradients = check(CROSS_ENTROPY, indices(logits, labels, reduction="none"))
        assert (value >= 0).all()
        assert (gradients["input"].abs() <= gradients["input"].abs().max()).all()


# ---- NaN and infinity ------------------------------------------------------------------------------------------------

SPECIAL = {
    "nan": [0.0, math.nan, 1.0, 2.0],
    "plus infinity": [0.0, math.inf, 1.0, 2.0],
    "minus infinity": [0.0, -math.inf, 1.0, 2.0],
    "both": [math.inf, -math.inf, 1.0, 2.0],
    "all minus infinity": [-math.inf] * 4,
    "all but one": [-math.inf, -math.inf, 1.0, -math.inf],
}


@each_dtype
@pytest.mark.parametrize("layout", ["planes", "rows"])
@pytest.mark.parametrize("special", SPECIAL.values(), ids=SPECIAL.keys())
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_special_logits_go_through_as_in_torch(dtype, layout, special, smoothing, device):
    """In the pixel that has them, and in no other."""
    m = Maker(dtype, device)
    logits = m.normal(2, 4, 35)
    for label in range(4):
        logits[1, :, 20 + label] = torch.tensor(special, dtype=dtype, device=device)
    labels = m.labels(4, 2, 35)
    labels[1, 20:24] = torch.arange(4, device=device)
    if layout == "rows":
        logits, labels = logits.movedim(1, 2).reshape(70, 4), labels.reshape(70)
    value, _ = check(CROSS_ENTROPY, indices(logits, labels, label_smoothing=smoothing, reduction="none"))
    assert value.reshape(2, 35)[0].isfinite().all()
    value, _ = evaluate(CROSS_ENTROPY.function, indices(logits, labels, label_smoothing=smoothing), ())
    their_value, _ = evaluate(CROSS_ENTROPY.torch, indices(logits, labels, label_smoothing=smoothing), ())
    assert str(value.item())[:3] == str(their_value.item())[:3]


@pytest.mark.parametrize("classes", [4, 300])
@pytest.mark.parametrize(
    ("dtype", "bits", "quiet_nan"),
    [(torch.float32, torch.int32, 0x7FC00000), (torch.float64, torch.int64, 0x7FF8000000000000)],
    ids=["float32", "float64"],
)
def test_every_nan_is_one(dtype, bits, quiet_nan, classes, device):
    """Whatever its low bits say, which arithmetic on the bits of an exponent could take for a number."""
    payload = torch.arange(1024, dtype=bits) * 3 + quiet_nan
    logits = torch.zeros(1024, classes, dtype=dtype)
    logits[:, 1] = payload.view(dtype)
    labels = torch.zeros(1024, dtype=torch.int64, device=device)
    value, gradients = evaluate(CROSS_ENTROPY.function, indices(logits.to(device), labels, reduction="none"), ["input"])
    assert value.isnan().all()
    assert gradients["input"].isnan().all()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1], ids=["positive", "negative"])
@pytest.mark.parametrize("source", ["incoming gradient", "weight", "pixel_weight"])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "sigmoid of probabilities"])
def test_a_nan_stays_one_in_two_bytes(dtype, bits, source, kind, device):
    """Also with all of its bits set, as a GPU makes it, to which a rounding by addition would give another sign."""
    nan = torch.tensor(bits, dtype=torch.int32, device=device).view(torch.float32)
    m = Maker(dtype, device)
    activation, classes = kind.split()[0], 1 if kind.endswith("probabilities") else 4
    input = m.normal(2, classes, 150).requires_grad_()
    target = m.positive(2, 1, 150).clamp(max=1) if classes == 1 else m.labels(classes, 2, 150)
    options = {}
    if source == "weight":
        options["weight"] = nan.expand(classes).clone()
    elif source == "pixel_weight":
        options["pixel_weight"] = nan.expand(2, 150).clone()
    incoming = nan if source == "incoming gradient" else torch.ones_like(nan)
    losses = {
        "IoU": lambda: fusedloss.soft_iou_loss(input, target, activation=activation, **options),
        "all": lambda: fusedloss.segmentation_loss(input, target, brier=1.0, activation=activation, **options),
    }
    if activation == "softmax" and source == "weight":
        losses["cross-entropy"] = lambda: fusedloss.cross_entropy(input, target, **options)
    for name, loss in losses.items():
        value = loss()
        (gradient,) = torch.autograd.grad(value, input, incoming.to(value.dtype))
        assert gradient.isnan().all(), name


@each_dtype
@pytest.mark.parametrize("weight", [math.inf, math.nan])
@pytest.mark.parametrize("layout", ["planes", "rows"])
def test_what_is_ignored_has_no_share_in_a_weight_that_is_no_number(dtype, weight, layout, device):
    """Label smoothing gives each pixel that counts a share in every class's weight."""
    m = Maker(dtype, device)
    logits = m.normal(1, 4, 300) if layout == "planes" else m.normal(300, 4)
    labels = torch.full((1, 300) if layout == "planes" else (300,), -100, device=device)
    weights = torch.tensor([1.0, 1.0, weight, 1.0], dtype=dtype, device=device)
    call = indices(logits, labels, weights, label_smoothing=0.1, reduction="sum")
    value, gradients = evaluate(CROSS_ENTROPY.function, call, ["input"], torch.ones((), device=device))
    assert value == 0
    assert (gradients["input"] == 0).all()


@pytest.mark.parametrize("special", SPECIAL.values(), ids=SPECIAL.keys())
def test_special_logits_with_probabilities(special, device):
    m = Maker(torch.float32, device)
    logits, target = m.normal(2, 4, 35), m.probabilities(2, 4, 35)
    logits[1, :, 20] = torch.tensor(special)
    target[1, :, 20] = torch.tensor([0.0, 0.0, 1.0, 0.0])
    check(CROSS_ENTROPY, probabilities(logits, target, reduction="none"))


@each_dtype
@each_reduction
@pytest.mark.parametrize("layout", ["planes", "rows", "channels_last"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("filler", [math.nan, math.inf, -math.inf])
def test_an_ignored_pixel_may_hold_anything(dtype, reduction, layout, smoothing, filler, device):
    """It adds exactly 0 to value and gradient. (In PyTorch its NaN reaches the gradient.)"""
    m = Maker(dtype, device)
    logits = m.normal(2, 4, 5, 7)
    labels = m.labels(4, 2, 5, 7, ignored=-100)
    if layout == "channels_last":
        logits = logits.to(memory_format=torch.channels_last)
    if layout == "rows":
        logits, labels = logits.movedim(1, -1).reshape(70, 4), labels.reshape(70)
    ignored = labels == -100
    clean = indices(logits, labels, m.positive(4), label_smoothing=smoothing, reduction=reduction)
    dirty = clean.map(lambda t: torch.where(ignored.unsqueeze(1), torch.tensor(filler, dtype=dtype), t), ["input"])
    expected_value, expected = evaluate(CROSS_ENTROPY.function, clean, ["input"])
    value, gradients = evaluate(CROSS_ENTROPY.function, dirty, ["input"])
    assert torch.equal(value, expected_value)
    assert torch.equal(gradients["input"], expected["input"])
    assert gradients["input"].movedim(1, -1)[ignored].count_nonzero() == 0
    assert not gradients["input"].isnan().any()


@each_dtype
@each_reduction
def test_special_numbers_in_squared_errors(dtype, reduction, device):
    m = Maker(dtype, device)
    x, y = m.normal(40), m.normal(40)
    x[3], x[17], y[18], x[39], y[39] = math.nan, math.inf, -math.inf, math.inf, math.inf
    if reduction == "none":
        check(MSE_LOSS, difference(x, y, m.positive(40)).with_options(reduction=reduction))
    assert fusedloss.mse_loss(x, y).isnan()
    assert fusedloss.mse_loss(x[4:38], y[4:38]).isinf()


@each_dtype
def test_zero_weights(dtype, device):
    """A class of weight 0 adds nothing; if no other occurs, the mean is 0 / 0, as in PyTorch."""
    m = Maker(dtype, device)
    weight = torch.tensor([0.0, 1.0, 0.5], dtype=dtype, device=device)
    logits = m.normal(2, 3, 9)
    for reduction in ("none", "sum"):
        check(CROSS_ENTROPY, indices(logits, m.labels(3, 2, 9), weight, reduction=reduction))
    only_zero = torch.zeros(2, 9, dtype=torch.int64, device=device)
    assert fusedloss.cross_entropy(logits, only_zero, weight).isnan()
    assert F.cross_entropy(logits, only_zero, weight).isnan()
    assert fusedloss.cross_entropy(logits, only_zero, weight, reduction="sum") == 0


@each_dtype
def test_negative_weights(dtype, device):
    """PyTorch does not ask for positive ones."""
    m = Maker(dtype, device)
    check(CROSS_ENTROPY, indices(m.normal(2, 3, 9), m.labels(3, 2, 9), -m.positive(3)))
    check(MSE_LOSS, difference(m.normal(9), m.normal(9), -m.positive(9)))
