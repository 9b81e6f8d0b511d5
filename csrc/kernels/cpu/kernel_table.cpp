#include "kernels/cpu/kernel_table.h"

#include "kernels/cpu/kernels.h"

#define FUSEDLOSS_TEXT_OF(name) #name
#define FUSEDLOSS_TEXT(name) FUSEDLOSS_TEXT_OF(name)

namespace fusedloss::cpu::FUSEDLOSS_LEVEL {

const KernelTable& kernels() {
  static constexpr KernelTable table{
      FUSEDLOSS_TEXT(FUSEDLOSS_LEVEL), cross_entropy_label_weights,
      cross_entropy_forward,           cross_entropy_backward,
      cross_entropy_label_backward,    mse_loss_forward,
      mse_loss_forward_and_gradient,   mse_loss_backward,
  };
  return table;
}

}  // namespace fusedloss::cpu::FUSEDLOSS_LEVEL
