"""Time the losses side by side and keep the results; README.md says how, and why the figures can be believed.

python -m benchmarks                                      the default workloads and providers, a few minutes
python -m benchmarks --quick                              does everything work? seconds; writes nothing
python -m benchmarks --list                               what there is to choose from
python -m benchmarks --workloads 'mse_loss/*' --check     some workloads, and how they stand against the targets
python -m benchmarks --level avx2                         with another instruction-set level of fusedloss
python -m benchmarks --device cuda --check                on a GPU
python -m benchmarks --show FILE.csv --check              the tables of an earlier run
python -m benchmarks --show FILE.csv --plot FILE.png      its picture
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import machine, report, results
from benchmarks.measure import PASSES
from benchmarks.providers import OURS, PROVIDERS
from benchmarks.results import Row
from benchmarks.run import Providers, run
from benchmarks.workloads import WORKLOADS, choose

ROUNDS = 15
QUICK_ROUNDS = 3
WIDTH_OF_FILES = 140  # where the output is not a terminal
IDLE_LOAD = 0.5


def main() -> int:
    arguments = parse_arguments()
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH_OF_FILES)
    if arguments.list:
        list_choices(console)
        return 0
    if arguments.show:
        rows = results.read(arguments.show)
        show(console, rows, arguments.check)
        if arguments.plot:
            draw(console, rows, json.loads(arguments.show.with_suffix(".json").read_text()), arguments.plot)
        return 0

    torch.set_num_threads(arguments.threads)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("python -m benchmarks: --device cuda: torch finds no GPU here")
    providers = load_providers(arguments.providers, arguments.level, console)
    load = machine.load_average()
    if load is not None and load > IDLE_LOAD:
        console.print(
            f"[yellow]other programs are running (load average {load}): the times will be too long and unsteady"
        )
    header = machine.describe(arguments.threads, arguments.device) | {"rounds": arguments.repeats}
    output = arguments.output
    if output is None and not arguments.quick:
        output = results.free_path(machine.file_stem(arguments.threads, arguments.device, arguments.level))
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
    return 0 if all(row.right for row in rows) else 1


def show(console: Console, rows: Sequence[Row], check: bool) -> None:
    report.show(console, rows)
    if check:
        report.show_targets(console, rows)


def draw(console: Console, rows: Sequence[Row], header: dict[str, Any], path: Path) -> None:
    from benchmarks import plot  # matplotlib is needed for this alone

    try:
        plot.draw(rows, header, path)
    except ValueError as error:
        raise SystemExit(f"python -m benchmarks: --plot: {error}") from error
    console.print(f"drawn: {os.path.relpath(path)}", soft_wrap=True)


def load_providers(names: Sequence[str], level: str | None, console: Console) -> Providers:
    """Import the libraries. The level has to be known before fusedloss is imported."""
    if level is not None:
        os.environ["FUSEDLOSS_CPU_CAPABILITY"] = level
    providers = {}
    for name in names or PROVIDERS:
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
    add("--providers", nargs="+", choices=PROVIDERS, metavar="NAME", default=[], help="default: all that are installed")
    add(
        "--passes",
        nargs="+",
        choices=PASSES,
        metavar="NAME",
        default=[one.name for one in PASSES.values() if one.default],
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
    add("--plot", type=Path, metavar="FILE.png", help="also draw time and memory as bars")
    add("--list", action="store_true", help="show workloads, providers and passes")
    arguments = parser.parse_args()

    if arguments.workloads:
        try:
            arguments.workloads = choose(arguments.workloads, arguments.device)
        except ValueError as error:
            parser.error(str(error))
    else:
        arguments.workloads = [
            workload
            for workload in WORKLOADS.values()
            if arguments.device in workload.devices and (workload.quick if arguments.quick else workload.default)
        ]
    arguments.passes = [PASSES[name] for name in arguments.passes]
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
