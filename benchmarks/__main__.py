"""Time the losses side by side and keep the results; README.md says how, and why the figures can be believed.

python -m benchmarks                                      the default workloads and providers, a few minutes
python -m benchmarks --quick                              does everything work? seconds; writes nothing
python -m benchmarks --list                               what there is to choose from
python -m benchmarks --workloads 'mse_loss/*' --check     some workloads, and how they stand against the targets
python -m benchmarks --level avx2                         with another instruction-set level of fusedloss
python -m benchmarks --device cuda --check                on a GPU
python -m benchmarks --show FILE.csv --check              the tables of an earlier run
python -m benchmarks --show FILE.csv --plot FILE.png      its picture; --plot FOLDER draws all that it can give
python -m benchmarks --compare OLD.csv                    measure again: what has become slower? then exit status 1
python -m benchmarks --compare OLD.csv --show NEW.csv     the same of two earlier runs
python -m benchmarks --sweep classes                      time against the number of classes; pixels: of pixels
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import compare, machine, report, results, sweeps
from benchmarks.measure import PASSES
from benchmarks.providers import COMPILE, EAGER, OURS, PROVIDERS
from benchmarks.results import Row
from benchmarks.run import Providers, run
from benchmarks.workloads import WORKLOADS, choose

ROUNDS = 15
QUICK_ROUNDS = 3
WIDTH_OF_FILES = 140  # where the output is not a terminal
OF_SWEEPS = (OURS, EAGER, COMPILE)  # who is measured by default


def main() -> int:
    arguments = parse_arguments()
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH_OF_FILES)
    if arguments.list:
        list_choices(console)
        return 0
    old = read(arguments.compare) if arguments.compare else []
    if arguments.show:
        return show_earlier(console, arguments, old)

    if arguments.compare:
        take_choices_of(old, arguments)
    torch.set_num_threads(arguments.threads)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("python -m benchmarks: --device cuda: torch finds no GPU here")
    for name in arguments.sweep:
        sizes = ", ".join(map(str, sweeps.left_out(name, arguments.device)))
        if sizes:
            console.print(f"[dim]sweep of {name}: without {sizes}, which would take too much memory", highlight=False)
    providers = load_providers(arguments.providers, arguments.level, arguments.device, console)
    load = machine.load_average()
    if load is not None and load > machine.IDLE_LOAD:
        console.print(
            f"[yellow]other programs are running (load average {load}): the times will be too long and unsteady"
        )
    header = machine.describe(arguments.threads, arguments.device) | {"rounds": arguments.repeats}
    output = arguments.output
    if output is None and not arguments.quick:
        stem = machine.file_stem(arguments.threads, arguments.device, arguments.level)
        output = results.free_path("_".join([stem, *(f"sweep-{name}" for name in arguments.sweep)]))
    rows: list[Row] = []
    progress, task = progress_bar(console, total=len(arguments.workloads) * (arguments.repeats + 1))
    try:
        with progress:
            for workload in arguments.workloads:
                progress.update(task, description=workload.name)
                rows += run(
                    workload,
                    providers,
                    arguments.passes,
                    arguments.repeats,
                    arguments.device,
                    advance=lambda: progress.advance(task),
                )
                if output is not None:  # after every workload: whatever ends a long run, what was finished is kept
                    results.write(output, header, rows)
    except KeyboardInterrupt:
        console.print("interrupted; what was finished:")
    if not rows:
        return 1

    show(console, rows, arguments.check)
    if output is not None:
        console.print(f"written: {os.path.relpath(output)} and {output.with_suffix('.json').name}", soft_wrap=True)
    if arguments.plot:
        draw(console, rows, header, arguments.plot)
    slower = bool(arguments.compare) and became_slower(console, arguments.compare, old, rows, header)
    return 0 if all(row.right for row in rows) and not slower else 1


def show_earlier(console: Console, arguments: argparse.Namespace, old: Sequence[Row]) -> int:
    rows, header = read(arguments.show), results.read_header(arguments.show)
    show(console, rows, arguments.check)
    if arguments.plot:
        draw(console, rows, header, arguments.plot)
    return int(bool(arguments.compare) and became_slower(console, arguments.compare, old, rows, header))


def read(path: Path) -> list[Row]:
    try:
        return results.read(path)
    except ValueError as error:
        raise SystemExit(f"python -m benchmarks: {error}") from error


def take_choices_of(old: Sequence[Row], arguments: argparse.Namespace) -> None:
    """What is not chosen on the command line is what the older result has: its workloads and passes, of fusedloss."""
    ours = [row for row in old if row.provider == OURS and row.device == arguments.device and row.median_us]
    known = {row.workload: WORKLOADS.get(row.workload) or sweeps.find(row.workload) for row in ours}
    if not arguments.chosen:
        arguments.workloads = [workload for workload in known.values() if workload]
    if not {workload.name for workload in arguments.workloads} & known.keys():
        raise SystemExit(
            f"python -m benchmarks: --compare: of {arguments.compare} no workload of {OURS} on {arguments.device} "
            "would be measured, so there would be nothing to compare"
        )
    if not arguments.passes_chosen:
        arguments.passes = [one for name, one in PASSES.items() if any(row.pass_name == name for row in ours)]
    arguments.providers = arguments.providers or [OURS]


def became_slower(
    console: Console, path: Path, old: Sequence[Row], rows: Sequence[Row], header: Mapping[str, Any]
) -> bool:
    try:
        return compare.show(console, old, rows, results.read_header(path), header)
    except ValueError as error:
        raise SystemExit(f"python -m benchmarks: --compare {path}: {error}") from error


def show(console: Console, rows: Sequence[Row], check: bool) -> None:
    report.show(console, rows)
    if check:
        report.show_targets(console, rows)


def draw(console: Console, rows: Sequence[Row], header: Mapping[str, Any], path: Path) -> None:
    """One picture, or, where the path is no picture's, all that the rows can give into that folder."""
    from benchmarks import plot  # matplotlib is needed for this alone

    try:
        drawn = plot.draw(rows, header, path) if path.suffix else plot.draw_all(rows, header, path)
    except ValueError as error:
        raise SystemExit(f"python -m benchmarks: --plot: {error}") from error
    for one in drawn:
        console.print(f"drawn: {os.path.relpath(one)}", soft_wrap=True)


def load_providers(names: Sequence[str], level: str | None, device: str, console: Console) -> Providers:
    """Import the libraries. The level has to be known before fusedloss is imported."""
    if level is not None:
        os.environ["FUSEDLOSS_CPU_CAPABILITY"] = level
    providers = {}
    for name in names or PROVIDERS:
        if device not in PROVIDERS[name].devices:
            if names:
                raise SystemExit(f"python -m benchmarks: provider {name} does not run on {device}")
            continue
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", RuntimeWarning)
                providers[name] = PROVIDERS[name].load()
        except ImportError as error:
            if names or name == OURS:
                raise SystemExit(f"python -m benchmarks: provider {name} cannot be imported: {error}") from error
            console.print(f"[dim]{name} is not installed: left out")
        # fusedloss only warns of a level that it cannot run, and would then be measured at another one.
        if level is not None and name == OURS and caught:
            raise SystemExit(f"python -m benchmarks: {caught[0].message}")
    return providers


def progress_bar(console: Console, total: int) -> tuple[Progress, TaskID]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=console, transient=True)
    return progress, progress.add_task("", total=total)


def list_choices(console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("workload", "shape", "measured", "reason"):
        table.add_column(name, no_wrap=name != "reason")
    for workload in WORKLOADS.values():
        when = f"by default on {' and '.join(workload.devices)}" if workload.default else "when named"
        shape = "x".join(map(str, workload.data.shape))
        table.add_row(workload.name, shape, f"{when}, quick" if workload.quick else when, workload.reason)
    console.print(table)
    for title, choices in (("providers", PROVIDERS), ("passes", PASSES)):
        console.print(title)
        for choice in choices.values():
            console.print(f"  {choice.name:10} {choice.about}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--workloads", nargs="+", metavar="NAME", default=[], help="names or shell patterns; --list shows the names")
    add(
        "--sweep",
        nargs="+",
        choices=sweeps.SIZES,
        metavar="NAME",
        default=[],
        help="classes or pixels: cross_entropy and ce+iou over many sizes; by default the pass both of "
        f"{', '.join(OF_SWEEPS)}; --workloads chooses among the sweep's",
    )
    add("--providers", nargs="+", choices=PROVIDERS, metavar="NAME", default=[], help="default: all that are installed")
    add(
        "--passes",
        nargs="+",
        choices=PASSES,
        metavar="NAME",
        default=[],
        help="default: forward, backward, both",
    )
    add(
        "--repeats",
        type=positive,
        metavar="N",
        help=f"rounds, default {ROUNDS}; each takes a sample of everything",
    )
    add("--threads", type=positive, default=torch.get_num_threads(), metavar="N", help="default: torch's own choice")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu; each has workloads of its own")
    add("--level", metavar="LEVEL", help="fusedloss's instruction-set level: base, avx2, avx512")
    add("--output", type=Path, metavar="FILE.csv", help="default: benchmarks/results/ with date and processor as name")
    add("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds of some small workloads; keeps nothing by default")
    add("--check", action="store_true", help="also show how fusedloss stands against the targets")
    add("--show", type=existing_file, metavar="FILE.csv", help="measure nothing; show the results in this file")
    add("--compare", type=existing_file, metavar="OLD.csv", help="what has become slower or faster since that result")
    add(
        "--plot", type=Path, metavar="PATH", help="also draw: bars or a sweep into FILE.png, all pictures into a FOLDER"
    )
    add("--list", action="store_true", help="show workloads, providers and passes")
    arguments = parser.parse_args()

    arguments.chosen = bool(arguments.workloads or arguments.sweep or arguments.quick)
    arguments.passes_chosen = bool(arguments.passes)
    swept = [one for name in arguments.sweep for one in sweeps.workloads(name, arguments.device, arguments.quick)]
    if arguments.workloads:
        try:
            table = {workload.name: workload for workload in swept} or WORKLOADS
            arguments.workloads = choose(arguments.workloads, arguments.device, table)
        except ValueError as error:
            parser.error(str(error))
    elif swept:
        arguments.workloads = swept
    else:
        arguments.workloads = [
            workload
            for workload in WORKLOADS.values()
            if arguments.device in workload.devices and (workload.quick if arguments.quick else workload.default)
        ]
    if arguments.sweep:
        arguments.providers = arguments.providers or list(OF_SWEEPS)
        arguments.passes = arguments.passes or ["both"]
    arguments.passes = [PASSES[name] for name in arguments.passes] or [one for one in PASSES.values() if one.default]
    arguments.repeats = arguments.repeats or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    if arguments.output and arguments.output.suffix != ".csv":
        parser.error(f"--output has to end in .csv, because a .json is written beside it; got {arguments.output.name}")
    return arguments


def existing_file(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"no such file: {text}")
    return path


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"has to be at least 1, got {number}")
    return number


if __name__ == "__main__":
    sys.exit(main())
