// What the segmentation ops of all devices do before their kernels: checks, views, sizes.
#pragma once

#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include "binding/logits.h"
#include "binding/tensors.h"
#include "kernels/segmentation.h"
#include "math/overlap.h"

namespace fusedloss {

// The ops' options, in the order of their schema.
struct SegmentationOptions {
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

// The ops' list of classes. All classes are {-1}, because an empty list does not survive AOTInductor, whose calls give
// None in its place (pytorch/pytorch pull request 194324); empty means all too.
inline std::vector<int64_t> classes_of(std::vector<int64_t> classes) {
  if (classes.size() == 1 && classes[0] == -1) classes.clear();
  return classes;
}

// From the ops' arguments, which have these names.
#define FUSEDLOSS_SEGMENTATION_OPTIONS                                                                   \
  SegmentationOptions {                                                                                  \
    activation, ignore_index, output, cross_entropy, iou, brier, {alpha, beta, smooth, eps, gamma, log}, \
        label_smoothing, classes_of(std::move(classes)), per_image, absent, intersection                 \
  }

// The arguments after the checks, with whatever had to be copied. The weights of the classes are left to the device:
// their numbers may not be there to read. any_order: its kernels read soft labels in either order.
struct SegmentationCall {
  Tensor input;
  Tensor target;
  std::optional<Tensor> pixel_weight;
  const SegmentationOptions& options;
  Output output;
  Absent absent;
  std::vector<int64_t> sizes;
  std::vector<int64_t> target_sizes;
  std::vector<int64_t> chosen;  // classes of the overlap
  LogitView view;
  SegmentationParams params{};

  SegmentationCall(const char* op, const Tensor& input_argument, const Tensor& target_argument,
                   const std::optional<Tensor>& pixel_weight_argument, const SegmentationOptions& given, bool any_order)
      : input(input_argument), target(target_argument), pixel_weight(pixel_weight_argument), options(given) {
    const auto in_range = [](int64_t value, int64_t last) { return value >= 0 && value <= last; };
    require(in_range(options.activation, 2), op, "activation must be 0 (softmax), 1 (sigmoid) or 2 (none)");
    require(in_range(options.output, 4), op, "output must be 0 (each), 1 (mean), 2 (sum), 3 (statistics) or 4 (sums)");
    require(in_range(options.absent, 2), op, "absent must be 0 (skip), 1 (count) or 2 (zero)");
    require(in_range(options.intersection, 1), op, "intersection must be 0 (minimum) or 1 (product)");
    output = static_cast<Output>(options.output);
    absent = static_cast<Absent>(options.absent);
    params.activation = static_cast<Activation>(options.activation);
    params.intersection = static_cast<Intersection>(options.intersection);
    params.cross_entropy = (output == Output::kMean || output == Output::kSums) && options.cross_entropy != 0.0;
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
    read_target(op, any_order);

    params.samples = view.samples;
    params.classes = view.classes;
    params.pixels = view.pixels;
    params.groups = options.per_image ? params.samples : 1;
    params.image_pixels = sizes[0] > 0 ? params.samples * params.pixels / sizes[0] : 0;
    params.input_layout = view.layout;
    params.input = readable(input, op);
    params.target = readable(target, op);
    params.ignore_index = options.ignore_index;
    params.first_label = params.classes == 1 && params.activation != Activation::kSoftmax ? 1 : 0;
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
  }

  bool empty() const { return params.classes == 0 || pixel_count() == 0; }
  bool float64() const { return params.input_dtype == DType::kFloat64; }
  ScalarType compute_type() const { return float64() ? ScalarType::Double : ScalarType::Float; }
  // Of the op's value. Sums are added to those of other processes, and counts stay exact.
  ScalarType value_type() const { return output == Output::kSums ? ScalarType::Double : compute_type(); }
  int64_t pixel_count() const { return params.samples * params.pixels; }

  // Statistics: (2 N S + the table) of the compute type: maximum (N S) and sum (N S) under softmax, then the bytes of
  // the table's doubles.
  int64_t pixel_statistics() const { return params.activation == Activation::kSoftmax ? 2 * pixel_count() : 0; }
  int64_t number_bytes() const { return static_cast<int64_t>(float64() ? sizeof(double) : sizeof(float)); }
  // Numbers of the table of sums: I, P and T of each class, m of each group, and three.
  int64_t table_size() const { return 3 * params.groups * params.classes + params.groups + 3; }
  // Places of the sums of CE and of SE in it.
  int64_t place_of_cross_entropy() const { return table_size() - 3; }
  int64_t place_of_squared_error() const { return table_size() - 1; }
  int64_t statistics_size() const {
    const int64_t table_bytes = table_size() * static_cast<int64_t>(sizeof(double));
    return pixel_statistics() + table_bytes / number_bytes();
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
      case Output::kSums:
        return {table_size()};
      default:
        return {};
    }
  }

 private:
  void read_target(const char* op, bool any_order) {
    target_sizes = sizes_of(target);
    params.soft_labels = target_sizes == sizes;
    if (!params.soft_labels) {
      require(target_sizes == pixel_sizes(input), op,
              "target must have input's shape, or it without the class dimension");
      require(!is_floating(params.target_dtype), op, "target indices must be of an integer dtype or bool");
      if (!target.is_contiguous()) target = torch::stable::contiguous(target);
      view = view_logits(sizes, strides_of(input), options.per_image);
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
    SoftLabelView seen = view_soft_labels(input, target, op, any_order, options.per_image);
    view = seen.view;
    target = seen.target;
    params.target_layout = seen.target_layout;
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

}  // namespace fusedloss
