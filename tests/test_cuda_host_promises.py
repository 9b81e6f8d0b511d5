"""The promises, kept by the CUDA kernels on a machine without a GPU.

The CUDA sources, compiled for the host (``make cuda-host``), take the place of the CPU kernels in a process of their
own, in which the files of the promises run. tests/conftest.py says what CUDA does not promise, and leaves it out there.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .registry import LOSSES

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = Path(
    os.environ.get("FUSEDLOSS_CUDA_HOST_LIBRARY") or Path(sys.prefix, "cuda_host", "_C_cuda_host.so")
).absolute()

pytestmark = [
    pytest.mark.skipif(not LIBRARY.exists(), reason=f"no {LIBRARY}: `make cuda-host` builds it"),
    pytest.mark.skipif(bool(os.environ.get("FUSEDLOSS_TEST_CUDA_HOST")), reason="this is the process of the promises"),
]

# Every thread of a GPU is played by the host one after the other, so what is large is left out.
LARGE = " and ".join(
    f"not ({name})"
    for name in (
        "test_images_of_many_chunks",
        "test_rows_wider_than_a_tile",
        "test_arrays_of_many_chunks",
        "test_overlap_of_images_of_many_chunks",
        "test_probabilities_of_many_chunks",
        "test_a_half_image_of_equal_logits",
        "test_half_means_of_many",
        "test_float32_means_of_many",
        "more_pixels_than",
        "test_every_run",
        "test_large_gradients",
        "test_half_gradients_of_rows and 50257",
        "test_soft_labels_in_the_other_order and (40 or 200 or float64)",
    )
)
# The soft IoU with other numbers, and that is in segmentation_loss; test_forward.py and test_backward.py have them.
NOT_AGAIN = "not dice_loss and not tversky_loss"
# File, and which of its tests: those that run no kernels of ours but the reference are the same on every device.
# Not gradcheck: it calls a kernel twice for every number, which takes fibers minutes, for what test_backward.py
# compares with the float64 reference.
PROMISES = [
    ("test_forward.py", ""),
    ("test_backward.py", ""),
    # Half of its time. test_forward.py and test_backward.py have every case in float64, test_dtypes.py in both halves,
    # and test_classes_of_warps has the classes in bfloat16.
    (
        "test_shapes.py",
        LARGE + " and not 1000 and not 5000 and not 150 and not float64 and (not float16 or bfloat16)",
    ),
    ("test_layouts.py", f"{LARGE} and not test_one_tensor_at_a_time and {NOT_AGAIN}"),
    ("test_dtypes.py", f"{LARGE} and {NOT_AGAIN}"),
    ("test_sums.py", ""),
    ("test_determinism.py", LARGE),
    ("test_segmentation_edges.py", f"{LARGE} and {NOT_AGAIN} and not soft_iou_loss"),
    ("test_errors.py", "not with_gradients_too and not by_the_module_too"),
]


def environment():
    added = {"FUSEDLOSS_TEST_CUDA_HOST": str(LIBRARY)}
    # A library under the sanitizers (`make sanitize`) has to find theirs in the process, before Python itself.
    if os.environ.get("FUSEDLOSS_CUDA_HOST_PRELOAD"):
        added["LD_PRELOAD"] = os.environ["FUSEDLOSS_CUDA_HOST_PRELOAD"]
    return os.environ | added


@pytest.mark.parametrize(("file", "chosen"), [pytest.param(*promise, id=promise[0]) for promise in PROMISES])
def test_promise(file, chosen):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not compile and not gpu"]
    # Without xdist's own variables the process is a session of its own.
    clean = {name: value for name, value in environment().items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, "-k", chosen, f"tests/{file}"], cwd=ROOT, env=clean, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.fail(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout[-6000:]}\n{done.stderr[-3000:]}")
    assert " passed" in done.stdout


def run(program):
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + program], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


PREAMBLE = """
import json
import torch
import fusedloss
from fusedloss import _ops

CPU = torch.device("cpu")
torch.manual_seed(0)
logits = torch.randn(2, 5, 9, 40, requires_grad=True)
labels = torch.randint(5, (2, 9, 40))


def message_of(call):
    try:
        call()
    except IndexError as error:
        return str(error)
    return None


def record():
    return _ops.bad_label_record(CPU).tolist()


"""


def test_the_library_is_the_one_that_runs():
    said = run("print(json.dumps([fusedloss.show_config(), _ops.gradient_in_forward(torch.zeros(1))]))")
    assert str(LIBRARY) in said[0]
    assert said[1] is False


@pytest.mark.parametrize("name", ["cross_entropy", "soft_iou_loss", "brier_loss", "segmentation_loss"])
def test_a_bad_label_is_nan_and_remembered(name):
    bad_labels = [5, -1, 2**31, -(2**63)]
    results = run(f"""
results = []
for label in {bad_labels}:
    logits.grad = None
    labels[1, 3, 7] = label
    value = fusedloss.{name}(logits, labels)
    remembered = record()
    value.backward()
    nan = [value.isnan().item(), logits.grad[1, :, 3, 7].isnan().all().item()]
    results.append([nan, remembered, [message_of(fusedloss.check_labels) for _ in range(2)], record()])
print(json.dumps(results))
""")
    flat = (1 * 9 + 3) * 40 + 7
    for label, (nan, remembered, (first, second), after) in zip(bad_labels, results, strict=True):
        assert nan == [True, True]
        assert remembered == [1, label, flat, 5]
        assert f"check_labels: target at flat position {flat} must be in [0, 5)" in first
        assert f"got {label} " in first
        assert second is None
        assert after == [0, 0, 0, 0]


@pytest.mark.parametrize("name", ["cross_entropy", "brier_loss"])
def test_a_bad_label_is_nan_in_its_pixel_alone(name):
    value, gradient = run(f"""
labels[1, 3, 7] = 5
value = fusedloss.{name}(logits, labels, reduction="none")
value.sum().backward()
print(json.dumps([value.isnan().nonzero().tolist(), logits.grad.isnan().nonzero().tolist()]))
""")
    assert value == [[1, 3, 7]]
    assert gradient == [[1, c, 3, 7] for c in range(5)]


def test_right_labels_are_not_remembered():
    assert run("""
labels[0, 0] = -100
for name in ("cross_entropy", "dice_loss", "segmentation_loss"):
    getattr(fusedloss, name)(logits, labels).backward()
print(json.dumps([record(), message_of(fusedloss.check_labels)]))
""") == [[0, 0, 0, 0], None]


@pytest.mark.parametrize("name", ["cross_entropy", "soft_iou_loss", "segmentation_loss"])
def test_in_each_call_it_raises_in_the_words_of_the_cpu(name):
    program = f"""
labels[1, 3, 7] = labels[1, 4, 1] = 5
print(json.dumps(message_of(lambda: fusedloss.{name}(logits, labels))))
"""
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + program], env=os.environ, capture_output=True, text=True, check=True
    )
    on_cpu = json.loads(done.stdout.splitlines()[-1])
    assert on_cpu.startswith(f"{name}: target at (1, 3, 7) must be in [0, 5)")
    assert run("fusedloss.set_label_checks('sync')\n" + program) == on_cpu


def test_a_bad_number_in_a_mask():
    value_is_nan, remembered, in_each_call = run("""
mask = torch.zeros(2, 5, 9, 40, dtype=torch.uint8)
mask[1, 2, 3, 7] = 9
call = lambda: fusedloss.dice_loss(logits, mask, activation="sigmoid")
value_is_nan, remembered = call().isnan().item(), message_of(fusedloss.check_labels)
fusedloss.set_label_checks("sync")
print(json.dumps([value_is_nan, remembered, message_of(call)]))
""")
    assert value_is_nan
    assert f"flat position {((1 * 5 + 2) * 9 + 3) * 40 + 7} " in remembered
    assert "got 9 " in remembered
    assert in_each_call == "dice_loss: target at (1, 2, 3, 7) must be 0 or 1 in a mask, got 9"


def test_the_position_is_in_the_target_and_not_in_memory():
    """Flat in the order of the target's dimensions, whatever its strides."""
    assert run("""
turned = labels.permute(2, 1, 0).contiguous().permute(2, 1, 0)
turned[1, 3, 7] = 5
fusedloss.cross_entropy(logits, turned)
print(json.dumps(record()))
""") == [1, 5, (1 * 9 + 3) * 40 + 7, 5]


def test_a_subset_of_too_many_classes_is_refused():
    program = """
def of(classes):
    x, y = torch.zeros(3, classes), torch.zeros(3, dtype=torch.int64)
    try:
        fusedloss.soft_iou_loss(x, y, classes=[0, 2])
    except ValueError as error:
        return str(error)
    return None
print(json.dumps([of(1024), of(1025)]))
"""
    fits, refused = run(program)
    assert fits is None
    assert refused.startswith(
        "soft_iou_loss: `classes` must be None on CUDA with more than 1024 classes, got 2 of 1025"
    )


# A missing barrier shows as another result under some order of the threads: shim_test.cpp has one planted, which every
# tenth order shows.
SEEDS = int(os.environ.get("FUSEDLOSS_TEST_SEEDS", "10"))


@pytest.mark.parametrize("loss", [loss.name for loss in LOSSES])
def test_the_order_of_threads_and_blocks_changes_no_bit(loss):
    """Each typical case in three dtypes, rows of many classes too, forward and backward."""
    orders = run(f"""
import ctypes
from tests.compare import evaluate
from tests.registry import CROSS_ENTROPY, LOSSES, Call, Maker

set_seed = ctypes.CDLL({str(LIBRARY)!r}).fusedloss_host_set_seed
(loss,) = (loss for loss in LOSSES if loss.name == {loss!r})
different = []
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    calls = {{name: loss.cases[name](Maker(dtype)) for name in loss.typical}}
    if loss is CROSS_ENTROPY:
        for classes in (97, 5000):
            m = Maker(dtype)
            calls[f"{{classes}} classes"] = Call({{"input": m.normal(3, classes), "target": m.labels(classes, 3)}})
    for name, call in calls.items():
        bits = set()
        for seed in range({SEEDS}):
            set_seed(seed)
            value, gradients = evaluate(loss.function, call, call.differentiable)
            tensors = (value.detach(), *gradients.values())
            bits.add(tuple(bytes(t.contiguous().flatten().view(torch.uint8).numpy()) for t in tensors))
        if len(bits) > 1:
            different.append([str(dtype), name, len(bits)])
print(json.dumps(different))
""")
    assert orders == []
