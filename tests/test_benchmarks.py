"""The benchmarks: what is left out, what is swept, drawn and refused. test_benchmarks_compare.py has --compare."""

import builtins
import dataclasses
import io
import math
import sys
from collections.abc import Mapping
from functools import partial

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("benchmarks")

from rich.console import Console

import fusedloss
from benchmarks import __main__ as program
from benchmarks import formulas, measure, results, sweeps, truth
from benchmarks import run as one_run
from benchmarks.measure import PASSES
from benchmarks.providers import PROVIDERS, Provider
from benchmarks.workloads import WORKLOADS, Data, Workload, make_case

from .benchmark_runs import NAME, call, measured, row_of, rows_of, written

# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--show", "--compare"])
def test_a_missing_file_is_named(option, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        call(monkeypatch, option, tmp_path / "none.csv")
    assert f"argument {option}: no such file: {tmp_path / 'none.csv'}" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--show", "--compare"])
@pytest.mark.parametrize("text", ["", "a,b\n1,2\n"])
def test_a_file_of_something_else_is_refused_in_one_sentence(option, text, tmp_path, monkeypatch):
    path = tmp_path / "other.csv"
    path.write_text(text)
    with pytest.raises(SystemExit, match=r"is not a result of the benchmarks: it has no column 'workload'"):
        call(monkeypatch, option, path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sweep", "depth"], "invalid choice: 'depth'"),
        (["--sweep", "classes", "--workloads", "mse_loss/*"], "no workload for cpu matches 'mse_loss/*'"),
        (["--workloads", "nothing"], "no workload for cpu matches 'nothing'"),
        (["--providers", "nobody"], "invalid choice: 'nobody'"),
        (["--repeats", "0"], "has to be at least 1"),
        (["--output", "results.txt"], "--output has to end in .csv"),
    ],
)
def test_what_there_is_not_is_refused(arguments, said, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        call(monkeypatch, *arguments)
    assert said in capsys.readouterr().err


def test_a_provider_of_gpus_is_refused_on_the_cpu(monkeypatch):
    with pytest.raises(SystemExit, match="provider liger does not run on cpu"):
        call(monkeypatch, "--quick", "--providers", "liger")


# ---- providers -------------------------------------------------------------------------------------------------------

LIBRARIES = {
    "smp": "segmentation_models_pytorch",
    "monai": "monai",
    "kornia": "kornia",
    "nnunet": "nnunetv2",
    "liger": "liger_kernel",
}


def without(monkeypatch, library):
    """As if it were not installed, whether it is or not."""
    real = builtins.__import__

    def refuse(name, *arguments, **options):
        if name.split(".")[0] == library:
            raise ModuleNotFoundError(f"No module named {library!r}")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    for name in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)


def test_every_provider_but_torch_and_jdt_is_a_library_of_this_list():
    assert set(PROVIDERS) == {"fusedloss", "eager", "compile", "jdt", *LIBRARIES}


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_library_that_is_missing_is_left_out_or_refused_if_named(name, monkeypatch):
    without(monkeypatch, LIBRARIES[name])
    # The others need not be imported for this.
    found = {"eager": PROVIDERS["eager"], name: PROVIDERS[name]}
    monkeypatch.setattr(program, "PROVIDERS", found)
    output = io.StringIO()
    device = PROVIDERS[name].devices[-1]
    providers = program.load_providers([], None, device, Console(file=output))
    assert list(providers) == ["eager"]
    assert f"{name} is not installed: left out" in output.getvalue()
    with pytest.raises(SystemExit, match=f"provider {name} cannot be imported"):
        program.load_providers([name], None, device, Console(file=output))


def test_a_provider_of_another_device_is_not_even_imported(monkeypatch):
    def load():
        raise AssertionError

    mine = Provider("mine", "", load, devices=("cuda",))
    monkeypatch.setattr(program, "PROVIDERS", {"eager": PROVIDERS["eager"], "mine": mine})
    assert list(program.load_providers([], None, "cpu", Console(file=io.StringIO()))) == ["eager"]


# Every class has a label in these: what an absent one does is another matter in every library.
SMALL = Data("small", (2, 3, 200, 150), "", ignored=0.1)
WHOLE = Data("whole", (1, 3, 200, 150), "")
MASK = Data("mask", (2, 1, 24, 20), "")
ROWS = Data("rows", (30, 7), "")


def errors_of(provider, loss, data):
    builders: Mapping = PROVIDERS[provider].load()
    case = make_case(Workload(loss, data), "cpu")
    built = builders[loss](case) if loss in builders else None
    if built is None:
        return None
    tolerance = truth.SAME_LOSS if PROVIDERS[provider].is_peer else truth.TOLERANCE
    return truth.check(built, case, truth.find_truth(case), tolerance[torch.float32])


MEASURED = [(loss, data) for loss in formulas.TERMS if loss != "cross_entropy" for data in (SMALL, WHOLE)]
MEASURED += [("soft_iou", MASK), ("ce+iou", MASK)]


@pytest.mark.parametrize(("loss", "data"), [pytest.param(*one, id=f"{one[0]}-{one[1].name}") for one in MEASURED])
@pytest.mark.parametrize("provider", ["fusedloss", "eager", "jdt"])
def test_the_same_loss_comes_from_everybody(provider, loss, data):
    errors = errors_of(provider, loss, data)
    if provider == "jdt" and (loss == "ce+iou+brier" or (data is MASK and loss == "ce+iou")):
        assert errors is None
    else:
        assert errors.right, errors


@pytest.mark.parametrize("loss", ["soft_iou", "dice", "ce+iou", "ce+dice"])
@pytest.mark.parametrize("provider", ["fusedloss", "jdt"])
def test_an_absent_class_does_not_count(provider, loss):
    one_patch = Data("patch", (1, 4, 16, 16), "")
    assert make_case(Workload(loss, one_patch), "cpu").target.unique().numel() == 1
    assert errors_of(provider, loss, one_patch).right


@pytest.mark.parametrize(
    ("name", "has"),
    [
        ("smp", {"soft_iou-small", "soft_iou-whole", "soft_iou-mask", "dice-small", "dice-whole"}),
        (
            "monai",
            {"soft_iou-small", "soft_iou-whole", "soft_iou-mask", "dice-small", "dice-whole", "ce+iou-whole"}
            | {"ce+dice-whole"},
        ),
        ("kornia", {"dice-whole"}),
        ("nnunet", {"dice-whole", "ce+dice-small", "ce+dice-whole"}),
    ],
)
@pytest.mark.filterwarnings("ignore")  # theirs
def test_the_same_loss_comes_from_another_library(name, has):
    try:
        PROVIDERS[name].load()
    except ImportError as error:
        pytest.skip(str(error))
    errors = {f"{loss}-{data.name}": errors_of(name, loss, data) for loss, data in MEASURED}
    assert {one for one, found in errors.items() if found} == has
    assert all(found.right for found in errors.values() if found), errors


def test_the_truth_of_dice_is_dice():
    """Against its definition, because truth and eager share formulas.py."""
    case = make_case(Workload("dice", WHOLE), "cpu")
    p = torch.softmax(case.input.double(), 1)
    y = torch.stack([case.target == c for c in range(3)], 1)
    both, total = (p * y).sum((0, 2, 3)), p.sum((0, 2, 3)) + y.sum((0, 2, 3))
    assert truth.find_truth(case).value == pytest.approx((1 - 2 * both / total).mean().item(), rel=1e-12)


def test_a_loss_of_nothing_has_absolute_errors():
    """One class under a softmax."""
    case = make_case(Workload("cross_entropy", Data("one", (6, 1), "")), "cpu")
    wanted = truth.find_truth(case)
    assert truth.check(lambda input: (input * 0).sum(), case, wanted, 1e-5).right
    assert not truth.check(lambda input: (input * 0).sum() + 1e-3, case, wanted, 1e-5).right
    assert not truth.check(lambda input: (input * 1e-3).sum() - (input * 1e-3).sum().item(), case, wanted, 1e-5).right


class Overwriting(torch.autograd.Function):
    """Cross-entropy that leaves its gradient in the logits, as Liger's does."""

    @staticmethod
    def forward(context, input, target):
        loss = torch.nn.functional.cross_entropy(input, target)
        gradient = torch.softmax(input, 1)
        gradient[torch.arange(len(target)), target] -= 1
        input.data.copy_(gradient / len(target))
        context.save_for_backward(input.detach().clone())
        return loss

    @staticmethod
    def backward(context, incoming):
        return context.saved_tensors[0] * incoming, None


def test_who_overwrites_the_logits_gets_logits_of_his_own(monkeypatch):
    """It stands before eager, and is timed after both were checked."""
    monkeypatch.setattr(measure, "SETTLED_S", 0.0)
    monkeypatch.setattr(measure, "SHORTEST_SAMPLE_S", 0.0)
    builders = {"cross_entropy": lambda case: lambda input: Overwriting.apply(input, case.target)}
    bad = Provider("bad", "", lambda: builders, overwrites_input=True)
    for provider, eager_is_right in ((bad, True), (dataclasses.replace(bad, overwrites_input=False), False)):
        monkeypatch.setitem(PROVIDERS, "bad", provider)
        cases = []
        eager = PROVIDERS["eager"].load()["cross_entropy"]
        providers = {
            "bad": builders,
            "eager": {"cross_entropy": lambda case, cases=cases, eager=eager: cases.append(case) or eager(case)},
        }
        rows = one_run.run(Workload("cross_entropy", ROWS), providers, [PASSES["both"]], 1, "cpu", advance=lambda: None)
        assert {row.provider: row.right for row in rows} == {"bad": True, "eager": eager_is_right}
        assert torch.equal(cases[0].input, make_case(cases[0].workload, "cpu").input) == eager_is_right


@pytest.fixture(autouse=True)
def small_memory(monkeypatch):
    """The largest sizes depend on the machine's memory; here they are the same everywhere."""
    monkeypatch.setattr(sweeps, "memory_gib", lambda: sweeps.SMALLEST_MEMORY_GIB)


# ---- sweeps ----------------------------------------------------------------------------------------------------------


def test_the_gradient_counts_also_where_its_memory_is_reused():
    x = torch.randn(1, 3, 2048, 2048, requires_grad=True)
    labels = torch.zeros(1, 2048, 2048, dtype=torch.uint8)
    prepare = partial(PASSES["both"].prepare, lambda input: fusedloss.cross_entropy(input, labels), x)
    prepare(2)()
    before = fusedloss.set_memory_reuse(True)
    with measure.memory_from_torch():
        assert x.nbytes <= measure.peak_allocated_bytes(prepare) < 1.1 * x.nbytes
    assert fusedloss.set_memory_reuse(before) is True


def test_the_sweep_of_classes_has_the_promised_sizes():
    assert [workload.name for workload in sweeps.workloads("classes", "cpu")] == [
        f"{loss}/classes-{2**power}" for loss in ("cross_entropy", "ce+iou") for power in range(9)
    ]
    shapes = [workload.data.shape for workload in sweeps.workloads("classes", "cpu")]
    assert [shape[1] for shape in shapes] == [1, 2, 4, 8, 16, 32, 64, 128, 256] * 2
    assert len({(shape[0], *shape[2:]) for shape in shapes}) == 1


@pytest.mark.parametrize(
    ("device", "memory", "last"), [("cpu", None, 24), ("cpu", 5.0, 24), ("cpu", 20.0, 26), ("cuda", None, 26)]
)
def test_the_sweep_of_pixels_has_the_promised_sizes(device, memory, last, monkeypatch):
    monkeypatch.setattr(sweeps, "memory_gib", lambda: memory)
    sizes = [2**power for power in range(10, last + 1, 2)]
    workloads = sweeps.workloads("pixels", device)
    assert [workload.name for workload in workloads] == [
        f"{loss}/pixels-{size}" for loss in ("cross_entropy", "ce+iou") for size in sizes
    ]
    shapes = [workload.data.shape for workload in workloads]
    assert [math.prod(shape) // shape[1] for shape in shapes] == sizes * 2
    assert {shape[1] for shape in shapes} == {4}
    assert sizes + sweeps.left_out("pixels", device) == [2**power for power in range(10, 27, 2)]


@pytest.mark.parametrize("sweep", sweeps.SIZES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_sweep_has_more_logits_than_it_says(sweep, device):
    for workload in sweeps.workloads(sweep, device):
        assert math.prod(workload.data.shape) <= sweeps.largest(device) <= 2**28
        # An image at a time is in float64.
        assert math.prod(workload.data.shape[1:]) <= truth.CHUNK


@pytest.mark.parametrize("sweep", sweeps.SIZES)
def test_a_sweep_is_known_by_its_names_alone(sweep):
    for workload in sweeps.workloads(sweep, "cpu"):
        assert sweeps.find(workload.name) == workload
    assert sweeps.find(f"cross_entropy/{sweep}-3") is None
    assert sweeps.find(f"nothing/{sweep}-1024") is None
    assert all(sweeps.point(name) is None for name in WORKLOADS)


def test_the_command_of_a_sweep(tmp_path, monkeypatch):
    calls = measured(monkeypatch, 26_000)
    monkeypatch.setattr(program, "load_providers", lambda names, *_: {name: {} for name in names})
    arguments = ["--sweep", "pixels", "--workloads", "ce+iou/*", "--output", tmp_path / "sweep.csv"]
    status, text = call(monkeypatch, *arguments)
    assert status == 0
    assert calls == [
        (f"ce+iou/pixels-{2**power}", ["fusedloss", "eager", "compile"], ["both"], program.ROUNDS)
        for power in range(10, 25, 2)
    ]
    assert "without 67108864" in text
    assert len(results.read(tmp_path / "sweep.csv")) == len(calls) * 3


def test_a_sweep_of_real_measurements(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "SETTLED_S", 0.0)
    monkeypatch.setattr(measure, "SHORTEST_SAMPLE_S", 0.0)
    monkeypatch.setattr(sweeps, "SIDE", 16)
    path = tmp_path / "sweep.csv"
    arguments = ["--sweep", "classes", "--workloads", "*/classes-[12]", "--providers", "fusedloss", "eager"]
    status, _ = call(monkeypatch, *arguments, "--repeats", "1", "--threads", "1", "--output", path)
    rows = results.read(path)
    assert status == 0
    assert all(row.right and row.median_us for row in rows)
    expected = ["cross_entropy/classes-1", "cross_entropy/classes-2", "ce+iou/classes-1", "ce+iou/classes-2"]
    assert list(dict.fromkeys(row.workload for row in rows)) == expected


# ---- plots -----------------------------------------------------------------------------------------------------------


def rows_to_draw():
    for provider, us in (("fusedloss", 20_000.0), ("eager", 200_000.0), ("monai", 90_000.0)):
        yield row_of(NAME, provider, "both", us, 0.02, floor_us=10_000.0, peak_allocated_bytes=2**28)
        for workload in (*sweeps.workloads("classes", "cpu"), *sweeps.workloads("pixels", "cpu")):
            size = sweeps.point(workload.name)[2]
            floor_us = 0.5 * size if size > 4096 else None
            yield row_of(workload.name, provider, "both", us * size, 0.02, floor_us=floor_us)


PICTURES = ["peak_memory", "speed_up", "sweep_classes", "sweep_pixels", "time_and_memory"]


def is_picture(path):
    return path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 5000


def test_one_command_draws_every_picture(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    rows = list(rows_to_draw())
    path = written(tmp_path, "rows", rows)
    monkeypatch.setattr(program, "show", lambda *_: None)
    status, text = call(monkeypatch, "--show", path, "--plot", tmp_path / "pictures")
    assert status == 0
    drawn = sorted((tmp_path / "pictures").iterdir())
    assert [one.stem for one in drawn] == PICTURES
    assert all(is_picture(one) for one in drawn)
    assert text.count("drawn:") == len(drawn)


def test_one_picture_is_that_of_the_workloads_or_else_of_the_sweep(tmp_path):
    plot = pytest.importorskip("benchmarks.plot")
    rows = [row for row in rows_to_draw() if "pixels" not in row.workload]
    swept = [row for row in rows if row.workload != NAME]
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot, "time_and_memory", lambda rows: drawn.append("bars"))
        patch.setattr(plot, "sweep", lambda rows, name: drawn.append(name))
        patch.setattr(plot, "save", lambda figure, header, path: path)
        plot.draw(rows, {}, tmp_path / "a.png")
        plot.draw(swept, {}, tmp_path / "b.png")
    assert drawn == ["bars", "classes"]


def test_the_floor_is_drawn_into_a_sweep_and_both_axes_are_logarithmic():
    plot = pytest.importorskip("benchmarks.plot")
    figure = plot.sweep([row for row in rows_to_draw() if "pixels" in row.workload], "pixels")
    assert [axes.get_title() for axes in figure.axes] == ["cross_entropy", "ce+iou"]
    for axes in figure.axes:
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        lines = {line.get_label(): line for line in axes.lines}
        assert set(lines) == {"fusedloss", "eager PyTorch", "MONAI", "floor: two reads and one write"}
        floor = lines["floor: two reads and one write"]
        assert list(floor.get_xdata()) == [2**power for power in range(14, 25, 2)]
        assert list(floor.get_ydata()) == [0.5e-3 * 2**power for power in range(14, 25, 2)]
    plot.plt.close(figure)


def test_bars_of_speed_up_and_of_memory_have_the_right_lengths():
    plot = pytest.importorskip("benchmarks.plot")
    rows = [row for row in rows_to_draw() if row.workload == NAME]
    figure = plot.speed_up(rows)
    assert sorted(bar.get_x() + bar.get_width() for bar in figure.axes[0].patches) == pytest.approx([4.5, 10.0])
    plot.plt.close(figure)
    figure = plot.peak_memory(rows)
    times = 2**28 / (4 * 8 * 21 * 512 * 512)
    assert [bar.get_width() for bar in figure.axes[0].patches] == pytest.approx([times] * 3)
    plot.plt.close(figure)


def test_nothing_to_draw_is_said(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    path = written(tmp_path, "rows", rows_of(20_000, pass_name="forward"))
    for where in ("a.png", "folder"):
        with pytest.raises(SystemExit, match="there is nothing to draw"):
            call(monkeypatch, "--show", path, "--plot", tmp_path / where)


def test_a_picture_is_made_of_one_sweep_only(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    path = written(tmp_path, "rows", [row for row in rows_to_draw() if row.workload != NAME])
    monkeypatch.setattr(program, "show", lambda *_: None)
    with pytest.raises(SystemExit, match="two sweeps"):
        call(monkeypatch, "--show", path, "--plot", tmp_path / "a.png")
