import os
import tempfile
from pathlib import Path

import pytest
import torch

# Where a test runs: the whole suite on each. Without a GPU, tests/test_cuda.py is skipped, in sight.
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])

# The CPU's place is taken by the CUDA sources, compiled for the host (tests/test_cuda_host_promises.py).
CUDA_ON_HOST = bool(os.environ.get("FUSEDLOSS_TEST_CUDA_HOST"))

# What only the CPU kernels promise, and why the CUDA kernels do not: by file, or by the name of the test without its
# parameters.
OF_THE_CPU = {
    "test_kept_gradient.py": "the CUDA kernels keep no gradient in the forward",
    "test_levels.py": "instruction-set levels are the CPU's",
    "test_memory.py": "the bytes of the CPU's allocator are counted; tests/test_cuda.py counts the GPU's",
    "test_memory_reuse.py": "memory is kept on the CPU; on CUDA torch's allocator does so",
    "test_opcheck.py": "the private operations are called with what the CPU keeps",
    "test_fuzz.py": "a call with a bad label is expected to raise",
    "test_any_number_of_threads": "a kernel on a GPU has no number of threads",
    "test_bad_label_is_named_with_its_position": "a bad label on CUDA raises nothing in the call",
    "test_bad_label_with_every_option": "a bad label on CUDA raises nothing in the call",
    "test_ignore_index_is_not_a_bad_label_but_the_default_then_is": "a bad label on CUDA raises nothing in the call",
    "test_bad_label_of_a_vector": "a bad label on CUDA raises nothing in the call",
    "test_the_first_of_many_bad_labels_is_named": "a bad label on CUDA raises nothing in the call",
    "test_bad_label_in_a_strided_target": "a bad label on CUDA raises nothing in the call",
    "test_the_first_of_many_bad_labels_on_probabilities": "a bad label on CUDA raises nothing in the call",
    "test_bad_label_in_a_strided_target_on_probabilities": "a bad label on CUDA raises nothing in the call",
    "test_ignore_index_of_another_dtype_is_a_bad_label": "a bad label on CUDA raises nothing in the call",
    "test_bad_label_under_transforms": "a bad label on CUDA raises nothing in the call",
    "test_bad_label_of_one_class": "a bad label on CUDA raises nothing in the call",
    "test_bad_number_in_a_mask_is_named_with_its_position": "a bad label on CUDA raises nothing in the call",
    "test_a_good_call_after_a_bad_label": "a bad label on CUDA raises nothing in the call",
    "test_no_classes": "a label without a class to choose raises nothing in a call on CUDA",
}

# torch.compile keeps its graphs on disk under the ops' names: those of another build of this package are wrong.
COMPILER_CACHE = tempfile.TemporaryDirectory(prefix="fusedloss-test-")


def pytest_configure(config):
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = COMPILER_CACHE.name
    # Tiny calls on two threads wait milliseconds for each other as soon as the machine does something else.
    # The tests that are about threads set their number themselves.
    torch.set_num_threads(1)
    config.addinivalue_line("markers", "compile: runs torch.compile, which takes seconds")
    config.addinivalue_line("markers", "gpu: runs on a CUDA device")
    config.addinivalue_line("markers", "large: takes tens of GB of memory on the device")
    for warning in (
        # Forward mode loads decompositions that torch itself scripts.
        "ignore:`torch.jit.script.*:DeprecationWarning",
        # torch 2.13 on that one release of Python.
        "ignore:Guards may run slower on Python 3.13.0:RuntimeWarning",
        # Samples that broadcast are there to broadcast; test_errors checks that the warning comes.
        "ignore:Using a target size:UserWarning",
        # torch 2.10 and 2.11: loading an exported program, and the profiler.
        "ignore:The given buffer is not writable:UserWarning",
        "ignore:.*Profiler clears events:UserWarning",
        # torch's own words while it compiles or exports.
        "ignore::DeprecationWarning:torch.*",
        "ignore::FutureWarning:torch.*",
    ):
        config.addinivalue_line("filterwarnings", warning)


def pytest_report_header(config):
    lines = [f"devices: {', '.join(DEVICES)}"]
    if CUDA_ON_HOST:
        lines.append("on cpu run the CUDA kernels, compiled for the host; what they do not promise is left out:")
        lines += [f"  {name}: {reason}" for name, reason in OF_THE_CPU.items()]
    return lines


def pytest_collection_modifyitems(config, items):
    """Leaves out what no loss has, another reduction than one of its own, and what CUDA does not promise."""
    kept, left_out = [], []
    for item in items:
        arguments = item.callspec.params if hasattr(item, "callspec") else {}
        loss = arguments.get("loss") or getattr(arguments.get("case"), "loss", None)
        reduction = arguments.get("reduction")
        alone = loss is not None and reduction is not None and not loss.reductions and reduction != "mean"
        of_the_cpu = reason_against_cuda(item)
        if of_the_cpu is not None and arguments.get("device") == "cuda":
            item.add_marker(pytest.mark.skip(reason=of_the_cpu))
        (left_out if alone or (of_the_cpu is not None and CUDA_ON_HOST) else kept).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


def reason_against_cuda(item):
    arguments = item.callspec.params if hasattr(item, "callspec") else {}
    name = getattr(item, "originalname", None)
    if name == "test_ignore_index_is_compared_after_widening" and not 0 <= arguments["label"] < 200:
        return "a bad label on CUDA raises nothing in the call"
    if name and name.startswith("test_refused") and arguments["row"].error is IndexError:
        return "a bad label on CUDA raises nothing in the call"
    if name == "test_a_good_call_after_a_bad_one":
        return "some of the bad calls have a bad label, which raises nothing on CUDA"
    return OF_THE_CPU.get(name, OF_THE_CPU.get(Path(item.path).name))


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.gpu] * (name == "cuda")) for name in DEVICES])
def device(request):
    return request.param


@pytest.fixture
def fresh_compiler():
    """Nothing compiled before counts: no limit on recompilations is reached, no graph is taken from memory."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def threads():
    """A function that sets the number of threads, which is put back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
