// Between class-innermost memory (a pixel's classes side by side) and a class-major tile (a class's pixels side by
// side).
#pragma once

#include "kernels/cpu/simd.h"

namespace fusedloss::cpu::FUSEDLOSS_LEVEL {
namespace {

// tile[c * tile_stride + i] = rows[i * row_stride + c], i < count, c < classes.
template <class T>
void rows_to_tile(const T* rows, int64_t row_stride, int count, int classes, ComputeType<T>* tile, int tile_stride) {
  for (int i = 0; i < count; ++i) {
    for (int c = 0; c < classes; ++c) tile[c * tile_stride + i] = load_one(rows + i * row_stride + c);
  }
}

// rows[i * row_stride + c] = tile[c * tile_stride + i], i < count, c < classes.
template <class T>
void tile_to_rows(const ComputeType<T>* tile, int tile_stride, int count, int classes, T* rows, int64_t row_stride) {
  for (int i = 0; i < count; ++i) {
    for (int c = 0; c < classes; ++c) store_one(rows + i * row_stride + c, tile[c * tile_stride + i]);
  }
}

}  // namespace
}  // namespace fusedloss::cpu::FUSEDLOSS_LEVEL
