#include "kernels/cpu/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(FUSEDLOSS_HAVE_AVX2)
#include <cpuid.h>
#endif

namespace fusedloss::cpu {

namespace base {
const KernelTable& kernels();
}
#if defined(FUSEDLOSS_HAVE_AVX2)
namespace avx2 {
const KernelTable& kernels();
}
#endif
#if defined(FUSEDLOSS_HAVE_AVX512)
namespace avx512 {
const KernelTable& kernels();
}
#endif

namespace {

struct Level {
  const char* name;
  const char* aten_name;
  const KernelTable& (*kernels)();
  bool (*machine_has_it)();
};

bool always() { return true; }

// Every instruction that -march=x86-64-v3 and -v4 let the compiler use. __builtin_cpu_supports also asks whether the
// operating system saves the wide registers; the names it lacks in older compilers are read from cpuid.
#if defined(FUSEDLOSS_HAVE_AVX2)
bool machine_has_avx2() {
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & bit_F16C) || !(ecx & bit_MOVBE)) return false;
  if (!__get_cpuid(0x80000001, &eax, &ebx, &ecx, &edx) || !(ecx & bit_LZCNT)) return false;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2");
}
#endif
#if defined(FUSEDLOSS_HAVE_AVX512)
bool machine_has_avx512() {
  return machine_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// Lowest first; a machine that has one has all below it.
constexpr Level kLevels[] = {
    {"base", "default", base::kernels, always},
#if defined(FUSEDLOSS_HAVE_AVX2)
    {"avx2", "avx2", avx2::kernels, machine_has_avx2},
#endif
#if defined(FUSEDLOSS_HAVE_AVX512)
    {"avx512", "avx512", avx512::kernels, machine_has_avx512},
#endif
};
constexpr int kLevelCount = sizeof(kLevels) / sizeof(kLevels[0]);

struct State {
  int supported_count = 0;
  const char* refused = nullptr;
  std::atomic<const Level*> current{nullptr};

  State() {
    while (supported_count < kLevelCount && kLevels[supported_count].machine_has_it()) ++supported_count;

    const Level* start = &kLevels[supported_count - 1];
    if (const char* bound = std::getenv("ATEN_CPU_CAPABILITY")) {
      for (int i = 0; i < supported_count; ++i) {
        if (std::strcmp(kLevels[i].aten_name, bound) == 0) start = &kLevels[i];
      }
    }
    const char* wanted = std::getenv(kCapabilityVariable);
    if (wanted != nullptr && wanted[0] != '\0') {
      const Level* level = find(wanted);
      if (level != nullptr) {
        start = level;
      } else {
        refused = wanted;
      }
    }
    current.store(start);
  }

  const Level* find(const char* name) const {
    for (int i = 0; i < supported_count; ++i) {
      if (std::strcmp(kLevels[i].name, name) == 0) return &kLevels[i];
    }
    return nullptr;
  }
};

State& state() {
  static State instance;
  return instance;
}

}  // namespace

const KernelTable& kernels() { return state().current.load(std::memory_order_relaxed)->kernels(); }

const char* capability() { return state().current.load(std::memory_order_relaxed)->name; }

const char* supported_capability(int index) {
  return index >= 0 && index < state().supported_count ? kLevels[index].name : nullptr;
}

bool set_capability(const char* name) {
  const Level* level = state().find(name);
  if (level == nullptr) return false;
  state().current.store(level, std::memory_order_relaxed);
  return true;
}

const char* refused_capability() { return state().refused; }

}  // namespace fusedloss::cpu
