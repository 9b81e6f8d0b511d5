// Numbers of the classes on the device, in the type that the kernels compute in.
#pragma once

#include <optional>

#include "binding/tensors.h"

namespace fusedloss::cuda {

// (C,) of `dtype`, or nothing for ones. Nothing is read here: the conversion is the device's.
class ClassNumbers {
 public:
  ClassNumbers(const char* op, const std::optional<Tensor>& numbers, int64_t classes, ScalarType dtype) {
    if (!numbers.has_value()) return;
    require(is_floating(dtype_of(*numbers, op)), op, "weight must be of a floating dtype");
    require(numbers->dim() == 1 && numbers->numel() == classes, op, "weight must have one number a class");
    readable(*numbers, op);
    kept_ = torch::stable::contiguous(torch::stable::to(*numbers, dtype));
  }
  const void* data() const { return kept_.has_value() ? kept_->const_data_ptr() : nullptr; }

 private:
  std::optional<Tensor> kept_;
};

}  // namespace fusedloss::cuda
