"""Calls every loss with hostile arguments and prints what came of it as JSON. test_fuzz.py runs it as a process.

A call starts as a right one and then has none, one or two of its arguments replaced by something else: another kind of
object, dtype, shape, layout, device, value or option. What is judged:

- PyTorch takes the call: ours gives the same value and gradient, or refuses what ``stricter`` names.
- PyTorch refuses it: ours refuses it too, with a ValueError, TypeError or IndexError that names the function.

Before each call it is written to the file named on the command line, so that after a crash the last line there is the
culprit.
"""

import collections
import functools
import json
import math
import sys
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fusedloss

INPUT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LABEL_DTYPES = (torch.int64, torch.uint8, torch.int16, torch.int32)
OTHER_DTYPES = (torch.int8, torch.bool, torch.complex64, torch.uint16, torch.float8_e4m3fn)
# Whether a tensor made in inference mode is saved is autograd's matter, and these are its words.
AUTOGRAD_REFUSES = "Inference tensors cannot be saved for backward"
REDUCTIONS = ("mean", "sum", "none")

# ---- right calls -----------------------------------------------------------------------------------------------------

sizes = st.integers(1, 5)
seeds = st.integers(0, 2**16)


def numbers(shape, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


@st.composite
def right_cross_entropy(draw):
    shape = draw(st.lists(sizes, min_size=1, max_size=5))
    classes = shape[0] if len(shape) == 1 else shape[1]
    pixels = shape[:1] + shape[2:] if len(shape) > 1 else []
    seed = draw(seeds)
    dtype = draw(st.sampled_from(INPUT_DTYPES))
    call = {"input": numbers(shape, seed, dtype)}
    if draw(st.booleans()):
        labels = torch.randint(classes, pixels, generator=torch.Generator().manual_seed(seed))
        call["target"] = labels.to(draw(st.sampled_from(LABEL_DTYPES)))
        call["ignore_index"] = draw(st.sampled_from([-100, 0, 1, 255]))
    else:
        call["target"] = numbers(shape, seed + 1, draw(st.sampled_from(INPUT_DTYPES))).abs()
    if draw(st.booleans()):
        call["weight"] = numbers([classes], seed + 2, dtype).abs()
    call["reduction"] = draw(st.sampled_from(REDUCTIONS))
    call["label_smoothing"] = draw(st.sampled_from([0.0, 0.0, 0.1, 1.0]))
    return call


@st.composite
def right_mse_loss(draw):
    shape = draw(st.lists(sizes, max_size=5))
    seed = draw(seeds)
    call = {"input": numbers(shape, seed, draw(st.sampled_from(INPUT_DTYPES)))}
    other = shape[draw(st.integers(0, len(shape))) :] if draw(st.booleans()) else shape
    call["target"] = numbers(other, seed + 1, draw(st.sampled_from(INPUT_DTYPES)))
    if draw(st.booleans()):
        call["weight"] = numbers(shape, seed + 2, draw(st.sampled_from(INPUT_DTYPES))).abs()
    call["reduction"] = draw(st.sampled_from(REDUCTIONS))
    return call


# ---- what can be wrong with a tensor ---------------------------------------------------------------------------------


def reshaped(tensor, shape):
    return tensor.new_zeros(shape) if not tensor.is_sparse else tensor


def poisoned(tensor, value):
    if tensor.numel() == 0 or tensor.is_complex() or not tensor.dtype.is_floating_point:
        return tensor
    changed = tensor.clone()
    changed.view(-1)[-1] = value
    return changed


def relabelled(tensor, value):
    if tensor.numel() == 0 or tensor.dtype not in LABEL_DTYPES:
        return tensor
    changed = tensor.clone()
    info = torch.iinfo(tensor.dtype)
    changed.view(-1)[-1] = min(max(value, info.min), info.max)
    return changed


CHANGES = {
    "dtype": st.sampled_from(INPUT_DTYPES + LABEL_DTYPES + OTHER_DTYPES).map(lambda d: lambda t: t.to(d)),
    "shape": st.lists(st.integers(0, 4), max_size=5).map(lambda s: lambda t: reshaped(t, s)),
    "one more dimension": st.integers(0, 2).map(lambda d: lambda t: t.unsqueeze(min(d, t.dim()))),
    "one less dimension": st.just(lambda t: t[0] if t.dim() and len(t) else t),
    "empty": st.just(lambda t: t[:0] if t.dim() else t),
    "turned": st.just(lambda t: t.mT if t.dim() > 1 else t),
    "laid out turned": st.just(lambda t: t.mT.contiguous().mT if t.dim() > 1 else t),
    "expanded": st.just(lambda t: t[:1].expand(t.shape) if t.dim() and len(t) else t),
    "every second": st.just(lambda t: torch.stack([t, t], -1)[..., 0]),
    "flipped": st.just(lambda t: t.flip(0) if t.dim() else t),
    "misaligned": st.just(lambda t: torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape)),
    "channels_last": st.just(lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t),
    "value": st.sampled_from([math.nan, math.inf, -math.inf, 1e30, -1e30, 1e-40]).map(
        lambda v: lambda t: poisoned(t, v)
    ),
    "label": st.sampled_from([-1, -100, 5, 255, 256, 2**31, 2**32, -(2**63), 2**63 - 1]).map(
        lambda v: lambda t: relabelled(t, v)
    ),
    "meta": st.just(lambda t: t.to("meta")),
    "sparse": st.just(lambda t: t.to_sparse()),
    "compressed": st.just(lambda t: t.to_sparse_csr() if t.dim() == 2 else t),
    "parameter": st.just(lambda t: torch.nn.Parameter(t, requires_grad=t.is_floating_point())),
    "no leaf": st.just(lambda t: t.clone().requires_grad_() * 1 if t.is_floating_point() else t),
    "inference": st.just(lambda t: inference(t)),
    "negative bit": st.just(lambda t: torch._neg_view(-t) if t.is_floating_point() else t),
    "conjugate": st.just(lambda t: (t + 0j).conj() if t.dtype == torch.float32 else t),
    "nested": st.just(lambda t: torch.nested.nested_tensor([t, t]) if t.dtype == torch.float32 and t.dim() else t),
}
OBJECTS = st.sampled_from(
    [None, 1, 1.5, True, "mean", b"mean", [1.0, 2.0], (0, 1), {}, object(), np.zeros((4, 3)), np.float32(1), 2**70, len]
)
OPTIONS = {
    "ignore_index": st.one_of(
        st.integers(-5, 5), st.integers(-(2**80), 2**80), st.sampled_from([2**63 - 1, -(2**63), 2**63]), OBJECTS
    ),
    "reduction": st.one_of(st.sampled_from([*REDUCTIONS, "", "Mean", "elementwise", "none "]), OBJECTS),
    "label_smoothing": st.one_of(st.floats(allow_nan=True), st.sampled_from([0, 1, -0.0, 5e-324, 1 + 1e-16]), OBJECTS),
}


def inference(tensor):
    with torch.inference_mode():
        return tensor.clone()


@st.composite
def hostile(draw, right):
    """(call, what was changed)"""
    call = draw(right)
    changes = []
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 1, 2]))):
        names = [*(name for name in ("input", "target", "weight") if name in call), *(n for n in OPTIONS if n in call)]
        name = draw(st.sampled_from(names))
        if name in OPTIONS:
            call[name] = draw(OPTIONS[name])
            changes.append(name)
        elif isinstance(call[name], torch.Tensor) and draw(st.integers(0, 5)):
            kind = draw(st.sampled_from(sorted(CHANGES)))
            change = draw(CHANGES[kind])
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    call[name] = change(call[name])
            except Exception:  # the change does not fit what an earlier one left
                continue
            changes.append(f"{name}: {kind}")
        else:
            call[name] = draw(OBJECTS)
            changes.append(f"{name}: object")
    return call, changes


# ---- judgement -------------------------------------------------------------------------------------------------------


def describe(value):
    if isinstance(value, torch.Tensor):
        try:
            strides = "" if value.layout != torch.strided or value.is_nested else f" strides {tuple(value.stride())}"
            return f"<{value.dtype} {tuple(value.shape)}{strides} {value.device} {value.layout}>"
        except Exception:
            return "<tensor without a shape>"
    return repr(value)[:60]


def is_tensor(call, name, *dtypes):
    return isinstance(call.get(name), torch.Tensor) and (not dtypes or call[name].dtype in dtypes)


def like_torch(name, call):
    """PyTorch's function, helped over what only ours takes: other integer labels, weights of another dtype."""
    call = dict(call)
    if name == "cross_entropy" and is_tensor(call, "target", *LABEL_DTYPES) and is_tensor(call, "input"):
        one_label = call["input"].dim() == 1 and call["target"].shape == (1,)
        call["target"] = call["target"].long().reshape(()) if one_label else call["target"].long()
        if is_tensor(call, "weight", *INPUT_DTYPES):
            call["weight"] = call["weight"].to(call["input"].dtype)
    return getattr(F, name)(**call)


def stricter(name, call):
    """What PyTorch takes and we refuse on purpose."""
    tensors = [call[k] for k in ("input", "target", "weight") if isinstance(call.get(k), torch.Tensor)]
    smoothing = call.get("label_smoothing", 0.0)
    return (
        any(t.device.type == "meta" or t.layout != torch.strided or t.is_nested for t in tensors)
        or any(t.is_complex() or t.dtype in OTHER_DTYPES for t in tensors)
        or (is_tensor(call, "weight") and not call["weight"].is_floating_point())
        or (name == "cross_entropy" and is_tensor(call, "weight") and call["weight"].dim() == 0)  # of one class
        or (name == "mse_loss" and is_tensor(call, "input") and not call["input"].is_floating_point())
        or (isinstance(smoothing, (int, float)) and not 0 <= smoothing <= 1)
        or isinstance(smoothing, bool)
        or type(smoothing).__module__ == "numpy"
        or type(call.get("ignore_index")).__module__ == "numpy"
    )


def more_lenient(name, call):
    """What PyTorch refuses only because it multiplies by the weight in another way than it does everything else."""
    return name == "mse_loss" and is_tensor(call, "weight") and is_tensor(call, "target", torch.bool)


def value_and_gradient(function, call):
    input = call["input"].detach().clone(memory_format=torch.preserve_format).requires_grad_()
    value = function({**call, "input": input})
    (gradient,) = torch.autograd.grad(value.double().sum(), input)
    return value.detach(), gradient


def close(ours, theirs, eps):
    return ours.shape == theirs.shape and torch.allclose(
        ours.double(), theirs.double(), rtol=64 * eps, atol=64 * eps, equal_nan=True
    )


def compare(name, call):
    """None, or what is wrong with a call that both take."""
    ours, their = getattr(fusedloss, name)(**call), like_torch(name, call)
    # PyTorch leaves the dtype of a weight without dimensions out of the promotion when the loss has some.
    odd = name == "mse_loss" and is_tensor(call, "weight") and call["weight"].dim() == 0 != ours.dim()
    if (ours.dtype != their.dtype and not odd) or ours.shape != their.shape:
        return f"gives {describe(ours)}, torch {describe(their)}"
    tensors = [t for t in call.values() if isinstance(t, torch.Tensor)]
    finite = all(t.isfinite().all() and t.abs().max() < 1e4 for t in tensors if t.is_floating_point() and t.numel())
    if not finite or not call["input"].is_floating_point() or any(t.is_inference() for t in tensors):
        return (
            None
            if ours.isnan().any() or their.isnan().any() or not finite or torch.equal(ours.isnan(), their.isnan())
            else "NaN"
        )
    # PyTorch rounds to the coarsest dtype on the way (a smoothed label, a sum of weights), ours does not.
    eps = max(torch.finfo(t.dtype).eps for t in tensors if t.is_floating_point())
    ours, our_gradient = value_and_gradient(lambda c: getattr(fusedloss, name)(**c), call)
    try:
        their, their_gradient = value_and_gradient(functools.partial(like_torch, name), call)
    except RuntimeError as error:
        if "Found dtype" not in str(error):  # mse_loss of two dtypes has no backward up to torch 2.11
            raise
        return None
    scale = 1 + float(their.double().abs().nan_to_num(0, 0, 0).max()) if their.numel() else 1.0
    if not close(ours / scale, their / scale, eps):
        return f"gives {ours.flatten()[:4].tolist()}, torch {their.flatten()[:4].tolist()}"
    # Half sums in torch may be infinite where ours is not, and then so is everything behind them.
    if their.isfinite().all() and not close(our_gradient / scale, their_gradient / scale, eps):
        return f"has gradient {our_gradient.flatten()[:4].tolist()}, torch {their_gradient.flatten()[:4].tolist()}"
    return None


def judge(name, call):
    """(kind of outcome, None or what is wrong with it)"""
    torch_says = None
    try:
        like_torch(name, call)
    except Exception as error:
        torch_says = str(error)
    torch_takes = torch_says is None
    try:
        getattr(fusedloss, name)(**call)
    except (ValueError, TypeError, IndexError) as error:
        message = str(error)
        if torch_takes and not stricter(name, call):
            return "refused", f"torch takes it, ours says {type(error).__name__}: {message}"
        if not message.startswith(f"{name}: ") or "\n" in message:
            return "refused", f"not a sentence about {name}: {type(error).__name__}: {message}"
        return "refused", None
    except Exception as error:
        if str(error).startswith(AUTOGRAD_REFUSES):
            return "refused", None
        return "refused", f"{type(error).__name__}: {error}"
    if not torch_takes:
        if more_lenient(name, call) or torch_says.startswith(AUTOGRAD_REFUSES):
            return "taken", None
        return "taken", f"torch refuses it, ours takes it ({torch_says})"
    if stricter(name, call):
        return "taken", None
    return "right", compare(name, call)


def main(log_path, examples):
    counts = collections.Counter()
    failures = {}
    torch.set_num_threads(1)
    calls = st.one_of(
        st.tuples(st.just("cross_entropy"), hostile(right_cross_entropy())),
        st.tuples(st.just("mse_loss"), hostile(right_mse_loss())),
    )
    with open(log_path, "w", buffering=1) as log:

        @settings(
            max_examples=examples,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(calls)
        def run(drawn):
            name, (call, changes) = drawn
            text = f"{name}({', '.join(f'{k}={describe(v)}' for k, v in call.items())}) after {changes}"
            log.write(text + "\n")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                outcome, wrong = judge(name, call)
            counts[outcome] += 1
            if wrong:
                failures.setdefault(f"{name} " + " + ".join(changes), f"{text}: {wrong}")

        run()
    print(json.dumps({"counts": counts, "failures": list(failures.values())}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
