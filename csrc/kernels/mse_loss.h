// Contract of the mse_loss kernels.
//
// All arrays are seen through one list of dimensions (outermost first, after merging those that are adjacent in every
// array), each with its own strides; a broadcast array has stride 0. Arrays of the same shape and memory format come
// down to one dimension of stride 1.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

namespace fusedloss {

constexpr int kMaxDimensions = 8;

struct StridedArray {
  const void* data;  // nullptr: this array is not there
  DType dtype;
  int64_t strides[kMaxDimensions];  // in elements
};

struct MseLossParams {
  int dimensions;  // at least 1
  int64_t sizes[kMaxDimensions];
  int64_t elements;  // product of sizes

  StridedArray input;
  StridedArray target;
  StridedArray weight;
  bool float64;  // compute in float64

  // Forward: w (x - y)^2 of each element (data may be nullptr). Forward and gradient: that of `input`. Backward: the
  // gradient asked for.
  StridedArray output;

  // Backward. The forward that writes the gradient too reads only gradient_scale, and takes no weights.
  enum class Wanted : int { kInput = 0, kTarget = 1, kWeight = 2 } wanted;
  StridedArray
      element_gradient;  // incoming gradient of each element, times gradient_scale; or nullptr for the latter alone
  double gradient_scale;
  double weighted_mean;  // kWeight under reduction "mean": the loss, d(sum w d^2 / sum w)/dw = (d^2 - loss) / sum w;
                         // else 0
};

struct MseLossPartial {
  double loss;    // sum w (x - y)^2
  double weight;  // sum w; not written without weights
};

// Elements in a chunk: the same sums for any number of threads.
constexpr int64_t kMseLossChunk = 65536;

inline int64_t mse_loss_chunks(int64_t elements) { return (elements + kMseLossChunk - 1) / kMseLossChunk; }

}  // namespace fusedloss
