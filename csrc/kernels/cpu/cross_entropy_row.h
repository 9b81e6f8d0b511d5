// The visits to one pixel whose classes lie side by side, for many classes: a vector holds neighboring classes.
#pragma once

#include "kernels/cpu/cross_entropy_tile.h"
#include "kernels/cpu/write_gradient.h"

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

// Whether it is the same which of neighboring classes is in which lane, so that bfloat16 may be taken apart into the
// classes at even and at odd places, by half of the instructions; AVX-512 has one permutation for either.
template <Labels kLabels, class T>
constexpr bool kInAnyOrder = kLabels == Labels::kIndex && std::is_same_v<T, BFloat16> && kVectorBytes < 64;

// The logits of kVectors vectors of classes from p on; with kPartial of `count` classes, and `fill` in the other lanes.
template <bool kAnyOrder, bool kPartial, class T, class V, int kVectors>
FUSEDLOSS_HOST_DEVICE void load_classes(const T* p, int count, ComputeType<T> fill, V (&logit)[kVectors]) {
  constexpr int lanes = kLanes<ComputeType<T>>;
  if constexpr (kPartial) {
    logit[0] = load_partial<T>(p, count, fill);
  } else if constexpr (kAnyOrder && kVectors % 2 == 0) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; v += 2) load_even_odd(p + v * lanes, logit[v], logit[v + 1]);
  } else {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) logit[v] = load<T>(p + v * lanes);
  }
}

// z, y: (C,). Writes pixel i of `out`.
template <Labels kLabels, class T, class Y>
void forward_row(const Classes<ComputeType<T>>& classes, const T* z, const Y* y, int i,
                 BlockSums<ComputeType<T>>& out) {
  using A = ComputeType<T>;
  using V = Vector<A>;
  constexpr A lowest = math::Constants<A>::lowest;
  constexpr int lanes = kLanes<A>;
  constexpr bool any_order = kInAnyOrder<kLabels, T>;

  V maxima[kRowVectors];
  for (int v = 0; v < kRowVectors; ++v) maxima[v] = splat<V>(lowest);
  for_classes<A>(0, classes.count, [&](auto vectors, auto partial, int c, int n) {
    V logit[vectors()];
    load_classes<any_order, partial()>(z + c, n, lowest, logit);
    for (int v = 0; v < vectors(); ++v) maxima[v] = math::maximum<V>(logit[v], maxima[v]);
  });
  for (int v = 1; v < kRowVectors; ++v) maxima[0] = math::maximum<V>(maxima[0], maxima[v]);
  const A maximum = maximum_lane<A>(maxima[0]);

  // Lanes past the row: -infinity adds exp(-infinity) = 0; b must not see it and skips them by their weight of 0 and a
  // logit of 0 instead.
  V sum[kRowVectors] = {}, a[kRowVectors] = {}, b[kRowVectors] = {};
  for_classes<A>(0, classes.count, [&](auto vectors, auto partial, int c, int n) {
    V logits[vectors()];
    load_classes<any_order, partial()>(z + c, n, -math::Constants<A>::infinity, logits);
    for (int v = 0; v < vectors(); ++v) {
      [[maybe_unused]] const int at = c + v * lanes;
      V logit = logits[v];
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

// Is a row (C,) of a gradient that is written past the caches streamed? Only a long one: its label, and its ends where
// they are parts of a line, are stored in the ordinary way, and those lines are fetched again. Rows of 200 classes took
// three times as long.
template <class T>
bool row_streams(const T* gradient, int classes) {
  const int64_t long_bytes = streaming_aligned(gradient, 64) ? 8 << 10 : 32 << 10;
  return classes * static_cast<int64_t>(sizeof(T)) >= long_bytes && streaming_aligned(gradient, sizeof(T));
}

// Numbers from p on before the first that is aligned to a vector.
template <class T>
int numbers_before_vector(const T* p) {
  const uintptr_t past = reinterpret_cast<uintptr_t>(p) % kVectorBytes;
  return past == 0 ? 0 : static_cast<int>((kVectorBytes - past) / sizeof(T));
}

// Writes a row of the gradient (C,): make(vectors, partial, c, count, value) computes the vectors `value` of classes
// from c on. kStream: past the caches, from where whole vectors fit the memory, for a row begins anywhere. kPlain: of
// store_two(). kAnyOrder: in the order of load_classes().
template <bool kStream, bool kPlain, bool kAnyOrder, class T, class Make>
FUSEDLOSS_HOST_DEVICE void write_row(T* gradient, int classes, Make make) {
  using A = ComputeType<T>;
  // By value: what is written could be what a reference refers to.
  const auto write = [=](auto stream, int begin, int end) __attribute__((always_inline)) {
    for_classes<A>(begin, end, [=](auto vectors, auto partial, int c, int count) __attribute__((always_inline)) {
      Vector<A> value[vectors()];
      make(vectors, partial, c, count, value);
      if constexpr (kAnyOrder && !partial() && vectors() % 2 == 0) {
        for (int v = 0; v < vectors(); v += 2) {
          store_even_odd<stream()>(gradient + c + v * kLanes<A>, value[v], value[v + 1]);
        }
      } else {
        write_gradient<stream(), partial(), kPlain>(gradient + c, value, count);
      }
    });
  };
  if constexpr (kStream) {
    const int head = numbers_before_vector(gradient);
    write(std::false_type{}, 0, head);
    write(std::true_type{}, head, classes);
  } else {
    write(std::false_type{}, 0, classes);
  }
}

// z, y, gradient: (C,). Reads pixel i of `pixels`. kStream: past the caches. kPlain: of store_two().
template <Labels kLabels, bool kStream, bool kPlain, class T, class Y>
void backward_row(const Classes<ComputeType<T>>& classes, const T* z, const Y* y, int i,
                  const BlockGradients<ComputeType<T>>& pixels, T* gradient) {
  using A = ComputeType<T>;
  using V = Vector<A>;
  constexpr int lanes = kLanes<A>;
  if (kLabels != Labels::kSoft && pixels.label[i] < 0) {
    // Exact zeros, whatever the logits hold.
    write_row<kStream, true, false>(gradient, classes.count, [](auto, auto, int, int, auto& value) {
      for (V& zero : value) zero = V{};
    });
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
  constexpr bool any_order = kInAnyOrder<kLabels, T> && kPlain;
  const V factor = splat<V>(g_times_a_over_sum);
  const auto make = [=](auto vectors, auto partial, int c, int n, auto& value) __attribute__((always_inline)) {
    V logit[vectors()];
    load_classes<any_order, partial()>(z + c, n, 0, logit);
    for (int v = 0; v < vectors(); ++v) {
      [[maybe_unused]] const int at = c + v * lanes;
      const V exponential = math::exp_shifted<V>(logit[v], maximum);
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
      value[v] = math::cross_entropy_logit_gradient<V>(factor, exponential, g_times_label_weight);
    }
  };
  write_row<kStream, kPlain, any_order>(gradient, classes.count, make);
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
