"""Check that knowledge runs one way: math <- kernels <- binding <- python.

    python tools/check_rooms.py

Prints one line per breach and exits with 1, or exits with 0. Headers of the standard library are judged too, because
formulas and kernels own no memory and start no threads.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]')
TORCH = re.compile(r"^(torch|ATen|c10|caffe2)/")
STABLE_TORCH = re.compile(r"^torch/(csrc/stable|headeronly)/")
PYTHON = re.compile(r"^(pybind11/|Python\.h$)")
OWNS_MEMORY_OR_THREADS = re.compile(
    r"^(deque|functional|future|iostream|list|map|memory|mutex|new|set|sstream|string|thread|unordered_map|vector)$"
)
ROOMS = ("math", "kernels", "binding")


def includes(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if match := INCLUDE.match(line):
            yield number, match[1]


def check_cpp(path: Path, room: str) -> Iterator[tuple[int, str]]:
    forbidden_rooms = ROOMS[ROOMS.index(room) + 1 :]
    found = list(includes(path))
    for number, header in found:
        for other in forbidden_rooms:
            if header.startswith(f"{other}/") or f"../{other}/" in header:
                yield number, f"csrc/{room} does not know csrc/{other}: {header}"
        if room == "binding":
            if TORCH.match(header) and not STABLE_TORCH.match(header):
                yield number, f"not part of torch's stable ABI (torch/csrc/stable, torch/headeronly): {header}"
            if TORCH.match(header) and any(PYTHON.match(other) for _, other in found):
                yield number, f"a source that includes pybind11 includes no torch header: {header}"
        else:
            if TORCH.match(header) or PYTHON.match(header):
                yield number, f"only csrc/binding knows torch and Python: {header}"
            if OWNS_MEMORY_OR_THREADS.match(header):
                yield number, f"csrc/{room} owns no memory and starts no threads: <{header}>"


def dotted_name(node: ast.AST) -> str:
    """`torch.ops.fusedloss` as text; "" for anything that is not a chain of names."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (head := dotted_name(node.value)):
        return f"{head}.{node.attr}"
    return ""


def python_names(path: Path) -> Iterator[tuple[int, str]]:
    """Everything that the file imports or reaches by a dotted name; relative imports as `fusedloss.`."""
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, ["fusedloss" if node.level else "", node.module or ""]))
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"
        elif isinstance(node, ast.Attribute) and (name := dotted_name(node)):
            yield node.lineno, name


def check_python(path: Path, room: str) -> Iterator[tuple[int, str]]:
    for number, name in python_names(path):
        if room == "fusedloss" and path.name != "_ops.py" and re.match(r"^(fusedloss\._C|torch\.ops)(\.|$)", name):
            yield number, f"only _ops.py names the binaries: {name}"
        if room in ("benchmarks", "examples") and re.match(r"^fusedloss\._(?!_)", name):
            yield number, f"{room} use the public face: {name}"


def breaches() -> Iterator[str]:
    for room in ROOMS:
        for path in sorted((ROOT / "csrc" / room).rglob("*")):
            if path.suffix in {".h", ".cpp", ".cuh", ".cu"}:
                for number, text in check_cpp(path, room):
                    yield f"{path.relative_to(ROOT)}:{number}: {text}"
    for folder in ("python/fusedloss", "benchmarks", "examples"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for number, text in check_python(path, Path(folder).name):
                yield f"{path.relative_to(ROOT)}:{number}: {text}"


def main() -> int:
    found = sorted(set(breaches()))
    print("\n".join(found) or "rooms: no breach of math <- kernels <- binding <- python")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
