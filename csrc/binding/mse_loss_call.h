// What the mse_loss ops of all devices do before their kernels: checks, dtypes, dimensions.
#pragma once

#include <optional>
#include <utility>
#include <vector>

#include "binding/tensors.h"
#include "kernels/mse_loss.h"

namespace fusedloss {

// The arguments after the checks. Every array has the sizes of `input` (functional.py broadcasts, so strides may be 0).
struct MseLossCall {
  Tensor input;
  Tensor target;
  std::optional<Tensor> weight;
  std::vector<int64_t> sizes;
  MseLossParams params{};
  Reduction reduction;
  DType loss_dtype;

  MseLossCall(const char* op, const Tensor& input_argument, const Tensor& target_argument,
              const std::optional<Tensor>& weight_argument, int64_t reduction_argument, bool float32_loss);

  bool weighted_mean() const { return weight.has_value() && reduction == Reduction::kMean; }

  // Checks a tensor and notes its dtype and memory in `array`; set_dimensions() adds the strides.
  void describe(const char* op, const Tensor& tensor, StridedArray& array) const;

  // A tensor of input's sizes in the order of the memory of `like`, on its device.
  Tensor allocate_in_order_of(const Tensor& like, ScalarType dtype) const;

  // Sorts and merges the dimensions of all arrays named. Where more than kMaxDimensions stay, what is read is copied
  // into the order of what is written; then *gradient is the copy.
  void set_dimensions(Tensor* output, Tensor* gradient);

 private:
  bool merge_dimensions(std::vector<std::pair<Tensor*, StridedArray*>>& arrays);
};

}  // namespace fusedloss
