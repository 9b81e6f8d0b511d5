// Which instruction-set level runs.
//
// The kernels are compiled once per level: base (the compiler's default target), avx2 (x86-64-v3), avx512 (x86-64-v4).
// The start is the highest level that this machine can run, unless the environment says otherwise:
//   FUSEDLOSS_CPU_CAPABILITY=base|avx2|avx512     this level
//   ATEN_CPU_CAPABILITY=default|avx2|avx512       no level above this one (torch's own variable)
// The first wins where both are set.
#pragma once

#include "kernels/cpu/kernel_table.h"

namespace fusedloss::cpu {

constexpr const char* kCapabilityVariable = "FUSEDLOSS_CPU_CAPABILITY";

/// The table of the level in use. May change between two calls; each pass over the pixels asks once.
const KernelTable& kernels();

/// Name of the level in use.
const char* capability();

/// Name of the index-th level that this machine can run, lowest first; nullptr past the last.
const char* supported_capability(int index);

/// Makes `name` the level in use, for all threads. False, with nothing changed, where this machine or build lacks it.
bool set_capability(const char* name);

/// The value of FUSEDLOSS_CPU_CAPABILITY that could not be followed, or nullptr. The start is then as without it.
const char* refused_capability();

}  // namespace fusedloss::cpu
