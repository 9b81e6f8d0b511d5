#!/bin/sh
# Everything that a GPU is needed for, in one go and without a network: build for this machine's GPU, tests, sanitizer,
# benchmarks. Goes on after a failure, says at the end what failed, and leaves its logs in a folder.
#
#   tools/gpu.sh [build] [tests] [compile] [sanitizer] [benchmarks]      default: all; OUT=folder for logs and results
#
# Needs nvcc, and in $PYTHON's environment torch for CUDA, scikit-build-core, pybind11, pytest, pytest-xdist,
# hypothesis, numpy and rich.
set -u
cd "$(dirname "$0")/.." || exit
PYTHON=${PYTHON:-python3}
OUT=${OUT:-build/gpu}
SITE=${SITE:-${TMPDIR:-/tmp}/fusedloss-gpu-site}
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null || {
  echo "tools/gpu.sh: $PYTHON has no torch that finds a GPU here" >&2
  exit 2
}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
export PYTHONPATH="$SITE"
# What else the machine has installed may bring plugins for pytest whose warnings are errors here: only those that are
# named are loaded.
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
failed=

# stage NAME COMMAND...: output to a log, of which the end is shown.
stage() {
  name=$1
  shift
  start=$(date +%s)
  if "$@" > "$OUT/$name.log" 2>&1; then state=done; else state=FAILED failed="$failed $name"; fi
  echo "== $name: $state, $(($(date +%s) - start)) s"
  tail -n "${LINES_SHOWN:-12}" "$OUT/$name.log"
}

build() {
  architecture=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || return
  FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST="$architecture" "$PYTHON" -m pip install --quiet --no-index --no-deps \
    --no-build-isolation --upgrade --target "$SITE" . || return
  "$PYTHON" -c 'import fusedloss; print(fusedloss.show_config())'
}

run_tests() {
  "$PYTHON" -m pytest -q -p no:cacheprovider -p xdist.plugin -p _hypothesis_pytestplugin --dist worksteal "$@"
}

# Every worker compiles by itself: else each of them starts as many processes for it as there are cores.
run_tests_of_compile() (
  export TORCHINDUCTOR_COMPILE_THREADS=1
  run_tests -n 16 -m "gpu and compile" tests
)

# A selection: the sanitizer makes everything a hundred times slower. Each tool looks for something else.
sanitize() {
  command -v compute-sanitizer || { echo "compute-sanitizer is not installed"; return 1; }
  status=0
  for tool in memcheck racecheck initcheck synccheck; do
    echo "-- $tool"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 240 compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
      "$PYTHON" -m pytest -q -x -p no:cacheprovider -k "cuda and (rows or image or masks)" tests/test_forward.py || status=1
  done
  return $status
}

for part in ${*:-build tests compile sanitizer benchmarks}; do
  case $part in
    build) LINES_SHOWN=8 stage build build ;;
    tests)
      # Fewer at once: they fill the device's memory, and keep it busy.
      stage tests-of-cuda run_tests -n 6 tests/test_cuda.py
      stage tests-of-the-device run_tests -n 16 -m "gpu and not compile" --ignore=tests/test_cuda.py tests
      ;;
    compile) stage tests-of-compile run_tests_of_compile ;;
    sanitizer) stage sanitizer sanitize ;;
    benchmarks)
      LINES_SHOWN=70 stage benchmarks "$PYTHON" -m benchmarks --device cuda --passes both --check \
        --output "$OUT/gpu.csv"
      ;;
    *) echo "tools/gpu.sh: no part is called $part: build, tests, compile, sanitizer, benchmarks" >&2; exit 2 ;;
  esac
done
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
