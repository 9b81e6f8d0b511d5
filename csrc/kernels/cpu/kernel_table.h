// What one instruction-set level exports: the chunk functions of every loss.
//
// A caller splits the work into chunks whose number follows from the shape alone, hands ranges of chunks to threads in
// any way it likes, and sums the partials in the order of their index. Where a function takes `scratch`, each thread
// brings its own: as many bytes as ..._scratch_bytes says, aligned to a cache line (64).
#pragma once

#include "kernels/cross_entropy.h"
#include "kernels/mse_loss.h"
#include "kernels/segmentation.h"

namespace fusedloss::cpu {

struct KernelTable {
  int64_t (*cross_entropy_scratch_bytes)(const CrossEntropyParams&);
  // partials: (chunks) of the whole call; those in [begin, end) are written.
  void (*cross_entropy_label_weights)(const CrossEntropyParams&, int64_t begin, int64_t end,
                                      CrossEntropyPartial* partials);
  void (*cross_entropy_forward)(const CrossEntropyParams&, int64_t begin, int64_t end, void* scratch,
                                CrossEntropyPartial* partials);
  void (*cross_entropy_backward)(const CrossEntropyParams&, int64_t begin, int64_t end, void* scratch);
  void (*cross_entropy_label_backward)(const CrossEntropyParams&, int64_t begin, int64_t end);

  // tables: (chunks, 3, C) of the whole call: I, P and T of each class; not touched without an overlap term.
  int64_t (*segmentation_scratch_bytes)(const SegmentationParams&);
  void (*segmentation_forward)(const SegmentationParams&, int64_t begin, int64_t end, void* scratch,
                               SegmentationPartial* partials, double* tables);
  void (*segmentation_backward)(const SegmentationParams&, int64_t begin, int64_t end, void* scratch);
  void (*segmentation_label_backward)(const SegmentationParams&, int64_t begin, int64_t end, void* scratch);

  void (*mse_loss_forward)(const MseLossParams&, int64_t begin, int64_t end, MseLossPartial* partials);
  void (*mse_loss_forward_and_gradient)(const MseLossParams&, int64_t begin, int64_t end, MseLossPartial* partials);
  void (*mse_loss_backward)(const MseLossParams&, int64_t begin, int64_t end);
};

}  // namespace fusedloss::cpu
