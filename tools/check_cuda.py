"""Compile the CUDA kernels without a GPU: every architecture, what each kernel takes, and the library's link.

    python tools/check_cuda.py

Needs nvcc; where it is missing a line says so, and nothing fails. Fails where a kernel does not compile, or keeps more
than a few registers in memory, or the library does not link against the installed torch.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = (80, 90, 100)
# ptxas parks a few bytes even where registers are left (those of branches, and addresses used once). More than that is
# an array that it could not keep in registers.
MOST_SPILLED_BYTES = 96

PROPERTIES = re.compile(r"Function properties for (\S+)\n\s+\d+ bytes stack frame, (\d+) bytes spill stores")


def find_nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def compile_one(nvcc: str, source: Path, architecture: int, folder: Path) -> tuple[Path, int, str, int]:
    command = [nvcc, "-std=c++17", "--expt-relaxed-constexpr", "-I", str(ROOT / "csrc"), f"-arch=sm_{architecture}"]
    command += ["-Xptxas", "-v", "-c", str(source), "-o", str(folder / f"{source.stem}_{architecture}.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return source, architecture, done.stdout + done.stderr, done.returncode


def check_kernels(nvcc: str, folder: Path) -> Iterator[str]:
    sources = sorted((ROOT / "csrc/kernels/cuda").glob("*.cu"))
    jobs = [(source, architecture) for source in sources for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for source, architecture, report, status in pool.map(lambda job: compile_one(nvcc, *job, folder), jobs):
            if status != 0:
                yield f"{source.name} does not compile for sm_{architecture}:\n{report}"
                continue
            kernels = PROPERTIES.findall(report)
            spilled = {name: int(count) for name, count in kernels if int(count) > 0}
            most = max(spilled.values(), default=0)
            print(
                f"{source.name:28} sm_{architecture:<4} {len(kernels):3} functions, {len(spilled)} spill (<= {most} B)"
            )
            for name, count in spilled.items():
                if count > MOST_SPILLED_BYTES:
                    yield f"{source.name} for sm_{architecture}: {name} spills {count} bytes"


def check_link(folder: Path) -> Iterator[str]:
    """A build with FORCE_CUDA=1 against the installed torch, which may be one without CUDA."""
    import pybind11

    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    environment = os.environ | {
        "FORCE_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": "9.0",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    for command in (configure, ["cmake", "--build", str(folder), "--target", "_C_cuda"]):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            yield f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-4000:]}"
            return
    library = folder / "_C_cuda.so"
    print(f"{library.name}: links, {library.stat().st_size >> 10} KiB for sm_90")


def main() -> int:
    nvcc = find_nvcc()
    if nvcc is None:
        print("cuda: nvcc is not there, so the CUDA kernels were not compiled")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        breaches = [*check_kernels(nvcc, Path(folder)), *check_link(Path(folder, "build"))]
    for breach in breaches:
        print(breach)
    print(f"cuda: {len(breaches)} breaches" if breaches else "cuda: compiles for all architectures, and links")
    return 1 if breaches else 0


if __name__ == "__main__":
    sys.exit(main())
