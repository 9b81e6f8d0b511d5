"""Every transform of PyTorch gives the same derivative of our loss as of PyTorch's; none is refused, none is wrong.

PyTorch's functions are built from operations that all transforms know, so in float64 they are the truth here.
"""

import functools
import warnings

import pytest
import torch
from torch import func
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import fusedloss

from .compare import random_like
from .registry import Maker, each_formula, each_reduction, each_typical_case, first_cases

# ---- transforms: (function of tensors to a scalar, tensors) -> tensors


def every(tensors):
    return tuple(range(len(tensors)))


def directions(tensors):
    """Tangents, from operations that can be compiled (a random generator cannot)."""
    return tuple(
        torch.cos((k + 1.0) * torch.arange(tensor.numel(), dtype=tensor.dtype, device=tensor.device)).view(tensor.shape)
        for k, tensor in enumerate(tensors)
    )


def batch(tensors):
    """Three different calls on top of each other."""
    return tuple(torch.stack([tensor, tensor.flip(0) if tensor.dim() else -tensor, 0.5 * tensor]) for tensor in tensors)


def eager_grad(f, tensors):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    return torch.autograd.grad(f(*leaves), leaves)


def double_backward(f, tensors):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    gradients = torch.autograd.grad(f(*leaves), leaves, create_graph=True)
    along = sum((gradient * way).sum() for gradient, way in zip(gradients, directions(tensors), strict=True))
    return torch.autograd.grad(along, leaves)


def triple_backward(f, tensors):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    value = f(*leaves)
    for _ in range(2):
        gradients = torch.autograd.grad(value, leaves, create_graph=True, materialize_grads=True)
        value = sum((gradient * way).sum() for gradient, way in zip(gradients, directions(tensors), strict=True))
    # A quadratic loss has a second derivative that depends on nothing.
    return torch.autograd.grad(value, leaves, materialize_grads=True) if value.requires_grad else ()


def func_grad(f, tensors):
    return func.grad(f, every(tensors))(*tensors)


def func_vjp(f, tensors):
    value, pull = func.vjp(f, *tensors)
    return pull(torch.full_like(value, 0.7))


def func_jvp(f, tensors):
    return func.jvp(f, tensors, directions(tensors))


def forward_mode(f, tensors):
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, way) for t, way in zip(tensors, directions(tensors), strict=True)]
        return tuple(forward_ad.unpack_dual(f(*duals)))


def hessian(f, tensors):
    return func.hessian(f)(*tensors)


def jacrev_of_jacrev(f, tensors):
    return func.jacrev(func.jacrev(f))(*tensors)


def jacfwd(f, tensors):
    return func.jacfwd(f, every(tensors))(*tensors)


def jacfwd_of_jacfwd(f, tensors):
    return func.jacfwd(func.jacfwd(f))(*tensors)


def jvp_of_grad(f, tensors):
    return func.jvp(func.grad(f, every(tensors)), tensors, directions(tensors))


def grad_of_jvp(f, tensors):
    return func.grad(lambda *ts: func.jvp(f, ts, directions(tensors))[1], every(tensors))(*tensors)


def vmap(f, tensors):
    return func.vmap(f)(*batch(tensors))


def vmap_of_grad(f, tensors):
    return func.vmap(func.grad(f, every(tensors)))(*batch(tensors))


def grad_of_vmap(f, tensors):
    return func.grad(lambda *ts: func.vmap(f)(*ts).square().sum(), every(tensors))(*batch(tensors))


def backward_of_vmap(f, tensors):
    return eager_grad(lambda *ts: func.vmap(f)(*ts).square().sum(), batch(tensors))


def backward_under_vmap(f, tensors):
    """The ordinary backward as a function that is batched, as is_grads_batched and the jacobian of autograd do."""
    return torch.autograd.functional.hessian(f, tensors, vectorize=True)


EAGER = (
    eager_grad,
    double_backward,
    triple_backward,
    func_grad,
    func_vjp,
    func_jvp,
    forward_mode,
    hessian,
    jacrev_of_jacrev,
    jacfwd,
    jacfwd_of_jacfwd,
    jvp_of_grad,
    grad_of_jvp,
    vmap,
    vmap_of_grad,
    grad_of_vmap,
    backward_of_vmap,
    backward_under_vmap,
)
COMPILED = (func_jvp, vmap_of_grad, vmap)  # and func_grad, in test_compiled_grad_is_not_zero


def scalar_functions(case, reduction, device):
    """Ours and PyTorch's as functions of the differentiable arguments, each element with a factor of its own."""
    call = case.make(torch.float64, device, reduction)
    ours, tensors = call.on(case.loss.function, call.differentiable)
    theirs, _ = call.on(case.loss.torch, call.differentiable)
    factors = random_like(theirs(*tensors))
    return (lambda *ts: (ours(*ts) * factors).sum()), (lambda *ts: (theirs(*ts) * factors).sum()), tensors


def assert_same(ours, theirs):
    assert any(t.count_nonzero() for t in torch.utils._pytree.tree_leaves(theirs)), "a truth of zeros proves nothing"
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("transform", EAGER, ids=lambda transform: transform.__name__)
@each_reduction
@each_typical_case
def test_eager(case, reduction, transform, device):
    ours, theirs, tensors = scalar_functions(case, reduction, device)
    expected = transform(theirs, tensors)
    if expected == ():
        pytest.skip("no third derivative: this loss is quadratic")
    assert_same(transform(ours, tensors), expected)


@pytest.mark.compile
@each_reduction
@each_typical_case
@pytest.mark.usefixtures("fresh_compiler")
def test_compile(case, reduction, device):
    ours, theirs, tensors = scalar_functions(case, reduction, device)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_same(compiled(*tensors), theirs(*tensors))
    assert_same(eager_grad(compiled, tensors), eager_grad(theirs, tensors))


@pytest.mark.compile
@first_cases
@pytest.mark.usefixtures("fresh_compiler")
def test_compile_with_inductor(case, device):
    ours, theirs, tensors = scalar_functions(case, "mean", device)
    compiled = torch.compile(ours, fullgraph=True)
    assert_same(compiled(*tensors), theirs(*tensors))
    assert_same(eager_grad(compiled, tensors), eager_grad(theirs, tensors))


@pytest.mark.compile
@pytest.mark.parametrize("transform", COMPILED, ids=lambda transform: transform.__name__)
@pytest.mark.parametrize("reduction", ["none", "mean"])
@first_cases
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_transform(case, reduction, transform, device):
    """Of one case each, since they take seconds; it is the formula that is traced, and test_eager has the others."""
    ours, theirs, tensors = scalar_functions(case, reduction, device)
    compiled = torch.compile(functools.partial(transform, ours), fullgraph=True, backend="aot_eager")
    assert_same(compiled(tensors), transform(theirs, tensors))


@pytest.mark.compile
@pytest.mark.parametrize("transform", [func_grad, vmap_of_grad], ids=lambda transform: transform.__name__)
@each_formula
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_transform_with_inductor(case, transform, device):
    """Of one loss for each formula: inductor takes six seconds for the reference's dozens of operations."""
    ours, theirs, tensors = scalar_functions(case, "mean", device)
    compiled = torch.compile(functools.partial(transform, ours), fullgraph=True)
    assert_same(compiled(tensors), transform(theirs, tensors))


# ---- four ways to be silently wrong ----------------------------------------------------------------------------------
# Each was seen with some way of joining a kernel to autograd: a derivative of zero, or a wrong one, and no error.


@pytest.mark.compile
@each_reduction
@first_cases
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_grad_is_not_zero(case, reduction, device):
    """An autograd.Function around an operation without a derivative, under torch.compile(torch.func.grad(...))."""
    ours, theirs, tensors = scalar_functions(case, reduction, device)
    compiled = torch.compile(func.grad(ours, every(tensors)), fullgraph=True, backend="aot_eager")
    assert_same(compiled(*tensors), func_grad(theirs, tensors))


@each_reduction
@first_cases
def test_second_derivative_by_two_backwards_is_not_zero(case, reduction, device):
    """A backward that is differentiable only once, under jacrev(jacrev(...))."""
    ours, theirs, tensors = scalar_functions(case, reduction, device)
    assert_same(jacrev_of_jacrev(ours, tensors), jacrev_of_jacrev(theirs, tensors))


@each_reduction
@first_cases
def test_second_derivative_by_forward_mode_is_not_zero(case, reduction, device):
    """A forward-mode rule beside a backward without one, under hessian = jacfwd(jacrev(...))."""
    ours, theirs, tensors = scalar_functions(case, reduction, device)
    assert_same(hessian(ours, tensors), hessian(theirs, tensors))


@each_reduction
@first_cases
def test_tangent_is_not_wrong(case, reduction, device):
    """An operation with a registered backward, under func.jvp: the tangent was a wrong number."""
    ours, theirs, tensors = scalar_functions(case, reduction, device)
    assert_same(func_jvp(ours, tensors), func_jvp(theirs, tensors))


# ---- labels, modules, and what people do with transforms -------------------------------------------------------------


@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0), (2, 1)], ids=str)
@each_reduction
def test_vmap_over_labels(reduction, in_dims, device):
    """Models in a batch, labels in a batch, or both, along any dimension."""
    m = Maker(torch.float64, device)
    logits = m.normal(*((4, 5, 3, 6) if in_dims[0] is not None else (4, 5, 6)))
    labels = m.labels(5, *((4, 3, 6) if in_dims[1] is not None else (4, 6)), ignored=-100)
    logits = logits.movedim(2, in_dims[0]) if in_dims[0] is not None else logits
    labels = labels.movedim(1, in_dims[1]) if in_dims[1] is not None else labels

    def gradient(function):
        def scalar(x, y):
            return function(x, y, reduction=reduction).square().sum()

        return func.vmap(func.grad_and_value(scalar), in_dims)(logits, labels)

    assert_same(gradient(fusedloss.cross_entropy), gradient(torch.nn.functional.cross_entropy))


def in_a_batch(tensor):
    """Three calls' worth of it; labels stay labels, weights stay positive."""
    return torch.stack([tensor, tensor.flip(0), tensor.flip(-1)])


@each_reduction
@each_typical_case
def test_vmap_over_each_argument(case, reduction, device):
    """Logits, targets, weights, one at a time and all at once, in one piece and in two: as the calls one by one."""
    call = case.make(torch.float64, device, reduction)
    factors = random_like(call.run(case.loss.torch))
    for names in (*((name,) for name in call.tensors), tuple(call.tensors)):
        batched = [in_a_batch(call.tensors[name]) for name in names]
        results = []
        for function in (case.loss.function, case.loss.torch):

            def scalar(input, *tensors, function=function, names=names):
                given = call.with_tensors(**({"input": input} | dict(zip(names, tensors, strict=True))))
                return (given.run(function) * factors).sum()

            def with_gradient(*tensors, scalar=scalar, names=names):
                input = dict(zip(names, tensors, strict=True)).get("input", call.tensors["input"])
                if "input" in names:
                    return func.grad_and_value(lambda x: scalar(x, x, *tensors[1:]))(input)
                return func.grad_and_value(scalar)(input, *tensors)

            results.append(with_gradient)
        ours, theirs = results
        one_by_one = [theirs(*tensors) for tensors in zip(*batched, strict=True)]
        expected = tuple(torch.stack(each) for each in zip(*one_by_one, strict=True))
        for chunk_size in (None, 2):
            assert_same(func.vmap(ours, chunk_size=chunk_size)(*batched), expected)


@first_cases
def test_gradient_of_each_sample(case, device):
    """The recipe of per-sample gradients: a module, functional_call, vmap over grad."""
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 5, dtype=torch.float64, device=device)
    parameters = dict(model.named_parameters())
    m = Maker(torch.float64, device)
    samples = m.normal(4, 6)
    targets = case.loss.target(m, 4, 5)

    def per_sample(loss):
        def of_parameters(parameters, sample, target):
            return loss(func.functional_call(model, parameters, (sample[None],)), target[None])

        return func.vmap(func.grad(of_parameters), in_dims=(None, 0, 0))(parameters, samples, targets)

    assert_same(per_sample(case.loss.make_module()), per_sample(case.loss.make_torch_module()))


@each_reduction
@first_cases
def test_checkpoint(case, reduction, device):
    ours, theirs, tensors = scalar_functions(case, reduction, device)

    def checkpointed(*ts):
        return torch.utils.checkpoint.checkpoint(ours, *ts, use_reentrant=False)

    assert_same(eager_grad(checkpointed, tensors), eager_grad(theirs, tensors))


@first_cases
def test_saved_tensor_hooks(case, device):
    """What is saved goes through the hooks (offloading to another device, say) and is used as it comes back."""
    ours, theirs, tensors = scalar_functions(case, "mean", device)
    packed = []

    def pack(tensor):
        packed.append(tensor)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gradients = eager_grad(ours, tensors)
    assert packed
    assert_same(gradients, eager_grad(theirs, tensors))


@first_cases
def test_nothing_as_large_as_the_input_escapes_the_hooks(case, device):
    """Offloading is asked for to save memory: no gradient may be kept beside what goes through the hooks."""
    call = case.loss.large(Maker(torch.float64, device), 1 << 16).requiring_grad(["input"])
    with torch.autograd.graph.save_on_cpu():
        value = call.run(case.loss.function)
    assert getattr(value.grad_fn, "gradient", None) is None
    value.sum().backward()
    assert_same(
        (call.tensors["input"].grad,),
        eager_grad(lambda x: call.with_tensors(input=x).run(case.loss.torch).sum(), (call.tensors["input"],)),
    )


@each_reduction
@first_cases
def test_derivative_of_what_was_traced_without_one(case, reduction, device):
    """make_fx and jit.trace record what runs; what ran without gradients may be differentiated later."""
    ours, theirs, tensors = scalar_functions(case, reduction, device)
    detached = tuple(tensor.detach() for tensor in tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jit.trace is deprecated, and finds constants
        traced = (make_fx(ours)(*detached), torch.jit.trace(ours, detached, check_trace=False))
    for function in traced:
        assert_same(eager_grad(function, tensors), eager_grad(theirs, tensors))


@pytest.mark.compile
@pytest.mark.usefixtures("fresh_compiler")
@first_cases
def test_compile_with_other_shapes(case, device):
    """One compiled function, called with new sizes: compiled again, with symbols in place of numbers."""
    compiled = torch.compile(case.loss.function, fullgraph=True, backend="aot_eager")
    for repeats in (1, 2, 3, 5):
        call = case.make(torch.float64, device)
        batched = {name for name, tensor in call.tensors.items() if tensor.dim() > 1}
        call = call.map(lambda t, repeats=repeats: torch.cat([t] * repeats), batched)
        assert_same(call.run(compiled), call.run(case.loss.torch))
        ours, tensors = call.on(compiled, call.differentiable)
        theirs, _ = call.on(case.loss.torch, call.differentiable)
        assert_same(
            eager_grad(lambda *ts, f=ours: f(*ts).sum(), tensors),
            eager_grad(lambda *ts, f=theirs: f(*ts).sum(), tensors),
        )


@pytest.mark.compile
@pytest.mark.usefixtures("fresh_compiler")
@first_cases
def test_compile_gives_the_same_bits(case, device):
    """Compiled or not, the same kernel runs, in half dtypes too; the dtypes and strides it promises are true."""
    for dtype in (torch.float32, torch.bfloat16):
        plain = case.make(dtype, device)
        plain = plain.map(lambda t: t.contiguous(memory_format=torch.channels_last), ["input"])
        results = []
        for function in (case.loss.function, torch.compile(case.loss.function, fullgraph=True, backend="aot_eager")):
            call = plain.requiring_grad(plain.differentiable)
            value = call.run(function)
            value.sum().backward()
            results.append([value, *(call.tensors[name].grad for name in plain.differentiable)])
        for eager, compiled in zip(*results, strict=True):
            assert torch.equal(eager, compiled)
            assert eager.dtype == compiled.dtype
            assert eager.stride() == compiled.stride()


@pytest.mark.compile
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("label", [25, -1])
def test_bad_label_under_transforms(label, device):
    """Some error that names the label, not a number and not a crash."""
    logits = torch.zeros(2, 3, 4, device=device)
    labels = torch.tensor([[0, 1, 2, 0], [0, 1, label, 0]], device=device)
    loss = fusedloss.cross_entropy
    for transformed in (
        torch.compile(loss, fullgraph=True, backend="aot_eager"),
        lambda x, y: func.vmap(loss)(x[None], y[None]),
        func.grad(loss),
        lambda x, y: func.jvp(lambda x: loss(x, y), (x,), (x,)),
    ):
        with pytest.raises(Exception, match=rf"(index|label|target).*{label}"):
            transformed(logits, labels)


# ---- torch.export ----------------------------------------------------------------------------------------------------


class Step(torch.nn.Module):
    """What one would export: the loss of a tiny network."""

    def __init__(self, loss):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 5, 1, dtype=torch.float64)
        self.loss = loss

    def forward(self, images, target):
        return self.loss(self.layer(images), target)


@pytest.mark.compile
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "transform",
    [func_grad, func_jvp, forward_mode, vmap, vmap_of_grad, hessian],
    ids=lambda transform: transform.__name__,
)
@each_reduction
@first_cases
def test_transform_of_the_compiled(case, reduction, transform, device):
    """The other way round: what was compiled as an ordinary function is then transformed."""
    call = case.make(torch.float64, device, reduction)
    _, theirs, tensors = scalar_functions(case, reduction, device)
    compiled, _ = call.on(torch.compile(case.loss.function, backend="aot_eager"), call.differentiable)
    factors = random_like(call.run(case.loss.torch))
    assert_same(transform(lambda *ts: (compiled(*ts) * factors).sum(), tensors), transform(theirs, tensors))


@pytest.mark.compile
@pytest.mark.usefixtures("fresh_compiler")
@each_reduction
@first_cases
def test_export(case, reduction, device):
    torch.manual_seed(0)
    step = Step(case.loss.make_module(**({"reduction": reduction} if case.loss.reductions else {}))).to(device)
    m = Maker(torch.float64, device)
    target = case.loss.target(m, 2, 5, 4, 4)
    example = (m.normal(2, 3, 4, 4), target)
    size = torch.export.Dim.AUTO
    program = torch.export.export(step, example, dynamic_shapes=({0: size, 2: size, 3: size}, None))
    again = torch.export.export(step, example)
    for exported in (program, again):
        torch.testing.assert_close(exported.module()(*example), step(*example))
    kernels = [node for node in again.graph.nodes if str(node.target).startswith("fusedloss.")]
    assert len(kernels) == 1, f"the loss must be one node, got {kernels}"


@pytest.mark.compile
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "transform", [func_grad, func_jvp, forward_mode, vmap, double_backward], ids=lambda transform: transform.__name__
)
@first_cases
def test_transform_of_the_exported(case, transform, device):
    """An exported program holds the bare operation. It may refuse a transform, but not give a wrong derivative."""
    m = Maker(torch.float64, device)
    target = case.loss.target(m, 2, 5, 4)
    example = (m.normal(2, 5, 4), target)
    exported = torch.export.export(case.loss.make_module(), example).module()
    expected = transform(lambda x: case.loss.make_torch_module()(x, target), example[:1])
    try:
        result = transform(lambda x: exported(x, target), example[:1])
    except (RuntimeError, NotImplementedError):
        return
    assert_same(result, expected)


# ---- between the doors -----------------------------------------------------------------------------------------------
# The forward ran as an ordinary call; only its backward happens under a transform. Compared with the reference, for
# torch.nn.functional.mse_loss itself fails here ("ZeroTensors are immutable", torch 2.13).


@each_reduction
@each_typical_case
def test_tangent_of_the_incoming_gradient(case, reduction, device):
    """The backward is linear in the incoming gradient, so a tangent of that comes out as a tangent."""
    call = case.make(torch.float64, device, reduction)
    results = []
    for function in (case.loss.function, case.loss.reference):
        of_tensors, tensors = call.on(function, call.differentiable)
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        value = of_tensors(*leaves)
        with forward_ad.dual_level():
            incoming = forward_ad.make_dual(random_like(value), random_like(value, seed=5))
            gradients = torch.autograd.grad(value, leaves, incoming)
            results.append([tuple(forward_ad.unpack_dual(gradient)) for gradient in gradients])
    assert_same(*results)


@each_reduction
@each_typical_case
def test_backward_inside_a_transform(case, reduction, device):
    """torch.autograd.grad of an ordinary result, called inside vmap and jvp."""
    call = case.make(torch.float64, device, reduction)
    results = []
    for function in (case.loss.function, case.loss.reference):
        of_tensors, tensors = call.on(function, call.differentiable)
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        value = of_tensors(*leaves)

        def pull(incoming, value=value, leaves=leaves):
            return torch.autograd.grad(value, leaves, incoming, retain_graph=True)

        batch_of_incoming = torch.stack([random_like(value, seed) for seed in (1, 2, 3)])
        results.append(
            (func.vmap(pull)(batch_of_incoming), func.jvp(pull, (random_like(value),), (random_like(value, 4),)))
        )
    assert_same(*results)


@each_reduction
@each_typical_case
def test_what_has_outlived_its_transform(case, reduction, device):
    """A tensor kept from inside func.grad is still wrapped; outside it is an ordinary one, with its own history."""
    call = case.make(torch.float64, device, reduction)
    of_tensors, tensors = call.on(case.loss.function, call.differentiable)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    kept = []

    def keep(one):
        kept[:] = [leaf * one for leaf in leaves]
        return one

    func.grad(keep)(torch.ones((), dtype=torch.float64, device=device))
    assert all(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in kept)
    results = []
    for operands in (kept, [leaf * 1.0 for leaf in leaves]):
        value = of_tensors(*operands)
        gradients = torch.autograd.grad(value, leaves, torch.ones_like(value), materialize_grads=True)
        results.append((value, *gradients))
    assert_same(*results)
