// The visits to a class-major tile: class c of pixel i is at z[c * z_stride + i], so a vector holds neighboring pixels.
//
// A tile is one block of pixels, eight vectors wide: 512 bytes of each class row with AVX-512. So much of a row keeps
// the hardware's prefetchers and the page table cache content also for 150 class rows; the second visit to the tile
// then finds it in the L1 or L2 cache (docs/performance.md has the widths that were tried).
#pragma once

#include "kernels/cpu/simd.h"
#include "kernels/cross_entropy.h"
#include "math/cross_entropy.h"

namespace fusedloss::cpu::FUSEDLOSS_LEVEL {
namespace {

template <class A>
constexpr int kBlock = 8 * kLanes<A>;

// From class to class in a tile of our own: one vector more than a block, so that its rows do not fall into the same
// few cache sets.
template <class A>
constexpr int kTileStride = kBlock<A> + kLanes<A>;

// Which sum over the classes the labels need beside sum exp: none, the smoothing's, or their own.
enum class Labels { kIndex, kIndexSmoothed, kSoft };

// What all pixels share.
template <class A>
struct Classes {
  int count;        // C
  const A* weight;  // (C,), or nullptr for ones
  math::Smoothing<A> smoothing;

  FUSEDLOSS_HOST_DEVICE A weight_of(int64_t c) const { return weight == nullptr ? A(1) : weight[c]; }
};

// Forward results of a block; math/cross_entropy.h says what they are.
template <class A>
struct alignas(64) BlockSums {
  A maximum[kBlock<A>];
  A sum[kBlock<A>];
  A a[kBlock<A>];  // soft labels only
  A b[kBlock<A>];  // kIndexSmoothed: sum_c w_c (z_c - m); kSoft: b; else not written
};

// What the backward needs to know of a block's pixels. G is the incoming gradient, 0 where the label is ignored.
template <class A>
struct alignas(64) BlockGradients {
  A maximum[kBlock<A>];
  A inverse_sum[kBlock<A>];         // 1 / S
  A g[kBlock<A>];                   // G
  A g_times_a_over_sum[kBlock<A>];  // G a / S; index labels only (soft labels sum a over their classes)
  A g_times_label[kBlock<A>];       // G (1 - e) w_y; index labels only
  math::Bits<A> label[kBlock<A>];   // class, or -1 where ignored; index labels only
};

// Where the logits of a later block lie. A visit asks for as many of them as it reads itself, a vector at a time.
// Of class-strided logits a block has half a kilobyte of a class and then goes on to the next class, a megabyte away:
// too short a run for the hardware's prefetcher. Of class-innermost ones the classes say only when, not where.
template <class T>
struct Ahead {
  const T* logits;
  int64_t stride;  // from class to class

  // z: the logits of this block, `count` pixels.
  FUSEDLOSS_HOST_DEVICE Ahead(const T* z, const LogitLayout& layout, int count)
      : logits(z + kBlocksAhead * count * layout.pixel_stride),
        stride(layout.pixel_stride == 1 ? layout.class_stride : count) {}

  FUSEDLOSS_HOST_DEVICE void ask(int64_t c, int i) const { ask_for(logits + c * stride + i); }
};

// `kVectors` vectors of pixels from pixel `i` on; with kPartial one vector whose first `count` lanes are pixels.
// With kKeep the exponentials exp(z - m) go into `kept`, class-major with kept_stride (may be z itself), for what else
// is made of them.
template <Labels kLabels, bool kKeep, int kVectors, bool kPartial, class T, class Y, class M>
FUSEDLOSS_HOST_DEVICE void forward_vectors(const Classes<ComputeType<T>>& classes, const T* z, int64_t z_stride,
                                           const Y* y, int64_t y_stride, int i, int count,
                                           BlockSums<ComputeType<T>>& out, ComputeType<T>* kept, int64_t kept_stride,
                                           const Ahead<M>& ahead) {
  using A = ComputeType<T>;
  using V = Vector<A>;
  constexpr int lanes = kLanes<A>;
  const auto read = [&](const auto* p) {
    using P = std::remove_const_t<std::remove_pointer_t<decltype(p)>>;
    if constexpr (kPartial)
      return load_partial<P>(p, count, 0);
    else
      return load<P>(p);
  };

  V maximum[kVectors], sum[kVectors], a[kVectors], b[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    // Not -infinity: a class of -infinity must give exp(-infinity) = 0, not exp(NaN).
    maximum[v] = splat<V>(math::Constants<A>::lowest);
    sum[v] = a[v] = b[v] = V{};
  }
  for (int c = 0; c < classes.count; ++c) {
    const T* row = z + c * z_stride + i;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) maximum[v] = math::maximum<V>(read(row + v * lanes), maximum[v]);
  }
  for (int c = 0; c < classes.count; ++c) {
    const T* row = z + c * z_stride + i;
    const A weight = kLabels == Labels::kIndex ? A(1) : classes.weight_of(c);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      ahead.ask(c, i + v * lanes);
      const V logit = read(row + v * lanes);
      const V exponential = math::exp_shifted<V>(logit, maximum[v]);
      sum[v] += exponential;
      if constexpr (kKeep) store<A>(kept + c * kept_stride + i + v * lanes, exponential);
      if constexpr (kLabels == Labels::kIndexSmoothed) b[v] += weight * (logit - maximum[v]);
      if constexpr (kLabels == Labels::kSoft) {
        const V label = read(y + c * y_stride + i + v * lanes);
        const V label_weight = math::soft_label_weight<V>(classes.smoothing, weight, label);
        a[v] += label_weight;
        b[v] += label_weight * (logit - maximum[v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    store(out.maximum + i + v * lanes, maximum[v]);
    store(out.sum + i + v * lanes, sum[v]);
    if constexpr (kLabels == Labels::kSoft) store(out.a + i + v * lanes, a[v]);
    if constexpr (kLabels != Labels::kIndex) store(out.b + i + v * lanes, b[v]);
  }
}

// Calls visit(vectors, partial, first pixel, count) until `count` pixels are done; the first two are compile-time
// constants (std::integral_constant). A whole block goes in steps of kVectors, a tail vector by vector.
template <class A, int kVectors, class Visit>
FUSEDLOSS_HOST_DEVICE void for_vectors(int count, Visit visit) {
  int i = 0;
  for (; i + kVectors * kLanes<A> <= count; i += kVectors * kLanes<A>) {
    visit(std::integral_constant<int, kVectors>{}, std::false_type{}, i, kVectors * kLanes<A>);
  }
  for (; i + kLanes<A> <= count; i += kLanes<A>) {
    visit(std::integral_constant<int, 1>{}, std::false_type{}, i, kLanes<A>);
  }
  if (i < count) visit(std::integral_constant<int, 1>{}, std::true_type{}, i, count - i);
}

// Calls visit(class, pixels) for each class among the labels of a vector of pixels; `pixels` is true where it is the
// label. Neighboring pixels mostly have the same one (in CamVid, 1.2 classes in 16 pixels), and what is to be done
// with the row of a class is done with whole vectors, where a loop over the pixels takes a dozen instructions for each.
template <class A, class Visit>
FUSEDLOSS_HOST_DEVICE void for_labels(const math::Bits<A>* labels, Visit visit) {
  using B = math::Bits<Vector<A>>;
  const B label = *reinterpret_cast<const typename VectorOf<math::Bits<A>>::Memory*>(labels);
  for (uint32_t left = (1u << kLanes<A>)-1; left != 0;) {
    const math::Bits<A> c = labels[__builtin_ctz(left)];
    visit(static_cast<int64_t>(c), label == c);
    left &= ~equal_lanes<A>(label, B{} + c);
  }
}

// What read(c) gives for the class c that each of a vector of pixels is labelled with.
template <class A, class Read>
FUSEDLOSS_HOST_DEVICE Vector<A> of_labels(const math::Bits<A>* labels, Read read) {
  Vector<A> value = {};
  for_labels<A>(labels, [&](int64_t c, auto labelled) { value = labelled ? read(c) : value; });
  return value;
}

template <Labels kLabels, bool kKeep, class T, class Y, class M>
void forward_tile(const Classes<ComputeType<T>>& classes, const T* z, int64_t z_stride, const Y* y, int64_t y_stride,
                  int count, BlockSums<ComputeType<T>>& out, ComputeType<T>* kept, int64_t kept_stride,
                  const Ahead<M>& ahead) {
  // Two (index) to four accumulators a vector have to fit in the registers.
  constexpr int vectors = kLabels == Labels::kIndex ? 8 : 4;
  for_vectors<ComputeType<T>, vectors>(count, [&](auto v, auto partial, int i, int n) {
    forward_vectors<kLabels, kKeep, v(), partial()>(classes, z, z_stride, y, y_stride, i, n, out, kept, kept_stride,
                                                    ahead);
  });
}

// Writes kVectors vectors of a row of the gradient; of a partial one the first `left` numbers. kPlain: of store_two(),
// which writes whole pairs of vectors.
template <bool kStream, bool kPartial, bool kPlain, class T, int kVectors>
FUSEDLOSS_HOST_DEVICE void write_gradient(T* to, const Vector<ComputeType<T>> (&value)[kVectors], int left) {
  constexpr int lanes = kLanes<ComputeType<T>>;
  if constexpr (kPartial) {
    store_partial<T>(to, value[0], left);
  } else {
    constexpr int pairs = kVectors / 2 * 2;
#pragma GCC unroll 4
    for (int v = 0; v < pairs; v += 2) store_two<T, kStream, kPlain>(to + v * lanes, value[v], value[v + 1]);
    if constexpr (kVectors == pairs) return;
    if constexpr (kStream) {
      store_streaming<T>(to + pairs * lanes, value[kVectors - 1]);
    } else {
      store<T>(to + pairs * lanes, value[kVectors - 1]);
    }
  }
}

// The gradient of the logits. Z: what is read: logits (of type T), or with kKept their exponentials, kept by the
// forward. kFinite: no NaN and no infinity goes in; otherwise an ignored pixel's probabilities may be NaN, and its
// gradient is put to exact zeros. (Of soft labels no pixel is ignored, and nothing is known.)
template <Labels kLabels, bool kKept, bool kFinite, bool kStream, int kVectors, bool kPartial, class Z, class Y,
          class T>
FUSEDLOSS_HOST_DEVICE void backward_vectors(const Classes<ComputeType<T>>& classes, const Z* z, int64_t z_stride,
                                            const Y* y, int64_t y_stride, int i, int count,
                                            const BlockGradients<ComputeType<T>>& pixels, T* gradient,
                                            int64_t gradient_stride) {
  using A = ComputeType<T>;
  using V = Vector<A>;
  using Label = math::Bits<V>;
  constexpr int lanes = kLanes<A>;
  constexpr bool masked = kLabels != Labels::kSoft && !kFinite;
  const auto read = [&](const auto* p) {
    using P = std::remove_const_t<std::remove_pointer_t<decltype(p)>>;
    if constexpr (kPartial)
      return load_partial<P>(p, count, 0);
    else
      return load<P>(p);
  };

  V maximum[kVectors], g[kVectors], g_times_a_over_sum[kVectors], g_times_label[kVectors];
  Label label[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const int at = i + v * lanes;
    if constexpr (!kKept) maximum[v] = load(pixels.maximum + at);
    if constexpr (kLabels != Labels::kIndex) g[v] = load(pixels.g + at);
    if constexpr (kLabels != Labels::kSoft) {
      g_times_a_over_sum[v] = load(pixels.g_times_a_over_sum + at);
      g_times_label[v] = load(pixels.g_times_label + at);
      label[v] = *reinterpret_cast<const typename VectorOf<math::Bits<A>>::Memory*>(pixels.label + at);
    }
  }
  if constexpr (kLabels == Labels::kSoft) {
    V a[kVectors] = {};
    for (int c = 0; c < classes.count; ++c) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const V y_c = read(y + c * y_stride + i + v * lanes);
        a[v] += math::soft_label_weight<V>(classes.smoothing, classes.weight_of(c), y_c);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) g_times_a_over_sum[v] = g[v] * a[v] * load(pixels.inverse_sum + i + v * lanes);
  }
  for (int c = 0; c < classes.count; ++c) {
    const Z* row = z + c * z_stride + i;
    T* gradient_row = gradient + c * gradient_stride + i;
    const A weight = kLabels == Labels::kIndex ? A(0) : classes.weight_of(c);
    V value[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      V exponential = read(row + v * lanes);
      if constexpr (!kKept) exponential = math::exp_shifted<V>(exponential, maximum[v]);
      V g_times_label_weight;
      if constexpr (kLabels == Labels::kSoft) {
        const V y_c = read(y + c * y_stride + i + v * lanes);
        g_times_label_weight = g[v] * math::soft_label_weight<V>(classes.smoothing, weight, y_c);
      } else {
        g_times_label_weight = label[v] == math::Bits<A>(c) ? g_times_label[v] : V{};
        if constexpr (kLabels == Labels::kIndexSmoothed) {
          g_times_label_weight += g[v] * (classes.smoothing.every * weight);
        }
      }
      value[v] = math::cross_entropy_logit_gradient<V>(g_times_a_over_sum[v], exponential, g_times_label_weight);
      if constexpr (masked) value[v] = label[v] < math::Bits<A>(0) ? V{} : value[v];
    }
    write_gradient<kStream, kPartial, kFinite>(gradient_row, value, count);
  }
}

template <Labels kLabels, bool kKept, bool kFinite, bool kStream, class Z, class Y, class T>
void backward_tile(const Classes<ComputeType<T>>& classes, const Z* z, int64_t z_stride, const Y* y, int64_t y_stride,
                   int count, const BlockGradients<ComputeType<T>>& pixels, T* gradient, int64_t gradient_stride) {
  for_vectors<ComputeType<T>, 4>(count, [&](auto v, auto partial, int i, int n) {
    backward_vectors<kLabels, kKept, kFinite, kStream, v(), partial()>(classes, z, z_stride, y, y_stride, i, n, pixels,
                                                                       gradient, gradient_stride);
  });
}

}  // namespace
}  // namespace fusedloss::cpu::FUSEDLOSS_LEVEL
