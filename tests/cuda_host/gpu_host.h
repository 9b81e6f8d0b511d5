// The kernels of csrc/kernels/cuda on a host compiler, for tests without a GPU.
//
// A thread is a fiber, a block runs its fibers one at a time in an order that a seed shuffles, the grid is a loop,
// whose order the seed changes too. A fiber runs to its next barrier, shuffle or vote; there it waits until all that
// have to come have come. What a GPU leaves undefined is an error here: lanes that a shuffle waits for in vain,
// barriers reached at different lines. Shared memory is as large as was asked for and full of NaN bytes before each
// block.
//
// A race shows as a wrong result under some seed, never as an error: a test of a kernel runs it under several.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define FUSEDLOSS_DEVICE inline __attribute__((always_inline))
#define FUSEDLOSS_KERNEL(threads) void
#define FUSEDLOSS_KERNEL_FOR(threads, blocks) void
#define FUSEDLOSS_UNROLL
#define FUSEDLOSS_UNROLL_BY(turns)
#define FUSEDLOSS_ARGUMENT const

namespace fusedloss::gpu {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

int thread();
int block_threads();
int64_t block();
int64_t blocks();
char* shared_memory();

void sync_block(const char* file = __builtin_FILE(), int line = __builtin_LINE());

constexpr size_t kMostExchangedBytes = 16;

// Waits for the lanes in `mask`; then `result` has the bytes of lane `from`'s value.
void exchange(unsigned mask, const void* value, size_t bytes, int from, void* result, const char* file, int line);
bool vote(unsigned mask, bool condition, const char* file, int line);
int lane();

template <class V>
V shuffle_xor(V value, int lanes, unsigned mask = kAllLanes, const char* file = __builtin_FILE(),
              int line = __builtin_LINE()) {
  static_assert(sizeof(V) <= kMostExchangedBytes, "a larger value needs more room in a Fiber");
  V result;
  exchange(mask, &value, sizeof(V), lane() ^ lanes, &result, file, line);
  return result;
}
inline bool any(bool condition, unsigned mask = kAllLanes, const char* file = __builtin_FILE(),
                int line = __builtin_LINE()) {
  return vote(mask, condition, file, line);
}

inline unsigned long long compare_and_swap(unsigned long long* at, unsigned long long expected,
                                           unsigned long long wanted) {
  const unsigned long long before = *at;
  if (before == expected) *at = wanted;
  return before;
}

// The bytes arrive at wait_for_copies(): whoever reads them before reads NaN.
void copy_async_bytes(void* shared, const void* global, int bytes);
void wait_for_copies();
template <int kBytes>
void copy_async(void* shared, const void* global) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  copy_async_bytes(shared, global, kBytes);
}

// Not _Float16, which C++ compilers have only lately. Rounded to the nearest, ties to even.
float float_of_half(uint16_t bits);
uint16_t half_of_float(float number);
uint16_t bfloat16_of_float(float number);
inline uint32_t halves_of_floats(float first, float second) {
  return half_of_float(first) | static_cast<uint32_t>(half_of_float(second)) << 16;
}
inline uint32_t bfloat16s_of_floats(float first, float second) {
  return bfloat16_of_float(first) | static_cast<uint32_t>(bfloat16_of_float(second)) << 16;
}

inline float larger(float a, float b) { return __builtin_fmaxf(a, b); }

// A GPU ends the context at a wide access to another address; a CPU would not mind.
void expect_aligned(const void* at, int bytes);

template <class V>
void store_streaming(V* at, const V& value) {
  expect_aligned(at, sizeof(V));
  *at = value;
}

using Stream = void*;

// 0, or 1 with the reason in error_text().
int run_grid(int64_t blocks, int threads, size_t shared_bytes, const std::function<void()>& kernel);

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, Stream,
           const Arguments&... arguments) {
  return run_grid(blocks, threads, shared_bytes, [&] { kernel(arguments...); });
}

int shared_memory_limit();

// Of this thread's last launch.
const char* error_text(int error);

}  // namespace fusedloss::gpu

// What a test sets, for all threads of the process; also from Python, through ctypes.
extern "C" {
// Of the order of the fibers and the blocks. Two launches under one seed run in the same order.
__attribute__((visibility("default"))) void fusedloss_host_set_seed(unsigned seed);
// 64 KiB unless told: what the smallest supported GPUs have.
__attribute__((visibility("default"))) void fusedloss_host_set_shared_memory_limit(int bytes);
// Launches until now that went well: tells a test that the kernels ran, and not something else.
__attribute__((visibility("default"))) int64_t fusedloss_host_launches(void);
}
