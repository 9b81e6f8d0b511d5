"""Check what the compiled files export and need.

    python tools/check_symbols.py BUILD_DIRECTORY

1. An object file of an instruction-set level defines names in its own namespace only, and none of them weak. A weak
   name (an inline function or a template with external linkage) may exist at several levels; the linker keeps one, and
   an AVX-512 copy of it ends the program on a machine without AVX-512.
2. The extension module needs nothing of torch but its C functions. One name of `at::`, `c10::` or `torch::`, and the
   binary is tied to the torch that it was compiled with. Nor does it miss a name of its own: the linker lets that pass
   in a shared library, and the import fails.

Prints one line per breach and exits with 1, or exits with 0.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

LEVEL = re.compile(r"fusedloss_cpu_(\w+)\.dir")
TORCH_CPP = re.compile(r"\b(at|c10|torch)::")


def nm(*arguments: str | Path) -> Iterator[tuple[str, str]]:
    """(type letter, demangled name) of every symbol."""
    output = subprocess.run(["nm", "--demangle", *arguments], check=True, capture_output=True, text=True).stdout
    for line in output.splitlines():
        if match := re.match(r"[0-9a-f ]*([A-Za-z]) (.*)", line):
            yield match[1], match[2]


def breaches(objects: list[tuple[Path, str]], modules: list[Path]) -> Iterator[str]:
    for path, level in objects:
        for kind, name in nm("--defined-only", path):
            if kind in "WVu":
                yield f"{path.name} ({level}): weak, so the linker may take it for every level: {name}"
            elif kind.isupper() and not name.startswith(f"fusedloss::cpu::{level}::"):
                yield f"{path.name} ({level}): external, and not in fusedloss::cpu::{level}: {name}"
    for path in modules:
        for _, name in nm("--dynamic", "--undefined-only", path):
            if TORCH_CPP.search(name):
                yield f"{path.name}: not part of torch's stable ABI: {name}"
            elif name.startswith("fusedloss::"):
                yield f"{path.name}: defined by no source in CMakeLists.txt: {name}"


def main(build: Path) -> int:
    objects = [(path, match[1]) for path in build.rglob("*.o") if (match := LEVEL.search(str(path)))]
    modules = sorted(build.glob("_C*.so"))
    if not objects or not modules:
        print(f"{build} holds no build of fusedloss: run `make build`")
        return 1
    found = sorted(set(breaches(objects, modules)))
    print("\n".join(found) or f"symbols: no breach in {len(objects)} objects and {modules[0].name}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
