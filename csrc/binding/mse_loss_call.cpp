#include "binding/mse_loss_call.h"

#include <algorithm>
#include <numeric>

namespace fusedloss {
namespace {

DType promote(DType a, DType b) {
  if (a == b) return a;
  return a == DType::kFloat64 || b == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

}  // namespace

namespace {

// The strides themselves where they name every place of a block of memory once, else contiguous. _ops.py has the same
// rule.
std::vector<int64_t> dense_strides(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  std::vector<size_t> order(sizes.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return strides[a] < strides[b]; });
  int64_t expected = 1;
  for (size_t d : order) {
    if (sizes[d] == 1) continue;
    if (strides[d] != expected) return contiguous_strides(sizes);
    expected *= sizes[d];
  }
  return strides;
}

}  // namespace

MseLossCall::MseLossCall(const char* op, const Tensor& input_argument, const Tensor& target_argument,
                         const std::optional<Tensor>& weight_argument, int64_t reduction_argument, bool float32_loss)
    : input(input_argument),
      target(target_argument),
      weight(weight_argument),
      sizes(sizes_of(input)),
      reduction(reduction_of(reduction_argument, op)) {
  describe(op, input, params.input);
  describe(op, target, params.target);
  loss_dtype = promote(params.input.dtype, params.target.dtype);
  if (weight.has_value()) {
    describe(op, *weight, params.weight);
    loss_dtype = promote(loss_dtype, params.weight.dtype);
  }
  params.float64 = loss_dtype == DType::kFloat64;
  if (float32_loss && !params.float64) loss_dtype = DType::kFloat32;
  params.elements = input.numel();
}

void MseLossCall::describe(const char* op, const Tensor& tensor, StridedArray& array) const {
  require(sizes_of(tensor) == sizes, op, "input, target, weight and grad must have the same shape");
  array.dtype = dtype_of(tensor, op);
  require(is_floating(array.dtype), op, "input, target, weight and grad must be of floating dtypes");
  array.data = readable(tensor, op);
}

Tensor MseLossCall::allocate_in_order_of(const Tensor& like, ScalarType dtype) const {
  return allocate_like(like, sizes, dense_strides(sizes, strides_of(like)), dtype);
}

void MseLossCall::set_dimensions(Tensor* output, Tensor* gradient) {
  std::vector<std::pair<Tensor*, StridedArray*>> arrays{{&input, &params.input}, {&target, &params.target}};
  if (weight.has_value()) arrays.push_back({&*weight, &params.weight});
  if (output != nullptr) arrays.push_back({output, &params.output});
  if (gradient != nullptr) arrays.push_back({gradient, &params.element_gradient});
  if (!merge_dimensions(arrays)) {
    for (auto& [tensor, array] : arrays) {
      if (tensor == output) continue;
      Tensor copy = allocate_like(*tensor, sizes, output != nullptr ? strides_of(*output) : contiguous_strides(sizes),
                                  tensor->scalar_type());
      torch::stable::copy_(copy, *tensor);
      *tensor = copy;
      array->data = copy.const_data_ptr();
    }
    require(merge_dimensions(arrays), "mse_loss", "input has too many dimensions that cannot be merged");
  }
}

bool MseLossCall::merge_dimensions(std::vector<std::pair<Tensor*, StridedArray*>>& arrays) {
  std::vector<std::vector<int64_t>> strides;
  for (auto& [tensor, array] : arrays) strides.push_back(strides_of(*tensor));

  std::vector<size_t> order;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] != 1) order.push_back(d);
  }
  // Outermost first: the largest stride of the first array that tells two dimensions apart.
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    for (const auto& s : strides) {
      if (s[a] != 0 && s[b] != 0 && s[a] != s[b]) return s[a] > s[b];
    }
    return false;
  });

  int dimensions = 0;
  for (size_t d : order) {
    bool merge = dimensions > 0;
    for (size_t k = 0; k < arrays.size() && merge; ++k) {
      merge = arrays[k].second->strides[dimensions - 1] == strides[k][d] * sizes[d];
    }
    if (merge) {
      params.sizes[dimensions - 1] *= sizes[d];
    } else {
      if (dimensions == kMaxDimensions) return false;
      params.sizes[dimensions++] = sizes[d];
    }
    for (size_t k = 0; k < arrays.size(); ++k) arrays[k].second->strides[dimensions - 1] = strides[k][d];
  }
  if (dimensions == 0) {
    dimensions = 1;
    params.sizes[0] = 1;
    for (auto& [tensor, array] : arrays) array->strides[0] = 1;
  }
  params.dimensions = dimensions;
  return true;
}

}  // namespace fusedloss
