"""The reference means what PyTorch means. It shares no code with PyTorch's losses, and nothing else tests it."""

import math

import pytest
import torch
import torch.nn.functional as F

from fusedloss import reference

from .compare import random_like
from .registry import DTYPES, LOSSES, Case, Maker, each_case, each_dtype, each_reduction, first_cases


@each_reduction
@each_case
def test_value_and_gradients_are_torchs(case, reduction):
    results = []
    for function in (case.loss.reference, case.loss.torch):
        plain = case.make(torch.float64, reduction=reduction)
        call = plain.requiring_grad(plain.differentiable)
        value = call.run(function)
        leaves = [call.tensors[name] for name in plain.differentiable]
        results.append([value, *torch.autograd.grad(value, leaves, random_like(value))])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-13)


@each_dtype
@each_reduction
@each_case
def test_dtype_is_torchs(case, reduction, dtype):
    call = case.make(dtype, reduction=reduction)
    ours, theirs = call.run(case.loss.reference), call.run(case.loss.torch)
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    # PyTorch sums in half, the reference in float32.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(ours, theirs, rtol=16 * eps, atol=16 * eps)


def test_dtypes_promote_as_torchs():
    m = Maker(torch.float64)
    for one in DTYPES:
        for other in DTYPES:
            x, p, w = m.normal(4, 3).to(one), m.probabilities(4, 3).to(other), m.positive(3).to(other)
            for reduction in ("none", "mean"):
                for weight in (None, w, w.to(one)):
                    ours = reference.cross_entropy(x, p, weight, reduction=reduction)
                    assert ours.dtype == F.cross_entropy(x, p, weight, reduction=reduction).dtype
                ours = reference.mse_loss(x, p, reduction=reduction)
                assert ours.dtype == F.mse_loss(x, p, reduction=reduction).dtype


@pytest.mark.compile
@pytest.mark.usefixtures("fresh_compiler")
@first_cases
def test_compiles_whole(case):
    call = case.make(torch.float64)
    compiled = torch.compile(case.loss.reference, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(call.run(compiled), call.run(case.loss.torch))


@each_reduction
@each_case
def test_transforms(case, reduction):
    """The derivatives of what the kernels' doors fall back to; test_transforms has the rest."""
    call = case.make(torch.float64, reduction=reduction)
    results = []
    for function in (case.loss.reference, case.loss.torch):
        of_tensors, tensors = call.on(function, call.differentiable)
        factors = random_like(of_tensors(*tensors))
        scalar = lambda *ts, f=of_tensors, factors=factors: (f(*ts) * factors).sum()  # noqa: E731
        every = tuple(range(len(tensors)))
        gradient = torch.func.grad(scalar, every)
        stacked = tuple(torch.stack([t, 0.5 * t]) for t in tensors)
        results.append(
            (
                torch.func.jvp(gradient, tensors, tuple(t.cos() for t in tensors)),
                torch.func.vmap(gradient)(*stacked),
            )
        )
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


# ---- by hand ---------------------------------------------------------------------------------------------------------

THIRDS = torch.tensor([[0.0, math.log(2.0)]], dtype=torch.float64)  # probabilities 1/3 and 2/3


def test_one_pixel_by_hand():
    def ce(target, *args, **options):
        return reference.cross_entropy(THIRDS, torch.tensor(target), *args, **options).item()

    assert ce([0]) == pytest.approx(math.log(3))
    assert ce([1]) == pytest.approx(math.log(1.5))
    weight = torch.tensor([2.0, 10.0], dtype=torch.float64)
    assert ce([0], weight, reduction="sum") == pytest.approx(2 * math.log(3))
    assert ce([0], weight) == pytest.approx(math.log(3))
    # (1 - 0.5) w_0 log 3 + 0.5 / 2 (w_0 log 3 + w_1 log 1.5)
    smoothed = 0.5 * 2 * math.log(3) + 0.25 * (2 * math.log(3) + 10 * math.log(1.5))
    assert ce([0], weight, reduction="sum", label_smoothing=0.5) == pytest.approx(smoothed)
    assert ce([0], weight, label_smoothing=0.5) == pytest.approx(smoothed / 2)
    soft = 2 * 0.25 * math.log(3) + 10 * 0.75 * math.log(1.5)
    target = torch.tensor([[0.25, 0.75]], dtype=torch.float64)
    assert reference.cross_entropy(THIRDS, target, weight).item() == pytest.approx(soft)


def test_means_by_hand():
    """The mean over labels divides by the weights of the labels, the mean over probabilities by the pixels."""
    weight = torch.tensor([2.0, 10.0], dtype=torch.float64)
    logits = THIRDS.expand(3, 2)
    labels = torch.tensor([0, 1, -100])
    expected = (2 * math.log(3) + 10 * math.log(1.5)) / 12
    assert reference.cross_entropy(logits, labels, weight).item() == pytest.approx(expected)
    assert reference.cross_entropy(logits, labels).item() == pytest.approx((math.log(3) + math.log(1.5)) / 2)
    one_hot = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    expected = (2 * math.log(3) + 10 * math.log(1.5)) / 3
    assert reference.cross_entropy(logits, one_hot, weight).item() == pytest.approx(expected)


def test_gradient_by_hand():
    logits = THIRDS.clone().requires_grad_()
    reference.cross_entropy(logits, torch.tensor([0])).backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[1 / 3 - 1, 2 / 3]], dtype=torch.float64))


def test_squared_error_by_hand():
    x, y = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([0.0, 4.0, 5.0])
    w = torch.tensor([3.0, 1.0, 4.0], requires_grad=True)
    assert reference.mse_loss(x, y, reduction="none").tolist() == [1.0, 4.0, 0.0]
    assert reference.mse_loss(x, y, reduction="sum").item() == 5.0
    assert reference.mse_loss(x, y).item() == pytest.approx(5 / 3)
    value = reference.mse_loss(x, y, weight=w)
    assert value.item() == pytest.approx(7 / 8)
    value.backward()
    torch.testing.assert_close(w.grad, torch.tensor([(1 - 7 / 8) / 8, (4 - 7 / 8) / 8, (0 - 7 / 8) / 8]))


# ---- where it must differ from PyTorch -------------------------------------------------------------------------------


@each_reduction
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("filler", [math.nan, math.inf, -math.inf])
def test_an_ignored_pixel_adds_nothing(reduction, smoothing, filler):
    m = Maker(torch.float64)
    logits, labels = m.normal(2, 4, 5), m.labels(4, 2, 5, ignored=-100)
    ignored = labels == -100
    logits = torch.where(ignored.unsqueeze(1), filler, logits).requires_grad_()
    value = reference.cross_entropy(logits, labels, reduction=reduction, label_smoothing=smoothing)
    (gradient,) = torch.autograd.grad(value, logits, random_like(value))
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    assert gradient.movedim(1, -1)[ignored].count_nonzero() == 0
    assert gradient.movedim(1, -1)[~ignored].count_nonzero() > 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_labels_of_every_integer_dtype(dtype):
    m = Maker(torch.float64)
    logits, labels = m.normal(2, 4, 3, 5), m.labels(4, 2, 3, 5)
    assert torch.equal(reference.cross_entropy(logits, labels.to(dtype)), reference.cross_entropy(logits, labels))


def test_minus_100_is_not_156():
    logits = Maker(torch.float64).normal(1, 200)
    label = torch.tensor([156], dtype=torch.uint8)
    assert reference.cross_entropy(logits, label, reduction="sum") != 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_is_computed_in_float32(dtype):
    value = reference.cross_entropy(
        torch.zeros(1, 2, 300, 300, dtype=dtype), torch.zeros(1, 300, 300, dtype=torch.long)
    )
    assert value.item() == pytest.approx(math.log(2), rel=torch.finfo(dtype).eps)


# ---- what would broadcast or convert its way to a wrong number -------------------------------------------------------


def test_nonsense_is_refused():
    x, y = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
    for error, call in (
        (ValueError, lambda: reference.cross_entropy(x, y[:3])),
        (ValueError, lambda: reference.cross_entropy(x, x[:1])),
        (ValueError, lambda: reference.cross_entropy(x, y, torch.ones(1))),
        (ValueError, lambda: reference.cross_entropy(x, x, ignore_index=1)),
        (ValueError, lambda: reference.cross_entropy(x, y, reduction="average")),
        (TypeError, lambda: reference.cross_entropy(x, y > 0)),
        (RuntimeError, lambda: reference.cross_entropy(x, y + 3)),
        (RuntimeError, lambda: reference.cross_entropy(x, y - 1)),
        (ValueError, lambda: reference.mse_loss(x, x, weight=x[:1])),
        (ValueError, lambda: reference.mse_loss(x, x, reduction="average")),
        (TypeError, lambda: reference.mse_loss(y, y)),
    ):
        with pytest.raises(error):
            call()


def test_cases_are_telling():
    """No case is so plain that a forgotten weight or smoothing, or a swapped sign, would not show."""
    for reduction in ("none", "sum", "mean"):
        for name, change in (
            ("image-everything", {"label_smoothing": 0.0}),
            ("image-everything", {"weight": None}),
            ("image-everything", {"ignore_index": -1000}),
            ("rows-everything", {"label_smoothing": 0.0}),
            ("rows-probabilities-everything", {"weight": None}),
        ):
            call = Case(LOSSES[0], name).make(reduction=reduction)
            value = call.run(LOSSES[0].reference)
            arguments = {**call.tensors, **call.options, **change}
            if "ignore_index" in change:
                arguments["target"] = torch.where(call.tensors["target"] < 0, 0, call.tensors["target"])
            changed = LOSSES[0].reference(**arguments)
            assert not torch.allclose(value, changed, rtol=1e-3), (name, change, reduction)


# ---- the losses on probabilities, by hand ----------------------------------------------------------------------------
#
# Three pixels of two classes. Under softmax their probabilities are (2/3, 1/3), (1/4, 3/4), (1/2, 1/2), under sigmoid
# (2/3, 1/2), (1/2, 3/4), (1/2, 1/2); the labels are 0, 1, 0. So under softmax
#   I = (2/3 + 1/2, 3/4)    P = (2/3 + 1/4 + 1/2, 1/3 + 3/4 + 1/2)    T = (2, 1)

LOGITS = torch.tensor([[math.log(2), 0.0], [0.0, math.log(3)], [0.0, 0.0]], dtype=torch.float64)
LABELS = torch.tensor([0, 1, 0])
SOFT = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.0, 1.0]], dtype=torch.float64)
CLASS_WEIGHT = torch.tensor([2.0, 10.0], dtype=torch.float64)
PIXEL_WEIGHT = torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64)
IOU = [(2 / 3 + 1 / 2) / (2 / 3 + 1 / 4 + 1 / 2 + 2 - 2 / 3 - 1 / 2), (3 / 4) / (1 / 3 + 3 / 4 + 1 / 2 + 1 - 3 / 4)]


def exactly(number):
    return pytest.approx(number, rel=1e-12, abs=1e-15)


def by_hand(function, input=LOGITS, target=LABELS, *args, **options):
    """The loss as a number, or as a list of the numbers of the one group."""
    value = function(input, target, *args, **options)
    return value.item() if value.dim() == 0 else value.flatten().tolist()


def areas(*args, **options):
    return [of_group.tolist()[0] for of_group in reference.overlap_statistics(*args, **options)]


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
def test_areas_by_hand(activation):
    both, predicted = {
        "softmax": ([2 / 3 + 1 / 2, 3 / 4], [2 / 3 + 1 / 4 + 1 / 2, 1 / 3 + 3 / 4 + 1 / 2]),
        "sigmoid": ([2 / 3 + 1 / 2, 3 / 4], [2 / 3 + 1 / 2 + 1 / 2, 1 / 2 + 3 / 4 + 1 / 2]),
        "none": ([math.log(2), 1], [math.log(2), math.log(3)]),  # a minimum with the label: 1 < log 3
    }[activation]
    expected = [exactly(both), exactly(predicted), [2, 1]]
    assert areas(LOGITS, LABELS, activation=activation) == expected
    one_hot = torch.tensor([[1, 0], [0, 1], [1, 0]])
    assert areas(LOGITS, one_hot.double(), activation=activation) == expected
    if activation != "softmax":
        for dtype in (torch.bool, torch.uint8, torch.int64):
            assert areas(LOGITS, one_hot.to(dtype), activation=activation) == expected


def test_areas_of_soft_labels_by_hand():
    """min(2/3, 3/4) + min(1/4, 1/2) + min(1/2, 0), and so on."""
    both, predicted, labelled = areas(LOGITS, SOFT)
    assert both == exactly([2 / 3 + 1 / 4 + 0, 1 / 4 + 1 / 2 + 1 / 2])
    assert predicted == exactly([2 / 3 + 1 / 4 + 1 / 2, 1 / 3 + 3 / 4 + 1 / 2])
    assert labelled == exactly([0.75 + 0.5 + 0, 0.25 + 0.5 + 1])
    both = areas(LOGITS, SOFT, intersection="product")[0]
    assert both == exactly([2 / 3 * 0.75 + 1 / 4 * 0.5, 1 / 3 * 0.25 + 3 / 4 * 0.5 + 1 / 2])


def test_areas_of_a_mask_by_hand():
    """Each class has a label of its own: a pixel may have both, or none."""
    mask = torch.tensor([[1, 1], [0, 1], [0, 0]])
    assert areas(LOGITS, mask, activation="sigmoid") == [
        exactly([2 / 3, 1 / 2 + 3 / 4]),
        exactly([2 / 3 + 1 / 2 + 1 / 2, 1 / 2 + 3 / 4 + 1 / 2]),
        [1, 2],
    ]


def test_areas_of_one_class_by_hand():
    """Its index is 1 where it is, 0 where it is not; as a mask the same."""
    foreground = torch.tensor([1, 0, 255])
    for target in (foreground, foreground.to(torch.uint8), foreground[:, None]):
        both, predicted, labelled = areas(LOGITS[:, :1], target, activation="sigmoid", ignore_index=255)
        assert (both, predicted, labelled) == (exactly([2 / 3]), exactly([2 / 3 + 1 / 2]), [1])
    both, predicted, labelled = areas(LOGITS[:, :1], torch.tensor([True, False, True]), activation="sigmoid")
    assert (both, predicted, labelled) == (exactly([2 / 3 + 1 / 2]), exactly([2 / 3 + 1 / 2 + 1 / 2]), [2])


def test_ignored_and_weighted_pixels_by_hand():
    both, predicted, labelled = areas(LOGITS, torch.tensor([0, 1, -7]), ignore_index=-7)
    assert (both, labelled) == (exactly([2 / 3, 3 / 4]), [1, 1])
    assert predicted == exactly([2 / 3 + 1 / 4, 1 / 3 + 3 / 4])
    # Inside [0, C) too: class 0 is then labelled nowhere.
    both, predicted, labelled = areas(LOGITS, LABELS, ignore_index=0)
    assert (both, predicted, labelled) == (exactly([0, 3 / 4]), exactly([1 / 4, 3 / 4]), [0, 1])
    both, predicted, labelled = areas(LOGITS, LABELS, pixel_weight=PIXEL_WEIGHT)
    assert both == exactly([3 * 2 / 3 + 0.5 * 1 / 2, 3 / 4])
    assert predicted == exactly([3 * 2 / 3 + 1 / 4 + 0.5 * 1 / 2, 3 * 1 / 3 + 3 / 4 + 0.5 * 1 / 2])
    assert labelled == exactly([3 + 0.5, 1])
    both, predicted, labelled = areas(LOGITS, LABELS, pixel_weight=torch.tensor([True, True, False]))
    assert (both, labelled) == (exactly([2 / 3, 3 / 4]), [1, 1])


def test_areas_of_images_by_hand():
    both, predicted, labelled = reference.overlap_statistics(LOGITS, LABELS, per_image=True)
    for got, expected in (
        (both, [[2 / 3, 0], [0, 3 / 4], [1 / 2, 0]]),
        (predicted, [[2 / 3, 1 / 3], [1 / 4, 3 / 4], [1 / 2, 1 / 2]]),
        (labelled, [[1, 0], [0, 1], [1, 0]]),
    ):
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


def test_soft_iou_by_hand():
    def iou(*args, **options):
        return by_hand(reference.soft_iou_loss, *args, **options)

    losses = [1 - IOU[0], 1 - IOU[1]]
    assert iou(reduction="none") == exactly(losses)
    assert iou(reduction="sum") == exactly(losses[0] + losses[1])
    assert iou() == exactly((losses[0] + losses[1]) / 2)
    # sum w l / sum w
    assert iou(LOGITS, LABELS, CLASS_WEIGHT) == exactly((2 * losses[0] + 10 * losses[1]) / 12)
    assert iou(LOGITS, LABELS, CLASS_WEIGHT, reduction="sum") == exactly(2 * losses[0] + 10 * losses[1])
    assert iou(LOGITS, LABELS, CLASS_WEIGHT, reduction="none") == exactly(losses)
    assert iou(classes=[1]) == exactly(losses[1])
    assert iou(classes=(1, 0), reduction="none") == exactly(losses[::-1])
    assert iou(LOGITS, LABELS, CLASS_WEIGHT, classes=(1,), reduction="sum") == exactly(10 * losses[1])
    assert iou(log=True) == exactly((-math.log(IOU[0]) - math.log(IOU[1])) / 2)
    assert iou(gamma=0.5) == exactly((losses[0] ** 0.5 + losses[1] ** 0.5) / 2)
    assert iou(gamma=2, log=True) == exactly((math.log(IOU[0]) ** 2 + math.log(IOU[1]) ** 2) / 2)
    # Areas I = (7/6, 3/4) and unions (17/12 + 2 - 7/6, 19/12 + 1 - 3/4).
    unions = [17 / 12 + 2 - 7 / 6, 19 / 12 + 1 - 3 / 4]
    assert iou(smooth=1) == exactly(1 - ((7 / 6 + 1) / (unions[0] + 1) + (3 / 4 + 1) / (unions[1] + 1)) / 2)
    assert iou(eps=5) == exactly(1 - (7 / 6 / 5 + 3 / 4 / 5) / 2)  # both unions are less than eps
    assert iou(eps=0.5, log=True) == exactly((-math.log(IOU[0]) - math.log(0.5)) / 2)  # one score is less than eps


def test_soft_iou_of_soft_labels_by_hand():
    unions = [17 / 12 + 1.25 - 11 / 12, 19 / 12 + 1.75 - 5 / 4]
    losses = [1 - 11 / 12 / unions[0], 1 - 5 / 4 / unions[1]]
    assert by_hand(reference.soft_iou_loss, LOGITS, SOFT, reduction="none") == exactly(losses)
    both = [2 / 3 * 0.75 + 1 / 4 * 0.5, 1 / 3 * 0.25 + 3 / 4 * 0.5 + 1 / 2]
    losses = [1 - both[0] / (17 / 12 + 1.25 - both[0]), 1 - both[1] / (19 / 12 + 1.75 - both[1])]
    product = by_hand(reference.soft_iou_loss, LOGITS, SOFT, intersection="product", reduction="none")
    assert product == exactly(losses)
    assert by_hand(reference.soft_iou_loss, SOFT, SOFT, activation="none") == 0


def test_means_over_images_by_hand():
    """Each pixel is an image, in which only its own label is there: IoU 2/3, 3/4 and 1/2 (of class 0, 1 and 0)."""

    def iou(target=LABELS, *args, **options):
        return by_hand(reference.soft_iou_loss, LOGITS, target, *args, per_image=True, **options)

    assert iou() == exactly((1 / 3 + 1 / 4 + 1 / 2) / 3)
    assert iou(reduction="none") == exactly([1 / 3, 0, 0, 1 / 4, 1 / 2, 0])
    assert iou(LABELS, CLASS_WEIGHT) == exactly((1 / 3 + 1 / 4 + 1 / 2) / 3)
    assert iou(LABELS, CLASS_WEIGHT, reduction="sum") == exactly(2 / 3 + 10 / 4 + 2 / 2)
    # The other class of each pixel is predicted and not labelled: a loss of 1.
    assert iou(absent="count") == exactly(((1 / 3 + 1) / 2 + (1 + 1 / 4) / 2 + (1 / 2 + 1) / 2) / 3)
    assert iou(absent="count", reduction="none") == exactly([1 / 3, 1, 1, 1 / 4, 1 / 2, 1])
    weighted = (2 / 3 + 10) / 12 + (2 + 10 / 4) / 12 + (2 / 2 + 10) / 12
    assert iou(LABELS, CLASS_WEIGHT, absent="count") == exactly(weighted / 3)
    assert iou(absent="zero") == exactly((1 / 3 / 2 + 1 / 4 / 2 + 1 / 2 / 2) / 3)
    # Class 1 counts in one image.
    assert iou(classes=(1,)) == exactly(1 / 4)
    assert iou(classes=(1,), absent="zero") == exactly(1 / 4 / 3)
    # An ignored image is none, whatever counts.
    for absent, expected in (
        ("skip", (1 / 3 + 1 / 4) / 2),
        ("count", ((1 / 3 + 1) / 2 + (1 + 1 / 4) / 2) / 2),
        ("zero", (1 / 3 / 2 + 1 / 4 / 2) / 2),
    ):
        assert iou(torch.tensor([0, 1, -100]), absent=absent) == exactly(expected)
        assert iou(pixel_weight=torch.tensor([True, True, False]), absent=absent) == exactly(expected)
        assert iou(torch.tensor([-100, -100, -100]), absent=absent) == 0


def test_absent_classes_by_hand():
    """Of the batch: class 1 is predicted, 1/3 + 1/2, but labelled nowhere."""
    logits, labels = LOGITS[[0, 2]], torch.tensor([0, 0])
    of_class_0 = 1 - (2 / 3 + 1 / 2) / 2  # P = I, T = 2
    for absent, mean, each in (
        ("skip", of_class_0, [of_class_0, 0]),
        ("count", (of_class_0 + 1) / 2, [of_class_0, 1]),
        ("zero", of_class_0 / 2, [of_class_0, 0]),
    ):
        assert by_hand(reference.soft_iou_loss, logits, labels, absent=absent) == exactly(mean)
        assert by_hand(reference.soft_iou_loss, logits, labels, absent=absent, reduction="none") == exactly(each)
    smoothed = by_hand(reference.soft_iou_loss, logits, labels, absent="count", smooth=1, reduction="none")
    assert smoothed == exactly([1 - (2 / 3 + 1 / 2 + 1) / 3, 1 - 1 / (1 / 3 + 1 / 2 + 1)])


def test_dice_by_hand():
    """2 I / (P + T), that is I over (P + T) / 2; so smooth and eps are on the scale of I."""

    def dice(**options):
        return by_hand(reference.dice_loss, reduction="none", **options)

    assert dice() == exactly([1 - 2 * 7 / 6 / (17 / 12 + 2), 1 - 2 * 3 / 4 / (19 / 12 + 1)])
    assert dice(smooth=1) == exactly([1 - (2 * 7 / 6 + 2) / (17 / 12 + 2 + 2), 1 - (2 * 3 / 4 + 2) / (19 / 12 + 1 + 2)])
    assert dice(eps=5) == exactly([1 - 7 / 6 / 5, 1 - 3 / 4 / 5])
    assert dice(log=True) == exactly([-math.log(2 * 7 / 6 / (17 / 12 + 2)), -math.log(2 * 3 / 4 / (19 / 12 + 1))])


def test_tversky_by_hand():
    """alpha is the price of what is predicted too much, P - I, beta that of what is predicted too little, T - I."""
    too_much, too_little = [17 / 12 - 7 / 6, 19 / 12 - 3 / 4], [2 - 7 / 6, 1 - 3 / 4]

    def expected(alpha, beta):
        return [
            1 - both / (both + alpha * fp + beta * fn)
            for both, fp, fn in zip((7 / 6, 3 / 4), too_much, too_little, strict=True)
        ]

    for alpha, beta in ((0.3, 0.7), (1, 0), (0, 2)):
        losses = by_hand(reference.tversky_loss, alpha=alpha, beta=beta, reduction="none")
        assert losses == exactly(expected(alpha, beta))
    focal = by_hand(reference.tversky_loss, alpha=0.3, beta=0.7, gamma=0.75)
    assert focal == exactly(sum(loss**0.75 for loss in expected(0.3, 0.7)) / 2)


def test_brier_by_hand():
    def brier(*args, **options):
        return by_hand(reference.brier_loss, *args, **options)

    # (p - y)^2 of both classes: twice the same, since they sum up to 1.
    squares = [2 * (1 / 3) ** 2, 2 * (1 / 4) ** 2, 2 * (1 / 2) ** 2]
    assert brier(reduction="none") == exactly(squares)
    assert brier(reduction="sum") == exactly(sum(squares))
    assert brier() == exactly(sum(squares) / 3)
    weighted = [6 * square for square in squares]  # (2 + 10) / 2
    assert brier(LOGITS, LABELS, CLASS_WEIGHT, reduction="none") == exactly(weighted)
    assert brier(LOGITS, LABELS, CLASS_WEIGHT) == exactly(sum(weighted) / 3)  # sum m, and no class weights
    weighted = [3 * squares[0], squares[1], 0.5 * squares[2]]
    assert brier(pixel_weight=PIXEL_WEIGHT, reduction="none") == exactly(weighted)
    assert brier(pixel_weight=PIXEL_WEIGHT) == exactly(sum(weighted) / 4.5)
    ignored = torch.tensor([0, 1, 255])
    assert brier(LOGITS, ignored, ignore_index=255, reduction="none") == exactly([*squares[:2], 0])
    assert brier(LOGITS, ignored, ignore_index=255) == exactly((squares[0] + squares[1]) / 2)
    sigmoid = [(1 / 3) ** 2 + (1 / 2) ** 2, (1 / 2) ** 2 + (1 / 4) ** 2, (1 / 2) ** 2 + (1 / 2) ** 2]
    assert brier(activation="sigmoid", reduction="none") == exactly(sigmoid)
    soft = [(2 / 3 - 3 / 4) ** 2 + (1 / 3 - 1 / 4) ** 2, (1 / 4) ** 2 + (1 / 4) ** 2, (1 / 2) ** 2 + (1 / 2) ** 2]
    assert brier(LOGITS, SOFT, reduction="none") == exactly(soft)
    given = [(0.75 - 1) ** 2 + 0.25**2, 0.5**2 + (0.5 - 1) ** 2, 1 + 1]
    assert brier(SOFT, LABELS, activation="none", reduction="none") == exactly(given)
    mask = torch.tensor([[1, 1], [0, 1], [0, 0]])
    squares = [(1 / 3) ** 2 + (1 / 2) ** 2, (1 / 2) ** 2 + (1 / 4) ** 2, (1 / 2) ** 2 + (1 / 2) ** 2]
    assert brier(LOGITS, mask, activation="sigmoid", reduction="none") == exactly(squares)


def cross_entropy_term(input=LOGITS, target=LABELS, *args, **options):
    return by_hand(reference.segmentation_loss, input, target, *args, iou=0.0, **options)


def test_cross_entropy_term_of_softmax_by_hand():
    """The divisor is sum m w_y for indices, sum m for probabilities."""
    ce = [math.log(3 / 2), math.log(4 / 3), math.log(2)]  # of the labels 0, 1, 0
    assert cross_entropy_term() == exactly(sum(ce) / 3)
    assert cross_entropy_term(LOGITS, LABELS, CLASS_WEIGHT) == exactly((2 * ce[0] + 10 * ce[1] + 2 * ce[2]) / 14)
    assert cross_entropy_term(pixel_weight=PIXEL_WEIGHT) == exactly((3 * ce[0] + ce[1] + 0.5 * ce[2]) / 4.5)
    both = cross_entropy_term(LOGITS, LABELS, CLASS_WEIGHT, pixel_weight=PIXEL_WEIGHT)
    assert both == exactly((3 * 2 * ce[0] + 10 * ce[1] + 0.5 * 2 * ce[2]) / (3 * 2 + 10 + 0.5 * 2))
    assert cross_entropy_term(LOGITS, torch.tensor([0, 1, -100])) == exactly((ce[0] + ce[1]) / 2)
    assert cross_entropy_term(LOGITS, torch.tensor([-100, -100, -100])) == 0
    other = [math.log(3), math.log(4), math.log(2)]  # of the other class
    # (1 - 0.2) of the label, 0.1 of each class; its weight goes with each class.
    smoothed = [0.8 * a + 0.1 * (a + b) for a, b in zip(ce, other, strict=True)]
    assert cross_entropy_term(label_smoothing=0.2) == exactly(sum(smoothed) / 3)
    smoothed = [w * 0.8 * a + 0.1 * (w * a + (12 - w) * b) for a, b, w in zip(ce, other, (2, 10, 2), strict=True)]
    assert cross_entropy_term(LOGITS, LABELS, CLASS_WEIGHT, label_smoothing=0.2) == exactly(sum(smoothed) / 14)
    soft = 0.75 * ce[0] + 0.25 * other[0] + 0.5 * (ce[1] + other[1]) + math.log(2)
    assert cross_entropy_term(LOGITS, SOFT) == exactly(soft / 3)
    soft = 2 * 0.75 * ce[0] + 10 * 0.25 * other[0] + 0.5 * (10 * ce[1] + 2 * other[1]) + 10 * math.log(2)
    assert cross_entropy_term(LOGITS, SOFT, CLASS_WEIGHT) == exactly(soft / 3)


def test_cross_entropy_term_of_sigmoid_by_hand():
    """The mean over the classes of each pixel, over sum m."""
    mask = torch.tensor([[1, 1], [0, 1], [0, 0]])
    # -log p where the mask is 1, -log (1 - p) where it is 0.
    losses = [[-math.log(2 / 3), math.log(2)], [math.log(2), -math.log(3 / 4)], [math.log(2), math.log(2)]]

    def bce(*args, **options):
        return cross_entropy_term(LOGITS, mask, *args, activation="sigmoid", **options)

    assert bce() == exactly(sum(a + b for a, b in losses) / 2 / 3)
    assert bce(CLASS_WEIGHT) == exactly(sum(2 * a + 10 * b for a, b in losses) / 2 / 3)
    weighted = sum(m * (a + b) for m, (a, b) in zip((3, 1, 0.5), losses, strict=True))
    assert bce(pixel_weight=PIXEL_WEIGHT) == exactly(weighted / 2 / 4.5)
    pos_weight = torch.tensor([4.0, 5.0])  # times the losses where the mask is 1
    positive = 4 * losses[0][0] + 5 * losses[0][1] + losses[1][0] + 5 * losses[1][1] + sum(losses[2])
    assert bce(pos_weight=pos_weight) == exactly(positive / 2 / 3)
    # 1 becomes 0.9 and 0 becomes 0.1: (1 - 0.2) y + 0.2 / 2.
    other = [[math.log(3), math.log(2)], [math.log(2), math.log(4)], [math.log(2), math.log(2)]]
    smoothed = [0.9 * a + 0.1 * b for x, y in zip(losses, other, strict=True) for a, b in zip(x, y, strict=True)]
    assert bce(label_smoothing=0.2) == exactly(sum(smoothed) / 2 / 3)
    foreground = torch.tensor([1, 0, 1])
    one = cross_entropy_term(LOGITS[:, :1], foreground, activation="sigmoid", pos_weight=pos_weight[:1])
    assert one == exactly((4 * math.log(3 / 2) + math.log(2) + 4 * math.log(2)) / 3)


def test_sum_of_terms_by_hand():
    cross_entropy = (math.log(3 / 2) + math.log(4 / 3) + math.log(2)) / 3
    iou = 1 - (IOU[0] + IOU[1]) / 2
    brier = (2 * (1 / 3) ** 2 + 2 * (1 / 4) ** 2 + 2 * (1 / 2) ** 2) / 3
    assert by_hand(reference.segmentation_loss) == exactly(cross_entropy + iou)
    loss, terms = reference.segmentation_loss(
        LOGITS.clone().requires_grad_(), LABELS, cross_entropy=0.5, iou=2, brier=-3.0, return_terms=True
    )
    assert loss.item() == exactly(0.5 * cross_entropy + 2 * iou - 3 * brier)
    assert loss.requires_grad
    assert not any(term.requires_grad for term in terms.values())
    got = {name: term.item() for name, term in terms.items()}
    assert got == {"cross_entropy": exactly(cross_entropy), "iou": exactly(iou), "brier": exactly(brier)}
    loss, terms = reference.segmentation_loss(LOGITS, LABELS, cross_entropy=0, return_terms=True)
    assert (loss.item(), list(terms)) == (exactly(iou), ["iou"])
    # alpha and beta, classes and groups are of the overlap alone, label smoothing of the cross-entropy alone.
    loss, terms = reference.segmentation_loss(
        LOGITS,
        LABELS,
        brier=1.0,
        alpha=0.5,
        beta=0.5,
        classes=(0,),
        label_smoothing=0.2,
        return_terms=True,
    )
    smoothed = 0.8 * cross_entropy + 0.1 * (cross_entropy + (math.log(3) + math.log(4) + math.log(2)) / 3)
    got = {name: term.item() for name, term in terms.items()}
    dice = 1 - 2 * 7 / 6 / (17 / 12 + 2)
    assert got == {"cross_entropy": exactly(smoothed), "iou": exactly(dice), "brier": exactly(brier)}


def test_gradient_of_an_overlap_by_hand():
    """One class, labelled at the first of two pixels: IoU = p / (1 + q)."""
    input = torch.tensor([[0.75], [0.25]], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[1.0], [0.0]], dtype=torch.float64, requires_grad=True)
    value = reference.soft_iou_loss(input, target, activation="none")
    of_input, of_target = torch.autograd.grad(value, (input, target))
    assert value.item() == exactly(1 - 0.75 / 1.25)
    assert of_input.flatten().tolist() == exactly([-1 / 1.25, 0.75 / 1.25**2])
    # With labels y and z: I = 0.75 + z where y > 0.75 and z < 0.25, U = 0.25 + y. So dI/dz = 1, and dU/dz = 0.
    assert of_target.flatten().tolist() == exactly([0.75 / 1.25**2, -1 / 1.25])


def test_gradients_of_areas_at_a_tie_by_hand():
    """Half for the probability and half for the label."""
    input = torch.tensor([[0.75], [0.25], [0.5]], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[1.0], [0.25], [0.0]], dtype=torch.float64, requires_grad=True)
    both, _, _ = reference.overlap_statistics(input, target, activation="none")
    of_input, of_target = torch.autograd.grad(both.sum(), (input, target))
    assert of_input.flatten().tolist() == [1.0, 0.5, 0.0]
    assert of_target.flatten().tolist() == [0.0, 0.5, 1.0]


def test_nonsense_on_probabilities_is_refused():
    one_class, overlaps = torch.zeros(3, 1), (reference.soft_iou_loss, reference.dice_loss)
    for function in (*overlaps, reference.brier_loss, reference.segmentation_loss, reference.overlap_statistics):
        for args, options in (
            ((LOGITS[0], LABELS[0]), {}),
            ((LOGITS, LABELS[:2]), {}),
            ((LOGITS, SOFT[:1]), {}),
            ((LOGITS, LABELS[:, None]), {}),
            ((LOGITS, SOFT > 0), {}),  # a mask is for sigmoid
            ((LOGITS, SOFT), {"ignore_index": 1}),
            ((one_class, LABELS), {}),  # softmax of one class
            ((LOGITS, LABELS), {"activation": "tanh"}),
        ):
            with pytest.raises(ValueError, match=r"target|input|ignore_index|softmax|activation"):
                function(*args, **options)
        if function is not reference.brier_loss:
            with pytest.raises(ValueError, match="intersection"):
                function(LOGITS, LABELS, intersection="max")
    for function in overlaps:
        with pytest.raises(ValueError, match="absent"):
            function(LOGITS, LABELS, absent="keep")
    for function in (*overlaps, reference.brier_loss):
        with pytest.raises(ValueError, match="reduction"):
            function(LOGITS, LABELS, reduction="average")
    with pytest.raises(ValueError, match="cross_entropy"):
        reference.segmentation_loss(SOFT, LABELS, activation="none")
