"""Where and with what it was measured; no host name, no user, no path."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent

IDLE_LOAD = 0.5  # average of the last minute; above it other programs were running

# Variables that change speed or memory; their values are words and numbers.
SETTINGS = (
    "FUSEDLOSS_CPU_CAPABILITY",
    "FUSEDLOSS_REUSE_MEMORY",
    "ATEN_CPU_CAPABILITY",
    "THP_MEM_ALLOC_ENABLE",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OMP_PROC_BIND",
    "KMP_AFFINITY",
    "KMP_BLOCKTIME",
    "GOMP_CPU_AFFINITY",
    "MALLOC_ARENA_MAX",
    "MALLOC_MMAP_MAX_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
)


def describe(threads: int, device: str) -> dict[str, object]:
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "machine": {
            "cpu": cpu_model(),
            "architecture": platform.machine(),
            "cores": os.cpu_count(),
            "memory_gib": memory_gib(),
            "system": f"{platform.system()} {platform.release().split('-')[0]}",
            "transparent_hugepages": transparent_hugepages(),
            "load_average_1min": load_average(),
            **({"gpu": describe_gpu()} if device == "cuda" else {}),
        },
        "software": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "compiler_of_torch_compile": compiler(),
            "fusedloss": describe_fusedloss(),
        },
        "threads": threads,
        "environment": {
            name: os.environ[name] for name in SETTINGS if re.fullmatch(r"[\w,.-]+", os.environ.get(name, ""))
        },
    }


def describe_gpu() -> dict[str, object]:
    properties = torch.cuda.get_device_properties("cuda")
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda_of_torch": torch.version.cuda,
    }


def file_stem(threads: int, device: str, level: str | None) -> str:
    """A name for results: date, processor, threads, and the instruction-set level where one was asked for; or date and
    GPU."""
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    if device == "cuda":
        return f"{date}_{re.sub(r'[^a-z0-9]+', '-', torch.cuda.get_device_name().lower()).strip('-')}"
    cpu = re.sub(r"[^a-z0-9]+", "-", cpu_model().lower().replace("(r)", "").replace("(tm)", "")).strip("-")
    return "_".join([date, cpu, f"{threads}threads", *([level] if level else [])])


def cpu_model() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


def memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def transparent_hugepages() -> str | None:
    """The word in brackets: always, madvise or never."""
    try:
        match = re.search(r"\[(\w+)\]", Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text())
    except OSError:
        return None
    return match[1] if match else None


def load_average() -> float | None:
    """Of the last minute: more than a little means that others were running."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def compiler() -> str | None:
    return first_line(os.environ.get("CXX", "g++"), "--version")


def commit() -> str | None:
    """Short hash, with "+" where tracked files outside benchmarks/results differ from it."""
    head = first_line("git", "rev-parse", "--short", "HEAD")
    changes = first_line("git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return f"{head}+" if head and changes else head


def first_line(*command: str) -> str | None:
    """The first line that a program prints; None where it is missing, fails, or prints nothing."""
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return next(iter(result.stdout.splitlines()), None)


def describe_fusedloss() -> list[str] | None:
    """What show_config says: version, compiler, instruction-set level."""
    try:
        import fusedloss
    except ImportError:
        return None
    return [line.strip() for line in fusedloss.show_config().splitlines()]
