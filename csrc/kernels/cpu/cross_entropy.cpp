// Cross-entropy on the CPU.
//
// Plan. A chunk is a run of pixels of one sample; it goes block by block (kBlock pixels):
//   forward    1. per pixel, over the classes: maximum m, then S = sum exp(z - m) and the sums its labels need
//              2. per pixel: log S, the labelled logit, the loss
//   backward   1. per pixel: label, incoming gradient
//              2. per pixel and class: p = exp(z - m - log S), gradient
// The visits over the classes differ by memory layout (Visit); everything per pixel is shared.
#include <type_traits>

#include "kernels/cpu/convert.h"
#include "kernels/cpu/cross_entropy_row.h"
#include "kernels/cpu/cross_entropy_tile.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/transpose.h"

namespace fusedloss::cpu::FUSEDLOSS_LEVEL {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Which way through memory

enum class Visit {
  kStrided,     // class-strided: the memory is class-major already
  kTransposed,  // class-innermost, few classes: turned into a class-major tile in the cache first
  kRows,        // class-innermost, many classes: vectors along the classes
};

// Above, a row of classes fills its vectors well and a tile would outgrow the L1 cache.
constexpr int kTransposedClasses = 64;

inline Visit choose_visit(const CrossEntropyParams& params) {
  if (params.input_layout.pixel_stride == 1) return Visit::kStrided;
  return params.classes <= kTransposedClasses ? Visit::kTransposed : Visit::kRows;
}

// One vector more than a block, so that the rows of a tile do not fall into the same few cache sets.
template <class A>
constexpr int kTileStride = kBlock<A> + kLanes<A>;

template <class A>
struct alignas(64) Tile {
  A values[kTransposedClasses * kTileStride<A>];
};

inline int64_t offset_of(const LogitLayout& layout, int64_t sample, int64_t pixel) {
  return sample * layout.sample_stride + pixel * layout.pixel_stride;
}

// ---------------------------------------------------------------------------------------------------------------------
// Chunks

// The pixels [first, first + count) of a sample.
struct Chunk {
  int64_t sample;
  int64_t first;
  int64_t count;

  Chunk(const CrossEntropyParams& params, int64_t index) {
    const int64_t size = cross_entropy_chunk_pixels(params.classes);
    const int64_t per_sample = cross_entropy_chunks_per_sample(params.classes, params.pixels);
    sample = index / per_sample;
    first = index % per_sample * size;
    count = params.pixels - first < size ? params.pixels - first : size;
  }
};

template <class A>
Classes<A> classes_of(const CrossEntropyParams& params) {
  const A smoothing = static_cast<A>(params.label_smoothing);
  return {static_cast<int>(params.classes),
          static_cast<const A*>(params.weight),
          {static_cast<A>(1.0 - params.label_smoothing), smoothing / static_cast<A>(params.classes)}};
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward

// The sums over the classes for `count` pixels from (sample, pixel) on.
template <Labels kLabels, class T, class Y>
void visit_forward(const CrossEntropyParams& params, Visit visit, const Classes<ComputeType<T>>& classes,
                   int64_t sample, int64_t pixel, int count, BlockSums<ComputeType<T>>& sums) {
  using A = ComputeType<T>;
  const T* z = static_cast<const T*>(params.input) + offset_of(params.input_layout, sample, pixel);
  const Y* y = nullptr;
  if constexpr (kLabels == Labels::kSoft) {
    y = static_cast<const Y*>(params.target) + offset_of(params.target_layout, sample, pixel);
  }
  switch (visit) {
    case Visit::kStrided:
      forward_tile<kLabels>(classes, z, params.input_layout.class_stride, y, params.target_layout.class_stride, count,
                            sums);
      break;
    case Visit::kTransposed: {
      Tile<A> z_tile;
      rows_to_tile(z, params.input_layout.pixel_stride, count, classes.count, z_tile.values, kTileStride<A>);
      if constexpr (kLabels == Labels::kSoft) {
        Tile<A> y_tile;
        rows_to_tile(y, params.target_layout.pixel_stride, count, classes.count, y_tile.values, kTileStride<A>);
        forward_tile<kLabels>(classes, z_tile.values, kTileStride<A>, y_tile.values, kTileStride<A>, count, sums);
      } else {
        forward_tile<kLabels>(classes, z_tile.values, kTileStride<A>, y, 0, count, sums);
      }
      break;
    }
    case Visit::kRows:
      for (int i = 0; i < count; ++i) {
        forward_row<kLabels>(classes, z + i * params.input_layout.pixel_stride,
                             kLabels == Labels::kSoft ? y + i * params.target_layout.pixel_stride : y, i, sums);
      }
  }
}

// The weight and the logit (relative to the maximum) of each pixel's label; 0 and 0 where it is ignored.
template <class T>
void read_labelled(const CrossEntropyParams& params, const Classes<ComputeType<T>>& classes, int64_t sample,
                   int64_t pixel, int count, const math::Bits<ComputeType<T>>* label, const ComputeType<T>* maximum,
                   ComputeType<T>* label_weight, ComputeType<T>* label_logit) {
  using A = ComputeType<T>;
  const T* z = static_cast<const T*>(params.input) + offset_of(params.input_layout, sample, pixel);
  for (int i = 0; i < count; ++i) {
    const int64_t c = label[i];
    label_weight[i] = c < 0 ? A(0) : classes.weight_of(c);
    label_logit[i] =
        c < 0 ? A(0)
              : load_one(z + i * params.input_layout.pixel_stride + c * params.input_layout.class_stride) - maximum[i];
  }
}

template <Labels kLabels, class T, class Y>
CrossEntropyPartial forward_chunk(const CrossEntropyParams& params, Visit visit, const Classes<ComputeType<T>>& classes,
                                  const Chunk& chunk) {
  using A = ComputeType<T>;
  using V = Vector<A>;
  using B = math::Bits<A>;
  CrossEntropyPartial partial{0.0, 0.0, -1};
  const math::Smoothing<V> smoothing{splat<V>(classes.smoothing.label), splat<V>(classes.smoothing.every)};
  const V weight_sum = splat<V>(static_cast<A>(params.weight_sum));

  for (int64_t done = 0; done < chunk.count; done += kBlock<A>) {
    const int count = static_cast<int>(chunk.count - done < kBlock<A> ? chunk.count - done : kBlock<A>);
    const int64_t pixel = chunk.first + done;
    const int64_t flat = chunk.sample * params.pixels + pixel;

    BlockSums<A> sums;
    visit_forward<kLabels, T, Y>(params, visit, classes, chunk.sample, pixel, count, sums);

    // Lanes past `count` are computed on zeros and thrown away.
    alignas(64) A log_sum[kBlock<A>], loss[kBlock<A>], label_weight[kBlock<A>], label_logit[kBlock<A>];
    alignas(64) B label[kBlock<A>];
    if constexpr (kLabels != Labels::kSoft) {
      const int64_t bad =
          read_labels(params.target, params.target_dtype, flat, count, params.ignore_index, params.classes, label);
      if (partial.bad_label < 0) partial.bad_label = bad;
      read_labelled<T>(params, classes, chunk.sample, pixel, count, label, sums.maximum, label_weight, label_logit);
      for (int i = count; i < (count + kLanes<A> - 1) / kLanes<A> * kLanes<A>; ++i) {
        label[i] = -1;
        label_weight[i] = label_logit[i] = 0;
      }
    }
    V block_loss = {}, block_weight = {};
    for (int i = 0; i < count; i += kLanes<A>) {
      const V log_s = math::log<V>(load(sums.sum + i));
      V a, b;
      if constexpr (kLabels == Labels::kSoft) {
        a = load(sums.a + i);
        b = load(sums.b + i);
      } else {
        const V w = load(label_weight + i);
        const V logit = load(label_logit + i);
        if constexpr (kLabels == Labels::kIndexSmoothed) {
          a = math::index_label_a<V>(smoothing, w, weight_sum);
          b = math::index_label_b<V>(smoothing, w, logit, load(sums.b + i));
        } else {
          a = w;
          b = w * logit;
        }
        block_weight += w;
      }
      V value = math::cross_entropy<V>(a, b, log_s);
      if constexpr (kLabels != Labels::kSoft) {
        const auto labels = *reinterpret_cast<const typename VectorOf<B>::Memory*>(label + i);
        value = labels < B(0) ? V{} : value;
      } else if (i + kLanes<A> > count) {
        for (int lane = count - i; lane < kLanes<A>; ++lane) value[lane] = 0;
      }
      store(log_sum + i, log_s);
      store(loss + i, value);
      block_loss += value;
    }
    partial.loss += sum_lanes<A>(block_loss);
    partial.weight += kLabels == Labels::kSoft ? count : sum_lanes<A>(block_weight);

    if (params.maximum != nullptr) {
      __builtin_memcpy(static_cast<A*>(params.maximum) + flat, sums.maximum, sizeof(A) * count);
      __builtin_memcpy(static_cast<A*>(params.log_sum) + flat, log_sum, sizeof(A) * count);
    }
    if (params.loss != nullptr) write_numbers<A>(params.loss, params.loss_dtype, flat, 1, count, loss);
  }
  return partial;
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward

// Incoming gradient of `count` pixels.
template <class A>
void read_pixel_gradient(const CrossEntropyParams& params, int64_t flat, int count, A* g) {
  const A scale = static_cast<A>(params.gradient_scale);
  if (params.pixel_gradient == nullptr) {
    for (int i = 0; i < count; ++i) g[i] = scale;
    return;
  }
  read_numbers<A>(params.pixel_gradient, params.loss_dtype, flat, 1, count, g);
  for (int i = 0; i < count; ++i) g[i] *= scale;
}

// Everything the visits need to know of the block's pixels. True where an ignored pixel's probabilities are not finite,
// so that its gradient has to be put to zero by hand.
template <Labels kLabels, class A>
bool read_block(const CrossEntropyParams& params, const Classes<A>& classes, int64_t flat, int count,
                BlockGradients<A>& pixels) {
  bool masked = false;
  const A* maximum = static_cast<const A*>(params.maximum) + flat;
  const A* log_sum = static_cast<const A*>(params.log_sum) + flat;
  read_pixel_gradient<A>(params, flat, count, pixels.g);
  for (int i = 0; i < count; ++i) {
    pixels.maximum[i] = maximum[i];
    pixels.log2_sum[i] = log_sum[i] * math::Constants<A>::log2_e;
  }
  if constexpr (kLabels != Labels::kSoft) {
    read_labels(params.target, params.target_dtype, flat, count, params.ignore_index, params.classes, pixels.label);
    const A weight_sum = static_cast<A>(params.weight_sum);
    for (int i = 0; i < count; ++i) {
      const bool ignored = pixels.label[i] < 0;
      const A w = ignored ? A(0) : classes.weight_of(pixels.label[i]);
      const A g = ignored ? A(0) : pixels.g[i];
      const bool finite = log_sum[i] - log_sum[i] == A(0);
      masked |= ignored && !finite;
      pixels.g[i] = g;
      pixels.g_times_a[i] =
          g * (kLabels == Labels::kIndex ? w : math::index_label_a<A>(classes.smoothing, w, weight_sum));
      pixels.g_times_label[i] = g * classes.smoothing.label * w;
    }
  }
  for (int i = count; i < (count + kLanes<A> - 1) / kLanes<A> * kLanes<A>; ++i) {
    pixels.maximum[i] = pixels.log2_sum[i] = pixels.g[i] = pixels.g_times_a[i] = pixels.g_times_label[i] = 0;
    pixels.label[i] = -1;
  }
  return masked;
}

template <Labels kLabels, class T, class Y>
void backward_chunk(const CrossEntropyParams& params, Visit visit, const Classes<ComputeType<T>>& classes,
                    const Chunk& chunk, bool stream) {
  using A = ComputeType<T>;
  for (int64_t done = 0; done < chunk.count; done += kBlock<A>) {
    const int count = static_cast<int>(chunk.count - done < kBlock<A> ? chunk.count - done : kBlock<A>);
    const int64_t pixel = chunk.first + done;
    BlockGradients<A> pixels;
    const bool masked = read_block<kLabels, A>(params, classes, chunk.sample * params.pixels + pixel, count, pixels);

    const T* z = static_cast<const T*>(params.input) + offset_of(params.input_layout, chunk.sample, pixel);
    T* gradient = static_cast<T*>(params.gradient) + offset_of(params.gradient_layout, chunk.sample, pixel);
    const int64_t z_stride = params.input_layout.class_stride;
    const int64_t gradient_stride = params.gradient_layout.class_stride;
    const Y* y = nullptr;
    int64_t y_stride = 0;
    if constexpr (kLabels == Labels::kSoft) {
      y = static_cast<const Y*>(params.target) + offset_of(params.target_layout, chunk.sample, pixel);
      y_stride = params.target_layout.class_stride;
    }
    switch (visit) {
      case Visit::kStrided:
        if (masked) {
          backward_tile<kLabels, kLabels != Labels::kSoft, false>(classes, z, z_stride, y, y_stride, count, pixels,
                                                                  gradient, gradient_stride);
        } else if (stream && streaming_aligned(gradient)) {
          backward_tile<kLabels, false, kCanStream>(classes, z, z_stride, y, y_stride, count, pixels, gradient,
                                                    gradient_stride);
        } else {
          backward_tile<kLabels, false, false>(classes, z, z_stride, y, y_stride, count, pixels, gradient,
                                               gradient_stride);
        }
        break;
      case Visit::kTransposed: {
        Tile<A> tile;  // logits, then their gradient in the same place
        rows_to_tile(z, params.input_layout.pixel_stride, count, classes.count, tile.values, kTileStride<A>);
        if constexpr (kLabels == Labels::kSoft) {
          Tile<A> y_tile;
          rows_to_tile(y, params.target_layout.pixel_stride, count, classes.count, y_tile.values, kTileStride<A>);
          backward_tile<kLabels, false, false>(classes, tile.values, kTileStride<A>, y_tile.values, kTileStride<A>,
                                               count, pixels, tile.values, kTileStride<A>);
        } else {
          backward_tile<kLabels, true, false>(classes, tile.values, kTileStride<A>, y, 0, count, pixels, tile.values,
                                              kTileStride<A>);
        }
        tile_to_rows(tile.values, kTileStride<A>, count, classes.count, gradient, params.gradient_layout.pixel_stride);
        break;
      }
      case Visit::kRows:
        for (int i = 0; i < count; ++i) {
          const T* row = z + i * params.input_layout.pixel_stride;
          const Y* label_row = kLabels == Labels::kSoft ? y + i * params.target_layout.pixel_stride : y;
          T* gradient_row = gradient + i * params.gradient_layout.pixel_stride;
          if (stream && streaming_aligned(gradient_row)) {
            backward_row<kLabels, kCanStream>(classes, row, label_row, i, pixels, gradient_row);
          } else {
            backward_row<kLabels, false>(classes, row, label_row, i, pixels, gradient_row);
          }
        }
    }
  }
  if (stream) streaming_fence();
}

// Gradient of the soft labels. Plain loops: it is asked for rarely, and by label models that cost far more.
template <class T, class Y>
void label_backward_chunk(const CrossEntropyParams& params, const Classes<ComputeType<T>>& classes,
                          const Chunk& chunk) {
  using A = ComputeType<T>;
  const int64_t flat = chunk.sample * params.pixels + chunk.first;
  const T* z = static_cast<const T*>(params.input) + offset_of(params.input_layout, chunk.sample, chunk.first);
  Y* gradient = static_cast<Y*>(params.gradient) + offset_of(params.gradient_layout, chunk.sample, chunk.first);
  const A* maximum = static_cast<const A*>(params.maximum) + flat;
  const A* log_sum = static_cast<const A*>(params.log_sum) + flat;

  for (int64_t done = 0; done < chunk.count; done += kBlock<A>) {
    const int count = static_cast<int>(chunk.count - done < kBlock<A> ? chunk.count - done : kBlock<A>);
    alignas(64) A g[kBlock<A>];
    read_pixel_gradient<A>(params, flat + done, count, g);
    const auto one = [&](int64_t i, int64_t c) {
      const A logit = load_one(z + i * params.input_layout.pixel_stride + c * params.input_layout.class_stride);
      const A value = math::cross_entropy_label_gradient<A>(g[i - done], classes.smoothing.label * classes.weight_of(c),
                                                            logit, maximum[i], log_sum[i]);
      store_one(gradient + i * params.gradient_layout.pixel_stride + c * params.gradient_layout.class_stride, value);
    };
    if (params.input_layout.pixel_stride == 1) {
      for (int64_t c = 0; c < params.classes; ++c) {
        for (int64_t i = done; i < done + count; ++i) one(i, c);
      }
    } else {
      for (int64_t i = done; i < done + count; ++i) {
        for (int64_t c = 0; c < params.classes; ++c) one(i, c);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// From run-time types to the templates above

// Calls f(labels, T*, Y*) with labels a compile-time constant.
template <class F>
FUSEDLOSS_HOST_DEVICE void with_types(const CrossEntropyParams& params, F f) {
  with_floating_type(params.input_dtype, [&](auto* t) {
    if (!params.soft_labels) {
      if (params.label_smoothing != 0.0) {
        f(std::integral_constant<Labels, Labels::kIndexSmoothed>{}, t, t);
      } else {
        f(std::integral_constant<Labels, Labels::kIndex>{}, t, t);
      }
    } else if (params.target_dtype == params.input_dtype) {
      f(std::integral_constant<Labels, Labels::kSoft>{}, t, t);
    } else {
      if constexpr (sizeof(*t) == 2)
        f(std::integral_constant<Labels, Labels::kSoft>{}, t, static_cast<float*>(nullptr));
    }
  });
}

template <class P>
using Pointee = std::remove_pointer_t<P>;

}  // namespace

void cross_entropy_forward(const CrossEntropyParams& params, int64_t begin, int64_t end,
                           CrossEntropyPartial* partials) {
  const Visit visit = choose_visit(params);
  with_types(params, [&](auto labels, auto* t, auto* y) {
    using T = Pointee<decltype(t)>;
    const auto classes = classes_of<ComputeType<T>>(params);
    for (int64_t i = begin; i < end; ++i) {
      partials[i] = forward_chunk<labels(), T, Pointee<decltype(y)>>(params, visit, classes, Chunk(params, i));
    }
  });
}

void cross_entropy_backward(const CrossEntropyParams& params, int64_t begin, int64_t end) {
  const Visit visit = choose_visit(params);
  with_types(params, [&](auto labels, auto* t, auto* y) {
    using T = Pointee<decltype(t)>;
    using A = ComputeType<T>;
    // A small gradient is better left in the cache for whoever reads it next.
    const int64_t bytes = params.samples * params.classes * params.pixels * static_cast<int64_t>(sizeof(T));
    const bool rows_aligned =
        visit == Visit::kRows || params.gradient_layout.class_stride * sizeof(T) % (sizeof(T) * kLanes<A>) == 0;
    const bool stream = kCanStream && bytes >= kStreamingBytes && rows_aligned;
    const auto classes = classes_of<A>(params);
    for (int64_t i = begin; i < end; ++i) {
      backward_chunk<labels(), T, Pointee<decltype(y)>>(params, visit, classes, Chunk(params, i), stream);
    }
  });
}

void cross_entropy_label_backward(const CrossEntropyParams& params, int64_t begin, int64_t end) {
  with_types(params, [&](auto labels, auto* t, auto* y) {
    if constexpr (labels() == Labels::kSoft) {
      using T = Pointee<decltype(t)>;
      const auto classes = classes_of<ComputeType<T>>(params);
      for (int64_t i = begin; i < end; ++i) {
        label_backward_chunk<T, Pointee<decltype(y)>>(params, classes, Chunk(params, i));
      }
    }
  });
}

}  // namespace fusedloss::cpu::FUSEDLOSS_LEVEL
