"""What `python -m benchmarks --compare` calls slower, and what it says of two machines."""

import json
import math

import pytest

pytest.importorskip("rich")
pytest.importorskip("benchmarks")

from benchmarks import __main__ as program
from benchmarks import compare, results
from benchmarks.results import FLOOR

from .benchmark_runs import HEADER, NAME, call, measured, row_of, rows_of, written


def verdicts(old, new, times_count=True):
    (one,) = compare.compare(old, new, times_count)
    return one.verdict_of_time, one.verdict_of_floor, one.verdict


@pytest.mark.parametrize(
    ("old_us", "new_us", "expected"),
    [
        (20_000, 26_000, compare.SLOWER),
        (26_000, 20_000, compare.FASTER),
        (20_000, 20_400, compare.SAME),
        (20_400, 20_000, compare.SAME),
    ],
)
def test_a_change_is_judged_by_the_quartiles_of_both(old_us, new_us, expected):
    assert verdicts(rows_of(old_us), rows_of(new_us)) == (expected,) * 3


@pytest.mark.parametrize("wide", ["old", "new"])
def test_the_same_change_within_a_wide_spread_is_none(wide):
    old = rows_of(20_000, spread=0.35 if wide == "old" else 0.02)
    new = rows_of(26_000, spread=0.35 if wide == "new" else 0.02)
    assert verdicts(old, new) == (compare.SAME,) * 3


def test_the_spread_of_the_floor_counts_too():
    assert verdicts(rows_of(20_000), rows_of(24_000, floor_spread=0.3)) == (
        compare.SLOWER,
        compare.SAME,
        compare.UNCLEAR,
    )


def test_a_machine_that_is_slower_as_a_whole_makes_no_row_slower():
    assert verdicts(rows_of(20_000, floor_us=10_000), rows_of(40_000, floor_us=20_000)) == (
        compare.SLOWER,
        compare.SAME,
        compare.UNCLEAR,
    )


def test_slower_than_the_slower_machine_is_slower():
    assert verdicts(rows_of(20_000, floor_us=10_000), rows_of(60_000, floor_us=20_000))[2] == compare.SLOWER


def test_only_the_floor_is_judged_across_machines():
    old, new = rows_of(20_000, floor_us=10_000), rows_of(60_000, floor_us=30_000)
    assert verdicts(old, new, times_count=False) == (compare.NOT_COMPARED, compare.SAME, compare.SAME)
    new = rows_of(10_000, floor_us=2_000)
    assert verdicts(old, new, times_count=False) == (compare.NOT_COMPARED, compare.SLOWER, compare.SLOWER)


def test_without_a_floor_there_is_the_time_and_across_machines_nothing():
    old, new = rows_of(100, floor_us=None), rows_of(150, floor_us=None)
    assert verdicts(old, new) == (compare.SLOWER, compare.NOT_COMPARED, compare.SLOWER)
    assert verdicts(old, new, times_count=False) == (compare.NOT_COMPARED,) * 3


@pytest.mark.parametrize("which", ["old", "new"])
def test_a_time_alone_on_a_busy_machine_is_no_reason(which, tmp_path, monkeypatch):
    busy = changed(["machine", "load_average_1min"], 3.0)
    for floor_us, status in ((None, 0), (20.0, 1)):
        old = written(tmp_path, "old", rows_of(100, floor_us=floor_us), busy if which == "old" else HEADER)
        new = written(tmp_path, "new", rows_of(150, floor_us=floor_us), busy if which == "new" else HEADER)
        found, text = call(monkeypatch, "--compare", old, "--show", new)
        assert found == status
        assert f"at the start of the {which} run" in text
        assert (f"unclear: 1 of 1 ({NAME} both)" in text) == (status == 0)
    assert (
        compare.compare(rows_of(100, floor_us=None), rows_of(101, floor_us=None), True, True)[0].verdict == compare.SAME
    )


def test_quartiles_over_the_floor():
    """Time 4 (2 % each way) over a floor of 2 reads and a copy of 1 each; reads 3 %, the copy 6 %: 4 % together."""
    rows = [
        row_of(NAME, "fusedloss", "both", 4.0, 0.02, floor_us=3.0),
        row_of(NAME, FLOOR, "read", 1.0, 0.03),
        row_of(NAME, FLOOR, "copy", 1.0, 0.06),
    ]
    of = compare.over_floor(rows[0], compare.floors_of(rows))
    relative = math.hypot(0.02, 0.04)
    assert (of.low, of.middle, of.high) == pytest.approx((4 / 3 * (1 - relative), 4 / 3, 4 / 3 * (1 + relative)))


def test_a_forward_has_no_copy_in_its_floor():
    rows = [
        row_of(NAME, "fusedloss", "forward", 4.0, 0.0, floor_us=1.0),
        row_of(NAME, FLOOR, "read", 1.0, 0.03),
        row_of(NAME, FLOOR, "copy", 1.0, 0.5),
    ]
    assert compare.over_floor(rows[0], compare.floors_of(rows)).high == pytest.approx(4 * 1.03)


def test_a_row_that_has_become_wrong_is_not_passed_over():
    new = [row_of(NAME, "fusedloss", "both", None, 0.0, right=False, floor_us=10_000.0)]
    assert verdicts(rows_of(20_000), new)[2] == compare.WRONG


@pytest.mark.parametrize(
    "new",
    [
        pytest.param(rows_of(20_000, workload="soft_iou/voc"), id="workload"),
        pytest.param(rows_of(20_000, pass_name="forward"), id="pass"),
        pytest.param(rows_of(20_000, shape="8x21x256x256"), id="shape"),
        pytest.param(rows_of(20_000, device="cuda"), id="device"),
        pytest.param([row_of(NAME, "eager", "both", 20_000, 0.02)], id="provider"),
        pytest.param([], id="nothing"),
    ],
)
def test_what_is_not_the_same_measurement_is_not_compared(new, tmp_path, monkeypatch):
    old, new = written(tmp_path, "old", rows_of(20_000)), written(tmp_path, "new", new)
    monkeypatch.setattr(program, "show", lambda *_: None)
    with pytest.raises(SystemExit, match="no row of fusedloss in common"):
        call(monkeypatch, "--compare", old, "--show", new)


@pytest.mark.parametrize(("new_us", "status"), [(26_000, 1), (20_000, 0), (15_000, 0)])
def test_exit_status_says_whether_something_got_slower(new_us, status, tmp_path, monkeypatch):
    old, new = written(tmp_path, "old", rows_of(20_000)), written(tmp_path, "new", rows_of(new_us))
    found, text = call(monkeypatch, "--compare", old, "--show", new)
    assert found == status
    assert "19.6 - 20.4" in text  # the old quartiles, in ms
    assert "Another machine" not in text


def changed(path, value):
    header = json.loads(json.dumps(HEADER))
    *parents, last = path
    of = header
    for name in parents:
        of = of.setdefault(name, {})
    of[last] = value
    return header


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (changed(["machine", "cpu"], "other"), "cpu: one -> other"),
        (changed(["threads"], 4), "threads: 2 -> 4"),
        (changed(["machine", "gpu", "name"], "big"), "gpu: None -> big"),
        ({}, "the machine is not known"),
    ],
)
def test_another_machine_is_said_and_its_times_are_not_judged(header, said, tmp_path, monkeypatch):
    old = written(tmp_path, "old", rows_of(20_000, floor_us=10_000))
    new = written(tmp_path, "new", rows_of(60_000, floor_us=30_000), header)
    if not header:
        new.with_suffix(".json").unlink()
    status, text = call(monkeypatch, "--compare", old, "--show", new)
    assert status == 0
    assert said in text
    assert "absolute times do not compare" in text
    assert compare.NOT_COMPARED in text


def test_another_torch_is_said_and_times_are_judged(tmp_path, monkeypatch):
    old = written(tmp_path, "old", rows_of(20_000))
    new = written(tmp_path, "new", rows_of(26_000), changed(["software", "torch"], "2.14.0"))
    status, text = call(monkeypatch, "--compare", old, "--show", new)
    assert status == 1
    assert "torch: 2.13.0 -> 2.14.0" in text
    assert "do not compare" not in text


def test_without_a_new_result_the_old_ones_choices_are_measured(tmp_path, monkeypatch):
    name = "ce+iou/classes-64"
    old = [*rows_of(20_000), *rows_of(20_000, workload=name, pass_name="both"), *rows_of(9.0, workload="gone/voc")]
    old, new = written(tmp_path, "old", old), tmp_path / "new.csv"
    calls = measured(monkeypatch, 26_000)
    status, text = call(monkeypatch, "--compare", old, "--output", new)
    assert calls == [(which, ["fusedloss"], ["both"], program.ROUNDS) for which in (NAME, name)]
    assert status == 1
    assert f"slower: 2 of 2 ({NAME} both, {name} both)" in text
    assert [row.workload for row in results.read(new) if row.provider == "fusedloss"] == [NAME, name]


def test_nothing_is_measured_that_could_not_be_compared(tmp_path, monkeypatch):
    old = written(tmp_path, "old", rows_of(20_000))
    calls = measured(monkeypatch, 20_000)
    with pytest.raises(SystemExit, match="nothing to compare"):
        call(monkeypatch, "--compare", old, "--workloads", "mse_loss/tiny")
    assert not calls
