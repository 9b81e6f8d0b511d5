// What the cross-entropy ops of all devices do before their kernels: checks, views, dtypes.
#pragma once

#include <optional>
#include <vector>

#include "binding/logits.h"
#include "binding/tensors.h"
#include "kernels/cross_entropy.h"

namespace fusedloss {

// The arguments after the checks, with whatever had to be copied. The weights of the classes are left to the device:
// their numbers may not be there to read. any_order_classes: up to so many classes the device's kernels read soft
// labels in either order.
struct CrossEntropyCall {
  Tensor input;
  Tensor target;
  std::vector<int64_t> target_sizes;
  LogitView view;
  CrossEntropyParams params{};
  Reduction reduction;

  CrossEntropyCall(const char* op, const Tensor& input_argument, const Tensor& target_argument, int64_t ignore_index,
                   int64_t reduction_argument, double label_smoothing, int64_t any_order_classes)
      : input(input_argument), target(target_argument), reduction(reduction_of(reduction_argument, op)) {
    require(input.dim() >= 1, op, "input must have at least one dimension");
    params.input_dtype = dtype_of(input, op);
    params.target_dtype = dtype_of(target, op);
    require(is_floating(params.input_dtype), op, "input must be of a floating dtype");
    require(label_smoothing >= 0.0 && label_smoothing <= 1.0, op, "label_smoothing must be in [0, 1]");
    require(params.target_dtype != DType::kBool, op, "target must be class indices or probabilities");
    readable(input, op);
    readable(target, op);
    require_class_count(op, input);
    input = readable_logits(input);

    const std::vector<int64_t> sizes = sizes_of(input);
    target_sizes = sizes_of(target);
    params.soft_labels = is_floating(params.target_dtype);
    if (params.soft_labels) {
      require(target_sizes == sizes, op, "target probabilities must have input's shape");
      require(ignore_index < 0, op, "ignore_index must be negative with target probabilities");
      require(params.target_dtype == params.input_dtype ||
                  (params.target_dtype == DType::kFloat32 && params.input_dtype >= DType::kFloat16),
              op, "target probabilities must be of input's dtype, or float32 for float16 and bfloat16 input");
      SoftLabelView seen = view_soft_labels(input, target, op, sizes[sizes.size() == 1 ? 0 : 1] <= any_order_classes);
      view = seen.view;
      target = seen.target;
      params.target_layout = seen.target_layout;
    } else {
      std::vector<int64_t> wanted = sizes;
      wanted.erase(wanted.begin() + (sizes.size() == 1 ? 0 : 1));
      require(target_sizes == wanted, op, "target indices must have input's shape without the class dimension");
      if (!target.is_contiguous()) target = torch::stable::contiguous(target);
      view = view_logits(sizes, strides_of(input));
    }

    params.samples = view.samples;
    params.classes = view.classes;
    params.pixels = view.pixels;
    params.input_layout = view.layout;
    params.input = readable(input, op);
    params.target = readable(target, op);
    params.ignore_index = ignore_index;
    params.label_smoothing = label_smoothing;
  }

  bool empty() const { return params.classes == 0 || pixel_count() == 0; }
  bool float64() const { return params.input_dtype == DType::kFloat64; }
  int64_t pixel_count() const { return params.samples * params.pixels; }
  ScalarType compute_type() const { return float64() ? ScalarType::Double : ScalarType::Float; }

  // Statistics: (2 N S + 2) of the compute type: maximum (N S), sum (N S), and the 8 bytes of a double, the divisor
  // of the mean.
  template <class A>
  void point_into(void* statistics) {
    A* data = static_cast<A*>(statistics);
    params.maximum = data;
    params.sum = data + pixel_count();
  }
  void* divisor_in(void* statistics) const {
    return static_cast<char*>(statistics) + 2 * pixel_count() * (float64() ? sizeof(double) : sizeof(float));
  }
  void point_into(void* statistics) { float64() ? point_into<double>(statistics) : point_into<float>(statistics); }
};

// Under autocast a two-byte input gives a float32 loss.
inline DType loss_dtype_of(const CrossEntropyCall& call, bool float32_loss) {
  const CrossEntropyParams& params = call.params;
  if (params.input_dtype == DType::kFloat64 || params.input_dtype == DType::kFloat32) return params.input_dtype;
  // torch promotes probabilities and logits.
  const bool promoted = params.soft_labels && params.target_dtype == DType::kFloat32;
  return float32_loss || promoted ? DType::kFloat32 : params.input_dtype;
}

}  // namespace fusedloss
