// Memory of large tensors, kept when they die for the next ones.
//
// malloc maps an allocation of this size by itself and unmaps it when it is freed, so that the system has to clear all
// of its pages again for the next gradient, which takes as long as all that cross-entropy computes
// (docs/performance.md). Here a block stays mapped and is lent again, uncleared.
//
// An idle block is offered to the system (MADV_FREE), which takes its pages where memory gets short, without writing
// them anywhere, and otherwise leaves them. Blocks that are lent and those that lie idle are never more together than
// were once lent at the same time.
#pragma once

#include <cstdint>

namespace fusedloss::reuse {

// Below it glibc keeps what is freed: the size above which it maps by itself grows with what it frees, up to this one.
constexpr int64_t kLeastBytes = int64_t{32} << 20;

struct Loan {
  void* data = nullptr;  // aligned to a huge page; nothing is known of what is there
  uintptr_t number = 0;
};

/// Why this system cannot, in words that follow "as"; nullptr where it can. Found out once.
const char* refused_by_system();

/// The same of torch. (In tensors.cpp, which knows torch.)
const char* refused_by_torch();

/// Whether memory is reused from now on, in all threads; where not, what lies idle goes back to the system.
void set_enabled(bool enabled);
bool is_enabled();

/// At least `bytes`; no data where reuse is off or refused, or the system has nothing to give.
Loan lend(int64_t bytes);

/// Ends the loan of that number, from any thread. Of one that has ended it does nothing.
void give_back(uintptr_t number);

/// Bytes that lie idle.
int64_t idle_bytes();

}  // namespace fusedloss::reuse
