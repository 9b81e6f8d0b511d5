# Instruction-set levels: the same kernel sources, compiled once per level, one function table chosen at run time
# (csrc/kernels/cpu/dispatch.cpp).
#
# fusedloss_add_cpu_levels(source...) makes one OBJECT library per level that the compiler can make, and sets
#   FUSEDLOSS_CPU_LEVELS             names of the levels, lowest first
#   FUSEDLOSS_CPU_LEVEL_LIBRARIES    what to link
#   FUSEDLOSS_CPU_LEVEL_DEFINITIONS  FUSEDLOSS_HAVE_<LEVEL>, for dispatch.cpp

include(CheckCXXCompilerFlag)

set(FUSEDLOSS_FLAGS_base "")
set(FUSEDLOSS_FLAGS_avx2 -march=x86-64-v3)
# GCC and Clang prefer 256-bit vectors at this level unless told; 512 bits measured 1.8x faster.
set(FUSEDLOSS_FLAGS_avx512 -march=x86-64-v4 -mprefer-vector-width=512)

# No -ffast-math: NaN and infinity have a meaning here. Errno and floating-point traps have none, and without them
# loops vectorize. Exceptions and RTTI would only add symbols with external linkage.
# A product and a sum are fused into one rounding. Where Clang may look for them beyond one expression ("fast"), it fuses
# two copies of a formula in two ways, and a gradient gets other bits when a pixel beside it is NaN. GCC knows "on" from
# 14 on only and takes it for "off" before.
set(FUSEDLOSS_KERNEL_FLAGS -O3 -fno-math-errno -fno-trapping-math -ffp-contract=$<IF:$<CXX_COMPILER_ID:GNU>,fast,on>
                           -fno-exceptions -fno-rtti -Wall -Wextra)

function(fusedloss_add_cpu_levels)
  set(levels base)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
    foreach(level avx2 avx512)
      string(REPLACE ";" " " flags "${FUSEDLOSS_FLAGS_${level}}")
      check_cxx_compiler_flag("${flags}" FUSEDLOSS_COMPILER_KNOWS_${level})
      if(FUSEDLOSS_COMPILER_KNOWS_${level})
        list(APPEND levels ${level})
      endif()
    endforeach()
  endif()

  foreach(level IN LISTS levels)
    set(library fusedloss_cpu_${level})
    add_library(${library} OBJECT ${ARGN})
    target_include_directories(${library} PRIVATE csrc)
    target_compile_definitions(${library} PRIVATE FUSEDLOSS_LEVEL=${level})
    target_compile_options(${library} PRIVATE ${FUSEDLOSS_KERNEL_FLAGS} ${FUSEDLOSS_FLAGS_${level}})
    # With link-time optimization an AVX-512 function could end up in code that every machine runs.
    set_target_properties(${library} PROPERTIES INTERPROCEDURAL_OPTIMIZATION OFF)
    string(TOUPPER ${level} upper)
    list(APPEND libraries ${library})
    list(APPEND definitions FUSEDLOSS_HAVE_${upper})
  endforeach()

  message(STATUS "instruction-set levels: ${levels}")
  set(FUSEDLOSS_CPU_LEVELS "${levels}" PARENT_SCOPE)
  set(FUSEDLOSS_CPU_LEVEL_LIBRARIES "${libraries}" PARENT_SCOPE)
  set(FUSEDLOSS_CPU_LEVEL_DEFINITIONS "${definitions}" PARENT_SCOPE)
endfunction()
