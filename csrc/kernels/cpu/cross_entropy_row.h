// The visits to one pixel whose classes lie side by side, for many classes: a vector holds neighboring classes.
#pragma once

#include "kernels/cpu/cross_entropy_tile.h"

namespace fusedloss::cpu::FUSEDLOSS_LEVEL {
namespace {

// Calls visit(vectors, partial, first class, count) over the classes [begin, end); four vectors at a time, because
// four independent sums hide the latency of an addition.
constexpr int kRowVectors = 4;

template <class A, class Visit>
FUSEDLOSS_HOST_DEVICE void for_classes(int begin, int end, Visit visit) {
  for_vectors<A, kRowVectors>(end - begin,
                              [&](auto v, auto partial, int c, int n) { visit(v, partial, begin + c, n); });
}

template <class A>
FUSEDLOSS_HOST_DEVICE Vector<A> class_weights(const Classes<A>& classes, int c, bool partial, int count) {
  if (classes.weight == nullptr) return splat<Vector<A>>(A(1));
  return partial ? load_partial<A>(classes.weight + c, count, 0) : load<A>(classes.weight + c);
}

// z, y: (C,). Writes pixel i of `out`.
template <Labels kLabels, class T, class Y>
void forward_row(const Classes<ComputeType<T>>& classes, const T* z, const Y* y, int i,
                 BlockSums<ComputeType<T>>& out) {
  using A = ComputeType<T>;
  using V = Vector<A>;
  constexpr A lowest = math::Constants<A>::lowest;
  constexpr int lanes = kLanes<A>;

  V maxima[kRowVectors];
  for (int v = 0; v < kRowVectors; ++v) maxima[v] = splat<V>(lowest);
  for_classes<A>(0, classes.count, [&](auto vectors, auto partial, int c, int n) {
    for (int v = 0; v < vectors(); ++v) {
      const V logit = partial() ? load_partial<T>(z + c, n, lowest) : load<T>(z + c + v * lanes);
      maxima[v] = math::maximum<V>(logit, maxima[v]);
    }
  });
  for (int v = 1; v < kRowVectors; ++v) maxima[0] = math::maximum<V>(maxima[0], maxima[v]);
  const A maximum = maximum_lane<A>(maxima[0]);

  // Lanes past the row: -infinity adds exp(-infinity) = 0; b must not see it and skips them by their weight of 0 and a
  // logit of 0 instead.
  V sum[kRowVectors] = {}, a[kRowVectors] = {}, b[kRowVectors] = {};
  for_classes<A>(0, classes.count, [&](auto vectors, auto partial, int c, int n) {
    for (int v = 0; v < vectors(); ++v) {
      const int at = c + v * lanes;
      V logit = partial() ? load_partial<T>(z + at, n, -math::Constants<A>::infinity) : load<T>(z + at);
      sum[v] += math::exp_shifted<V>(logit, splat<V>(maximum));
      if constexpr (kLabels != Labels::kIndex) {
        if (partial()) logit = load_partial<T>(z + at, n, 0);
        V weight = class_weights<A>(classes, at, partial(), n);
        if (partial()) {
          for (int lane = n; lane < lanes; ++lane) weight[lane] = 0;
        }
        if constexpr (kLabels == Labels::kIndexSmoothed) b[v] += weight * (logit - maximum);
        if constexpr (kLabels == Labels::kSoft) {
          const V label = partial() ? load_partial<Y>(y + at, n, 0) : load<Y>(y + at);
          const V label_weight = weight * (classes.smoothing.label * label + classes.smoothing.every);
          a[v] += label_weight;
          b[v] += label_weight * (logit - maximum);
        }
      }
    }
  });
  for (int v = 1; v < kRowVectors; ++v) {
    sum[0] += sum[v];
    a[0] += a[v];
    b[0] += b[v];
  }
  out.maximum[i] = maximum;
  out.sum[i] = static_cast<A>(sum_lanes<A>(sum[0]));
  if constexpr (kLabels == Labels::kSoft) out.a[i] = static_cast<A>(sum_lanes<A>(a[0]));
  if constexpr (kLabels != Labels::kIndex) out.b[i] = static_cast<A>(sum_lanes<A>(b[0]));
}

// z, y, gradient: (C,). Reads pixel i of `pixels`.
template <Labels kLabels, bool kStream, class T, class Y>
void backward_row(const Classes<ComputeType<T>>& classes, const T* z, const Y* y, int i,
                  const BlockGradients<ComputeType<T>>& pixels, T* gradient) {
  using A = ComputeType<T>;
  using V = Vector<A>;
  constexpr int lanes = kLanes<A>;
  if (kLabels != Labels::kSoft && pixels.label[i] < 0) {
    // Exact zeros, whatever the logits hold.
    for (int c = 0; c < classes.count; ++c) store_one(gradient + c, A(0));
    return;
  }
  const V maximum = splat<V>(pixels.maximum[i]);
  const A g = kLabels == Labels::kIndex ? A(0) : pixels.g[i];
  A g_times_a_over_sum = kLabels == Labels::kSoft ? A(0) : pixels.g_times_a_over_sum[i];
  if constexpr (kLabels == Labels::kSoft) {
    V sum = {};
    for_classes<A>(0, classes.count, [&](auto vectors, auto partial, int c, int n) {
      for (int v = 0; v < vectors(); ++v) {
        const int at = c + v * lanes;
        const V label = partial() ? load_partial<Y>(y + at, n, 0) : load<Y>(y + at);
        V label_weight =
            class_weights<A>(classes, at, partial(), n) * (classes.smoothing.label * label + classes.smoothing.every);
        if (partial()) {
          for (int lane = n; lane < lanes; ++lane) label_weight[lane] = 0;
        }
        sum += label_weight;
      }
    });
    g_times_a_over_sum = g * static_cast<A>(sum_lanes<A>(sum)) * pixels.inverse_sum[i];
  }
  for_classes<A>(0, classes.count, [&](auto vectors, auto partial, int c, int n) {
    for (int v = 0; v < vectors(); ++v) {
      const int at = c + v * lanes;
      const V logit = partial() ? load_partial<T>(z + at, n, 0) : load<T>(z + at);
      const V exponential = math::exp_shifted<V>(logit, maximum);
      V g_times_label_weight = {};
      if constexpr (kLabels != Labels::kIndex) {
        V label_weight = class_weights<A>(classes, at, partial(), n);
        if constexpr (kLabels == Labels::kSoft) {
          const V label = partial() ? load_partial<Y>(y + at, n, 0) : load<Y>(y + at);
          label_weight *= classes.smoothing.label * label + classes.smoothing.every;
        } else {
          label_weight *= classes.smoothing.every;
        }
        g_times_label_weight = g * label_weight;
      }
      const V value =
          math::cross_entropy_logit_gradient<V>(splat<V>(g_times_a_over_sum), exponential, g_times_label_weight);
      if constexpr (partial()) {
        store_partial<T>(gradient + at, value, n);
      } else if constexpr (kStream) {
        store_streaming<T>(gradient + at, value);
      } else {
        store<T>(gradient + at, value);
      }
    }
  });
  if constexpr (kLabels != Labels::kSoft) {
    // The labelled class once more, in full precision and rounded once: its entry is p - 1, and a rounded p would have
    // lost the digits that are left.
    const auto c = pixels.label[i];
    const A exponential = math::exp_shifted<A>(load_one(z + c), pixels.maximum[i]);
    A g_times_label_weight = pixels.g_times_label[i];
    if constexpr (kLabels == Labels::kIndexSmoothed) {
      g_times_label_weight += g * (classes.smoothing.every * classes.weight_of(c));
    }
    store_one(gradient + c,
              math::cross_entropy_logit_gradient<A>(g_times_a_over_sum, exponential, g_times_label_weight));
  }
}

}  // namespace
}  // namespace fusedloss::cpu::FUSEDLOSS_LEVEL
