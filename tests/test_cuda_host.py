"""The CUDA kernels are tested without a GPU on a machine of fibers (tests/cuda_host); here is the test of that machine.

It must run right kernels rightly, and it must see wrong ones: a barrier that is missing, a shuffle that waits for lanes
that have left, a read before the copy has come. The kernels of these tests are in tests/cuda_host/shim_test.cpp.
"""

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent / "cuda_host"
CSRC = HERE.parent.parent / "csrc"
SOURCES = [HERE / "shim_test.cpp", HERE / "gpu_host.cpp"]
HEADERS = [HERE / "gpu_host.h", CSRC / "kernels/cuda/gpu.h"]

CASES = [
    "block_reduction",
    "every_thread_of_every_block_once",
    "votes",
    "barrier_of_those_that_are_left",
    "seeds_give_orders",
    "compare_and_swap",
    "halves",
    "two_host_threads",
    "missing_barrier_behind_a_write",
    "missing_barrier_before_a_write",
    "block_that_needs_another",
    "shuffle_with_a_partial_mask",
    "lanes_that_left_before_a_shuffle",
    "shuffles_at_different_lines",
    "barriers_at_different_lines",
    "barrier_that_a_part_of_a_warp_reaches",
    "shared_memory_is_nan_at_first",
    "asynchronous_copies",
    "copies_read_before_waiting_are_nan",
    "copies_of_unaligned_bytes",
    "stores_of_unaligned_bytes",
    "too_much_shared_memory",
    "bad_grids",
    "launches_after_a_failure",
    "private_arrays",
]
CRASHES = {
    "shared_memory_overrun": "heap-buffer-overflow",
    "copy_overrun": "heap-buffer-overflow",
    "private_array_overrun": "stack-buffer-overflow",
}

COMPILER = shlex.split(os.environ.get("CXX", "c++"))
FLAGS = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{CSRC}", f"-I{HERE}"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
# Set here, because what the caller has set may be for another program.
QUIET = {"ASAN_OPTIONS": "", "UBSAN_OPTIONS": "print_stacktrace=1", "LD_PRELOAD": ""}


def run(*command):
    return subprocess.run(
        command, env=os.environ | QUIET, capture_output=True, text=True, errors="replace", check=False, timeout=300
    )


def links_sanitizers(folder):
    source = folder / "empty.cpp"
    source.write_text("int main() {}\n")
    program = folder / "empty"
    return run(*COMPILER, *SANITIZERS, str(source), "-o", str(program)).returncode == 0 and run(program).returncode == 0


def compiled(folder):
    """(the program, whether it is sanitized); compiled once for each state of the sources and each compiler."""
    version = run(*COMPILER, "--version").stdout
    contents = [path.read_text() for path in (*SOURCES, *HEADERS, Path(__file__))]
    key = hashlib.sha256("\0".join([*COMPILER, version, *contents]).encode()).hexdigest()[:16]
    found = {name: folder / f"{name}-{key}" for name in ("sanitized", "plain")}
    with open(folder / "lock", "w") as lock:  # one worker compiles, the others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not any(program.exists() for program in found.values()):
            for old in (*folder.glob("sanitized-*"), *folder.glob("plain-*")):
                old.unlink()
            name = "sanitized" if links_sanitizers(folder) else "plain"
            unfinished = folder / "unfinished"
            flags = [*FLAGS, *(SANITIZERS if name == "sanitized" else [])]
            done = run(*COMPILER, *flags, *map(str, SOURCES), "-o", str(unfinished))
            assert done.returncode == 0, done.stderr
            unfinished.rename(found[name])
    return next((program, name == "sanitized") for name, program in found.items() if program.exists())


@pytest.fixture(scope="module")
def program(request):
    if shutil.which(COMPILER[0]) is None:
        pytest.skip(f"no C++ compiler {COMPILER[0]!r} on this machine")
    return compiled(Path(request.config.cache.mkdir("cuda_host")))


def test_every_case_has_a_test(program):
    listed = [line.split() for line in run(program[0], "--list").stdout.splitlines()]
    assert [words[0] for words in listed if words[1:] != ["crashes"]] == CASES
    assert [words[0] for words in listed if words[1:] == ["crashes"]] == list(CRASHES)
    assert run(program[0], "no_such_case").returncode != 0


@pytest.mark.parametrize("case", CASES)
def test_the_machine(case, program):
    done = run(program[0], case)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("case", CRASHES)
def test_a_sanitizer_sees(case, program):
    if not program[1]:
        pytest.skip("this compiler links no -fsanitize=address,undefined")
    done = run(program[0], case)
    assert done.returncode != 0
    assert f"AddressSanitizer: {CRASHES[case]}" in done.stderr, done.stderr
    assert "shim_test.cpp" in done.stderr or "gpu_host" in done.stderr
