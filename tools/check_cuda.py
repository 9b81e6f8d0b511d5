"""Compile the CUDA kernels without a GPU: every architecture, what each kernel takes, and the library's link.

    python tools/check_cuda.py

Needs nvcc; where it is missing a line says so, and nothing fails. Fails where a kernel does not compile, or keeps more
than a few registers in memory, or the library does not link against the installed torch, which may be one without CUDA.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("8.0", "9.0", "10.0")
# ptxas parks a few bytes even where registers are left (those of branches, and addresses used once). More than that is
# an array that it could not keep in registers.
MOST_SPILLED_BYTES = 96
WITHOUT_KERNELS = "launch.cu"  # asks the runtime for the words of an error, and no more

# What ninja prints before the words of a command, and what `ptxas -v` says of a kernel and of a function in it.
SOURCE = re.compile(r"\[\d+/\d+\] Building CUDA object \S*?(\w+\.cu)\.o")
ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(sm_\w+)'")
SPILLED = re.compile(r"Function properties for (\S+)\n\s+\d+ bytes stack frame, (\d+) bytes spill stores")
PTXAS = re.compile("|".join(pattern.pattern for pattern in (SOURCE, ENTRY, SPILLED)))

Kernels = dict[tuple[str, str], dict[str, int]]  # (source, architecture) -> function -> bytes it spills


def find_nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def build(folder: Path) -> tuple[str, str | None]:
    """What the build of _C_cuda for all architectures at once printed, and why it failed.

    One nvcc a source: the parts of a compilation that no architecture has of its own are then done once.
    """
    import pybind11

    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    environment = os.environ | {
        "FORCE_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": ";".join(ARCHITECTURES),
        "CUDAFLAGS": "-Xptxas -v",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    for command in (configure, ["cmake", "--build", str(folder), "--target", "_C_cuda"]):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return "", f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-4000:]}"
    return done.stdout + done.stderr, None


def kernels_of(report: str) -> Kernels:
    kernels: Kernels = defaultdict(dict)
    source = architecture = ""
    for found in PTXAS.finditer(report):
        new_source, _, new_architecture, function, spilled = found.groups()
        source, architecture = new_source or source, new_architecture or architecture
        if function:
            kernels[source, architecture][function] = int(spilled)
    return kernels


def check(folder: Path) -> list[str]:
    report, failure = build(folder)
    if failure:
        return [failure]
    kernels = kernels_of(report)
    breaches = []
    for source in sorted(path.name for path in (ROOT / "csrc/kernels/cuda").glob("*.cu")):
        for architecture in (f"sm_{name.replace('.', '')}" for name in ARCHITECTURES):
            of = kernels.get((source, architecture), {})
            spilled = {name: count for name, count in of.items() if count > 0}
            most = max(spilled.values(), default=0)
            print(f"{source:32} {architecture:6} {len(of):3} functions, {len(spilled)} spill (<= {most} B)")
            if not of and source != WITHOUT_KERNELS:
                breaches.append(f"{source} for {architecture}: ptxas said nothing of its kernels")
            breaches += [
                f"{source} for {architecture}: {name} spills {count} bytes"
                for name, count in spilled.items()
                if count > MOST_SPILLED_BYTES
            ]
    library = folder / "_C_cuda.so"
    print(f"{library.name}: links, {library.stat().st_size >> 10} KiB for {', '.join(ARCHITECTURES)}")
    return breaches


def main() -> int:
    if find_nvcc() is None:
        print("cuda: nvcc is not there, so the CUDA kernels were not compiled")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        breaches = check(Path(folder))
    for breach in breaches:
        print(breach)
    print(f"cuda: {len(breaches)} breaches" if breaches else "cuda: compiles for all architectures, and links")
    return 1 if breaches else 0


if __name__ == "__main__":
    sys.exit(main())
