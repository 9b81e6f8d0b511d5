// What the segmentation kernels know of each pixel and sum over all, and how they read labels beside logits.
#pragma once

#include "kernels/cpu/cross_entropy_tile.h"

namespace fusedloss::cpu::FUSEDLOSS_LEVEL {
namespace {

// What is said of each pixel of a block; every array ends in a whole vector.
template <class A>
struct alignas(64) SegmentationPixels {
  math::Bits<A> label[kBlock<A>];  // class, or -1 for none; class indices only
  math::Bits<A> place[kBlock<A>];  // class, or 0 for none: a place in a table that may be read without asking
  A weight[kBlock<A>];             // m; 0 where ignored
  A label_weight[kBlock<A>];       // m; 0 where there is no label
  A sum[kBlock<A>];                // softmax: S; else 1
  A inverse_sum[kBlock<A>];        // 1 / S; 0 where m is
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

// Accumulators of a chunk: one vector for each class and quantity.
template <class A>
struct OverlapSums {
  A* intersection;  // (C, lanes)
  A* predicted;     // (C, lanes); with class indices and a squared error P - I
  A* labelled;      // (C, lanes)
};

// The label of class c, of a vector of pixels from `at` on: one-hot, or a soft label; y_row: of class c.
template <class A, bool kSoft, class Y>
FUSEDLOSS_HOST_DEVICE Vector<A> label_at(const SegmentationPixels<A>& pixels, int at, const Y* y_row, int64_t c) {
  if constexpr (kSoft) return load<Y>(y_row + at);
  return load_labels<A>(pixels.label + at) == math::Bits<A>(c) ? splat<Vector<A>>(A(1)) : Vector<A>{};
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

}  // namespace
}  // namespace fusedloss::cpu::FUSEDLOSS_LEVEL
