#include "binding/logits.h"

#include <algorithm>
#include <limits>

namespace fusedloss {

namespace {

bool is_empty(const std::vector<int64_t>& sizes) { return std::find(sizes.begin(), sizes.end(), 0) != sizes.end(); }

// Samples, classes and spatial dimensions (as one), before anything is folded.
struct Geometry {
  int64_t samples = 1;
  int64_t classes = 1;
  int64_t spatial = 1;
  LogitLayout layout{0, 1, 1};
  bool mergeable = true;  // the spatial dimensions follow each other in memory

  Geometry(const std::vector<int64_t>& sizes, const std::vector<int64_t>& given_strides) {
    // Nothing lies anywhere in an empty tensor, so it may as well be contiguous.
    const std::vector<int64_t> strides = is_empty(sizes) ? contiguous_strides(sizes) : given_strides;
    const bool one_sample = sizes.size() == 1;
    classes = sizes[one_sample ? 0 : 1];
    layout.class_stride = classes == 1 ? 1 : strides[one_sample ? 0 : 1];
    if (one_sample) return;
    samples = sizes[0];
    layout.sample_stride = strides[0];
    for (size_t d = sizes.size(); d-- > 2;) {
      if (sizes[d] != 1) {  // a dimension of size 1 has no stride
        if (spatial == 1) {
          layout.pixel_stride = strides[d];
        } else if (strides[d] != layout.pixel_stride * spatial) {
          mergeable = false;
        }
      }
      spatial *= sizes[d];
    }
  }

  LogitLayout folded(LogitView::Fold fold) const {
    switch (fold) {
      case LogitView::Fold::kRows:
        return {0, layout.class_stride, layout.sample_stride};
      case LogitView::Fold::kAll:
        return {0, layout.class_stride, layout.pixel_stride};
      default:
        return layout;
    }
  }

  // Class-major memory (C, N, S) could be folded too, but no tensor made to go with it would lie so.
  bool samples_are_pixels() const {
    return samples == 1 || (layout.class_stride == 1 && layout.sample_stride == spatial * layout.pixel_stride);
  }
};

}  // namespace

void require_class_count(const char* op, const Tensor& input) {
  constexpr int64_t most = std::numeric_limits<int32_t>::max() - 1024;
  require(input.sizes()[input.dim() == 1 ? 0 : 1] <= most, op, "there must be fewer than 2^31 - 1024 classes");
}

LogitView view_logits(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, bool keep_samples) {
  using Fold = LogitView::Fold;
  const Geometry geometry(sizes, strides);
  LogitView view;
  view.classes = geometry.classes;
  view.readable = geometry.mergeable;
  view.fold = keep_samples                    ? Fold::kSpatial
              : geometry.spatial == 1         ? Fold::kRows
              : geometry.samples_are_pixels() ? Fold::kAll
                                              : Fold::kSpatial;
  view.layout = geometry.folded(view.fold);
  view.samples = view.fold == Fold::kSpatial ? geometry.samples : 1;
  view.pixels = view.fold == Fold::kSpatial ? geometry.spatial : geometry.spatial * geometry.samples;
  if (view.pixels == 1) view.layout.pixel_stride = view.layout.class_stride == 1 ? view.classes : 1;  // free to choose

  const bool classes_inner = view.layout.class_stride == 1;
  const bool pixels_inner = view.layout.pixel_stride == 1;
  if (!classes_inner && !pixels_inner) view.readable = false;
  if (classes_inner && pixels_inner && view.classes > 1 && view.pixels > 1) view.readable = false;  // overlapping
  return view;
}

// any_order: the other inner stride may be 1.
std::optional<LogitLayout> layout_if_under(const LogitView& view, const std::vector<int64_t>& sizes,
                                           const std::vector<int64_t>& strides, bool any_order = false) {
  const Geometry geometry(sizes, strides);
  if (!geometry.mergeable) return std::nullopt;
  if (view.fold == LogitView::Fold::kAll && !geometry.samples_are_pixels()) return std::nullopt;
  LogitLayout layout = geometry.folded(view.fold);
  if (view.pixels == 1) layout.pixel_stride = view.layout.pixel_stride;
  const bool classes_may = any_order || view.class_innermost(), pixels_may = any_order || !view.class_innermost();
  const bool readable = (classes_may && layout.class_stride == 1) || (pixels_may && layout.pixel_stride == 1);
  return readable ? std::optional<LogitLayout>(layout) : std::nullopt;
}

LogitLayout layout_under(const LogitView& view, const Tensor& tensor, const char* op) {
  const std::optional<LogitLayout> layout = layout_if_under(view, sizes_of(tensor), strides_of(tensor));
  require(layout.has_value(), op, "a tensor must lie in memory as input does");
  return *layout;
}

std::vector<int64_t> dense_strides(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  const std::vector<int64_t> contiguous = contiguous_strides(sizes);
  const LogitView view = view_logits(sizes, strides);
  if (sizes.size() == 1 || !view.readable || is_empty(sizes)) return contiguous;
  bool is_contiguous = true;
  for (size_t d = 0; d < sizes.size(); ++d) is_contiguous &= sizes[d] == 1 || strides[d] == contiguous[d];
  if (is_contiguous) return contiguous;

  std::vector<int64_t> dense(sizes.size());
  int64_t stride = 1;
  if (view.class_innermost()) {
    dense[1] = 1;
    stride = sizes[1];
    for (size_t d = sizes.size(); d-- > 2;) {
      dense[d] = stride;
      stride *= sizes[d];
    }
    dense[0] = stride;
    return dense;
  }
  if (view.fold == LogitView::Fold::kRows && sizes[0] > 1) {
    // Rows whose samples are neighbors: (N, C) transposed.
    for (size_t d = 2; d < sizes.size(); ++d) dense[d] = 1;
    dense[0] = 1;
    dense[1] = sizes[0];
    return dense;
  }
  return contiguous;
}

std::vector<int64_t> pixel_sizes(const Tensor& input) {
  std::vector<int64_t> sizes = sizes_of(input);
  sizes.erase(sizes.begin() + (sizes.size() == 1 ? 0 : 1));
  return sizes;
}

ClassWeights::ClassWeights(const char* op, const std::optional<Tensor>& weight, int64_t classes, bool compute_float64) {
  if (!weight.has_value()) return;
  require(is_floating(dtype_of(*weight, op)), op, "weight must be of a floating dtype");
  require(weight->dim() == 1 && weight->numel() == classes, op, "weight must have one number a class");
  readable(*weight, op);
  const Tensor values = torch::stable::contiguous(torch::stable::to(*weight, ScalarType::Double));
  const double* numbers = static_cast<const double*>(values.const_data_ptr());
  float64.assign(numbers, numbers + classes);
  if (!compute_float64) float32.assign(numbers, numbers + classes);
}

const void* ClassWeights::data() const {
  if (!float32.empty()) return float32.data();
  return float64.empty() ? nullptr : static_cast<const void*>(float64.data());
}

double ClassWeights::sum(int64_t classes) const {
  if (float64.empty()) return static_cast<double>(classes);
  double sum = 0.0;
  for (double weight : float64) sum += weight;
  return sum;
}

Tensor readable_logits(const Tensor& tensor) {
  return view_logits(sizes_of(tensor), strides_of(tensor)).readable ? tensor : torch::stable::contiguous(tensor);
}

SoftLabelView view_soft_labels(const Tensor& input, const Tensor& target, const char* op, bool any_order,
                               bool keep_samples) {
  constexpr int64_t few_pixels = 128;  // of a sample: whole blocks of many samples are then worth a copy
  const std::vector<int64_t> sizes = sizes_of(input);
  const std::vector<int64_t> strides = strides_of(input);
  SoftLabelView seen{view_logits(sizes, strides, keep_samples), target, {}};
  const auto see = [&](bool in_any_order) {
    const std::optional<LogitLayout> layout = layout_if_under(seen.view, sizes, strides_of(seen.target), in_any_order);
    if (layout) seen.target_layout = *layout;
    return layout.has_value();
  };
  if (see(any_order)) return seen;
  if (any_order && seen.view.fold == LogitView::Fold::kAll) {
    // Contiguous labels beside channels_last logits: their samples do not follow each other like pixels.
    const LogitView folded = seen.view;
    seen.view = view_logits(sizes, strides, true);
    if (seen.view.pixels >= few_pixels && see(true)) return seen;
    seen.view = folded;
  }
  seen.target = allocate_like(target, sizes, dense_strides(sizes, strides), target.scalar_type());
  torch::stable::copy_(seen.target, target);
  require(see(false), op, "a copy of target must lie in memory as input does");
  return seen;
}

}  // namespace fusedloss
