# Finds torch by its path and makes the target `fusedloss_torch`; sets FUSEDLOSS_TORCH_VERSION, FUSEDLOSS_TORCH_CUDA and
# FUSEDLOSS_TORCH_CUDA_LIBRARY (not found where torch has no CUDA).
#
# Not by torch's own CMake package: under a CUDA torch that asks for the whole CUDA toolkit, overrides
# CMAKE_CUDA_ARCHITECTURES and adds flags of its own. The stable ABI needs one include directory and one library.

set(FUSEDLOSS_TORCH_MINIMUM 2.10)
# Which torch the stable headers may assume: 2.10, the oldest that runs this binary. Without it the binary would need
# the torch it was compiled with.
set(FUSEDLOSS_TORCH_TARGET 0x020a000000000000)

# The build tools are in it because an environment that has only seen an isolated build lacks them. CMake keeps a line
# as it is when it begins with a blank; others it breaks anywhere, and a broken command cannot be copied.
set(install_arguments "torch scikit-build-core pybind11 cmake ninja && pip install --no-build-isolation .")

# find_spec finds the package without importing it (an import takes seconds).
execute_process(
  COMMAND "${Python_EXECUTABLE}" -c
          "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
  OUTPUT_VARIABLE torch_dir OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
if(NOT EXISTS "${torch_dir}/version.py")
  message(FATAL_ERROR "fusedloss is compiled against an installed torch, and this build sees none: run\n"
                      "  pip install ${install_arguments}")
endif()

file(STRINGS "${torch_dir}/version.py" version_line REGEX "^__version__ = ")
string(REGEX MATCH "[0-9]+\\.[0-9]+[^'\"]*" FUSEDLOSS_TORCH_VERSION "${version_line}")
string(REGEX MATCH "^[0-9]+\\.[0-9]+" torch_release "${FUSEDLOSS_TORCH_VERSION}")
if(torch_release VERSION_LESS FUSEDLOSS_TORCH_MINIMUM)
  message(FATAL_ERROR "fusedloss needs torch >= ${FUSEDLOSS_TORCH_MINIMUM}, and this build sees "
                      "${FUSEDLOSS_TORCH_VERSION}: run\n"
                      "  pip install --upgrade ${install_arguments}")
endif()
# "13.0", or "" for a torch without CUDA.
file(STRINGS "${torch_dir}/version.py" cuda_line REGEX "^cuda.* = ")
string(REGEX MATCH "[0-9]+\\.[0-9]+" FUSEDLOSS_TORCH_CUDA "${cuda_line}")
find_library(FUSEDLOSS_TORCH_CUDA_LIBRARY torch_cuda PATHS "${torch_dir}/lib" NO_DEFAULT_PATH NO_CACHE)
message(STATUS "torch ${FUSEDLOSS_TORCH_VERSION}: ${torch_dir}")

find_library(torch_cpu_library torch_cpu PATHS "${torch_dir}/lib" NO_DEFAULT_PATH NO_CACHE REQUIRED)
add_library(fusedloss_torch INTERFACE)
target_include_directories(fusedloss_torch SYSTEM INTERFACE "${torch_dir}/include")
target_compile_definitions(fusedloss_torch INTERFACE TORCH_TARGET_VERSION=${FUSEDLOSS_TORCH_TARGET})
find_package(Threads REQUIRED)
target_link_libraries(fusedloss_torch INTERFACE "${torch_cpu_library}" Threads::Threads)
