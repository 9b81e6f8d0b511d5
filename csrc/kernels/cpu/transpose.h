// Between class-innermost memory (a pixel's classes side by side) and a class-major tile (a class's pixels side by
// side).
#pragma once

#include <cstddef>
#include <utility>

#include "kernels/cpu/simd.h"

namespace fusedloss::cpu::FUSEDLOSS_LEVEL {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// A square of vectors

// GCC has shufflevector from 12 on; with 11 the loops below move numbers one by one.
#if defined(__clang__) || __GNUC__ >= 12
constexpr bool kCanShuffle = true;

// Lanes a0 b0 a1 b1 ... of the lower (kHigh = 0) or upper halves of a and b.
template <int kHigh, class V, std::size_t... kLane>
FUSEDLOSS_HOST_DEVICE V interleave(V a, V b, std::index_sequence<kLane...>) {
  constexpr int lanes = sizeof...(kLane);
  return __builtin_shufflevector(a, b, (int(kLane % 2) * lanes + int(kLane / 2) + kHigh * lanes / 2)...);
}
#else
constexpr bool kCanShuffle = false;

template <int kHigh, class V, std::size_t... kLane>
FUSEDLOSS_HOST_DEVICE V interleave(V a, V, std::index_sequence<kLane...>) {
  return a;
}
#endif

// rows[i][k] <-> rows[k][i]. Interleaving row i with row i + n / 2 moves one bit of the row number into the lane
// number; after as many rounds as there are bits they have changed places.
template <class A>
FUSEDLOSS_HOST_DEVICE void transpose_square(Vector<A> (&rows)[kLanes<A>]) {
  constexpr int n = kLanes<A>;
  constexpr auto lanes = std::make_index_sequence<n>{};
  Vector<A> next[n];
#pragma GCC unroll 4
  for (int round = 1; round < n; round *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i) {
      next[2 * i] = interleave<0>(rows[i], rows[i + n / 2], lanes);
      next[2 * i + 1] = interleave<1>(rows[i], rows[i + n / 2], lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) rows[i] = next[i];
  }
}

// Calls square(first pixel, first class) for squares that cover the pixels [0, result) and all classes, and returns
// result; the pixels from there on are left to a plain loop.
//
// Squares may overlap: with 21 classes in vectors of 16, the second begins at class 5. With fewer classes than lanes a
// vector reaches into the next pixels, which must lie close behind (row_stride) and be among the `count`; it must be
// harmless there, so a store goes by increasing pixel and is mended by that pixel's own.
template <class A, class Square>
FUSEDLOSS_HOST_DEVICE int for_squares(int64_t row_stride, int count, int classes, Square square) {
  constexpr int n = kLanes<A>;
  if (!kCanShuffle || row_stride < classes || (classes < n && row_stride != classes)) return 0;
  int i = 0;
  // The last pixel of the square, read n numbers wide, ends within the block.
  for (; i + n <= count && (i + n - 1) * row_stride + (classes < n ? n : classes) <= count * row_stride; i += n) {
    if (classes < n) {
      square(i, 0);
      continue;
    }
    for (int c = 0; c < classes; c += n) square(i, c + n <= classes ? c : classes - n);
  }
  return i;
}

// ---------------------------------------------------------------------------------------------------------------------
// Tiles

// tile[c * tile_stride + i] = rows[i * row_stride + c], i < count, c < classes.
template <class T>
void rows_to_tile(const T* rows, int64_t row_stride, int count, int classes, ComputeType<T>* tile, int tile_stride) {
  using A = ComputeType<T>;
  constexpr int n = kLanes<A>;
  const int done = for_squares<A>(row_stride, count, classes, [&](int i, int c) {
    Vector<A> square[n];
#pragma GCC unroll 16
    for (int k = 0; k < n; ++k) square[k] = load<T>(rows + (i + k) * row_stride + c);
    transpose_square<A>(square);
    const int height = classes < n ? classes : n;
    for (int k = 0; k < height; ++k) store<A>(tile + (c + k) * tile_stride + i, square[k]);
  });
  for (int i = done; i < count; ++i) {
    for (int c = 0; c < classes; ++c) tile[c * tile_stride + i] = load_one(rows + i * row_stride + c);
  }
}

// rows[i * row_stride + c] = tile[c * tile_stride + i], i < count, c < classes. The tile has as many rows as a vector
// has lanes, or more; what is read past `classes` is not kept.
template <class T>
void tile_to_rows(const ComputeType<T>* tile, int tile_stride, int count, int classes, T* rows, int64_t row_stride) {
  using A = ComputeType<T>;
  constexpr int n = kLanes<A>;
  const int done = for_squares<A>(row_stride, count, classes, [&](int i, int c) {
    Vector<A> square[n];
#pragma GCC unroll 16
    for (int k = 0; k < n; ++k) square[k] = load<A>(tile + (c + k) * tile_stride + i);
    transpose_square<A>(square);
#pragma GCC unroll 16
    for (int k = 0; k < n; ++k) store<T>(rows + (i + k) * row_stride + c, square[k]);
  });
  for (int i = done; i < count; ++i) {
    for (int c = 0; c < classes; ++c) store_one(rows + i * row_stride + c, tile[c * tile_stride + i]);
  }
}

}  // namespace
}  // namespace fusedloss::cpu::FUSEDLOSS_LEVEL
