#!/usr/bin/env bash
# Compile for aarch64 on an x86-64 Debian and run the CPU tests there, each process under QEMU. What it shows is that the
# code compiles and is right there, nothing of speed: the tests take five to ten times as long as natively.
#
#   apt-get install mmdebstrap g++-aarch64-linux-gnu qemu-user      what it needs, beside `make build`
#   tools/check_aarch64.sh                                          a selection, half an hour
#   tools/check_aarch64.sh tests/test_shapes.py -k voc -x           what pytest is given instead
#
# Lays a Debian of that kind (130 MB) and its Python packages (1 GB) into build/aarch64, and keeps them for the next time.
set -euo pipefail
cd "$(dirname "$0")/.."
# The last torch whose aarch64 wheel on PyPI is one for the CPU; later ones look for CUDA when they are imported.
TORCH=${TORCH:-torch==2.10.0}
VENV=$(realpath "${VENV:-.venv}")
FOLDER=$PWD/build/aarch64
FETCHED="$FOLDER/fetched $TORCH"  # another torch is fetched anew
ROOT=$FOLDER/root SITE=$FOLDER/site BUILD=$FOLDER/build
# Left out are test_processes.py, whose forked processes QEMU ends, and what takes long: test_layouts.py more than 25 minutes,
# test_shapes.py ten.
TESTS=(tests/test_package.py tests/test_forward.py tests/test_backward.py tests/test_dtypes.py tests/test_levels.py
  tests/test_labels.py tests/test_sums.py tests/test_bounds.py tests/test_kept_gradient.py tests/test_errors.py
  tests/test_modules.py tests/test_segmentation_edges.py)

refuse() { echo "check_aarch64: $*" >&2; exit 2; }
say() { echo "== $*"; }
for command in mmdebstrap aarch64-linux-gnu-g++ qemu-aarch64; do
  command -v $command > /dev/null || refuse "$command is missing; the head of $0 says what to install"
done
[ -x "$VENV/bin/python" ] || refuse "$VENV has no Python: run \`make build\` first"

if [ ! -e "$FETCHED" ]; then
  say "fetching Debian and its Python"
  rm -rf "$FOLDER"
  mkdir -p "$FOLDER"
  mmdebstrap --quiet --variant=extract --architectures=arm64 --include=python3,libpython3-dev,libstdc++6,libgomp1 \
    bookworm "$ROOT"
fi
version=$(readlink "$ROOT/usr/bin/python3")  # python3.11
version=${version#python}
PYTHON=$ROOT/usr/bin/python$version

if [ ! -e "$FETCHED" ]; then
  # In Python's place a program of this machine, so that what Python starts as sys.executable is emulated too.
  mv "$PYTHON" "$PYTHON.real"
  printf '#!/bin/sh\nexec qemu-aarch64 -L "%s" -0 "%s" "%s.real" "$@"\n' "$ROOT" "$PYTHON" "$PYTHON" > "$PYTHON"
  chmod +x "$PYTHON"

  say "fetching $TORCH and what the tests need"
  mapfile -t needed < <(sed -n 's/^test = \[\(.*\)\]$/\1/p' pyproject.toml | tr -d '" ' | tr , '\n')
  "$VENV/bin/python" -m pip --disable-pip-version-check install --quiet --target "$SITE" --only-binary=:all: \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux_2_17_aarch64 \
    --platform manylinux2014_aarch64 --python-version "$version" "$TORCH" "${needed[@]}"
  touch "$FETCHED"
fi

say "compiling"
cat > "$FOLDER/toolchain.cmake" << END
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CXX_FLAGS_INIT "-idirafter $ROOT/usr/include")  # pyconfig.h
END
export FORCE_CUDA=0
PYTHONPATH=$SITE "$VENV/bin/cmake" -S . -B "$BUILD" -G Ninja -DCMAKE_BUILD_TYPE=Release \
  -DCMAKE_TOOLCHAIN_FILE="$FOLDER/toolchain.cmake" -DCMAKE_MAKE_PROGRAM="$VENV/bin/ninja" \
  -DPython_EXECUTABLE="$VENV/bin/python" -DPython_INCLUDE_DIR="$ROOT/usr/include/python$version" \
  -Dpybind11_DIR="$("$VENV/bin/python" -m pybind11 --cmakedir)" \
  -DPYTHON_MODULE_EXTENSION=".cpython-${version/./}-aarch64-linux-gnu.so" > "$FOLDER/configure.log" ||
  { cat "$FOLDER/configure.log" >&2; exit 1; }
"$VENV/bin/cmake" --build "$BUILD" --target _C

rm -rf "$SITE"/fusedloss "$SITE"/fusedloss-*.dist-info
cp -r python/fusedloss "$SITE"
cp "$BUILD"/_C*.so "$SITE/fusedloss"
cp -r "$VENV"/lib/python*/site-packages/fusedloss-*.dist-info "$SITE"

say "testing"
export PYTHONPATH=$SITE PYTHONDONTWRITEBYTECODE=1
"$PYTHON" -c 'import fusedloss; print(fusedloss.show_config())'
exec "$PYTHON" -m pytest -q -p no:cacheprovider -m "not gpu and not compile and not large" "${@:-${TESTS[@]}}"
