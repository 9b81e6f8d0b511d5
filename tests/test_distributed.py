"""Several processes with a part of the batch each compute the loss and the gradients of one with all of it."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fusedloss

from .compare import evaluate, random_like
from .processes import TIMEOUT_S, processes
from .registry import DICE_LOSS, OVERLAP_STATISTICS, SEGMENTATION_LOSS, SOFT_IOU_LOSS, TVERSKY_LOSS, Call, Case, Maker

LOSSES = (SOFT_IOU_LOSS, DICE_LOSS, TVERSKY_LOSS, SEGMENTATION_LOSS, OVERLAP_STATISTICS)
BY_NAME = {loss.name: loss for loss in LOSSES}


def name_of(case: Case) -> str:
    return f"{case.loss.name}-{case.name}"


CASES = [pytest.param(Case(loss, name), id=name_of(Case(loss, name))) for loss in LOSSES for name in loss.cases]
OF_CLASSES = ("weight", "pos_weight")  # each process has all of it

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


@pytest.fixture(scope="module", params=[2, 4], ids=["2 processes", "4 processes"])
def group(request):
    with processes(request.param) as started:
        yield started


def part(call: Call, rank: int, size: int) -> Call:
    """The images of a process: uneven numbers, and with four processes none at all for some."""
    images = call.tensors["input"].shape[0]
    bounds = [0, *(min(images, 1 + 2 * k) for k in range(size - 1)), images]
    own = slice(bounds[rank], bounds[rank + 1])
    return call.map(lambda t: t[own].clone(), [name for name in call.tensors if name not in OF_CLASSES])


def value_and_gradients(name, call, grad_output, **options):
    """On a process: as tests/compare.py, with the processes as a group."""
    function = BY_NAME[name].function
    options = {"process_group": dist.group.WORLD, **options}
    value, gradients = evaluate(
        lambda **arguments: function(**arguments, **options), call, call.differentiable, grad_output
    )
    return value.detach(), gradients


def agree(group, loss, call, tolerance, on_process=value_and_gradients):
    """All processes give the whole batch's value, and together, averaged, its gradients."""
    grad_output = random_like(evaluate(loss.function, call, ())[0])
    value, gradients = evaluate(loss.function, call, call.differentiable, grad_output)
    answers = group.run(value_and_gradients, lambda rank: (loss.name, part(call, rank, group.size), grad_output))
    for own, _ in answers:
        assert own.dtype == value.dtype
        torch.testing.assert_close(own, value.detach(), rtol=tolerance, atol=tolerance)
    for name in call.differentiable:
        together = torch.cat([of_rank[name] for _, of_rank in answers]) / group.size
        assert together.dtype == gradients[name].dtype
        torch.testing.assert_close(together, gradients[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("case", CASES)
def test_is_the_loss_of_the_whole_batch(group, case, reduction):
    call = case.make(torch.float64, reduction=reduction)
    if call.options.get("per_image") and (reduction == "none" or case.loss is OVERLAP_STATISTICS):
        with pytest.raises(
            AssertionError, match="`process_group` must be None with per_image=True and a result for each"
        ):
            agree(group, case.loss, call, 0.0)
    else:
        agree(group, case.loss, call, 1e-12)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)], ids=str
)
@pytest.mark.parametrize("name", ["image-everything", "image-probabilities-everything", "sigmoid"])
def test_in_other_dtypes(group, name, dtype, tolerance):
    """Half of a unit in the last place of the gradients; their loss is of float32."""
    agree(group, SEGMENTATION_LOSS, Case(SEGMENTATION_LOSS, name).make(dtype), tolerance)


@pytest.mark.parametrize("per_image", [False, True], ids=["batch", "images"])
@pytest.mark.parametrize(
    "case", [Case(SEGMENTATION_LOSS, "tversky"), Case(SOFT_IOU_LOSS, "image-everything")], ids=name_of
)
def test_a_process_may_have_ignored_pixels_alone(group, case, per_image):
    call = case.make(torch.float64).with_options(per_image=per_image)
    call = call.with_tensors(**{name: torch.cat([t, t]) for name, t in call.tensors.items() if name != "weight"})
    call.tensors["target"][0] = call.options["ignore_index"]  # the first process's one image
    agree(group, case.loss, call, 1e-12)


def test_all_pixels_ignored_everywhere(group):
    call = Case(SEGMENTATION_LOSS, "tversky").make(torch.float64)
    call.tensors["target"][:] = call.options["ignore_index"]
    agree(group, SEGMENTATION_LOSS, call, 0.0)


def terms_of(call):
    call = call.requiring_grad(["input"]).with_options(process_group=dist.group.WORLD, return_terms=True)
    _, terms = call.run(fusedloss.segmentation_loss)
    return terms, [term.requires_grad for term in terms.values()]


def test_terms_are_those_of_the_whole_batch(group):
    call = Case(SEGMENTATION_LOSS, "image-everything").make(torch.float64)
    _, whole = call.with_options(return_terms=True).run(fusedloss.segmentation_loss)
    for terms, require_grad in group.run(terms_of, lambda rank: (part(call, rank, group.size),)):
        torch.testing.assert_close(terms, whole, rtol=1e-12, atol=1e-12)
        assert not any(require_grad)


# ---- with what averages gradients ------------------------------------------------------------------------------------


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)).double()


def make_batch(images: int) -> tuple[torch.Tensor, torch.Tensor]:
    m = Maker()
    return m.normal(images, 3, 6, 5), m.labels(4, images, 6, 5, ignored=255)


OPTIONS: dict[str, Any] = {"ignore_index": 255, "brier": 0.5, "label_smoothing": 0.1}


def images_of(rank: int, size: int, images: int) -> slice:
    """Unevenly, but one for each at least: DistributedDataParallel waits for everybody's backward."""
    return slice(rank, rank + 1) if rank < size - 1 else slice(size - 1, images)


def gradients_under(wrap: str, per_image: bool, images: int) -> list[torch.Tensor]:
    rank, size = dist.get_rank(), dist.get_world_size()
    model = make_model()
    if wrap == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (size,)))
    criterion = fusedloss.SegmentationLoss(**OPTIONS, per_image=per_image, process_group=dist.group.WORLD)
    own = images_of(rank, size, images)
    input, target = (t[own] for t in make_batch(images))
    criterion(model(input), target).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    return [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in gradients]


@pytest.mark.parametrize("per_image", [False, True], ids=["batch", "images"])
@pytest.mark.parametrize("wrap", ["ddp", "fully_shard"])
def test_gradients_of_the_parameters_are_those_of_one_process(group, wrap, per_image):
    images = group.size + 2
    model = make_model()
    input, target = make_batch(images)
    fusedloss.segmentation_loss(model(input), target, **OPTIONS, per_image=per_image).backward()
    for gradients in group.run(gradients_under, lambda rank: (wrap, per_image, images)):
        for ours, whole in zip(gradients, model.parameters(), strict=True):
            torch.testing.assert_close(ours, whole.grad, rtol=1e-10, atol=1e-12)


# ---- what is exchanged -----------------------------------------------------------------------------------------------


def exchanged(call, backward: bool) -> list[int]:
    """Numbers in each exchange of a call."""
    sizes: list[int] = []
    all_reduce = dist.all_reduce

    def counting(tensor, *args, **kwargs):
        sizes.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counting
    try:
        call = call.requiring_grad(["input"]).with_options(process_group=dist.group.WORLD)
        loss = call.run(fusedloss.segmentation_loss)
        if backward:
            loss.backward()
    finally:
        dist.all_reduce = all_reduce
    return sizes


@pytest.mark.parametrize("backward", [False, True])
def test_only_the_table_is_exchanged(group, backward):
    call = Case(SEGMENTATION_LOSS, "image-everything").make(torch.float32)
    classes = call.tensors["input"].shape[1]
    for per_image, wanted in ((False, 3 * classes + 1 + 3), (True, 6)):

        def arguments(rank, per_image=per_image):
            return part(call, rank, group.size).with_options(per_image=per_image), backward

        for sizes in group.run(exchanged, arguments):
            assert sizes == [wanted]


# ---- refused ---------------------------------------------------------------------------------------------------------


def error_of(name, change, call):
    """What a process is told; `change` is a name, because a function does not travel."""
    if change == "under vmap":
        function = torch.func.vmap(lambda x: call.with_tensors(input=x).run(BY_NAME[name].function))
        call = call.with_options(process_group=dist.group.WORLD)
        arguments = call.tensors["input"].unsqueeze(0)
    try:
        if change == "under vmap":
            function(arguments)
        elif change == "in forward mode":
            call = call.with_options(process_group=dist.group.WORLD)
            with torch.autograd.forward_ad.dual_level():
                x = torch.autograd.forward_ad.make_dual(call.tensors["input"], call.tensors["input"])
                call.with_tensors(input=x).run(BY_NAME[name].function)
        elif change == "differentiated twice":
            call = call.with_options(process_group=dist.group.WORLD).requiring_grad(["input"])
            x = call.tensors["input"]
            (gradient,) = torch.autograd.grad(call.run(BY_NAME[name].function), x, create_graph=True)
            gradient.sum().backward()
        elif change == "a DTensor":
            from torch.distributed.tensor import Shard, distribute_tensor

            mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
            x = distribute_tensor(call.tensors["input"], mesh, [Shard(0)])
            call.with_tensors(input=x).run(BY_NAME[name].function)
        else:
            call.with_options(process_group=change).run(BY_NAME[name].function)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


REFUSED = [
    (
        "under vmap",
        "RuntimeError",
        "{}: `process_group` must be None under a transform of torch.func and in forward mode",
    ),
    ("in forward mode", "RuntimeError", "{}: `process_group` must be None under a transform of torch.func and in"),
    ("differentiated twice", "RuntimeError", "trying to differentiate twice"),
    (
        "a DTensor",
        "TypeError",
        "{}: `input` must be the tensor of one process (use .to_local(), and process_group= for",
    ),
    ("world", "TypeError", "{}: `process_group` must be a torch.distributed.ProcessGroup that this process belongs to"),
    (
        True,
        "TypeError",
        "{}: `process_group` must be a torch.distributed.ProcessGroup that this process belongs to, got b",
    ),
]


@pytest.mark.parametrize(("change", "error", "sentence"), REFUSED, ids=lambda value: str(value)[:20])
@pytest.mark.parametrize("loss", [SOFT_IOU_LOSS, SEGMENTATION_LOSS], ids=lambda loss: loss.name)
def test_a_call_that_cannot_be_exchanged(group, loss, change, error, sentence):
    call = Case(loss, "image").make(torch.float64)
    for kind, message in group.run(error_of, lambda rank: (loss.name, change, call)):
        assert kind == error
        assert message.startswith(sentence.format(loss.name))
        assert "\n" not in message


@pytest.mark.parametrize("name", ["cross_entropy", "mse_loss", "brier_loss"])
def test_a_dtensor_is_refused_by_the_other_losses(group, name):
    m = Maker()
    target = m.normal(4, 3) if name == "mse_loss" else m.labels(3, 4)
    for kind, message in group.run(dtensor_error, lambda rank: (name, m.normal(4, 3), target)):
        assert kind == "TypeError"
        assert message == f"{name}: `input` must be the tensor of one process (use .to_local()), got a DTensor"


def dtensor_error(name, input, target):
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    try:
        getattr(fusedloss, name)(distribute_tensor(input, mesh, [Shard(0)]), target)
    except Exception as error:
        return type(error).__name__, str(error)


# ---- compiled --------------------------------------------------------------------------------------------------------


def compiled_value_and_gradients(name, call, grad_output):
    torch._dynamo.reset()
    function = torch.compile(BY_NAME[name].function, backend="aot_eager")
    value, gradients = evaluate(
        lambda **arguments: function(**arguments, process_group=dist.group.WORLD),
        call,
        call.differentiable,
        grad_output,
    )
    return value.detach(), gradients


@pytest.mark.compile
@pytest.mark.parametrize(
    "case", [Case(SOFT_IOU_LOSS, "image-everything"), Case(SEGMENTATION_LOSS, "per-image")], ids=name_of
)
def test_compiled(group, case):
    agree(group, case.loss, case.make(torch.float64), 1e-12, on_process=compiled_value_and_gradients)


# ---- the example in the docs -----------------------------------------------------------------------------------------


def lines_of_the_example(tmp_path, size):
    text = (Path(__file__).parents[1] / "docs" / "distributed.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    script = tmp_path / "example.py"
    script.write_text(code)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    result = subprocess.run(
        [*launcher, script],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    # Two processes may write their lines side by side, and their ends after both.
    return sorted(re.findall(r"(rank \d): ([\d.]+, gradient [\d.]+\d)", result.stdout))


def test_the_example_prints_the_same_for_any_number_of_processes(tmp_path):
    (alone,), two = (lines_of_the_example(tmp_path, size) for size in (1, 2))
    assert [rank for rank, _ in two] == ["rank 0", "rank 1"]
    for _, line in two:
        assert line == alone[1]
