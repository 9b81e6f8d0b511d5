// A block of pixels on its way through the segmentation kernels: where it lies, its labels and weights, and the memory
// of its tiles.
#pragma once

#include <type_traits>

#include "kernels/cpu/convert.h"
#include "kernels/cpu/segmentation_pixels.h"
#include "kernels/cpu/transpose.h"
#include "kernels/segmentation.h"

namespace fusedloss::cpu::FUSEDLOSS_LEVEL {
namespace {

template <class P>
using Pointee = std::remove_pointer_t<P>;

template <bool kValue>
using Bool = std::bool_constant<kValue>;

int64_t round_up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

// ---------------------------------------------------------------------------------------------------------------------
// The caller's scratch memory

// Pixels of a block: whole vectors, few enough that a tile of all classes stays in the L2 cache.
template <class A>
int block_width(int64_t classes) {
  const int64_t fit = (int64_t{128} << 10) / (classes * static_cast<int64_t>(sizeof(A)));
  if (fit >= kBlock<A>) return kBlock<A>;
  return fit > kLanes<A> ? static_cast<int>(fit / kLanes<A> * kLanes<A>) : kLanes<A>;
}

// Pixels of a block of which nothing is kept but sums: enough that what a block costs is forgotten.
template <class A>
constexpr int kPlainBlock = 512 * kLanes<A>;

// Labels come into the kernels of soft labels as a tile; no activation needs one too, because only the minimum itself
// is right for numbers that are not in [0, 1].
bool has_label_tile(const SegmentationParams& params) {
  return params.soft_labels || params.activation == Activation::kNone;
}

template <class A>
struct Workspace {
  int64_t stride;  // of the tiles, from class to class: one vector more than a block
  A* tile;         // (C, stride)
  A* labels;       // (C, stride), where has_label_tile
  // (stride, C): masks on their way to the tile, the gradient on its way to memory. Never both: under softmax, whose
  // rows are still on their way when the next block begins, no target is a mask.
  A* rows;
  OverlapSums<A> sums;

  static int64_t tile_bytes(int64_t classes) {
    return classes * (block_width<A>(classes) + kLanes<A>)*static_cast<int64_t>(sizeof(A));
  }
  static int64_t sums_bytes(int64_t classes) { return classes * kVectorBytes; }
  static int64_t bytes(int64_t classes) { return 3 * tile_bytes(classes) + 3 * sums_bytes(classes); }

  Workspace(void* scratch, int64_t classes) {
    stride = block_width<A>(classes) + kLanes<A>;
    char* at = static_cast<char*>(scratch);
    const auto take = [&](int64_t bytes) {
      char* taken = at;
      at += bytes;
      return taken;
    };
    tile = reinterpret_cast<A*>(take(tile_bytes(classes)));
    labels = reinterpret_cast<A*>(take(tile_bytes(classes)));
    rows = reinterpret_cast<A*>(take(tile_bytes(classes)));
    sums.intersection = reinterpret_cast<A*>(take(sums_bytes(classes)));
    sums.predicted = reinterpret_cast<A*>(take(sums_bytes(classes)));
    sums.labelled = reinterpret_cast<A*>(take(sums_bytes(classes)));
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Chunks and blocks

struct SegmentationChunk {
  int64_t sample;
  int64_t group;
  int64_t first;
  int64_t count;

  SegmentationChunk(const SegmentationParams& params, int64_t index) {
    const int64_t size = segmentation_chunk_pixels(params.classes, params.samples, params.pixels);
    const int64_t per_sample = segmentation_chunks_per_sample(params.classes, params.samples, params.pixels);
    sample = index / per_sample;
    group = params.groups > 1 ? sample : 0;
    first = index % per_sample * size;
    count = params.pixels - first < size ? params.pixels - first : size;
  }
};

int64_t offset_of(const LogitLayout& layout, int64_t sample, int64_t pixel) {
  return sample * layout.sample_stride + pixel * layout.pixel_stride;
}

template <class A>
Classes<A> classes_of(const SegmentationParams& params) {
  const A smoothing = static_cast<A>(params.label_smoothing);
  return {static_cast<int>(params.classes),
          static_cast<const A*>(params.weight),
          {static_cast<A>(1.0 - params.label_smoothing), smoothing / static_cast<A>(params.classes)}};
}

// Some pixels of one sample.
template <class T>
struct SegmentationBlock {
  using A = ComputeType<T>;
  static constexpr DType kComputeDType = sizeof(A) == sizeof(double) ? DType::kFloat64 : DType::kFloat32;

  const SegmentationParams& params;
  const Classes<A>& classes;
  const Workspace<A>& work;
  const int64_t sample;
  const int64_t pixel;
  const int64_t left;  // pixels of the sample from there on
  const int64_t flat;  // position of the first pixel in (N, S)
  // Nothing to be said of each pixel: labels and logits are read where they lie, and sums or gradients are all that
  // becomes of them. Then neither `pixels` nor the tiles are touched.
  const bool plain;
  const int count;
  const int padded;  // up to the end of the last vector
  const T* const z;
  int64_t bad_label = -1;
  SegmentationPixels<A>& pixels;
  // Soft labels: where they lie, class-major and of the compute type or of the logits' dtype; else nullptr, and they
  // are in the tile.
  const void* labels_in_place = nullptr;

  SegmentationBlock(const SegmentationParams& params, const Classes<A>& classes, const Workspace<A>& work,
                    const SegmentationChunk& chunk, int64_t done, SegmentationPixels<A>& pixels,
                    bool may_be_plain = true)
      : params(params),
        classes(classes),
        work(work),
        sample(chunk.sample),
        pixel(chunk.first + done),
        left(params.pixels - pixel),
        flat(chunk.sample * params.pixels + pixel),
        plain(may_be_plain && lies_plain(params) && chunk.count - done >= kLanes<A>),
        count(block_count(plain, classes.count, chunk.count - done)),
        padded(static_cast<int>(round_up(count, kLanes<A>))),
        z(static_cast<const T*>(params.input) + offset_of(params.input_layout, sample, pixel)),
        pixels(pixels) {
    if (!plain && (weighted() || pixels.filled != count)) read_pixels();
    if (!plain) pixels.filled = count;
    if (labels_lie_ready(params) && count == padded) {
      const int64_t bytes = params.target_dtype == kComputeDType ? sizeof(A) : sizeof(T);
      labels_in_place =
          static_cast<const char*>(params.target) + bytes * offset_of(params.target_layout, sample, pixel);
    } else if (has_label_tile(params)) {
      fill_labels();
    }
    if (transposed()) {
      rows_to_tile(z, params.input_layout.pixel_stride, count, left, classes.count, work.tile, work.stride);
      zero_tail(work.tile);
    }
  }

  bool transposed() const { return params.input_layout.pixel_stride != 1; }

  Ahead<T> ahead() const { return {z, params.input_layout, count}; }

  // Whether a pixel's weight may be other than 1.
  bool weighted() const { return params.pixel_weight != nullptr || !params.soft_labels; }

  // Overlap alone of classes that have nothing to do with each other.
  static bool lies_plain(const SegmentationParams& params) {
    return params.activation != Activation::kSoftmax && !params.cross_entropy && !params.squared_error &&
           params.input_layout.pixel_stride == 1 && labels_lie_ready(params);
  }

  static int block_count(bool plain, int64_t classes, int64_t left) {
    const int most = plain ? kPlainBlock<A> : block_width<A>(classes);
    const int64_t count = left < most ? left : most;
    return static_cast<int>(plain ? count / kLanes<A> * kLanes<A> : count);
  }

  // Calls f(logits, stride from class to class): where they lie, or in the tile.
  template <class F>
  void with_logits(F f) const {
    if (transposed()) {
      f(static_cast<const A*>(work.tile), work.stride);
    } else {
      f(z, params.input_layout.class_stride);
    }
  }

  // Calls f(labels, stride from class to class): where they lie, or in the tile.
  template <class F>
  void with_labels(F f) const {
    if (labels_in_place == nullptr) return f(static_cast<const A*>(work.labels), work.stride);
    const int64_t stride = params.target_layout.class_stride;
    if (params.target_dtype == kComputeDType) return f(static_cast<const A*>(labels_in_place), stride);
    if constexpr (!std::is_same_v<T, A>) f(static_cast<const T*>(labels_in_place), stride);
  }

  // Of soft labels.
  A label(int i, int64_t c) const {
    A value = 0;
    with_labels([&](const auto* y, int64_t stride) { value = load_one(y + c * stride + i); });
    return value;
  }

  A logit(int i, int64_t c) const {
    return load_one(z + i * params.input_layout.pixel_stride + c * params.input_layout.class_stride);
  }

 private:
  // Whole vectors of them can be read as the compute type, and none has to be masked.
  static bool labels_lie_ready(const SegmentationParams& params) {
    const bool readable = params.target_dtype == kComputeDType || params.target_dtype == params.input_dtype;
    return params.soft_labels && readable && params.target_layout.pixel_stride == 1 && params.pixel_weight == nullptr;
  }

  // Weights and class indices.
  void read_pixels() {
    if (params.pixel_weight == nullptr) {
      for (int i = 0; i < count; ++i) pixels.weight[i] = 1;
    } else if (params.pixel_weight_dtype == DType::kBool) {
      const uint8_t* mask = static_cast<const uint8_t*>(params.pixel_weight) + flat;
      for (int i = 0; i < count; ++i) pixels.weight[i] = mask[i] != 0 ? A(1) : A(0);
    } else {
      read_numbers<A>(params.pixel_weight, params.pixel_weight_dtype, flat, 1, count, pixels.weight);
    }
    if (!params.soft_labels) {
      const DType dtype = params.target_dtype == DType::kBool ? DType::kUInt8 : params.target_dtype;
      const auto first = static_cast<math::Bits<A>>(params.first_label);
      bad_label =
          read_labels(params.target, dtype, flat, count, params.ignore_index, params.classes + first, pixels.label);
      for (int i = 0; i < count; ++i) {
        pixels.weight[i] = pixels.label[i] < 0 ? A(0) : pixels.weight[i];
        pixels.label[i] -= first;
      }
    } else {
      for (int i = 0; i < count; ++i) pixels.label[i] = -1;
    }
    for (int i = count; i < padded; ++i) {
      pixels.weight[i] = 0;
      pixels.label[i] = -1;
    }
    for (int i = 0; i < padded; ++i) {
      pixels.place[i] = pixels.label[i] < 0 ? math::Bits<A>(0) : pixels.label[i];
      pixels.label_weight[i] = pixels.label[i] < 0 ? A(0) : pixels.weight[i];
    }
    if (params.activation != Activation::kSoftmax) {
      for (int i = 0; i < padded; ++i) pixels.sum[i] = pixels.inverse_sum[i] = 1;
    }
  }

  void zero_tail(A* tile) const {
    if (count == padded) return;
    for (int64_t c = 0; c < classes.count; ++c) {
      for (int i = count; i < padded; ++i) tile[c * work.stride + i] = 0;
    }
  }

  // The label of each class, 0 where m is.
  void fill_labels() {
    A* tile = work.labels;
    if (!params.soft_labels) {
      for (int64_t c = 0; c < classes.count; ++c) {
        for (int i = 0; i < padded; ++i) tile[c * work.stride + i] = pixels.label[i] == c ? A(1) : A(0);
      }
      return;
    }
    const LogitLayout& layout = params.target_layout;
    const int64_t at = offset_of(layout, sample, pixel);
    if (params.target_dtype == DType::kBool || params.target_dtype == DType::kUInt8) {
      fill_mask(static_cast<const uint8_t*>(params.target) + at, layout);
    } else {
      with_floating_type(params.target_dtype, [&](auto* type) {
        using Y = Pointee<decltype(type)>;
        if constexpr (std::is_same_v<ComputeType<Y>, A>) {
          pixels_to_tile(static_cast<const Y*>(params.target) + at, layout, count, left, classes.count, tile,
                         work.stride);
        }
      });
    }
    zero_tail(tile);
    if (params.pixel_weight == nullptr) return;
    for (int i = 0; i < count; ++i) {
      if (pixels.weight[i] != A(0)) continue;
      for (int64_t c = 0; c < classes.count; ++c) tile[c * work.stride + i] = 0;
    }
  }

  // Soft labels that are bytes, which must be 0 or 1; of bool they are.
  void fill_mask(const uint8_t* mask, const LogitLayout& layout) {
    // Loops over neighboring bytes, one after the other: they go by vectors.
    uint8_t all = 0;
    const auto convert = [&](const uint8_t* y, int64_t bytes, A* to) {
      for (int64_t k = 0; k < bytes; ++k) all |= y[k];
      for (int64_t k = 0; k < bytes; ++k) to[k] = y[k] != 0 ? A(1) : A(0);
    };
    if (layout.pixel_stride == 1) {
      for (int64_t c = 0; c < classes.count; ++c) {
        convert(mask + c * layout.class_stride, count, work.labels + c * work.stride);
      }
    } else {
      const bool together = layout.pixel_stride == classes.count;
      const int64_t runs = together ? 1 : count, run = together ? int64_t{count} * classes.count : classes.count;
      for (int64_t i = 0; i < runs; ++i) convert(mask + i * layout.pixel_stride, run, work.rows + i * classes.count);
      rows_to_tile(static_cast<const A*>(work.rows), classes.count, count, work.stride, classes.count, work.labels,
                   work.stride);
    }
    if (all <= 1 || bad_label >= 0 || params.target_dtype == DType::kBool) return;
    // The first by class, then by pixel.
    int64_t place = 0;
    const auto label = [&] { return mask[place / count * layout.class_stride + place % count * layout.pixel_stride]; };
    while (label() <= 1) ++place;
    bad_label = (sample * classes.count + place / count) * params.pixels + pixel + place % count;
  }
};

// w_y of each pixel, also of those without a label.
template <class A>
void read_class_weights(const Classes<A>& classes, const SegmentationPixels<A>& pixels, int padded, A* out) {
  if (classes.weight == nullptr) {
    for (int i = 0; i < padded; ++i) out[i] = 1;
  } else {
    for (int i = 0; i < padded; ++i) out[i] = classes.weight[pixels.place[i]];
  }
}

// Calls f(T*, classes, workspace) with the element type of the logits.
template <class F>
void with_input_type(const SegmentationParams& params, void* scratch, F f) {
  with_floating_type(params.input_dtype, [&](auto* t) {
    using A = ComputeType<Pointee<decltype(t)>>;
    f(t, classes_of<A>(params), Workspace<A>(scratch, params.classes));
  });
}

}  // namespace
}  // namespace fusedloss::cpu::FUSEDLOSS_LEVEL
