// The kernels of one instruction-set level, by name; kernel_table.cpp collects them.
#pragma once

#include "kernels/cross_entropy.h"
#include "kernels/mse_loss.h"
#include "kernels/segmentation.h"

namespace fusedloss::cpu::FUSEDLOSS_LEVEL {

int64_t cross_entropy_scratch_bytes(const CrossEntropyParams& params);
void cross_entropy_label_weights(const CrossEntropyParams& params, int64_t begin, int64_t end,
                                 CrossEntropyPartial* partials);
void cross_entropy_forward(const CrossEntropyParams& params, int64_t begin, int64_t end, void* scratch,
                           CrossEntropyPartial* partials);
void cross_entropy_backward(const CrossEntropyParams& params, int64_t begin, int64_t end, void* scratch);
void cross_entropy_label_backward(const CrossEntropyParams& params, int64_t begin, int64_t end);

int64_t segmentation_scratch_bytes(const SegmentationParams& params);
void segmentation_forward(const SegmentationParams& params, int64_t begin, int64_t end, void* scratch,
                          SegmentationPartial* partials, double* tables);
void segmentation_backward(const SegmentationParams& params, int64_t begin, int64_t end, void* scratch);
void segmentation_label_backward(const SegmentationParams& params, int64_t begin, int64_t end, void* scratch);

void mse_loss_forward(const MseLossParams& params, int64_t begin, int64_t end, MseLossPartial* partials);
void mse_loss_forward_and_gradient(const MseLossParams& params, int64_t begin, int64_t end, MseLossPartial* partials);
void mse_loss_backward(const MseLossParams& params, int64_t begin, int64_t end);

}  // namespace fusedloss::cpu::FUSEDLOSS_LEVEL
