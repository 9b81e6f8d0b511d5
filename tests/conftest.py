import os
import tempfile

import pytest
import torch

# Where a test runs. One entry more and the whole suite runs on that device too.
DEVICES = ["cpu"]


# torch.compile keeps its graphs on disk under the ops' names: those of another build of this package are wrong.
COMPILER_CACHE = tempfile.TemporaryDirectory(prefix="fusedloss-test-")


def pytest_configure(config):
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = COMPILER_CACHE.name
    # Tiny calls on two threads wait milliseconds for each other as soon as the machine does something else.
    # The tests that are about threads set their number themselves.
    torch.set_num_threads(1)
    config.addinivalue_line("markers", "compile: runs torch.compile, which takes seconds")
    for warning in (
        # Forward mode loads decompositions that torch itself scripts.
        "ignore:`torch.jit.script.*:DeprecationWarning",
        # Samples that broadcast are there to broadcast; test_errors checks that the warning comes.
        "ignore:Using a target size:UserWarning",
        # torch's own words while it compiles or exports.
        "ignore::DeprecationWarning:torch.*",
        "ignore::FutureWarning:torch.*",
    ):
        config.addinivalue_line("filterwarnings", warning)


def pytest_collection_modifyitems(config, items):
    """Leaves out what no loss has: another reduction than one of its own."""
    kept, left_out = [], []
    for item in items:
        arguments = item.callspec.params if hasattr(item, "callspec") else {}
        loss = arguments.get("loss") or getattr(arguments.get("case"), "loss", None)
        reduction = arguments.get("reduction")
        alone = loss is not None and reduction is not None and not loss.reductions and reduction != "mean"
        (left_out if alone else kept).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


@pytest.fixture(params=DEVICES)
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
