// The two ways in which the gradient of a block goes to memory, whatever it is the gradient of.
//
// What it is comes as a function: make(vectors, partial, i, left) as in for_vectors() gives an object whose
// of_class(c, value) computes these vectors of class c.
#pragma once

#include "kernels/cpu/tile.h"
#include "kernels/cpu/transpose.h"

namespace fusedloss::cpu::FUSEDLOSS_LEVEL {
namespace {

// Writes kVectors vectors of a row of the gradient; of a partial one the first `left` numbers. kPlain: of store_two(),
// which writes whole pairs of vectors.
template <bool kStream, bool kPartial, bool kPlain, class T, int kVectors>
FUSEDLOSS_HOST_DEVICE void write_gradient(T* to, const Vector<ComputeType<T>> (&value)[kVectors], int left) {
  constexpr int lanes = kLanes<ComputeType<T>>;
  if constexpr (kPartial) {
    store_partial<T>(to, value[0], left);
  } else {
    constexpr int pairs = kVectors / 2 * 2;
#pragma GCC unroll 4
    for (int v = 0; v < pairs; v += 2) store_two<T, kStream, kPlain>(to + v * lanes, value[v], value[v + 1]);
    if constexpr (kVectors == pairs) return;
    if constexpr (kStream) {
      store_streaming<T>(to + pairs * lanes, value[kVectors - 1]);
    } else {
      store<T>(to + pairs * lanes, value[kVectors - 1]);
    }
  }
}

// Class by class. kStream: past the caches, to rows that are aligned.
template <bool kStream, bool kPlain, class T, class Make>
void gradient_to_classes(Make make, int count, int classes, T* gradient, int64_t class_stride) {
  using A = ComputeType<T>;
  // By value: what is written could be what a reference refers to, so a stride would be read again after every store.
  for_vectors<A, 4>(count, [=](auto vectors, auto partial, int i, int left) {
    const auto of_pixels = make(vectors, partial, i, left);
    T* row = gradient + i;
    for (int64_t c = 0; c < classes; ++c, row += class_stride) {
      Vector<A> value[vectors()];
      of_pixels.of_class(c, value);
      write_gradient<kStream, partial(), kPlain>(row, value, left);
    }
  });
}

// As rows, a pixel's classes side by side: rows[i * row_stride + c]. Of `writable` pixels, count or more, the memory
// may be written. Squares may overlap: with 21 classes by eights, the last begins at class 13.
template <class T, class Make>
void write_squares(Make make, int count, int64_t writable, int classes, T* rows, int64_t row_stride) {
  using A = ComputeType<T>;
  constexpr std::integral_constant<int, 1> one_vector{};
  // Of two-byte numbers a wide square has 16 classes: no gain, and with 19 classes more of them done twice.
  constexpr int squares = kQuads > 1 && sizeof(T) > 2 ? 2 : 1;
  constexpr int narrow = kSquareClasses<T>, wide = squares * narrow;
  const int covered = pixels_in_squares<T>(row_stride, count, writable, classes);
  int i = 0;
  if constexpr (kCanShuffle) {
    for (; i < covered; i += kLanes<A>) {
      const auto of_pixels = make(one_vector, std::false_type{}, i, kLanes<A>);
      const auto of_class = [&](int64_t c) {
        Vector<A> value[1];
        of_pixels.of_class(c, value);
        return value[0];
      };
      T* const first = rows + i * row_stride;
      for (int64_t c = 0; c < classes;) {
        const int64_t left = classes - c;
        if (classes >= wide && left > wide - narrow) {
          const int64_t from = left < wide ? classes - wide : c;
          square_to_rows<squares>([&](int k) { return of_class(from + k); }, first + from, row_stride);
          c += wide;
        } else {  // beyond the last class any number will do
          const int64_t from = left < narrow && classes >= narrow ? classes - narrow : c;
          const int64_t last = classes - 1;
          square_to_rows<1>([&](int k) { return of_class(from + k < last ? from + k : last); }, first + from,
                            row_stride);
          c += narrow;
        }
      }
    }
  }
  for (; i < count; i += kLanes<A>) {
    const auto of_pixels = make(one_vector, std::false_type{}, i, kLanes<A>);
    for (int64_t c = 0; c < classes; ++c) {
      Vector<A> value[1];
      of_pixels.of_class(c, value);
      for (int lane = 0; lane < kLanes<A> && i + lane < count; ++lane) {
        store_one(rows + (i + lane) * row_stride + c, value[0][lane]);
      }
    }
  }
}

// A gradient that is in the tile already.
template <int kVectors, class A>
struct TileGradient {
  const A* tile;  // (C, stride), at the first pixel
  int64_t stride;

  FUSEDLOSS_HOST_DEVICE void of_class(int64_t c, Vector<A> (&value)[kVectors]) const {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) value[v] = load(tile + c * stride + v * kLanes<A>);
  }
};

template <class A>
auto tile_gradient(const A* tile, int64_t stride) {
  return [=](auto vectors, auto, int i, int) { return TileGradient<vectors(), A>{tile + i, stride}; };
}

// Where the rows of a block go, and the memory that they pass through.
template <class T>
struct Rows {
  T* gradient;
  int64_t row_stride;
  bool stream;
  T* together;           // (count + one vector, C) or more
  ComputeType<T>* tile;  // (C, tile_stride), may be what the gradient is computed from
  int64_t tile_stride;
  Outgoing<T>* outgoing;  // takes rows that are together, if whole vectors of them; or nullptr: they go at once
};

// As rows, squares of which are written as they are computed. Where they are streamed they are put together first: a
// row of 21 numbers has no whole vector that could be streamed, but rows lie back to back.
template <class T, class Make>
void gradient_by_squares(Make make, int count, int classes, const Rows<T>& to) {
  if (to.stream && to.row_stride == classes && streaming_aligned(to.gradient)) {
    write_squares(make, count, count + kLanes<ComputeType<T>>, classes, to.together, classes);
    if (to.outgoing != nullptr && count % Outgoing<T>::kStep == 0) {
      *to.outgoing = {to.together, to.gradient, count, classes};
    } else {
      stream_copy(to.gradient, to.together, int64_t{count} * classes);
    }
  } else {
    write_squares(make, count, count, classes, to.gradient, to.row_stride);
  }
}

// As rows of what is in the tile already.
template <class T>
void tile_to_rows(int count, int classes, const Rows<T>& to) {
  gradient_by_squares(tile_gradient(static_cast<const ComputeType<T>*>(to.tile), to.tile_stride), count, classes, to);
}

// As rows. Two-byte numbers go by way of the tile: they are rounded besides, which GCC 12 mixes badly with the gradient
// (5 %).
template <class T, class Make>
void gradient_to_rows(Make make, int count, int classes, const Rows<T>& to) {
  if constexpr (sizeof(T) == 2) {
    gradient_to_classes<false, false>(make, count, classes, to.tile, to.tile_stride);
    tile_to_rows(count, classes, to);
  } else {
    gradient_by_squares(make, count, classes, to);
  }
}

}  // namespace
}  // namespace fusedloss::cpu::FUSEDLOSS_LEVEL
