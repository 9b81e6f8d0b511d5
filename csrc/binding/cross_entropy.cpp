// The cross-entropy ops on the CPU: checks, allocation, chunks, and the last sum.
#include "kernels/cross_entropy.h"

#include <cstring>
#include <limits>
#include <tuple>

#include "binding/cross_entropy_call.h"
#include "binding/logits.h"
#include "binding/ops.h"
#include "kernels/cpu/dispatch.h"

namespace fusedloss {
namespace {

// With what is read on the host alone: the weights of the classes.
struct Call : CrossEntropyCall {
  ClassWeights class_weights;
  int64_t chunks;

  Call(const char* op, const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
       int64_t ignore_index, int64_t reduction, double label_smoothing)
      : CrossEntropyCall(op, input, target, ignore_index, reduction, label_smoothing, kCrossEntropyTileClasses),
        class_weights(op, weight, params.classes, float64()) {
    params.weight = class_weights.data();
    params.weight_sum = class_weights.sum(params.classes);
    chunks = empty() ? 0 : params.samples * cross_entropy_chunks_per_sample(params.classes, params.pixels);
  }
};

[[noreturn]] void throw_bad_label(const Call& call, int64_t flat) {
  throw std::out_of_range("cross_entropy: target at " + position_text(flat, call.target_sizes) + " must be in [0, " +
                          std::to_string(call.params.classes) + ") or ignore_index (" +
                          std::to_string(call.params.ignore_index) + "), got " +
                          std::to_string(integer_at(call.params.target, call.params.target_dtype, flat)));
}

// Without classes no label is one, and no kernel runs that would say so.
void check_no_label(const Call& call) {
  for (int64_t i = 0; i < call.pixel_count(); ++i) {
    if (integer_at(call.params.target, call.params.target_dtype, i) != call.params.ignore_index) {
      throw_bad_label(call, i);
    }
  }
}

// Sums the partials in the order of their index. Throws for the first bad label.
CrossEntropyPartial total_of(const Call& call, const std::vector<CrossEntropyPartial>& partials) {
  CrossEntropyPartial total{0.0, 0.0, -1};
  for (const CrossEntropyPartial& partial : partials) {
    if (partial.bad_label >= 0) throw_bad_label(call, partial.bad_label);
    total.loss += partial.loss;
    total.weight += partial.weight;
  }
  return total;
}

// The divisor of the mean, before any logit is read.
double divisor_of(const Call& call) {
  if (call.params.soft_labels) return static_cast<double>(call.pixel_count());
  std::vector<CrossEntropyPartial> partials(call.chunks);
  const cpu::KernelTable& kernels = cpu::kernels();
  for_chunks(call.chunks, [&](int64_t begin, int64_t end) {
    kernels.cross_entropy_label_weights(call.params, begin, end, partials.data());
  });
  return total_of(call, partials).weight;
}

// Runs the forward kernel; with params.gradient set it writes the gradient for the incoming gradient `grad` too.
CrossEntropyPartial run_forward(Call& call, double grad) {
  CrossEntropyParams& params = call.params;
  if (params.classes == 0 && !params.soft_labels) check_no_label(call);
  if (params.gradient != nullptr) {
    params.gradient_scale = call.reduction == Reduction::kMean ? grad / divisor_of(call) : grad;
  }
  std::vector<CrossEntropyPartial> partials(call.chunks);
  const cpu::KernelTable& kernels = cpu::kernels();
  const int64_t scratch_bytes = kernels.cross_entropy_scratch_bytes(params);
  for_chunks(call.chunks, [&](int64_t begin, int64_t end) {
    const Scratch scratch(scratch_bytes);
    kernels.cross_entropy_forward(params, begin, end, scratch.data(), partials.data());
  });
  CrossEntropyPartial total = total_of(call, partials);
  if (params.soft_labels) total.weight = static_cast<double>(params.classes > 0 ? call.pixel_count() : 0);
  return total;
}

void point_to_gradient(Call& call, const char* op, const Tensor& gradient) {
  const std::vector<int64_t> sizes = sizes_of(call.input);
  require(sizes_of(gradient) == sizes && gradient.scalar_type() == call.input.scalar_type(), op,
          "gradient must be of input's shape and dtype");
  call.params.gradient_layout = layout_under(call.view, gradient, op);
  call.params.gradient = writable(gradient, op);
}

}  // namespace

std::tuple<Tensor, Tensor> cross_entropy_forward(Tensor input, Tensor target, std::optional<Tensor> weight,
                                                 int64_t ignore_index, int64_t reduction, double label_smoothing,
                                                 bool float32_loss, int64_t keep_argument) {
  constexpr const char* op = "cross_entropy";
  Call call(op, input, target, weight, ignore_index, reduction, label_smoothing);
  const Keep keep = keep_of(keep_argument, op);
  CrossEntropyParams& params = call.params;
  params.loss_dtype = loss_dtype_of(call, float32_loss);
  const int64_t pixels = call.pixel_count();

  Tensor loss;
  if (call.reduction == Reduction::kNone) {
    const std::vector<int64_t> sizes = pixel_sizes(input);
    loss = allocate(sizes, contiguous_strides(sizes), scalar_type(params.loss_dtype));
    params.loss = loss.mutable_data_ptr();
  }
  Tensor kept;
  if (keep == Keep::kGradient) {
    require(call.reduction != Reduction::kNone, op, "a gradient can be kept of a mean or a sum only");
    const std::vector<int64_t> sizes = sizes_of(input);
    kept = allocate(sizes, dense_strides(sizes, strides_of(call.input)), input.scalar_type());
    point_to_gradient(call, op, kept);
  } else {
    kept = allocate({keep == Keep::kStatistics ? 2 * pixels + 2 : 0}, {1}, call.compute_type());
    if (keep == Keep::kStatistics) call.point_into(kept.mutable_data_ptr());
  }

  const CrossEntropyPartial total = run_forward(call, 1.0);
  if (keep == Keep::kStatistics) {
    std::memcpy(call.divisor_in(kept.mutable_data_ptr()), &total.weight, sizeof(double));
  }
  if (call.reduction != Reduction::kNone) {
    loss = scalar_tensor(call.reduction == Reduction::kMean ? total.loss / total.weight : total.loss,
                         scalar_type(params.loss_dtype));
  } else if (call.chunks == 0 && loss.numel() > 0) {
    torch::stable::zero_(loss);  // pixels of no class
  }
  return {loss, kept};
}

void cross_entropy_rescale(Tensor gradient, Tensor grad, Tensor input, Tensor target, std::optional<Tensor> weight,
                           int64_t ignore_index, int64_t reduction, double label_smoothing) {
  constexpr const char* op = "_cross_entropy_rescale_";
  require(grad.numel() == 1, op, "grad must be one number");
  const double g = first_element(grad, op);
  if (g == 1.0) return;
  // From the logits again, not by a product with what is there: that would round twice, and what a float16 gradient has
  // lost below its smallest number no loss scale brings back.
  Call call(op, input, target, weight, ignore_index, reduction, label_smoothing);
  require(call.reduction != Reduction::kNone, op, "reduction must be a mean or a sum");
  point_to_gradient(call, op, gradient);
  run_forward(call, g);
}

Tensor cross_entropy(Tensor input, Tensor target, std::optional<Tensor> weight, int64_t ignore_index, int64_t reduction,
                     double label_smoothing, bool float32_loss) {
  return std::get<0>(cross_entropy_forward(std::move(input), std::move(target), std::move(weight), ignore_index,
                                           reduction, label_smoothing, float32_loss, 0));
}

Tensor cross_entropy_backward(Tensor grad, Tensor input, Tensor target, std::optional<Tensor> weight, Tensor statistics,
                              int64_t ignore_index, int64_t reduction, double label_smoothing, int64_t operand) {
  constexpr const char* op = "_cross_entropy_backward";
  Call call(op, input, target, weight, ignore_index, reduction, label_smoothing);
  CrossEntropyParams& params = call.params;
  const int64_t pixels = call.pixel_count();
  require(operand == 0 || (operand == 1 && params.soft_labels), op,
          "operand must be 0, or 1 with target probabilities");
  require(statistics.dim() == 1 && statistics.numel() == 2 * pixels + 2 &&
              statistics.scalar_type() == call.compute_type() && statistics.is_contiguous(),
          op, "statistics must be those that the forward op keeps");
  call.point_into(const_cast<void*>(readable(statistics, op)));

  params.loss_dtype = dtype_of(grad, op);
  params.gradient_scale = 1.0;
  if (call.reduction == Reduction::kNone) {
    require(sizes_of(grad) == pixel_sizes(input), op, "grad must have the loss's shape");
    if (is_one_element(grad)) {
      params.gradient_scale = first_element(grad, op);
    } else {
      if (!grad.is_contiguous()) grad = torch::stable::contiguous(grad);
      require(is_floating(params.loss_dtype), op, "grad must be of a floating dtype");
      params.pixel_gradient = readable(grad, op);
    }
  } else {
    require(grad.numel() == 1, op, "grad must be one number");
    params.gradient_scale = first_element(grad, op);
    if (call.reduction == Reduction::kMean) {
      double divisor;
      std::memcpy(&divisor, call.divisor_in(const_cast<void*>(statistics.const_data_ptr())), sizeof(double));
      params.gradient_scale /= divisor;
    }
  }

  const std::vector<int64_t> sizes = sizes_of(input);
  Tensor gradient = allocate(sizes, dense_strides(sizes, strides_of(call.input)),
                             scalar_type(operand == 0 ? params.input_dtype : params.target_dtype));
  params.gradient = gradient.mutable_data_ptr();
  params.gradient_layout = layout_under(call.view, gradient, op);
  const cpu::KernelTable& kernels = cpu::kernels();
  const int64_t scratch_bytes = kernels.cross_entropy_scratch_bytes(params);
  for_chunks(call.chunks, [&](int64_t begin, int64_t end) {
    if (operand == 1) return kernels.cross_entropy_label_backward(params, begin, end);
    const Scratch scratch(scratch_bytes);
    kernels.cross_entropy_backward(params, begin, end, scratch.data());
  });
  return gradient;
}

}  // namespace fusedloss
