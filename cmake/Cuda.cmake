# The CUDA library, and the same sources for the host compiler (tests).
#
# It is a library of its own, because it must only be loaded under a CUDA torch: python/fusedloss/_ops.py does.
#
#   FUSEDLOSS_CUDA                AUTO (default): when nvcc is there and torch is a CUDA build. ON, OFF.
#                                 The environment's FORCE_CUDA=1 means ON, FORCE_CUDA=0 OFF.
#   TORCH_CUDA_ARCH_LIST          environment, as for torch's own extensions: "8.0;9.0+PTX"
#   FUSEDLOSS_CUDA_ARCHITECTURES  as CMAKE_CUDA_ARCHITECTURES; where neither is given, what suits a public wheel
#   FUSEDLOSS_CUDA_HOST           OFF (default). ON also makes _C_cuda_host: see tests/cuda_host/gpu_host.h
#   FUSEDLOSS_SANITIZE            OFF (default). ON: _C_cuda_host under AddressSanitizer and UBSan

set(FUSEDLOSS_CUDA AUTO CACHE STRING "build the CUDA kernels: AUTO, ON or OFF")
option(FUSEDLOSS_CUDA_HOST "also build the CUDA kernels for the host, for tests" OFF)
option(FUSEDLOSS_SANITIZE "build _C_cuda_host under AddressSanitizer and UBSan" OFF)

file(GLOB FUSEDLOSS_CUDA_KERNELS CONFIGURE_DEPENDS csrc/kernels/cuda/*.cu)
file(GLOB FUSEDLOSS_CUDA_BINDING CONFIGURE_DEPENDS csrc/binding/cuda/*.cpp)
list(APPEND FUSEDLOSS_CUDA_BINDING ${FUSEDLOSS_SHARED_BINDING})

# Sets FUSEDLOSS_BUILD_CUDA, and says why.
function(fusedloss_decide_cuda)
  set(wanted "${FUSEDLOSS_CUDA}")
  if("$ENV{FORCE_CUDA}" STREQUAL "1")
    set(wanted ON)
  elseif("$ENV{FORCE_CUDA}" STREQUAL "0")
    set(wanted OFF)
  endif()
  find_program(FUSEDLOSS_NVCC nvcc PATHS /usr/local/cuda/bin ENV CUDA_HOME PATH_SUFFIXES bin)
  set(build OFF)
  if(wanted STREQUAL "AUTO")
    if(NOT FUSEDLOSS_NVCC)
      set(why "nvcc is not there")
    elseif(NOT FUSEDLOSS_TORCH_CUDA)
      set(why "torch ${FUSEDLOSS_TORCH_VERSION} is not a CUDA build; FORCE_CUDA=1 builds them all the same")
    else()
      set(build ON)
      set(why "torch is built for CUDA ${FUSEDLOSS_TORCH_CUDA}")
    endif()
  elseif(wanted)
    if(NOT FUSEDLOSS_NVCC)
      message(FATAL_ERROR "CUDA kernels were asked for, and there is no nvcc: put it on the PATH or set CUDA_HOME")
    endif()
    set(build ON)
    set(why "asked for")
  else()
    set(why "not wanted")
  endif()
  message(STATUS "CUDA kernels: ${build} (${why})")
  set(FUSEDLOSS_BUILD_CUDA ${build} PARENT_SCOPE)
endfunction()

# Sets CMAKE_CUDA_ARCHITECTURES.
function(fusedloss_choose_architectures)
  if(DEFINED ENV{TORCH_CUDA_ARCH_LIST} AND NOT "$ENV{TORCH_CUDA_ARCH_LIST}" STREQUAL "")
    string(REGEX REPLACE "[ ,]+" ";" names "$ENV{TORCH_CUDA_ARCH_LIST}")
    foreach(name IN LISTS names)
      if(NOT name MATCHES "^([0-9]+)\\.([0-9]+)([af]?)(\\+PTX)?$")
        message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST must hold numbers like 9.0, 9.0a or 9.0+PTX, got ${name}")
      endif()
      set(number "${CMAKE_MATCH_1}${CMAKE_MATCH_2}${CMAKE_MATCH_3}")
      list(APPEND chosen "${number}-real")
      if(CMAKE_MATCH_4)
        list(APPEND chosen "${number}-virtual")
      endif()
    endforeach()
  elseif(FUSEDLOSS_CUDA_ARCHITECTURES)
    set(chosen "${FUSEDLOSS_CUDA_ARCHITECTURES}")
  else()
    execute_process(COMMAND "${FUSEDLOSS_NVCC}" --list-gpu-arch OUTPUT_VARIABLE known COMMAND_ERROR_IS_FATAL ANY)
    foreach(number 75 80 86 89 90 100 120)
      if(known MATCHES "compute_${number}\n")
        list(APPEND chosen "${number}-real")
        set(newest "${number}")
      endif()
    endforeach()
    list(APPEND chosen "${newest}-virtual")  # later GPUs compile that when they first see it
  endif()
  message(STATUS "CUDA architectures: ${chosen}")
  set(CMAKE_CUDA_ARCHITECTURES "${chosen}" PARENT_SCOPE)
endfunction()

fusedloss_decide_cuda()
set(FUSEDLOSS_CUDA_TEXT "not built")
if(FUSEDLOSS_BUILD_CUDA)
  fusedloss_choose_architectures()
  set(CMAKE_CUDA_COMPILER "${FUSEDLOSS_NVCC}")
  enable_language(CUDA)
  set(CMAKE_CUDA_STANDARD 17)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  set(FUSEDLOSS_CUDA_TEXT "${CMAKE_CUDA_COMPILER_VERSION}, architectures ${CMAKE_CUDA_ARCHITECTURES}")

  add_library(_C_cuda MODULE ${FUSEDLOSS_CUDA_KERNELS} ${FUSEDLOSS_CUDA_BINDING})
  set_target_properties(_C_cuda PROPERTIES PREFIX "" SUFFIX ".so" CUDA_VISIBILITY_PRESET hidden
                                           INSTALL_RPATH "$ORIGIN/../torch/lib")
  target_include_directories(_C_cuda PRIVATE csrc ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
  target_compile_definitions(_C_cuda PRIVATE USE_CUDA)
  target_compile_options(_C_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr>
                                         $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra>)
  target_link_libraries(_C_cuda PRIVATE fusedloss_torch)
  target_link_options(_C_cuda PRIVATE "LINKER:--exclude-libs,ALL")  # CUDA's runtime is inside, and is ours alone
  # The current stream is asked of torch's CUDA library. Where torch has none, an empty one of that name is linked in its
  # place: torch shares the symbols of its libraries with nobody who does not name them, so ours has to name it.
  if(NOT FUSEDLOSS_TORCH_CUDA_LIBRARY)
    file(WRITE "${PROJECT_BINARY_DIR}/generated/torch_cuda.cpp" "")
    add_library(torch_cuda_stand_in SHARED "${PROJECT_BINARY_DIR}/generated/torch_cuda.cpp")
    set_target_properties(torch_cuda_stand_in PROPERTIES OUTPUT_NAME torch_cuda LIBRARY_OUTPUT_DIRECTORY generated)
    target_link_options(_C_cuda PRIVATE "LINKER:--no-as-needed")
    set(FUSEDLOSS_TORCH_CUDA_LIBRARY torch_cuda_stand_in)
  endif()
  target_link_libraries(_C_cuda PRIVATE "${FUSEDLOSS_TORCH_CUDA_LIBRARY}")
  install(TARGETS _C_cuda LIBRARY DESTINATION fusedloss)
endif()

if(FUSEDLOSS_CUDA_HOST)
  if(FUSEDLOSS_BUILD_CUDA)
    message(FATAL_ERROR "FUSEDLOSS_CUDA_HOST needs a build folder without the CUDA kernels (FORCE_CUDA=0): "
                        "a source has one language in a folder")
  endif()
  add_library(_C_cuda_host MODULE ${FUSEDLOSS_CUDA_KERNELS} ${FUSEDLOSS_CUDA_BINDING} tests/cuda_host/gpu_host.cpp)
  set_source_files_properties(${FUSEDLOSS_CUDA_KERNELS} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-xc++")
  set_target_properties(_C_cuda_host PROPERTIES PREFIX "" SUFFIX ".so" BUILD_RPATH_USE_ORIGIN OFF)
  target_include_directories(_C_cuda_host PRIVATE csrc tests/cuda_host)
  target_compile_definitions(_C_cuda_host PRIVATE FUSEDLOSS_CUDA_ON_HOST)
  target_compile_options(_C_cuda_host PRIVATE -O1 -g -fno-math-errno -Wall -Wextra)
  set_source_files_properties(tests/cuda_host/gpu_host.cpp PROPERTIES COMPILE_OPTIONS -O2)  # each step goes through it
  target_link_libraries(_C_cuda_host PRIVATE fusedloss_torch)
  if(FUSEDLOSS_SANITIZE)
    target_compile_options(_C_cuda_host PRIVATE -fsanitize=address,undefined -fno-sanitize-recover=undefined)
    target_link_options(_C_cuda_host PRIVATE -fsanitize=address,undefined)
  endif()
endif()
