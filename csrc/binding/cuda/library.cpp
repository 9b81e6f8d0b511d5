// The ops for CUDA devices; binding/library.cpp gives their schemas. Under FUSEDLOSS_CUDA_ON_HOST they take the place
// of those for the CPU.
#include <torch/csrc/stable/library.h>

#include "binding/cuda/records.h"
#include "binding/ops.h"

namespace {

fusedloss::Tensor bad_label_record(fusedloss::Tensor like) { return fusedloss::cuda::bad_label_record(like); }

}  // namespace

#if defined(FUSEDLOSS_CUDA_ON_HOST)
#define FUSEDLOSS_DEVICE_KEY CPU
#else
#define FUSEDLOSS_DEVICE_KEY CUDA
#endif

// The macro pastes its arguments, so the key has to be spelled out before.
#define FUSEDLOSS_LIBRARY_IMPL(key, m) STABLE_TORCH_LIBRARY_IMPL(fusedloss, key, m)

FUSEDLOSS_LIBRARY_IMPL(FUSEDLOSS_DEVICE_KEY, m) {
  m.impl("_bad_label_record", TORCH_BOX(&bad_label_record));
  m.impl("cross_entropy", TORCH_BOX(&fusedloss::cross_entropy));
  m.impl("_cross_entropy_forward", TORCH_BOX(&fusedloss::cross_entropy_forward));
  m.impl("_cross_entropy_backward", TORCH_BOX(&fusedloss::cross_entropy_backward));
  m.impl("segmentation", TORCH_BOX(&fusedloss::segmentation));
  m.impl("_segmentation_forward", TORCH_BOX(&fusedloss::segmentation_forward));
  m.impl("_segmentation_backward", TORCH_BOX(&fusedloss::segmentation_backward));
  m.impl("mse_loss", TORCH_BOX(&fusedloss::mse_loss));
  m.impl("_mse_loss_forward", TORCH_BOX(&fusedloss::mse_loss_forward));
  m.impl("_mse_loss_backward", TORCH_BOX(&fusedloss::mse_loss_backward));
}
