"""What is kept: a CSV with a row per workload, provider and pass, and beside it a JSON that says where it was measured.

The rows of provider "floor" are the reads and copies that were timed in the same rounds (passes "read" and "copy").
"""

from __future__ import annotations

import csv
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "results"
FLOOR = "floor"


@dataclass(frozen=True)
class Row:
    """Times are of one call. None (an empty cell): not known, or not measured because the answer was wrong."""

    workload: str
    shape: str
    dtype: str
    memory_format: str
    target_dtype: str
    provider: str
    pass_name: str
    right: bool  # value and gradient agree with the reference
    value_error: float | None = None  # relative
    gradient_error: float | None = None  # relative
    median_us: float | None = None
    first_quartile_us: float | None = None
    third_quartile_us: float | None = None
    fastest_us: float | None = None
    rounds: int | None = None
    calls_per_sample: int | None = None
    floor_us: float | None = None  # of this pass, from this workload's reads and copies
    counted_bytes: int | None = None  # what the pass has to move, whoever computes it; not what this provider moves
    peak_allocated_bytes: int | None = None  # gradient included
    peak_resident_bytes: int | None = None
    device: str = "cpu"

    @property
    def gb_per_s(self) -> float | None:
        """Counted bytes in a second: near the memory's speed only for those who move little more than they have to."""
        if self.median_us is None or self.counted_bytes is None:
            return None
        return self.counted_bytes / self.median_us / 1e3

    @property
    def times_floor(self) -> float | None:
        if self.median_us is None or self.floor_us is None:
            return None
        return self.median_us / self.floor_us


COLUMNS = [field.name for field in fields(Row)]
REQUIRED = [field.name for field in fields(Row) if field.default is MISSING]
DERIVED = ["gb_per_s", "times_floor"]


def write(path: Path, header: Mapping[str, object], rows: Sequence[Row]) -> None:
    """`path` is the CSV's; the JSON has the same name with another ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *DERIVED], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            values = asdict(row) | {name: getattr(row, name) for name in DERIVED}
            writer.writerow({name: to_cell(value) for name, value in values.items()})
    path.with_suffix(".json").write_text(json.dumps(header, indent=2) + "\n")


def read(path: Path) -> list[Row]:
    """A ValueError, in one sentence, for a file that is no result."""
    wanted = typing.get_type_hints(Row)
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in REQUIRED if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path} is not a result of the benchmarks: it has no column {missing[0]!r}")
        table = list(reader)
    # A file may be older than a column: then its default holds.
    return [Row(**{name: from_cell(line[name], wanted[name]) for name in COLUMNS if name in line}) for line in table]


def read_header(path: Path) -> dict[str, Any]:
    """What the JSON beside the CSV says; nothing where there is none."""
    header = path.with_suffix(".json")
    if not header.is_file():
        return {}
    of: dict[str, Any] = json.loads(header.read_text())
    return of


def to_cell(value: object) -> object:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.5g}" if isinstance(value, float) else value


def from_cell(text: str, wanted: Any) -> Any:
    if isinstance(wanted, types.UnionType):  # X | None
        return from_cell(text, typing.get_args(wanted)[0]) if text else None
    return text == "yes" if wanted is bool else wanted(text)


def free_path(stem: str) -> Path:
    """In the folder of results; a number is added rather than a file overwritten."""
    path, number = FOLDER / f"{stem}.csv", 1
    while path.exists():
        number += 1
        path = FOLDER / f"{stem}_{number}.csv"
    return path
