// Contract of the mse_loss kernels on a GPU.
//
// All memory is the device's, and nothing waits: numbers that the host would have to ask for (the incoming gradient,
// the sum of the weights) go from kernel to kernel by address. So MseLossParams::weighted_mean is not read, and
// gradient_scale is only what the sizes tell.
#pragma once

#include "kernels/mse_loss.h"

namespace fusedloss::cuda {

// A run of elements that one block adds up. A function of the number of elements alone, and with it the order of all
// sums, so that every run gives the same bits.
struct MseLossChunks {
  int64_t elements;  // of a chunk; the last may have fewer
  int64_t count;
};

// A smaller chunk would keep a block's threads waiting for memory longer than they work.
constexpr int64_t kMseLossSmallestChunk = 2048;
// Some waves of blocks on the largest GPUs, and no more partial sums than one block adds up in no time.
constexpr int64_t kMseLossMostChunks = 2048;

inline MseLossChunks mse_loss_chunks_of(int64_t elements) {
  const int64_t smallest = (elements + kMseLossSmallestChunk - 1) / kMseLossSmallestChunk;
  const int64_t together = (smallest + kMseLossMostChunks - 1) / kMseLossMostChunks;
  if (together == 0) return {kMseLossSmallestChunk, 0};
  return {together * kMseLossSmallestChunk, (smallest + together - 1) / together};
}

struct MseLossResult {
  bool mean;                 // else the sum
  MseLossPartial* partials;  // (chunks), scratch
  void* loss;                // () of loss_dtype
  DType loss_dtype;
  double* statistics;  // (2,) sum w (or the number of elements) and mean, or nullptr where they are not wanted
};

struct MseLossIncoming {
  const void* grad;  // () of grad_dtype: incoming gradient of the loss or, where it is the same, of each element; or
                     // nullptr: MseLossParams::element_gradient has it
  DType grad_dtype;
  const double* statistics;  // (2,) of a weighted mean's forward, else nullptr
};

// Each returns 0, or what error_text() (kernels/cuda/launch.h) explains. stream: a cudaStream_t.
int mse_loss_forward(const MseLossParams& params, const MseLossResult& result, void* stream);  // mean or sum
int mse_loss_forward_each(const MseLossParams& params, void* stream);                          // loss of each element
int mse_loss_backward(const MseLossParams& params, const MseLossIncoming& incoming, void* stream);

}  // namespace fusedloss::cuda
