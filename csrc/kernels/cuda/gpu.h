// The machine as the kernels see it: threads, barriers, shuffles, shared memory, launches, asynchronous copies.
//
// The only header of csrc/kernels/cuda that knows a compiler. nvcc takes the definitions below; a host compiler, which
// builds the kernels for the tests, takes tests/cuda_host/gpu_host.h, where a thread is a fiber and the grid a loop.
// Shared memory is dynamic only, carved up by the kernels, and warps are whole: blocks have a multiple of 32 threads.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define FUSEDLOSS_DEVICE __device__ __forceinline__
// A kernel for blocks of exactly so many threads.
#define FUSEDLOSS_KERNEL(threads) __global__ void __launch_bounds__(threads)
// Likewise, of which so many at least shall have room on a multiprocessor.
#define FUSEDLOSS_KERNEL_FOR(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
// Before a loop with a constant number of turns, so that arrays indexed by its counter stay in registers.
#define FUSEDLOSS_UNROLL _Pragma("unroll")
// Before any loop: so many turns at once, for loads that do not wait for each other; 1 for code that stays small.
#define FUSEDLOSS_PRAGMA(text) _Pragma(#text)
#define FUSEDLOSS_UNROLL_BY(turns) FUSEDLOSS_PRAGMA(unroll turns)
// A struct of arguments: read where the driver put it, also with an index known at run time only.
#define FUSEDLOSS_ARGUMENT const __grid_constant__

namespace fusedloss::gpu {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

FUSEDLOSS_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
FUSEDLOSS_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }
FUSEDLOSS_DEVICE int64_t block() { return blockIdx.x; }
FUSEDLOSS_DEVICE int64_t blocks() { return gridDim.x; }

FUSEDLOSS_DEVICE void sync_block() { __syncthreads(); }

template <class V>
FUSEDLOSS_DEVICE V shuffle_xor(V value, int lanes) {
  return __shfl_xor_sync(kAllLanes, value, lanes);
}
FUSEDLOSS_DEVICE bool any(bool condition) { return __any_sync(kAllLanes, condition) != 0; }

// 16-byte aligned.
FUSEDLOSS_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char fusedloss_shared_memory[];
  return fusedloss_shared_memory;
}

// Returns what was there before.
FUSEDLOSS_DEVICE unsigned long long compare_and_swap(unsigned long long* at, unsigned long long expected,
                                                     unsigned long long wanted) {
  return atomicCAS(at, expected, wanted);
}

// Copies 4, 8 or 16 aligned bytes to shared memory without waiting; wait_for_copies() waits for the thread's own.
template <int kBytes>
FUSEDLOSS_DEVICE void copy_async(void* shared, const void* global) {
#if __CUDA_ARCH__ >= 800
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(to), "l"(global) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;\n" ::"r"(to), "l"(global), "n"(kBytes) : "memory");
  }
#else
  if constexpr (kBytes == 16) {
    *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
  } else if constexpr (kBytes == 8) {
    *static_cast<uint2*>(shared) = *static_cast<const uint2*>(global);
  } else {
    *static_cast<unsigned*>(shared) = *static_cast<const unsigned*>(global);
  }
#endif
}
FUSEDLOSS_DEVICE void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;\n" ::: "memory");
#endif
}

// The larger; where one is NaN, the other.
FUSEDLOSS_DEVICE float larger(float a, float b) { return fmaxf(a, b); }

// Half-width numbers by the hardware's conversions.
FUSEDLOSS_DEVICE float float_of_half(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
FUSEDLOSS_DEVICE uint16_t half_of_float(float value) { return __half_as_ushort(__float2half_rn(value)); }
FUSEDLOSS_DEVICE uint16_t bfloat16_of_float(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }
// Two at once, by one instruction; the first in the lower half.
FUSEDLOSS_DEVICE uint32_t halves_of_floats(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
FUSEDLOSS_DEVICE uint32_t bfloat16s_of_floats(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// On a GPU the hardware sees to it; the tests' machine does here.
FUSEDLOSS_DEVICE void expect_aligned(const void*, int) {}

// A store that says: nobody reads this soon.
template <class V>
FUSEDLOSS_DEVICE void store_streaming(V* at, const V& value) {
  if constexpr (sizeof(V) == 16) {
    __stcs(reinterpret_cast<uint4*>(at), *reinterpret_cast<const uint4*>(&value));
  } else if constexpr (sizeof(V) == 8) {
    __stcs(reinterpret_cast<uint2*>(at), *reinterpret_cast<const uint2*>(&value));
  } else if constexpr (sizeof(V) == 4) {
    __stcs(reinterpret_cast<unsigned*>(at), *reinterpret_cast<const unsigned*>(&value));
  } else {
    *at = value;
  }
}

using Stream = cudaStream_t;

// 0, or a cudaError_t.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, Stream stream,
           const Arguments&... arguments) {
  if (shared_bytes > size_t{48} << 10) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

// Shared memory that a block of the current device may ask for, in bytes.
inline int shared_memory_limit() {
  int device = 0;
  int bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) {
    return 48 << 10;
  }
  return bytes;
}

inline const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace fusedloss::gpu

#else
#include "gpu_host.h"
#endif
