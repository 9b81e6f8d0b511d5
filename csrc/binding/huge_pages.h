// Asks the kernel to back a fresh allocation with 2 MiB pages.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fusedloss {

constexpr int64_t kHugePage = int64_t{2} << 20;  // bytes

// From this size on an allocation has pages of its own that are worth asking for.
constexpr int64_t kLeastAdvisedBytes = int64_t{4} << 20;

// Advice only: where it is refused, or where transparent huge pages are off, nothing changes. To be called before the
// first write.
inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / page * page;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace fusedloss
