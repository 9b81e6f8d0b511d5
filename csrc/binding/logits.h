// How a tensor of logits lies in memory, as the kernels want to know it.
#pragma once

#include "binding/tensors.h"
#include "kernels/cross_entropy.h"

namespace fusedloss {

// A tensor (C), (N, C) or (N, C, *spatial) as `samples` times `pixels` of `classes`.
struct LogitView {
  int64_t samples;
  int64_t classes;
  int64_t pixels;
  LogitLayout layout;
  bool readable;  // one of the two inner strides is 1; if not, the tensor has to be copied first

  bool class_innermost() const { return layout.pixel_stride != 1; }
  bool same_order(const LogitView& other) const {
    return samples == other.samples && pixels == other.pixels && class_innermost() == other.class_innermost();
  }
};

LogitView view_logits(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides);

// Strides of a dense tensor in the memory order that the kernels will visit `sizes`, `strides` in: the strides
// themselves where they are dense already, else contiguous, channels_last, or transposed rows. _ops.py has the same
// rule.
std::vector<int64_t> dense_strides(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides);

// `tensor`, or a copy of it that is readable.
Tensor readable_logits(const Tensor& tensor);

// `tensor`, or a copy of it in the order that `like` is read in.
Tensor in_order_of(const Tensor& tensor, const Tensor& like);

}  // namespace fusedloss
