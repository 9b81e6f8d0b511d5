// What becomes of a label outside [0, C): nothing is read or written out of bounds, the pixel's value and gradient are
// NaN, and the first one found is remembered on the device until somebody asks.
#pragma once

#include <cstdint>

#if defined(__CUDACC__) || defined(FUSEDLOSS_CUDA_ON_HOST)
#include "kernels/cuda/gpu.h"
#endif

namespace fusedloss::cuda {

// In device memory, one a device. All zero: nothing happened.
struct BadLabelRecord {
  unsigned long long found;  // 0 or 1
  int64_t value;
  int64_t position;  // flat, in the target
  int64_t classes;
};

#if defined(FUSEDLOSS_DEVICE)
// Of several at once any one wins; that there was one is always kept.
FUSEDLOSS_DEVICE void record_bad_label(BadLabelRecord* record, int64_t value, int64_t position, int64_t classes) {
  if (record == nullptr || gpu::compare_and_swap(&record->found, 0, 1) != 0) return;
  record->value = value;
  record->position = position;
  record->classes = classes;
}
#endif

}  // namespace fusedloss::cuda
