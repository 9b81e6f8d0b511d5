// The visits of the backward to a class-major tile: class c of pixel i is at tile[c * stride + i].
//
// Logits come in from memory of any dtype and layout and gradients go out there; the tile between is of the compute
// type A and our own, and its rows end in whole vectors: columns past the last pixel hold finite numbers and have
// weight 0.
#pragma once

#include "kernels/cpu/segmentation_pixels.h"
#include "kernels/cpu/write_gradient.h"
#include "math/activation.h"
#include "math/segmentation.h"

namespace fusedloss::cpu::FUSEDLOSS_LEVEL {
namespace {

// The classes of a group.
template <class A>
struct ClassGradients {
  const A* d_intersection;  // (C,)
  const A* d_predicted;     // (C,)
  const A* d_labelled;      // (C,)
};

// dI/dp_c of the intersection with a soft label.
template <class A, bool kProduct>
FUSEDLOSS_HOST_DEVICE Vector<A> intersection_derivative(Vector<A> p, Vector<A> y) {
  if constexpr (kProduct) return y;
  return math::minimum_intersection_derivative<Vector<A>>(p, y);
}

// What the gradient of class indices is made of beside cross-entropy and overlap.
enum class IndexTerms {
  kNone,
  kSquared,  // squared error, every class with weight 1
  kAll,      // squared error, class weights, label smoothing
};

// Softmax, first visit, class indices: fills the tile with e = exp(z - maximum) and sums over the classes what the
// gradient needs, dot = sum_c dL/dP_c e_c and square = sum_c w_c e_c^2.
template <IndexTerms kTerms, class T, class M>
void exponentials(const Classes<ComputeType<T>>& classes, const T* z, int64_t z_stride, int count,
                  const SegmentationPixels<ComputeType<T>>& pixels, const ClassGradients<ComputeType<T>>& gradients,
                  ComputeType<T>* tile, int64_t stride, ComputeType<T>* dot_out, ComputeType<T>* square_out,
                  const Ahead<M>& ahead, const Outgoing<M>& outgoing) {
  using A = ComputeType<T>;
  using V = Vector<A>;
  constexpr int lanes = kLanes<A>;
  for_vectors<A, 4>(count, [&](auto vectors, auto partial, int i, int left) {
    constexpr int n = vectors();
    V maximum[n], dot[n], square[n];
#pragma GCC unroll 4
    for (int v = 0; v < n; ++v) {
      maximum[v] = load(pixels.maximum + i + v * lanes);
      dot[v] = square[v] = V{};
    }
    for (int c = 0; c < classes.count; ++c) {
      const T* row = z + c * z_stride + i;
      const A d_predicted = gradients.d_predicted[c];
      [[maybe_unused]] const A w = kTerms == IndexTerms::kAll ? classes.weight_of(c) : A(1);
      if constexpr (!partial()) outgoing.template send<n>(c, i);
#pragma GCC unroll 4
      for (int v = 0; v < n; ++v) {
        ahead.ask(c, i + v * lanes);
        const V logit = partial() ? load_partial<T>(row, left, 0) : load<T>(row + v * lanes);
        const V e = math::exp_shifted<V>(logit, maximum[v]);
        store(tile + c * stride + i + v * lanes, e);
        dot[v] += d_predicted * e;
        if constexpr (kTerms != IndexTerms::kNone) square[v] += w * math::squared_error<V>(e, V{});
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < n; ++v) {
      store(dot_out + i + v * lanes, dot[v]);
      store(square_out + i + v * lanes, square[v]);
    }
  });
}

// The same for soft labels, whose minimum with p wants p itself: fills the tile with probabilities,
// dot = sum_c g_c p_c with g_c = dL/dp_c, square = sum_c w_c y~_c.
template <bool kProduct, class T, class Y, class M>
void probabilities(const Classes<ComputeType<T>>& classes, const T* z, int64_t z_stride, const Y* y, int64_t y_stride,
                   int count, const SegmentationPixels<ComputeType<T>>& pixels,
                   const ClassGradients<ComputeType<T>>& gradients, ComputeType<T>* tile, int64_t stride,
                   ComputeType<T>* dot_out, ComputeType<T>* square_out, const Ahead<M>& ahead,
                   const Outgoing<M>& outgoing) {
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
      scale[v] = load(pixels.squared_error_scale + i + v * lanes);
      dot[v] = square[v] = V{};
    }
    for (int c = 0; c < classes.count; ++c) {
      const T* row = z + c * z_stride + i;
      const A d_predicted = gradients.d_predicted[c];
      const A d_intersection = gradients.d_intersection[c];
      const A w = classes.weight_of(c);
      if constexpr (!partial()) outgoing.template send<n>(c, i);
#pragma GCC unroll 4
      for (int v = 0; v < n; ++v) {
        ahead.ask(c, i + v * lanes);
        const V logit = partial() ? load_partial<T>(row, left, 0) : load<T>(row + v * lanes);
        const V p = math::exp_shifted<V>(logit, maximum[v]) * inverse_sum[v];
        store(tile + c * stride + i + v * lanes, p);
        const V label = load<Y>(y + c * y_stride + i + v * lanes);
        const V share = intersection_derivative<A, kProduct>(p, label);
        dot[v] += p * math::probability_gradient<true, V>(p, label, share, scale[v], w, d_intersection, d_predicted);
        square[v] += math::soft_label_weight<V>(classes.smoothing, w, label);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < n; ++v) {
      store(dot_out + i + v * lanes, dot[v]);
      store(square_out + i + v * lanes, square[v]);
    }
  });
}

// Softmax, second visit, class indices: the gradient from the tile of exponentials, of which the pixels' weight, scale
// and common number come over S (math/segmentation.h). kFinite: no NaN and no infinity goes in; otherwise what is
// known of an ignored pixel may be NaN, and its gradient is put to exact zeros.
template <IndexTerms kTerms, bool kFinite, int kVectors, class A>
class IndexLabelGradient {
 public:
  using V = Vector<A>;

  FUSEDLOSS_HOST_DEVICE IndexLabelGradient(const Classes<A>& classes, const A* tile, int64_t stride, int i,
                                           const SegmentationPixels<A>& pixels, const ClassGradients<A>& gradients)
      : classes_(classes), gradients_(gradients), tile_(tile + i), stride_(stride) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int at = i + v * kLanes<A>;
      const V inverse_sum = load(pixels.inverse_sum + at);
      m_[v] = load(pixels.weight + at) * inverse_sum;
      common_[v] = load(pixels.common + at) * inverse_sum;
      scale_[v] = kSquared ? load(pixels.squared_error_scale + at) * inverse_sum : V{};
      smoothed_[v] = kAll ? load(pixels.smoothed + at) : V{};
      labelled_[v] = load(pixels.labelled + at);
      label_[v] = load_labels<A>(pixels.label + at);
    }
  }

  FUSEDLOSS_HOST_DEVICE void of_class(int64_t c, V (&value)[kVectors]) const {
    const A d_predicted = gradients_.d_predicted[c];
    [[maybe_unused]] const A w = kAll ? classes_.weight_of(c) : A(1);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const V e = load(tile_ + c * stride_ + v * kLanes<A>);
      const V more = label_[v] == math::Bits<A>(c) ? labelled_[v] : V{};
      value[v] = math::index_label_gradient<kSquared, kAll, V>(e, m_[v], scale_[v], w, d_predicted, common_[v], more,
                                                               smoothed_[v]);
      if constexpr (!kFinite) value[v] = m_[v] == A(0) ? V{} : value[v];
    }
  }

 private:
  static constexpr bool kSquared = kTerms != IndexTerms::kNone, kAll = kTerms == IndexTerms::kAll;

  const Classes<A>& classes_;
  const ClassGradients<A>& gradients_;
  const A* const tile_;  // class c: stride further
  const int64_t stride_;
  V m_[kVectors], common_[kVectors], labelled_[kVectors], scale_[kVectors], smoothed_[kVectors];
  math::Bits<V> label_[kVectors];
};

// What gradient_to_classes() and gradient_to_rows() ask for.
template <IndexTerms kTerms, bool kFinite, class A>
auto index_label_gradient(const Classes<A>& classes, const A* tile, int64_t stride, const SegmentationPixels<A>& pixels,
                          const ClassGradients<A>& gradients) {
  return [=, &classes, &pixels, &gradients](auto vectors, auto, int i, int) {
    return IndexLabelGradient<kTerms, kFinite, vectors(), A>(classes, tile, stride, i, pixels, gradients);
  };
}

// The same for soft labels, from the tile of probabilities.
template <bool kProduct, int kVectors, class A, class Y>
class SoftLabelGradient {
 public:
  using V = Vector<A>;

  FUSEDLOSS_HOST_DEVICE SoftLabelGradient(const Classes<A>& classes, const A* tile, int64_t stride, const Y* y,
                                          int64_t y_stride, int i, const SegmentationPixels<A>& pixels,
                                          const ClassGradients<A>& gradients)
      : classes_(classes), gradients_(gradients), tile_(tile + i), stride_(stride), y_(y + i), y_stride_(y_stride) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int at = i + v * kLanes<A>;
      m_[v] = load(pixels.weight + at);
      common_[v] = load(pixels.common + at);
      scale_[v] = load(pixels.squared_error_scale + at);
      smoothed_[v] = load(pixels.smoothed + at);
    }
  }

  FUSEDLOSS_HOST_DEVICE void of_class(int64_t c, V (&value)[kVectors]) const {
    const A d_predicted = gradients_.d_predicted[c];
    const A d_intersection = gradients_.d_intersection[c];
    const A w = classes_.weight_of(c);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const V p = load(tile_ + c * stride_ + v * kLanes<A>);
      const V label = load<Y>(y_ + c * y_stride_ + v * kLanes<A>);
      const V share = intersection_derivative<A, kProduct>(p, label);
      const V g = math::probability_gradient<true, V>(p, label, share, scale_[v], w, d_intersection, d_predicted);
      value[v] = math::soft_label_gradient<V>(p, m_[v], g, math::soft_label_weight<V>(classes_.smoothing, w, label),
                                              common_[v], smoothed_[v]);
      value[v] = m_[v] == A(0) ? V{} : value[v];
    }
  }

 private:
  const Classes<A>& classes_;
  const ClassGradients<A>& gradients_;
  const A* const tile_;  // class c: stride further
  const int64_t stride_;
  const Y* const y_;
  const int64_t y_stride_;
  V m_[kVectors], common_[kVectors], scale_[kVectors], smoothed_[kVectors];
};

template <bool kProduct, class A, class Y>
auto soft_label_gradient(const Classes<A>& classes, const A* tile, int64_t stride, const Y* y, int64_t y_stride,
                         const SegmentationPixels<A>& pixels, const ClassGradients<A>& gradients) {
  return [=, &classes, &pixels, &gradients](auto vectors, auto, int i, int) {
    return SoftLabelGradient<kProduct, vectors(), A, Y>(classes, tile, stride, y, y_stride, i, pixels, gradients);
  };
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
    // The only NaN of the even and odd ones that may have a lower half.
    const A d_intersection = plain_nan(gradients.d_intersection[c]);
    const A d_predicted = plain_nan(gradients.d_predicted[c]);
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
        write_gradient<kStream, partial(), false>(gradient_row + i, value, left);
      }
    });
  }
}

}  // namespace
}  // namespace fusedloss::cpu::FUSEDLOSS_LEVEL
