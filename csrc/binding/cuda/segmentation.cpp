// The segmentation ops on CUDA devices: allocation and launches.
#include "binding/segmentation_call.h"

#include <tuple>

#include "binding/cuda/class_numbers.h"
#include "binding/cuda/device.h"
#include "binding/cuda/forward.h"
#include "binding/ops.h"

namespace fusedloss {

using namespace cuda;
namespace {

struct Call : SegmentationCall {
  ClassNumbers class_weights;
  ClassNumbers pos_weights;

  Call(const char* op, const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
       const std::optional<Tensor>& pixel_weight, const std::optional<Tensor>& pos_weight,
       const SegmentationOptions& given)
      : SegmentationCall(op, input, target, pixel_weight, given, /*any_order=*/false),
        class_weights(op, weight, params.classes, compute_type()),
        pos_weights(op, pos_weight, params.classes, compute_type()) {
    params.weight = class_weights.data();
    params.pos_weight = pos_weights.data();
    require(options.classes.empty() || params.classes <= ChosenClasses::kMost, op,
            "classes= on CUDA is for up to 1024 classes");
  }

  ChosenClasses chosen_classes() const {
    ChosenClasses result{};
    result.count = static_cast<int64_t>(chosen.size());
    result.all = options.classes.empty();
    if (result.all) return result;
    for (uint16_t& place : result.place) place = ChosenClasses::kNowhere;
    for (size_t k = 0; k < chosen.size(); ++k) result.place[chosen[k]] = static_cast<uint16_t>(k);
    return result;
  }

  // The kept numbers after those of the pixels, all of the compute type: (3, G, C) derivatives of the value with regard
  // to the table, then (2,) with regard to the sums of cross-entropy and squared error.
  char* table_in(void* statistics) const {
    return static_cast<char*>(statistics) + pixel_statistics() * number_bytes();
  }
  char* scales_in(void* statistics) const {
    return table_in(statistics) + 3 * params.groups * params.classes * number_bytes();
  }
};

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input, const Tensor& target,
                                           const std::optional<Tensor>& weight,
                                           const std::optional<Tensor>& pixel_weight,
                                           const std::optional<Tensor>& pos_weight, const SegmentationOptions& options,
                                           bool keep) {
  constexpr const char* op = "segmentation";
  require_device(op, input, target, weight, pixel_weight, pos_weight);
  const DeviceScope scope(input);
  Call call(op, input, target, weight, pixel_weight, pos_weight, options);
  const ScalarType dtype = call.compute_type();
  Tensor statistics = allocate_like(input, {keep ? call.statistics_size() : 0}, {1}, dtype);
  const std::vector<int64_t> sizes = call.output_sizes();
  Tensor value = allocate_like(input, sizes, contiguous_strides(sizes), call.value_type());
  Tensor terms = allocate_like(input, {3}, {1}, dtype);
  void* kept = writable(statistics, op);
  if (keep) call.point_into(kept);

  ForwardParams params{};
  static_cast<SegmentationParams&>(params) = call.params;
  FinishParams finish{};
  const bool each_pixel = call.output == Output::kEach && params.squared_error;
  if (each_pixel) {
    params.squared_error_of_pixels = writable(value, op);
    if (call.empty()) torch::stable::zero_(value);
  } else {
    finish.value = writable(value, op);
  }
  finish.value_dtype = dtype_of(value, op);
  finish.terms = writable(terms, op);
  finish.divide_by_label_weight = params.activation == Activation::kSoftmax && !params.soft_labels;
  finish.zero_without_pixels = true;
  finish.output = call.output;
  finish.absent = call.absent;
  finish.formula = options.formula;
  finish.factors[0] = options.cross_entropy;
  finish.factors[1] = options.iou;
  finish.factors[2] = options.brier;
  finish.chosen = call.chosen_classes();
  if (keep) {
    finish.table_gradients = params.overlap ? call.table_in(kept) : nullptr;
    finish.scales = call.scales_in(kept);
  }
  run_forward(op, input, params, finish);
  return {value, terms, statistics};
}

}  // namespace

std::tuple<Tensor, Tensor> segmentation(Tensor input, Tensor target, std::optional<Tensor> weight,
                                        std::optional<Tensor> pixel_weight, std::optional<Tensor> pos_weight,
                                        int64_t activation, int64_t ignore_index, int64_t output, double cross_entropy,
                                        double iou, double brier, double alpha, double beta, double label_smoothing,
                                        std::vector<int64_t> classes, bool per_image, int64_t absent, double smooth,
                                        double eps, bool log, double gamma, int64_t intersection) {
  const SegmentationOptions options = FUSEDLOSS_SEGMENTATION_OPTIONS;
  auto result = forward(input, target, weight, pixel_weight, pos_weight, options, false);
  return {std::get<0>(result), std::get<1>(result)};
}

std::tuple<Tensor, Tensor, Tensor> segmentation_forward(Tensor input, Tensor target, std::optional<Tensor> weight,
                                                        std::optional<Tensor> pixel_weight,
                                                        std::optional<Tensor> pos_weight, int64_t activation,
                                                        int64_t ignore_index, int64_t output, double cross_entropy,
                                                        double iou, double brier, double alpha, double beta,
                                                        double label_smoothing, std::vector<int64_t> classes,
                                                        bool per_image, int64_t absent, double smooth, double eps,
                                                        bool log, double gamma, int64_t intersection, bool keep) {
  const SegmentationOptions options = FUSEDLOSS_SEGMENTATION_OPTIONS;
  return forward(input, target, weight, pixel_weight, pos_weight, options, keep);
}

Tensor segmentation_backward(Tensor grad, Tensor input, Tensor target, std::optional<Tensor> weight,
                             std::optional<Tensor> pixel_weight, std::optional<Tensor> pos_weight, Tensor statistics,
                             int64_t activation, int64_t ignore_index, int64_t output, double cross_entropy, double iou,
                             double brier, double alpha, double beta, double label_smoothing,
                             std::vector<int64_t> classes, bool per_image, int64_t absent, double smooth, double eps,
                             bool log, double gamma, int64_t intersection, int64_t operand) {
  constexpr const char* op = "_segmentation_backward";
  const SegmentationOptions options = FUSEDLOSS_SEGMENTATION_OPTIONS;
  require_device(op, grad, input, target, weight, pixel_weight, pos_weight, statistics);
  const DeviceScope scope(input);
  Call call(op, input, target, weight, pixel_weight, pos_weight, options);
  require(operand == 0 || (operand == 1 && call.params.soft_labels && is_floating(call.params.target_dtype)), op,
          "operand must be 0, or 1 with soft labels of a floating dtype");
  require(statistics.dim() == 1 && statistics.numel() == call.statistics_size() &&
              statistics.scalar_type() == call.compute_type() && statistics.is_contiguous(),
          op, "statistics must be those that the forward op keeps");
  require(sizes_of(grad) == call.output_sizes() && grad.scalar_type() == call.value_type(), op,
          "grad must have the shape and dtype of the loss");
  readable(grad, op);
  if (!grad.is_contiguous()) grad = torch::stable::contiguous(grad);
  void* kept = writable(statistics, op);
  call.point_into(kept);

  Tensor gradient = allocate_like(input, call.sizes, dense_strides(call.sizes, strides_of(call.input)),
                                  operand == 0 ? input.scalar_type() : target.scalar_type());
  call.params.gradient = writable(gradient, op);
  call.params.gradient_layout = layout_under(call.view, gradient, op);
  BackwardParams params{};
  static_cast<SegmentationParams&>(params) = call.params;
  params.chunks = segmentation_chunks(params);
  params.output = call.output;
  params.grad = readable(grad, op);
  params.grad_dtype = dtype_of(grad, op);
  params.grad_of_pixels = call.output == Output::kEach && params.squared_error;
  params.table_gradients = params.overlap ? call.table_in(kept) : nullptr;
  params.scales = call.scales_in(kept);
  if (call.output == Output::kSums) {
    params.grad_of_sums[0] = call.place_of_cross_entropy();
    params.grad_of_sums[1] = call.place_of_squared_error();
    params.scales = nullptr;
  }
  params.chosen = call.chosen_classes();
  void* stream = current_stream(input);
  check(operand == 0 ? cuda::segmentation_backward(params, stream) : cuda::segmentation_label_backward(params, stream),
        op);
  return gradient;
}

}  // namespace fusedloss
