// A thread's pixels and the logits of their classes: what forward and backward share.
//
// A block owns a chunk of pixels of one sample and goes through it tile by tile. A thread owns kVector neighboring
// pixels of a tile and visits all their classes, more than once; where the logits of a tile fit into shared memory they
// come there first, so that device memory is read once:
//
//   kColumns  class-strided logits: each thread copies its own pixels, asynchronously, and waits for nobody
//   kRows     class-innermost logits: a warp copies whole pixels, so that neighbors in memory are read together
//   kDirect   no tile: where it would not fit, or where one visit is enough
#pragma once

#include <type_traits>

#include "kernels/cuda/bad_label.h"
#include "kernels/cuda/numbers.h"
#include "kernels/cuda/segmentation.h"
#include "math/activation.h"
#include "math/segmentation.h"

namespace fusedloss::cuda {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / gpu::kWarp;

enum class Tile { kColumns, kRows, kDirect };

// From pixel to pixel of a kRows tile, in elements: an odd number of 4-byte words (two of 8 bytes), so that neighboring
// threads read from different banks.
template <class T>
FUSEDLOSS_DEVICE int64_t row_pitch(int64_t classes) {
  constexpr int64_t per_word = sizeof(T) < 4 ? 4 / sizeof(T) : 1;
  const int64_t words = (classes + per_word - 1) / per_word;
  return (words | 1) * per_word;
}

// Where a block's chunk lies.
struct ChunkPlace {
  int64_t sample;
  int64_t group;
  int64_t first;  // pixel of the sample
  int64_t count;
};

FUSEDLOSS_DEVICE ChunkPlace chunk_place(const SegmentationParams& params, const Chunks& chunks, int64_t index) {
  ChunkPlace place;
  place.sample = index / chunks.per_sample;
  place.group = params.groups > 1 ? place.sample : 0;
  place.first = index % chunks.per_sample * chunks.pixels;
  place.count = params.pixels - place.first < chunks.pixels ? params.pixels - place.first : chunks.pixels;
  return place;
}

FUSEDLOSS_DEVICE int64_t offset_of(const LogitLayout& layout, int64_t sample, int64_t pixel) {
  return sample * layout.sample_stride + pixel * layout.pixel_stride;
}

// What is said of a thread's pixels.
template <class A, int kVector>
struct ThreadPixels {
  bool inside;         // in the chunk: all of them or none
  int64_t pixel;       // the first, in the sample
  int64_t flat;        // the first, in (N, S)
  int label[kVector];  // class, or -1 for none; class indices only
  A weight[kVector];   // m; 0 where ignored, where the label is bad, and outside
  bool bad[kVector];   // a label outside its range
};

// The numbers of a class of a thread's pixels: from the tile, or where they lie.
template <class T, int kVector>
struct Logits {
  const T* at;  // of class 0
  int64_t class_stride;

  FUSEDLOSS_DEVICE Pack<T, kVector> load(int64_t c) const { return load_pack<T, kVector>(at + c * class_stride); }
};

template <class A>
FUSEDLOSS_DEVICE A class_weight(const SegmentationParams& params, int64_t c) {
  return params.weight == nullptr ? A(1) : static_cast<const A*>(params.weight)[c];
}

// Label y_c of one pixel, 0 where m is.
template <class A, int kVector>
FUSEDLOSS_DEVICE A label_of(const SegmentationParams& params, const ThreadPixels<A, kVector>& pixels, int v,
                            int64_t target_offset, int64_t c) {
  if (!params.soft_labels) return pixels.label[v] == c ? A(1) : A(0);
  if (pixels.weight[v] == A(0)) return A(0);
  return load_number<A>(params.target, params.target_dtype,
                        target_offset + v * params.target_layout.pixel_stride + c * params.target_layout.class_stride);
}

template <class A>
FUSEDLOSS_DEVICE math::Smoothing<A> smoothing_of(const SegmentationParams& params) {
  return {static_cast<A>(1.0 - params.label_smoothing),
          static_cast<A>(params.label_smoothing) / static_cast<A>(params.classes)};
}

// What is said of one pixel.
template <class A>
struct PixelState {
  int label = -1;    // class, or -1 for none; class indices only
  A weight = 0;      // m; 0 where ignored and where the label is bad
  bool bad = false;  // a label outside its range
};

// record: nullptr where bad labels have been written down already.
template <class A>
FUSEDLOSS_DEVICE PixelState<A> read_pixel(const SegmentationParams& params, int64_t sample, int64_t pixel,
                                          BadLabelRecord* record) {
  PixelState<A> state;
  const int64_t flat = sample * params.pixels + pixel;
  state.weight =
      params.pixel_weight == nullptr ? A(1) : load_number<A>(params.pixel_weight, params.pixel_weight_dtype, flat);
  if (!params.soft_labels) {
    const int64_t label = load_label(params.target, params.target_dtype, flat);
    const bool ignored = label == params.ignore_index;
    const bool known = static_cast<uint64_t>(label) < static_cast<uint64_t>(params.classes + params.first_label);
    if (!ignored && known) state.label = static_cast<int>(label - params.first_label);
    if (ignored || !known) state.weight = A(0);
    if (!ignored && !known) {
      state.bad = true;
      record_bad_label(record, label, flat, params.classes + params.first_label);
    }
  } else if (params.target_dtype == DType::kUInt8) {
    // A mask: all classes have to be looked at before one of them may be believed.
    const int64_t at = offset_of(params.target_layout, sample, pixel);
    for (int64_t c = 0; c < params.classes; ++c) {
      const int value = static_cast<const uint8_t*>(params.target)[at + c * params.target_layout.class_stride];
      if (value > 1) {
        state.bad = true;
        state.weight = A(0);
        const int64_t image = flat / params.image_pixels;
        record_bad_label(record, value, (image * params.classes + c) * params.image_pixels + flat % params.image_pixels,
                         2);
        break;
      }
    }
  }
  return state;
}

// record: as above.
template <class A, int kVector>
FUSEDLOSS_DEVICE ThreadPixels<A, kVector> read_pixels(const SegmentationParams& params, const ChunkPlace& chunk,
                                                      int64_t tile_first, BadLabelRecord* record) {
  ThreadPixels<A, kVector> pixels;
  const int64_t in_chunk = tile_first + static_cast<int64_t>(gpu::thread()) * kVector;
  pixels.inside = in_chunk < chunk.count;
  pixels.pixel = chunk.first + in_chunk;
  pixels.flat = chunk.sample * params.pixels + pixels.pixel;
  FUSEDLOSS_UNROLL
  for (int v = 0; v < kVector; ++v) {
    PixelState<A> state;
    if (pixels.inside) state = read_pixel<A>(params, chunk.sample, pixels.pixel + v, record);
    pixels.label[v] = state.label;
    pixels.weight[v] = state.weight;
    pixels.bad[v] = state.bad;
  }
  return pixels;
}

// Element `at` of the incoming gradient times a scale; exactly none where it is 0, also if the scale is not finite.
template <class A>
FUSEDLOSS_DEVICE A scaled_grad(const BackwardParams& params, int64_t at, int k) {
  const A g = load_number<A>(params.grad, params.grad_dtype, at);
  if (g == A(0) || params.scales == nullptr) return g;
  return g * static_cast<const A*>(params.scales)[k];
}

// Incoming gradients of the cross-entropy and the squared error of a pixel, times their scales.
template <class A>
struct PixelScales {
  A cross_entropy;
  A squared_error;
};

template <class A>
FUSEDLOSS_DEVICE PixelScales<A> pixel_scales(const BackwardParams& params, int64_t flat) {
  PixelScales<A> scales{0, 0};
  const int64_t at = params.grad_of_pixels ? flat : 0;
  if (params.cross_entropy) scales.cross_entropy = scaled_grad<A>(params, at + params.grad_of_sums[0], 0);
  if (params.squared_error) scales.squared_error = scaled_grad<A>(params, at + params.grad_of_sums[1], 1);
  return scales;
}

// Brings a tile's logits to shared memory. kRows: all threads of the block have to come, and have to have read what was
// there before.
template <class T, int kVector, Tile kTile, class A>
FUSEDLOSS_DEVICE Logits<T, kVector> load_tile(const SegmentationParams& params, const ChunkPlace& chunk,
                                              int64_t tile_first, const ThreadPixels<A, kVector>& pixels, T* tile) {
  const T* input = static_cast<const T*>(params.input);
  const LogitLayout& layout = params.input_layout;
  if constexpr (kTile == Tile::kDirect) {
    return {input + offset_of(layout, chunk.sample, pixels.pixel), layout.class_stride};
  } else if constexpr (kTile == Tile::kColumns) {
    constexpr int64_t pitch = static_cast<int64_t>(kThreads) * kVector;
    T* own = tile + gpu::thread() * kVector;
    if (pixels.inside) {
      const T* from = input + offset_of(layout, chunk.sample, pixels.pixel);
      for (int64_t c = 0; c < params.classes; ++c) {
        gpu::copy_async<sizeof(T) * kVector>(own + c * pitch, from + c * layout.class_stride);
      }
      gpu::wait_for_copies();
    }
    return {own, pitch};
  } else {
    const int64_t pitch = row_pitch<T>(params.classes);
    const int64_t left = chunk.count - tile_first;
    const int count = static_cast<int>(left < kThreads ? left : kThreads);
    const int lane = gpu::thread() % gpu::kWarp;
    const T* from = input + offset_of(layout, chunk.sample, chunk.first + tile_first);
    for (int p = gpu::thread() / gpu::kWarp; p < count; p += kWarps) {
      for (int64_t c = lane; c < params.classes; c += gpu::kWarp) {
        tile[p * pitch + c] = from[p * layout.pixel_stride + c];
      }
    }
    gpu::sync_block();
    return {tile + gpu::thread() * pitch, 1};
  }
}

// A class of a thread's pixels, zeros outside the chunk.
template <class T, int kVector, class A>
FUSEDLOSS_DEVICE void read_class(const Logits<T, kVector>& logits, const ThreadPixels<A, kVector>& pixels, int64_t c,
                                 A (&z)[kVector]) {
  if (pixels.inside) {
    const Pack<T, kVector> pack = logits.load(c);
    FUSEDLOSS_UNROLL
    for (int v = 0; v < kVector; ++v) z[v] = to_compute(pack.values[v]);
  } else {
    FUSEDLOSS_UNROLL
    for (int v = 0; v < kVector; ++v) z[v] = A(0);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Which kernel, and with how much shared memory

struct Plan {
  Tile tile;
  int vector;          // pixels of a thread
  int64_t tile_bytes;  // 0 for kDirect
};

// Bytes of a tile in which each thread has `vector` pixels.
inline int64_t tile_bytes(Tile tile, int64_t classes, int vector, int64_t element_bytes) {
  if (tile == Tile::kDirect) return 0;
  if (tile == Tile::kColumns) return classes * kThreads * vector * element_bytes;
  const int64_t per_word = element_bytes < 4 ? 4 / element_bytes : 1;
  return kThreads * (((classes + per_word - 1) / per_word | 1) * per_word) * element_bytes;
}

// other_bytes: of shared memory that the kernel needs beside the tile. one_visit: the logits are read once anyway.
// gradient: nullptr in the forward.
inline Plan plan_of(const SegmentationParams& params, int64_t other_bytes, bool one_visit, const void* gradient) {
  const int64_t element = bytes_of(params.input_dtype);
  const int64_t limit = gpu::shared_memory_limit() - other_bytes;
  // Two blocks of a multiprocessor (228 KB on Hopper), so that one computes while the other loads.
  const int64_t wanted = limit < (int64_t{100} << 10) ? limit : int64_t{100} << 10;
  if (params.input_layout.pixel_stride != 1) {
    const int64_t bytes = tile_bytes(Tile::kRows, params.classes, 1, element);
    return bytes <= limit ? Plan{Tile::kRows, 1, bytes} : Plan{Tile::kDirect, 1, 0};
  }
  // Widest access that every row of a class and every pixel of a thread is aligned to.
  const auto aligned = [&](const void* data, const LogitLayout& layout, int64_t vector) {
    if (vector > 1 && layout.pixel_stride != 1) return false;
    return reinterpret_cast<uintptr_t>(data) % (vector * element) == 0 && params.pixels % vector == 0 &&
           layout.class_stride % vector == 0 && (params.samples == 1 || layout.sample_stride % vector == 0);
  };
  const auto fits = [&](int64_t vector) {
    return aligned(params.input, params.input_layout, vector) &&
           (gradient == nullptr || aligned(gradient, params.gradient_layout, vector));
  };
  const int64_t wide = 16 / element;
  const int64_t narrow = element < 4 ? 4 / element : 1;
  if (one_visit) return {Tile::kDirect, fits(wide) ? static_cast<int>(wide) : 1, 0};
  for (const int64_t room : {wanted, limit}) {
    for (const int64_t vector : {wide, narrow}) {
      const int64_t bytes = tile_bytes(Tile::kColumns, params.classes, static_cast<int>(vector), element);
      if (bytes <= room && fits(vector)) return {Tile::kColumns, static_cast<int>(vector), bytes};
    }
  }
  return {Tile::kDirect, fits(wide) ? static_cast<int>(wide) : 1, 0};
}

// Calls f(TypeName<T>, kVector, kTile, kSoftmax), the last three as integral constants, for a plan's kernel.
template <class T, class F>
int with_kernel_of(const SegmentationParams& params, const Plan& plan, F f) {
  constexpr int kWide = 16 / sizeof(T);
  constexpr int kNarrow = sizeof(T) < 4 ? 4 / sizeof(T) : 1;
  const auto with_activation = [&](auto vector, auto tile) {
    const TypeName<T> type;
    return params.activation == Activation::kSoftmax ? f(type, vector, tile, std::true_type{})
                                                     : f(type, vector, tile, std::false_type{});
  };
  using Columns = std::integral_constant<Tile, Tile::kColumns>;
  using Direct = std::integral_constant<Tile, Tile::kDirect>;
  using Rows = std::integral_constant<Tile, Tile::kRows>;
  if (plan.tile == Tile::kRows) return with_activation(std::integral_constant<int, 1>{}, Rows{});
  if (plan.tile == Tile::kColumns) {
    return plan.vector == kWide ? with_activation(std::integral_constant<int, kWide>{}, Columns{})
                                : with_activation(std::integral_constant<int, kNarrow>{}, Columns{});
  }
  return plan.vector == kWide ? with_activation(std::integral_constant<int, kWide>{}, Direct{})
                              : with_activation(std::integral_constant<int, 1>{}, Direct{});
}

template <class F>
int with_kernel(const SegmentationParams& params, const Plan& plan, F f) {
  return with_type(params.input_dtype,
                   [&](auto type) { return with_kernel_of<typename decltype(type)::Type>(params, plan, f); });
}

}  // namespace fusedloss::cuda
