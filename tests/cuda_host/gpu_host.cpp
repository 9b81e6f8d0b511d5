// A longjmp to another stack is what a fiber is; the fortified one takes it for a mistake and ends the program.
#undef _FORTIFY_SOURCE

#include "gpu_host.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FUSEDLOSS_ASAN 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define FUSEDLOSS_ASAN 1
#endif
#if defined(FUSEDLOSS_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace fusedloss::gpu {
namespace {

constexpr size_t kStackBytes = size_t{512} << 10;
constexpr int kMostWarps = 32;
constexpr int kNanByte = 0xff;  // a NaN of every floating type has all bits set

std::atomic<unsigned> seed{0};
std::atomic<int> shared_limit{64 << 10};
std::atomic<int64_t> launches{0};

enum class State { kRunnable, kAtBarrier, kAtShuffle, kAtVote, kDone };

// A place to jump to. GCC's own is taken where there is one: at the library's jump ASan forgets what it knows of the
// stack, and asks the kernel about another one.
#if defined(__GNUC__) && !defined(__clang__)
using Place = void* [5];
#define FUSEDLOSS_MARK(place) __builtin_setjmp(place)
#define FUSEDLOSS_JUMP(place) __builtin_longjmp(place, 1)
#define FUSEDLOSS_UNSEEN noipa
#else
using Place = jmp_buf;
#define FUSEDLOSS_MARK(place) _setjmp(place)
#define FUSEDLOSS_JUMP(place) _longjmp(place, 1)
#define FUSEDLOSS_UNSEEN noinline
#endif
// Without ASan's guards around local variables: some of these frames are left without a return.
#define FUSEDLOSS_SWITCH __attribute__((noinline, no_sanitize("address"))) void

// A function of its own that the optimizer does not look into: where one function marks a place and jumps to another,
// GCC drops what follows the mark.
[[noreturn]] __attribute__((FUSEDLOSS_UNSEEN, no_sanitize("address"))) void jump(Place place) { FUSEDLOSS_JUMP(place); }

// The bytes are taken when the copy is asked for, so that a sanitizer names the line that reads out of bounds.
struct PendingCopy {
  void* to;
  int bytes;
  char value[16];
};

struct Fiber {
  char* stack = nullptr;  // above a page that nobody may touch
  bool started = false;
  Place place;
  void* fake_stack = nullptr;  // ASan's
  State state = State::kDone;
  std::vector<PendingCopy> copies;

  // What it waits for, and what it gets.
  const char* file = nullptr;
  int line = 0;
  unsigned mask = 0;
  size_t bytes = 0;
  int from = 0;
  bool condition = false;
  bool any_condition = false;
  alignas(16) char value[kMostExchangedBytes];
  alignas(16) char result[kMostExchangedBytes];

  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber() {
    if (stack == nullptr) return;
    forget();
    munmap(stack - getpagesize(), kStackBytes + getpagesize());
  }

  bool make_stack() {
    const size_t guard = getpagesize();
    void* memory = mmap(nullptr, kStackBytes + guard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, guard, PROT_NONE) != 0) return false;
    stack = static_cast<char*>(memory) + guard;
    return true;
  }

  // What is on the stack will never go on.
  void forget() {
    started = false;
#if defined(FUSEDLOSS_ASAN)
    __asan_unpoison_memory_region(stack, kStackBytes);
#endif
  }
};

struct Machine {
  // Pointers, because a fiber in the middle of its kernel must not move.
  std::vector<std::unique_ptr<Fiber>> fibers;
  // A bit a lane, and one a warp that has such a lane.
  unsigned runnable_lanes[kMostWarps] = {};
  unsigned runnable_warps = 0;
  bool in_warp_order = false;
  unsigned char warp_order[kMostWarps] = {};
  Place scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  const std::function<void()>* kernel = nullptr;
  int threads = 0;
  int current = -1;
  Fiber* fiber = nullptr;  // of the current thread
  int64_t block = 0;
  int64_t blocks = 0;
  char* shared = nullptr;
  uint64_t random = 0;
  std::string error;

  // splitmix64: a generator that is set up in no time, for small grids are many.
  uint64_t next_random() {
    uint64_t z = random += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
};

// Each host thread that launches has its own. A plain pointer to it is kept, because a thread_local object is asked
// each time whether it is there yet, through a function: that was a third of the time of all tests on fibers.
Machine& machine_of_this_thread() {
  thread_local Machine instance;
  return instance;
}
__attribute__((tls_model("initial-exec"))) thread_local Machine* running = nullptr;

Machine& machine() { return *running; }
Fiber& current_fiber() { return *running->fiber; }

// ---------------------------------------------------------------------------------------------------------------------
// Switching. A context of ucontext.h starts a fiber and a jump goes on with it: swapcontext() asks the kernel for the
// signal mask each time. ASan has to hear of every change of the stack, before and after.

FUSEDLOSS_SWITCH to_scheduler() {
  Machine& m = machine();
  Fiber& fiber = current_fiber();
#if defined(FUSEDLOSS_ASAN)
  __sanitizer_start_switch_fiber(&fiber.fake_stack, m.scheduler_stack, m.scheduler_stack_bytes);
#endif
  if (FUSEDLOSS_MARK(fiber.place) == 0) jump(m.scheduler);
#if defined(FUSEDLOSS_ASAN)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &m.scheduler_stack, &m.scheduler_stack_bytes);
#endif
}

// A fiber lives as long as the host thread and runs one kernel after the other.
void fiber_main() {
#if defined(FUSEDLOSS_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &machine().scheduler_stack, &machine().scheduler_stack_bytes);
#endif
  while (true) {
    (*machine().kernel)();
    current_fiber().state = State::kDone;
    to_scheduler();
  }
}

FUSEDLOSS_SWITCH start(Fiber& fiber) {
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
  fiber.started = true;
  setcontext(&context);
}

FUSEDLOSS_SWITCH resume(int thread) {
  Machine& m = machine();
  Fiber& fiber = *m.fibers[thread];
  m.current = thread;
  m.fiber = &fiber;
#if defined(FUSEDLOSS_ASAN)
  __sanitizer_start_switch_fiber(&m.scheduler_fake_stack, fiber.stack, kStackBytes);
#endif
  if (FUSEDLOSS_MARK(m.scheduler) == 0) {
    if (fiber.started) jump(fiber.place);
    start(fiber);
  }
#if defined(FUSEDLOSS_ASAN)
  __sanitizer_finish_switch_fiber(machine().scheduler_fake_stack, nullptr, nullptr);
#endif
  machine().current = -1;
}

void wait_as(State state, const char* file, int line) {
  Fiber& fiber = current_fiber();
  fiber.state = state;
  fiber.file = file;
  fiber.line = line;
  to_scheduler();
}

// ---------------------------------------------------------------------------------------------------------------------
// The order

void make_runnable(int thread) {
  Machine& m = machine();
  m.fibers[thread]->state = State::kRunnable;
  m.runnable_lanes[thread / kWarp] |= 1u << thread % kWarp;
  m.runnable_warps |= 1u << thread / kWarp;
}

// The first one at or after a random place, round and round: neither a division nor a loop, for every step draws two.
int bit_from(unsigned bits, unsigned place) {
  place %= 32;
  const unsigned turned = bits >> place | bits << (32 - place) % 32;
  return static_cast<int>((static_cast<unsigned>(__builtin_ctz(turned)) + place) % 32);
}

// Between two barriers any thread goes on at random; or, as often, the warps have ranks, and one goes on only when all
// above it wait at the barrier. Chance alone would hardly ever let a warp run so far ahead of another.
void draw_order() {
  Machine& m = machine();
  m.in_warp_order = (m.next_random() & 1u) == 0;
  const int warps = m.threads / kWarp;
  for (int w = 0; w < warps; ++w) {
    const int at = static_cast<int>(m.next_random() % (w + 1));
    m.warp_order[w] = m.warp_order[at];
    m.warp_order[at] = static_cast<unsigned char>(w);
  }
}

int take_runnable() {
  Machine& m = machine();
  const uint64_t random = m.next_random();
  int warp = 0;
  if (m.in_warp_order) {
    int rank = 0;
    while ((m.runnable_warps >> m.warp_order[rank] & 1u) == 0) ++rank;
    warp = m.warp_order[rank];
  } else {
    warp = bit_from(m.runnable_warps, static_cast<unsigned>(random));
  }
  const int lane = bit_from(m.runnable_lanes[warp], static_cast<unsigned>(random >> 32));
  m.runnable_lanes[warp] &= ~(1u << lane);
  if (m.runnable_lanes[warp] == 0) m.runnable_warps &= ~(1u << warp);
  return warp * kWarp + lane;
}

// ---------------------------------------------------------------------------------------------------------------------
// Barriers, shuffles, votes

bool same_place(const Fiber& one, const Fiber& other) {
  return one.line == other.line && (one.file == other.file || std::strcmp(one.file, other.file) == 0);
}

bool in_mask(unsigned mask, int lane) { return (mask >> lane & 1u) != 0; }

std::string place(const Fiber& fiber) { return std::string(fiber.file) + ":" + std::to_string(fiber.line); }

std::string what_it_waits_for(const Fiber& fiber) {
  if (fiber.state == State::kDone) return "has ended";
  if (fiber.state == State::kAtBarrier) return "waits at the barrier " + place(fiber);
  return std::string("waits at the ") + (fiber.state == State::kAtVote ? "vote " : "shuffle ") + place(fiber);
}

// Where all lanes that this thread waits for have come to the same place, they go on.
void release_warp(int thread) {
  Machine& m = machine();
  const Fiber& caller = *m.fibers[thread];
  const unsigned mask = caller.mask;
  const std::unique_ptr<Fiber>* lanes = &m.fibers[thread / kWarp * kWarp];
  if (!in_mask(mask, thread % kWarp)) {
    m.error = "thread " + std::to_string(thread) + ", which is not in the mask, " + what_it_waits_for(caller);
    return;
  }
  bool any_condition = false;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!in_mask(mask, lane)) continue;
    const Fiber& other = *lanes[lane];
    if (other.state != caller.state || other.mask != mask || !same_place(other, caller)) return;
    any_condition |= other.condition;
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!in_mask(mask, lane)) continue;
    Fiber& fiber = *lanes[lane];
    fiber.any_condition = any_condition;
    if (fiber.state != State::kAtShuffle) continue;
    if (fiber.from < 0 || fiber.from >= kWarp || !in_mask(mask, fiber.from)) {
      m.error = "shuffle at " + place(fiber) + ": lane " + std::to_string(lane) + " reads lane " +
                std::to_string(fiber.from) + ", which is not in the mask";
      return;
    }
    std::memcpy(fiber.result, lanes[fiber.from]->value, fiber.bytes);
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    if (in_mask(mask, lane)) make_runnable(thread / kWarp * kWarp + lane);
  }
}

// When no thread can go on: all that are left stand at one barrier, or they never will.
void release_barrier() {
  Machine& m = machine();
  const Fiber* first = nullptr;
  for (int t = 0; t < m.threads; ++t) {
    const Fiber& fiber = *m.fibers[t];
    if (fiber.state == State::kDone) continue;
    if (first == nullptr) first = &fiber;
    if (fiber.state != State::kAtBarrier || first->state != State::kAtBarrier) {
      m.error = "threads wait in vain:";
      for (int u = 0; u < m.threads; ++u) {
        // One of each kind is enough.
        const Fiber& other = *m.fibers[u];
        bool new_kind = true;
        for (int v = 0; v < u && new_kind; ++v) {
          const Fiber& before = *m.fibers[v];
          new_kind = before.state != other.state || (other.state != State::kDone && !same_place(before, other));
        }
        if (new_kind) m.error += " thread " + std::to_string(u) + " " + what_it_waits_for(other) + ";";
      }
      m.error.pop_back();
      return;
    }
    if (!same_place(fiber, *first)) {
      m.error = "barriers at different places: " + place(*first) + " and " + place(fiber);
      return;
    }
  }
  for (int t = 0; t < m.threads; ++t) {
    if (m.fibers[t]->state == State::kAtBarrier) make_runnable(t);
  }
  draw_order();
}

void run_block() {
  Machine& m = machine();
  for (unsigned& lanes : m.runnable_lanes) lanes = 0;
  m.runnable_warps = 0;
  for (int t = 0; t < m.threads; ++t) {
    m.fibers[t]->copies.clear();
    make_runnable(t);
  }
  draw_order();
  while (m.runnable_warps != 0) {
    const int thread = take_runnable();
    resume(thread);
    if (!m.error.empty()) return;
    const State state = m.fibers[thread]->state;
    if (state == State::kAtShuffle || state == State::kAtVote) release_warp(thread);
    if (!m.error.empty()) return;
    if (m.runnable_warps == 0) release_barrier();
    if (!m.error.empty()) return;
  }
}

// Ends the launch with this text, from inside a kernel. What owns memory is destroyed before, for nobody comes back.
[[noreturn]] void fail(std::string text) {
  {
    const std::string taken = std::move(text);
    machine().error = taken;
  }
  to_scheduler();
  std::abort();  // never resumed
}

bool make_fibers(int threads) {
  Machine& m = machine();
  while (m.fibers.size() < static_cast<size_t>(threads)) {
    auto fiber = std::make_unique<Fiber>();
    if (!fiber->make_stack()) return false;
    m.fibers.push_back(std::move(fiber));
  }
  return true;
}

void run_blocks(size_t shared_bytes) {
  Machine& m = machine();
  // On a GPU blocks begin in any order; here they begin anywhere and go up or down.
  const int64_t first = static_cast<int64_t>(m.next_random() % static_cast<uint64_t>(m.blocks));
  const bool up = (m.next_random() & 1u) == 0;
  for (int64_t i = 0; i < m.blocks && m.error.empty(); ++i) {
    m.block = (first + (up ? i : m.blocks - i)) % m.blocks;
    // As many bytes as were asked for, so that a sanitizer sees the first one past them.
    void* shared = nullptr;
    if (shared_bytes > 0) {
      if (posix_memalign(&shared, 16, shared_bytes) != 0) {
        m.error = "no memory for shared memory";
        return;
      }
      std::memset(shared, kNanByte, shared_bytes);
    }
    m.shared = static_cast<char*>(shared);
    run_block();
    m.shared = nullptr;
    std::free(shared);
  }
}

}  // namespace

int thread() { return machine().current; }
int lane() { return machine().current % kWarp; }
int block_threads() { return machine().threads; }
int64_t block() { return machine().block; }
int64_t blocks() { return machine().blocks; }
char* shared_memory() { return machine().shared; }

void sync_block(const char* file, int line) { wait_as(State::kAtBarrier, file, line); }

void exchange(unsigned mask, const void* value, size_t bytes, int from, void* result, const char* file, int line) {
  Fiber& fiber = current_fiber();
  fiber.mask = mask;
  fiber.bytes = bytes;
  fiber.from = from;
  std::memcpy(fiber.value, value, bytes);
  wait_as(State::kAtShuffle, file, line);
  std::memcpy(result, fiber.result, bytes);
}

bool vote(unsigned mask, bool condition, const char* file, int line) {
  Fiber& fiber = current_fiber();
  fiber.mask = mask;
  fiber.condition = condition;
  wait_as(State::kAtVote, file, line);
  return fiber.any_condition;
}

void expect_aligned(const void* at, int bytes) {
  if (reinterpret_cast<uintptr_t>(at) % static_cast<uintptr_t>(bytes) == 0) return;
  fail("an access to " + std::to_string(bytes) + " bytes at an address that is not a multiple of it");
}

void copy_async_bytes(void* shared, const void* global, int bytes) {
  const uintptr_t low_bits = reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global);
  if (low_bits % static_cast<uintptr_t>(bytes) != 0) {
    fail("copy_async: " + std::to_string(bytes) + " bytes from or to an address that is not a multiple of it");
  }
  PendingCopy copy;
  copy.to = shared;
  copy.bytes = bytes;
  std::memcpy(copy.value, global, bytes);
  std::memset(shared, kNanByte, bytes);
  current_fiber().copies.push_back(copy);
}

void wait_for_copies() {
  std::vector<PendingCopy>& copies = current_fiber().copies;
  for (const PendingCopy& copy : copies) std::memcpy(copy.to, copy.value, copy.bytes);
  copies.clear();
}

int run_grid(int64_t blocks, int threads, size_t shared_bytes, const std::function<void()>& kernel) {
  Machine& m = machine_of_this_thread();
  running = &m;
  m.error.clear();
  if (threads % kWarp != 0 || threads < kWarp || threads > 1024 || blocks < 1 || blocks > 0x7fffffff) {
    m.error = "a grid of " + std::to_string(blocks) + " blocks of " + std::to_string(threads) + " threads";
  } else if (shared_bytes > static_cast<size_t>(shared_limit)) {
    m.error = std::to_string(shared_bytes) + " bytes of shared memory, of which a block may have " +
              std::to_string(shared_limit);
  } else if (!make_fibers(threads)) {
    m.error = "no memory for the threads' stacks";
  } else {
    m.kernel = &kernel;
    m.threads = threads;
    m.blocks = blocks;
    m.random = seed;
    run_blocks(shared_bytes);
    if (!m.error.empty()) {
      for (const std::unique_ptr<Fiber>& fiber : m.fibers) {
        if (fiber->state != State::kDone) fiber->forget();
        fiber->state = State::kDone;
      }
    }
  }
  if (!m.error.empty()) return 1;
  ++launches;
  return 0;
}

int shared_memory_limit() { return shared_limit; }
const char* error_text(int) { return machine_of_this_thread().error.c_str(); }

float float_of_half(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t magnitude = bits & 0x7fffu;
  float number;
  if (magnitude < 0x0400u) {  // zero and the numbers below the smallest normal one
    number = static_cast<float>(magnitude) * 0x1p-24f;
  } else {
    const uint32_t exponent_shift = magnitude >= 0x7c00u ? 255 - 31 : 127 - 15;  // infinity and NaN stay so
    const uint32_t wide = (magnitude << 13) + (exponent_shift << 23);
    std::memcpy(&number, &wide, sizeof(wide));
  }
  uint32_t wide;
  std::memcpy(&wide, &number, sizeof(wide));
  wide |= sign;
  std::memcpy(&number, &wide, sizeof(wide));
  return number;
}

uint16_t half_of_float(float number) {
  uint32_t wide;
  std::memcpy(&wide, &number, sizeof(wide));
  const uint32_t sign = wide >> 16 & 0x8000u;
  const uint32_t magnitude = wide & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7fffu;  // what the hardware gives for every NaN
  } else if (magnitude >= 0x47800000u) {
    half = 0x7c00u;  // 2^16 and more
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14 a step is 2^-24: adding 2^-1, whose last bit is that step, makes the hardware round there.
    float positive;
    std::memcpy(&positive, &magnitude, sizeof(magnitude));
    const float sum = positive + 0.5f;
    std::memcpy(&half, &sum, sizeof(half));
    half -= 0x3f000000u;
  } else {
    const uint32_t rebased = magnitude - ((127u - 15u) << 23);
    half = (rebased + 0xfffu + (rebased >> 13 & 1u)) >> 13;  // may carry into the exponent, up to infinity
  }
  return static_cast<uint16_t>(sign | half);
}

uint16_t bfloat16_of_float(float number) {
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof(bits));
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;  // as the hardware
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

}  // namespace fusedloss::gpu

void fusedloss_host_set_seed(unsigned seed) { fusedloss::gpu::seed = seed; }
void fusedloss_host_set_shared_memory_limit(int bytes) { fusedloss::gpu::shared_limit = bytes; }
int64_t fusedloss_host_launches(void) { return fusedloss::gpu::launches; }
