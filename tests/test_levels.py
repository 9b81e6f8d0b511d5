"""Every instruction-set level that this machine can run is right, and the levels agree with each other."""

import json
import os
import subprocess
import sys

import pytest
import torch

import fusedloss
from fusedloss import _C

from .compare import check, evaluate
from .registry import (
    CROSS_ENTROPY,
    MSE_LOSS,
    SEGMENTATION_LOSS,
    Maker,
    difference,
    each_case,
    each_dtype,
    each_reduction,
    indices,
    on_pixels,
    probabilities,
)
from .tolerance import assert_no_worse

LEVELS = _C.cpu_capabilities()


@pytest.fixture(params=LEVELS)
def level(request):
    before = _C.get_cpu_capability()
    _C.set_cpu_capability(request.param)
    yield request.param
    _C.set_cpu_capability(before)


def test_levels_are_known():
    assert LEVELS[0] == "base"
    assert set(LEVELS) <= {"base", "avx2", "avx512"}
    assert _C.get_cpu_capability() in LEVELS


def test_the_level_is_set(level):
    assert _C.get_cpu_capability() == level


@each_reduction
@each_dtype
@each_case
def test_small_calls(case, dtype, reduction, level):
    check(case.loss, case.make(dtype, reduction=reduction), with_torch=False)


@each_dtype
@pytest.mark.parametrize("layout", ["planes", "rows", "channels_last"])
@pytest.mark.parametrize("classes", [2, 5, 17, 150])
def test_sizes_around_lanes_and_blocks(classes, layout, dtype, level):
    for pixels in (*range(1, 36), 63, 64, 65, 127, 128, 129, 257):
        m = Maker(dtype, seed=pixels)
        input, labels = m.normal(2, classes, pixels), m.labels(classes, 2, pixels, ignored=-100)
        soft = m.probabilities(2, classes, pixels)
        if layout == "rows":
            input, labels, soft = (
                t.movedim(1, -1).flatten(0, 1) if t.dim() == 3 else t.flatten() for t in (input, labels, soft)
            )
        elif layout == "channels_last":
            input, soft = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (input, soft))
        call = indices(input, labels, m.positive(classes), label_smoothing=0.1, reduction="none")
        check(CROSS_ENTROPY, call, with_torch=False, what=f"{pixels} pixels")
        if pixels % 7 == 1:
            check(CROSS_ENTROPY, probabilities(input, soft), with_torch=False, what=f"{pixels} pixels")
            check(SEGMENTATION_LOSS, on_pixels(input, soft, brier=1.0), with_torch=False, what=f"{pixels} pixels")
        if pixels % 3 == 1:
            check(SEGMENTATION_LOSS, on_pixels(input, labels, brier=1.0), with_torch=False, what=f"{pixels} pixels")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_digits_of_the_exponential(dtype, level):
    """exp(x) may lose |x| / 2 units of the last place (csrc/math/elementary.h); 6 are for the rest of p / (1 + p)."""
    x = torch.linspace(-85, 0, 1 << 16, dtype=dtype)
    input = torch.stack([torch.zeros_like(x), x])[None].requires_grad_()
    loss = fusedloss.cross_entropy(input, torch.zeros(1, len(x), dtype=torch.int64), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, input)
    truth = torch.sigmoid(x.double())
    units = (gradient[0, 1].double() - truth).abs() / truth / torch.finfo(dtype).eps
    assert (units <= 6 - x / 2).all()


@pytest.mark.parametrize("classes", [150, 1000, 5000])
def test_digits_of_a_squared_error_of_many_classes(classes, level):
    """The label's share is almost 1, and each of thousands of others a few units of its last place."""
    m = Maker(torch.float32)
    input, labels = m.normal(2, classes, 70), m.labels(classes, 2, 70)
    value = fusedloss.brier_loss(input, labels, reduction="none").double()
    truth = fusedloss.reference.brier_loss(input.double(), labels, reduction="none")
    assert ((value - truth).abs() <= 8 * torch.finfo(torch.float32).eps * truth).all()


@each_dtype
def test_elements_around_lanes_and_blocks(dtype, level):
    for elements in (*range(1, 71), 127, 129, 255, 257, 1023, 1025):
        m = Maker(dtype, seed=elements)
        call = difference(m.normal(elements), m.normal(elements), m.positive(elements)).with_options(reduction="sum")
        check(MSE_LOSS, call, with_torch=False, what=f"{elements} elements")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_levels_agree(dtype):
    """To within what either may be from the truth; the order of a sum depends on the width of a vector."""
    m = Maker(dtype)
    jobs = [
        (CROSS_ENTROPY, indices(m.normal(2, 21, 31, 33), m.labels(21, 2, 31, 33), m.positive(21), label_smoothing=0.1)),
        (CROSS_ENTROPY, indices(m.normal(300, 1001), m.labels(1001, 300))),
        (CROSS_ENTROPY, probabilities(m.normal(2, 21, 31, 33), m.probabilities(2, 21, 31, 33))),
        (SEGMENTATION_LOSS, on_pixels(m.normal(2, 21, 31, 33), m.labels(21, 2, 31, 33), m.positive(21), brier=1.0)),
        (SEGMENTATION_LOSS, on_pixels(m.normal(2, 5, 31, 33), m.probabilities(2, 5, 31, 33), activation="sigmoid")),
        (MSE_LOSS, difference(m.normal(70001), m.normal(70001), m.positive(70001))),
    ]
    before = _C.get_cpu_capability()
    try:
        for loss, call in jobs:
            results = {}
            for name in LEVELS:
                _C.set_cpu_capability(name)
                value, gradients = evaluate(loss.function, call, call.differentiable, torch.ones(()))
                results[name] = [value, *gradients.values()]
            for name in LEVELS[1:]:
                for one, other in zip(results[name], results["base"], strict=True):
                    assert_no_worse(one, None, other.double(), f"{loss.name} at {name}")
    finally:
        _C.set_cpu_capability(before)


@pytest.mark.parametrize("name", ["", "sse9", "AVX2 ", "default"])
def test_unknown_level(name):
    with pytest.raises(ValueError, match="base"):
        _C.set_cpu_capability(name)
    assert _C.get_cpu_capability() in LEVELS


def test_level_that_this_machine_cannot_run():
    for name in {"avx2", "avx512"} - set(LEVELS):
        with pytest.raises(ValueError, match=name):
            _C.set_cpu_capability(name)


def level_of_a_new_process(**environment):
    program = (
        "import json, warnings, torch\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    from fusedloss import _C\n"
        "print(json.dumps([_C.get_cpu_capability(), [str(w.message) for w in caught]]))\n"
    )
    names = ("FUSEDLOSS_CPU_CAPABILITY", "ATEN_CPU_CAPABILITY")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", program], env=clean | environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", LEVELS)
def test_level_from_the_environment(name):
    assert level_of_a_new_process(FUSEDLOSS_CPU_CAPABILITY=name) == [name, []]


def test_highest_level_without_a_word():
    assert level_of_a_new_process() == [LEVELS[-1], []]


def test_torch_setting_is_an_upper_bound():
    assert level_of_a_new_process(ATEN_CPU_CAPABILITY="default")[0] == "base"
    assert level_of_a_new_process(ATEN_CPU_CAPABILITY="avx2")[0] == ("avx2" if "avx2" in LEVELS else "base")


def test_unknown_level_in_the_environment_is_said_and_ignored():
    name, warnings = level_of_a_new_process(FUSEDLOSS_CPU_CAPABILITY="sse9")
    assert name == LEVELS[-1]
    assert len(warnings) == 1
    assert "sse9" in warnings[0]
