#include "binding/logits.h"

namespace fusedloss {

LogitView view_logits(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  LogitView view{1, 1, 1, {0, 1, 1}, true};
  if (sizes.size() == 1) {
    view.classes = sizes[0];
    // One pixel: its own stride is free, so name the class stride for what it is.
    view.layout = strides[0] == 1 || sizes[0] == 1 ? LogitLayout{0, 1, sizes[0]} : LogitLayout{0, strides[0], 1};
    if (view.layout.pixel_stride == 1) view.layout.class_stride = strides[0];
    return view;
  }
  view.samples = sizes[0];
  view.classes = sizes[1];
  int64_t sample_stride = strides[0];
  int64_t class_stride = sizes[1] == 1 ? 1 : strides[1];
  int64_t pixel_stride = 1;
  // Spatial dimensions that follow each other in memory are one; those of size 1 have no stride.
  for (size_t d = sizes.size(); d-- > 2;) {
    if (sizes[d] != 1) {
      if (view.pixels == 1) {
        pixel_stride = strides[d];
      } else if (strides[d] != pixel_stride * view.pixels) {
        view.readable = false;
      }
    }
    view.pixels *= sizes[d];
  }
  if (view.pixels == 1) {
    // Rows: samples are the pixels.
    view.pixels = view.samples;
    view.samples = 1;
    pixel_stride = view.pixels == 1 ? (class_stride == 1 ? view.classes : 1) : sample_stride;
    sample_stride = 0;
  } else if (view.samples == 1 || sample_stride == view.pixels * pixel_stride) {
    // channels_last: all samples are one run of pixels.
    view.pixels *= view.samples;
    view.samples = 1;
    sample_stride = 0;
  }
  if (class_stride == 1 && pixel_stride == 1 && view.classes > 1 && view.pixels > 1) view.readable = false;  // expanded
  if (class_stride != 1 && pixel_stride != 1) view.readable = false;
  view.layout = {sample_stride, class_stride, pixel_stride};
  return view;
}

std::vector<int64_t> dense_strides(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  const std::vector<int64_t> contiguous = contiguous_strides(sizes);
  const LogitView view = view_logits(sizes, strides);
  if (sizes.size() == 1 || !view.readable) return contiguous;
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
  if (view.samples == 1 && view.pixels == sizes[0] && sizes[0] > 1) {
    // Rows whose samples are neighbors: (N, C) transposed.
    for (size_t d = 2; d < sizes.size(); ++d) dense[d] = 1;
    dense[0] = 1;
    dense[1] = sizes[0];
    return dense;
  }
  return contiguous;
}

Tensor readable_logits(const Tensor& tensor) {
  return view_logits(sizes_of(tensor), strides_of(tensor)).readable ? tensor : torch::stable::contiguous(tensor);
}

Tensor in_order_of(const Tensor& tensor, const Tensor& like) {
  const std::vector<int64_t> sizes = sizes_of(tensor);
  const LogitView view = view_logits(sizes, strides_of(tensor));
  const std::vector<int64_t> like_strides = strides_of(like);
  if (view.readable && view.same_order(view_logits(sizes, like_strides))) return tensor;
  Tensor copy = allocate(sizes, dense_strides(sizes, like_strides), tensor.scalar_type());
  torch::stable::copy_(copy, tensor);
  return copy;
}

}  // namespace fusedloss
