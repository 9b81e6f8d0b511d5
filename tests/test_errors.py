"""Every error says who, wanted, got. What PyTorch refuses is refused here too.

A row of the table is one wrong call: the exception, the words that its message must hold, and the arguments. Messages
are matched loosely (the argument's name, the offending value), so that a wording can be improved without a change here.
"""

import math
import re
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fusedloss

from .registry import each_twin

X = torch.linspace(-1, 1, 12).view(4, 3)  # (N, C)
Y = torch.tensor([0, 1, 2, 0])
P = X.softmax(1)
IMAGE = torch.linspace(-1, 1, 2 * 3 * 4 * 5).view(2, 3, 4, 5)
MAP = torch.zeros(2, 4, 5, dtype=torch.int64)
W = torch.tensor([0.5, 1.0, 2.0])
META = torch.zeros(4, 3, device="meta")


@dataclass
class Refused:
    id: str
    error: type[Exception] | tuple[type[Exception], ...]
    words: tuple[str, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)
    torch_refuses: bool = True  # False: PyTorch takes it, we do not, and the row says so


CROSS_ENTROPY = [
    # types
    Refused("input is a list", TypeError, ("input", "list"), ([1.0, 2.0], Y)),
    Refused("input is an array", TypeError, ("input", "ndarray"), (np.zeros((4, 3)), Y)),
    Refused("input is None", TypeError, ("input", "None"), (None, Y)),
    Refused("target is None", TypeError, ("target", "None"), (X, None)),
    Refused("target is a number", TypeError, ("target", "int"), (X, 1)),
    Refused("weight is a list", TypeError, ("weight", "list"), (X, Y, [1.0, 1.0, 1.0])),
    Refused("weight is a string", TypeError, ("weight", "str"), (X, Y, "mean")),
    Refused("ignore_index is a float", TypeError, ("ignore_index", "float"), (X, Y), {"ignore_index": 1.0}),
    Refused("ignore_index is a bool", TypeError, ("ignore_index", "bool"), (X, Y), {"ignore_index": True}),
    Refused("ignore_index is None", TypeError, ("ignore_index", "None"), (X, Y), {"ignore_index": None}),
    Refused("label_smoothing is a string", TypeError, ("label_smoothing", "str"), (X, Y), {"label_smoothing": "0"}),
    Refused("label_smoothing is None", TypeError, ("label_smoothing", "None"), (X, Y), {"label_smoothing": None}),
    Refused("reduction is None", (TypeError, ValueError), ("reduction", "None"), (X, Y), {"reduction": None}),
    Refused("reduction is a number", (TypeError, ValueError), ("reduction",), (X, Y), {"reduction": 1}),
    # dtypes
    Refused("integer input", TypeError, ("input", "int64"), (X.long(), Y)),
    Refused("integer input, probabilities", TypeError, ("input", "int64"), (X.long(), P)),
    Refused("bool input", TypeError, ("input", "bool"), (X > 0, Y)),
    Refused("complex input", TypeError, ("input", "complex64"), (X + 0j, Y)),
    Refused("float8 input", TypeError, ("input", "float8"), (X.to(torch.float8_e5m2), Y)),
    Refused("int8 target", TypeError, ("target", "int8"), (X, Y.to(torch.int8))),
    Refused("bool target", TypeError, ("target", "bool"), (X, Y > 0)),
    Refused("complex target", TypeError, ("target", "complex64"), (X, P + 0j)),
    Refused("int64 target of input's shape", (TypeError, ValueError), ("target",), (X, P.long())),
    Refused("float target of labels' shape", (TypeError, ValueError), ("target",), (X, Y.float())),
    Refused("integer weight", TypeError, ("weight", "int64"), (X, Y, torch.ones(3, dtype=torch.int64))),
    Refused("complex weight", TypeError, ("weight", "complex64"), (X, Y, W + 0j)),
    Refused(
        "integer weight with probabilities",
        TypeError,
        ("weight", "int64"),
        (X, P, torch.ones(3, dtype=torch.int64)),
        torch_refuses=False,
    ),
    # shapes
    Refused("input without dimensions", ValueError, ("input",), (X[0, 0], Y[0])),
    Refused("input and probabilities without dimensions", ValueError, ("input",), (X[0, 0], P[0, 0])),
    Refused("another batch size", ValueError, ("target", r"\(4,\)", r"\(3,\)"), (X, Y[:3])),
    Refused("one label for many rows", ValueError, ("target", r"\(4,\)"), (X, Y[0])),
    Refused("labels in a column", ValueError, ("target", r"\(4, 1\)"), (X, Y[:, None])),
    Refused("two labels in a vector", ValueError, ("target", r"\(2,\)"), (X[0], Y[:2])),
    Refused("no label in a vector", ValueError, ("target", r"\(0,\)"), (X[0], Y[:0])),
    Refused("label with a class dimension", ValueError, ("target", r"\(2, 1, 4, 5\)"), (IMAGE, MAP[:, None])),
    Refused("label map turned", ValueError, ("target", r"\(2, 5, 4\)"), (IMAGE, MAP.mT)),
    Refused("label map without a batch", ValueError, ("target", r"\(4, 5\)"), (IMAGE, MAP[0])),
    Refused("label map that would broadcast", ValueError, ("target", r"\(1, 4, 5\)"), (IMAGE, MAP[:1])),
    Refused("label map for rows", ValueError, ("target", r"\(2, 4, 5\)"), (X, MAP)),
    Refused("probabilities of another shape", ValueError, ("target", r"\(4, 4\)"), (X, torch.rand(4, 4))),
    Refused("probabilities that would broadcast", ValueError, ("target", r"\(1, 3\)"), (X, P[:1])),
    Refused("weight too long", ValueError, ("weight", r"\(4,\)"), (X, Y, torch.rand(4))),
    Refused("weight that would broadcast", ValueError, ("weight", r"\(1,\)"), (X, Y, torch.rand(1))),
    Refused("weight with two dimensions", ValueError, ("weight", r"\(1, 3\)"), (X, Y, W[None])),
    Refused("weight without dimensions", ValueError, ("weight", r"\(\)"), (X, Y, W[0])),
    Refused("weight too long, probabilities", ValueError, ("weight", r"\(4,\)"), (X, P, torch.rand(4))),
    Refused("weight that would broadcast, probabilities", ValueError, ("weight", r"\(1,\)"), (X, P, torch.rand(1))),
    Refused("weight of input's shape", ValueError, ("weight", r"\(4, 3\)"), (X, P, torch.rand(4, 3))),
    # options
    Refused("unknown reduction", ValueError, ("reduction", "average"), (X, Y), {"reduction": "average"}),
    Refused("reduction in capitals", ValueError, ("reduction", "Mean"), (X, Y), {"reduction": "Mean"}),
    Refused("smoothing above 1", ValueError, ("label_smoothing", "1.1"), (X, Y), {"label_smoothing": 1.1}),
    Refused("smoothing above 1, probabilities", ValueError, ("label_smoothing",), (X, P), {"label_smoothing": 1.1}),
    Refused("smoothing below 0", ValueError, ("label_smoothing", "-0.1"), (X, Y), {"label_smoothing": -0.1}, False),
    Refused("smoothing NaN", ValueError, ("label_smoothing", "nan"), (X, Y), {"label_smoothing": math.nan}, False),
    Refused("ignore_index of 71 bits", ValueError, ("ignore_index", str(2**70)), (X, Y), {"ignore_index": 2**70}),
    Refused("ignore_index with probabilities", ValueError, ("ignore_index", "0"), (X, P), {"ignore_index": 0}),
    Refused("weight requires grad", ValueError, ("weight", "grad"), (X, Y, torch.rand(3, requires_grad=True))),
    # devices and layouts
    Refused("target elsewhere", ValueError, ("target", "meta"), (X, Y.to("meta"))),
    Refused("probabilities elsewhere", ValueError, ("target", "meta"), (X, META)),
    Refused("input elsewhere", ValueError, ("meta",), (META, Y)),
    Refused("weight elsewhere", ValueError, ("weight", "meta"), (X, Y, W.to("meta"))),
    Refused("all on meta", ValueError, ("meta",), (META, Y.to("meta")), {}, torch_refuses=False),
    Refused("sparse input", ValueError, ("input", "sparse"), (X.to_sparse(), Y)),
    Refused("sparse target", ValueError, ("target", "sparse"), (X, Y.to_sparse())),
    Refused("sparse weight", ValueError, ("weight", "sparse"), (X, Y, W.to_sparse())),
    # labels
    Refused("label too large", IndexError, ("target", r"\(2,?\)", "3"), (X, torch.tensor([0, 1, 3, 0]))),
    Refused("label negative", IndexError, ("target", r"\(1,?\)", "-1"), (X, torch.tensor([0, -1, 2, 0]))),
    Refused("no class to choose", IndexError, ("target", "0"), (X[:, :0], Y * 0)),
    # retired
    Refused("size_average", (TypeError, ValueError), ("reduction",), (X, Y), {"size_average": False}, False),
    Refused("reduce", (TypeError, ValueError), ("reduction",), (X, Y), {"reduce": False}, False),
]

MSE_LOSS = [
    Refused("input is a list", TypeError, ("input", "list"), ([1.0], X)),
    Refused("input is a number", TypeError, ("input", "float"), (1.0, X)),
    Refused("target is a number", TypeError, ("target", "float"), (X, 1.0)),
    Refused("target is None", TypeError, ("target", "None"), (X, None)),
    Refused("target is an array", TypeError, ("target", "ndarray"), (X, np.zeros((4, 3)))),
    Refused("weight is a list", TypeError, ("weight", "list"), (X, X), {"weight": [1.0]}),
    Refused("weight is a number", TypeError, ("weight", "float"), (X, X), {"weight": 1.0}),
    Refused("reduction is None", (TypeError, ValueError), ("reduction", "None"), (X, X), {"reduction": None}),
    Refused("two integers", TypeError, ("int64",), (X.long(), X.long())),
    Refused("integer and bool", TypeError, ("int64",), (X.long(), X > 0)),
    Refused("complex input", TypeError, ("input", "complex64"), (X + 0j, X)),
    Refused("complex target", TypeError, ("target", "complex64"), (X, X + 0j)),
    Refused("complex weight", TypeError, ("weight", "complex64"), (X, X), {"weight": X + 0j}, False),
    Refused("integer weight", TypeError, ("weight", "int64"), (X, X), {"weight": X.long()}, False),
    Refused("shapes that do not broadcast", ValueError, ("target", r"\(4, 3\)", r"\(3, 3\)"), (X, X[:3])),
    Refused("nothing and something", ValueError, ("target", r"\(0, 3\)"), (X, X[:0])),
    Refused("weight that would broadcast", ValueError, ("weight", r"\(1, 3\)"), (X, X), {"weight": X[:1]}),
    Refused("weight of a scalar", ValueError, ("weight", r"\(\)"), (X, X), {"weight": X[0, 0]}),
    Refused("weight of target's shape", ValueError, ("weight", r"\(4, 3\)"), (X[:1], X), {"weight": X}),
    Refused("unknown reduction", ValueError, ("reduction", "average"), (X, X), {"reduction": "average"}),
    Refused("unknown reduction, weight", ValueError, ("reduction", "x"), (X, X), {"reduction": "x", "weight": X}),
    Refused("target elsewhere", ValueError, ("target", "meta"), (X, META)),
    Refused("weight elsewhere", ValueError, ("weight", "meta"), (X, X), {"weight": META}),
    Refused("all on meta", ValueError, ("meta",), (META, META), {}, torch_refuses=False),
    Refused("sparse input", ValueError, ("input", "sparse"), (X.to_sparse(), X)),
    Refused("sparse target", ValueError, ("target", "sparse"), (X, X.to_sparse())),
    Refused("sparse weight", ValueError, ("weight", "sparse"), (X, X), {"weight": X.to_sparse()}, False),
    Refused("size_average", (TypeError, ValueError), ("reduction",), (X, X), {"size_average": False}, False),
    Refused("reduce", (TypeError, ValueError), ("reduction",), (X, X), {"reduce": False}, False),
]

TABLE = [
    pytest.param(name, row, id=f"{name}-{row.id}")
    for name, rows in (("cross_entropy", CROSS_ENTROPY), ("mse_loss", MSE_LOSS))
    for row in rows
]


@pytest.mark.parametrize(("name", "row"), TABLE)
def test_refused(name, row):
    with pytest.raises(row.error) as caught:
        getattr(fusedloss, name)(*row.arguments, **row.options)
    message = str(caught.value)
    assert message.startswith(f"{name}: "), message
    assert "\n" not in message
    for word in row.words:
        assert re.search(word, message), f"{word!r} is not in {message!r}"


@pytest.mark.parametrize(("name", "row"), TABLE)
def test_torch_refuses_it_too(name, row):
    """Or takes it, where the row says so: then we are stricter, on purpose."""
    function = getattr(F, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if row.torch_refuses:
            with pytest.raises(Exception):  # noqa: B017, PT011 (which one is its own business)
                function(*row.arguments, **row.options)
        else:
            function(*row.arguments, **row.options)


@pytest.mark.parametrize(("name", "row"), TABLE)
def test_refused_with_gradients_too(name, row):
    """The checks are the same when the call goes through autograd."""
    arguments = [
        a.detach().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() and k == 0 else a
        for k, a in enumerate(row.arguments)
    ]
    with pytest.raises(row.error):
        getattr(fusedloss, name)(*arguments, **row.options)


@pytest.mark.parametrize(("name", "row"), TABLE)
def test_refused_by_the_module_too(name, row):
    """Options that the constructor does not know are its own TypeError; all else is found in the call."""
    module = {"cross_entropy": fusedloss.CrossEntropyLoss, "mse_loss": fusedloss.MSELoss}[name]
    options = dict(row.options)
    if name == "cross_entropy" and len(row.arguments) == 3:
        options["weight"] = row.arguments[2]
    with pytest.raises((row.error, TypeError) if isinstance(row.error, type) else row.error):
        module(**options)(*row.arguments[:2])


@each_twin
def test_a_good_call_after_a_bad_one(loss):
    for row in CROSS_ENTROPY if loss.name == "cross_entropy" else MSE_LOSS:
        with pytest.raises(row.error):
            loss.function(*row.arguments, **row.options)
    target = Y if loss.name == "cross_entropy" else P
    torch.testing.assert_close(loss.function(X, target), loss.torch(X, target))


# ---- labels outside [0, C) -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    ("dtype", "label"),
    [
        (torch.uint8, 21),
        (torch.uint8, 255),
        (torch.int16, -1),
        (torch.int16, 32767),
        (torch.int32, -(2**31)),
        (torch.int32, 21),
        (torch.int64, 21),
        (torch.int64, 25),
        (torch.int64, -1),
        (torch.int64, 2**63 - 1),
        (torch.int64, -(2**63)),
        (torch.int64, 2**32),  # 0 in its lower half
        (torch.int64, 2**32 + 5),
    ],
    ids=str,
)
def test_bad_label_is_named_with_its_position(dtype, label, memory_format, requires_grad, device):
    logits = torch.zeros(2, 21, 9, 40, device=device).contiguous(memory_format=memory_format)
    logits.requires_grad_(requires_grad)
    for position in ((0, 0, 0), (0, 3, 7), (1, 8, 39)):
        labels = torch.ones(2, 9, 40, dtype=dtype, device=device)
        labels[position] = label
        wanted = rf"cross_entropy: .*target.*{re.escape(str(position))}.*21.*-100.*{label}"
        with pytest.raises(IndexError, match=wanted):
            fusedloss.cross_entropy(logits, labels)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_bad_label_with_every_option(reduction, smoothing, device):
    labels = torch.tensor([0, 1, 7], device=device)
    for weight in (None, W.to(device)):
        with pytest.raises(IndexError, match=r"\(2,?\).*7"):
            fusedloss.cross_entropy(
                torch.zeros(3, 3, device=device), labels, weight, reduction=reduction, label_smoothing=smoothing
            )


def test_ignore_index_is_not_a_bad_label_but_the_default_then_is(device):
    logits, labels = torch.zeros(3, 3, device=device), torch.tensor([0, -7, -100], device=device)
    with pytest.raises(IndexError, match=r"\(2,?\).*-7.*-100"):
        fusedloss.cross_entropy(logits, labels, ignore_index=-7)


def test_bad_label_of_a_vector(device):
    with pytest.raises(IndexError, match="5"):
        fusedloss.cross_entropy(torch.zeros(3, device=device), torch.tensor(5, device=device))


def test_the_first_of_many_bad_labels_is_named(threads, device):
    """Whatever the number of threads, and although the chunks end in any order."""
    logits = torch.zeros(4, 3, 200, 150, device=device)
    labels = torch.zeros(4, 200, 150, dtype=torch.int64, device=device)
    labels[1, 100:] = 77
    labels[3] = 5
    for number in (1, 2, 5):
        threads(number)
        for _ in range(5):
            with pytest.raises(IndexError, match=r"\(1, 100, 0\).*77"):
                fusedloss.cross_entropy(logits, labels)


def test_bad_label_in_a_strided_target(device):
    """The position is the tensor's, not the memory's."""
    labels = torch.zeros(5, 4, dtype=torch.int64, device=device)
    labels[3, 1] = 9
    with pytest.raises(IndexError, match=r"\(1, 3\).*9"):
        fusedloss.cross_entropy(torch.zeros(4, 3, 5, device=device), labels.T)


# ---- warnings --------------------------------------------------------------------------------------------------------


def test_broadcasting_warns_as_torch_does(device):
    x, y = torch.zeros(4, 3, device=device), torch.zeros(3, device=device)
    with pytest.warns(UserWarning, match="target size") as ours:
        fusedloss.mse_loss(x, y)
    with pytest.warns(UserWarning, match="target size") as theirs:
        F.mse_loss(x, y)
    assert len(ours) == 1
    assert str(ours[0].message) == str(theirs[0].message)
    assert ours[0].filename == __file__, "the warning must point at the caller"


def test_nothing_else_warns(device):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fusedloss.mse_loss(torch.zeros(3, 1, device=device), torch.ones(3, 1, device=device))
        fusedloss.cross_entropy(X.to(device), Y.to(device, torch.uint8), W.to(device, torch.float64))


def test_a_tensor_whose_storage_is_gone(device):
    """Its sizes promise numbers that are not there; FSDP frees parameters so."""
    gone = torch.zeros(4, 3, device=device)
    gone.untyped_storage().resize_(0)
    labels = torch.zeros(4, dtype=torch.int64, device=device)
    no_labels = labels.clone()
    no_labels.untyped_storage().resize_(0)
    no_weight = torch.zeros(3, device=device)
    no_weight.untyped_storage().resize_(0)
    for call in (
        lambda: fusedloss.cross_entropy(gone, labels),
        lambda: fusedloss.cross_entropy(X.to(device), no_labels),
        lambda: fusedloss.cross_entropy(X.to(device), labels, no_weight),
        lambda: fusedloss.mse_loss(gone, X.to(device)),
        lambda: fusedloss.mse_loss(X.to(device), gone),
    ):
        with pytest.raises(ValueError, match="no memory"):
            call()


def test_more_classes_than_are_counted(device):
    """One number, expanded: nothing may be copied to find out."""
    logits = torch.zeros(1, device=device).expand(1, 2**31)
    with pytest.raises(ValueError, match="classes"):
        fusedloss.cross_entropy(logits, torch.zeros(1, dtype=torch.int64, device=device))
