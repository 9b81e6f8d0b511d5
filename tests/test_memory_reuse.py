"""The memory of a large gradient is kept for the next, and nobody can tell but by the time it takes."""

import gc
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import fusedloss
from fusedloss import _C

from .test_memory import bytes_of, peak_bytes

SHAPE = (1, 2, 2048, 2048)  # the least that is reused, in float32
LARGER = (1, 3, 2048, 2048)
HUGE_PAGE = 2 * 2**20

REFUSED = _C.memory_reuse_refused()
can_reuse = pytest.mark.skipif(REFUSED is not None, reason=f"no memory is reused, as {REFUSED}")


@pytest.fixture(autouse=True)
def fresh():
    """Nothing lies idle, nothing is remembered; and so it is left."""
    _start_anew()
    yield
    _start_anew()


def _start_anew():
    gc.collect()
    fusedloss.set_memory_reuse(False)
    fusedloss.set_memory_reuse(True)


def logits(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape or SHAPE, generator=generator, dtype=dtype).requires_grad_()


def labels(*shape):
    return torch.zeros((shape or SHAPE)[:1] + (shape or SHAPE)[2:], dtype=torch.uint8)


def gradient(x, y):
    return torch.autograd.grad(fusedloss.cross_entropy(x, y), x)[0]


LOSSES = {
    "cross_entropy": lambda x, y: fusedloss.cross_entropy(x, y),
    "soft_iou_loss": lambda x, y: fusedloss.soft_iou_loss(x, y),
    "segmentation_loss": lambda x, y: fusedloss.segmentation_loss(x, y, brier=1.0),
    "mse_loss": lambda x, y: fusedloss.mse_loss(x, torch.zeros_like(x)),
}


@can_reuse
@pytest.mark.parametrize("loss", LOSSES)
def test_the_next_gradient_lies_where_the_last_one_did(loss):
    x, y = logits(), labels()
    expected = torch.autograd.grad(LOSSES[loss](x, y), x)[0].clone()
    x.grad = None
    places = set()
    for _ in range(3):
        (1.0 * LOSSES[loss](x, y)).backward()
        assert torch.equal(x.grad, expected)
        places.add(x.grad.data_ptr())
        x.grad.fill_(float("nan"))  # the next one may find anything there
        x.grad = None
    assert len(places) == 1


@can_reuse
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_gradient_is_as_any_other(dtype, memory_format):
    shape = (1, 8, 2048, 2048) if dtype.itemsize == 2 else LARGER
    x, y = logits(*shape, dtype=dtype), labels(*shape)
    x = x.detach().contiguous(memory_format=memory_format).requires_grad_()
    reused = gradient(x, y)
    fusedloss.set_memory_reuse(False)
    plain = gradient(x, y)
    assert torch.equal(reused, plain)
    assert reused.device == plain.device == x.device
    assert reused.stride() == plain.stride() == x.stride()
    assert reused.storage_offset() == 0
    assert reused.untyped_storage().nbytes() == plain.untyped_storage().nbytes()
    reused += 1
    assert torch.equal(reused, plain + 1)


@can_reuse
def test_what_is_alive_is_not_lent_again():
    x, y = logits(), labels()
    first = gradient(x, y)
    corner = first[0, 0, :2, :2]
    expected, place = corner.clone(), first.data_ptr()
    del first
    others = [gradient(x, y) for _ in range(3)]  # a view keeps the memory
    for other in others:
        other.zero_()
    assert place not in {other.data_ptr() for other in others}
    assert len({other.data_ptr() for other in others}) == 3
    assert torch.equal(corner, expected)
    del corner
    assert gradient(x, y).data_ptr() == place


@can_reuse
def test_no_more_is_kept_than_was_once_alive():
    small, large = bytes_of(logits()), bytes_of(logits(*LARGER))
    x, y = logits(), labels()
    gradient(x, y)
    assert _C.idle_bytes() == small
    gradient(x, y)
    assert _C.idle_bytes() == small
    both = gradient(x, y), gradient(x, y)
    assert _C.idle_bytes() == 0
    del both
    assert _C.idle_bytes() == 2 * small
    gradient(logits(*LARGER), labels(*LARGER))  # fits in neither, and takes the place of both
    assert _C.idle_bytes() == large
    gradient(x, y)  # the idle block is too large for it, and both are more than was alive
    assert _C.idle_bytes() == small
    both = gradient(x, y), gradient(logits(*LARGER), labels(*LARGER))
    del both
    assert _C.idle_bytes() == small + large


@can_reuse
def test_what_nearly_fits_is_lent():
    """A gradient smaller by a tenth takes the block; one half as large does not, it would keep it from others."""
    place = gradient(logits(1, 4, 2048, 2048), labels(1, 4, 2048, 2048)).data_ptr()
    assert gradient(logits(1, 4, 2048, 1843), labels(1, 4, 2048, 1843)).data_ptr() == place
    small = gradient(logits(), labels())
    assert not place <= small.data_ptr() < place + bytes_of(small)


@can_reuse
def test_the_smallest_that_fits_is_lent():
    small, large = (1, 4, 2048, 1843), (1, 4, 2048, 2048)
    both = [gradient(logits(*large), labels(*large)), gradient(logits(*small), labels(*small))]
    place = both[1].data_ptr()
    del both[0]  # lies idle first
    del both
    assert gradient(logits(*small), labels(*small)).data_ptr() == place


@can_reuse
def test_turned_off():
    x, y = logits(), labels()
    kept = gradient(x, y)
    gradient(x, y)
    assert _C.idle_bytes() > 0
    fusedloss.set_memory_reuse(False)
    assert "memory reuse: off" in fusedloss.show_config()
    assert _C.idle_bytes() == 0
    assert peak_bytes(lambda: gradient(x, y)) >= bytes_of(x)  # torch's allocator gave it
    expected = gradient(x, y)
    assert torch.equal(kept, expected)  # is alive still
    del kept
    assert _C.idle_bytes() == 0
    fusedloss.set_memory_reuse(True)
    assert "memory reuse: on" in fusedloss.show_config()
    assert peak_bytes(lambda: gradient(x, y)) < bytes_of(x)  # torch's profiler does not see it, as the docs say


def test_small_gradients_come_from_torch():
    x = torch.randn(1, 2, 1024, 1024, requires_grad=True)
    assert bytes_of(x) < _C.LEAST_REUSED_BYTES
    assert peak_bytes(lambda: gradient(x, torch.zeros(1, 1024, 1024, dtype=torch.uint8))) >= bytes_of(x)
    assert _C.idle_bytes() == 0


@can_reuse
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="this system does not tell")
def test_what_is_kept_is_offered_to_the_system():
    def offered():
        match = re.search(r"^LazyFree:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
        assert match is not None
        return int(match[1]) * 1024

    x, y = logits(), labels()
    before = offered()
    alive = gradient(x, y)
    assert offered() - before < HUGE_PAGE
    del alive
    assert offered() - before >= bytes_of(x) - HUGE_PAGE
    alive = gradient(x, y)
    assert offered() - before < HUGE_PAGE  # written again, so no longer for anybody to take
    assert torch.isfinite(alive).all()


def test_the_setting_can_be_set_back():
    assert fusedloss.set_memory_reuse(False) is True
    assert fusedloss.set_memory_reuse(True) is False


@can_reuse
def test_threads():
    x, y = logits(), labels()
    expected = gradient(x, y).clone()
    wrong = []

    def work():
        for _ in range(5):
            found = gradient(x, y)
            if not torch.equal(found, expected):
                wrong.append(found)
            found.fill_(7.0)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert _C.idle_bytes() <= 8 * bytes_of(x)  # each thread makes the next while it holds the last


@can_reuse
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_nothing_is_kept_across_a_fork():
    """Shared pages would be copied one by one where they are written next: slower than new ones."""
    program = (
        "import os, torch, fusedloss\n"
        "from fusedloss import _C\n"
        "torch.set_num_threads(1)\n"
        f"x = torch.randn({SHAPE}, requires_grad=True); y = torch.zeros(1, 2048, 2048, dtype=torch.uint8)\n"
        "make = lambda: torch.autograd.grad(fusedloss.cross_entropy(x, y), x)[0]\n"
        "def check(alive):\n"
        "    assert _C.idle_bytes() == 0\n"
        "    mine = make()\n"
        "    assert torch.equal(mine, alive)\n"
        "    alive.zero_(); del alive\n"
        "    assert _C.idle_bytes() == 0\n"
        "    place = mine.data_ptr(); del mine\n"
        "    assert _C.idle_bytes() == x.nbytes and make().data_ptr() == place\n"
        "both = [make(), make()]\n"
        "both.pop()\n"
        "assert _C.idle_bytes() == x.nbytes\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    try: check(both.pop())\n"
        "    except BaseException: os._exit(1)\n"
        "    os._exit(0)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0\n"
        "check(both.pop())\n"
    )
    run(program)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="this system has no such limit")
def test_a_limited_address_space_is_left_to_others():
    run(
        "import resource, torch, fusedloss\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 45, 1 << 45))\n"
        f"x = torch.randn({SHAPE}, requires_grad=True)\n"
        "fusedloss.cross_entropy(x, torch.zeros(1, 2048, 2048, dtype=torch.uint8)).backward()\n"
        "assert torch.isfinite(x.grad).all()\n"
        "x.grad = None\n"
        "assert fusedloss._ops._C.idle_bytes() == 0\n"
        "config = fusedloss.show_config()\n"
        "assert 'memory reuse: none, as ' in config, config\n"
    )


@pytest.mark.parametrize("number", [2**61 - 1, 2**60 - 1, 2**62 // 3])
def test_a_gradient_larger_than_memory(number):
    """The bytes to ask for go up to the last that an int64 holds."""
    x = torch.zeros(1).expand(number).requires_grad_()
    kept = gradient(logits(), labels())  # idle memory that a wrapped number would seem to fit in
    del kept
    with pytest.raises(RuntimeError, match="API call failed"):
        torch.ops.fusedloss._mse_loss_backward(torch.ones(()), x.detach(), x.detach(), None, torch.empty(0), 1, 0)


@can_reuse
def test_a_gradient_outlives_the_module():
    """Tensors that are alive when the program ends die after everything else."""
    run(
        "import sys, torch, fusedloss\n"
        f"x = torch.randn({SHAPE}, requires_grad=True)\n"
        "fusedloss.cross_entropy(x, torch.zeros(1, 2048, 2048, dtype=torch.uint8)).backward()\n"
        "sys.keep = x.grad\n"
    )


@can_reuse
def test_torch_compile():
    """The compiler plans memory of its own. The gradient is right in each step."""
    x, y = logits(), labels()
    expected = torch.autograd.grad((fusedloss.cross_entropy(x * 2, y) + 1).square(), x)[0]
    step = torch.compile(lambda x: (fusedloss.cross_entropy(x * 2, y) + 1).square(), fullgraph=True)
    for _ in range(3):
        x.grad = None
        step(x).backward()
        torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=0)
    assert _C.idle_bytes() >= bytes_of(x)  # of the gradient of 2 x, which is ours


@can_reuse
def test_other_ways_to_hold_a_gradient():
    x, y = logits(), labels()
    expected = gradient(x, y).clone()
    with torch.inference_mode():
        fusedloss.cross_entropy(x, y, reduction="none")
    held = gradient(x, y)
    array = held.numpy()
    exported = torch.from_dlpack(held.detach())
    copy = torch.empty(0).set_(held.untyped_storage(), 0, held.shape, held.stride())
    place = held.data_ptr()
    del held
    assert gradient(x, y).data_ptr() != place
    assert torch.equal(torch.from_numpy(array), expected)
    del array
    assert gradient(x, y).data_ptr() != place
    assert torch.equal(exported, expected)
    del exported
    assert gradient(x, y).data_ptr() != place
    assert torch.equal(copy, expected)
    del copy
    shared = gradient(x, y).share_memory_()
    assert torch.equal(shared, expected)
    assert shared.is_shared()


def run(program, **environment):
    environment = {**os.environ, **environment}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize(("value", "on"), [(None, True), ("", True), ("1", True), ("0", False)])
def test_the_environment(value, on):
    environment = {} if value is None else {"FUSEDLOSS_REUSE_MEMORY": value}
    done = run(f"from fusedloss import _C; assert _C.reuses_memory() is {on}", **environment)
    assert not done.stderr


def test_the_environment_holds_something_else():
    done = run("import fusedloss; assert fusedloss._ops._C.reuses_memory()", FUSEDLOSS_REUSE_MEMORY="no")
    assert "RuntimeWarning: fusedloss: FUSEDLOSS_REUSE_MEMORY: expected 0 or 1, got 'no'" in done.stderr


@pytest.mark.parametrize("value", [None, 0, 1, "off"])
def test_not_a_bool(value):
    with pytest.raises(TypeError, match="set_memory_reuse: `enabled` must be True or False, got"):
        fusedloss.set_memory_reuse(value)
