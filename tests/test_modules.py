"""The modules are drop-in twins of torch.nn's: the same names, options, state and habits."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn

import fusedloss

from .registry import LOSSES, SEGMENTATION_LOSS, Maker, each_reduction, each_twin

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


# ---- the losses on probabilities -------------------------------------------------------------------------------------

each_on_probabilities = pytest.mark.parametrize(
    "loss",
    [pytest.param(loss, id=loss.name) for loss in LOSSES if loss.torch_module is None and loss.module is not None],
)

# Everything that is no tensor and not the default, as far as a loss has it.
OPTIONS = {
    "ignore_index": 4,
    "classes": (3, 0, 2),
    "per_image": True,
    "absent": "count",
    "smooth": 0.5,
    "eps": 1e-3,
    "log": True,
    "gamma": 1.5,
    "intersection": "product",
    "alpha": 0.2,
    "beta": 0.6,
    "cross_entropy": 0.5,
    "iou": 2.0,
    "brier": 0.25,
    "label_smoothing": 0.1,
}


def names_of(loss):
    return inspect.signature(loss.module).parameters


def options_of(loss, **more):
    return loss.required | {name: value for name, value in (OPTIONS | more).items() if name in names_of(loss)}


def pixels(device="cpu", dtype=torch.float32):
    """Input, target, and a weight for each pixel."""
    m = Maker(dtype, device)
    return m.normal(2, 5, 3, 7), m.labels(5, 2, 3, 7), m.positive(2, 3, 7)


def buffers_of(loss):
    return {"weight": W.clone()} | ({"pos_weight": W.clone() + 1} if loss is SEGMENTATION_LOSS else {})


@each_on_probabilities
def test_has_every_option_of_its_function(loss):
    """Same names, same order, same defaults; a weight for each pixel is given with the pixels."""
    of_function = inspect.signature(loss.function).parameters
    assert list(names_of(loss)) == [name for name in of_function if name not in ("input", "target", "pixel_weight")]
    for name, parameter in names_of(loss).items():
        assert parameter.default == of_function[name].default, name
        assert parameter.kind == of_function[name].kind, name
    assert list(inspect.signature(loss.module(**loss.required).forward).parameters) == [
        "input",
        "target",
        "pixel_weight",
    ]


@each_on_probabilities
@each_reduction
def test_gives_what_its_function_gives(loss, reduction, device):
    input, target, pixel_weight = pixels(device)
    of_loss = {"reduction": reduction} if loss.reductions else {}
    for options in (loss.required | of_loss, options_of(loss) | of_loss):
        for buffers in ({}, {name: buffer.to(device) for name, buffer in buffers_of(loss).items()}):
            module = loss.module(**buffers, **options)
            expected = loss.function(input, target, **buffers, **options)
            assert torch.equal(module(input, target), expected)
            expected = loss.function(input, target, pixel_weight=pixel_weight, **buffers, **options)
            assert torch.equal(module(input, target, pixel_weight), expected)
            assert torch.equal(module(input, target, pixel_weight=pixel_weight), expected)


@each_on_probabilities
def test_each_option_is_passed_on(loss, device):
    """Changed alone, it changes the value as it does in the function."""
    input, target, _ = pixels(device)
    target[target == 1] = 0  # so that a class is absent
    soft = torch.softmax(input.flip(0), 1)
    plain = loss.module(**loss.required)
    for name, value in options_of(loss, activation="sigmoid").items():
        options = loss.required | {name: value}
        labels = soft if name == "intersection" else target  # of hard labels they are the same
        if name == "eps":  # which only small numbers meet
            options |= {"eps": 0.9, "log": True}
        module = loss.module(**options)
        assert getattr(module, name) == options[name]
        assert torch.equal(module(input, labels), loss.function(input, labels, **options)), name
        assert not torch.allclose(module(input, labels), plain(input, labels), rtol=1e-3), name


@each_on_probabilities
def test_gradient_is_its_functions(loss, device):
    input, target, pixel_weight = pixels(device)
    options = options_of(loss) | {name: buffer.to(device) for name, buffer in buffers_of(loss).items()}
    gradients = []
    for function in (loss.module(**options), lambda *args: loss.function(*args[:2], pixel_weight=args[2], **options)):
        leaf = input.clone().requires_grad_()
        function(leaf, target, pixel_weight).sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)
    assert gradients[0].count_nonzero() > 0


def test_pos_weight_is_passed_on(device):
    input, target, _ = pixels(device)
    pos_weight = W.to(device)
    module = fusedloss.SegmentationLoss(activation="sigmoid", pos_weight=pos_weight)
    expected = fusedloss.segmentation_loss(input, target, activation="sigmoid", pos_weight=pos_weight)
    assert torch.equal(module(input, target), expected)
    assert not torch.allclose(fusedloss.SegmentationLoss(activation="sigmoid")(input, target), expected, rtol=1e-3)


def test_terms_are_those_of_the_function(device):
    input, target, pixel_weight = pixels(device)
    for factors in ({}, {"brier": 0.5}, {"cross_entropy": 0.0}, {"iou": 0.0, "brier": -1.0}):
        module = fusedloss.SegmentationLoss(return_terms=True, **factors)
        for weight in (None, pixel_weight):
            loss, terms = module(input, target, weight)
            expected, expected_terms = fusedloss.segmentation_loss(
                input, target, pixel_weight=weight, return_terms=True, **factors
            )
            assert torch.equal(loss, expected)
            assert list(terms) == list(expected_terms)
            assert all(torch.equal(terms[name], expected_terms[name]) for name in terms)


@each_on_probabilities
def test_weights_are_state(loss):
    buffers = buffers_of(loss)
    module = loss.module(**buffers, **loss.required)
    assert isinstance(module, nn.Module)
    assert list(module.parameters()) == []
    assert list(module.state_dict()) == list(buffers)
    assert all(getattr(module, name) is buffer for name, buffer in buffers.items())
    other = loss.module(**{name: torch.zeros(5) for name in buffers}, **loss.required)
    other.load_state_dict(module.state_dict())
    assert all(torch.equal(getattr(other, name), buffer) for name, buffer in buffers.items())
    plain = loss.module(**loss.required)
    assert dict(plain.state_dict()) == {}
    assert all(getattr(plain, name) is None for name in buffers)


@each_on_probabilities
def test_to_moves_the_weights(loss):
    """And what is computed with them is as precise as the input asks, whatever they are kept in."""
    buffers = buffers_of(loss)
    input, target, pixel_weight = pixels(dtype=torch.float64)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        module = loss.module(**buffers, **options_of(loss)).to(dtype)
        rounded = {name: buffer.to(dtype) for name, buffer in buffers.items()}
        for name, buffer in rounded.items():
            assert getattr(module, name).dtype == dtype
            assert torch.equal(getattr(module, name), buffer)
        value = module(input, target, pixel_weight)
        assert value.dtype == torch.float64
        expected = loss.reference(input, target, pixel_weight=pixel_weight, **rounded, **options_of(loss))
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
    on_meta = loss.module(**buffers, **loss.required).to("meta")
    assert all(getattr(on_meta, name).device.type == "meta" for name in buffers)
    assert all(buffer.device.type == "cpu" for buffer in buffers.values())


@each_on_probabilities
def test_copies_of_it(loss):
    options = buffers_of(loss) | options_of(loss)
    module = loss.module(**options)
    given = pixels()
    expected = module(*given)
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    for twin in (
        copy.deepcopy(module),
        copy.copy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(saved, weights_only=False),
    ):
        assert type(twin) is loss.module
        assert torch.equal(twin(*given), expected)
        assert repr(twin) == repr(module)
        assert list(twin.state_dict()) == list(module.state_dict())
    twin = copy.deepcopy(module)
    for buffer in twin.buffers():
        buffer.zero_()
    twin.ignore_index = 0
    assert torch.equal(module(*given), expected)


@each_on_probabilities
def test_prints_every_option(loss):
    """But for the weights, as in torch.nn; a value at a time, as it was given."""
    text = repr(loss.module(**buffers_of(loss), **options_of(loss, activation="sigmoid")))
    assert text.startswith(f"{loss.module.__name__}(")
    assert "\n" not in text
    for name, value in options_of(loss, activation="sigmoid").items():
        assert f"{name}={value!r}" in text
    assert "tensor" not in text
    # What is printed makes the same module again.
    again = eval(text, {loss.module.__name__: loss.module})
    assert repr(again) == text
    assert set(names_of(loss)) - {"weight", "pos_weight"} == {part.split("=")[0] for part in top_level_parts(text)}


def top_level_parts(text):
    """The arguments in 'Name(a=1, b=(2, 3))', each as a text."""
    parts, depth = [""], 0
    for character in text[text.index("(") + 1 : -1]:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


@each_on_probabilities
def test_an_option_may_be_changed_later(loss):
    """As with torch.nn's modules: what is read is the attribute."""
    input, target, _ = pixels()
    module = loss.module(**loss.required)
    module.ignore_index = 2
    module.weight = W.clone()
    expected = loss.function(input, target, W, ignore_index=2, **loss.required)
    assert torch.equal(module(input, target), expected)


@each_on_probabilities
def test_trains_with_it(loss, device):
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 5, 1, device=device)
    criterion = loss.module(**loss.required)
    m = Maker(torch.float32, device)
    images, target = m.normal(2, 4, 3, 7), m.labels(5, 2, 3, 7)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    values = []
    for _ in range(3):
        optimizer.zero_grad()
        value = criterion(layer(images), target)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[0] > values[1] > values[2]
