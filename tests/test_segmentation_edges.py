"""The losses on probabilities where they could break: nothing to count, too much to count, NaN, ties, saturation."""

import itertools
import math
import re

import pytest
import torch

import fusedloss

from .compare import check, evaluate, random_like
from .registry import (
    BRIER_LOSS,
    DICE_LOSS,
    OVERLAP_STATISTICS,
    SEGMENTATION_LOSS,
    SOFT_IOU_LOSS,
    TVERSKY_LOSS,
    Call,
    Maker,
    each_dtype,
    each_reduction,
    on_pixels,
)
from .tolerance import assert_no_worse

OVERLAPS = (SOFT_IOU_LOSS, DICE_LOSS, TVERSKY_LOSS)
LOSSES = (*OVERLAPS, BRIER_LOSS, SEGMENTATION_LOSS, OVERLAP_STATISTICS)
ACTIVATIONS = ("softmax", "sigmoid", "none")
LAYOUTS = ("planes", "rows", "channels_last")
HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float64, torch.float32, *HALF)
ABSENT = ("skip", "count", "zero")
TWO_DTYPES = (torch.float64, torch.bfloat16)  # that are least alike, where all four would take long


def each(losses):
    return pytest.mark.parametrize("loss", [pytest.param(loss, id=loss.name) for loss in losses])


each_overlap = each(OVERLAPS)
each_loss = each(LOSSES)
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
each_logits = pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
each_half = pytest.mark.parametrize("dtype", [pytest.param(d, id=str(d).removeprefix("torch.")) for d in HALF])


def call_of(loss, input, target, weight=None, reduction="mean", **options) -> Call:
    """The call that `loss` makes of these: without what it lacks, and with all three terms where it has three."""
    options |= loss.required
    if loss.reductions:
        options["reduction"] = reduction
    if loss is OVERLAP_STATISTICS:
        weight = None
    if loss is SEGMENTATION_LOSS:
        options |= {"brier": 0.5} | ({"cross_entropy": 0.0} if options.get("activation") == "none" else {})
    return on_pixels(input, target, weight, **options)


def reductions_of(loss):
    return loss.reductions or ("mean",)


def grouped(loss):
    """For losses that know images."""
    return {} if loss is BRIER_LOSS else {"per_image": True}


def with_absent(loss, policy):
    """For losses that ask which classes count."""
    return {"absent": policy} if loss in (*OVERLAPS, SEGMENTATION_LOSS) else {}


def numbers(m, activation, *shape):
    """What `activation` takes: logits, or probabilities."""
    return m.probabilities(*shape) if activation == "none" else m.normal(*shape)


def laid_out(tensor, layout):
    """Of (N, C, H, W), or of (N, H, W), of whose layouts only the rows are another."""
    if layout == "rows":
        return tensor.movedim(1, -1).reshape(-1, tensor.shape[1]) if tensor.dim() == 4 else tensor.reshape(-1)
    if layout == "channels_last" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor


def every_way(loss):
    """Of calling it: (layout, dtype, reduction)."""
    return itertools.product(LAYOUTS, DTYPES, reductions_of(loss))


# ---- too much to count -----------------------------------------------------------------------------------------------


@each_half
@each_loss
@each_logits
@each_reduction
def test_more_pixels_than_float16_can_count(loss, activation, reduction, dtype, device):
    """90 000 pixels: summed in float16 their number is infinite, in bfloat16 it stops at 256."""
    m = Maker(dtype, device)
    call = call_of(loss, m.normal(1, 2, 300, 300), m.labels(2, 1, 300, 300), activation=activation, reduction=reduction)
    value, gradients = check(loss, call, with_torch=False)
    assert value.dtype == torch.float32
    assert value.isfinite().all()
    assert gradients["input"].isfinite().all()


@each_half
def test_soft_half_labels_of_more_pixels_than_float16_can_count(dtype, device):
    """The sums of the labels, and the gradient of the labels."""
    m = Maker(dtype, device)
    input, target = m.normal(1, 2, 300, 300), m.probabilities(1, 2, 300, 300)
    # The gradient of the minimum is not compared: of so many pixels some are ties after one rounding, others before it.
    check(SOFT_IOU_LOSS, call_of(SOFT_IOU_LOSS, input, target), wrt=(), with_torch=False)
    for loss, options in ((SOFT_IOU_LOSS, {"intersection": "product"}), (BRIER_LOSS, {})):
        value, gradients = check(loss, call_of(loss, input, target, **options), with_torch=False)
        assert value.isfinite().all()
        assert gradients["target"].count_nonzero() > 0


def test_more_pixels_than_float32_can_count(device):
    """Past 2^24 adding 1 changes nothing in float32. All numbers here are exact in it, so that nothing may be lost."""
    side = 4100
    pixels, of_class_1 = side * side, 32_782
    of_class_0 = pixels - of_class_1
    assert of_class_0 == 2**24 + 2
    labels = torch.zeros(1, side, side, dtype=torch.uint8, device=device)
    labels.view(-1)[:of_class_1] = 1
    logits = torch.zeros(1, 2, side, side, dtype=torch.bfloat16, device=device)  # every probability is 1/2
    both, predicted, labelled = fusedloss.overlap_statistics(logits, labels)
    assert labelled.tolist() == [[of_class_0, of_class_1]]
    assert predicted.tolist() == [[pixels / 2, pixels / 2]]
    assert both.tolist() == [[of_class_0 / 2, of_class_1 / 2]]
    losses = fusedloss.soft_iou_loss(logits, labels, reduction="none")
    expected = [1 - (t / 2) / (pixels / 2 + t - t / 2) for t in (of_class_0, of_class_1)]
    assert losses.tolist() == [pytest.approx(expected, rel=1e-6)]


def test_gradient_of_more_pixels_than_float32_can_count(device):
    """One class: I = T / 2, U = P + T - I; dL/dI + dL/dP = -1 / U where it is labelled, dL/dP = I / U^2 elsewhere."""
    side, of_class = 4100, 2**24 + 2
    labels = torch.zeros(1, side, side, dtype=torch.uint8, device=device)
    labels.view(-1)[-of_class:] = 1
    logits = torch.zeros(1, 1, side, side, dtype=torch.bfloat16, device=device, requires_grad=True)
    fusedloss.soft_iou_loss(logits, labels, activation="sigmoid").backward()
    both = of_class / 2
    union = side * side / 2 + of_class - both
    slope = 0.25  # p (1 - p)
    expected = torch.tensor([slope * both / union**2, -slope / union], dtype=torch.float64, device=device)
    gradient = logits.grad.view(-1)
    for part, number in zip((gradient[:-of_class], gradient[-of_class:]), expected, strict=True):
        assert part.min() == part.max()
        assert_no_worse(part[0], None, number)


# ---- large logits, infinity and NaN ----------------------------------------------------------------------------------

FAR = {
    "one above": [1e4, 0.0, 1.0, -1.0],
    "one below": [-1e4, 0.0, 1.0, -1.0],
    "above and below": [1e4, -1e4, 0.0, 1.0],
    "all above": [1e4, 1e4, 1e4, 1e4],
    "all below": [-1e4, -1e4, -1e4, -1e4],
}
INFINITE = {
    "plus infinity": [0.0, math.inf, 1.0, 2.0],
    "minus infinity": [0.0, -math.inf, 1.0, 2.0],
    "both infinities": [math.inf, -math.inf, 1.0, 2.0],
    "all minus infinity": [-math.inf] * 4,
    "all but one": [-math.inf, -math.inf, 1.0, -math.inf],
}
NANS = {
    "NaN": [0.0, math.nan, 1.0, 2.0],
    "NaN and infinity": [0.0, math.nan, math.inf, 2.0],
    "all NaN": [math.nan] * 4,
}


def with_special_pixels(loss, special, activation, layout, reduction, dtype, device):
    """Four pixels of the second of two images hold the four `special` numbers, once with each label."""
    m = Maker(dtype, device)
    input, labels = numbers(m, activation, 2, 4, 5, 7), m.labels(4, 2, 5, 7)
    input[1, :, 2, :4] = torch.tensor(special, dtype=dtype, device=device)[:, None]
    labels[1, 2, :4] = torch.arange(4, device=device)
    return call_of(
        loss,
        laid_out(input, layout),
        laid_out(labels, layout),
        m.positive(4),
        activation=activation,
        reduction=reduction,
    )


@each_loss
@each_logits
@pytest.mark.parametrize("special", FAR.values(), ids=FAR.keys())
def test_logits_far_from_zero(loss, activation, special, device):
    """Probabilities of exactly 0 and 1 among others."""
    for layout, dtype, reduction in every_way(loss):
        call = with_special_pixels(loss, special, activation, layout, reduction, dtype, device)
        value, gradients = check(loss, call, with_torch=False, what=f"{layout}, {dtype}, {reduction}")
        assert value.isfinite().all()
        assert gradients["input"].isfinite().all()


@each_loss
@pytest.mark.parametrize("special", [*INFINITE.values(), *NANS.values()], ids=[*INFINITE, *NANS])
def test_special_logits_under_softmax(loss, special, device):
    """NaN where the reference has it, and nowhere else."""
    for layout, dtype, reduction in every_way(loss):
        call = with_special_pixels(loss, special, "softmax", layout, reduction, dtype, device)
        check(loss, call, with_torch=False, what=f"{layout}, {dtype}, {reduction}")


@each_loss
@pytest.mark.parametrize("special", INFINITE.values(), ids=INFINITE.keys())
def test_infinite_logits_under_sigmoid(loss, special, device):
    for layout, dtype, reduction in every_way(loss):
        call = with_special_pixels(loss, special, "sigmoid", layout, reduction, dtype, device)
        check(loss, call, with_torch=False, what=f"{layout}, {dtype}, {reduction}")


@pytest.mark.parametrize("activation", ["sigmoid", "none"])
@pytest.mark.parametrize("special", [*INFINITE.values(), *NANS.values()], ids=[*INFINITE, *NANS])
def test_special_numbers_in_squared_errors(activation, special, device):
    for layout, dtype, reduction in every_way(BRIER_LOSS):
        call = with_special_pixels(BRIER_LOSS, special, activation, layout, reduction, dtype, device)
        check(BRIER_LOSS, call, with_torch=False, what=f"{layout}, {dtype}, {reduction}")


@each([*OVERLAPS, SEGMENTATION_LOSS])
@pytest.mark.parametrize("activation", ["sigmoid", "none"])
def test_a_nan_stays_in_its_class(loss, activation, device):
    """Where classes have nothing to do with each other: the value has it, the gradient of the other classes has not."""
    for layout, dtype, reduction in every_way(loss):
        call = with_special_pixels(loss, NANS["NaN"], activation, layout, reduction, dtype, device)
        value, gradients = evaluate(loss.function, call, ["input"])
        true_value, true_gradients = evaluate(loss.reference, call.to(torch.float64), ["input"], random_like(value))
        what = f"{layout}, {dtype}, {reduction}"
        assert_no_worse(value, None, true_value, f"value, {what}")
        gradient, true_gradient, others = gradients["input"], true_gradients["input"], [0, 2, 3]
        assert_no_worse(gradient[:, others], None, true_gradient[:, others], f"gradient, {what}")
        assert gradient[:, 1].isnan()[true_gradient[:, 1].isnan()].all(), what


# ---- ignored pixels --------------------------------------------------------------------------------------------------

IGNORED_BY = ("ignore_index", "pixel weight", "pixel mask", "pixel weight of soft labels")
each_way_to_ignore = pytest.mark.parametrize("by", IGNORED_BY)


def ignoring(loss, by, activation, reduction, dtype, device, **options):
    """A call on (2, 4, 5, 7), some of whose pixels are ignored, and a mask of these pixels."""
    m = Maker(dtype, device)
    input, labels = numbers(m, activation, 2, 4, 5, 7), m.labels(4, 2, 5, 7, ignored=-100)
    ignored = labels == -100
    if by != "ignore_index":
        labels = torch.where(ignored, 1, labels)
        options["pixel_weight"] = ~ignored if by == "pixel mask" else torch.where(ignored, 0.0, m.positive(2, 5, 7))
    target = m.probabilities(2, 4, 5, 7) if by == "pixel weight of soft labels" else labels
    call = call_of(loss, input, target, m.positive(4), activation=activation, reduction=reduction, **options)
    return call, ignored


def filled(tensor, ignored):
    """`tensor` with NaN and both infinities in each of the pixels that are `ignored`, in its own layout."""
    result = tensor.clone()
    count = int(ignored.sum()) * tensor.shape[1]
    fillers = torch.tensor([math.nan, math.inf, -math.inf], dtype=tensor.dtype, device=tensor.device)
    result.movedim(1, -1)[ignored] = fillers.repeat(count // 3 + 1)[:count].view(-1, tensor.shape[1])
    return result


def fill(call, ignored):
    return call.map(lambda tensor: filled(tensor, ignored), call.differentiable)


def lay_out(call, layout):
    return call.map(lambda tensor: laid_out(tensor, layout) if tensor.dim() > 1 else tensor)


@each_loss
@each_activation
@each_way_to_ignore
def test_an_ignored_pixel_may_hold_anything(loss, activation, by, device):
    """It adds exactly 0: the bits of value and gradient are those of the call with ordinary numbers there."""
    for way in every_way(loss):
        layout, dtype, reduction = way
        clean, ignored = ignoring(loss, by, activation, reduction, dtype, device)
        clean, ignored = lay_out(clean, layout), laid_out(ignored, layout)
        dirty = fill(clean, ignored)
        expected_value, expected = evaluate(loss.function, clean, clean.differentiable)
        value, gradients = evaluate(loss.function, dirty, dirty.differentiable)
        assert value.isfinite().all(), way
        assert torch.equal(value, expected_value), way
        for name, gradient in gradients.items():
            assert torch.equal(gradient, expected[name]), (way, name)
            assert gradient.movedim(1, -1)[ignored].count_nonzero() == 0, (way, name)
            assert gradient.count_nonzero() > 0, (way, name)
        if loss is BRIER_LOSS and reduction == "none":
            assert value[ignored].count_nonzero() == 0, way


@each_loss
@each_activation
@each_way_to_ignore
@each_reduction
def test_an_ignored_pixel_is_as_if_it_were_not_there(loss, activation, by, reduction, device):
    for dtype in (torch.float64, torch.float32):
        call, ignored = ignoring(loss, by, activation, reduction, dtype, device)
        call, kept = lay_out(call, "rows"), ~laid_out(ignored, "rows")
        call = fill(call, ~kept)
        pixels = [name for name in call.tensors if name != "weight"]
        without = call.with_tensors(**{name: call.tensors[name][kept] for name in pixels}).to(torch.float64)
        each_pixel = loss is BRIER_LOSS and reduction == "none"
        function = (lambda **o: BRIER_LOSS.function(**o)[kept]) if each_pixel else loss.function  # noqa: B023
        value, gradients = evaluate(function, call, call.differentiable)
        true_value, true_gradients = evaluate(loss.reference, without, without.differentiable, random_like(value))
        assert_no_worse(value, None, true_value, f"value, {dtype}")
        for name, gradient in gradients.items():
            assert_no_worse(gradient[kept], None, true_gradients[name], f"gradient of {name}, {dtype}")


@each_loss
@each_activation
@each_way_to_ignore
def test_every_pixel_ignored(loss, activation, by, device):
    """0 with a gradient of 0, in a mean too: nothing was wrong."""
    every = torch.ones(2, 5, 7, dtype=torch.bool, device=device)
    ways = ({}, grouped(loss), grouped(loss) | with_absent(loss, "count"))
    for dtype, reduction, options in itertools.product(TWO_DTYPES, reductions_of(loss), ways):
        call, _ = ignoring(loss, by, activation, reduction, dtype, device, **options)
        call = fill(call, every)
        if by == "ignore_index":
            call = call.map(lambda labels: torch.full_like(labels, -100), ["target"])
        else:
            call = call.map(torch.zeros_like, ["pixel_weight"])
        value, gradients = check(loss, call, with_torch=False)
        assert value.count_nonzero() == 0
        assert all(gradient.count_nonzero() == 0 for gradient in gradients.values())


@each_activation
def test_every_term_is_0_where_every_pixel_is_ignored(activation, device):
    input = numbers(Maker(torch.float32, device), activation, 2, 4, 5)
    labels = torch.full((2, 5), 255, dtype=torch.uint8, device=device)
    factor = 0.0 if activation == "none" else 1.0
    loss, terms = fusedloss.segmentation_loss(
        input, labels, activation=activation, ignore_index=255, cross_entropy=factor, brier=1.0, return_terms=True
    )
    assert loss.item() == 0
    assert {name: term.item() for name, term in terms.items()} == dict.fromkeys(terms, 0)
    assert len(terms) == (2 if activation == "none" else 3)


@each_loss
@each_activation
@each_reduction
def test_ignore_index_may_be_a_class(loss, activation, reduction, device):
    """Its pixels are ignored; that class is then labelled nowhere, but predicted elsewhere."""
    for dtype in DTYPES:
        m = Maker(dtype, device)
        input, labels = numbers(m, activation, 2, 4, 5, 7), m.labels(4, 2, 5, 7, ignored=2)
        options = {"activation": activation, "ignore_index": 2, "reduction": reduction}
        _, gradients = check(loss, call_of(loss, input, labels, m.positive(4), **options), with_torch=False)
        assert gradients["input"].movedim(1, -1)[labels == 2].count_nonzero() == 0


@each_loss
@pytest.mark.parametrize("activation", ["sigmoid", "none"])
@pytest.mark.parametrize("ignore_index", [0, 1])
@each_reduction
def test_ignore_index_may_be_background_or_foreground(loss, activation, ignore_index, reduction, device):
    """Of one class; as class indices and as the mask that data loaders give."""
    m = Maker(torch.float32, device)
    input, labels = m.positive(2, 1, 5, 7) - 0.25, m.labels(2, 2, 5, 7)
    for target in (labels, labels.to(torch.uint8), labels > 0, labels[:, None], labels[:, None] > 0):
        options = {"activation": activation, "ignore_index": ignore_index, "reduction": reduction}
        _, gradients = check(loss, call_of(loss, input, target, **options), with_torch=False)
        assert gradients["input"][:, 0][labels == ignore_index].count_nonzero() == 0
        assert gradients["input"].count_nonzero() > 0 or ignore_index == 1


@each_loss
@pytest.mark.parametrize("by", ["ignore_index", "pixel weight"])
@each_activation
@each_reduction
def test_an_image_of_ignored_pixels_alone(loss, by, activation, reduction, device):
    """The mean over images is the mean over the others; what is given for each image is 0 for it.

    Whichever way absent classes count: in that image none does.
    """
    for dtype, absent in itertools.product((torch.float64, torch.float32, torch.bfloat16), ABSENT):
        m = Maker(dtype, device)
        input, labels, weight = numbers(m, activation, 4, 5, 3, 7), m.labels(3, 4, 3, 7), m.positive(5)
        options = {"activation": activation, "reduction": reduction, **grouped(loss), **with_absent(loss, absent)}
        others = [0, 3]
        if by == "ignore_index":
            labels[1:3] = -100
        else:
            options["pixel_weight"] = m.positive(4, 3, 7)
            options["pixel_weight"][1:3] = 0
        every = torch.zeros(4, 3, 7, dtype=torch.bool, device=device)
        every[1:3] = True
        call = call_of(loss, filled(input, every), labels, weight, **options)
        pixels = [name for name in call.tensors if name != "weight"]
        without = call.with_tensors(**{name: call.tensors[name][others] for name in pixels}).to(torch.float64)

        grad_output = random_like(call.run(loss.function))
        value, gradients = evaluate(loss.function, call, ["input"], grad_output)
        if value.dim() > 0:  # something for each image
            value, grad_output = (t.movedim(1, 0) if loss is OVERLAP_STATISTICS else t for t in (value, grad_output))
            assert value[1:3].count_nonzero() == 0
            value, grad_output = (t[others] for t in (value, grad_output))
            value, grad_output = (t.movedim(0, 1) if loss is OVERLAP_STATISTICS else t for t in (value, grad_output))
        true_value, true_gradients = evaluate(loss.reference, without, ["input"], grad_output)
        assert_no_worse(value, None, true_value, f"value, {dtype}")
        assert_no_worse(gradients["input"][others], None, true_gradients["input"], f"gradient, {dtype}")
        assert gradients["input"][1:3].count_nonzero() == 0


@each_overlap
def test_an_image_without_a_class_that_counts(loss, device):
    """Labelled with none of the chosen classes, it is no part of the mean, unless the absent ones count."""
    m = Maker(torch.float32, device)
    input, labels = m.normal(3, 5, 40), m.labels(2, 3, 40)
    labels[1] = 4
    options = {"classes": (0, 1), "per_image": True, **loss.required}
    of_others = loss.function(input[[0, 2]], labels[[0, 2]], **options)
    torch.testing.assert_close(loss.function(input, labels, **options), of_others)
    check(loss, on_pixels(input, labels, **options), with_torch=False)
    zero = loss.function(input, labels, absent="zero", **options)
    torch.testing.assert_close(zero, of_others * 2 / 3)


# ---- absent classes --------------------------------------------------------------------------------------------------

LACKING = ("labels", "prediction", "labels and prediction")


def lacking(who, activation, dtype, device):
    """Class 2 of 4 is in no label, or its probability is exactly 0 everywhere."""
    m = Maker(dtype, device)
    input, labels = numbers(m, activation, 2, 4, 5, 7), m.labels(4, 2, 5, 7)
    if "prediction" in who:
        input[:, 2] = 0.0 if activation == "none" else -1e4
    if "labels" in who:
        labels[labels == 2] = 3
    return input, labels, m.positive(4)


@each_overlap
@each_activation
@pytest.mark.parametrize("absent", ABSENT)
@pytest.mark.parametrize("who", LACKING)
def test_a_class_that_is_lacking(loss, activation, absent, who, device):
    for dtype in TWO_DTYPES:
        input, labels, weight = lacking(who, activation, dtype, device)
        both, predicted, labelled = fusedloss.overlap_statistics(input, labels, activation=activation)
        assert both[0, 2] == 0
        assert (predicted[0, 2] == 0) == ("prediction" in who)
        assert (labelled[0, 2] == 0) == ("labels" in who)
        options = {"activation": activation, "absent": absent}
        for reduction in loss.reductions:
            for more in ({"per_image": True}, {"log": True}, {"smooth": 1.0, "gamma": 0.5}):
                call = call_of(loss, input, labels, weight, reduction, **options, **more)
                check(loss, call, with_torch=False, what=f"{dtype}, {reduction}, {more}")


@each_overlap
@pytest.mark.parametrize(
    ("who", "absent", "plain", "smoothed", "logged"),
    [
        ("labels", "skip", 0.0, 0.0, 0.0),
        ("labels", "zero", 0.0, 0.0, 0.0),
        ("labels", "count", 1.0, None, -math.log(1e-3)),
        ("prediction", "skip", 1.0, None, -math.log(1e-3)),
        ("prediction", "zero", 1.0, None, -math.log(1e-3)),
        ("prediction", "count", 1.0, None, -math.log(1e-3)),
        ("labels and prediction", "skip", 0.0, 0.0, 0.0),
        ("labels and prediction", "zero", 0.0, 0.0, 0.0),
        # 0 of nothing is the worst score without `smooth`, (0 + 0) / eps, and the best with it, (0 + 1) / (0 + 1).
        ("labels and prediction", "count", 1.0, 0.0, -math.log(1e-3)),
    ],
)
def test_what_a_lacking_class_loses(loss, who, absent, plain, smoothed, logged, device):
    input, labels, _ = lacking(who, "softmax", torch.float32, device)

    def of_class_2(**options):
        losses = loss.function(input, labels, absent=absent, reduction="none", **options, **loss.required)
        return losses[0, 2].item()

    assert of_class_2() == plain
    assert of_class_2(eps=1e-3, log=True) == pytest.approx(logged)
    if smoothed is not None:
        assert of_class_2(smooth=1.0) == smoothed


# ---- little, and nothing ---------------------------------------------------------------------------------------------


@each_loss
@each_activation
def test_one_pixel(loss, activation, device):
    for dtype, shape in itertools.product(TWO_DTYPES, ((1, 3), (1, 3, 1, 1), (1, 3, 1, 1, 1))):
        m = Maker(dtype, device)
        input, weight = numbers(m, activation, *shape), m.positive(3)
        for target in (m.labels(3, *shape[:1], *shape[2:]), m.probabilities(*shape)):
            for reduction, options in itertools.product(reductions_of(loss), ({}, grouped(loss))):
                call = call_of(loss, input, target, weight, reduction, activation=activation, **options)
                # The gradient of a mean over a single thing may be a difference of equal numbers.
                check(loss, call, with_torch=False, what=f"{dtype}, {shape}, {reduction}", scale=1.0)


@each_loss
@pytest.mark.parametrize("activation", ["sigmoid", "none"])
def test_one_class(loss, activation, device):
    for dtype, shape in itertools.product(TWO_DTYPES, ((7, 1), (2, 1, 35), (2, 1, 5, 7))):
        m = Maker(dtype, device)
        input = m.positive(*shape) * 0.75 if activation == "none" else m.normal(*shape)
        labels = m.labels(2, *shape[:1], *shape[2:])
        for target in (labels, labels > 0, labels.unsqueeze(1), labels.unsqueeze(1) > 0, m.positive(*shape) * 0.75):
            for reduction in reductions_of(loss):
                call = call_of(loss, input, target, m.positive(1), reduction, activation=activation)
                check(loss, call, with_torch=False, what=f"{dtype}, {shape}, {target.dtype}, {reduction}")


@each_loss
def test_softmax_of_one_class_is_refused(loss, device):
    input = torch.zeros(2, 1, 5, 7, device=device)
    for target in (torch.zeros(2, 5, 7, dtype=torch.int64), torch.zeros(2, 1, 5, 7), torch.zeros(2, 1, 5, 7) > 0):
        with pytest.raises(ValueError, match="sigmoid"):
            call_of(loss, input, target.to(device)).run(loss.function)


@each_loss
@each_activation
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0), (2, 3, 0, 4), (0, 3, 0)], ids=str)
def test_no_pixels(loss, activation, shape, device):
    """0, and an empty gradient."""
    m = Maker(torch.float32, device)
    pixels = shape[:1] + shape[2:]
    for target in (m.labels(3, *pixels), m.normal(*shape)):
        for reduction, options in itertools.product(
            reductions_of(loss), ({}, {"pixel_weight": m.positive(*pixels), **grouped(loss)})
        ):
            call = call_of(loss, m.normal(*shape), target, m.positive(3), reduction, activation=activation, **options)
            value, gradients = check(loss, call, with_torch=False)
            assert value.count_nonzero() == 0
            assert all(gradient.shape == shape for gradient in gradients.values())


# ---- probabilities that are the labels -------------------------------------------------------------------------------


@each_overlap
@each_dtype
@each_reduction
@pytest.mark.parametrize("intersection", ["min", "product"])
def test_probabilities_that_are_the_soft_labels(loss, dtype, reduction, intersection, device):
    """Exactly 0 with the minimum, whose derivative at the tie is half for each; more than 0 with the product."""
    # Eighths, whose sums are exact in every dtype.
    eighths = torch.tensor([[1, 2, 5], [4, 4, 0], [8, 0, 0], [3, 3, 2], [0, 1, 7]], device=device).to(dtype) / 8
    call = call_of(loss, eighths, eighths.clone(), reduction=reduction, activation="none", intersection=intersection)
    # The gradient is a difference of equal numbers, about as large as one over the area of a class.
    value, gradients = check(loss, call, with_torch=False, scale=1.0)
    if intersection == "min":
        assert value.count_nonzero() == 0
    else:
        assert (value > 0.1).all()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@each([*OVERLAPS, SEGMENTATION_LOSS, OVERLAP_STATISTICS])
@each_dtype
def test_some_probabilities_are_the_soft_labels(loss, dtype, device):
    """Ties among others: there the gradient is half of what the intersection gives, and not 0."""
    m = Maker(dtype, device)
    input, target = m.probabilities(2, 4, 35), m.probabilities(2, 4, 35)
    input[:, :, ::2] = target[:, :, ::2]
    _, gradients = check(loss, call_of(loss, input, target, activation="none"), with_torch=False)
    assert all(gradient[:, :, ::2].count_nonzero() > 0 for gradient in gradients.values())


def test_half_of_the_derivative_by_hand(device):
    """One class, P = T = I = 1: dI = -2 / U, dP = 1 / U, and at the tie half of dI, so that nothing pulls."""
    input = torch.tensor([[0.25], [0.75]], device=device, requires_grad=True)
    target = torch.tensor([[0.25], [0.75]], device=device, requires_grad=True)
    both, predicted, labelled = fusedloss.overlap_statistics(input, target, activation="none")
    assert torch.equal(torch.autograd.grad(both.sum(), input, retain_graph=True)[0], torch.full_like(input, 0.5))
    assert torch.equal(torch.autograd.grad(both.sum(), target, retain_graph=True)[0], torch.full_like(input, 0.5))
    value = 1 - both / (predicted + labelled - both)
    assert value.item() == 0
    for gradient in torch.autograd.grad(fusedloss.soft_iou_loss(input, target, activation="none"), (input, target)):
        assert gradient.count_nonzero() == 0


# ---- weights of 0 ----------------------------------------------------------------------------------------------------

NO_WEIGHT = {
    "of some": [0.0, 1.0, 0.0, 0.5],
    "of those that are labelled": [0.0, 0.0, 1.0, 0.5],
    "of all": [0.0, 0.0, 0.0, 0.0],
}


@each([loss for loss in LOSSES if loss is not OVERLAP_STATISTICS])
@each_activation
@pytest.mark.parametrize("weight", NO_WEIGHT.values(), ids=NO_WEIGHT.keys())
def test_classes_of_weight_0(loss, activation, weight, device):
    for dtype, reduction in itertools.product(TWO_DTYPES, reductions_of(loss)):
        m = Maker(dtype, device)
        input, labels = numbers(m, activation, 2, 4, 5, 7), m.labels(2, 2, 5, 7)
        weight_of = torch.tensor(weight, dtype=dtype, device=device)
        for options in ({}, grouped(loss), {"pixel_weight": m.positive(2, 5, 7)}):
            call = call_of(loss, input, labels, weight_of, reduction, activation=activation, **options)
            value, gradients = check(loss, call, with_torch=False, what=f"{dtype}, {reduction}")
            assert value.isfinite().all()
            if not any(weight) and (reduction != "none" or loss is BRIER_LOSS):
                assert value.count_nonzero() == 0
                assert gradients["input"].count_nonzero() == 0


@each_overlap
def test_an_image_whose_classes_weigh_nothing_is_part_of_the_mean(loss, device):
    """A class counts there, so the image does, with a loss of 0."""
    m = Maker(torch.float32, device)
    input, labels, weight = m.normal(3, 4, 40), m.labels(4, 3, 40), m.positive(4)
    labels[1], weight[3] = 3, 0.0
    options = {"per_image": True, **loss.required}
    of_others = loss.function(input[[0, 2]], labels[[0, 2]], weight, **options)
    torch.testing.assert_close(loss.function(input, labels, weight, **options), of_others * 2 / 3)
    check(loss, on_pixels(input, labels, weight, **options), with_torch=False)


def test_no_label_has_a_weight(device):
    """The divisor of the cross-entropy, sum m w_y, is 0, and so is the term; PyTorch's would be NaN."""
    logits = Maker(torch.float32, device).normal(2, 3, 7)
    labels, weight = torch.zeros(2, 7, dtype=torch.int64, device=device), torch.tensor([0.0, 1.0, 1.0], device=device)
    call = call_of(SEGMENTATION_LOSS, logits, labels, weight)
    check(SEGMENTATION_LOSS, call, with_torch=False)
    _, terms = fusedloss.segmentation_loss(logits, labels, weight, return_terms=True)
    assert terms["cross_entropy"].item() == 0


# ---- a loss of exactly 0 ---------------------------------------------------------------------------------------------


@each_overlap
@each_dtype
@pytest.mark.parametrize("gamma", [0.25, 0.5, 1.0, 2.0])
def test_a_perfect_prediction(loss, dtype, gamma, device):
    """The power has an infinite derivative at 0, which must not meet the 0 of a probability that is exactly 0 or 1."""
    labels = Maker(dtype, device).labels(3, 2, 5, 7)
    one_hot = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).to(dtype)
    for reduction, intersection, log in itertools.product(("none", "mean"), ("min", "product"), (False, True)):
        options = {"intersection": intersection, "gamma": gamma, "log": log, "reduction": reduction}
        for activation, input in (("softmax", 1e4 * one_hot), ("sigmoid", 2e4 * one_hot - 1e4), ("none", one_hot)):
            call = call_of(loss, input, labels, activation=activation, **options)
            # The gradient of gamma = 1 is a difference of equal numbers, about as large as one over a class's area.
            value, gradients = check(loss, call, with_torch=False, what=str(options), scale=1.0)
            assert value.count_nonzero() == 0
            assert gradients["input"].isfinite().all()
            if gamma != 1.0 or activation != "none":
                assert gradients["input"].count_nonzero() == 0


@each_overlap
@each_dtype
@pytest.mark.parametrize("gamma", [0.25, 0.5])
def test_one_perfect_class_among_others(loss, dtype, gamma, device):
    """Its derivative is 0 by definition, theirs is not."""
    m = Maker(dtype, device)
    input, labels = m.normal(2, 4, 5, 7), m.labels(4, 2, 5, 7)
    input[:, 0] = torch.where(labels == 0, 1e4, -1e4)
    for log in (False, True):
        call = call_of(loss, input, labels, gamma=gamma, log=log)
        _, gradients = check(loss, call, with_torch=False)
        assert gradients["input"].movedim(1, -1)[labels == 0].count_nonzero() == 0
        assert gradients["input"].count_nonzero() > 0
        assert call.with_options(reduction="none").run(loss.function)[0, 0] == 0


# ---- labels that are none --------------------------------------------------------------------------------------------

BAD_LABELS = [
    (torch.uint8, 4),
    (torch.uint8, 255),
    (torch.int16, -1),
    (torch.int16, 32767),
    (torch.int32, 4),
    (torch.int32, -(2**31)),
    (torch.int64, -1),
    (torch.int64, 4),
    (torch.int64, 2**32 + 1),  # 1 in its lower half
    (torch.int64, -(2**63)),
]
POSITIONS = ((0, 0, 0), (0, 3, 7), (1, 8, 39))


@each_loss
@pytest.mark.parametrize(("dtype", "label"), BAD_LABELS, ids=str)
def test_bad_label_is_named_with_its_position(loss, dtype, label, device):
    """Whatever the layout and the groups, with a gradient or without."""
    for layout in ("planes", "channels_last"):
        logits = laid_out(torch.zeros(2, 4, 9, 40, device=device), layout)
        for activation in ACTIVATIONS:
            for position in POSITIONS:
                labels = torch.ones(2, 9, 40, dtype=dtype, device=device)
                labels[position] = label
                call = call_of(loss, logits, labels, activation=activation, **grouped(loss))
                wanted = rf"^{loss.name}: .*target.*{re.escape(str(position))}.*4.*-100.*{label}$"
                for names in ((), ("input",)):
                    with pytest.raises(IndexError, match=wanted):
                        call.requiring_grad(names).run(loss.function)


@each_loss
@pytest.mark.parametrize(
    ("dtype", "label"), [(torch.uint8, 2), (torch.int16, -1), (torch.int32, 2), (torch.int64, 2)], ids=str
)
def test_bad_label_of_one_class(loss, dtype, label, device):
    """Neither 0, background, nor 1."""
    for activation in ("sigmoid", "none"):
        labels = torch.ones(2, 9, 40, dtype=dtype, device=device)
        labels[1, 3, 7] = label
        call = call_of(loss, torch.zeros(2, 1, 9, 40, device=device), labels, activation=activation)
        with pytest.raises(IndexError, match=rf"^{loss.name}: .*target.*\(1, 3, 7\).*2.*-100.*{label}$"):
            call.run(loss.function)
        with pytest.raises(IndexError, match=rf"^{loss.name}: .*target.*\(1, 0, 3, 7\).*-100.*{label}$"):
            call.map(lambda t: t.unsqueeze(1), ["target"]).run(loss.function)


@each_loss
@pytest.mark.parametrize(
    ("dtype", "label"),
    [
        (torch.uint8, 2),
        (torch.uint8, 255),
        (torch.int16, 2),
        (torch.int16, 256),  # 0 in its lower half
        (torch.int32, -1),
        (torch.int64, 2),
        (torch.int64, -100),  # not ignore_index: a mask has no class indices
        (torch.int64, 2**32 + 1),
    ],
    ids=str,
)
def test_bad_number_in_a_mask_is_named_with_its_position(loss, dtype, label, device):
    for layout in ("planes", "channels_last"):
        logits = laid_out(torch.zeros(2, 4, 9, 40, device=device), layout)
        for activation in ("sigmoid", "none"):
            for position in ((0, 0, 0, 0), (0, 2, 3, 7), (1, 3, 8, 39)):
                mask = torch.ones(2, 4, 9, 40, dtype=dtype, device=device)
                mask[position] = label
                for target in (mask, laid_out(mask, layout)):
                    call = call_of(loss, logits, target, activation=activation, **grouped(loss))
                    wanted = rf"^{loss.name}: .*target.*{re.escape(str(position))}.*0 or 1.*{label}$"
                    for names in ((), ("input",)):
                        with pytest.raises(IndexError, match=wanted):
                            call.requiring_grad(names).run(loss.function)


@each_loss
def test_a_good_call_after_a_bad_label(loss, device):
    m = Maker(torch.float32, device)
    logits, labels = m.normal(2, 4, 35), m.labels(4, 2, 35)
    bad = labels.clone()
    bad[1, 7] = 4
    with pytest.raises(IndexError):
        call_of(loss, logits, bad).run(loss.function)
    check(loss, call_of(loss, logits, labels), with_torch=False)


@each_loss
def test_minus_100_is_not_156(loss, device):
    """ignore_index is compared after widening."""
    m = Maker(torch.float32, device)
    labels = m.labels(200, 2, 35, dtype=torch.uint8)
    labels[1, 20] = 156
    call = call_of(loss, m.normal(2, 200, 35), labels)
    _, gradients = check(loss, call, with_torch=False)
    assert gradients["input"][1, :, 20].count_nonzero() > 0


@each([*OVERLAPS, OVERLAP_STATISTICS])
@pytest.mark.parametrize("infinite", [math.inf, -math.inf], ids=["plus", "minus"])
def test_an_infinite_probability_has_a_gradient(loss, infinite, device):
    """Of activation="none", which takes what comes: no NaN where the reference has none."""
    input = torch.tensor([[0.2, 0.4], [0.3, 0.7], [0.1, 0.9]], device=device)
    input[0, 1] = infinite
    call = call_of(loss, input, torch.tensor([0, 1, 1], device=device), activation="none")
    gradients = [evaluate(function, call, ["input"])[1]["input"] for function in (loss.function, loss.reference)]
    assert not (gradients[0].isnan() & ~gradients[1].isnan())[:, 0].any()
    if infinite > 0:
        assert not (gradients[0].isnan() & ~gradients[1].isnan()).any()


def test_a_class_that_is_hardly_predicted_keeps_its_sum(device):
    """beta = 0: the score is I / P, and P of the class a millionth of T. No other term may cost its digits."""
    m = Maker(torch.float32, device)
    logits = m.normal(2, 5, 96, 128)
    logits[:, 0] -= 14
    target = m.labels(5, 2, 96, 128)
    target[:, :48] = 0
    options = {"cross_entropy": 0.0, "iou": 1.0, "alpha": 1.0, "beta": 0.0, "classes": [0]}

    def losses(input, function):
        return [function(input, target, **options, brier=brier, return_terms=True)[1]["iou"] for brier in (0.0, 1.0)]

    truth = losses(logits.double(), fusedloss.reference.segmentation_loss)
    for found, true in zip(losses(logits, fusedloss.segmentation_loss), truth, strict=True):
        assert found.item() == pytest.approx(true.item(), rel=1e-5)
