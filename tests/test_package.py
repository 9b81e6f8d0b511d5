"""What a user sees of the package before any loss is called."""

import importlib.metadata
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedloss
from fusedloss import _C, _ops

from .registry import each_loss

PUBLIC = {
    "BrierLoss",
    "CrossEntropyLoss",
    "DiceLoss",
    "MSELoss",
    "SegmentationLoss",
    "SoftIoULoss",
    "TverskyLoss",
    "__version__",
    "brier_loss",
    "check_labels",
    "cross_entropy",
    "dice_loss",
    "mse_loss",
    "overlap_statistics",
    "reference",
    "segmentation_loss",
    "set_label_checks",
    "set_memory_reuse",
    "show_config",
    "soft_iou_loss",
    "tversky_loss",
}


def test_public_names():
    assert set(fusedloss.__all__) == PUBLIC
    for name in PUBLIC:
        assert hasattr(fusedloss, name), name


def test_star_import():
    names = {}
    exec("from fusedloss import *", names)
    assert set(names) - {"__builtins__"} == PUBLIC


def test_version():
    assert fusedloss.__version__ == importlib.metadata.version("fusedloss")
    assert _C.build_info()["version"] == fusedloss.__version__


GROUPS = "classes=None, per_image=False, absent='skip', smooth=0.0, eps=1e-07, log=False, gamma=1.0, intersection='min'"
PIXELS = "activation='softmax', pixel_weight=None, ignore_index=-100"
TERMS = "cross_entropy=1.0, iou=1.0, brier=0.0, alpha=1.0, beta=1.0, label_smoothing=0.0, pos_weight=None"
GROUP = "process_group=None"
OF_MODULE = "activation='softmax', ignore_index=-100"
SIGNATURES = {
    "check_labels": "(device=None)",
    "set_label_checks": "(mode)",
    "set_memory_reuse": "(enabled)",
    "cross_entropy": "(input, target, weight=None, *, ignore_index=-100, reduction='mean', label_smoothing=0.0)",
    "mse_loss": "(input, target, *, reduction='mean', weight=None)",
    "CrossEntropyLoss": "(weight=None, *, ignore_index=-100, reduction='mean', label_smoothing=0.0)",
    "MSELoss": "(*, reduction='mean', weight=None)",
    "soft_iou_loss": f"(input, target, weight=None, *, {PIXELS}, {GROUPS}, reduction='mean', {GROUP})",
    "dice_loss": f"(input, target, weight=None, *, {PIXELS}, {GROUPS}, reduction='mean', {GROUP})",
    "tversky_loss": f"(input, target, weight=None, *, alpha, beta, {PIXELS}, {GROUPS}, reduction='mean', {GROUP})",
    "brier_loss": f"(input, target, weight=None, *, {PIXELS}, reduction='mean')",
    "segmentation_loss": f"(input, target, weight=None, *, {TERMS}, {PIXELS}, {GROUPS}, return_terms=False, {GROUP})",
    "overlap_statistics": f"(input, target, *, {PIXELS}, per_image=False, intersection='min', {GROUP})",
    "SoftIoULoss": f"(weight=None, *, {OF_MODULE}, {GROUPS}, reduction='mean', {GROUP})",
    "DiceLoss": f"(weight=None, *, {OF_MODULE}, {GROUPS}, reduction='mean', {GROUP})",
    "TverskyLoss": f"(weight=None, *, alpha, beta, {OF_MODULE}, {GROUPS}, reduction='mean', {GROUP})",
    "BrierLoss": f"(weight=None, *, {OF_MODULE}, reduction='mean')",
    "SegmentationLoss": f"(weight=None, *, {TERMS}, {OF_MODULE}, {GROUPS}, return_terms=False, {GROUP})",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    signature = inspect.signature(getattr(fusedloss, name))
    plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    assert str(inspect.Signature(plain)) == SIGNATURES[name]


@each_loss
def test_the_reference_has_the_same_signature(loss):
    """But for the processes: the reference is of one, and the witness of several (tests/test_distributed.py)."""

    def names(function):
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.kind, p.default) for p in parameters if p.name != "process_group"]

    assert names(getattr(fusedloss.reference, loss.name)) == names(getattr(fusedloss, loss.name))
    assert loss.name in fusedloss.reference.__all__


@pytest.mark.parametrize("name", sorted(PUBLIC - {"__version__"}))
def test_is_documented(name):
    document = inspect.getdoc(getattr(fusedloss, name))
    assert document
    assert document.splitlines()[0].endswith(".")


@each_loss
def test_has_types(loss):
    assert (Path(fusedloss.__file__).parent / "py.typed").exists()
    methods = () if loss.module is None else (loss.module.__init__, loss.module.forward)
    for function in (getattr(fusedloss, loss.name), getattr(fusedloss.reference, loss.name), *methods):
        for parameter in list(inspect.signature(function).parameters.values()):
            assert parameter.name == "self" or parameter.annotation is not inspect.Parameter.empty


def test_build_info():
    info = _C.build_info()
    assert info
    assert all(isinstance(name, str) and isinstance(value, str) and value for name, value in info.items())


def test_show_config():
    text = fusedloss.show_config()
    assert isinstance(text, str)
    cuda = f"cuda kernels: {'loaded' if _ops.CUDA_REFUSED is None else 'none, as ' + _ops.CUDA_REFUSED}"
    for word in (fusedloss.__version__, torch.__version__, _C.get_cpu_capability(), cuda):
        assert word in text


def run(program, *options):
    done = subprocess.run([sys.executable, *options, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_quiet_and_changes_nothing():
    program = (
        "import torch\n"
        "before = torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed()\n"
        "import fusedloss\n"
        "assert before == (torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed())\n"
        "print('quiet')\n"
    )
    assert run(program, "-W", "error") == "quiet"


def test_import_without_torch_first():
    assert run("import fusedloss, torch; print(fusedloss.mse_loss(torch.ones(2), torch.zeros(2)).item())") == "1.0"


def test_two_imports_of_one_binary():
    """A second interpreter of the module (a reload in a notebook) does not register the operations again."""
    program = (
        "import importlib, fusedloss, torch\n"
        "importlib.reload(fusedloss)\n"
        "print(fusedloss.mse_loss(torch.ones(2), torch.zeros(2)).item())\n"
    )
    assert run(program) == "1.0"


def test_works_in_a_forked_child():
    """Data loaders fork. The child runs the kernels after the parent has, with threads of its own."""
    if not hasattr(__import__("os"), "fork"):
        pytest.skip("this system does not fork")
    program = (
        "import os, torch, fusedloss\n"
        "x, y = torch.randn(2, 3, 300, 300), torch.zeros(2, 300, 300, dtype=torch.int64)\n"
        "torch.set_num_threads(1)\n"
        "expected = fusedloss.cross_entropy(x, y)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(0 if torch.equal(fusedloss.cross_entropy(x, y), expected) else 1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    assert run(program) == "0"
