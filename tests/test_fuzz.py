"""Whatever the arguments: a right answer or an error that says what is wrong. Never a crash.

The calls are made in another process, so that a crash is a failed test and not the end of all tests.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = 4000
RIGHT_SHARE = 0.3  # of the calls must be right ones, or the fuzzing only tests the checks


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    log = tmp_path_factory.mktemp("fuzz") / "calls.txt"
    command = [sys.executable, "-X", "faulthandler", str(Path(__file__).with_name("hostile_calls.py"))]
    done = subprocess.run([*command, str(log), str(EXAMPLES)], capture_output=True, text=True, check=False, timeout=300)
    if done.returncode != 0:
        calls = log.read_text().splitlines() if log.exists() else []
        last = calls[-1] if calls else "none"
        pytest.fail(f"the process ended with {done.returncode}; its last call was {last}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def test_no_call_goes_wrong(report):
    failures = report["failures"]
    assert not failures, f"{len(failures)} kinds of calls go wrong:\n" + "\n".join(failures)


def test_enough_calls_are_right(report):
    counts = report["counts"]
    total = sum(counts.values())
    assert total >= 0.8 * EXAMPLES
    assert counts["right"] >= RIGHT_SHARE * total, counts
    assert counts["refused"] >= 0.1 * total, counts


def test_a_crash_is_reported(tmp_path):
    """The guard itself: a process that dies by a signal does not look like one that found nothing."""
    program = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode != 0
