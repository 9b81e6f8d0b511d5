"""What became slower or faster since an older run: fusedloss against itself, row by row.

Two measures. Time alone answers little: a machine is faster or slower from one hour to the next. Time over the floor
takes that out as far as memory goes, for the floor was timed in the same rounds. Each is judged by quartiles: slower
when the new lower quartile is above the old upper one, faster in the opposite case, otherwise the same within the
spread. A row is slower (faster) when both measures are; when only one is, the machine has changed its speed in between,
or the floor was too unsteady, and the row is unclear. On another machine, or with other threads, times are not
compared at all. Inputs too small to have a floor have nothing but their time, and that only if both machines were idle:
on a busy one it doubles without a reason.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.machine import IDLE_LOAD
from benchmarks.measure import PASSES
from benchmarks.providers import OURS
from benchmarks.results import FLOOR, Row

SLOWER, FASTER, SAME = "slower", "faster", "same within the spread"
UNCLEAR = "unclear"
WRONG = "wrong now"  # the answer, which makes a time worth nothing
NOT_COMPARED = "not compared"
STYLES = {SLOWER: "bold red", WRONG: "bold red", FASTER: "green", UNCLEAR: "yellow", NOT_COMPARED: "yellow"}

# Times of two runs compare only where these are the same; by their place in the header.
MACHINE = (
    ("machine", "cpu"),
    ("machine", "architecture"),
    ("machine", "cores"),
    ("machine", "gpu", "name"),
    ("threads",),
)
# These may be what one wants to compare, so they are only said.
SETTINGS = (
    ("machine", "transparent_hugepages"),
    ("software", "torch"),
    ("software", "torch_cpu_capability"),
    ("software", "compiler_of_torch_compile"),
    ("environment",),
)
FEWEST_ROUNDS = 5  # of fewer the quartiles say little

Header = Mapping[str, Any]


@dataclass(frozen=True)
class Range:
    """Median and quartiles."""

    low: float
    middle: float
    high: float


@dataclass(frozen=True)
class Compared:
    """One row in both runs; None where it cannot be told, or where times do not compare."""

    workload: str
    pass_name: str
    time: tuple[Range, Range] | None  # microseconds, old and new
    over_floor: tuple[Range, Range] | None
    times_count: bool  # the same machine and threads
    busy: bool = False  # other programs were running in one of the two
    wrong: bool = False

    @property
    def verdict_of_time(self) -> str:
        return judge(*self.time) if self.time and self.times_count else NOT_COMPARED

    @property
    def verdict_of_floor(self) -> str:
        return judge(*self.over_floor) if self.over_floor else NOT_COMPARED

    @property
    def verdict(self) -> str:
        if self.wrong:
            return WRONG
        verdicts = {self.verdict_of_time, self.verdict_of_floor} - {NOT_COMPARED}
        if not verdicts:
            return NOT_COMPARED
        if self.over_floor is None and self.busy and verdicts != {SAME}:
            return UNCLEAR
        return verdicts.pop() if len(verdicts) == 1 else UNCLEAR


def judge(old: Range, new: Range) -> str:
    if new.low > old.high:
        return SLOWER
    return FASTER if new.high < old.low else SAME


def compare(old: Sequence[Row], new: Sequence[Row], times_count: bool, busy: bool = False) -> list[Compared]:
    """The rows of fusedloss that both have, in the new one's order. A ValueError if there are none."""
    before, after = index(old), index(new)
    common = [key for key in after if key in before and before[key].right and before[key].median_us]
    if not common:
        raise ValueError(f"the two results have no row of {OURS} in common")
    floors = floors_of(old), floors_of(new)
    compared = []
    for key in common:
        rows = before[key], after[key]
        compared.append(
            Compared(
                rows[1].workload,
                rows[1].pass_name,
                pair(time_of(row) for row in rows),
                pair(over_floor(row, of) for row, of in zip(rows, floors, strict=True)),
                times_count,
                busy,
                wrong=not rows[1].right,
            )
        )
    return compared


def index(rows: Sequence[Row]) -> dict[tuple[str, ...], Row]:
    """By what makes two rows the same measurement: a workload may have kept its name and changed its shape."""
    return {
        (row.workload, row.pass_name, row.shape, row.dtype, row.memory_format, row.target_dtype, row.device): row
        for row in rows
        if row.provider == OURS
    }


def floors_of(rows: Sequence[Row]) -> Mapping[str, Mapping[str, Row]]:
    """By workload: the rows of the reads and copies that were timed."""
    floors: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if row.provider == FLOOR:
            floors[row.workload][row.pass_name] = row
    return floors


def pair(ranges: Any) -> tuple[Range, Range] | None:
    old, new = ranges
    return (old, new) if old and new else None


def time_of(row: Row) -> Range | None:
    if row.median_us is None or row.first_quartile_us is None or row.third_quartile_us is None:
        return None
    return Range(row.first_quartile_us, row.median_us, row.third_quartile_us)


def over_floor(row: Row, floors: Mapping[str, Mapping[str, Row]]) -> Range | None:
    """The floor has a spread too. The two are added as if they knew nothing of each other."""
    time = time_of(row)
    if time is None or not row.floor_us:
        return None
    below, above = spread_of_floor(row, floors.get(row.workload, {}))
    middle = time.middle / row.floor_us
    return Range(
        low=middle * max(0.0, 1 - math.hypot(1 - time.low / time.middle, above)),
        middle=middle,
        high=middle * (1 + math.hypot(time.high / time.middle - 1, below)),
    )


def spread_of_floor(row: Row, floors: Mapping[str, Row]) -> tuple[float, float]:
    """How far the quartiles of the floor are below and above its median, by the median.

    Of this pass's floor the copies are known, one if it has a backward; the rest are reads.
    """
    assert row.floor_us is not None
    copied = 0.0
    of_pass = PASSES.get(row.pass_name)
    if of_pass and of_pass.has_backward and "copy" in floors:
        copied = floors["copy"].median_us or 0.0
    shares = {"copy": copied / row.floor_us, "read": 1 - copied / row.floor_us}
    below = above = 0.0
    for name, share in shares.items():
        time = time_of(floors[name]) if name in floors else None
        if time is not None:
            below += share * (1 - time.low / time.middle)
            above += share * (time.high / time.middle - 1)
    return below, above


# -- the machine ------------------------------------------------------------------------------------------------------


def differences(old: Header, new: Header, places: Sequence[tuple[str, ...]]) -> list[str]:
    """A line for each place where the headers differ."""
    lines = []
    for place in places:
        before, after = look_up(old, place), look_up(new, place)
        if before != after:
            lines.append(f"{place[-1] if place[-1] != 'name' else place[-2]}: {before} -> {after}")
    return lines


def was_busy(header: Header) -> bool:
    load = look_up(header, ("machine", "load_average_1min"))
    return isinstance(load, int | float) and load > IDLE_LOAD


def look_up(header: Header, place: Sequence[str]) -> Any:
    value: Any = header
    for name in place:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


# -- what is shown ----------------------------------------------------------------------------------------------------


def show(console: Console, old: Sequence[Row], new: Sequence[Row], old_header: Header, new_header: Header) -> bool:
    """Two lines a row, a summary, and what was different. Returns whether something got slower, or wrong."""
    other_machine = differences(old_header, new_header, MACHINE)
    if not old_header or not new_header:
        other_machine = ["the JSON beside the CSV is missing, so the machine is not known"]
    busy = [name for name, header in (("old", old_header), ("new", new_header)) if was_busy(header)]
    compared = compare(old, new, times_count=not other_machine, busy=bool(busy))

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in (f"workload, {OURS}", "pass", "measure"):
        table.add_column(name, no_wrap=True)
    for name in ("old (quartiles)", "new (quartiles)", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("judged")
    for one in compared:
        names = [one.workload, one.pass_name]
        lines = (("time", one.time, one.verdict_of_time), ("over the floor", one.over_floor, one.verdict_of_floor))
        for measure, ranges, verdict in lines:
            if ranges is not None:
                table.add_row(*names, *cells(measure, *ranges), verdict, style=STYLES.get(verdict, ""))
                names = ["", ""]
        if one.time is None:
            table.add_row(*names, "", "", "", "", one.verdict, style=STYLES.get(one.verdict, ""))
    console.print(table)

    if busy:
        console.print(
            f"Other programs were running at the start of the {' and the '.join(busy)} run: measure again.",
            style="yellow",
            highlight=False,
        )
    say(console, old, new, old_header, new_header, other_machine)
    for verdict in (SLOWER, WRONG, UNCLEAR, FASTER, SAME, NOT_COMPARED):
        rows = [f"{one.workload} {one.pass_name}" for one in compared if one.verdict == verdict]
        if rows:
            text = f"{verdict}: {len(rows)} of {len(compared)}" + ("" if verdict == SAME else f" ({', '.join(rows)})")
            console.print(text, style=STYLES.get(verdict, ""), highlight=False)
    return any(one.verdict in (SLOWER, WRONG) for one in compared)


def say(
    console: Console,
    old: Sequence[Row],
    new: Sequence[Row],
    old_header: Header,
    new_header: Header,
    other_machine: Sequence[str],
) -> None:
    """What one has to know to read the table."""
    if other_machine:
        console.print(
            f"Another machine or other threads ({'; '.join(other_machine)}): absolute times do not compare, "
            "only times over the floor are judged.",
            style="yellow",
            highlight=False,
        )
    settings = differences(old_header, new_header, SETTINGS) if old_header and new_header else []
    if settings:
        console.print(f"Also different: {'; '.join(settings)}.", style="yellow", highlight=False)
    rounds = [row.rounds for row in (*old, *new) if row.provider == OURS and row.rounds]
    if rounds and min(rounds) < FEWEST_ROUNDS:
        console.print(
            f"Some rows have {min(rounds)} rounds: quartiles of so few say little.", style="yellow", highlight=False
        )
    only_old, only_new = len(index(old).keys() - index(new).keys()), len(index(new).keys() - index(old).keys())
    if only_old or only_new:
        console.print(
            f"Without a partner: {only_old} rows of the old result, {only_new} of the new one.",
            style="dim",
            highlight=False,
        )
    console.print(
        "slower: the new lower quartile is above the old upper one. A row is slower when its time and its time over "
        "the floor both are;\nunclear when only one is, or when it has no floor and the machine was busy.",
        style="dim",
        highlight=False,
    )


def cells(measure: str, old: Range, new: Range) -> list[str]:
    """Both in one unit, so that they can be compared at sight."""
    scale, unit = 1.0, ""
    if measure == "time":
        scale, unit = (1.0, " us") if old.middle < 1000 else (1e-3, " ms")
    texts = [f"{scale * of.middle:.4g}{unit} ({scale * of.low:.4g} - {scale * of.high:.4g})" for of in (old, new)]
    return [measure, *texts, f"{100 * (new.middle / old.middle - 1):+.0f} %"]
