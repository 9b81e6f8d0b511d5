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
from torch._subclasses import FakeTensorMode

import fusedloss
from fusedloss import _ops

from .registry import LOSSES, each_loss

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

# ---- the losses on probabilities -------------------------------------------------------------------------------------

NUMBERS = torch.rand(4, generator=torch.Generator().manual_seed(0))
MASK = P > 0.3  # of input's shape
BAD_MASK = torch.zeros(4, 3, dtype=torch.int64).index_put((torch.tensor(3), torch.tensor(1)), torch.tensor(2))
BINARY = IMAGE[:, :1]
SIGMOID = {"activation": "sigmoid"}

SHARED = [
    # types
    Refused("input is a list", TypeError, ("input", "list"), ([1.0, 2.0], Y)),
    Refused("input is an array", TypeError, ("input", "ndarray"), (np.zeros((4, 3)), Y)),
    Refused("input is None", TypeError, ("input", "None"), (None, Y)),
    Refused("target is None", TypeError, ("target", "None"), (X, None)),
    Refused("target is a number", TypeError, ("target", "int"), (X, 1)),
    Refused("target is a list", TypeError, ("target", "list"), (X, [0, 1, 2, 0])),
    Refused("pixel_weight is a list", TypeError, ("pixel_weight", "list"), (X, Y), {"pixel_weight": [1.0] * 4}),
    Refused("pixel_weight is a number", TypeError, ("pixel_weight", "float"), (X, Y), {"pixel_weight": 1.0}),
    Refused(
        "activation is None", TypeError, ("activation", "softmax", "sigmoid", "None"), (X, Y), {"activation": None}
    ),
    Refused("activation is a number", TypeError, ("activation", "int"), (X, Y), {"activation": 0}),
    Refused("activation is a function", TypeError, ("activation", "builtin"), (X, Y), {"activation": torch.sigmoid}),
    Refused("ignore_index is a float", TypeError, ("ignore_index", "float"), (X, Y), {"ignore_index": 1.0}),
    Refused("ignore_index is a bool", TypeError, ("ignore_index", "bool"), (X, Y), {"ignore_index": True}),
    Refused("ignore_index is None", TypeError, ("ignore_index", "None"), (X, Y), {"ignore_index": None}),
    # dtypes
    Refused("integer input", TypeError, ("input", "int64"), (X.long(), Y)),
    Refused("integer input, probabilities", TypeError, ("input", "int64"), (X.long(), P)),
    Refused("bool input", TypeError, ("input", "bool"), (X > 0, Y)),
    Refused("complex input", TypeError, ("input", "complex64"), (X + 0j, Y)),
    Refused("float8 input", TypeError, ("input", "float8"), (X.to(torch.float8_e5m2), Y)),
    Refused("int8 target", TypeError, ("target", "int8"), (X, Y.to(torch.int8))),
    Refused("uint16 target", TypeError, ("target", "uint16"), (X, Y.to(torch.uint16))),
    Refused("complex target", TypeError, ("target", "complex64"), (X, P + 0j)),
    Refused("float8 target", TypeError, ("target", "float8"), (X, P.to(torch.float8_e5m2))),
    Refused("bool target of labels' shape", TypeError, ("target", "bool", r"\(4, 3\)", r"\(4,\)"), (X, Y > 0)),
    Refused("bool target of labels' shape, sigmoid", TypeError, ("target", "bool"), (X, Y > 0), SIGMOID),
    Refused("integer pixel_weight", TypeError, ("pixel_weight", "int64"), (X, Y), {"pixel_weight": Y}),
    Refused("byte pixel_weight", TypeError, ("pixel_weight", "uint8"), (X, Y), {"pixel_weight": Y.to(torch.uint8)}),
    Refused("complex pixel_weight", TypeError, ("pixel_weight", "complex64"), (X, Y), {"pixel_weight": NUMBERS + 0j}),
    # shapes
    Refused("input without dimensions", ValueError, ("input", r"\(N, C\)", r"\(\)"), (X[0, 0], Y[0])),
    Refused("input without a batch", ValueError, ("input", r"\(N, C\)", r"\(3,\)"), (X[0], Y[0])),
    Refused("probabilities without a batch", ValueError, ("input", r"\(3,\)"), (X[0], P[0])),
    Refused("another batch size", ValueError, ("target", r"\(4,\)", r"\(3,\)"), (X, Y[:3])),
    Refused("one label for many rows", ValueError, ("target", r"\(4,\)", r"\(\)"), (X, Y[0])),
    Refused("labels in a column", ValueError, ("target", r"\(4, 1\)"), (X, Y[:, None])),
    Refused("label with a class dimension", ValueError, ("target", r"\(2, 1, 4, 5\)"), (IMAGE, MAP[:, None])),
    Refused("mask of one class for many", ValueError, ("target", r"\(2, 1, 4, 5\)"), (IMAGE, MAP[:, None]), SIGMOID),
    Refused("mask of another batch size", ValueError, ("target", r"\(3, 3\)"), (X, MASK[:3]), SIGMOID),
    Refused("label map turned", ValueError, ("target", r"\(2, 5, 4\)"), (IMAGE, MAP.mT)),
    Refused("label map without a batch", ValueError, ("target", r"\(4, 5\)"), (IMAGE, MAP[0])),
    Refused("label map that would broadcast", ValueError, ("target", r"\(1, 4, 5\)"), (IMAGE, MAP[:1])),
    Refused("label map for rows", ValueError, ("target", r"\(2, 4, 5\)"), (X, MAP)),
    Refused("float target of labels' shape", ValueError, ("target", "float32", r"\(4, 3\)", r"\(4,\)"), (X, Y.float())),
    Refused("probabilities of another shape", ValueError, ("target", r"\(4, 4\)"), (X, torch.rand(4, 4))),
    Refused("probabilities that would broadcast", ValueError, ("target", r"\(1, 3\)"), (X, P[:1])),
    Refused("bool mask under softmax", ValueError, ("target", "mask", "sigmoid"), (X, MASK)),
    Refused("integer mask under softmax", ValueError, ("target", "mask", "sigmoid"), (X, MASK.long())),
    Refused("pixel_weight too short", ValueError, ("pixel_weight", r"\(3,\)"), (X, Y), {"pixel_weight": NUMBERS[:3]}),
    Refused("pixel_weight in a column", ValueError, ("pixel_weight", r"\(4, 1\)"), (X, Y), {"pixel_weight": P[:, :1]}),
    Refused("pixel_weight without dimensions", ValueError, ("pixel_weight",), (X, Y), {"pixel_weight": NUMBERS[0]}),
    Refused(
        "pixel_weight with a class dimension",
        ValueError,
        ("pixel_weight", r"\(2, 4, 5\)", r"\(2, 1, 4, 5\)"),
        (IMAGE, MAP),
        {"pixel_weight": BINARY},
    ),
    Refused("pixel_weight of input's shape", ValueError, ("pixel_weight",), (IMAGE, MAP), {"pixel_weight": IMAGE}),
    # options
    Refused("unknown activation", ValueError, ("activation", "none", "tanh"), (X, Y), {"activation": "tanh"}),
    Refused("activation in capitals", ValueError, ("activation", "Softmax"), (X, Y), {"activation": "Softmax"}),
    Refused("ignore_index of 71 bits", ValueError, ("ignore_index", str(2**70)), (X, Y), {"ignore_index": 2**70}),
    Refused("ignore_index with probabilities", ValueError, ("ignore_index", "0"), (X, P), {"ignore_index": 0}),
    Refused(
        "ignore_index with a mask",
        ValueError,
        ("ignore_index", "pixel_weight", "255"),
        (X, MASK),
        {"ignore_index": 255, **SIGMOID},
    ),
    Refused(
        "ignore_index with an integer mask",
        ValueError,
        ("ignore_index", "pixel_weight", "255"),
        (X, MASK.long()),
        {"ignore_index": 255, **SIGMOID},
    ),
    Refused("softmax of one class", ValueError, ("activation", "sigmoid", "softmax"), (BINARY, MAP)),
    Refused("softmax of one class, mask", ValueError, ("activation", "sigmoid"), (BINARY, MAP[:, None])),
    Refused("softmax of one class, probabilities", ValueError, ("activation", "sigmoid"), (BINARY, BINARY)),
    Refused(
        "pixel_weight requires grad",
        ValueError,
        ("pixel_weight", "grad"),
        (X, Y),
        {"pixel_weight": NUMBERS.clone().requires_grad_()},
    ),
    # devices and layouts
    Refused("target elsewhere", ValueError, ("target", "meta"), (X, Y.to("meta"))),
    Refused("probabilities elsewhere", ValueError, ("target", "meta"), (X, META)),
    Refused("input elsewhere", ValueError, ("input", "meta"), (META, Y)),
    Refused("pixel_weight elsewhere", ValueError, ("pixel_weight", "meta"), (X, Y), {"pixel_weight": META[:, 0]}),
    Refused("all on meta", ValueError, ("input", "meta"), (META, Y.to("meta"))),
    Refused("sparse input", ValueError, ("input", "to_dense", "sparse"), (X.to_sparse(), Y)),
    Refused("sparse target", ValueError, ("target", "sparse"), (X, Y.to_sparse())),
    Refused("sparse probabilities", ValueError, ("target", "sparse"), (X, P.to_sparse())),
    Refused(
        "sparse pixel_weight", ValueError, ("pixel_weight", "sparse"), (X, Y), {"pixel_weight": NUMBERS.to_sparse()}
    ),
    # labels
    Refused("label too large", IndexError, ("target", r"\(2,?\)", "3"), (X, torch.tensor([0, 1, 3, 0]))),
    Refused("label negative", IndexError, ("target", r"\(1,?\)", "-1"), (X, torch.tensor([0, -1, 2, 0]))),
    Refused("label of one class", IndexError, ("target", r"\(2,?\)", "2"), (X[:, :1], Y), SIGMOID),
    Refused("int8 mask", TypeError, ("target", "int8"), (X, MASK.to(torch.int8)), SIGMOID),
    Refused("complex mask", TypeError, ("target", "complex64"), (X, MASK + 0j), SIGMOID),
    Refused("label without classes", IndexError, ("target", r"\(0,?\)"), (X[:, :0], Y)),
    Refused("number in a mask", IndexError, ("target", r"\(3, 1\)", "0 or 1", "2"), (X, BAD_MASK), SIGMOID),
]

CLASS_WEIGHTS = [
    Refused("weight is a list", TypeError, ("weight", "list"), (X, Y, [1.0, 1.0, 1.0])),
    Refused("weight is a string", TypeError, ("weight", "str"), (X, Y, "mean")),
    Refused("integer weight", TypeError, ("weight", "int64"), (X, Y, torch.ones(3, dtype=torch.int64))),
    Refused("bool weight", TypeError, ("weight", "bool"), (X, Y, W > 0)),
    Refused("complex weight", TypeError, ("weight", "complex64"), (X, Y, W + 0j)),
    Refused("integer weight with probabilities", TypeError, ("weight", "int64"), (X, P, W.long())),
    Refused("weight too long", ValueError, ("weight", r"\(3,\)", r"\(4,\)"), (X, Y, torch.rand(4))),
    Refused("weight that would broadcast", ValueError, ("weight", r"\(1,\)"), (X, Y, torch.rand(1))),
    Refused("weight with two dimensions", ValueError, ("weight", r"\(1, 3\)"), (X, Y, W[None])),
    Refused("weight without dimensions", ValueError, ("weight", r"\(\)"), (X, Y, W[0])),
    Refused("weight requires grad", ValueError, ("weight", "grad"), (X, Y, W.clone().requires_grad_())),
    Refused("weight requires grad, probabilities", ValueError, ("weight", "grad"), (X, P, W.clone().requires_grad_())),
    Refused("weight elsewhere", ValueError, ("weight", "meta"), (X, Y, W.to("meta"))),
    Refused("sparse weight", ValueError, ("weight", "sparse"), (X, Y, W.to_sparse())),
]

REDUCTION = [
    Refused("reduction is None", TypeError, ("reduction", "None"), (X, Y), {"reduction": None}),
    Refused("reduction is a number", TypeError, ("reduction", "int"), (X, Y), {"reduction": 1}),
    Refused("unknown reduction", ValueError, ("reduction", "average"), (X, Y), {"reduction": "average"}),
    Refused("reduction in capitals", ValueError, ("reduction", "Mean"), (X, Y), {"reduction": "Mean"}),
]

RETIRED = [
    Refused("size_average", (TypeError, ValueError), ("size_average", "reduction"), (X, Y), {"size_average": False}),
    Refused("reduce", (TypeError, ValueError), ("reduce", "reduction"), (X, Y), {"reduce": True}),
]

GROUPS = [
    Refused("per_image is a string", TypeError, ("per_image", "str"), (X, Y), {"per_image": "yes"}),
    Refused("intersection is None", TypeError, ("intersection", "None"), (X, Y), {"intersection": None}),
    Refused(
        "unknown intersection",
        ValueError,
        ("intersection", "'min' or 'product'", "max"),
        (X, Y),
        {"intersection": "max"},
    ),
]

OVERLAP = [
    *GROUPS,
    Refused("log is None", TypeError, ("log", "None"), (X, Y), {"log": None}),
    Refused("per_image is a number", TypeError, ("per_image", "int"), (X, Y), {"per_image": 1}),
    Refused("gamma is infinite", ValueError, ("gamma", "finite", "inf"), (X, Y), {"gamma": math.inf}),
    Refused("eps is infinite", ValueError, ("eps", "finite", "inf"), (X, Y), {"eps": math.inf}),
    Refused("smooth is infinite", ValueError, ("smooth", "finite", "inf"), (X, Y), {"smooth": math.inf}),
    Refused("smooth is too large for a float", ValueError, ("smooth", "finite"), (X, Y), {"smooth": 10**400}),
    Refused("smooth is a bool", TypeError, ("smooth", "bool"), (X, Y), {"smooth": True}),
    Refused("classes is a set", TypeError, ("classes", "set"), (X, Y), {"classes": {0, 1}}),
    Refused("classes is bools", TypeError, ("classes", "bool"), (X, Y), {"classes": (True,)}),
    Refused("absent is None", TypeError, ("absent", "None"), (X, Y), {"absent": None}),
    Refused("absent is a bool", TypeError, ("absent", "bool"), (X, Y), {"absent": True}),
    Refused("unknown absent", ValueError, ("absent", "skip", "keep"), (X, Y), {"absent": "keep"}),
    Refused("log is a string", TypeError, ("log", "str"), (X, Y), {"log": "no"}),
    Refused("smooth is a string", TypeError, ("smooth", "str"), (X, Y), {"smooth": "1"}),
    Refused("smooth is None", TypeError, ("smooth", "None"), (X, Y), {"smooth": None}),
    Refused("smooth below 0", ValueError, ("smooth", "0 or more", "-1"), (X, Y), {"smooth": -1.0}),
    Refused("smooth NaN", ValueError, ("smooth", "nan"), (X, Y), {"smooth": math.nan}),
    Refused("eps is None", TypeError, ("eps", "None"), (X, Y), {"eps": None}),
    Refused("eps of 0", ValueError, ("eps", "more than 0", "0"), (X, Y), {"eps": 0.0}),
    Refused("eps below 0", ValueError, ("eps", "-1e-07"), (X, Y), {"eps": -1e-7}),
    Refused("eps NaN", ValueError, ("eps", "nan"), (X, Y), {"eps": math.nan}),
    Refused("gamma is complex", TypeError, ("gamma", "complex"), (X, Y), {"gamma": 1j}),
    Refused("gamma of 0", ValueError, ("gamma", "more than 0", "0"), (X, Y), {"gamma": 0}),
    Refused("gamma below 0", ValueError, ("gamma", "-2"), (X, Y), {"gamma": -2.0}),
    Refused("gamma NaN", ValueError, ("gamma", "nan"), (X, Y), {"gamma": math.nan}),
    Refused("classes is a number", TypeError, ("classes", "sequence", "int"), (X, Y), {"classes": 1}),
    Refused("classes is a string", TypeError, ("classes", "sequence", "str"), (X, Y), {"classes": "01"}),
    Refused("a class is a float", TypeError, ("classes", "int", "float"), (X, Y), {"classes": (0, 1.0)}),
    Refused("a class is None", TypeError, ("classes", "int", "None"), (X, Y), {"classes": [None]}),
    Refused("a class of 71 bits", ValueError, ("classes", str(2**70)), (X, Y), {"classes": [2**70]}),
    Refused("a class too large", ValueError, ("classes", r"\[0, 3\)", "3"), (X, Y), {"classes": (0, 3)}),
    Refused("a class negative", ValueError, ("classes", r"\[0, 3\)", "-1"), (X, Y), {"classes": (-1,)}),
    Refused("a class twice", ValueError, ("classes", "different", r"\[1, 0, 1\]"), (X, Y), {"classes": (1, 0, 1)}),
    Refused("no class", ValueError, ("classes", "one or more", r"\[\]"), (X, Y), {"classes": ()}),
]

TVERSKY = [
    Refused("alpha is a string", TypeError, ("alpha", "str"), (X, Y), {"alpha": "1"}),
    Refused("alpha below 0", ValueError, ("alpha", "0 or more", "-0.5"), (X, Y), {"alpha": -0.5}),
    Refused("alpha NaN", ValueError, ("alpha", "nan"), (X, Y), {"alpha": math.nan}),
    Refused("beta is None", TypeError, ("beta", "None"), (X, Y), {"beta": None}),
    Refused("beta below 0", ValueError, ("beta", "0 or more", "-0.5"), (X, Y), {"beta": -0.5}),
    Refused("beta NaN", ValueError, ("beta", "nan"), (X, Y), {"beta": math.nan}),
]

SEGMENTATION = [
    Refused(
        "cross_entropy is NaN", ValueError, ("cross_entropy", "finite", "nan"), (X, Y), {"cross_entropy": math.nan}
    ),
    Refused("brier is infinite", ValueError, ("brier", "finite", "inf"), (X, Y), {"brier": math.inf}),
    Refused("return_terms is a string", TypeError, ("return_terms", "str"), (X, Y), {"return_terms": "x"}),
    Refused("cross_entropy is a string", TypeError, ("cross_entropy", "str"), (X, Y), {"cross_entropy": "1"}),
    Refused("iou is None", TypeError, ("iou", "None"), (X, Y), {"iou": None}),
    Refused("brier is complex", TypeError, ("brier", "complex"), (X, Y), {"brier": 1j}),
    Refused("label_smoothing is None", TypeError, ("label_smoothing", "None"), (X, Y), {"label_smoothing": None}),
    Refused("smoothing above 1", ValueError, ("label_smoothing", r"\[0, 1\]", "1.1"), (X, Y), {"label_smoothing": 1.1}),
    Refused("smoothing below 0", ValueError, ("label_smoothing", r"\[0, 1\]", "-1"), (X, Y), {"label_smoothing": -1}),
    Refused("smoothing NaN", ValueError, ("label_smoothing", "nan"), (X, Y), {"label_smoothing": math.nan}),
    Refused(
        "cross-entropy of probabilities",
        ValueError,
        ("cross_entropy", "activation='none'", "logits", "1"),
        (P, Y),
        {"activation": "none", "cross_entropy": 1.0},
    ),
    Refused("pos_weight is a list", TypeError, ("pos_weight", "list"), (X, Y), {"pos_weight": [1.0, 1.0, 1.0]}),
    Refused("integer pos_weight", TypeError, ("pos_weight", "int64"), (X, Y), {"pos_weight": W.long()}),
    Refused("pos_weight too long", ValueError, ("pos_weight", r"\(3,\)", r"\(4,\)"), (X, Y), {"pos_weight": NUMBERS}),
    Refused("pos_weight that would broadcast", ValueError, ("pos_weight", r"\(1,\)"), (X, Y), {"pos_weight": W[:1]}),
    Refused(
        "pos_weight requires grad",
        ValueError,
        ("pos_weight", "grad"),
        (X, Y),
        {"pos_weight": W.clone().requires_grad_()},
    ),
    Refused("pos_weight elsewhere", ValueError, ("pos_weight", "meta"), (X, Y), {"pos_weight": W.to("meta")}),
    Refused("sparse pos_weight", ValueError, ("pos_weight", "sparse"), (X, Y), {"pos_weight": W.to_sparse()}),
]

TWINS = {"cross_entropy": CROSS_ENTROPY, "mse_loss": MSE_LOSS}
ON_PROBABILITIES = {
    "soft_iou_loss": SHARED + CLASS_WEIGHTS + REDUCTION + RETIRED + OVERLAP,
    "dice_loss": SHARED + CLASS_WEIGHTS + REDUCTION + RETIRED + OVERLAP,
    "tversky_loss": SHARED + CLASS_WEIGHTS + REDUCTION + RETIRED + OVERLAP + TVERSKY,
    "brier_loss": SHARED + CLASS_WEIGHTS + REDUCTION + RETIRED,
    "segmentation_loss": SHARED + CLASS_WEIGHTS + RETIRED + OVERLAP + TVERSKY + SEGMENTATION,
    "overlap_statistics": SHARED + GROUPS,
}


def table(of_functions):
    return [pytest.param(name, row, id=f"{name}-{row.id}") for name, rows in of_functions.items() for row in rows]


TABLE = table(TWINS | ON_PROBABILITIES)
MODULES = {loss.name: loss.module for loss in LOSSES if loss.module is not None}
REQUIRED = {"tversky_loss": {"alpha": 0.3, "beta": 0.7}}  # options that have no default


@pytest.mark.parametrize(("name", "row"), TABLE)
def test_refused(name, row):
    with pytest.raises(row.error) as caught:
        getattr(fusedloss, name)(*row.arguments, **REQUIRED.get(name, {}) | row.options)
    message = str(caught.value)
    assert message.startswith(f"{name}: "), message
    assert "\n" not in message
    for word in row.words:
        assert re.search(word, message), f"{word!r} is not in {message!r}"


@pytest.mark.parametrize(("name", "row"), table(TWINS))
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
        getattr(fusedloss, name)(*arguments, **REQUIRED.get(name, {}) | row.options)


@pytest.mark.parametrize(("name", "row"), [p for p in TABLE if p.values[0] in MODULES])
def test_refused_by_the_module_too(name, row):
    """Options that the constructor does not know are its own TypeError; all else is found in the call."""
    options = REQUIRED.get(name, {}) | row.options
    given = {key: options.pop(key) for key in ("pixel_weight",) if key in options}  # with input and target
    if name != "mse_loss" and len(row.arguments) == 3:
        options["weight"] = row.arguments[2]
    with pytest.raises((row.error, TypeError) if isinstance(row.error, type) else row.error):
        MODULES[name](**options)(*row.arguments[:2], **given)


@each_loss
def test_a_good_call_after_a_bad_one(loss):
    for row in (TWINS | ON_PROBABILITIES)[loss.name]:
        with pytest.raises(row.error):
            loss.function(*row.arguments, **loss.required | row.options)
    target = P if loss.name == "mse_loss" else Y
    torch.testing.assert_close(loss.function(X, target, **loss.required), loss.torch(X, target, **loss.required))


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


# ---- devices ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(_ops.CUDA_REFUSED is None, reason="the CUDA kernels are there")
@pytest.mark.parametrize("name", [loss.name for loss in LOSSES])
def test_without_cuda_kernels_it_is_said_how_to_build_them(name):
    with FakeTensorMode():  # the only CUDA tensors that a torch without CUDA has
        there, labels = torch.zeros(4, 3, device="cuda"), torch.zeros(4, dtype=torch.int64, device="cuda")
    target = there if name == "mse_loss" else labels
    for arguments, at_fault in (((there, target), "input"), ((X, target), "target")):
        with pytest.raises(ValueError, match="FORCE_CUDA=1 pip install --no-build-isolation") as caught:
            getattr(fusedloss, name)(*arguments, **REQUIRED.get(name, {}))
        message = str(caught.value)
        assert message.startswith(f"{name}: `{at_fault}` must be on the CPU, got cuda:0, and ")
        assert _ops.CUDA_REFUSED in message
        assert "\n" not in message


@pytest.mark.parametrize("name", [loss.name for loss in LOSSES])
def test_another_device_is_told_who_takes_it(name):
    target = META if name == "mse_loss" else Y.to("meta")
    with pytest.raises(ValueError, match=rf"got meta \((torch.nn.functional|fusedloss.reference).{name} takes it\)"):
        getattr(fusedloss, name)(META, target, **REQUIRED.get(name, {}))


def test_why_there_are_no_cuda_kernels(tmp_path):
    library = tmp_path / "_C_cuda.so"
    assert "torch has no CUDA" in _ops._load_cuda(library, None)
    assert "without CUDA kernels" in _ops._load_cuda(library, "12.8")
    library.write_text("this is no library\n")
    refused = _ops._load_cuda(library, "12.8")
    assert refused.startswith("_C_cuda.so does not load (")
    assert "\n" not in refused


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


# ---- the losses on probabilities, beside the table -------------------------------------------------------------------

each_on_probabilities = pytest.mark.parametrize("name", ON_PROBABILITIES)


def call(name, *arguments, **options):
    return getattr(fusedloss, name)(*arguments, **REQUIRED.get(name, {}) | options)


@each_on_probabilities
def test_the_first_of_many_bad_labels_on_probabilities(name, threads, device):
    """Of a mask too, where it is the first in the tensor's order, not in that of the visit."""
    logits = torch.zeros(4, 3, 200, 150, device=device)
    labels = torch.zeros(4, 200, 150, dtype=torch.int64, device=device)
    labels[1, 100:] = 77
    labels[3] = 5
    mask = torch.zeros(4, 3, 200, 150, dtype=torch.uint8, device=device)
    mask[1, 2, 100:] = 7
    mask[1, 1, 150:] = 9  # another class, a later pixel
    mask[3] = 5
    for number in (1, 2, 5):
        threads(number)
        with pytest.raises(IndexError, match=r"\(1, 100, 0\).*77"):
            call(name, logits, labels)
        for of_dtype in (mask, mask.long(), mask.contiguous(memory_format=torch.channels_last)):
            for in_format in (logits, logits.contiguous(memory_format=torch.channels_last)):
                with pytest.raises(IndexError, match=r"\(1, 1, 150, 0\).*9"):
                    call(name, in_format, of_dtype, **SIGMOID)


@each_on_probabilities
def test_bad_label_in_a_strided_target_on_probabilities(name, device):
    labels = torch.zeros(5, 4, dtype=torch.int64, device=device)
    labels[3, 1] = 9
    with pytest.raises(IndexError, match=r"\(1, 3\).*9"):
        call(name, torch.zeros(4, 3, 5, device=device), labels.T)
    mask = torch.zeros(5, 3, 4, dtype=torch.uint8, device=device)
    mask[3, 2, 1] = 9
    with pytest.raises(IndexError, match=r"\(1, 2, 3\).*9"):
        call(name, torch.zeros(4, 3, 5, device=device), mask.permute(2, 1, 0), **SIGMOID)


@each_on_probabilities
def test_ignore_index_of_another_dtype_is_a_bad_label(name, device):
    """-100 is not the 156 of a byte, and the default is no longer ignored where another label is."""
    logits = torch.zeros(3, 3, device=device)
    with pytest.raises(IndexError, match=r"\(1,?\).*156"):
        call(name, logits, torch.tensor([0, 156, 1], dtype=torch.uint8, device=device))
    with pytest.raises(IndexError, match=r"\(2,?\).*-7.*-100"):
        call(name, logits, torch.tensor([0, -7, -100], device=device), ignore_index=-7)


@each_on_probabilities
def test_right_calls_do_not_warn_on_probabilities(name, device):
    """Nor are they refused: each kind of label and weight that the docstrings name."""
    x, y, p = X.to(device), Y.to(device), P.to(device)
    for activation in ("softmax", "sigmoid", "none"):
        options = {"activation": activation}
        if name == "segmentation_loss" and activation == "none":
            options["cross_entropy"] = 0
        masks = [] if activation == "softmax" else [p > 0.3, (p > 0.3).to(torch.uint8), (p > 0.3).long()]
        for target in (y, y.to(torch.uint8), y.to(torch.int16), y.int(), p, p.double(), p.half(), *masks):
            for pixel_weight in (None, p[:, 0], p[:, 0].double(), p[:, 0].bfloat16(), y > 0):
                call(name, p if activation == "none" else x, target, pixel_weight=pixel_weight, **options)


@each_on_probabilities
def test_a_tensor_whose_storage_is_gone_on_probabilities(name, device):
    def gone(*shape, dtype=torch.float32):
        tensor = torch.zeros(shape, dtype=dtype, device=device)
        tensor.untyped_storage().resize_(0)
        return tensor

    x, y = X.to(device), Y.to(device)
    for arguments, options in (
        ((gone(4, 3), y), {}),
        ((x, gone(4, dtype=torch.int64)), {}),
        ((x, gone(4, 3)), {}),
        ((x, y), {"pixel_weight": gone(4)}),
        *([] if name == "overlap_statistics" else [((x, y, gone(3)), {})]),
    ):
        with pytest.raises(ValueError, match="no memory"):
            call(name, *arguments, **options)


@each_on_probabilities
def test_more_classes_than_are_counted_on_probabilities(name, device):
    logits = torch.zeros(1, device=device).expand(1, 2**31)
    with pytest.raises(ValueError, match="classes"):
        call(name, logits, torch.zeros(1, dtype=torch.int64, device=device))


@pytest.mark.parametrize(
    ("argument", "dtype"),
    [("input", torch.int32), ("input", torch.float8_e4m3fn), ("target", torch.float8_e4m3fn)],
    ids=str,
)
@pytest.mark.parametrize("name", ["cross_entropy", *ON_PROBABILITIES])
def test_a_dtype_that_is_refused_stays_so_beside_float64(name, dtype, argument, device):
    given = {"input": torch.zeros(2, 3, 4, dtype=torch.float64), "target": torch.full((2, 3, 4), 1 / 3).double()}
    given[argument] = given[argument].to(dtype)
    given = {key: value.to(device) for key, value in given.items()}
    with pytest.raises(TypeError, match=f"^{name}: `{argument}` must .*{dtype}"):
        call(name, **given)


def test_options_without_a_default_are_asked_for():
    with pytest.raises(TypeError, match=r"alpha.*beta"):
        fusedloss.tversky_loss(X, Y)
    with pytest.raises(TypeError, match="beta"):
        fusedloss.tversky_loss(X, Y, alpha=0.3)
    with pytest.raises(TypeError, match=r"alpha.*beta"):
        fusedloss.TverskyLoss()


@each_on_probabilities
def test_options_are_keywords(name):
    """weight is the last that may be given by its place, and overlap_statistics has none."""
    with pytest.raises(TypeError, match="positional"):
        call(name, X, Y, *([] if name == "overlap_statistics" else [None]), "softmax")
