"""What torch.compile, torch.export and AOTInductor make of a loss: one graph, for every size, with the same numbers.

Which transforms may be compiled, and that nothing is silently wrong there, is in test_transforms.py.
"""

import copy
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
import torch._inductor

import fusedloss

from .compare import evaluate, random_like
from .registry import (
    BRIER_LOSS,
    CROSS_ENTROPY,
    DICE_LOSS,
    MSE_LOSS,
    SEGMENTATION_LOSS,
    SOFT_IOU_LOSS,
    TVERSKY_LOSS,
    Case,
    Maker,
    each_loss,
    first_cases,
)
from .test_transforms import assert_same

# PyTorch's own words while it saves and loads a program.
quiet = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")


def larger(call, samples, columns=1):
    """The call with so many times the samples and the columns."""
    images = [name for name, tensor in call.tensors.items() if tensor.dim() > 1]
    return call.map(lambda t: torch.cat([torch.cat([t] * samples)] * columns, -1), images)


# ---- modes and sizes -------------------------------------------------------------------------------------------------


@pytest.mark.compile
@first_cases
@pytest.mark.usefixtures("fresh_compiler")
def test_reduce_overhead(case, device):
    """With and without gradients. (mode="default" is in test_transforms.py.)"""
    call = case.make(torch.float64, device)
    compiled = torch.compile(
        lambda tensors: case.loss.function(**tensors, **call.options), fullgraph=True, mode="reduce-overhead"
    )
    for wrt in ((), call.differentiable):
        expected = evaluate(case.loss.torch, call, wrt)
        for _ in range(3):  # on a GPU a graph is recorded in the second call and replayed in the third
            with torch.set_grad_enabled(bool(wrt)):
                assert_same(evaluate(lambda **given: compiled(only_tensors(given)), call, wrt), expected)


# Batch sizes and widths of which no two are alike in the first call, or PyTorch would take them for one number.
SIZES = ((3, 1), (4, 1), (7, 1), (5, 2), (3, 3))


@pytest.mark.compile
@first_cases
@pytest.mark.usefixtures("fresh_compiler")
def test_dynamic_shapes_are_compiled_once(case, device):
    """With dynamic=True the first call's graph serves every size, forward and backward."""
    run_in_sizes(case, device, dynamic=True, backend="inductor", sizes=SIZES, compiled_for=1)


@pytest.mark.compile
@pytest.mark.parametrize("with_grad", [True, False], ids=["grad", "no grad"])
@first_cases
@pytest.mark.usefixtures("fresh_compiler")
def test_no_compilation_for_each_batch_size(case, with_grad, device):
    """As torch.compile is by default: once for the first batch size, once for all others."""
    sizes = [size for size in SIZES if size[1] == 1]
    run_in_sizes(case, device, dynamic=None, backend="aot_eager", sizes=sizes, compiled_for=2, with_grad=with_grad)


def run_in_sizes(case, device, *, dynamic, backend, sizes, compiled_for, with_grad=True):
    """After `compiled_for` sizes nothing may be compiled any more."""
    plain = case.make(torch.float64, device)
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    # The options are no arguments of the graph, as they are not in a network either.
    compiled = torch.compile(
        lambda tensors: case.loss.function(**tensors, **plain.options),
        fullgraph=True,
        backend=counter,
        dynamic=dynamic,
    )
    wrt = plain.differentiable if with_grad else ()
    for k, size in enumerate(sizes):
        call = larger(plain, *size)
        with (
            torch.set_grad_enabled(with_grad),
            torch._dynamo.config.patch(error_on_recompile=k >= compiled_for),
        ):
            results = evaluate(lambda **given: compiled(only_tensors(given)), call, wrt)
        if k + 1 == compiled_for:
            frames = counter.frame_count
        assert_same(results, evaluate(case.loss.torch, call, wrt))
    assert counter.frame_count == frames


def only_tensors(given):
    return {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}


@pytest.mark.compile
@pytest.mark.usefixtures("fresh_compiler")
def test_a_compilation_for_each_batch_size_is_seen(device):
    """The count does count: told not to use symbols, torch compiles for every size."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fusedloss.cross_entropy, backend=counter, dynamic=False)
    m = Maker(torch.float32, device)
    for samples in (2, 3, 4):
        compiled(m.normal(samples, 5, 7), m.labels(5, samples, 7))
    assert counter.frame_count == 3
    with (
        torch._dynamo.config.patch(error_on_recompile=True),
        pytest.raises(torch._dynamo.exc.RecompileError),
    ):
        compiled(m.normal(6, 5, 7), m.labels(5, 6, 7))


@pytest.mark.compile
@first_cases
@pytest.mark.usefixtures("fresh_compiler")
def test_autocast_is_compiled_too(case, device):
    """The result of half logits is float32, and the bits are those of the call that is not compiled."""
    plain = case.make(torch.bfloat16, device)

    def under_autocast(**arguments):
        with torch.autocast(device, dtype=torch.bfloat16):
            return case.loss.function(**arguments)

    compiled = torch.compile(under_autocast, fullgraph=True, backend="aot_eager")
    value, gradients = evaluate(compiled, plain, plain.differentiable)
    expected, expected_gradients = evaluate(under_autocast, plain, plain.differentiable)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.bfloat16
        assert torch.equal(gradient, expected_gradients[name])


# ---- training --------------------------------------------------------------------------------------------------------


def network(channels, device):
    torch.manual_seed(0)
    layers = (torch.nn.Conv2d(channels, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, channels, 1))
    return torch.nn.Sequential(*layers).to(device, torch.float64)


def training(case, device):
    """A network, its images, and the loss of its outputs as ours and as PyTorch has it."""
    call = case.make(torch.float64, device)
    images = call.tensors["input"]
    factors = random_like(call.run(case.loss.torch))

    def scalar_of(function):
        return lambda outputs: (call.with_tensors(input=outputs).run(function) * factors).sum()

    return network(images.shape[1], device), images, scalar_of(case.loss.function), scalar_of(case.loss.torch)


def step_of(model, optimizer, loss):
    def step(images):
        optimizer.zero_grad()
        value = loss(model(images))
        value.backward()
        optimizer.step()

    return step


def parameters_after(steps, step, model, images):
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for _ in range(steps):
        step(images)
    after = [parameter.detach() for parameter in model.parameters()]
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    return after


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)


@pytest.mark.compile
@pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="this torch traces no autograd.grad"
)
@first_cases
@pytest.mark.usefixtures("fresh_compiler")
def test_a_whole_step_is_one_graph(case, device):
    """Network, loss, backward and update. (An optimizer of torch.optim breaks the graph, so it is written out.)"""
    model, images, ours, theirs = training(case, device)
    other = copy.deepcopy(model)

    def step(x):
        value = ours(model(x))
        gradients = torch.autograd.grad(value, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.sub_(gradient, alpha=1e-2)

    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        trained = parameters_after(4, compiled, model, images)
    plain = step_of(other, torch.optim.SGD(other.parameters(), lr=1e-2), theirs)
    assert_same(trained, parameters_after(4, plain, other, images))


@pytest.mark.compile
@pytest.mark.usefixtures("fresh_compiler")
def test_a_whole_step_with_its_optimizer(device):
    """As it is written everywhere, in one torch.compile, which breaks the graph at backward() and step()."""
    model, images, ours, theirs = training(Case(SEGMENTATION_LOSS, SEGMENTATION_LOSS.typical[0]), device)
    other = copy.deepcopy(model)
    step = torch.compile(step_of(model, sgd(model), ours), backend="aot_eager")
    assert_same(
        parameters_after(4, step, model, images),
        parameters_after(4, step_of(other, sgd(other), theirs), other, images),
    )


# ---- programs --------------------------------------------------------------------------------------------------------


class Training(torch.nn.Module):
    """What one would export: a network with its losses."""

    def __init__(self, model, *losses):
        super().__init__()
        self.model = model
        self.losses = torch.nn.ModuleList(losses)

    def forward(self, images, *targets):
        outputs = self.model(images)
        return tuple(loss(outputs, target) for loss, target in zip(self.losses, targets, strict=True))


def program_of(losses, device, dtype=torch.float64):
    """(losses of a network as a module, its arguments); `losses` are pairs of entry and module."""
    m = Maker(dtype, device)
    model = Training(network(5, device).to(dtype), *(module for _, module in losses))
    return model, (m.normal(2, 5, 4, 6), *(loss.target(m, 2, 5, 4, 6) for loss, _ in losses))


@quiet
@pytest.mark.compile
@each_loss
@pytest.mark.usefixtures("fresh_compiler")
def test_an_exported_program_comes_back(loss, device, tmp_path):
    """Saved and loaded, and run with another batch size: value and gradient of the network's weights."""
    model, example = program_of([(loss, loss.make_module())], device)
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, example, dynamic_shapes=({0: batch}, ({0: batch},)))
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    again = tuple(torch.cat([tensor] * 3) for tensor in example)
    for arguments in (example, again):
        (ours,), (expected,) = loaded(*arguments), model(*arguments)
        assert_same(ours, expected)
        assert_same(
            torch.autograd.grad(ours, list(loaded.parameters())),
            torch.autograd.grad(expected, list(model.parameters())),
        )


@quiet
@pytest.mark.compile
@pytest.mark.usefixtures("fresh_compiler")
def test_an_exported_program_runs_in_another_process(tmp_path):
    """Which needs no more than the package's import."""
    losses = [(loss, loss.make_module()) for loss in (CROSS_ENTROPY, MSE_LOSS, SEGMENTATION_LOSS)]
    model, example = program_of(losses, "cpu")
    torch.export.save(torch.export.export(model, example), tmp_path / "program.pt2")
    torch.save(example, tmp_path / "example.pt")
    program = f"""
import torch, fusedloss
loaded = torch.export.load({str(tmp_path / "program.pt2")!r}).module()
print([value.item() for value in loaded(*torch.load({str(tmp_path / "example.pt")!r}))])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert eval(done.stdout) == [pytest.approx(value.item(), rel=1e-9) for value in model(*example)]


def packaged(model, example, folder):
    """The model compiled ahead of time, without Python in it, and loaded."""
    package = torch._inductor.aoti_compile_and_package(
        torch.export.export(model, example), package_path=str(folder / "model.pt2")
    )
    return torch._inductor.aoti_load_package(package)


@quiet
@pytest.mark.compile
@pytest.mark.usefixtures("fresh_compiler")
def test_ahead_of_time(device, tmp_path):
    """AOTInductor, whose calls of an op have None in place of an empty list."""
    losses = [
        (CROSS_ENTROPY, fusedloss.CrossEntropyLoss(label_smoothing=0.1)),
        (MSE_LOSS, fusedloss.MSELoss()),
        (SOFT_IOU_LOSS, fusedloss.SoftIoULoss()),
        (DICE_LOSS, fusedloss.DiceLoss(classes=(3, 0))),
        (TVERSKY_LOSS, fusedloss.TverskyLoss(alpha=0.3, beta=0.7)),
        (BRIER_LOSS, fusedloss.BrierLoss()),
        (SEGMENTATION_LOSS, fusedloss.SegmentationLoss(brier=0.5)),
    ]
    model, example = program_of(losses, device, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(tuple(packaged(model, example, tmp_path)(*example)), model(*example))
