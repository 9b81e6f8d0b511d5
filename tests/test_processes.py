"""In threads and processes, interrupted, and for a long time: the losses stay right, end when told to, and hold on to
nothing.

What needs a process of its own is a function here whose name begins with ``program_``; a test runs it by its name.
"""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import fusedloss

from .compare import evaluate, random_like
from .registry import LOSSES, Case, Maker, each_loss

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 120  # of a program, most of it the import of torch on a machine that is busy
ENOUGH = 60_000  # elements, for a call to be shared by two threads of torch

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


def start(name, *arguments):
    """A process that runs program_NAME(*arguments)."""
    # What a shell starts in the background ignores SIGINT, and so do its children: Ctrl-C is given back its meaning.
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"import tests.test_processes as t; t.program_{name}(*sys.argv[1:])"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that a signal, and the end of a program that hangs, reaches its children too
    )


def finish(process, timeout=TIMEOUT_S):
    """What it printed. One that hangs, or whose children do, fails the test and is ended."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"still there after {timeout} s\n{out}\n{err[-3000:]}")
    assert process.returncode == 0, f"{out}\n{err[-3000:]}"
    return out.split()


def end(process):
    """Also of one that is still there: a process that nobody waits for is a warning in another test, some time."""
    process.kill()
    process.wait()
    for pipe in (process.stdout, process.stderr):
        pipe.close()


def run(name, *arguments):
    return finish(start(name, *arguments))


def large_calls():
    """One for each of LOSSES. (A loss cannot be sent to a process, but its call can.)"""
    return [loss.large(Maker(torch.float32), ENOUGH) for loss in LOSSES]


def bits(loss, call):
    value, gradients = evaluate(loss.function, call, call.differentiable)
    return [value.detach(), *gradients.values()]


def all_bits(calls):
    return [bits(loss, call) for loss, call in zip(LOSSES, calls, strict=True)]


def same(results, expected):
    return all(torch.equal(one, other) for one, other in zip(results, expected, strict=True))


# ---- threads ---------------------------------------------------------------------------------------------------------


@each_loss
def test_one_tensor_in_many_threads(loss, threads, device):
    """All begin at once, with several threads of torch's own: none disturbs another, nor the tensors they share."""
    threads(2)
    call = loss.large(Maker(torch.float32, device), ENOUGH)
    before = {name: tensor.clone() for name, tensor in call.tensors.items()}
    expected = bits(loss, call)
    barrier = threading.Barrier(4)

    def work(_):
        barrier.wait(TIMEOUT_S)
        return [bits(loss, call) for _ in range(5)]

    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(work, range(4)):
            assert all(same(result, expected) for result in results)
    assert all(torch.equal(call.tensors[name], tensor) for name, tensor in before.items())


@each_loss
@pytest.mark.parametrize("factor", [1.0, -3.0], ids=["kept gradient", "rescaled gradient"])
def test_backward_in_another_thread(loss, factor, threads, device):
    """Forward here, backward there; the gradient that the forward kept is that of its own call."""
    threads(2)
    calls = [loss.large(Maker(torch.float32, device, seed), ENOUGH).requiring_grad(["input"]) for seed in range(4)]
    values = [factor * call.run(loss.function).sum() for call in calls]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(torch.Tensor.backward, values))
    for call in calls:
        alone = call.requiring_grad(["input"])
        (factor * alone.run(loss.function).sum()).backward()
        assert torch.equal(call.tensors["input"].grad, alone.tensors["input"].grad)


# ---- processes -------------------------------------------------------------------------------------------------------


class Losses(Dataset):
    """Each item is computed where it is asked for: value and gradients of one loss."""

    def __init__(self, calls):
        self.calls = calls

    def __len__(self):
        return len(self.calls)

    def __getitem__(self, index):
        return index, os.getpid(), bits(LOSSES[index], self.calls[index])


def one_more_loss(items):
    """A collate function with a loss in it."""
    (item,) = items
    loss = fusedloss.mse_loss(torch.arange(4.0, requires_grad=True), torch.zeros(4))
    loss.backward()
    return *item, loss.detach()


def program_loader(method):
    torch.set_num_threads(2)
    calls = large_calls()
    expected = all_bits(calls)  # the threads of this process are at work before the workers are made
    loader = DataLoader(
        Losses(calls), num_workers=2, collate_fn=one_more_loss, multiprocessing_context=method, timeout=TIMEOUT_S
    )
    workers, seen = set(), set()
    for index, worker, results, collated in loader:
        assert same(results, expected[index]), LOSSES[index].name
        assert collated.item() == 3.5
        workers.add(worker)
        seen.add(index)
    assert seen == set(range(len(LOSSES)))
    assert all(map(same, all_bits(calls), expected))  # this process goes on
    print(len(workers), os.getpid() in workers)


@pytest.mark.parametrize("method", [pytest.param("fork", marks=forks), "spawn"])
def test_workers_of_a_data_loader(method):
    assert run("loader", method) == ["2", "False"]


def child_of_spawn(rank, calls, expected):
    """The tensors lie in memory that is shared with the parent and the other child."""
    torch.set_num_threads(2)
    for _ in range(3):
        for loss, results, wanted in zip(LOSSES, all_bits(calls), expected, strict=True):
            assert same(results, wanted), f"{loss.name} in process {rank}"


def program_spawn():
    torch.set_num_threads(2)
    calls = large_calls()
    expected = all_bits(calls)
    torch.multiprocessing.spawn(child_of_spawn, (calls, expected), nprocs=2)
    assert all(map(same, all_bits(calls), expected))
    print("same")


def test_spawned_processes():
    assert run("spawn") == ["same"]


def program_fork():
    torch.set_num_threads(2)
    calls = large_calls()
    expected = all_bits(calls)
    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            status = 1
            with contextlib.suppress(BaseException):
                # Without this line a child waits for threads that only the parent has, in our losses as in torch's own
                # operations: GNU OpenMP does not survive a fork. DataLoader does the same in its workers.
                torch.set_num_threads(1)
                status = 0 if all(map(same, all_bits(calls), expected)) else 2
            os._exit(status)
        children.append(child)
        assert same(bits(LOSSES[0], calls[0]), expected[0])  # the parent goes on with its threads
    print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))


@forks
def test_forked_children():
    assert run("fork") == ["0", "0", "0"]


# ---- interrupted -----------------------------------------------------------------------------------------------------


def program_until_interrupted(times):
    """Trains until Ctrl-C has come so many times, then goes on as if nothing had been."""
    torch.set_num_threads(2)
    calls = large_calls()
    expected = all_bits(calls)
    steps = 0
    for _ in range(int(times)):
        try:
            print("ready", flush=True)
            while True:
                k = steps % len(calls)
                bits(LOSSES[k], calls[k])
                steps += 1
        except KeyboardInterrupt:
            print("interrupted", flush=True)
    assert all(map(same, all_bits(calls), expected))
    print("same" if steps else "idle")


@pytest.mark.skipif(os.name == "nt", reason="SIGINT is sent as on Unix")
def test_interrupts_end_the_call_and_nothing_else():
    process = start("until_interrupted", 5)
    try:
        for k in range(5):
            assert read_line(process, TIMEOUT_S) == "ready\n"
            # Into another place of a step each time.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.2 + 0.037 * k)
            process.send_signal(signal.SIGINT)
            assert read_line(process, 30) == "interrupted\n"
        assert finish(process, 30) == ["same"]
    finally:
        end(process)


def read_line(process, timeout):
    """As readline, but a process that says nothing is ended, and then there is no line."""
    timer = threading.Timer(timeout, process.kill)
    timer.start()
    try:
        return process.stdout.readline()
    finally:
        timer.cancel()


def program_endless():
    torch.set_num_threads(2)
    calls = large_calls()
    print("ready", flush=True)
    while True:
        all_bits(calls)


@pytest.mark.skipif(os.name == "nt", reason="SIGINT is sent as on Unix")
def test_ctrl_c_ends_the_program():
    process = start("endless")
    try:
        assert read_line(process, TIMEOUT_S) == "ready\n"
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    finally:
        end(process)
    assert process.returncode == -signal.SIGINT
    assert err.rstrip().endswith("KeyboardInterrupt")


# ---- for a long time -------------------------------------------------------------------------------------------------

STEPS = 10_000
# A tensor that is forgotten in every step is more than 300 bytes even where it holds one number (its description, its
# storage, the smallest piece of memory), which makes 3 MiB.
MOST_GROWTH = 1 << 20


def resident():
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def steps_of(loss):
    """Functions that each do one small step, in every way to a gradient."""
    call = Case(loss, loss.typical[0]).make(torch.float32)

    def step():
        leaves = call.requiring_grad(["input"])
        leaves.run(loss.function).sum().backward()

    def step_with_another_gradient():
        leaves = call.requiring_grad(call.differentiable)
        value = leaves.run(loss.function)
        value.backward(random_like(value))

    def forward():
        call.run(loss.function)

    def forward_without_backward():
        call.requiring_grad(["input"]).run(loss.function)

    def refused():
        wrong = call.with_tensors(target=torch.zeros(1, 1, 1, 1, 1, 9))
        with contextlib.suppress(ValueError, RuntimeError, IndexError):
            wrong.run(loss.function)
            raise AssertionError("not refused")

    return [step, step, step_with_another_gradient, forward, forward_without_backward, refused]


def program_long():
    """Prints by how many bytes the process grew, and by how many where it forgets one number in every step."""
    torch.set_num_threads(1)
    steps = [step for loss in LOSSES for step in steps_of(loss)]
    forgotten = []

    def growth(number, forget):
        gc.collect()
        before = resident()
        for k in range(number):
            steps[k % len(steps)]()
            if forget:
                forgotten.append(torch.zeros(1))
        gc.collect()
        return resident() - before

    growth(STEPS // 2, False)  # what torch and Python lay out once, and their pools
    print(growth(STEPS, False), growth(STEPS // 4, True))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system has no /proc/self/statm")
def test_ten_thousand_steps_hold_on_to_nothing():
    nothing, one_number_a_step = map(int, run("long"))
    assert nothing < MOST_GROWTH
    assert one_number_a_step > MOST_GROWTH // 4, "such a leak would not be seen"
