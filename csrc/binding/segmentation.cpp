// The segmentation ops on the CPU: checks, allocation, chunks, and the formula on the table of the classes.
#include "kernels/segmentation.h"

#include <cmath>
#include <cstring>
#include <tuple>

#include "binding/logits.h"
#include "binding/ops.h"
#include "binding/segmentation_call.h"
#include "kernels/cpu/dispatch.h"
#include "math/overlap.h"

namespace fusedloss {
namespace {

// The sums of the forward. In a tensor: (3 G C + G + 3) doubles in the order of the fields.
struct Table {
  int64_t groups;
  int64_t classes;
  std::vector<double> numbers;

  Table(int64_t groups, int64_t classes)
      : groups(groups), classes(classes), numbers(static_cast<size_t>(size(groups, classes)), 0.0) {}

  static int64_t size(int64_t groups, int64_t classes) { return 3 * groups * classes + groups + 3; }

  // Statistic k (0 I, 1 P, 2 T) of a class in a group.
  double& statistic(int k, int64_t g, int64_t c) { return numbers[(k * groups + g) * classes + c]; }
  double statistic(int k, int64_t g, int64_t c) const { return numbers[(k * groups + g) * classes + c]; }
  double& pixel_weight(int64_t g) { return numbers[3 * groups * classes + g]; }
  double pixel_weight(int64_t g) const { return numbers[3 * groups * classes + g]; }
  double& cross_entropy() { return numbers[numbers.size() - 3]; }
  double& label_weight() { return numbers[numbers.size() - 2]; }
  double& squared_error() { return numbers[numbers.size() - 1]; }
  double cross_entropy() const { return numbers[numbers.size() - 3]; }
  double label_weight() const { return numbers[numbers.size() - 2]; }
  double squared_error() const { return numbers[numbers.size() - 1]; }

  double all_pixel_weights() const {
    double sum = 0.0;
    for (int64_t g = 0; g < groups; ++g) sum += pixel_weight(g);
    return sum;
  }
};

double divide(double numerator, double denominator) { return denominator == 0.0 ? 0.0 : numerator / denominator; }

// With what is read on the host alone: the weights of the classes, and the table.
struct Call : SegmentationCall {
  ClassWeights class_weights;
  ClassWeights pos_weights;
  int64_t chunks;

  Call(const char* op, const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
       const std::optional<Tensor>& pixel_weight, const std::optional<Tensor>& pos_weight,
       const SegmentationOptions& given)
      : SegmentationCall(op, input, target, pixel_weight, given, /*any_order=*/true),
        class_weights(op, weight, params.classes, float64()),
        pos_weights(op, pos_weight, params.classes, float64()) {
    params.weight = class_weights.data();
    params.weight_sum = class_weights.sum(params.classes);
    params.pos_weight = pos_weights.data();
    chunks =
        empty() ? 0 : params.samples * segmentation_chunks_per_sample(params.classes, params.samples, params.pixels);
  }

  // Of float32 a number of the table is the sum of two: a double's bytes would be a NaN now and then, for whoever
  // looks.
  void keep(const Table& table, void* statistics) const {
    char* at = static_cast<char*>(statistics) + pixel_statistics() * number_bytes();
    for (double number : table.numbers) {
      if (float64()) {
        std::memcpy(at, &number, sizeof(double));
      } else {
        const float high = static_cast<float>(number);
        const float rest = static_cast<float>(number - static_cast<double>(high));
        const float parts[2] = {high, rest - rest == 0.0F ? rest : 0.0F};
        std::memcpy(at, parts, sizeof(parts));
      }
      at += sizeof(double);
    }
  }
  Table kept(const void* statistics) const {
    Table table(params.groups, params.classes);
    const char* at = static_cast<const char*>(statistics) + pixel_statistics() * number_bytes();
    for (double& number : table.numbers) {
      if (float64()) {
        std::memcpy(&number, at, sizeof(double));
      } else {
        float parts[2];
        std::memcpy(parts, at, sizeof(parts));
        number = static_cast<double>(parts[0]) + static_cast<double>(parts[1]);
      }
      at += sizeof(double);
    }
    return table;
  }
  double cross_entropy_divisor(const Table& table) const {
    const bool by_label = params.activation == Activation::kSoftmax && !params.soft_labels;
    return by_label ? table.label_weight() : table.all_pixel_weights();
  }

  bool counts(const Table& table, int64_t g, int64_t c) const {
    return table.pixel_weight(g) != 0.0 && (absent != Absent::kSkip || table.statistic(2, g, c) != 0.0);
  }

  math::OverlapLoss overlap_of(const Table& table, int64_t g, int64_t c) const {
    if (absent == Absent::kZero && table.statistic(2, g, c) == 0.0) return {0.0, 0.0, 0.0, 0.0};
    return math::overlap_loss(options.formula, table.statistic(0, g, c), table.statistic(1, g, c),
                              table.statistic(2, g, c));
  }

  // Calls f(g, k, share): what a counting class's loss is multiplied by in the overlap term. k counts the chosen.
  template <class F>
  void for_counting(const Table& table, F f) const {
    int64_t counting_groups = 0;
    std::vector<double> group_weight(table.groups, 0.0);
    for (int64_t g = 0; g < table.groups; ++g) {
      bool any = false;
      for (int64_t c : chosen) {
        if (!counts(table, g, c)) continue;
        any = true;
        group_weight[g] += class_weights[c];
      }
      counting_groups += any;
    }
    for (int64_t g = 0; g < table.groups; ++g) {
      for (size_t k = 0; k < chosen.size(); ++k) {
        if (!counts(table, g, chosen[k])) continue;
        double share = 1.0;
        if (output == Output::kSum) share = class_weights[chosen[k]];
        if (output == Output::kMean) {
          share = divide(class_weights[chosen[k]], group_weight[g]) / static_cast<double>(counting_groups);
        }
        f(g, static_cast<int64_t>(k), share);
      }
    }
  }
};

[[noreturn]] void throw_bad_label(const Call& call, int64_t flat) {
  const SegmentationParams& params = call.params;
  std::string wanted = "in [0, " + std::to_string(params.classes + params.first_label) + ") or ignore_index (" +
                       std::to_string(params.ignore_index) + ")";
  int64_t value = 0;
  if (params.soft_labels) {
    // flat is in (N, C, S), of the folded samples and pixels; back to the target's own dimensions.
    const int64_t pixel = flat % params.pixels;
    const int64_t c = flat / params.pixels % params.classes;
    const int64_t sample = flat / params.pixels / params.classes;
    const LogitLayout& layout = params.target_layout;
    value = static_cast<const uint8_t*>(
        params.target)[sample * layout.sample_stride + c * layout.class_stride + pixel * layout.pixel_stride];
    const int64_t spatial = params.samples * params.pixels / call.sizes[0];
    const int64_t place = sample * params.pixels + pixel;
    flat = (place / spatial * params.classes + c) * spatial + place % spatial;
    wanted = "0 or 1 in a mask";
  } else {
    const DType dtype = params.target_dtype == DType::kBool ? DType::kUInt8 : params.target_dtype;
    value = integer_at(params.target, dtype, flat);
  }
  throw std::out_of_range("segmentation: target at " + position_text(flat, call.target_sizes) + " must be " + wanted +
                          ", got " + std::to_string(value));
}

// Runs the forward kernel and sums what the chunks found, in the order of their index.
Table run_forward(Call& call) {
  SegmentationParams& params = call.params;
  if (params.classes == 0 && !params.soft_labels) {
    // No label is a class then, and no kernel runs that would say so.
    for (int64_t i = 0; i < call.pixel_count(); ++i) {
      const DType dtype = params.target_dtype == DType::kBool ? DType::kUInt8 : params.target_dtype;
      if (integer_at(params.target, dtype, i) != params.ignore_index) throw_bad_label(call, i);
    }
  }
  const int64_t classes = params.classes;
  std::vector<SegmentationPartial> partials(call.chunks);
  std::vector<double> tables(params.overlap ? call.chunks * 3 * classes : 0);
  const cpu::KernelTable& kernels = cpu::kernels();
  const int64_t scratch_bytes = call.chunks > 0 ? kernels.segmentation_scratch_bytes(params) : 0;
  for_chunks(call.chunks, [&](int64_t begin, int64_t end) {
    const Scratch scratch(scratch_bytes);
    kernels.segmentation_forward(params, begin, end, scratch.data(), partials.data(), tables.data());
  });

  Table table(params.groups, classes);
  const int64_t per_group = params.groups > 0 ? call.chunks / params.groups : 0;
  for (int64_t i = 0; i < call.chunks; ++i) {
    const SegmentationPartial& partial = partials[i];
    if (partial.bad_label >= 0) throw_bad_label(call, partial.bad_label);
    const int64_t g = i / per_group;
    table.cross_entropy() += partial.cross_entropy;
    table.label_weight() += partial.label_weight;
    table.squared_error() += partial.squared_error;
    table.pixel_weight(g) += partial.pixel_weight;
    if (!params.overlap) continue;
    for (int k = 0; k < 3; ++k) {
      for (int64_t c = 0; c < classes; ++c) table.statistic(k, g, c) += tables[(i * 3 + k) * classes + c];
    }
  }
  return table;
}

Tensor tensor_of(const std::vector<double>& values, const std::vector<int64_t>& sizes, ScalarType dtype) {
  Tensor tensor = allocate(sizes, contiguous_strides(sizes), dtype);
  void* data = tensor.mutable_data_ptr();
  for (size_t i = 0; i < values.size(); ++i) {
    if (dtype == ScalarType::Double) {
      static_cast<double*>(data)[i] = values[i];
    } else {
      static_cast<float*>(data)[i] = static_cast<float>(values[i]);
    }
  }
  return tensor;
}

// Element i of a contiguous tensor of float32 or float64.
double number_at(const Tensor& tensor, int64_t i) {
  return tensor.scalar_type() == ScalarType::Double ? static_cast<const double*>(tensor.const_data_ptr())[i]
                                                    : static_cast<const float*>(tensor.const_data_ptr())[i];
}

std::tuple<Tensor, Tensor, Tensor> forward(const char* op, const Tensor& input, const Tensor& target,
                                           const std::optional<Tensor>& weight,
                                           const std::optional<Tensor>& pixel_weight,
                                           const std::optional<Tensor>& pos_weight, const SegmentationOptions& options,
                                           bool keep) {
  Call call(op, input, target, weight, pixel_weight, pos_weight, options);
  SegmentationParams& params = call.params;
  const ScalarType dtype = call.compute_type();
  Tensor statistics = allocate({keep ? call.statistics_size() : 0}, {1}, dtype);
  if (keep) call.point_into(statistics.mutable_data_ptr());
  const std::vector<int64_t> sizes = call.output_sizes();
  Tensor each;
  const bool each_pixel = call.output == Output::kEach && params.squared_error;
  if (each_pixel) {
    each = allocate(sizes, contiguous_strides(sizes), dtype);
    params.squared_error_of_pixels = each.mutable_data_ptr();
    if (call.chunks == 0) torch::stable::zero_(each);
  }

  const Table table = run_forward(call);
  double terms[3] = {0.0, 0.0, 0.0};
  std::vector<double> values;
  const bool scalar = call.output == Output::kMean || call.output == Output::kSum;
  if (scalar && params.cross_entropy) terms[0] = divide(table.cross_entropy(), call.cross_entropy_divisor(table));
  if (scalar && params.squared_error) {
    terms[2] =
        call.output == Output::kSum ? table.squared_error() : divide(table.squared_error(), table.all_pixel_weights());
  }
  if (call.output == Output::kStatistics) {
    values.assign(table.numbers.begin(), table.numbers.begin() + 3 * table.groups * table.classes);
  } else if (call.output == Output::kSums) {
    values = table.numbers;
  } else if (params.overlap) {
    const int64_t count = static_cast<int64_t>(call.chosen.size());
    if (call.output == Output::kEach) values.assign(table.groups * count, 0.0);
    call.for_counting(table, [&](int64_t g, int64_t k, double share) {
      const double loss = call.overlap_of(table, g, call.chosen[k]).value;
      if (call.output == Output::kEach) {
        values[g * count + k] = loss;
      } else {
        terms[1] += share * loss;
      }
    });
  }
  if (scalar) {
    double loss = 0.0;
    if (params.cross_entropy) loss += options.cross_entropy * terms[0];
    if (params.overlap) loss += options.iou * terms[1];
    if (params.squared_error) loss += options.brier * terms[2];
    values.assign(1, loss);
  }
  Tensor loss = each_pixel ? each : tensor_of(values, sizes, call.value_type());
  if (keep) call.keep(table, statistics.mutable_data_ptr());
  return {loss, tensor_of({terms[0], terms[1], terms[2]}, {3}, dtype), statistics};
}

// dL/dI, dL/dP and dL/dT, each (G, C), for the incoming gradient `grad` of the op's value.
std::vector<double> table_gradients(const Call& call, const Table& table, const Tensor& grad) {
  const int64_t size = table.groups * table.classes;
  std::vector<double> gradients(3 * size, 0.0);
  if (!call.params.overlap) return gradients;
  if (gives_sums(call.output)) {
    for (int64_t i = 0; i < 3 * size; ++i) gradients[i] = number_at(grad, i);
    return gradients;
  }
  const int64_t count = static_cast<int64_t>(call.chosen.size());
  call.for_counting(table, [&](int64_t g, int64_t k, double share) {
    const double factor =
        call.output == Output::kEach ? number_at(grad, g * count + k) : number_at(grad, 0) * call.options.iou * share;
    // Exactly none, also where the derivative is infinite.
    if (factor == 0.0) return;
    const int64_t at = g * table.classes + call.chosen[k];
    const math::OverlapLoss loss = call.overlap_of(table, g, call.chosen[k]);
    gradients[at] += factor * loss.d_intersection;
    gradients[size + at] += factor * loss.d_predicted;
    gradients[2 * size + at] += factor * loss.d_labelled;
  });
  return gradients;
}

}  // namespace

std::tuple<Tensor, Tensor> segmentation(Tensor input, Tensor target, std::optional<Tensor> weight,
                                        std::optional<Tensor> pixel_weight, std::optional<Tensor> pos_weight,
                                        int64_t activation, int64_t ignore_index, int64_t output, double cross_entropy,
                                        double iou, double brier, double alpha, double beta, double label_smoothing,
                                        std::vector<int64_t> classes, bool per_image, int64_t absent, double smooth,
                                        double eps, bool log, double gamma, int64_t intersection) {
  const SegmentationOptions options = FUSEDLOSS_SEGMENTATION_OPTIONS;
  auto result = forward("segmentation", input, target, weight, pixel_weight, pos_weight, options, false);
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
  return forward("segmentation", input, target, weight, pixel_weight, pos_weight, options, keep);
}

Tensor segmentation_backward(Tensor grad, Tensor input, Tensor target, std::optional<Tensor> weight,
                             std::optional<Tensor> pixel_weight, std::optional<Tensor> pos_weight, Tensor statistics,
                             int64_t activation, int64_t ignore_index, int64_t output, double cross_entropy, double iou,
                             double brier, double alpha, double beta, double label_smoothing,
                             std::vector<int64_t> classes, bool per_image, int64_t absent, double smooth, double eps,
                             bool log, double gamma, int64_t intersection, int64_t operand) {
  constexpr const char* op = "_segmentation_backward";
  const SegmentationOptions options = FUSEDLOSS_SEGMENTATION_OPTIONS;
  Call call(op, input, target, weight, pixel_weight, pos_weight, options);
  SegmentationParams& params = call.params;
  require(operand == 0 || (operand == 1 && params.soft_labels && is_floating(params.target_dtype)), op,
          "operand must be 0, or 1 with soft labels of a floating dtype");
  require(statistics.dim() == 1 && statistics.numel() == call.statistics_size() &&
              statistics.scalar_type() == call.compute_type() && statistics.is_contiguous(),
          op, "statistics must be those that the forward op keeps");
  void* kept = const_cast<void*>(readable(statistics, op));
  const Table table = call.kept(kept);
  call.point_into(kept);

  require(sizes_of(grad) == call.output_sizes() && grad.scalar_type() == call.value_type(), op,
          "grad must have the shape and dtype of the loss");
  readable(grad, op);
  if (!grad.is_contiguous()) grad = torch::stable::contiguous(grad);
  const bool scalar = call.output == Output::kMean || call.output == Output::kSum;
  const double g = scalar ? number_at(grad, 0) : 1.0;
  if (params.cross_entropy) {
    params.cross_entropy_scale = divide(g * options.cross_entropy, call.cross_entropy_divisor(table));
  }
  if (params.squared_error) {
    params.squared_error_scale =
        call.output == Output::kMean ? divide(g * options.brier, table.all_pixel_weights()) : g * options.brier;
    if (call.output == Output::kEach) params.gradient_of_squared_error = grad.const_data_ptr();
  }
  if (call.output == Output::kSums) {
    // Of the sums as they are: where they are divided, the caller does it.
    if (params.cross_entropy) params.cross_entropy_scale = number_at(grad, call.place_of_cross_entropy());
    if (params.squared_error) params.squared_error_scale = number_at(grad, call.place_of_squared_error());
  }
  const std::vector<double> gradients = table_gradients(call, table, grad);
  std::vector<float> gradients32;
  if (!call.float64()) gradients32.assign(gradients.begin(), gradients.end());
  const int64_t size = table.groups * table.classes;
  const auto part = [&](int64_t k) {
    return call.float64() ? static_cast<const void*>(gradients.data() + k * size) : gradients32.data() + k * size;
  };
  params.d_intersection = part(0);
  params.d_predicted = part(1);
  params.d_labelled = part(2);

  Tensor gradient = allocate(call.sizes, dense_strides(call.sizes, strides_of(call.input)),
                             operand == 0 ? input.scalar_type() : target.scalar_type());
  params.gradient = gradient.mutable_data_ptr();
  params.gradient_layout = layout_under(call.view, gradient, op);
  const cpu::KernelTable& kernels = cpu::kernels();
  const int64_t scratch_bytes = call.chunks > 0 ? kernels.segmentation_scratch_bytes(params) : 0;
  for_chunks(call.chunks, [&](int64_t begin, int64_t end) {
    const Scratch scratch(scratch_bytes);
    (operand == 0 ? kernels.segmentation_backward : kernels.segmentation_label_backward)(params, begin, end,
                                                                                         scratch.data());
  });
  return gradient;
}

}  // namespace fusedloss
