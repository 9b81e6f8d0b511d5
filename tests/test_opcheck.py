"""Every registered operation keeps what it promises to the dispatcher: schema, autograd, fake kernel, tracing.

The operations are taken from torch's own list and their arguments from what the losses pass to them, so an operation
that is added later is checked too, and one that no loss ever calls is noticed.
"""

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fusedloss import _calls, _ops

from .registry import LOSSES, REDUCTIONS, SEGMENTATION_LOSS, Case

NAMES = sorted(
    {
        name.partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        # What reads a GPU's memory alone (_bad_label_record) takes no part in a loss.
        if name.startswith("fusedloss::") and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
    }
)

# opcheck of torch 2.14 looks at .grad of tensors that it has made itself.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")


def is_private(name):
    return name.startswith("fusedloss::_")


class Recorder(TorchDispatchMode):
    """Notes every operation of ours that runs, with its arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.note(operation, args, kwargs or {})
        return operation(*args, **(kwargs or {}))

    def note(self, operation, args, kwargs):
        if getattr(operation, "namespace", None) == "fusedloss":
            self.calls.append((operation, args, kwargs))


class Interpreter(torch.fx.Interpreter):
    """Runs a captured graph and notes the operations with the arguments that they had before autograd saw them."""

    def __init__(self, graph, recorder):
        super().__init__(graph)
        self.recorder = recorder

    def call_function(self, target, args, kwargs):
        self.recorder.note(target, args, kwargs)
        return super().call_function(target, args, kwargs)


@functools.cache
def recorded():
    """What the cases of all losses call, eager and compiled: name of operation -> [(case, operation, arguments)]."""
    found = {}
    for loss in LOSSES:
        for name in loss.cases:
            # What a reduction changes in the arguments it changes in every case alike.
            for reduction in REDUCTIONS if name in loss.typical else ("mean",):
                recorder = Recorder()
                plain = Case(loss, name).make(torch.float32, reduction=reduction)
                call = plain.requiring_grad(plain.differentiable)
                with recorder:
                    call.run(loss.function).sum().backward()
                    # The other way to the gradient: of the input alone, for an incoming gradient other than 1.
                    (2.0 * plain.requiring_grad(["input"]).run(loss.function).sum()).backward()
                if name in loss.typical:
                    record_compiled(loss, plain.requiring_grad(plain.differentiable), recorder)
                for operation, args, kwargs in recorder.calls:
                    found.setdefault(operation._schema.name, []).append(
                        (f"{name}-{reduction}", operation, args, kwargs)
                    )
    return found


def record_compiled(loss, call, recorder):
    torch._dynamo.reset()
    compiled = torch.compile(
        loss.function, fullgraph=True, backend=lambda graph, example: Interpreter(graph, recorder).run
    )
    value = call.run(compiled)
    with recorder:
        value.sum().backward()
    torch._dynamo.reset()


def fresh(argument, private):
    if not isinstance(argument, torch.Tensor):
        return argument
    return argument.detach().clone().requires_grad_(argument.requires_grad and argument.is_leaf and not private)


@pytest.mark.compile
def test_every_operation_is_called():
    assert NAMES, "no operations: is the binary loaded?"
    assert sorted(recorded()) == NAMES


@pytest.mark.compile
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    seen = set()
    for case, operation, args, kwargs in recorded()[name]:
        kind = tuple(
            (a.dtype, a.dim(), a.stride() == torch.empty(a.shape).stride())
            if isinstance(a, torch.Tensor)
            else tuple(a)
            if isinstance(a, list)
            else a
            for a in args
        )
        if kind in seen:
            continue
        seen.add(kind)
        try:
            torch.library.opcheck(operation, tuple(fresh(a, is_private(name)) for a in args), kwargs)
        except Exception as error:
            raise AssertionError(f"{name} as called by {case}: {error}") from error
    assert seen


@pytest.mark.compile
@pytest.mark.parametrize("name", ["image-everything", "image-probabilities-everything", "sigmoid", "per-image"])
def test_opcheck_of_the_sums(name):
    """What processes exchange (`process_group=`), which no loss of one process asks for."""
    call = Case(SEGMENTATION_LOSS, name).make(torch.float32)
    call = call.requiring_grad(call.differentiable)
    defaults = {"activation": "softmax", "pixel_weight": None, "ignore_index": -100, "cross_entropy": 1.0, "iou": 1.0}
    recorder = Recorder()
    with recorder:
        sums, _ = _calls.segmentation(**(defaults | call.options | dict(call.tensors)), output=_ops.SUMS)
        sums.sum().backward()
    assert sums.dtype == torch.float64
    names = [operation._schema.name for operation, _, _ in recorder.calls]
    assert names[:2] == ["fusedloss::_segmentation_forward", "fusedloss::_segmentation_backward"]
    *arguments, _keep = recorder.calls[0][1]
    public = [call.tensors["input"], call.tensors["target"], *arguments[2:]]
    for operation, args, kwargs in [*recorder.calls, (torch.ops.fusedloss.segmentation.default, public, {})]:
        private = is_private(operation._schema.name)
        torch.library.opcheck(operation, tuple(fresh(a, private) for a in args), kwargs)


@pytest.mark.parametrize("name", NAMES)
def test_an_operation_without_a_derivative_is_private(name):
    """torch.func.grad of such an operation is silently zero, so no user may come to call it."""
    has_derivative = torch._C._dispatch_has_kernel_for_dispatch_key(name, "Autograd") or (
        torch._C._dispatch_has_kernel_for_dispatch_key(name, "AutogradCPU")
    )
    assert has_derivative or is_private(name)


@pytest.mark.parametrize("name", [name for name in NAMES if not is_private(name)])
@pytest.mark.compile
def test_a_public_operation_is_right_or_refuses(name):
    """Called directly under torch.func.grad and jvp: the right derivative or an error, no zeros."""
    _, operation, args, kwargs = recorded()[name][0]
    args = tuple(a.detach().double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)

    def scalar(x):
        out = operation(x, *args[1:], **kwargs)
        return (out[0] if isinstance(out, tuple) else out).sum()

    leaf = args[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(scalar(leaf), leaf)
    assert expected.count_nonzero()
    try:
        gradient = torch.func.grad(scalar)(args[0])
    except RuntimeError:
        pass
    else:
        torch.testing.assert_close(gradient, expected)
    try:
        _, tangent = torch.func.jvp(scalar, (args[0],), (torch.cos(args[0]),))
    except (RuntimeError, NotImplementedError):
        pass
    else:
        torch.testing.assert_close(tangent, (expected * torch.cos(args[0])).sum())
