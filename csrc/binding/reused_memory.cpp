#include "binding/reused_memory.h"

#include <algorithm>
#include <fstream>
#include <mutex>
#include <vector>

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#include <sys/resource.h>
#endif

#include "binding/huge_pages.h"

namespace fusedloss::reuse {

#if defined(__linux__) && defined(MADV_FREE)
namespace {

struct Block {
  char* data;
  int64_t bytes;       // whole huge pages
  uintptr_t number;    // of the loan
  int64_t generation;  // forks before it was mapped
};

char* map(int64_t bytes) {
  // A huge page more than is wanted, for the sake of alignment; what is left over on both sides goes back.
  void* const mapped =
      mmap(nullptr, static_cast<size_t>(bytes + kHugePage), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  const auto begin = reinterpret_cast<uintptr_t>(mapped);
  const uintptr_t aligned = (begin + kHugePage - 1) / kHugePage * kHugePage;
  if (aligned > begin) munmap(mapped, aligned - begin);
  const uintptr_t past = begin + kHugePage - aligned;
  if (past > 0) munmap(reinterpret_cast<void*>(aligned + static_cast<uintptr_t>(bytes)), past);
  char* const data = reinterpret_cast<char*>(aligned);
  advise_huge_pages(data, bytes);
  return data;
}

void unmap(const Block& block) { munmap(block.data, static_cast<size_t>(block.bytes)); }

bool offer(const Block& block) { return madvise(block.data, static_cast<size_t>(block.bytes), MADV_FREE) == 0; }

bool knows_offers() {
  const Block block{map(kHugePage), kHugePage, 0, 0};
  if (block.data == nullptr) return false;
  const bool known = offer(block);  // not from Linux before 4.5, nor where memory is locked
  unmap(block);
  return known;
}

// What lies idle costs nobody his memory, but counts towards such limits.
bool is_limited(decltype(RLIMIT_AS) resource) {  // an enumeration or int, as the C library has it
  rlimit limit;
  return getrlimit(resource, &limit) != 0 || limit.rlim_cur != RLIM_INFINITY;
}

bool counts_commitments() {
  int mode = 0;
  std::ifstream("/proc/sys/vm/overcommit_memory") >> mode;
  return mode == 2;
}

class Blocks {
 public:
  Loan lend(int64_t bytes) {
    if (bytes > INT64_MAX - 2 * kHugePage) return {};
    const int64_t wanted = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    const std::lock_guard lock(mutex_);
    if (!enabled_) return {};
    // First of all, because giving back, which a destructor does, must not throw.
    lent_.reserve(lent_.size() + 1);
    idle_.reserve(idle_.size() + lent_.size() + 1);
    // A small tensor would keep a large block from those who need it.
    const auto fits = [&](const Block& block) { return block.bytes >= wanted && block.bytes - wanted <= wanted / 4; };
    auto best = idle_.end();
    for (auto one = idle_.begin(); one != idle_.end(); ++one) {
      if (fits(*one) && (best == idle_.end() || one->bytes < best->bytes)) best = one;
    }
    Block block{nullptr, wanted, 0, generation_};
    if (best != idle_.end()) {
      block = *best;
      idle_.erase(best);
    } else {
      block.data = map(wanted);
      if (block.data == nullptr) {
        shrink(0);
        block.data = map(wanted);
      }
      if (block.data == nullptr) return {};
    }
    block.number = ++loans_;
    lent_.push_back(block);
    most_lent_ = std::max(most_lent_, total(lent_));
    shrink(most_lent_ - total(lent_));
    return {block.data, block.number};
  }

  void give_back(uintptr_t number) {
    const std::lock_guard lock(mutex_);
    const auto has_number = [&](const Block& block) { return block.number == number; };
    const auto found = std::find_if(lent_.begin(), lent_.end(), has_number);
    if (found == lent_.end()) return;
    const Block block = *found;
    lent_.erase(found);
    if (enabled_ && block.generation == generation_ && offer(block)) {
      idle_.push_back(block);
    } else {
      unmap(block);
    }
  }

  void set_enabled(bool enabled) {
    const std::lock_guard lock(mutex_);
    enabled_ = enabled;
    if (enabled) return;
    shrink(0);
    most_lent_ = total(lent_);
  }

  bool is_enabled() {
    const std::lock_guard lock(mutex_);
    return enabled_;
  }

  int64_t idle_bytes() {
    const std::lock_guard lock(mutex_);
    return total(idle_);
  }

  // A fork shares all pages with the child, and the first write to a shared one copies it, in pieces of 4 KiB for good:
  // slower than a cleared page (a gradient of 512 MiB 440 ms in place of 106, and 88 in place of 66 ever after). So
  // nothing is kept across a fork. The lock is held meanwhile, for the child lacks the thread that might hold it.
  void before_fork() {
    mutex_.lock();
    shrink(0);
    ++generation_;
  }
  void after_fork() { mutex_.unlock(); }

 private:
  static int64_t total(const std::vector<Block>& blocks) {
    int64_t sum = 0;
    for (const Block& block : blocks) sum += block.bytes;
    return sum;
  }

  // Until no more than so many bytes lie idle; those that lie longest go first.
  void shrink(int64_t most_idle) {
    while (total(idle_) > most_idle) {
      unmap(idle_.front());
      idle_.erase(idle_.begin());
    }
  }

  std::mutex mutex_;
  bool enabled_ = true;
  std::vector<Block> lent_;
  std::vector<Block> idle_;  // in the order in which they were given back
  int64_t most_lent_ = 0;    // bytes, at the same time
  uintptr_t loans_ = 0;
  int64_t generation_ = 0;  // forks so far
};

// Never destroyed: tensors may die after the destructors of this library have run.
Blocks& blocks() {
  static Blocks* const all = [] {
    pthread_atfork([] { blocks().before_fork(); }, [] { blocks().after_fork(); }, [] { blocks().after_fork(); });
    return new Blocks;
  }();
  return *all;
}

}  // namespace

const char* refused_by_system() {
  static const char* const why = is_limited(RLIMIT_AS) || is_limited(RLIMIT_DATA)
                                     ? "a limit is set on the address space"
                                 : counts_commitments() ? "the system commits no more memory than it has"
                                 : !knows_offers()      ? "the system does not know MADV_FREE, or memory is locked"
                                                        : nullptr;
  return why;
}

void set_enabled(bool enabled) { blocks().set_enabled(enabled); }
bool is_enabled() { return blocks().is_enabled(); }
Loan lend(int64_t bytes) { return refused_by_system() == nullptr ? blocks().lend(bytes) : Loan{}; }
void give_back(uintptr_t number) { blocks().give_back(number); }
int64_t idle_bytes() { return blocks().idle_bytes(); }

#else

const char* refused_by_system() { return "the system is not Linux"; }
void set_enabled(bool) {}
bool is_enabled() { return false; }
Loan lend(int64_t) { return {}; }
void give_back(uintptr_t) {}
int64_t idle_bytes() { return 0; }

#endif

}  // namespace fusedloss::reuse
