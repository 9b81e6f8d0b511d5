// Between class-innermost memory (a pixel's classes side by side) and a class-major tile (a class's pixels side by
// side).
#pragma once

#include <cstddef>
#include <type_traits>
#include <utility>

#include "kernels/cpu/simd.h"
#include "kernels/cross_entropy.h"

namespace fusedloss::cpu::FUSEDLOSS_LEVEL {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Squares of quads
//
// A quad is 128 bits of a vector: within it lanes change places in one instruction, across quads they would take two,
// and memory fills and empties quads one by one. A square is the classes that a quad of memory holds, of as many pixels
// as a vector has; a wide one has twice the classes, which is half of the stores for one instruction more. Of a
// two-byte type a lane carries two classes, split when the square goes into the tile: half of the shuffles and of the
// stores.

template <class A>
constexpr int kQuad = 16 / static_cast<int>(sizeof(A));  // lanes
constexpr int kQuads = kVectorBytes / 16;                // in a vector

template <class T>
constexpr int kSquareClasses = 16 / static_cast<int>(sizeof(T));

// Named below whatever the compiler, so declared for GCC 11 too, where they have no bodies.
template <class A>
Vector<A> load_quads(const void* p, int64_t step);
template <int kPlace, int kCount, class A>
void store_quads(void* p, Vector<A> value);
template <class A>
void transpose_quads(Vector<A> (&rows)[kQuad<A>]);
template <class A>
void pair_quads(Vector<A>& a, Vector<A>& b);

// GCC has shufflevector from 12 on; with 11 plain loops move numbers one by one.
#if defined(__clang__) || __GNUC__ >= 12
constexpr bool kCanShuffle = true;

template <class V, std::size_t... kLane>
FUSEDLOSS_HOST_DEVICE auto join(V a, V b, std::index_sequence<kLane...>) {
  return __builtin_shufflevector(a, b, int(kLane)...);
}

template <int kFirst, class V, std::size_t... kLane>
FUSEDLOSS_HOST_DEVICE auto lanes_from(V a, std::index_sequence<kLane...>) {
  return __builtin_shufflevector(a, a, (kFirst + int(kLane))...);
}

// Lanes a0 b0 a1 b1 ... of the lower (kHigh = 0) or upper halves of each quad of a and b.
template <int kHigh, class A, std::size_t... kLane>
FUSEDLOSS_HOST_DEVICE Vector<A> interleave(Vector<A> a, Vector<A> b, std::index_sequence<kLane...>) {
  constexpr int n = kQuad<A>;
  return __builtin_shufflevector(
      a, b, (int(kLane) / n * n + kHigh * n / 2 + int(kLane) % n / 2 + int(kLane) % 2 * kLanes<A>)...);
}

// The quads at p, p + step bytes, ... as a vector.
template <class A>
FUSEDLOSS_HOST_DEVICE Vector<A> load_quads(const void* p, int64_t step) {
#if defined(__AVX512F__)
  // Each put in its place on its way from memory. GCC 12 makes shuffles of registers of it otherwise, for which an
  // Intel core has one unit.
  const auto quad = [&](int k) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const char*>(p) + k * step));
  };
  __m512i all = _mm512_castsi128_si512(quad(0));
  all = _mm512_inserti32x4(all, quad(1), 1);
  all = _mm512_inserti32x4(all, quad(2), 2);
  return (Vector<A>)_mm512_inserti32x4(all, quad(3), 3);
#else
  typedef VectorOf<A, 16> Quad;
  const auto quad = [&](int k) -> typename Quad::Type {
    return *reinterpret_cast<const typename Quad::Memory*>(static_cast<const char*>(p) + k * step);
  };
  if constexpr (kQuads == 1) {
    return quad(0);
  } else {
    return join(quad(0), quad(1), std::make_index_sequence<2 * kQuad<A>>{});
  }
#endif
}

// kCount quads of a vector, from place kPlace on, into memory.
template <int kPlace, int kCount, class A>
FUSEDLOSS_HOST_DEVICE void store_quads(void* p, Vector<A> value) {
  constexpr auto lanes = std::make_index_sequence<kCount * kQuad<A>>{};
  *reinterpret_cast<typename VectorOf<A, 16 * kCount>::Memory*>(p) = lanes_from<kPlace * kQuad<A>>(value, lanes);
}

// In each quad: rows[i][k] <-> rows[k][i]. Interleaving row i with row i + n / 2 moves one bit of the row number into
// the lane number; after as many rounds as there are bits they have changed places.
template <class A>
FUSEDLOSS_HOST_DEVICE void transpose_quads(Vector<A> (&rows)[kQuad<A>]) {
  constexpr int n = kQuad<A>;
  constexpr auto lanes = std::make_index_sequence<kLanes<A>>{};
  Vector<A> next[n];
#pragma GCC unroll 2
  for (int round = 1; round < n; round *= 2) {
#pragma GCC unroll 2
    for (int i = 0; i < n / 2; ++i) {
      next[2 * i] = interleave<0, A>(rows[i], rows[i + n / 2], lanes);
      next[2 * i + 1] = interleave<1, A>(rows[i], rows[i + n / 2], lanes);
    }
#pragma GCC unroll 4
    for (int i = 0; i < n; ++i) rows[i] = next[i];
  }
}

// Quads a0 b0 a1 b1 ... of the lower (kHigh = 0) or upper halves of a and b.
template <int kHigh, class A, std::size_t... kLane>
FUSEDLOSS_HOST_DEVICE Vector<A> interleave_quads(Vector<A> a, Vector<A> b, std::index_sequence<kLane...>) {
  constexpr int n = kQuad<A>;
  return __builtin_shufflevector(
      a, b, (kHigh * kLanes<A> / 2 + int(kLane) / (2 * n) * n + int(kLane) % n + int(kLane) / n % 2 * kLanes<A>)...);
}

// a becomes the lower, b the upper of the two vectors that hold quads a0 b0 a1 b1 ...
template <class A>
FUSEDLOSS_HOST_DEVICE void pair_quads(Vector<A>& a, Vector<A>& b) {
  constexpr auto lanes = std::make_index_sequence<kLanes<A>>{};
  const Vector<A> lower = interleave_quads<0, A>(a, b, lanes);
  b = interleave_quads<1, A>(a, b, lanes);
  a = lower;
}
#else
constexpr bool kCanShuffle = false;
#endif

// How many pixels, whole vectors of them, squares of the classes may cover; the others are left to a plain loop.
//
// With fewer classes than a square has, one reaches into the next pixels, which must lie close behind (row_stride) and
// be among the `reach` ones, count or more. It must be harmless there, so a store goes by increasing pixel and is
// mended by that pixel's own.
template <class T>
int pixels_in_squares(int64_t row_stride, int count, int64_t reach, int classes) {
  constexpr int lanes = kLanes<ComputeType<T>>, n = kSquareClasses<T>;
  if (!kCanShuffle || row_stride < classes || (classes < n && row_stride != classes)) return 0;
  // The last pixel of the square, n numbers wide, ends within reach.
  const auto ends_within = [&](int last) {
    return last < count && last * row_stride + (classes < n ? n : classes) <= reach * row_stride;
  };
  int covered = 0;
  while (ends_within(covered + lanes - 1)) covered += lanes;
  return covered;
}

// ---------------------------------------------------------------------------------------------------------------------
// Tiles in, rows out

// tile[c * tile_stride + i] = rows[i * row_stride + c], i < count, c < classes. Of `readable` pixels, count or more,
// the memory may be read. Squares may overlap: with 21 classes by fours, the last begins at class 17.
template <class T>
void rows_to_tile(const T* rows, int64_t row_stride, int count, int64_t readable, int classes, ComputeType<T>* tile,
                  int64_t tile_stride) {
  using A = ComputeType<T>;
  constexpr int n = kQuad<A>, width = kSquareClasses<T>;
  const int covered = pixels_in_squares<T>(row_stride, count, readable, classes);
  int i = 0;
  if constexpr (kCanShuffle) {
    const int64_t step = n * row_stride * static_cast<int64_t>(sizeof(T));
    for (; i < covered; i += kLanes<A>) {
      for (int past = width; past < classes + width; past += width) {
        const int c = classes < width ? 0 : (past < classes ? past : classes) - width;
        Vector<A> square[n];
#pragma GCC unroll 4
        for (int k = 0; k < n; ++k) square[k] = load_quads<A>(rows + (i + k) * row_stride + c, step);
        transpose_quads<A>(square);
        A* const to = tile + c * tile_stride + i;
        const auto put = [&](int k, Vector<A> value) {
          if (k < classes) store<A>(to + k * tile_stride, value);
        };
#pragma GCC unroll 4
        for (int k = 0; k < n; ++k) {
          if constexpr (sizeof(T) == 2) {
            Vector<float> even, odd;
            split_pairs(math::bit_cast<Bits>(square[k]), even, odd, rows);
            put(2 * k, even);
            put(2 * k + 1, odd);
          } else {
            put(k, square[k]);
          }
        }
      }
    }
  }
  for (; i < count; ++i) {
    for (int c = 0; c < classes; ++c) tile[c * tile_stride + i] = load_one(rows + i * row_stride + c);
  }
}

// The same of pixels that lie by `layout`, from `from` on.
template <class T>
void pixels_to_tile(const T* from, const LogitLayout& layout, int count, int64_t readable, int classes,
                    ComputeType<T>* tile, int64_t tile_stride) {
  using A = ComputeType<T>;
  if (layout.pixel_stride != 1)
    return rows_to_tile(from, layout.pixel_stride, count, readable, classes, tile, tile_stride);
  for (int64_t c = 0; c < classes; ++c) {
    const T* row = from + c * layout.class_stride;
    A* const to = tile + c * tile_stride;
    int i = 0;
    for (; i + kLanes<A> <= count; i += kLanes<A>) store<A>(to + i, load<T>(row + i));
    if (i < count) store<A>(to + i, load_partial<T>(row + i, count - i, 0));
  }
}

// Writes the classes of kSquares squares side by side, of as many pixels as a vector has, to `rows`; value(k): that of
// the k-th class.
template <int kSquares, class T, class Value>
FUSEDLOSS_HOST_DEVICE void square_to_rows(Value value, T* rows, int64_t row_stride) {
  using A = ComputeType<T>;
  constexpr int n = kQuad<A>;
  Vector<A> square[kSquares][n];
#pragma GCC unroll 2
  for (int w = 0; w < kSquares; ++w) {
#pragma GCC unroll 4
    for (int k = 0; k < n; ++k) {
      const int place = w * kSquareClasses<T> + k * kSquareClasses<T> / n;
      if constexpr (sizeof(T) == 2) {
        square[w][k] = math::bit_cast<Vector<A>>(join_pairs<false>(value(place), value(place + 1), rows));
      } else {
        square[w][k] = value(place);
      }
    }
    transpose_quads<A>(square[w]);
  }
  // The n rows of one group of pixels: kSquares quads, from `place` on, of each of a square's vectors.
  const auto put = [&](auto group, auto vector, auto place) {
    if constexpr (group() < kQuads) {
#pragma GCC unroll 4
      for (int k = 0; k < n; ++k) {
        store_quads<place(), kSquares, A>(rows + (group() * n + k) * row_stride, square[vector()][k]);
      }
    }
  };
  constexpr std::integral_constant<int, 0> zero{};
  constexpr std::integral_constant<int, 1> one{};
  constexpr std::integral_constant<int, 2> two{};
  constexpr std::integral_constant<int, 3> three{};
  if constexpr (kSquares == 1) {
    put(zero, zero, zero);
    put(one, zero, one);
    put(two, zero, two);
    put(three, zero, three);
  } else {
#pragma GCC unroll 4
    for (int k = 0; k < n; ++k) pair_quads<A>(square[0][k], square[1][k]);
    if constexpr (kQuads == 2) {
      put(zero, zero, zero);
      put(one, one, zero);
    } else {
      put(zero, zero, zero);
      put(one, zero, two);
      put(two, one, zero);
      put(three, one, two);
    }
  }
}

}  // namespace
}  // namespace fusedloss::cpu::FUSEDLOSS_LEVEL
