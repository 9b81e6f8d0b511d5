// The visits of the forward to a class-major tile: class c of pixel i is at tile[c * stride + i].
//
// Logits come in from memory of any dtype and layout; the tile is of the compute type A and our own, and its rows end
// in whole vectors: columns past the last pixel hold finite numbers and have weight 0.
#pragma once

#include "kernels/cpu/segmentation_pixels.h"
#include "math/activation.h"
#include "math/overlap.h"
#include "math/squared_error.h"

namespace fusedloss::cpu::FUSEDLOSS_LEVEL {
namespace {

template <class A>
FUSEDLOSS_HOST_DEVICE void add_to(A* sum, Vector<A> more) {
  store(sum, load(sum) + more);
}

// Calls visit(first, last) for groups of classes. What is added over a thousand classes one after another in float32
// has lost two digits; of the sums of groups half of one.
template <class Visit>
FUSEDLOSS_HOST_DEVICE void for_class_groups(int64_t classes, Visit visit) {
  constexpr int64_t most = 64;
  for (int64_t first = 0; first < classes; first += most) {
    visit(first, first + most < classes ? first + most : classes);
  }
}

// What class indices touch: one class of each pixel. Adds it to I and T. With a squared error it also takes the number,
// S p, out of the tile, and its share of the pixel's squared error, S^2 w (p - 1)^2, goes to squared_error (padded).
template <bool kSquared, bool kOverlap, class A>
void collect_labelled(A* tile, int64_t stride, int padded, const Classes<A>& classes,
                      const SegmentationPixels<A>& pixels, const OverlapSums<A>& sums, A* squared_error) {
  using V = Vector<A>;
  for (int i = 0; i < padded; i += kLanes<A>) {
    const V m = load(pixels.label_weight + i);
    const V scale = m * load(pixels.inverse_sum + i);
    V square = {};
    for_labels<A>(pixels.place + i, [&](int64_t c, auto labelled) {
      const V value = load(tile + c * stride + i);
      if constexpr (kOverlap) {
        add_to<A>(sums.intersection + c * kLanes<A>, labelled ? scale * value : V{});
        add_to<A>(sums.labelled + c * kLanes<A>, labelled ? m : V{});
      }
      if constexpr (kSquared) {
        const auto taken = labelled & (m != A(0));  // a pixel without a label has only a place
        const V own = classes.weight_of(c) * math::squared_error<V>(value, load(pixels.sum + i));
        square = taken ? own : square;
        store(tile + c * stride + i, taken ? V{} : value);
      }
    });
    if constexpr (kSquared) store(squared_error + i, square);
  }
}

// Adds to P of each class, and computes the squared errors of the pixels (squared_error, count; not yet times m), with
// class indices. The tile: S times the probabilities; with kSquared without those of the labels, which
// collect_labelled() has taken, so that a class takes two products: what is added is P - I, and P - T would lose a P
// that is small beside T.
template <class A, bool kSquared, bool kOverlap, bool kClassWeights>
void collect_index_labels(int64_t classes, const A* tile, int64_t stride, int count, const A* weight,
                          const SegmentationPixels<A>& pixels, A* predicted, A* squared_error) {
  using V = Vector<A>;
  constexpr int lanes = kLanes<A>;
  const int end = (count + lanes - 1) / lanes * lanes;
  for_vectors<A, 8>(end, [&](auto vectors, auto, int i, int) {
    constexpr int n = vectors();
    V scale[n];
#pragma GCC unroll 8
    for (int v = 0; v < n; ++v) {
      scale[v] = load(pixels.inverse_sum + i + v * lanes) * load(pixels.weight + i + v * lanes);
    }
    for_class_groups(classes, [&](int64_t first, int64_t last) {
      V square[n] = {};
      for (int64_t c = first; c < last; ++c) {
        const A* row = tile + c * stride + i;
        [[maybe_unused]] const A w = kClassWeights ? weight[c] : A(1);
        V sum = {};
#pragma GCC unroll 8
        for (int v = 0; v < n; ++v) {
          const V value = load(row + v * lanes);
          if constexpr (kOverlap) sum += value * scale[v];
          if constexpr (kSquared) square[v] += w * math::squared_error<V>(value, V{});
        }
        if constexpr (kOverlap) add_to<A>(predicted + c * lanes, sum);
      }
      if constexpr (kSquared) {
#pragma GCC unroll 8
        for (int v = 0; v < n; ++v) add_to<A>(squared_error + i + v * lanes, square[v]);
      }
    });
    if constexpr (kSquared) {
#pragma GCC unroll 8
      for (int v = 0; v < n; ++v) {
        const V inverse_sum = load(pixels.inverse_sum + i + v * lanes);
        store(squared_error + i + v * lanes, load(squared_error + i + v * lanes) * inverse_sum * inverse_sum);
      }
    }
  });
}

// The same with soft labels, of which I and T are sums too. The tile: S times the probabilities.
template <class A, bool kProduct, bool kSquared, bool kOverlap, class Y>
void collect_soft_labels(int64_t classes, const A* tile, int64_t stride, const Y* y, int64_t y_stride, int count,
                         const A* weight, const SegmentationPixels<A>& pixels, const OverlapSums<A>& sums,
                         A* squared_error) {
  using V = Vector<A>;
  constexpr int lanes = kLanes<A>;
  const int end = (count + lanes - 1) / lanes * lanes;
  for_vectors<A, 4>(end, [&](auto vectors, auto, int i, int) {
    constexpr int n = vectors();
    V scale[n], m[n];
#pragma GCC unroll 4
    for (int v = 0; v < n; ++v) {
      scale[v] = load(pixels.inverse_sum + i + v * lanes);
      m[v] = load(pixels.weight + i + v * lanes);
      if constexpr (kSquared) store(squared_error + i + v * lanes, V{});
    }
    for_class_groups(classes, [&](int64_t first, int64_t last) {
      V square[n] = {};
      for (int64_t c = first; c < last; ++c) {
        const A* row = tile + c * stride + i;
        const Y* y_row = y + c * y_stride + i;
        [[maybe_unused]] const A w = weight == nullptr ? A(1) : weight[c];
        V both = {}, predicted = {}, labelled = {};
#pragma GCC unroll 4
        for (int v = 0; v < n; ++v) {
          const V p = load(row + v * lanes) * scale[v];
          const V label = load<Y>(y_row + v * lanes);
          if constexpr (kOverlap) {
            both += m[v] * (kProduct ? p * label : math::minimum_intersection<V>(p, label));
            predicted += m[v] * p;
            labelled += m[v] * label;
          }
          if constexpr (kSquared) square[v] += w * math::squared_error<V>(p, label);
        }
        if constexpr (kOverlap) {
          add_to<A>(sums.intersection + c * lanes, both);
          add_to<A>(sums.predicted + c * lanes, predicted);
          add_to<A>(sums.labelled + c * lanes, labelled);
        }
      }
      if constexpr (kSquared) {
#pragma GCC unroll 4
        for (int v = 0; v < n; ++v) add_to<A>(squared_error + i + v * lanes, square[v]);
      }
    });
  });
}

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
      add_to<A>(sum + c * lanes, (more[0] + more[1]) + (more[2] + more[3]));
    };
    add(sums.intersection, both);
    add(sums.predicted, predicted);
    add(sums.labelled, labelled);
  }
}

}  // namespace
}  // namespace fusedloss::cpu::FUSEDLOSS_LEVEL
