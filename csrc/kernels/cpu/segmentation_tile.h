// The visits to a class-major tile of probabilities: class c of pixel i is at tile[c * stride + i].
//
// Logits come in from memory of any dtype and layout, gradients go out there; all between is the compute type A in a
// tile of our own, whose rows end in whole vectors: columns past the last pixel hold finite numbers and have weight 0.
#pragma once

#include "kernels/cpu/cross_entropy_tile.h"
#include "kernels/segmentation.h"
#include "math/activation.h"
#include "math/segmentation.h"

namespace fusedloss::cpu::FUSEDLOSS_LEVEL {
namespace {

// What is said of each pixel of a block; every array ends in a whole vector.
template <class A>
struct alignas(64) SegmentationPixels {
  math::Bits<A> label[kBlock<A>];  // class, or -1 for none; class indices only
  math::Bits<A> place[kBlock<A>];  // class, or 0 for none: a place in a table that may be read without asking
  A weight[kBlock<A>];             // m; 0 where ignored
  A label_weight[kBlock<A>];       // m; 0 where there is no label
  A inverse_sum[kBlock<A>];        // softmax: 1 / S; 0 where m is
  A maximum[kBlock<A>];            // softmax
  // Backward.
  A squared_error_scale[kBlock<A>];  // 2 times the incoming gradient of SE
  A common[kBlock<A>];               // K: what multiplies each p_c, beside m dL/dP_c
  A labelled[kBlock<A>];             // L: what the labelled class has more
  A smoothed[kBlock<A>];             // E: what each class has less, times w_c
  // How many pixels the arrays are filled for by what is the same in every block; -1 for none.
  int filled = -1;         // without class indices and pixel weights: what the block reads
  int scales_filled = -1;  // squared_error_scale, of a loss that is not a map
};

// The classes of a group.
template <class A>
struct ClassGradients {
  const A* d_intersection;  // (C,)
  const A* d_predicted;     // (C,)
  const A* d_labelled;      // (C,)
};

template <class A>
FUSEDLOSS_HOST_DEVICE math::Bits<Vector<A>> load_labels(const math::Bits<A>* p) {
  return *reinterpret_cast<const typename VectorOf<math::Bits<A>>::Memory*>(p);
}

// The label of class c: one-hot, or a soft label.
template <class A, bool kSoft, class Y>
FUSEDLOSS_HOST_DEVICE Vector<A> label_of(math::Bits<Vector<A>> label, const Y* y, int64_t c) {
  if constexpr (kSoft) return load<Y>(y);
  return label == math::Bits<A>(c) ? splat<Vector<A>>(A(1)) : Vector<A>{};
}

// Likewise of a vector of pixels from `at` on; y_row: of class c.
template <class A, bool kSoft, class Y>
FUSEDLOSS_HOST_DEVICE Vector<A> label_at(const SegmentationPixels<A>& pixels, int at, const Y* y_row, int64_t c) {
  if constexpr (kSoft) return load<Y>(y_row + at);
  return label_of<A, false, Y>(load_labels<A>(pixels.label + at), nullptr, c);
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward

// Accumulators of a chunk: one vector for each class and quantity.
template <class A>
struct OverlapSums {
  A* intersection;  // (C, lanes); soft labels only
  A* predicted;     // (C, lanes)
  A* labelled;      // (C, lanes); soft labels only
};

// Adds the overlap statistics of a tile of probabilities, which are the tile's numbers times inverse_sum, and the
// squared errors of its pixels (squared_error, count; not yet times m).
template <class A, bool kSoft, bool kProduct, bool kSquared, bool kOverlap, class Y>
void collect(int64_t classes, const A* tile, int64_t stride, const Y* y, int64_t y_stride, int count, const A* weight,
             const SegmentationPixels<A>& pixels, const OverlapSums<A>& sums, A* squared_error) {
  using V = Vector<A>;
  constexpr int lanes = kLanes<A>;
  constexpr int kVectors = kSoft || kSquared ? 4 : 8;
  const int end = (count + lanes - 1) / lanes * lanes;
  for_vectors<A, kVectors>(end, [&](auto vectors, auto, int i, int) {
    constexpr int n = vectors();
    V scale[n], m[n], square[n];
    math::Bits<V> label[n];
#pragma GCC unroll 8
    for (int v = 0; v < n; ++v) {
      scale[v] = load(pixels.inverse_sum + i + v * lanes);
      m[v] = load(pixels.weight + i + v * lanes);
      label[v] = load_labels<A>(pixels.label + i + v * lanes);
      square[v] = V{};
      if constexpr (!kSoft && !kSquared) scale[v] *= m[v];
    }
    for (int64_t c = 0; c < classes; ++c) {
      const A* row = tile + c * stride + i;
      [[maybe_unused]] const Y* y_row = y + c * y_stride + i;
      [[maybe_unused]] const A w = weight == nullptr ? A(1) : weight[c];
      V both = {}, predicted = {}, labelled = {};
#pragma GCC unroll 8
      for (int v = 0; v < n; ++v) {
        const V p = load(row + v * lanes) * scale[v];
        if constexpr (!kSoft && !kSquared) {
          predicted += p;
        } else {
          const V y_c = label_of<A, kSoft>(label[v], y_row + v * lanes, c);
          if constexpr (kOverlap) {
            predicted += m[v] * p;
            if constexpr (kSoft) {
              both += m[v] * (kProduct ? p * y_c : math::minimum_intersection<V>(p, y_c));
              labelled += m[v] * y_c;
            }
          }
          if constexpr (kSquared) square[v] += w * math::squared_error<V>(p, y_c);
        }
      }
      if constexpr (kOverlap) {
        store(sums.predicted + c * lanes, load(sums.predicted + c * lanes) + predicted);
        if constexpr (kSoft) {
          store(sums.intersection + c * lanes, load(sums.intersection + c * lanes) + both);
          store(sums.labelled + c * lanes, load(sums.labelled + c * lanes) + labelled);
        }
      }
    }
    if constexpr (kSquared) {
#pragma GCC unroll 4
      for (int v = 0; v < n; ++v) store(squared_error + i + v * lanes, square[v]);
    }
  });
}

// Vectors of a step of a loop over pixels in which classes have nothing to do with each other: each is one long chain
// of a sigmoid, so several have to be on their way at once.
constexpr int kEachVectors = 4;

// GCC leaves the chains of neighbouring vectors one behind the other, unless its first scheduler may mix them. Not for
// every kernel: it makes the softmax 10 % slower (docs/performance.md). Clang mixes by itself.
#if defined(__GNUC__) && !defined(__clang__)
#define FUSEDLOSS_INTERLEAVED __attribute__((optimize("schedule-insns", "sched-pressure")))
#else
#define FUSEDLOSS_INTERLEAVED
#endif

// Fills the tile with sigmoid(z), or with z itself. With kCrossEntropy also the binary cross-entropy of each pixel,
// over the classes (not yet times m). kWeighted: where a pixel's weight may be other than 1; 0 where it is 0, whatever
// the logit is. z: class-major with z_stride; the tile itself, where it has been filled with logits.
template <bool kSigmoid, bool kSoft, bool kCrossEntropy, bool kWeighted, class T, class Y>
void fill_each(const Classes<ComputeType<T>>& classes, const T* z, int64_t z_stride, const ComputeType<T>* pos_weight,
               const Y* y, int64_t y_stride, int count, const SegmentationPixels<ComputeType<T>>& pixels,
               ComputeType<T>* tile, int64_t stride, ComputeType<T>* cross_entropy) {
  using A = ComputeType<T>;
  using V = Vector<A>;
  constexpr int lanes = kLanes<A>;
  const A share = A(1) / static_cast<A>(classes.count);
  if constexpr (kCrossEntropy) {
    for (int i = 0; i < count; i += lanes) store(cross_entropy + i, V{});
  }
  // The classes are the outer loop, so that the constants of the sigmoid stay in registers also with a single class.
  for (int c = 0; c < classes.count; ++c) {
    const T* row = z + c * z_stride;
    A* tile_row = tile + c * stride;
    [[maybe_unused]] const Y* y_row = y + c * y_stride;
    [[maybe_unused]] const A w = classes.weight_of(c) * share;
    [[maybe_unused]] const A w_positive = pos_weight == nullptr ? A(1) : pos_weight[c];
    for_vectors<A, 2>(count, [&](auto vectors, auto partial, int i, int left) {
      constexpr int n = vectors();
#pragma GCC unroll 2
      for (int v = 0; v < n; ++v) {
        const int at = i + v * lanes;
        [[maybe_unused]] const V m = kWeighted ? load(pixels.weight + at) : V{};
        V p = partial() ? load_partial<T>(row + at, left, 0) : load<T>(row + at);
        if constexpr (kWeighted) p = m == A(0) ? V{} : p;
        if constexpr (kSigmoid) {
          const V logit = p;
          const math::Sigmoid<V> s = kCrossEntropy ? math::sigmoid_with_log<V>(logit) : math::sigmoid<V>(logit);
          p = s.probability;
          if constexpr (kWeighted) p = m == A(0) ? V{} : p;
          if constexpr (kCrossEntropy) {
            V label = label_at<A, kSoft>(pixels, at, y_row, c);
            label = classes.smoothing.label * label + classes.smoothing.every;
            const V value = w * math::binary_cross_entropy<V>(s, logit, label, w_positive);
            store(cross_entropy + at, load(cross_entropy + at) + value);
          }
        }
        store(tile_row + at, p);
      }
    });
  }
}

// Logits and labels of the same pixels, vector by vector. Which pixel is in which lane is only told to be the same in
// both, and for bfloat16 it is as store_even_odd() wants it.
template <class T, class Y>
constexpr bool kEvenOdd = std::is_same_v<T, BFloat16> && std::is_same_v<Y, BFloat16>;

template <class T, class Y, class V, int kVectors>
FUSEDLOSS_HOST_DEVICE void load_alike(const T* z, const Y* y, V (&logit)[kVectors], V (&label)[kVectors]) {
  constexpr int lanes = kLanes<ComputeType<T>>;
  if constexpr (kEvenOdd<T, Y> && kVectors % 2 == 0) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; v += 2) {
      load_even_odd(z + v * lanes, logit[v], logit[v + 1]);
      load_even_odd(y + v * lanes, label[v], label[v + 1]);
    }
  } else {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      logit[v] = load<T>(z + v * lanes);
      label[v] = load<Y>(y + v * lanes);
    }
  }
}

// Of a plain block: the statistics straight from the logits and the soft labels.
template <bool kSigmoid, bool kProduct, class T, class Y>
FUSEDLOSS_INTERLEAVED void collect_plain(const Classes<ComputeType<T>>& classes, const T* z, int64_t z_stride,
                                         const Y* y, int64_t y_stride, int count,
                                         const OverlapSums<ComputeType<T>>& sums) {
  using A = ComputeType<T>;
  using V = Vector<A>;
  constexpr int lanes = kLanes<A>;
  for (int c = 0; c < classes.count; ++c) {
    const T* row = z + c * z_stride;
    const Y* y_row = y + c * y_stride;
    V both[kEachVectors] = {}, predicted[kEachVectors] = {}, labelled[kEachVectors] = {};
    for_vectors<A, kEachVectors>(count, [&](auto vectors, auto, int i, int) {
      constexpr int n = vectors();
      V logit[n], label[n];
      load_alike<T, Y>(row + i, y_row + i, logit, label);
#pragma GCC unroll 4
      for (int v = 0; v < n; ++v) {
        V p = logit[v];
        if constexpr (kSigmoid) p = math::sigmoid<V>(p).probability;
        both[v] += kProduct ? p * label[v] : math::minimum_intersection<V>(p, label[v]);
        predicted[v] += p;
        labelled[v] += label[v];
      }
    });
    const auto add = [&](A* sum, const V(&more)[kEachVectors]) {
      store(sum + c * lanes, load(sum + c * lanes) + ((more[0] + more[1]) + (more[2] + more[3])));
    };
    add(sums.intersection, both);
    add(sums.predicted, predicted);
    add(sums.labelled, labelled);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward

// dI/dp_c of the intersection with a soft label.
template <class A, bool kProduct>
FUSEDLOSS_HOST_DEVICE Vector<A> intersection_derivative(Vector<A> p, Vector<A> y) {
  if constexpr (kProduct) return y;
  return math::minimum_intersection_derivative<Vector<A>>(p, y);
}

// Softmax, first visit: fills the tile with probabilities and sums over the classes what their gradient needs.
//   class indices  dot = sum_c dL/dP_c p_c,  square = sum_c w_c p_c^2 (with kFull)
//   soft labels    dot = sum_c g_c p_c with g_c = dL/dp_c,  square = sum_c w_c y~_c
template <bool kSoft, bool kProduct, bool kFull, class T, class Y>
void probabilities(const Classes<ComputeType<T>>& classes, const T* z, int64_t z_stride, const Y* y, int64_t y_stride,
                   int count, const SegmentationPixels<ComputeType<T>>& pixels,
                   const ClassGradients<ComputeType<T>>& gradients, ComputeType<T>* tile, int64_t stride,
                   ComputeType<T>* dot_out, ComputeType<T>* square_out) {
  using A = ComputeType<T>;
  using V = Vector<A>;
  constexpr int lanes = kLanes<A>;
  for_vectors<A, 4>(count, [&](auto vectors, auto partial, int i, int left) {
    constexpr int n = vectors();
    V maximum[n], inverse_sum[n], scale[n], dot[n], square[n];
#pragma GCC unroll 4
    for (int v = 0; v < n; ++v) {
      maximum[v] = load(pixels.maximum + i + v * lanes);
      inverse_sum[v] = load(pixels.inverse_sum + i + v * lanes);
      if constexpr (kSoft) scale[v] = load(pixels.squared_error_scale + i + v * lanes);
      dot[v] = square[v] = V{};
    }
    for (int c = 0; c < classes.count; ++c) {
      const T* row = z + c * z_stride + i;
      const A d_predicted = gradients.d_predicted[c];
      [[maybe_unused]] const A d_intersection = gradients.d_intersection[c];
      [[maybe_unused]] const A w = kSoft || kFull ? classes.weight_of(c) : A(1);
#pragma GCC unroll 4
      for (int v = 0; v < n; ++v) {
        prefetch_next_block<A>(row + v * lanes);
        const V logit = partial() ? load_partial<T>(row, left, 0) : load<T>(row + v * lanes);
        const V p = math::exp_shifted<V>(logit, maximum[v]) * inverse_sum[v];
        store(tile + c * stride + i + v * lanes, p);
        if constexpr (kSoft) {
          const V label = load<Y>(y + c * y_stride + i + v * lanes);
          const V share = intersection_derivative<A, kProduct>(p, label);
          dot[v] += p * math::probability_gradient<true, V>(p, label, share, scale[v], w, d_intersection, d_predicted);
          square[v] += math::soft_label_weight<V>(classes.smoothing, w, label);
        } else {
          dot[v] += d_predicted * p;
          if constexpr (kFull) square[v] += w * p * p;
        }
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < n; ++v) {
      store(dot_out + i + v * lanes, dot[v]);
      store(square_out + i + v * lanes, square[v]);
    }
  });
}

// Softmax, second visit: the gradient from the tile of probabilities (math/segmentation.h; s and E with kFull).
template <bool kSoft, bool kProduct, bool kFull, bool kStream, class T, class Y>
void softmax_gradient(const Classes<ComputeType<T>>& classes, const ComputeType<T>* tile, int64_t stride, const Y* y,
                      int64_t y_stride, int count, const SegmentationPixels<ComputeType<T>>& pixels,
                      const ClassGradients<ComputeType<T>>& gradients, T* gradient, int64_t gradient_stride) {
  using A = ComputeType<T>;
  using V = Vector<A>;
  constexpr int lanes = kLanes<A>;
  for_vectors<A, 4>(count, [&](auto vectors, auto partial, int i, int left) {
    constexpr int n = vectors();
    V m[n], common[n], labelled[n], scale[n], smoothed[n];
    math::Bits<V> label[n];
#pragma GCC unroll 4
    for (int v = 0; v < n; ++v) {
      const int at = i + v * lanes;
      m[v] = load(pixels.weight + at);
      common[v] = load(pixels.common + at);
      if constexpr (kSoft || kFull) {
        scale[v] = load(pixels.squared_error_scale + at);
        smoothed[v] = load(pixels.smoothed + at);
      }
      if constexpr (!kSoft) {
        labelled[v] = load(pixels.labelled + at);
        label[v] = load_labels<A>(pixels.label + at);
      }
    }
    for (int c = 0; c < classes.count; ++c) {
      T* gradient_row = gradient + c * gradient_stride + i;
      const A d_predicted = gradients.d_predicted[c];
      [[maybe_unused]] const A d_intersection = gradients.d_intersection[c];
      [[maybe_unused]] const A w = kSoft || kFull ? classes.weight_of(c) : A(1);
      V value[n];
#pragma GCC unroll 4
      for (int v = 0; v < n; ++v) {
        const V p = load(tile + c * stride + i + v * lanes);
        if constexpr (kSoft) {
          const V label_c = load<Y>(y + c * y_stride + i + v * lanes);
          const V share = intersection_derivative<A, kProduct>(p, label_c);
          const V g = math::probability_gradient<true, V>(p, label_c, share, scale[v], w, d_intersection, d_predicted);
          value[v] = math::soft_label_gradient<V>(p, m[v], g, math::soft_label_weight<V>(classes.smoothing, w, label_c),
                                                  common[v], smoothed[v]);
        } else {
          const V more = label[v] == math::Bits<A>(c) ? labelled[v] : V{};
          value[v] = math::index_label_gradient<kFull, V>(p, m[v], kFull ? scale[v] : V{}, w, d_predicted, common[v],
                                                          more, kFull ? smoothed[v] : V{});
        }
        value[v] = m[v] == A(0) ? V{} : value[v];
      }
      write_gradient<kStream, partial()>(gradient_row, value, left);
    }
  });
}

// Sigmoid, or no activation: the gradient from the logits, each class by itself. `smoothed` holds the incoming gradient
// of the cross-entropy, over C.
// z may be `gradient` itself.
// kFull: with squared error or cross-entropy. kWeighted: where a pixel's weight may be other than 1.
template <bool kSigmoid, bool kSoft, bool kProduct, bool kFull, bool kWeighted, bool kStream, class Z, class T, class Y>
FUSEDLOSS_INTERLEAVED void gradient_of_each(const Classes<ComputeType<T>>& classes, const Z* z, int64_t z_stride,
                                            const ComputeType<T>* pos_weight, const Y* y, int64_t y_stride, int count,
                                            const SegmentationPixels<ComputeType<T>>& pixels,
                                            const ClassGradients<ComputeType<T>>& gradients, T* gradient,
                                            int64_t gradient_stride) {
  using A = ComputeType<T>;
  using V = Vector<A>;
  constexpr int lanes = kLanes<A>;
  for (int c = 0; c < classes.count; ++c) {
    const Z* row = z + c * z_stride;
    const Y* y_row = y + c * y_stride;
    T* gradient_row = gradient + c * gradient_stride;
    const A w = classes.weight_of(c);
    const A w_positive = pos_weight == nullptr ? A(1) : pos_weight[c];
    const A d_intersection = gradients.d_intersection[c];
    const A d_predicted = gradients.d_predicted[c];
    for_vectors<A, kEachVectors>(count, [&](auto vectors, auto partial, int i, int left) {
      constexpr int n = vectors();
      // What is said of each pixel lies in their order.
      constexpr bool even_odd = kEvenOdd<Z, Y> && std::is_same_v<Z, T> && kSoft && !kFull && !kWeighted && n % 2 == 0;
      V logits[n], labels[n], value[n];
      if constexpr (even_odd) {
        load_alike<Z, Y>(row + i, y_row + i, logits, labels);
      } else {
#pragma GCC unroll 4
        for (int v = 0; v < n; ++v) {
          const int at = i + v * lanes;
          logits[v] = partial() ? load_partial<Z>(row + at, left, 0) : load<Z>(row + at);
          labels[v] = label_at<A, kSoft>(pixels, at, y_row, c);
        }
      }
#pragma GCC unroll 4
      for (int v = 0; v < n; ++v) {
        const int at = i + v * lanes;
        const V logit = logits[v];
        const V label = labels[v];
        const auto gradient_of = [&](V p) {
          // Of a hard label the minimum and the product are the same.
          constexpr bool by_product = kProduct || !kSoft;
          const V scale = kFull ? load(pixels.squared_error_scale + at) : V{};
          const V share = intersection_derivative<A, by_product>(p, label);
          return math::probability_gradient<kFull, V>(p, label, share, scale, w, d_intersection, d_predicted);
        };
        if constexpr (kSigmoid) {
          const math::Sigmoid<V> s = math::sigmoid<V>(logit);
          value[v] = s.probability * s.complement * gradient_of(s.probability);
          if constexpr (kFull) {
            const V smoothed = classes.smoothing.label * label + classes.smoothing.every;
            value[v] +=
                load(pixels.smoothed + at) * w * math::binary_cross_entropy_logit_gradient<V>(s, smoothed, w_positive);
          }
        } else {
          value[v] = gradient_of(logit);
        }
        if constexpr (kWeighted) {
          const V m = load(pixels.weight + at);
          value[v] = m == A(0) ? V{} : m * value[v];
        }
      }
      if constexpr (even_odd) {
#pragma GCC unroll 2
        for (int v = 0; v < n; v += 2) store_even_odd<kStream>(gradient_row + i + v * lanes, value[v], value[v + 1]);
      } else {
        write_gradient<kStream, partial()>(gradient_row + i, value, left);
      }
    });
  }
}

}  // namespace
}  // namespace fusedloss::cpu::FUSEDLOSS_LEVEL
