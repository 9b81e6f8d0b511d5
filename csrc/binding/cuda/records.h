// The memory of a bad label that every device has: see kernels/cuda/bad_label.h.
#pragma once

#include "binding/tensors.h"
#include "kernels/cuda/bad_label.h"

namespace fusedloss::cuda {

// (4,) int64 on the device of `like`: the record itself. Made at the first call on a device, which waits for it and
// therefore cannot be one that a CUDA graph captures, and kept until the process ends.
Tensor bad_label_record(const Tensor& like);

inline BadLabelRecord* bad_label_memory(const Tensor& like) {
  return static_cast<BadLabelRecord*>(bad_label_record(like).mutable_data_ptr());
}

}  // namespace fusedloss::cuda
