// Cross-entropy's visits to a class-major tile (tile.h).
#pragma once

#include "kernels/cpu/tile.h"
#include "math/cross_entropy.h"

namespace fusedloss::cpu::FUSEDLOSS_LEVEL {
namespace {

// Which sum over the classes the labels need beside sum exp: none, the smoothing's, or their own.
enum class Labels { kIndex, kIndexSmoothed, kSoft };

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

// `kVectors` vectors of pixels from pixel `i` on; with kPartial one vector whose first `count` lanes are pixels.
// With kKeep the exponentials exp(z - m) go into `kept`, class-major with kept_stride (may be z itself), for what else
// is made of them.
template <Labels kLabels, bool kKeep, int kVectors, bool kPartial, class T, class Y, class M>
FUSEDLOSS_HOST_DEVICE void forward_vectors(const Classes<ComputeType<T>>& classes, const T* z, int64_t z_stride,
                                           const Y* y, int64_t y_stride, int i, int count,
                                           BlockSums<ComputeType<T>>& out, ComputeType<T>* kept, int64_t kept_stride,
                                           const Ahead<M>& ahead, const Outgoing<M>& outgoing) {
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
    if constexpr (kKeep && !kPartial) outgoing.template send<kVectors>(c, i);
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

template <Labels kLabels, bool kKeep, class T, class Y, class M>
void forward_tile(const Classes<ComputeType<T>>& classes, const T* z, int64_t z_stride, const Y* y, int64_t y_stride,
                  int count, BlockSums<ComputeType<T>>& out, ComputeType<T>* kept, int64_t kept_stride,
                  const Ahead<M>& ahead, const Outgoing<M>& outgoing) {
  // Two (index) to four accumulators a vector have to fit in the registers.
  constexpr int vectors = kLabels == Labels::kIndex ? 8 : 4;
  for_vectors<ComputeType<T>, vectors>(count, [&](auto v, auto partial, int i, int n) {
    forward_vectors<kLabels, kKeep, v(), partial()>(classes, z, z_stride, y, y_stride, i, n, out, kept, kept_stride,
                                                    ahead, outgoing);
  });
}

// The gradient of the logits of kVectors vectors of pixels from pixel i on; with kPartial of one vector whose first
// `left` lanes are pixels. Z: what is read: logits, or with kKept their exponentials, kept by the forward. kFinite: no
// NaN and no infinity goes in; otherwise an ignored pixel's probabilities may be NaN, and its gradient is put to exact
// zeros. (Of soft labels no pixel is ignored, and nothing is known.)
template <Labels kLabels, bool kKept, bool kFinite, int kVectors, bool kPartial, class Z, class Y>
class LogitGradient {
 public:
  using A = ComputeType<Z>;
  using V = Vector<A>;

  FUSEDLOSS_HOST_DEVICE LogitGradient(const Classes<A>& classes, const Z* z, int64_t z_stride, const Y* y,
                                      int64_t y_stride, int i, int left, const BlockGradients<A>& pixels)
      : classes_(classes),
        z_(z + i),
        z_stride_(z_stride),
        y_(kLabels == Labels::kSoft ? y + i : y),
        y_stride_(y_stride),
        left_(left) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int at = i + v * kLanes<A>;
      if constexpr (!kKept) maximum_[v] = load(pixels.maximum + at);
      if constexpr (kLabels != Labels::kIndex) g_[v] = load(pixels.g + at);
      if constexpr (kLabels != Labels::kSoft) {
        g_times_a_over_sum_[v] = load(pixels.g_times_a_over_sum + at);
        g_times_label_[v] = load(pixels.g_times_label + at);
        label_[v] = load_labels<A>(pixels.label + at);
      }
    }
    if constexpr (kLabels == Labels::kSoft) {
      V a[kVectors] = {};
      for (int64_t c = 0; c < classes.count; ++c) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          a[v] += math::soft_label_weight<V>(classes.smoothing, classes.weight_of(c), read(y_ + c * y_stride, v));
        }
      }
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        g_times_a_over_sum_[v] = g_[v] * a[v] * load(pixels.inverse_sum + i + v * kLanes<A>);
      }
    }
  }

  FUSEDLOSS_HOST_DEVICE void of_class(int64_t c, V (&value)[kVectors]) const {
    const A weight = kLabels == Labels::kIndex ? A(0) : classes_.weight_of(c);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      V exponential = read(z_ + c * z_stride_, v);
      if constexpr (!kKept) exponential = math::exp_shifted<V>(exponential, maximum_[v]);
      V g_times_label_weight;
      if constexpr (kLabels == Labels::kSoft) {
        const V label = read(y_ + c * y_stride_, v);
        g_times_label_weight = g_[v] * math::soft_label_weight<V>(classes_.smoothing, weight, label);
      } else {
        g_times_label_weight = label_[v] == math::Bits<A>(c) ? g_times_label_[v] : V{};
        if constexpr (kLabels == Labels::kIndexSmoothed) {
          g_times_label_weight += g_[v] * (classes_.smoothing.every * weight);
        }
      }
      value[v] = math::cross_entropy_logit_gradient<V>(g_times_a_over_sum_[v], exponential, g_times_label_weight);
      if constexpr (kLabels != Labels::kSoft && !kFinite) value[v] = label_[v] < math::Bits<A>(0) ? V{} : value[v];
    }
  }

 private:
  template <class P>
  FUSEDLOSS_HOST_DEVICE V read(const P* row, int v) const {
    return kPartial ? load_partial<P>(row, left_, 0) : load<P>(row + v * kLanes<A>);
  }

  const Classes<A>& classes_;
  const Z* const z_;  // class c: z_stride further
  const int64_t z_stride_;
  const Y* const y_;  // soft labels only
  const int64_t y_stride_;
  const int left_;
  V maximum_[kVectors], g_[kVectors], g_times_a_over_sum_[kVectors], g_times_label_[kVectors];
  math::Bits<V> label_[kVectors];
};

// What gradient_to_classes() and gradient_to_rows() ask for.
template <Labels kLabels, bool kKept, bool kFinite, class Z, class Y>
auto logit_gradient(const Classes<ComputeType<Z>>& classes, const Z* z, int64_t z_stride, const Y* y, int64_t y_stride,
                    const BlockGradients<ComputeType<Z>>& pixels) {
  return [=, &classes, &pixels](auto vectors, auto partial, int i, int left) {
    return LogitGradient<kLabels, kKept, kFinite, vectors(), partial(), Z, Y>(classes, z, z_stride, y, y_stride, i,
                                                                              left, pixels);
  };
}

}  // namespace
}  // namespace fusedloss::cpu::FUSEDLOSS_LEVEL
