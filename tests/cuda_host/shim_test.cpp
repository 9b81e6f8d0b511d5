// Does gpu_host.cpp see what it is there to see? Small kernels, right ones and wrong ones.
//
//   shim_test --list     one case a line; the word `crashes` after it: a sanitizer has to end the program
//   shim_test CASE       exits with 0, or says what is wrong and exits with 1
//
// tests/test_cuda_host.py compiles and runs it.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "kernels/cuda/gpu.h"

#define REQUIRE(condition)                                                \
  do {                                                                    \
    if (!(condition)) {                                                   \
      std::printf("%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
      std::printf("last launch: '%s'\n", gpu::error_text(1));             \
      std::exit(1);                                                       \
    }                                                                     \
  } while (false)

namespace fusedloss {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / gpu::kWarp;
constexpr unsigned kSeeds = 100;

bool says(const char* words) { return std::strstr(gpu::error_text(1), words) != nullptr; }

template <class... Parameters, class... Arguments>
int run(unsigned seed, void (*kernel)(Parameters...), int64_t blocks, size_t shared_bytes, Arguments... arguments) {
  fusedloss_host_set_seed(seed);
  return gpu::launch(kernel, blocks, kThreads, shared_bytes, nullptr, arguments...);
}

// Whether each seed gives this error.
template <class... Parameters, class... Arguments>
bool always_fails(const char* words, void (*kernel)(Parameters...), Arguments... arguments) {
  for (unsigned seed = 0; seed < kSeeds; ++seed) {
    if (run(seed, kernel, 3, 1024, arguments...) == 0 || !says(words)) return false;
  }
  return true;
}

FUSEDLOSS_DEVICE float warp_sum(float value) {
  for (int lanes = gpu::kWarp / 2; lanes > 0; lanes /= 2) value += gpu::shuffle_xor(value, lanes);
  return value;
}

// --- what is right comes out right
// ------------------------------------------------------------------------------------

// Sums of 3 x kThreads numbers a block, one after the other in the same shared memory. Without the barrier in front a
// fast warp overwrites what a slow one has not read; without the one behind it reads what has not been written.
template <bool kFront, bool kBehind>
FUSEDLOSS_KERNEL(kThreads)
sum_blocks(const float* numbers, float* sums) {
  float* shared = reinterpret_cast<float*>(gpu::shared_memory());
  for (int i = 0; i < 3; ++i) {
    const int64_t row = gpu::block() * 3 + i;
    float value = warp_sum(numbers[row * kThreads + gpu::thread()]);
    if (kFront) gpu::sync_block();
    if (gpu::thread() % gpu::kWarp == 0) shared[gpu::thread() / gpu::kWarp] = value;
    if (kBehind) gpu::sync_block();
    float sum = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) sum += shared[warp];
    if (gpu::thread() == kThreads - 1) sums[row] = sum;
  }
}

// How many of the seeds give wrong sums.
template <bool kFront, bool kBehind>
int wrong_sums() {
  constexpr int kRows = 15;
  std::vector<float> numbers(kRows * kThreads);
  std::vector<float> expected(kRows, 0.0f);
  for (size_t i = 0; i < numbers.size(); ++i) {
    numbers[i] = static_cast<float>(i * 7919 % 1021);  // whole and small, so that any order of a sum is exact
    expected[i / kThreads] += numbers[i];
  }
  int wrong = 0;
  for (unsigned seed = 0; seed < kSeeds; ++seed) {
    std::vector<float> sums(kRows, -1.0f);
    const int error = run(seed, sum_blocks<kFront, kBehind>, kRows / 3, kWarps * sizeof(float),
                          static_cast<const float*>(numbers.data()), sums.data());
    REQUIRE(error == 0);
    if (sums != expected) ++wrong;
  }
  return wrong;
}

void block_reduction() { REQUIRE((wrong_sums<true, true>() == 0)); }

FUSEDLOSS_KERNEL(kThreads)
number_threads(int64_t* numbers) {
  const int64_t first = gpu::block() * gpu::block_threads();
  numbers[first + gpu::thread()] += first + gpu::thread() + 1000 * gpu::blocks();
}

void every_thread_of_every_block_once() {
  for (unsigned seed = 0; seed < kSeeds; ++seed) {
    for (int64_t blocks : {1, 2, 7}) {
      std::vector<int64_t> numbers(blocks * kThreads, 0);
      REQUIRE(run(seed, number_threads, blocks, 0, numbers.data()) == 0);
      for (int64_t i = 0; i < blocks * kThreads; ++i) REQUIRE(numbers[i] == i + 1000 * blocks);
    }
  }
}

FUSEDLOSS_KERNEL(kThreads)
vote_in_warps(const int* who, int* votes) {
  const bool mine = gpu::thread() == *who;
  votes[gpu::thread()] = gpu::any(mine) ? 1 : 0;
}

void votes() {
  for (int who = 0; who < kThreads; who += 5) {
    std::vector<int> votes(kThreads, -1);
    REQUIRE(run(who, vote_in_warps, 1, 0, static_cast<const int*>(&who), votes.data()) == 0);
    for (int t = 0; t < kThreads; ++t) REQUIRE(votes[t] == (t / gpu::kWarp == who / gpu::kWarp ? 1 : 0));
  }
}

// Threads that are done do not keep the others from a barrier.
FUSEDLOSS_KERNEL(kThreads)
leave_before_barrier(int* sum) {
  if (gpu::thread() % 3 == 0) return;
  gpu::sync_block();
  *sum += 1;
}

void barrier_of_those_that_are_left() {
  for (unsigned seed = 0; seed < kSeeds; ++seed) {
    int sum = 0;
    REQUIRE(run(seed, leave_before_barrier, 1, 0, &sum) == 0);
    REQUIRE(sum == 85);
  }
}

FUSEDLOSS_KERNEL(kThreads)
note_order(std::vector<int>* order) { order->push_back(static_cast<int>(gpu::block()) * kThreads + gpu::thread()); }

void seeds_give_orders() {
  std::set<std::vector<int>> orders;
  std::set<int> first_blocks;
  for (unsigned seed = 0; seed < 20; ++seed) {
    std::vector<int> order;
    std::vector<int> again;
    REQUIRE(run(seed, note_order, 4, 0, &order) == 0);
    REQUIRE(run(seed, note_order, 4, 0, &again) == 0);
    REQUIRE(order == again);
    orders.insert(order);
    first_blocks.insert(order[0] / kThreads);
  }
  REQUIRE(orders.size() == 20);
  REQUIRE(first_blocks.size() == 4);
}

FUSEDLOSS_KERNEL(kThreads)
take_once(unsigned long long* taken, int* winners) {
  if (gpu::compare_and_swap(taken, 0, 1) == 0) ++*winners;
}

void compare_and_swap() {
  unsigned long long taken = 0;
  int winners = 0;
  REQUIRE(run(0, take_once, 5, 0, &taken, &winners) == 0);
  REQUIRE(taken == 1);
  REQUIRE(winners == 1);
}

void halves() {
  // Every half-width number comes back from float as it was, NaN as NaN.
  for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const uint16_t half = static_cast<uint16_t>(bits);
    const float number = gpu::float_of_half(half);
    const int exponent = half >> 10 & 31;
    const double fraction = half & 1023;
    double expected = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024.0 + fraction, exponent - 25);
    if (exponent == 31) expected = fraction == 0 ? std::numeric_limits<double>::infinity() : std::nan("");
    if ((half & 0x8000u) != 0) expected = -expected;
    if (std::isnan(expected)) {
      REQUIRE(std::isnan(number));
      REQUIRE((gpu::half_of_float(number) & 0x7fffu) > 0x7c00u);
    } else {
      REQUIRE(static_cast<double>(number) == expected);
      REQUIRE(gpu::half_of_float(number) == half);
    }
    // The middle between two neighbors goes to the even one, and a little above it to the upper one.
    if (exponent == 31 || (half & 0x8000u) != 0) continue;
    const float step = std::ldexp(1.0f, exponent == 0 ? -24 : exponent - 25);
    const float middle = number + step / 2;
    REQUIRE(gpu::half_of_float(middle) == ((half & 1u) == 0 ? half : half + 1));
    REQUIRE(gpu::half_of_float(std::nextafterf(middle, 1e9f)) == half + 1);
    REQUIRE(gpu::half_of_float(-std::nextafterf(middle, 0.0f)) == (half | 0x8000u));
  }
  for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const uint32_t wide = bits << 16;
    float number;
    std::memcpy(&number, &wide, sizeof(number));
    if (std::isnan(number)) {
      REQUIRE(gpu::bfloat16_of_float(number) == 0x7fffu);
      continue;
    }
    REQUIRE(gpu::bfloat16_of_float(number) == bits);
    if (std::isinf(number)) continue;
    const uint32_t middle_bits = wide | 0x8000u;
    std::memcpy(&number, &middle_bits, sizeof(number));
    REQUIRE(gpu::bfloat16_of_float(number) == ((bits & 1u) == 0 ? bits : bits + 1));
  }
}

void two_host_threads() {
  // Each runs its own machine. (REQUIRE ends the whole program, from either.)
  std::thread other([] { block_reduction(); });
  block_reduction();
  other.join();
}

// --- what is wrong is seen
// --------------------------------------------------------------------------------------------

void missing_barrier_behind_a_write() {
  const int wrong = wrong_sums<true, false>();
  std::printf("wrong under %d of %u seeds\n", wrong, kSeeds);
  REQUIRE(wrong > 0);
}

void missing_barrier_before_a_write() {
  const int wrong = wrong_sums<false, true>();
  std::printf("wrong under %d of %u seeds\n", wrong, kSeeds);
  REQUIRE(wrong > 0);
}

// What a block leaves for another one in the same launch.
FUSEDLOSS_KERNEL(kThreads)
read_previous_block(int* numbers) {
  if (gpu::thread() == 0) numbers[gpu::block()] = gpu::block() == 0 ? 1 : numbers[gpu::block() - 1] + 1;
}

void block_that_needs_another() {
  int wrong = 0;
  for (unsigned seed = 0; seed < kSeeds; ++seed) {
    std::vector<int> numbers(5, 0);
    REQUIRE(run(seed, read_previous_block, 5, 0, numbers.data()) == 0);
    if (numbers != std::vector<int>{1, 2, 3, 4, 5}) ++wrong;
  }
  REQUIRE(wrong > 0);
}

FUSEDLOSS_KERNEL(kThreads)
shuffle_half_a_warp(float* out) {
  if (gpu::thread() % gpu::kWarp < 16) out[gpu::thread()] = gpu::shuffle_xor(1.0f, 16, 0x0000ffffu);
}
FUSEDLOSS_KERNEL(kThreads)
shuffle_in_a_mask_without_oneself(float* out) { out[gpu::thread()] = gpu::shuffle_xor(1.0f, 1, 0x0000ffffu); }
FUSEDLOSS_KERNEL(kThreads)
shuffle_within_half_a_warp(float* out) {
  if (gpu::thread() % gpu::kWarp < 16) {
    out[gpu::thread()] = gpu::shuffle_xor(static_cast<float>(gpu::thread()), 8, 0x0000ffffu);
  }
}

void shuffle_with_a_partial_mask() {
  std::vector<float> out(kThreads, -1.0f);
  REQUIRE(always_fails("reads lane", shuffle_half_a_warp, out.data()));
  REQUIRE(says("not in the mask"));
  REQUIRE(says("shim_test.cpp:"));
  REQUIRE(always_fails("not in the mask", shuffle_in_a_mask_without_oneself, out.data()));
  REQUIRE(run(0, shuffle_within_half_a_warp, 1, 0, out.data()) == 0);
  for (int t = 0; t < kThreads; ++t) REQUIRE(out[t] == (t % 32 < 16 ? static_cast<float>(t ^ 8) : -1.0f));
}

FUSEDLOSS_KERNEL(kThreads)
leave_before_shuffle(const int* elements, float* out) {
  if (gpu::thread() >= *elements) return;
  out[gpu::thread()] = warp_sum(1.0f);
}
FUSEDLOSS_KERNEL(kThreads)
leave_before_vote(const int* elements, float* out) {
  if (gpu::thread() >= *elements) return;
  out[gpu::thread()] = gpu::any(true) ? 1.0f : 0.0f;
}

void lanes_that_left_before_a_shuffle() {
  std::vector<float> out(kThreads);
  for (const int elements : {1, 31, 33, 100, 127}) {
    REQUIRE(always_fails("threads wait in vain", leave_before_shuffle, &elements, out.data()));
    REQUIRE(says("waits at the shuffle"));
    REQUIRE(says("has ended"));
    REQUIRE(always_fails("waits at the vote", leave_before_vote, &elements, out.data()));
  }
  for (const int elements : {32, 96, 128}) {
    REQUIRE(run(0, leave_before_shuffle, 1, 0, &elements, out.data()) == 0);
  }
}

FUSEDLOSS_KERNEL(kThreads)
shuffle_in_branches(float* out) {
  if (gpu::thread() % 2 == 0) {
    out[gpu::thread()] = gpu::shuffle_xor(1.0f, 2);
  } else {
    out[gpu::thread()] = gpu::shuffle_xor(2.0f, 2);
  }
}

void shuffles_at_different_lines() {
  std::vector<float> out(kThreads);
  REQUIRE(always_fails("threads wait in vain", shuffle_in_branches, out.data()));
}

FUSEDLOSS_KERNEL(kThreads)
barriers_in_branches() {
  if (gpu::thread() < 64) {
    gpu::sync_block();
  } else {
    gpu::sync_block();
  }
}

void barriers_at_different_lines() { REQUIRE(always_fails("barriers at different places", barriers_in_branches)); }

FUSEDLOSS_KERNEL(kThreads)
barrier_beside_shuffle(float* out) {
  if (gpu::thread() % gpu::kWarp == 0) gpu::sync_block();
  out[gpu::thread()] = warp_sum(1.0f);
}

void barrier_that_a_part_of_a_warp_reaches() {
  std::vector<float> out(kThreads);
  REQUIRE(always_fails("waits at the barrier", barrier_beside_shuffle, out.data()));
}

FUSEDLOSS_KERNEL(kThreads)
read_shared(float* out) {
  float* shared = reinterpret_cast<float*>(gpu::shared_memory());
  out[gpu::block() * kThreads + gpu::thread()] = shared[gpu::thread()];
  shared[gpu::thread()] = 1.0f;
}

void shared_memory_is_nan_at_first() {
  for (unsigned seed = 0; seed < kSeeds; ++seed) {
    std::vector<float> out(4 * kThreads, 0.0f);
    REQUIRE(run(seed, read_shared, 4, kThreads * sizeof(float), out.data()) == 0);
    for (float number : out) REQUIRE(std::isnan(number));
  }
}

// Copies two rounds through the same place; kWait: waits before it reads.
template <bool kWait>
FUSEDLOSS_KERNEL(kThreads)
copy_rounds(const double* in, double* out) {
  double* shared = reinterpret_cast<double*>(gpu::shared_memory()) + 2 * gpu::thread();
  for (int round = 0; round < 2; ++round) {
    const double* from = in + round * 2 * kThreads + 2 * gpu::thread();
    gpu::copy_async<16>(shared, from);
    if (kWait) gpu::wait_for_copies();
    for (int i = 0; i < 2; ++i) out[round * 2 * kThreads + 2 * gpu::thread() + i] = shared[i];
    gpu::wait_for_copies();
  }
}

void asynchronous_copies() {
  alignas(16) static double in[4 * kThreads];
  for (int i = 0; i < 4 * kThreads; ++i) in[i] = i;
  std::vector<double> out(4 * kThreads);
  REQUIRE(run(0, copy_rounds<true>, 1, 16 * kThreads, static_cast<const double*>(in), out.data()) == 0);
  for (int i = 0; i < 4 * kThreads; ++i) REQUIRE(out[i] == i);
}

void copies_read_before_waiting_are_nan() {
  alignas(16) static double in[4 * kThreads];
  std::vector<double> out(4 * kThreads, 0.0);
  REQUIRE(run(0, copy_rounds<false>, 1, 16 * kThreads, static_cast<const double*>(in), out.data()) == 0);
  for (double number : out) REQUIRE(std::isnan(number));  // also the second time, over what has arrived
}

FUSEDLOSS_KERNEL(kThreads)
copy_to_odd_place(const float* in) {
  gpu::copy_async<8>(gpu::shared_memory() + 4, in);
  gpu::wait_for_copies();
}

void copies_of_unaligned_bytes() {
  alignas(16) static const float in[4] = {};
  REQUIRE(always_fails("not a multiple", copy_to_odd_place, static_cast<const float*>(in)));
}

struct alignas(16) Wide {
  float numbers[4];
};

FUSEDLOSS_KERNEL(kThreads)
store_to_odd_place(float* out) {
  if (gpu::thread() == 0) gpu::store_streaming(reinterpret_cast<Wide*>(out + 1), Wide{});
}

void stores_of_unaligned_bytes() {
  alignas(16) static float out[8];
  REQUIRE(always_fails("not a multiple", store_to_odd_place, static_cast<float*>(out)));
}

FUSEDLOSS_KERNEL(kThreads)
nothing() {}

void too_much_shared_memory() {
  const int usual = gpu::shared_memory_limit();
  REQUIRE(usual == 64 << 10);
  REQUIRE(gpu::launch(nothing, 1, kThreads, usual, nullptr) == 0);
  REQUIRE(gpu::launch(nothing, 1, kThreads, usual + 1, nullptr) != 0);
  REQUIRE(says("65537 bytes of shared memory"));
  fusedloss_host_set_shared_memory_limit(99 << 10);
  REQUIRE(gpu::shared_memory_limit() == 99 << 10);
  REQUIRE(gpu::launch(nothing, 1, kThreads, usual + 1, nullptr) == 0);
  REQUIRE(says(""));
}

void bad_grids() {
  for (int threads : {-32, 0, 1, 31, 33, 100, 1056}) {
    REQUIRE(gpu::launch(nothing, 1, threads, 0, nullptr) != 0);
    REQUIRE(says("a grid of 1 blocks"));
  }
  for (int64_t blocks : {int64_t{-1}, int64_t{0}, int64_t{1} << 31}) {
    REQUIRE(gpu::launch(nothing, blocks, kThreads, 0, nullptr) != 0);
    REQUIRE(says("a grid of"));
  }
  const int64_t before = fusedloss_host_launches();
  for (int threads : {32, 64, 1024}) REQUIRE(gpu::launch(nothing, 1, threads, 0, nullptr) == 0);
  REQUIRE(fusedloss_host_launches() == before + 3);
}

// Fibers that were left in the middle of a kernel do not disturb the next one.
void launches_after_a_failure() {
  std::vector<float> out(kThreads);
  for (int round = 0; round < 3; ++round) {
    barriers_at_different_lines();
    block_reduction();
    REQUIRE(always_fails("threads wait in vain", shuffle_in_branches, out.data()));
    asynchronous_copies();
  }
}

// Arrays of a thread's own, alive across barriers and shuffles: what a sanitizer could take for an error is none.
FUSEDLOSS_KERNEL(kThreads)
keep_private_arrays(float* out) {
  float outer[32];
  for (int i = 0; i < 32; ++i) outer[i] = static_cast<float>(gpu::thread() + i);
  for (int i = 0; i < 32; ++i) {
    float inner[8];
    for (int j = 0; j < 8; ++j) inner[j] = gpu::shuffle_xor(outer[(i + j) % 32], 1 + j);
    if (i % 8 == 0) gpu::sync_block();
    for (int j = 0; j < 8; ++j) outer[i] += inner[j];
  }
  gpu::sync_block();
  float sum = 0.0f;
  for (float number : outer) sum += number;
  out[gpu::thread()] = sum;
}

void private_arrays() {
  std::vector<float> first(kThreads);
  REQUIRE(run(0, keep_private_arrays, 1, 0, first.data()) == 0);
  for (unsigned seed = 1; seed < 50; ++seed) {
    std::vector<float> out(kThreads);
    REQUIRE(run(seed, keep_private_arrays, 2, 0, out.data()) == 0);
    REQUIRE(out == first);
  }
}

// --- what only a sanitizer sees
// ---------------------------------------------------------------------------------------

FUSEDLOSS_KERNEL(kThreads)
write_shared_at(const int* at) {
  gpu::sync_block();
  if (gpu::thread() == 77) reinterpret_cast<float*>(gpu::shared_memory())[*at] = 1.0f;
}

void shared_memory_overrun() {
  for (int at : {0, kThreads - 1, kThreads}) run(0, write_shared_at, 1, kThreads * sizeof(float), &at);
}

FUSEDLOSS_KERNEL(kThreads)
copy_from(const float* in) {
  gpu::copy_async<4>(gpu::shared_memory() + 4 * gpu::thread(), in + gpu::thread());
  gpu::wait_for_copies();
}

void copy_overrun() {
  const std::vector<float> in(kThreads - 1);
  run(0, copy_from, 1, kThreads * sizeof(float), in.data());
}

FUSEDLOSS_KERNEL(kThreads)
write_private_at(const int* at, float* out) {
  float numbers[8] = {};
  float* volatile to = numbers;  // volatile, so that no compile-time check but ASan's has to see it
  gpu::sync_block();
  to[*at] = 1.0f;
  gpu::sync_block();
  out[gpu::thread()] = numbers[gpu::thread() % 8];
}

void private_array_overrun() {
  std::vector<float> out(kThreads);
  for (int at : {0, 7, 8}) run(0, write_private_at, 1, 0, &at, out.data());
}

struct Case {
  const char* name;
  void (*run)();
  bool crashes;
};
#define CASE(name) {#name, name, false}
#define CRASHING_CASE(name) {#name, name, true}
constexpr Case kCases[] = {
    CASE(block_reduction),
    CASE(every_thread_of_every_block_once),
    CASE(votes),
    CASE(barrier_of_those_that_are_left),
    CASE(seeds_give_orders),
    CASE(compare_and_swap),
    CASE(halves),
    CASE(two_host_threads),
    CASE(missing_barrier_behind_a_write),
    CASE(missing_barrier_before_a_write),
    CASE(block_that_needs_another),
    CASE(shuffle_with_a_partial_mask),
    CASE(lanes_that_left_before_a_shuffle),
    CASE(shuffles_at_different_lines),
    CASE(barriers_at_different_lines),
    CASE(barrier_that_a_part_of_a_warp_reaches),
    CASE(shared_memory_is_nan_at_first),
    CASE(asynchronous_copies),
    CASE(copies_read_before_waiting_are_nan),
    CASE(copies_of_unaligned_bytes),
    CASE(stores_of_unaligned_bytes),
    CASE(too_much_shared_memory),
    CASE(bad_grids),
    CASE(launches_after_a_failure),
    CASE(private_arrays),
    CRASHING_CASE(shared_memory_overrun),
    CRASHING_CASE(copy_overrun),
    CRASHING_CASE(private_array_overrun),
};

int main_of(const std::string& word) {
  for (const Case& each : kCases) {
    if (word == "--list") {
      std::printf("%s%s\n", each.name, each.crashes ? " crashes" : "");
    } else if (word == each.name) {
      each.run();
      return 0;
    }
  }
  return word == "--list" ? 0 : 2;
}

}  // namespace
}  // namespace fusedloss

int main(int count, char** words) { return fusedloss::main_of(count == 2 ? words[1] : ""); }
