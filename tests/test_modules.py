"""The modules are drop-in twins of torch.nn's: the same names, options, state and habits."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn

import fusedloss

from .registry import Maker, each_reduction, each_twin

W = torch.tensor([0.5, 1.0, 2.0, 0.25, 1.5])


def build(loss, **options):
    return loss.module(**options)


def example(loss, device="cpu", dtype=torch.float32):
    m = Maker(dtype, device)
    return m.normal(2, 5, 3), (m.labels(5, 2, 3) if loss.name == "cross_entropy" else m.normal(2, 5, 3))


def weight_for(loss):
    return W.clone() if loss.name == "cross_entropy" else Maker(torch.float32).positive(2, 5, 3)


@each_twin
@each_reduction
def test_gives_what_the_function_and_torch_give(loss, reduction, device):
    module = build(loss, reduction=reduction)
    input, target = example(loss, device)
    assert torch.equal(module(input, target), loss.function(input, target, reduction=reduction))
    torch.testing.assert_close(module(input, target), loss.torch_module(reduction=reduction)(input, target))


@each_twin
def test_every_option_of_the_function(loss):
    """Same names, same defaults; all keyword-only but cross_entropy's weight, as in the function."""
    of_function = inspect.signature(loss.function).parameters
    of_module = inspect.signature(loss.module).parameters
    assert set(of_module) == set(of_function) - {"input", "target"}
    for name, parameter in of_module.items():
        assert parameter.default == of_function[name].default, name
        assert parameter.kind == of_function[name].kind, name


def test_options_are_passed_on(device):
    m = Maker(torch.float32, device)
    input, target = m.normal(2, 5, 3), m.labels(5, 2, 3, ignored=3)
    options = {"ignore_index": 3, "reduction": "sum", "label_smoothing": 0.2}
    ours = fusedloss.CrossEntropyLoss(W.to(device), **options)
    theirs = nn.CrossEntropyLoss(W.to(device), **options)
    torch.testing.assert_close(ours(input, target), theirs(input, target))
    for name, value in options.items():
        assert getattr(ours, name) == value == getattr(theirs, name)
    m = Maker(torch.float32, device)
    input, target, weight = m.normal(4), m.normal(4), m.positive(4)
    expected = torch.nn.functional.mse_loss(input, target, weight=weight, reduction="sum")
    torch.testing.assert_close(fusedloss.MSELoss(weight=weight, reduction="sum")(input, target), expected)


@each_twin
def test_is_a_module_without_parameters(loss):
    module = build(loss)
    assert isinstance(module, nn.Module)
    assert list(module.parameters()) == []
    assert dict(module.state_dict()) == {}
    assert module.weight is None


@each_twin
def test_prints_itself(loss):
    text = repr(build(loss, reduction="sum"))
    assert text.startswith(f"{loss.module.__name__}(")
    assert "reduction='sum'" in text
    if loss.name == "cross_entropy":
        text = repr(fusedloss.CrossEntropyLoss(ignore_index=255, label_smoothing=0.1))
        assert "ignore_index=255" in text
        assert "label_smoothing=0.1" in text


@each_twin
def test_weight_is_state(loss):
    weight = weight_for(loss)
    module = build(loss, weight=weight)
    assert list(module.state_dict()) == ["weight"]
    other = build(loss, weight=torch.zeros_like(weight))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.weight, weight)


def test_state_is_exchanged_with_torch():
    ours, theirs = fusedloss.CrossEntropyLoss(W.clone()), nn.CrossEntropyLoss(torch.zeros(5))
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(theirs.weight, W)
    ours = fusedloss.CrossEntropyLoss(torch.zeros(5))
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.weight, W)
    nn.CrossEntropyLoss().load_state_dict(fusedloss.CrossEntropyLoss().state_dict())


@each_twin
def test_to_moves_the_weight(loss):
    weight = weight_for(loss)
    module = build(loss, weight=weight)
    input, target = example(loss, dtype=torch.float64)
    double = module.double()
    assert double.weight.dtype == torch.float64
    value = double(input, target)
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, loss.torch(input, target, weight=weight.double()))
    assert build(loss, weight=weight).to("meta").weight.device.type == "meta"


@each_twin
def test_copies(loss):
    weight = weight_for(loss)
    module = build(loss, weight=weight, reduction="sum")
    input, target = example(loss)
    expected = module(input, target)
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    for twin in (
        copy.deepcopy(module),
        copy.copy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(saved, weights_only=False),
    ):
        assert torch.equal(twin(input, target), expected)
        assert repr(twin) == repr(module)
    twin = copy.deepcopy(module)
    twin.weight.zero_()
    assert torch.equal(module(input, target), expected)


@each_twin
def test_in_a_container(loss):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.criterion = build(loss, weight=weight_for(loss))

    model = Model()
    assert "criterion.weight" in model.state_dict()
    assert [name for name, _ in model.named_parameters()] == ["layer.weight", "layer.bias"]
    model.train().eval()
    model.zero_grad()


@each_twin
def test_weight_is_kept_not_copied(loss):
    """As in torch.nn: the buffer is the tensor that was given."""
    weight = weight_for(loss)
    assert build(loss, weight=weight).weight is weight


@each_twin
def test_trains(loss, device):
    """One step of gradient descent lowers the loss, and is the same step as with torch.nn's module."""
    results = []
    for criterion in (loss.module(), loss.torch_module()):
        torch.manual_seed(0)
        layer = nn.Conv1d(4, 5, 1, device=device)
        m = Maker(torch.float32, device)
        images = m.normal(2, 4, 3)
        target = m.labels(5, 2, 3) if loss.name == "cross_entropy" else m.normal(2, 5, 3)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        values = []
        for _ in range(3):
            optimizer.zero_grad()
            value = criterion(layer(images), target)
            value.backward()
            optimizer.step()
            values.append(value.item())
        assert values[0] > values[1] > values[2]
        results.append((values, [p.detach().clone() for p in layer.parameters()]))
    (ours, our_parameters), (theirs, their_parameters) = results
    assert ours == pytest.approx(theirs, rel=1e-5)
    torch.testing.assert_close(our_parameters, their_parameters)
