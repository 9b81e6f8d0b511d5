// Sums over a warp and over a block, in an order that is always the same.
#pragma once

#include "kernels/cuda/gpu.h"

namespace fusedloss::cuda {

// Every lane gets the sum of all.
template <class V>
FUSEDLOSS_DEVICE V warp_sum(V value) {
  for (int lanes = gpu::kWarp / 2; lanes > 0; lanes /= 2) value += gpu::shuffle_xor(value, lanes);
  return value;
}

// Every thread gets the sum of all. `shared` has room for a number a warp, and nobody uses it for something else before
// the next barrier; all threads of the block have to come.
FUSEDLOSS_DEVICE double block_sum(double value, double* shared) {
  const int warps = gpu::block_threads() / gpu::kWarp;
  value = warp_sum(value);
  gpu::sync_block();  // whatever was in `shared` has been read
  if (gpu::thread() % gpu::kWarp == 0) shared[gpu::thread() / gpu::kWarp] = value;
  gpu::sync_block();
  double sum = 0.0;
  for (int warp = 0; warp < warps; ++warp) sum += shared[warp];
  return sum;
}

// Sums of several numbers at once, to out. shared: (kCount, warps); as above.
template <int kCount>
FUSEDLOSS_DEVICE void block_sums(const double (&values)[kCount], double* shared, double* out) {
  const int warps = gpu::block_threads() / gpu::kWarp;
  gpu::sync_block();  // whatever was in `shared` has been read
  for (int k = 0; k < kCount; ++k) {
    const double sum = warp_sum(values[k]);
    if (gpu::thread() % gpu::kWarp == 0) shared[k * warps + gpu::thread() / gpu::kWarp] = sum;
  }
  gpu::sync_block();
  if (gpu::thread() >= kCount) return;
  double sum = 0.0;
  for (int warp = 0; warp < warps; ++warp) sum += shared[gpu::thread() * warps + warp];
  out[gpu::thread()] = sum;
}

}  // namespace fusedloss::cuda
