// Between class-innermost memory (a pixel's classes side by side) and a class-major tile (a class's pixels side by
// side).
#pragma once

#include <cstddef>
#include <type_traits>
#include <utility>

#include "kernels/cpu/simd.h"

namespace fusedloss::cpu::FUSEDLOSS_LEVEL {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Squares of quads
//
// A quad is 128 bits of a vector: within it lanes change places in one instruction, across quads they would take two,
// and memory fills and empties quads one by one. A square is the classes that a quad of memory holds, of as many pixels
// as a vector has. Of a two-byte type a lane carries two classes, split when the square goes into the tile: half of
// the shuffles and of the stores.

template <class A>
constexpr int kQuad = 16 / static_cast<int>(sizeof(A));  // lanes
constexpr int kQuads = kVectorBytes / 16;                // in a vector

template <class T>
constexpr int kSquareClasses = 16 / static_cast<int>(sizeof(T));

// Rows that a tile has at least, for tile_to_rows() to read: the most classes of a square.
constexpr int kLeastTileRows = kSquareClasses<BFloat16>;

// Named below whatever the compiler, so declared for GCC 11 too, where they have no bodies.
template <class A>
Vector<A> load_quads(const void* p, int64_t step);
template <int kFirst, class A>
void store_quad(void* p, Vector<A> value);
template <class A>
void transpose_quads(Vector<A> (&rows)[kQuad<A>]);

// GCC has shufflevector from 12 on; with 11 the loops below move numbers one by one.
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
  constexpr int n = kQuad<A>;
  typedef VectorOf<A, 16> Quad;
  const auto quad = [&](int k) -> typename Quad::Type {
    return *reinterpret_cast<const typename Quad::Memory*>(static_cast<const char*>(p) + k * step);
  };
  constexpr auto two = std::make_index_sequence<2 * n>{};
  if constexpr (kQuads == 1) {
    return quad(0);
  } else if constexpr (kQuads == 2) {
    return join(quad(0), quad(1), two);
  } else {
    constexpr auto four = std::make_index_sequence<4 * n>{};
    return join(join(quad(0), quad(1), two), join(quad(2), quad(3), two), four);
  }
}

// Lanes kFirst, kFirst + 1, ... of a vector as a quad in memory.
template <int kFirst, class A>
FUSEDLOSS_HOST_DEVICE void store_quad(void* p, Vector<A> value) {
  constexpr auto lanes = std::make_index_sequence<kQuad<A>>{};
  *reinterpret_cast<typename VectorOf<A, 16>::Memory*>(p) = lanes_from<kFirst>(value, lanes);
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
#else
constexpr bool kCanShuffle = false;
#endif

// Calls square(first pixel, first class) for squares that cover the pixels [0, result) and all classes, and returns
// result; the pixels from there on are left to a plain loop.
//
// Squares may overlap: with 21 classes by fours, the last begins at class 17. With fewer classes than a square has, one
// reaches into the next pixels, which must lie close behind (row_stride) and be among the `reach` ones, count or more;
// it must be harmless there, so a store goes by increasing pixel and is mended by that pixel's own.
template <class T, class Square>
FUSEDLOSS_HOST_DEVICE int for_squares(int64_t row_stride, int count, int64_t reach, int classes, Square square) {
  using A = ComputeType<T>;
  constexpr int n = kSquareClasses<T>;
  if (row_stride < classes || (classes < n && row_stride != classes)) return 0;
  int i = 0;
  // The last pixel of the square, n numbers wide, ends within reach.
  const auto ends_within = [&](int last) {
    return last < count && last * row_stride + (classes < n ? n : classes) <= reach * row_stride;
  };
  for (; ends_within(i + kLanes<A> - 1); i += kLanes<A>) {
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

// tile[c * tile_stride + i] = rows[i * row_stride + c], i < count, c < classes. Of `readable` pixels, count or more,
// the memory may be read.
template <class T>
void rows_to_tile(const T* rows, int64_t row_stride, int count, int64_t readable, int classes, ComputeType<T>* tile,
                  int tile_stride) {
  using A = ComputeType<T>;
  constexpr int n = kQuad<A>;
  int done = 0;
  if constexpr (kCanShuffle) {
    done = for_squares<T>(row_stride, count, readable, classes, [&](int i, int c) {
      Vector<A> square[n];
      const int64_t step = n * row_stride * static_cast<int64_t>(sizeof(T));
#pragma GCC unroll 4
      for (int k = 0; k < n; ++k) square[k] = load_quads<A>(rows + (i + k) * row_stride + c, step);
      transpose_quads<A>(square);
      const auto put = [&](int k, Vector<A> value) {
        if (k < classes) store<A>(tile + (c + k) * tile_stride + i, value);
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
    });
  }
  for (int i = done; i < count; ++i) {
    for (int c = 0; c < classes; ++c) tile[c * tile_stride + i] = load_one(rows + i * row_stride + c);
  }
}

// rows[i * row_stride + c] = tile[c * tile_stride + i], i < count, c < classes. The tile has kLeastTileRows rows, or
// more; what is read past `classes` is not kept. Of `writable` pixels, count or more, the memory may be written.
template <class T>
void tile_to_rows(const ComputeType<T>* tile, int tile_stride, int count, int64_t writable, int classes, T* rows,
                  int64_t row_stride) {
  using A = ComputeType<T>;
  constexpr int n = kQuad<A>;
  int done = 0;
  if constexpr (kCanShuffle) {
    done = for_squares<T>(row_stride, count, writable, classes, [&](int i, int c) {
      Vector<A> square[n];
      const auto row = [&](int k) { return load<A>(tile + (c + k) * tile_stride + i); };
#pragma GCC unroll 4
      for (int k = 0; k < n; ++k) {
        if constexpr (sizeof(T) == 2) {
          square[k] = math::bit_cast<Vector<A>>(join_pairs<false>(row(2 * k), row(2 * k + 1), rows));
        } else {
          square[k] = row(k);
        }
      }
      transpose_quads<A>(square);
      const auto put = [&](auto quad) {
#pragma GCC unroll 4
        for (int k = 0; k < n; ++k) {
          store_quad<quad() * n, A>(rows + (i + quad() * n + k) * row_stride + c, square[k]);
        }
      };
      put(std::integral_constant<int, 0>{});
      if constexpr (kQuads >= 2) put(std::integral_constant<int, 1>{});
      if constexpr (kQuads >= 4) {
        put(std::integral_constant<int, 2>{});
        put(std::integral_constant<int, 3>{});
      }
    });
  }
  for (int i = done; i < count; ++i) {
    for (int c = 0; c < classes; ++c) store_one(rows + i * row_stride + c, tile[c * tile_stride + i]);
  }
}

}  // namespace
}  // namespace fusedloss::cpu::FUSEDLOSS_LEVEL
