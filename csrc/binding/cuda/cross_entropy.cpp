// The cross-entropy ops on CUDA devices: one setting of the segmentation kernels. They read the logits once forward and
// once backward, which is what cross-entropy alone needs too.
#include "binding/cross_entropy_call.h"

#include <tuple>

#include "binding/cuda/class_numbers.h"
#include "binding/cuda/device.h"
#include "binding/cuda/forward.h"
#include "binding/ops.h"

namespace fusedloss {

using namespace cuda;
namespace {

struct Call : CrossEntropyCall {
  ClassNumbers class_weights;

  Call(const char* op, const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
       int64_t ignore_index, int64_t reduction, double label_smoothing)
      : CrossEntropyCall(op, input, target, ignore_index, reduction, label_smoothing, /*any_order_classes=*/0),
        class_weights(op, weight, params.classes, compute_type()) {
    params.weight = class_weights.data();
  }

  SegmentationParams as_segmentation() const {
    SegmentationParams result{};
    result.samples = params.samples;
    result.classes = params.classes;
    result.pixels = params.pixels;
    result.groups = 1;
    result.image_pixels = params.pixels;
    result.activation = Activation::kSoftmax;
    result.cross_entropy = true;
    result.input = params.input;
    result.input_layout = params.input_layout;
    result.input_dtype = params.input_dtype;
    result.target = params.target;
    result.target_layout = params.target_layout;
    result.target_dtype = params.target_dtype;
    result.soft_labels = params.soft_labels;
    result.ignore_index = params.ignore_index;
    result.weight = params.weight;
    result.label_smoothing = params.label_smoothing;
    result.maximum = params.maximum;
    result.sum = params.sum;
    return result;
  }

  Output output() const {
    return reduction == Reduction::kNone ? Output::kEach : reduction == Reduction::kMean ? Output::kMean : Output::kSum;
  }
};

}  // namespace

std::tuple<Tensor, Tensor> cross_entropy_forward(Tensor input, Tensor target, std::optional<Tensor> weight,
                                                 int64_t ignore_index, int64_t reduction, double label_smoothing,
                                                 bool float32_loss, int64_t keep_argument) {
  constexpr const char* op = "cross_entropy";
  require_device(op, input, target, weight);
  const DeviceScope scope(input);
  Call call(op, input, target, weight, ignore_index, reduction, label_smoothing);
  const Keep keep = keep_of(keep_argument, op);
  require(keep != Keep::kGradient, op, "a gradient is kept in the forward on the CPU only");
  const DType loss_dtype = loss_dtype_of(call, float32_loss);
  const bool none = call.reduction == Reduction::kNone;
  const std::vector<int64_t> sizes = none ? pixel_sizes(input) : std::vector<int64_t>{};
  Tensor loss = allocate_like(input, sizes, contiguous_strides(sizes), scalar_type(loss_dtype));
  Tensor kept =
      allocate_like(input, {keep == Keep::kStatistics ? 2 * call.pixel_count() + 2 : 0}, {1}, call.compute_type());
  if (keep == Keep::kStatistics) call.point_into(writable(kept, op));

  ForwardParams params{};
  static_cast<SegmentationParams&>(params) = call.as_segmentation();
  FinishParams finish{};
  if (none) {
    params.cross_entropy_of_pixels = writable(loss, op);
    params.cross_entropy_dtype = loss_dtype;
    if (call.empty() && loss.numel() > 0) torch::stable::zero_(loss);  // pixels of no class
  } else {
    finish.value = writable(loss, op);
  }
  finish.value_dtype = loss_dtype;
  finish.divide_by_label_weight = !params.soft_labels;
  finish.zero_without_pixels = false;
  finish.output = call.output();
  finish.formula = {1.0, 1.0, 0.0, 1e-7, 1.0, false};
  finish.factors[0] = 1.0;
  finish.chosen.all = true;
  // (2,) of the compute type, of which the second is not used.
  if (keep == Keep::kStatistics) finish.scales = call.divisor_in(writable(kept, op));
  run_forward(op, input, params, finish);
  return {loss, kept};
}

Tensor cross_entropy(Tensor input, Tensor target, std::optional<Tensor> weight, int64_t ignore_index, int64_t reduction,
                     double label_smoothing, bool float32_loss) {
  return std::get<0>(cross_entropy_forward(std::move(input), std::move(target), std::move(weight), ignore_index,
                                           reduction, label_smoothing, float32_loss,
                                           static_cast<int64_t>(Keep::kNothing)));
}

Tensor cross_entropy_backward(Tensor grad, Tensor input, Tensor target, std::optional<Tensor> weight, Tensor statistics,
                              int64_t ignore_index, int64_t reduction, double label_smoothing, int64_t operand) {
  constexpr const char* op = "_cross_entropy_backward";
  require_device(op, grad, input, target, weight, statistics);
  const DeviceScope scope(input);
  Call call(op, input, target, weight, ignore_index, reduction, label_smoothing);
  require(operand == 0 || (operand == 1 && call.params.soft_labels), op,
          "operand must be 0, or 1 with target probabilities");
  require(statistics.dim() == 1 && statistics.numel() == 2 * call.pixel_count() + 2 &&
              statistics.scalar_type() == call.compute_type() && statistics.is_contiguous(),
          op, "statistics must be those that the forward op keeps");
  void* kept = writable(statistics, op);
  call.point_into(kept);
  const bool none = call.reduction == Reduction::kNone;
  require(none ? sizes_of(grad) == pixel_sizes(input) : grad.numel() == 1, op, "grad must have the loss's shape");
  require(is_floating(dtype_of(grad, op)), op, "grad must be of a floating dtype");
  readable(grad, op);
  if (!grad.is_contiguous()) grad = torch::stable::contiguous(grad);

  const std::vector<int64_t> sizes = sizes_of(input);
  Tensor gradient = allocate_like(input, sizes, dense_strides(sizes, strides_of(call.input)),
                                  operand == 0 ? input.scalar_type() : target.scalar_type());
  BackwardParams params{};
  static_cast<SegmentationParams&>(params) = call.as_segmentation();
  params.gradient = writable(gradient, op);
  params.gradient_layout = layout_under(call.view, gradient, op);
  params.chunks = segmentation_chunks(params);
  params.output = call.output();
  params.grad = readable(grad, op);
  params.grad_dtype = dtype_of(grad, op);
  params.grad_of_pixels = none;
  params.scales = call.divisor_in(kept);
  params.chosen.all = true;
  void* stream = current_stream(input);
  check(operand == 0 ? cuda::segmentation_backward(params, stream) : cuda::segmentation_label_backward(params, stream),
        op);
  return gradient;
}

}  // namespace fusedloss
