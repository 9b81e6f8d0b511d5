// Schemas of the ops. Names with an underscore are private: they have no derivative of their own and are called by
// python/fusedloss/_ops.py alone. The others are their values under a name to which python/fusedloss/_autograd.py gives
// a derivative, for torch.compile and torch.export.
#include <torch/csrc/stable/library.h>

#include "binding/ops.h"

STABLE_TORCH_LIBRARY(fusedloss, m) {
  m.def(
      "cross_entropy(Tensor input, Tensor target, Tensor? weight, int ignore_index, int reduction, "
      "float label_smoothing, bool float32_loss) -> Tensor");
  m.def(
      "_cross_entropy_forward(Tensor input, Tensor target, Tensor? weight, int ignore_index, int reduction, "
      "float label_smoothing, bool float32_loss, int keep) -> (Tensor, Tensor)");
  m.def(
      "_cross_entropy_rescale_(Tensor(a!) gradient, Tensor grad, Tensor input, Tensor target, Tensor? weight, "
      "int ignore_index, int reduction, float label_smoothing) -> ()");
  m.def(
      "_cross_entropy_backward(Tensor grad, Tensor input, Tensor target, Tensor? weight, Tensor statistics, "
      "int ignore_index, int reduction, float label_smoothing, int operand) -> Tensor");

  // All losses on probabilities are settings of one op: `output` says what of it is wanted.
#define FUSEDLOSS_TENSORS "Tensor input, Tensor target, Tensor? weight, Tensor? pixel_weight, Tensor? pos_weight, "
#define FUSEDLOSS_OPTIONS                                                                                             \
  "int activation, int ignore_index, int output, float cross_entropy, float iou, float brier, float alpha, "          \
  "float beta, float label_smoothing, int[] classes, bool per_image, int absent, float smooth, float eps, bool log, " \
  "float gamma, int intersection"
  m.def("segmentation(" FUSEDLOSS_TENSORS FUSEDLOSS_OPTIONS ") -> (Tensor, Tensor)");
  m.def("_segmentation_forward(" FUSEDLOSS_TENSORS FUSEDLOSS_OPTIONS ", bool keep) -> (Tensor, Tensor, Tensor)");
  m.def("_segmentation_backward(Tensor grad, " FUSEDLOSS_TENSORS "Tensor statistics, " FUSEDLOSS_OPTIONS
        ", int operand) -> Tensor");
#undef FUSEDLOSS_TENSORS
#undef FUSEDLOSS_OPTIONS

  m.def("mse_loss(Tensor input, Tensor target, Tensor? weight, int reduction, bool float32_loss) -> Tensor");
  m.def(
      "_mse_loss_forward(Tensor input, Tensor target, Tensor? weight, int reduction, bool float32_loss, "
      "int keep) -> (Tensor, Tensor)");
  m.def(
      "_mse_loss_rescale_(Tensor(a!) gradient, Tensor grad, Tensor input, Tensor target, Tensor? weight, "
      "int reduction) -> ()");
  m.def(
      "_mse_loss_backward(Tensor grad, Tensor input, Tensor target, Tensor? weight, Tensor statistics, "
      "int reduction, int operand) -> Tensor");

  // What kernels/cuda/bad_label.h remembers on the device of `like`: the record itself, (4,) int64, not a copy.
  m.def("_bad_label_record(Tensor like) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fusedloss, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&fusedloss::cross_entropy));
  m.impl("_cross_entropy_forward", TORCH_BOX(&fusedloss::cross_entropy_forward));
  m.impl("_cross_entropy_rescale_", TORCH_BOX(&fusedloss::cross_entropy_rescale));
  m.impl("_cross_entropy_backward", TORCH_BOX(&fusedloss::cross_entropy_backward));
  m.impl("segmentation", TORCH_BOX(&fusedloss::segmentation));
  m.impl("_segmentation_forward", TORCH_BOX(&fusedloss::segmentation_forward));
  m.impl("_segmentation_backward", TORCH_BOX(&fusedloss::segmentation_backward));
  m.impl("mse_loss", TORCH_BOX(&fusedloss::mse_loss));
  m.impl("_mse_loss_forward", TORCH_BOX(&fusedloss::mse_loss_forward));
  m.impl("_mse_loss_rescale_", TORCH_BOX(&fusedloss::mse_loss_rescale));
  m.impl("_mse_loss_backward", TORCH_BOX(&fusedloss::mse_loss_backward));
}
