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
