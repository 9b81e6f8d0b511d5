// How a tensor of logits lies in memory, as the kernels want to know it.
#pragma once

#include "binding/tensors.h"
#include "kernels/cross_entropy.h"

namespace fusedloss {

// A tensor (C), (N, C) or (N, C, *spatial) as `samples` times `pixels` of `classes`.
struct LogitView {
  // Which dimensions were made one, so that another tensor of the same sizes can be seen the same way.
  enum class Fold {
    kSpatial,  // pixels are the spatial dimensions
    kRows,     // one pixel a sample: samples are the pixels
    kAll,      // classes innermost and samples follow each other like pixels (channels_last): one run of both
  };

  int64_t samples;
  int64_t classes;
  int64_t pixels;
  LogitLayout layout;
  Fold fold;
  bool readable;  // one of the two inner strides is 1; if not, the tensor has to be copied first

  bool class_innermost() const { return layout.pixel_stride != 1; }
};

// Classes are numbered in 32 bits, and loops run a vector or a block past the last. To be asked before anything is
// copied: so many classes may be one number, expanded.
void require_class_count(const char* op, const Tensor& input);

// keep_samples: samples stay samples, whatever the memory allows.
LogitView view_logits(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                      bool keep_samples = false);

// The layout of another tensor of the same sizes under the folding and in the order of `view`. Throws where it lies in
// another.
LogitLayout layout_under(const LogitView& view, const Tensor& tensor, const char* op);

// Logits and soft labels of the same shape, seen the same way.
struct SoftLabelView {
  LogitView view;
  Tensor target;  // the given one where it can be seen so, or a copy in the order of the logits
  LogitLayout target_layout;
};

// any_order: the labels may be class-innermost beside class-strided logits, and the other way round.
SoftLabelView view_soft_labels(const Tensor& input, const Tensor& target, const char* op, bool any_order,
                               bool keep_samples = false);

// Strides of a dense tensor in the memory order that the kernels visit `sizes`, `strides` in: contiguous,
// channels_last, or transposed rows; contiguous also where the kernels visit a contiguous copy. _ops.py has the same
// rule.
std::vector<int64_t> dense_strides(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides);

// The sizes without the class dimension.
std::vector<int64_t> pixel_sizes(const Tensor& input);

// The weights of the classes in the type that the kernels compute in; none for ones.
struct ClassWeights {
  std::vector<double> float64;  // (C,), or empty
  std::vector<float> float32;   // (C,), or empty; where the kernels compute in float32

  ClassWeights() = default;
  ClassWeights(const char* op, const std::optional<Tensor>& weight, int64_t classes, bool compute_float64);
  const void* data() const;
  double operator[](int64_t c) const { return float64.empty() ? 1.0 : float64[c]; }
  double sum(int64_t classes) const;
};

// `tensor`, or a copy of it that is readable.
Tensor readable_logits(const Tensor& tensor);

}  // namespace fusedloss
