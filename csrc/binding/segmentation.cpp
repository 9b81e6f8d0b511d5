// The segmentation ops on the CPU: checks, allocation, chunks, and the formula on the table of the classes.
#include "kernels/segmentation.h"

#include <cmath>
#include <cstring>
#include <tuple>

#include "binding/logits.h"
#include "binding/ops.h"
#include "kernels/cpu/dispatch.h"
#include "math/overlap.h"

namespace fusedloss {
namespace {

// What the op gives as its value.
enum class Output : int {
  kEach = 0,        // the overlap loss of each group and chosen class (G, K), or the Brier loss of each pixel
  kMean = 1,        // the weighted sum of the terms' means
  kSum = 2,         // likewise of their sums; no cross-entropy
  kStatistics = 3,  // I, P and T: (3, G, C)
};

// Does a class with T = 0 count in its group?
enum class Absent : int { kSkip = 0, kCount = 1, kZero = 2 };

struct Options {
  int64_t activation;
  int64_t ignore_index;
  int64_t output;
  double cross_entropy;
  double iou;
  double brier;
  math::OverlapFormula formula;
  double label_smoothing;
  std::vector<int64_t> classes;  // chosen for the overlap; empty for all
  bool per_image;
  int64_t absent;
  int64_t intersection;
};

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

// The arguments after the checks, with whatever had to be copied.
struct Call {
  Tensor input;
  Tensor target;
  std::optional<Tensor> pixel_weight;
  const Options& options;
  Output output;
  Absent absent;
  ClassWeights class_weights;
  ClassWeights pos_weights;
  std::vector<int64_t> sizes;
  std::vector<int64_t> target_sizes;
  std::vector<int64_t> chosen;  // classes of the overlap
  LogitView view;
  SegmentationParams params{};
  int64_t chunks;

  Call(const char* op, const Tensor& input_argument, const Tensor& target_argument, const std::optional<Tensor>& weight,
       const std::optional<Tensor>& pixel_weight_argument, const std::optional<Tensor>& pos_weight,
       const Options& given)
      : input(input_argument), target(target_argument), pixel_weight(pixel_weight_argument), options(given) {
    const auto in_range = [](int64_t value, int64_t last) { return value >= 0 && value <= last; };
    require(in_range(options.activation, 2), op, "activation must be 0 (softmax), 1 (sigmoid) or 2 (none)");
    require(in_range(options.output, 3), op, "output must be 0 (each), 1 (mean), 2 (sum) or 3 (statistics)");
    require(in_range(options.absent, 2), op, "absent must be 0 (skip), 1 (count) or 2 (zero)");
    require(in_range(options.intersection, 1), op, "intersection must be 0 (minimum) or 1 (product)");
    output = static_cast<Output>(options.output);
    absent = static_cast<Absent>(options.absent);
    params.activation = static_cast<Activation>(options.activation);
    params.intersection = static_cast<Intersection>(options.intersection);
    params.cross_entropy = output == Output::kMean && options.cross_entropy != 0.0;
    params.overlap = output == Output::kStatistics || options.iou != 0.0;
    params.squared_error = output != Output::kStatistics && options.brier != 0.0;
    require(output != Output::kEach || params.overlap != params.squared_error, op,
            "output 0 (each) is of one term alone");
    require(!params.cross_entropy || params.activation != Activation::kNone, op,
            "cross_entropy must be 0 without an activation");
    require(options.label_smoothing >= 0.0 && options.label_smoothing <= 1.0, op, "label_smoothing must be in [0, 1]");
    params.label_smoothing = options.label_smoothing;
    const math::OverlapFormula& formula = options.formula;
    require(formula.alpha >= 0.0 && formula.beta >= 0.0 && formula.smooth >= 0.0, op,
            "alpha, beta and smooth must not be negative");
    require(formula.eps > 0.0 && formula.gamma > 0.0, op, "eps and gamma must be positive");
    for (double number : {options.cross_entropy, options.iou, options.brier, formula.alpha, formula.beta,
                          formula.smooth, formula.eps, formula.gamma}) {
      require(std::isfinite(number), op, "factors and options must be finite");
    }

    require(input.dim() >= 2, op, "input must have at least two dimensions");
    params.input_dtype = dtype_of(input, op);
    params.target_dtype = dtype_of(target, op);
    require(is_floating(params.input_dtype), op, "input must be of a floating dtype");
    readable(input, op);
    readable(target, op);
    require_class_count(op, input);
    input = readable_logits(input);
    sizes = sizes_of(input);
    read_target(op);

    view = view_logits(sizes, strides_of(input), options.per_image);
    if (params.soft_labels) params.target_layout = layout_under(view, target, op);
    params.samples = view.samples;
    params.classes = view.classes;
    params.pixels = view.pixels;
    params.groups = options.per_image ? params.samples : 1;
    params.input_layout = view.layout;
    params.input = readable(input, op);
    params.target = readable(target, op);
    params.ignore_index = options.ignore_index;
    params.first_label = params.classes == 1 && params.activation != Activation::kSoftmax ? 1 : 0;
    class_weights = ClassWeights(op, weight, params.classes, float64());
    pos_weights = ClassWeights(op, pos_weight, params.classes, float64());
    params.weight = class_weights.data();
    params.weight_sum = class_weights.sum(params.classes);
    params.pos_weight = pos_weights.data();
    read_pixel_weight(op);

    require(params.activation != Activation::kSoftmax || params.classes != 1, op, "softmax needs two classes");
    require(params.soft_labels || params.target_dtype != DType::kBool || params.first_label == 1, op,
            "target indices of dtype bool are for one class");
    chosen = options.classes;
    std::vector<bool> seen(chosen.empty() ? 0 : params.classes);
    for (int64_t c : chosen) {
      require(c >= 0 && c < params.classes && !seen[c], op, "classes must be different ones in [0, C)");
      seen[c] = true;
    }
    if (chosen.empty()) {
      for (int64_t c = 0; c < params.classes; ++c) chosen.push_back(c);
    }
    const bool empty = params.classes == 0 || params.samples * params.pixels == 0;
    chunks = empty ? 0 : params.samples * segmentation_chunks_per_sample(params.classes, params.samples, params.pixels);
  }

  bool float64() const { return params.input_dtype == DType::kFloat64; }
  ScalarType compute_type() const { return float64() ? ScalarType::Double : ScalarType::Float; }
  int64_t pixel_count() const { return params.samples * params.pixels; }

  // Statistics: (2 N S + the table) of the compute type: maximum (N S) and sum (N S) under softmax, then the bytes of
  // the table's doubles.
  int64_t pixel_statistics() const { return params.activation == Activation::kSoftmax ? 2 * pixel_count() : 0; }
  int64_t number_bytes() const { return static_cast<int64_t>(float64() ? sizeof(double) : sizeof(float)); }
  int64_t statistics_size() const {
    const int64_t table_bytes = Table::size(params.groups, params.classes) * static_cast<int64_t>(sizeof(double));
    return pixel_statistics() + table_bytes / number_bytes();
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
  void point_into(void* statistics) {
    if (pixel_statistics() == 0) return;
    params.maximum = statistics;
    params.sum = static_cast<char*>(statistics) + pixel_count() * number_bytes();
  }

  std::vector<int64_t> output_sizes() const {
    const int64_t groups = options.per_image ? sizes[0] : 1;
    switch (output) {
      case Output::kEach:
        return params.overlap ? std::vector<int64_t>{groups, static_cast<int64_t>(chosen.size())} : pixel_sizes(input);
      case Output::kStatistics:
        return {3, groups, params.classes};
      default:
        return {};
    }
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

 private:
  void read_target(const char* op) {
    target_sizes = sizes_of(target);
    params.soft_labels = target_sizes == sizes;
    if (!params.soft_labels) {
      require(target_sizes == pixel_sizes(input), op,
              "target must have input's shape, or it without the class dimension");
      require(!is_floating(params.target_dtype), op, "target indices must be of an integer dtype or bool");
      if (!target.is_contiguous()) target = torch::stable::contiguous(target);
      return;
    }
    if (is_floating(params.target_dtype)) {
      require(float64() == (params.target_dtype == DType::kFloat64), op,
              "input and target must both be of float64, or none");
    } else {
      require(params.target_dtype == DType::kBool || params.target_dtype == DType::kUInt8, op,
              "a target mask must be of dtype bool or uint8");
      require(params.activation != Activation::kSoftmax, op, "a target mask is for sigmoid or no activation");
    }
    target = in_order_of(target, input);
  }

  void read_pixel_weight(const char* op) {
    if (!pixel_weight.has_value()) return;
    params.pixel_weight_dtype = dtype_of(*pixel_weight, op);
    require(is_floating(params.pixel_weight_dtype) || params.pixel_weight_dtype == DType::kBool, op,
            "pixel_weight must be of a floating dtype or bool");
    require(sizes_of(*pixel_weight) == pixel_sizes(input), op,
            "pixel_weight must have input's shape without the class dimension");
    readable(*pixel_weight, op);
    if (!pixel_weight->is_contiguous()) pixel_weight = torch::stable::contiguous(*pixel_weight);
    params.pixel_weight = pixel_weight->const_data_ptr();
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

// Element i of a contiguous tensor of the compute type.
double number_at(const Tensor& tensor, int64_t i) {
  return tensor.scalar_type() == ScalarType::Double ? static_cast<const double*>(tensor.const_data_ptr())[i]
                                                    : static_cast<const float*>(tensor.const_data_ptr())[i];
}

std::tuple<Tensor, Tensor, Tensor> forward(const char* op, const Tensor& input, const Tensor& target,
                                           const std::optional<Tensor>& weight,
                                           const std::optional<Tensor>& pixel_weight,
                                           const std::optional<Tensor>& pos_weight, const Options& options, bool keep) {
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
  if (params.cross_entropy) terms[0] = divide(table.cross_entropy(), call.cross_entropy_divisor(table));
  if (params.squared_error) {
    terms[2] =
        call.output == Output::kSum ? table.squared_error() : divide(table.squared_error(), table.all_pixel_weights());
  }
  if (call.output == Output::kStatistics) {
    values.assign(table.numbers.begin(), table.numbers.begin() + 3 * table.groups * table.classes);
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
  if (call.output == Output::kMean || call.output == Output::kSum) {
    double loss = 0.0;
    if (params.cross_entropy) loss += options.cross_entropy * terms[0];
    if (params.overlap) loss += options.iou * terms[1];
    if (params.squared_error) loss += options.brier * terms[2];
    values.assign(1, loss);
  }
  Tensor loss = each_pixel ? each : tensor_of(values, sizes, dtype);
  if (keep) call.keep(table, statistics.mutable_data_ptr());
  return {loss, tensor_of({terms[0], terms[1], terms[2]}, {3}, dtype), statistics};
}

// dL/dI, dL/dP and dL/dT, each (G, C), for the incoming gradient `grad` of the op's value.
std::vector<double> table_gradients(const Call& call, const Table& table, const Tensor& grad) {
  const int64_t size = table.groups * table.classes;
  std::vector<double> gradients(3 * size, 0.0);
  if (call.output == Output::kStatistics) {
    for (int64_t i = 0; i < 3 * size; ++i) gradients[i] = number_at(grad, i);
    return gradients;
  }
  if (!call.params.overlap) return gradients;
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

#define FUSEDLOSS_SEGMENTATION_OPTIONS                                                                   \
  Options {                                                                                              \
    activation, ignore_index, output, cross_entropy, iou, brier, {alpha, beta, smooth, eps, gamma, log}, \
        label_smoothing, std::move(classes), per_image, absent, intersection                             \
  }

std::tuple<Tensor, Tensor> segmentation(Tensor input, Tensor target, std::optional<Tensor> weight,
                                        std::optional<Tensor> pixel_weight, std::optional<Tensor> pos_weight,
                                        int64_t activation, int64_t ignore_index, int64_t output, double cross_entropy,
                                        double iou, double brier, double alpha, double beta, double label_smoothing,
                                        std::vector<int64_t> classes, bool per_image, int64_t absent, double smooth,
                                        double eps, bool log, double gamma, int64_t intersection) {
  const Options options = FUSEDLOSS_SEGMENTATION_OPTIONS;
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
  const Options options = FUSEDLOSS_SEGMENTATION_OPTIONS;
  return forward("segmentation", input, target, weight, pixel_weight, pos_weight, options, keep);
}

Tensor segmentation_backward(Tensor grad, Tensor input, Tensor target, std::optional<Tensor> weight,
                             std::optional<Tensor> pixel_weight, std::optional<Tensor> pos_weight, Tensor statistics,
                             int64_t activation, int64_t ignore_index, int64_t output, double cross_entropy, double iou,
                             double brier, double alpha, double beta, double label_smoothing,
                             std::vector<int64_t> classes, bool per_image, int64_t absent, double smooth, double eps,
                             bool log, double gamma, int64_t intersection, int64_t operand) {
  constexpr const char* op = "_segmentation_backward";
  const Options options = FUSEDLOSS_SEGMENTATION_OPTIONS;
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

  require(sizes_of(grad) == call.output_sizes() && grad.scalar_type() == call.compute_type(), op,
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

#undef FUSEDLOSS_SEGMENTATION_OPTIONS

}  // namespace fusedloss
