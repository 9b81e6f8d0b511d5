"""Run the CPU tests with one and the same compiled file under several versions of torch.

    python tools/check_torch_versions.py                      # the oldest, 2.11, the pinned and the newest
    python tools/check_torch_versions.py 2.10.0 --quick       # what CI can afford
    python tools/check_torch_versions.py 2.10.0 --keep -- -k compile

The binary keeps to LibTorch's stable ABI, so it is compiled once and has to work under every torch from 2.10 on. Here
nothing is compiled: the package that is installed where this runs (or a wheel of it, ``--wheel``) is copied into a
fresh virtual environment a version, and the tests run there. A version is a number, ``pinned`` (the one that the
Makefile builds with) or ``newest`` (what pip takes). What follows ``--`` goes to pytest.

Prints a table, which also lies in build/torch_versions/results.md. Exits with 1 where a test failed or a version could
not be installed.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "torch_versions"
VERSIONS = ("2.10.0", "2.11.0", "pinned", "newest")
VERSION = re.compile(r"\d+(\.\d+)+([+.\w]*)?")
BINARY = re.compile(r"fusedloss/_C\b[^/]*\.(so|pyd)")

# They test the CUDA sources, which are compiled for the host by other words, and no torch.
# benchmark_runs.py holds no test, and needs the extra `bench`.
LEFT_OUT = (
    "tests/test_cuda.py",
    "tests/test_cuda_host.py",
    "tests/test_cuda_host_promises.py",
    "tests/benchmark_runs.py",
)
# What meets most of torch for its time: every loss with derivatives, dtypes, messages, memory, the dispatcher, and one
# compilation of each loss.
QUICK = (
    "tests/test_package.py",
    "tests/test_modules.py",
    "tests/test_labels.py",
    "tests/test_kept_gradient.py",
    "tests/test_errors.py",
    "tests/test_backward.py",
    "tests/test_dtypes.py",
    "tests/test_memory.py",
    "tests/test_memory_reuse.py",
    "tests/test_opcheck.py::test_opcheck",
    "tests/test_transforms.py::test_compile_gives_the_same_bits",
)


class Refused(Exception):
    """Something that the person who called has to know, in one sentence."""


@dataclass
class Result:
    """What became of one version."""

    asked: str
    torch: str = ""
    passed: int = 0
    skipped: int = 0
    failed: list[str] = field(default_factory=list)
    install_s: float = 0.0
    tests_s: float = 0.0
    trouble: str = ""  # why there are no tests, or no end of them

    @property
    def good(self) -> bool:
        return not self.trouble and not self.failed and self.passed > 0

    def row(self) -> str:
        name = self.torch or self.asked
        if self.trouble:
            return f"| {name} | - | - | - | {self.install_s:.0f} s | {self.trouble} |"
        counts = f"{self.passed} | {len(self.failed)} | {self.skipped}"
        return f"| {name} | {counts} | {self.install_s:.0f} s | {self.tests_s:.0f} s |"


def say(text: str) -> None:
    print(f"torch versions: {text}", flush=True)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def last_words(done: subprocess.CompletedProcess[str]) -> str:
    """The line in which a program said what went wrong."""
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or [f"it ended with {done.returncode} and no word"])[-1]


# --- the package ------------------------------------------------------------------------------------------------------


def collect_package(wheel: Path | None, to: Path) -> Path:
    """Lay the package and its metadata into a folder, once for all versions. Returns the compiled file there."""
    if wheel is not None:
        if not wheel.is_file() or not zipfile.is_zipfile(wheel):
            raise Refused(f"{wheel} is no wheel")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(to)
    else:
        copy_installed(to)
    binaries = [path for path in to.rglob("*") if BINARY.fullmatch(path.relative_to(to).as_posix())]
    if len(binaries) != 1:
        raise Refused(f"{wheel or 'the installed fusedloss'} holds {len(binaries)} compiled files, not one")
    return binaries[0]


def copy_installed(to: Path) -> None:
    """An editable installation is in two places: the compiled file in site-packages, the sources in this tree."""
    try:
        distribution = importlib.metadata.distribution("fusedloss")
    except importlib.metadata.PackageNotFoundError:
        raise Refused(f"fusedloss is not installed for {sys.executable}: run `make build`, or give --wheel") from None
    shutil.copytree(
        ROOT / "python" / "fusedloss", to / "fusedloss", ignore=shutil.ignore_patterns("__pycache__", "*.so")
    )
    for file in distribution.files or ():
        name = file.as_posix()
        # Not direct_url.json: it says that the installation is editable.
        if BINARY.fullmatch(name) or (".dist-info/" in name and file.name in ("METADATA", "WHEEL")):
            target = to / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(str(file.locate())), target)


# --- the environments -------------------------------------------------------------------------------------------------


def test_requirements() -> list[str]:
    """The extra `test` of pyproject.toml. (tomllib is not there in Python 3.10.)"""
    match = re.search(r"^test = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert match is not None, "pyproject.toml has no extra `test` in one line"
    return re.findall(r'"([^"]+)"', match[1])


def requirement(version: str) -> str:
    if version == "newest":
        return "torch"
    if version == "pinned":
        match = re.search(r"^TORCH \?= (torch==\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert match is not None, "the Makefile pins no torch"
        return match[1]
    return f"torch=={version}"


def clean_environment(folder: Path) -> dict[str, str]:
    """Without what a caller has set for the package, pytest or Python, and with nothing written outside the folder."""
    names = [name for name in os.environ if name.startswith(("PYTHON", "PYTEST_", "FUSEDLOSS_", "TORCHINDUCTOR_"))]
    clean = {name: value for name, value in os.environ.items() if name not in names}
    return clean | {"HYPOTHESIS_STORAGE_DIRECTORY": str(folder / "hypothesis"), "PYTHONDONTWRITEBYTECODE": "1"}


def make_environment(folder: Path, version: str, pip_options: Sequence[str]) -> Path:
    """A virtual environment with torch and what the tests need. Returns its Python."""
    python = folder / "bin" / "python"
    if not python.exists():
        done = run([sys.executable, "-m", "venv", str(folder)])
        if done.returncode != 0:
            # Debian splits ensurepip from Python; then the pip that is there installs one into the environment.
            done = run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(folder)])
            done = (
                done
                if done.returncode
                else run([sys.executable, "-m", "pip", "--python", str(python), "install", "pip"])
            )
        if done.returncode != 0:
            raise Refused(f"no virtual environment could be made: {last_words(done)}")
    upgrade = ["--upgrade"] if version == "newest" else []
    install = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *pip_options]
    for wanted in ([*upgrade, requirement(version)], test_requirements()):
        done = run([*install, *wanted])
        if done.returncode != 0:
            raise Refused(f"{' '.join(wanted)} could not be installed: {last_words(done)}")
    return python


def site_packages(python: Path) -> Path:
    return Path(run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('platlib'))"]).stdout.strip())


def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def put_package(package: Path, binary: Path, python: Path, folder: Path) -> str:
    """Copy the package into the environment and see that it is the one that is imported. Returns torch's version."""
    site = site_packages(python)
    for old in (*site.glob("fusedloss"), *site.glob("fusedloss-*.dist-info")):
        shutil.rmtree(old)
    shutil.copytree(package, site, dirs_exist_ok=True)
    program = "import fusedloss, torch; print(fusedloss._C.__file__); print(torch.__version__)"
    done = subprocess.run(
        [str(python), "-c", program],
        cwd=folder,
        env=clean_environment(folder),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise Refused(f"fusedloss cannot be imported: {last_words(done)}")
    imported, torch = done.stdout.split()
    if Path(imported).resolve() != (site / binary.relative_to(package)).resolve() or digest(Path(imported)) != digest(
        binary
    ):
        raise Refused(f"another compiled file than the copied one is imported: {imported}")
    return torch


# --- the tests --------------------------------------------------------------------------------------------------------


def run_tests(python: Path, folder: Path, arguments: argparse.Namespace, result: Result) -> None:
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    # The docstrings of the copied package, not those of this tree, which is another one of the same name.
    chosen = [*QUICK] if arguments.quick else ["tests", str(site_packages(python) / "fusedloss")]
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    command += ["-m", "not gpu and not large", "--numprocesses", arguments.numprocesses, "--dist", "worksteal"]
    command += [f"--ignore={path}" for path in LEFT_OUT]
    started = time.monotonic()
    done = subprocess.run([*command, *chosen, *arguments.pytest], cwd=ROOT, env=clean_environment(folder), check=False)
    result.tests_s = time.monotonic() - started
    if done.returncode not in (0, 1) or not report.exists():
        raise Refused(f"pytest ended with {done.returncode}, see its output above")
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            result.failed.append(f"{case.get('classname', '')}::{case.get('name', '')}")
        elif "skipped" in kinds:
            result.skipped += 1
        else:
            result.passed += 1


def check(version: str, package: Path, binary: Path, arguments: argparse.Namespace) -> Result:
    result = Result(version)
    folder = FOLDER / version
    if not arguments.keep:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        say(f"{version}: installing {requirement(version)} (a torch with CUDA is some GB)")
        started = time.monotonic()
        try:
            python = make_environment(folder, version, arguments.pip_option)
            result.torch = put_package(package, binary, python, folder)
        finally:
            result.install_s = time.monotonic() - started
        say(f"{version}: testing under torch {result.torch}")
        run_tests(python, folder, arguments, result)
    except Refused as refusal:
        result.trouble = str(refusal)
        say(f"{version}: {refusal}")
    finally:
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)
    return result


def table(results: Sequence[Result], title: str) -> str:
    lines = [
        f"{datetime.date.today():%Y-%m-%d}, Python {platform.python_version()}, {platform.system()} "
        f"{platform.machine()}; {title}",
        "",
        "| torch | passed | failed | skipped | installed in | tested in |",
        "|---|---:|---:|---:|---:|---:|",
        *(result.row() for result in results),
    ]
    for result in results:
        lines += ["", *(f"{result.torch}: failed: {name}" for name in result.failed)] if result.failed else []
    return "\n".join(lines) + "\n"


def parse(words: Sequence[str]) -> argparse.Namespace:
    end = list(words).index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description="Run the CPU tests with one binary under several versions of torch.")
    parser.add_argument("versions", nargs="*", metavar="VERSION", help=f"default: {' '.join(VERSIONS)}")
    parser.add_argument("--quick", action="store_true", help="a selection of the tests, for CI")
    parser.add_argument("--wheel", type=Path, help="a wheel of fusedloss (default: the package that is installed here)")
    parser.add_argument("--keep", action="store_true", help="keep the environments, and use those that were kept")
    parser.add_argument("--numprocesses", default="auto", help="pytest's processes (default: one a core)")
    parser.add_argument("--pip-option", action="append", default=[], metavar="OPTION", help="for pip install")
    arguments = parser.parse_args(words[:end])
    arguments.pytest = list(words[end + 1 :])
    arguments.versions = arguments.versions or list(VERSIONS)
    return arguments


def main(words: Sequence[str]) -> int:
    arguments = parse(words)
    try:
        for version in arguments.versions:
            if version not in ("pinned", "newest") and not VERSION.fullmatch(version):
                raise Refused(f"{version!r} is no version of torch: give a number, `pinned` or `newest`")
        with tempfile.TemporaryDirectory(prefix="fusedloss-package-") as temporary:
            package = Path(temporary)
            binary = collect_package(arguments.wheel, package)
            selection = " ".join(["--quick" if arguments.quick else "the whole CPU suite", *arguments.pytest])
            title = f"{selection}; {binary.name}, SHA-256 {digest(binary)[:16]}..."
            results = [check(version, package, binary, arguments) for version in arguments.versions]
    except Refused as refusal:
        say(str(refusal))
        return 1
    text = table(results, title)
    (FOLDER / "results.md").write_text(text)
    print(f"\n{text}")
    return 0 if all(result.good for result in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
