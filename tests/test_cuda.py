"""What holds on a GPU alone: nothing waits, launches are counted, graphs replay, a bad label does not end the context.

The other files run on a GPU too, where there is one (the fixture ``device``).
"""

import itertools
import re
import warnings

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import fusedloss
from fusedloss import _ops

from .compare import random_like
from .registry import (
    CROSS_ENTROPY,
    LOSSES,
    MSE_LOSS,
    OVERLAP_STATISTICS,
    SEGMENTATION_LOSS,
    Case,
    Maker,
    difference,
    each_dtype,
    each_loss,
    each_typical_case,
    indices,
    on_pixels,
)
from .test_layouts import check_in_layout, poison

if not torch.cuda.is_available():
    WHY_NOT = "no GPU here"
elif _ops.CUDA_REFUSED is not None:
    WHY_NOT = f"no CUDA kernels: {_ops.CUDA_REFUSED}"
else:
    WHY_NOT = None
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]

CUDA = "cuda"
SMALL = 4 << 20  # bytes of what does not grow with the tensors: partial sums, tables, results
ON_PIXELS = [loss for loss in LOSSES if loss is not MSE_LOSS]
each_labelled = pytest.mark.parametrize("loss", [pytest.param(loss, id=loss.name) for loss in ON_PIXELS])


@pytest.fixture(autouse=True)
def nothing_remembered():
    """Neither from the test before, nor for the one after."""
    yield
    fusedloss.set_label_checks("async")
    try:
        fusedloss.check_labels()
    except IndexError:
        fusedloss.check_labels()


def leaves_of(call):
    return [call.tensors[name] for name in call.differentiable]


def stepper(loss, call):
    """A function that computes the value and all gradients anew, and allocates nothing on the host's side."""
    leaves = leaves_of(call)
    ones = torch.ones_like(call.run(loss.function))

    def step():
        value = call.run(loss.function)
        return [value, *torch.autograd.grad(value, leaves, ones)]

    return step


def plain_calls(dtype=torch.float32, elements=400_000):
    """Of each family, one that needs no copy and no conversion, and the gradient of the input alone."""
    m = Maker(dtype, CUDA)
    height = elements // (2 * 19 * 64)
    image, labels = m.normal(2, 19, height, 64), m.labels(19, 2, height, 64, ignored=-100)
    last = image.to(memory_format=torch.channels_last)
    weight = m.positive(19)
    yield "cross_entropy", CROSS_ENTROPY, indices(image, labels, weight, label_smoothing=0.1)
    yield "cross_entropy, channels_last", CROSS_ENTROPY, indices(last, labels, weight)
    yield "cross_entropy, rows", CROSS_ENTROPY, indices(m.normal(512, 777), m.labels(777, 512))
    yield "segmentation", SEGMENTATION_LOSS, on_pixels(image, labels, weight, brier=0.5)
    yield "segmentation, channels_last", SEGMENTATION_LOSS, on_pixels(last, labels, brier=0.5, per_image=True)
    yield "segmentation, sigmoid", SEGMENTATION_LOSS, on_pixels(image, labels, activation="sigmoid")
    yield "mse_loss", MSE_LOSS, difference(m.normal(elements), m.normal(elements))


# ---- nothing waits ---------------------------------------------------------------------------------------------------


@each_loss
def test_nothing_waits_for_the_device(loss):
    for name, reduction in itertools.product(loss.cases, loss.reductions or ("mean",)):
        call = Case(loss, name).make(torch.float32, CUDA, reduction)
        step = stepper(loss, call.requiring_grad(call.differentiable))
        step()
        with warnings.catch_warnings():
            # Said once a process, when the mode is already on; a warning of ours is still an error.
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
            try:
                torch.cuda.set_sync_debug_mode("error")
                step()
            finally:
                torch.cuda.set_sync_debug_mode("default")


@each_typical_case
def test_captured_in_a_graph(case):
    """Forward and backward; a replay reads what then lies in the tensors, and gives the bits of an ordinary call."""
    static = case.make(torch.float32, CUDA).map(torch.clone)
    call = static.requiring_grad(static.differentiable)
    step = stepper(case.loss, call)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for seed in (1, 2, 1):
        numbers = case.make(torch.float32, CUDA, seed=seed)
        for name, tensor in call.tensors.items():
            tensor.detach().copy_(numbers.tensors[name])
        graph.replay()
        expected = stepper(case.loss, numbers.requiring_grad(numbers.differentiable))()
        for one, other in zip(results, expected, strict=True):
            assert torch.equal(one, other)


def kernels_of(work):
    work()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        result = work()
        torch.cuda.synchronize()
    del result
    on_device = [e.name for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [name for name in on_device if not name.startswith(("Memcpy", "Memset"))]


def test_number_of_launches():
    """Two forward, one to visit and one to finish, and one backward."""
    for what, loss, plain in plain_calls():
        call = plain.requiring_grad(["input"])
        forward = kernels_of(lambda call=call, loss=loss: call.run(loss.function))
        assert 1 <= len(forward) <= 2, (what, forward)
        value = call.run(loss.function)
        one = torch.ones_like(value)
        leaf = call.tensors["input"]
        backward = kernels_of(lambda v=value, x=leaf, g=one: torch.autograd.grad(v, x, g, retain_graph=True))
        assert len(backward) == 1, (what, backward)


def test_launches_are_counted():
    x = torch.zeros(1000, device=CUDA)
    assert len(kernels_of(lambda: (x + 1) * 2)) == 2


def test_runs_on_the_current_stream():
    """After what was given to that stream before, which here takes long."""
    stream = torch.cuda.Stream()
    for what, loss, plain in plain_calls():
        call = plain.requiring_grad(["input"])
        leaf = call.tensors["input"]
        numbers = leaf.detach().clone()
        one = torch.ones_like(call.run(loss.function))
        expected = torch.autograd.grad(call.run(loss.function), leaf, one)[0]
        leaf.detach().zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            leaf.detach().copy_(numbers)
            gradient = torch.autograd.grad(call.run(loss.function), leaf, one)[0]
        stream.synchronize()
        assert torch.equal(gradient, expected), what


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU at most")
def test_another_device_than_the_current_one():
    m = Maker(torch.float32, "cuda:1")
    logits, labels = m.normal(2, 5, 30, 40).requires_grad_(), m.labels(5, 2, 30, 40)
    with torch.cuda.device(0):
        loss = fusedloss.segmentation_loss(logits, labels)
        loss.backward()
        assert torch.cuda.current_device() == 0
        assert loss.device == logits.grad.device == torch.device("cuda", 1)
        expected = fusedloss.segmentation_loss(logits.detach().to("cuda:0"), labels.to("cuda:0"))
        assert loss.item() == expected.item()
        with pytest.raises(
            ValueError, match=r"segmentation_loss: `target` must be on input's device, cuda:1, got cuda:0"
        ):
            fusedloss.segmentation_loss(logits, labels.to("cuda:0"))
        fusedloss.cross_entropy(logits, torch.full_like(labels, 5))
        fusedloss.check_labels(0)
        with pytest.raises(IndexError, match="cuda:1"):
            fusedloss.check_labels()


def test_cpu_and_gpu_in_one_call_are_refused():
    logits, labels = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
    for loss in LOSSES:
        target = logits if loss is MSE_LOSS else labels
        for arguments in ((logits.to(CUDA), target), (logits, target.to(CUDA))):
            with pytest.raises(ValueError, match=f"{loss.name}: `target` must be on input's device"):
                loss.function(*arguments, **loss.required) if loss is not OVERLAP_STATISTICS else (
                    fusedloss.overlap_statistics(*arguments)
                )


# ---- the same numbers ------------------------------------------------------------------------------------------------


@each_dtype
@each_loss
def test_agrees_with_the_cpu(loss, dtype):
    for name, reduction in itertools.product(loss.cases, loss.reductions or ("mean",)):
        results = []
        for device in (CUDA, "cpu"):
            plain = Case(loss, name).make(dtype, device, reduction)
            call = plain.requiring_grad(plain.differentiable)
            value = call.run(loss.function)
            results.append([value, *torch.autograd.grad(value, leaves_of(call), random_like(value))])
        for one, other in zip(*results, strict=True):
            assert one.device.type == CUDA
            assert one.stride() == other.stride()
            torch.testing.assert_close(one.cpu(), other, msg=lambda text, at=(name, reduction): f"{at}: {text}")


@pytest.mark.parametrize("deterministic", [False, True], ids=["as it comes", "deterministic"])
@each_loss
def test_the_same_bits_on_every_run(loss, deterministic):
    """While another stream keeps the device busy, so that blocks run in another order each time."""
    plain = loss.large(Maker(torch.float32, CUDA), 3_000_000)
    step = stepper(loss, plain.requiring_grad(plain.differentiable))
    noise, stream = torch.randn(2048, 2048, device=CUDA), torch.cuda.Stream()
    torch.use_deterministic_algorithms(deterministic)
    try:
        expected = step()
        for run in range(10):
            with torch.cuda.stream(stream):
                for _ in range(run):
                    noise.sin_()
            for one, other in zip(step(), expected, strict=True):
                assert torch.equal(one, other)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.cuda.synchronize()


@each_loss
def test_misaligned_starts(loss):
    """16 bytes at once are loaded only where they may be."""
    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    for name, dtype, start in itertools.product(loss.typical, dtypes, (1, 2, 3, 5, 8)):

        def shifted(tensor, start=start):
            if tensor.dim() == 0:
                return tensor
            storage = poison(tensor, (tensor.numel() + start,))
            storage[start:] = tensor.reshape(-1)
            return storage[start:].view(tensor.shape)

        call = Case(loss, name).make(dtype, CUDA)
        for names in (list(call.tensors), *([one] for one in call.tensors)):
            check_in_layout(loss, call, names, shifted, f"{name}, {dtype}, {names} from {start}:")


# ---- memory ----------------------------------------------------------------------------------------------------------


def peak_bytes(work):
    """The most that was allocated at once while ``work`` ran, beyond what there was before."""
    work()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = work()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory(dtype):
    """The gradient, 8 bytes a pixel, and a few MB."""
    for what, loss, plain in plain_calls(dtype, 40_000_000):
        call = plain.requiring_grad(["input"])
        input = call.tensors["input"]
        one = torch.ones_like(call.run(loss.function))
        pixels = 0 if loss is MSE_LOSS else input.numel() // input.shape[1]
        used = peak_bytes(lambda c=call, f=loss, x=input, g=one: torch.autograd.grad(c.run(f.function), x, g))
        assert used <= input.nbytes + 8 * pixels + SMALL, what
        with torch.no_grad():
            assert peak_bytes(lambda c=call, f=loss: c.run(f.function)) <= SMALL, what


@pytest.mark.large
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_more_elements_than_31_bits_count(memory_format):
    """2.5e9 logits. The last rows of the last image, computed by themselves, say what is right there."""
    if torch.cuda.get_device_properties(0).total_memory < 30e9:
        pytest.skip("takes 20 GB of the device's memory")
    side, rows = 8192, 4
    generator = torch.Generator(CUDA).manual_seed(0)
    logits = torch.empty(2, 19, side, side, dtype=torch.bfloat16, device=CUDA, memory_format=memory_format)
    logits.normal_(generator=generator)
    labels = torch.randint(19, (2, side, side), dtype=torch.uint8, device=CUDA, generator=generator)
    assert logits.numel() > 2**31
    end, end_labels = logits[1:, :, -rows:].clone().requires_grad_(), labels[1:, -rows:]
    logits.requires_grad_()
    torch.testing.assert_close(
        fusedloss.cross_entropy(logits.detach(), labels, reduction="none")[1:, -rows:],
        fusedloss.cross_entropy(end.detach(), end_labels, reduction="none"),
    )
    for loss in (fusedloss.cross_entropy, fusedloss.brier_loss):
        (gradient,) = torch.autograd.grad(loss(logits, labels, reduction="sum"), logits)
        (expected,) = torch.autograd.grad(loss(end, end_labels, reduction="sum"), end)
        torch.testing.assert_close(gradient[1:, :, -rows:], expected)
        del gradient
    _, _, labelled = fusedloss.overlap_statistics(logits.detach(), labels)
    assert labelled.double().sum().item() == pytest.approx(labels.numel(), rel=1e-6)


# ---- labels that are none --------------------------------------------------------------------------------------------


def with_a_bad_label(loss, device=CUDA, label=7, reduction="mean"):
    m = Maker(torch.float32, device)
    labels = m.labels(5, 2, 9, 40)
    labels[1, 3, 7] = label
    call = on_pixels(m.normal(2, 5, 9, 40), labels, **loss.required)
    return call.with_options(reduction=reduction) if loss.reductions else call


def assert_the_context_is_alive():
    torch.cuda.synchronize()
    assert torch.ones(3, device=CUDA).sum().item() == 3.0


@pytest.mark.parametrize("label", [5, 7, -1, 2**31, -(2**63), 2**63 - 1])
@each_labelled
def test_a_bad_label_is_nan_and_remembered(loss, label):
    call = with_a_bad_label(loss, label=label).requiring_grad(["input"])
    value = call.run(loss.function)
    (gradient,) = torch.autograd.grad(value.sum(), call.tensors["input"])
    assert value.isnan().any()
    assert gradient[1, :, 3, 7].isnan().all()
    assert_the_context_is_alive()
    flat = (1 * 9 + 3) * 40 + 7
    wanted = rf"^check_labels: target at flat position {flat} .*\[0, 5\).*got {label} in an earlier call on cuda:0$"
    with pytest.raises(IndexError, match=wanted):
        fusedloss.check_labels()
    fusedloss.check_labels()
    fusedloss.check_labels(0)
    fusedloss.check_labels(CUDA)


@pytest.mark.parametrize("name", ["cross_entropy", "brier_loss"])
def test_a_bad_label_is_nan_in_its_pixel_alone(name):
    loss = getattr(fusedloss, name)
    call = with_a_bad_label(CROSS_ENTROPY, reduction="none").requiring_grad(["input"])
    value = call.run(loss)
    (gradient,) = torch.autograd.grad(value, call.tensors["input"], torch.ones_like(value))
    elsewhere = torch.ones(2, 9, 40, dtype=torch.bool, device=CUDA)
    elsewhere[1, 3, 7] = False
    assert torch.equal(value.isnan(), ~elsewhere)
    assert torch.equal(gradient.isnan(), (~elsewhere).unsqueeze(1).expand_as(gradient))


@each_labelled
def test_in_each_call_it_raises_as_on_the_cpu(loss):
    with pytest.raises(IndexError) as on_cpu:
        with_a_bad_label(loss, "cpu").run(loss.function)
    fusedloss.set_label_checks("sync")
    with pytest.raises(IndexError, match=f"^{re.escape(str(on_cpu.value))}$"):
        with_a_bad_label(loss).run(loss.function)
    with_a_bad_label(loss, label=4).run(loss.function)
    fusedloss.check_labels()
    assert_the_context_is_alive()


def test_a_bad_number_in_a_mask():
    mask = torch.zeros(2, 5, 9, 40, dtype=torch.int64, device=CUDA)
    mask[1, 2, 3, 7] = 9
    logits = torch.zeros(2, 5, 9, 40, device=CUDA)
    assert fusedloss.dice_loss(logits, mask, activation="sigmoid").isnan()
    with pytest.raises(IndexError):
        fusedloss.check_labels()
    fusedloss.set_label_checks("sync")
    with pytest.raises(IndexError, match=r"^dice_loss: target at \(1, 2, 3, 7\) must be 0 or 1 in a mask, got 9$"):
        fusedloss.dice_loss(logits, mask, activation="sigmoid")


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_a_bad_label_under_capture(mode):
    """NaN and the record, in either mode: nothing may wait while a graph is captured."""
    call = with_a_bad_label(CROSS_ENTROPY, label=4)
    call.run(fusedloss.cross_entropy)
    fusedloss.set_label_checks(mode)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = call.run(fusedloss.cross_entropy)
        with pytest.raises(RuntimeError, match=r"check_labels: .*captured"):
            fusedloss.check_labels()
    call.tensors["target"][0, 0, 1] = 77
    graph.replay()
    with pytest.raises(IndexError, match=r"flat position 1 .*got 77"):
        fusedloss.check_labels()
    assert value.isnan()


@pytest.mark.parametrize("transform", ["grad", "jvp", "create_graph"])
@each_labelled
def test_a_bad_label_under_transforms_does_not_end_the_context(loss, transform):
    """There the reference formula runs, whose indexing would."""
    call = with_a_bad_label(loss)
    function, (logits,) = call.on(lambda **arguments: loss.function(**arguments).sum(), ["input"])
    if transform == "grad":
        result = torch.func.grad(function)(logits)
    elif transform == "jvp":
        result = torch.func.jvp(function, (logits,), (torch.ones_like(logits),))[0]
    else:
        logits = logits.clone().requires_grad_()
        result = torch.autograd.grad(function(logits), logits, create_graph=True)[0]
    assert result.isnan().any()
    assert_the_context_is_alive()
