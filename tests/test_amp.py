"""Mixed precision: half logits are read as they are, and a loss scale gives the gradients that it is there for."""

import pytest
import torch

from .registry import Maker, each_loss
from .test_memory import SMALL, bytes_of, peak_bytes

HALF = [pytest.param(d, id=str(d).removeprefix("torch.")) for d in (torch.float16, torch.bfloat16)]
SCALE = 2.0**16  # what torch.amp.GradScaler begins with

each_half = pytest.mark.parametrize("dtype", HALF)


def under_autocast(function, call, dtype, device):
    with torch.autocast(device, dtype=dtype):
        return call.run(function)


def pixels_of(loss, logits):
    return logits.numel() if loss.name == "mse_loss" else logits.numel() // logits.shape[1]


# ---- no copy in float32 ----------------------------------------------------------------------------------------------


@each_half
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@each_loss
def test_half_logits_are_read_as_they_are(loss, memory_format, dtype):
    """Counted in bytes: no copy of the logits in float32, forward or backward, and the gradient is of two bytes too."""
    call = loss.large(Maker(dtype), 200_000)
    if loss.name != "mse_loss":
        call = call.map(lambda t: t.contiguous(memory_format=memory_format), ["input"])
    logits = call.tensors["input"]
    assert peak_bytes(lambda: under_autocast(loss.function, call, dtype, "cpu")) <= SMALL
    call = call.with_tensors(input=logits.clone().requires_grad_())
    gradients = []

    def step():
        value = under_autocast(loss.function, call, dtype, "cpu")
        assert value.dtype == torch.float32
        gradients[:] = torch.autograd.grad(value.sum(), call.tensors["input"])

    assert bytes_of(logits) > 4 * SMALL  # or a copy could hide in it
    statistics = 0 if loss.name == "mse_loss" else 8 * pixels_of(loss, logits)
    assert peak_bytes(step) <= bytes_of(logits) + statistics + SMALL
    assert gradients[0].dtype == dtype


@each_half
@each_loss
def test_a_copy_in_float32_would_be_seen(loss, dtype):
    call = loss.large(Maker(dtype), 200_000)

    def with_copy(input, **arguments):
        return loss.function(input.float(), **arguments)

    copied = 2 * bytes_of(call.tensors["input"])
    assert copied <= peak_bytes(lambda: under_autocast(with_copy, call, dtype, "cpu")) <= copied + SMALL


@each_half
@each_loss
def test_the_logits_of_a_network_under_autocast(loss, dtype, device):
    """The layer gives two-byte logits, the loss float32, and float32 weights get their gradients, as in float32."""
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(3, 5, 1).to(device)
    m = Maker(torch.float32, device)
    images, target = m.normal(2, 3, 8, 9), loss.target(m, 2, 5, 8, 9)
    seen = []
    results = []
    for enabled in (True, False):
        with torch.autocast(device, dtype=dtype, enabled=enabled):
            outputs = layer(images)
            seen.append(outputs.dtype)
            value = loss.function(outputs, target, **loss.required)
        assert value.dtype == torch.float32
        results.append([value, *torch.autograd.grad(value.sum(), list(layer.parameters()))])
    assert seen == [dtype, torch.float32]
    for half, full in zip(*results, strict=True):
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, full, rtol=0, atol=8 * torch.finfo(dtype).eps * full.abs().max().item())


# ---- loss scales -----------------------------------------------------------------------------------------------------


def case_of(loss, dtype, device, side=64):
    """(function of logits to the loss of two images, its reference, the logits)."""
    m = Maker(torch.float64, device)
    logits, target = m.normal(2, 5, side, side).to(dtype), loss.target(m, 2, 5, side, side)
    # Statistics are sums over pixels; a formula on them divides by such sums.
    factor = 1 / side**2 if loss.name == "overlap_statistics" else 1.0

    def of(function):
        def scalar(x):
            given = target.to(dtype).to(x.dtype) if target.is_floating_point() else target
            return (factor * function(x, given, **loss.required)).sum()

        return scalar

    return of(loss.function), of(loss.reference), logits


def half_of(true):
    """The float16 tensor that the truth rounds to."""
    return true.to(torch.float16)


class Parameters(torch.nn.Module):
    """Logits as the parameters of a network, so that what the scaler does with their gradient can be read off them."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits.float())

    def forward(self):
        return self.logits.half()


def scaled_step(function, model, device, scale, learning_rate=1.0, dtype=torch.float16):
    """One step as in PyTorch's documentation; the scaler, and the gradient that came to the float16 logits."""
    scaler = torch.amp.GradScaler(device, init_scale=scale)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    incoming = []
    with torch.autocast(device, dtype=dtype):
        outputs = model()
        outputs.register_hook(incoming.append)
        loss = function(outputs)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return scaler, incoming[0]


@each_loss
def test_a_loss_scale_changes_only_the_scale(loss, device):
    """2^16: the gradient of float16 logits is the true one times 2^16, rounded once, and no infinity of our making."""
    ours, reference, logits = case_of(loss, torch.float16, device)
    model = Parameters(logits)
    before = model.logits.detach().clone()
    scaler, scaled = scaled_step(ours, model, device, SCALE)
    leaf = logits.double().requires_grad_()
    (true,) = torch.autograd.grad(reference(leaf), leaf)
    assert scaled.dtype == torch.float16
    expected = half_of(true * SCALE)
    assert expected.isfinite().all()
    assert expected.count_nonzero() > 0.9 * expected.numel()
    allowed = 2e-3 * (true * SCALE).abs() + 1e-5 * (true * SCALE).abs().max()
    assert ((scaled.double() - true * SCALE).abs() <= allowed).all()
    # What the optimizer saw is the gradient without a scale.
    assert scaler.get_scale() == SCALE
    torch.testing.assert_close((before - model.logits.detach()).double(), true, rtol=2e-3, atol=1e-6)


@each_loss
def test_without_a_scale_small_gradients_are_lost(loss, device):
    """What the test above would see: the same gradient for a scale of 1 has lost digits that 2^16 keeps."""
    ours, reference, logits = case_of(loss, torch.float16, device)
    leaf = logits.double().requires_grad_()
    (true,) = torch.autograd.grad(reference(leaf), leaf)
    _, plain = scaled_step(ours, Parameters(logits), device, 1.0)
    assert (half_of(true).double() - true).abs().max() > 0
    error = (plain.double() - true).abs()
    assert not (error <= 2e-3 * true.abs() + 1e-5 * true.abs().max()).all()


@each_loss
def test_a_gradient_too_large_for_float16_skips_the_step(loss, device):
    """Infinity exactly where the true scaled gradient has no float16; the scaler sees it and halves its scale."""
    ours, reference, logits = case_of(loss, torch.float16, device, side=8)
    leaf = logits.double().requires_grad_()
    (true,) = torch.autograd.grad(reference(leaf), leaf)
    # So that the largest of the gradient does not fit, and most of it does.
    scale = 2.0 ** torch.ceil(torch.log2(2 * 65504 / true.abs().max())).item()
    model = Parameters(logits)
    before = model.logits.detach().clone()
    scaler, scaled = scaled_step(ours, model, device, scale)
    expected = half_of(true * scale)
    assert expected.isinf().any()
    assert expected.isfinite().any()
    # At the very edge one rounding decides.
    edge = ((true * scale).abs() / 65520 - 1).abs() < 2e-3
    assert torch.equal(scaled.isinf() & ~edge, expected.isinf() & ~edge)
    assert not scaled.isnan().any()
    assert torch.equal(model.logits.detach(), before)
    assert scaler.get_scale() == scale / 2


@pytest.mark.parametrize("number", [float("nan"), float("inf")], ids=["NaN", "infinity"])
@each_loss
def test_a_broken_logit_skips_the_step(loss, number, device):
    """NaN and infinity among the logits reach the scaler through the gradient: no weight changes."""
    ours, _, logits = case_of(loss, torch.float16, device, side=8)
    logits[1, 2, 3, 4] = number
    model = Parameters(logits)
    before = model.logits.detach().clone()
    scaler, scaled = scaled_step(ours, model, device, 256.0)
    assert not scaled.isfinite().all()
    assert torch.equal(model.logits.detach().nan_to_num(7.0), before.nan_to_num(7.0))
    assert scaler.get_scale() == 128.0


@each_loss
def test_a_good_step_is_not_skipped(loss, device):
    ours, _, logits = case_of(loss, torch.float16, device, side=8)
    model = Parameters(logits)
    before = model.logits.detach().clone()
    scaler, scaled = scaled_step(ours, model, device, 256.0)
    assert scaled.isfinite().all()
    assert not torch.equal(model.logits.detach(), before)
    assert scaler.get_scale() == 256.0
