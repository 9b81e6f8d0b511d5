// The mse_loss ops on the CPU: checks, allocation, dimensions, chunks, and the last sum.
#include "kernels/mse_loss.h"

#include <algorithm>
#include <numeric>
#include <tuple>

#include "binding/ops.h"
#include "binding/tensors.h"
#include "kernels/cpu/dispatch.h"

namespace fusedloss {
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

// The arguments after the checks. Every array has the sizes of `input` (functional.py broadcasts, so strides may be 0).
struct Call {
  Tensor input;
  Tensor target;
  std::optional<Tensor> weight;
  std::vector<int64_t> sizes;
  MseLossParams params{};
  Reduction reduction;
  DType loss_dtype;
  int64_t chunks;

  Call(const char* op, const Tensor& input_argument, const Tensor& target_argument,
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
    chunks = mse_loss_chunks(params.elements);
  }

  bool weighted_mean() const { return weight.has_value() && reduction == Reduction::kMean; }

  void describe(const char* op, const Tensor& tensor, StridedArray& array) const {
    require(sizes_of(tensor) == sizes, op, "input, target, weight and grad must have the same shape");
    array.dtype = dtype_of(tensor, op);
    require(is_floating(array.dtype), op, "input, target, weight and grad must be of floating dtypes");
    array.data = readable(tensor, op);
  }

  // Sorts and merges the dimensions of all arrays named. Where more than kMaxDimensions stay, what is read is copied
  // into the order of what is written.
  void set_dimensions(Tensor* output, Tensor* gradient) {
    std::vector<std::pair<Tensor*, StridedArray*>> arrays{{&input, &params.input}, {&target, &params.target}};
    if (weight.has_value()) arrays.push_back({&*weight, &params.weight});
    if (output != nullptr) arrays.push_back({output, &params.output});
    if (gradient != nullptr) arrays.push_back({gradient, &params.element_gradient});
    if (!merge_dimensions(arrays)) {
      for (auto& [tensor, array] : arrays) {
        if (tensor == output) continue;
        Tensor copy =
            allocate(sizes, output != nullptr ? strides_of(*output) : contiguous_strides(sizes), tensor->scalar_type());
        torch::stable::copy_(copy, *tensor);
        *tensor = copy;
        array->data = copy.const_data_ptr();
      }
      require(merge_dimensions(arrays), "mse_loss", "input has too many dimensions that cannot be merged");
    }
  }

 private:
  static DType promote(DType a, DType b) {
    if (a == b) return a;
    return a == DType::kFloat64 || b == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  }

  bool merge_dimensions(std::vector<std::pair<Tensor*, StridedArray*>>& arrays) {
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
};

}  // namespace

std::tuple<Tensor, Tensor> mse_loss_forward(Tensor input, Tensor target, std::optional<Tensor> weight,
                                            int64_t reduction, bool float32_loss, int64_t keep_argument) {
  constexpr const char* op = "mse_loss";
  Call call(op, input, target, weight, reduction, float32_loss);
  const Keep keep = keep_of(keep_argument, op);
  MseLossParams& params = call.params;

  Tensor loss;
  Tensor kept;
  Tensor* output = nullptr;
  if (call.reduction == Reduction::kNone) {
    loss = allocate(call.sizes, dense_strides(call.sizes, strides_of(input)), scalar_type(call.loss_dtype));
    call.describe(op, loss, params.output);
    output = &loss;
  }
  if (keep == Keep::kGradient) {
    require(call.reduction != Reduction::kNone && !weight.has_value(), op,
            "a gradient can be kept of a mean or a sum without weights only");
    kept = allocate(call.sizes, dense_strides(call.sizes, strides_of(input)), input.scalar_type());
    call.describe(op, kept, params.output);
    params.gradient_scale = call.reduction == Reduction::kMean ? 1.0 / static_cast<double>(params.elements) : 1.0;
    output = &kept;
  }
  call.set_dimensions(output, nullptr);

  std::vector<MseLossPartial> partials(call.chunks);
  const cpu::KernelTable& kernels = cpu::kernels();
  for_chunks(call.chunks, [&](int64_t begin, int64_t end) {
    (keep == Keep::kGradient ? kernels.mse_loss_forward_and_gradient : kernels.mse_loss_forward)(params, begin, end,
                                                                                                 partials.data());
  });
  double sum = 0.0;
  double divisor = 0.0;
  for (const MseLossPartial& partial : partials) {
    sum += partial.loss;
    divisor += partial.weight;
  }
  if (!weight.has_value()) divisor = static_cast<double>(params.elements);

  if (keep != Keep::kGradient) {
    // (2,) divisor and mean for the backward of a weighted mean, else (0,): nothing that the sizes do not tell.
    const bool save = keep == Keep::kStatistics && call.weighted_mean();
    kept = allocate({save ? 2 : 0}, {1}, ScalarType::Double);
    if (save) {
      double* saved = static_cast<double*>(kept.mutable_data_ptr());
      saved[0] = divisor;
      saved[1] = sum / divisor;
    }
  }
  if (call.reduction != Reduction::kNone) {
    loss = scalar_tensor(call.reduction == Reduction::kMean ? sum / divisor : sum, scalar_type(call.loss_dtype));
  }
  return {loss, kept};
}

void mse_loss_rescale(Tensor gradient, Tensor grad, Tensor input, Tensor target, std::optional<Tensor> weight,
                      int64_t reduction) {
  constexpr const char* op = "_mse_loss_rescale_";
  require(grad.numel() == 1, op, "grad must be one number");
  const double g = first_element(grad, op);
  if (g == 1.0) return;
  // From the operands again, so that the result is rounded once.
  Call call(op, input, target, weight, reduction, false);
  MseLossParams& params = call.params;
  require(call.reduction != Reduction::kNone && !weight.has_value(), op,
          "reduction must be a mean or a sum, unweighted");
  require(gradient.scalar_type() == input.scalar_type(), op, "gradient must be of input's dtype");
  call.describe(op, gradient, params.output);
  params.wanted = MseLossParams::Wanted::kInput;
  params.gradient_scale = call.reduction == Reduction::kMean ? g / static_cast<double>(params.elements) : g;
  call.set_dimensions(&gradient, nullptr);
  const cpu::KernelTable& kernels = cpu::kernels();
  for_chunks(call.chunks, [&](int64_t begin, int64_t end) { kernels.mse_loss_backward(params, begin, end); });
}

Tensor mse_loss(Tensor input, Tensor target, std::optional<Tensor> weight, int64_t reduction, bool float32_loss) {
  return std::get<0>(
      mse_loss_forward(std::move(input), std::move(target), std::move(weight), reduction, float32_loss, 0));
}

Tensor mse_loss_backward(Tensor grad, Tensor input, Tensor target, std::optional<Tensor> weight, Tensor statistics,
                         int64_t reduction, int64_t operand) {
  constexpr const char* op = "_mse_loss_backward";
  Call call(op, input, target, weight, reduction, false);
  MseLossParams& params = call.params;
  require(operand == 0 || operand == 1 || (operand == 2 && weight.has_value()), op,
          "operand must be 0, 1, or 2 with a weight");
  params.wanted = static_cast<MseLossParams::Wanted>(operand);

  params.gradient_scale = 1.0;
  const bool each = call.reduction == Reduction::kNone && !is_one_element(grad);
  if (each) {
    call.describe(op, grad, params.element_gradient);
  } else if (params.elements > 0) {
    require(call.reduction == Reduction::kNone ? sizes_of(grad) == call.sizes : grad.numel() == 1, op,
            "grad must have the loss's shape");
    params.gradient_scale = first_element(grad, op);
  }
  if (call.weighted_mean()) {
    require(statistics.numel() == 2 && statistics.scalar_type() == ScalarType::Double && statistics.is_contiguous(), op,
            "statistics must be those of the forward op");
    const double* saved = static_cast<const double*>(readable(statistics, op));
    params.gradient_scale /= saved[0];
    params.weighted_mean = operand == 2 ? saved[1] : 0.0;
  } else if (call.reduction == Reduction::kMean) {
    params.gradient_scale /= static_cast<double>(params.elements);
  }

  const Tensor& wanted = operand == 0 ? input : operand == 1 ? target : *weight;
  Tensor gradient = allocate(call.sizes, dense_strides(call.sizes, strides_of(wanted)), wanted.scalar_type());
  call.describe(op, gradient, params.output);
  call.set_dimensions(&gradient, each ? &grad : nullptr);
  const cpu::KernelTable& kernels = cpu::kernels();
  for_chunks(call.chunks, [&](int64_t begin, int64_t end) { kernels.mse_loss_backward(params, begin, end); });
  return gradient;
}

}  // namespace fusedloss
