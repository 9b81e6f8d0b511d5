#include "kernels/cpu/kernel_table.h"

#include "kernels/cpu/kernels.h"

namespace fusedloss::cpu::FUSEDLOSS_LEVEL {

const KernelTable& kernels() {
  static constexpr KernelTable table{
      cross_entropy_scratch_bytes,   cross_entropy_label_weights,
      cross_entropy_forward,         cross_entropy_backward,
      cross_entropy_label_backward,  segmentation_scratch_bytes,
      segmentation_forward,          segmentation_backward,
      segmentation_label_backward,   mse_loss_forward,
      mse_loss_forward_and_gradient, mse_loss_backward,
  };
  return table;
}

}  // namespace fusedloss::cpu::FUSEDLOSS_LEVEL
