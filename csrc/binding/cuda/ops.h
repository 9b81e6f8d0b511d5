// The ops on CUDA devices, with the arguments and results of those in binding/ops.h. None waits for the device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace fusedloss::cuda {

torch::stable::Tensor mse_loss(torch::stable::Tensor input, torch::stable::Tensor target,
                               std::optional<torch::stable::Tensor> weight, int64_t reduction, bool float32_loss);

// keep: nothing or statistics. A gradient written in the forward would save the CPU a read; here it would cost the
// caller memory between the passes.
std::tuple<torch::stable::Tensor, torch::stable::Tensor> mse_loss_forward(torch::stable::Tensor input,
                                                                          torch::stable::Tensor target,
                                                                          std::optional<torch::stable::Tensor> weight,
                                                                          int64_t reduction, bool float32_loss,
                                                                          int64_t keep);

torch::stable::Tensor mse_loss_backward(torch::stable::Tensor grad, torch::stable::Tensor input,
                                        torch::stable::Tensor target, std::optional<torch::stable::Tensor> weight,
                                        torch::stable::Tensor statistics, int64_t reduction, int64_t operand);

torch::stable::Tensor cross_entropy(torch::stable::Tensor input, torch::stable::Tensor target,
                                    std::optional<torch::stable::Tensor> weight, int64_t ignore_index,
                                    int64_t reduction, double label_smoothing, bool float32_loss);

std::tuple<torch::stable::Tensor, torch::stable::Tensor> cross_entropy_forward(
    torch::stable::Tensor input, torch::stable::Tensor target, std::optional<torch::stable::Tensor> weight,
    int64_t ignore_index, int64_t reduction, double label_smoothing, bool float32_loss, int64_t keep);

torch::stable::Tensor cross_entropy_backward(torch::stable::Tensor grad, torch::stable::Tensor input,
                                             torch::stable::Tensor target, std::optional<torch::stable::Tensor> weight,
                                             torch::stable::Tensor statistics, int64_t ignore_index, int64_t reduction,
                                             double label_smoothing, int64_t operand);

std::tuple<torch::stable::Tensor, torch::stable::Tensor> segmentation(
    torch::stable::Tensor input, torch::stable::Tensor target, std::optional<torch::stable::Tensor> weight,
    std::optional<torch::stable::Tensor> pixel_weight, std::optional<torch::stable::Tensor> pos_weight,
    int64_t activation, int64_t ignore_index, int64_t output, double cross_entropy, double iou, double brier,
    double alpha, double beta, double label_smoothing, std::vector<int64_t> classes, bool per_image, int64_t absent,
    double smooth, double eps, bool log, double gamma, int64_t intersection);

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> segmentation_forward(
    torch::stable::Tensor input, torch::stable::Tensor target, std::optional<torch::stable::Tensor> weight,
    std::optional<torch::stable::Tensor> pixel_weight, std::optional<torch::stable::Tensor> pos_weight,
    int64_t activation, int64_t ignore_index, int64_t output, double cross_entropy, double iou, double brier,
    double alpha, double beta, double label_smoothing, std::vector<int64_t> classes, bool per_image, int64_t absent,
    double smooth, double eps, bool log, double gamma, int64_t intersection, bool keep);

torch::stable::Tensor segmentation_backward(torch::stable::Tensor grad, torch::stable::Tensor input,
                                            torch::stable::Tensor target, std::optional<torch::stable::Tensor> weight,
                                            std::optional<torch::stable::Tensor> pixel_weight,
                                            std::optional<torch::stable::Tensor> pos_weight,
                                            torch::stable::Tensor statistics, int64_t activation, int64_t ignore_index,
                                            int64_t output, double cross_entropy, double iou, double brier,
                                            double alpha, double beta, double label_smoothing,
                                            std::vector<int64_t> classes, bool per_image, int64_t absent, double smooth,
                                            double eps, bool log, double gamma, int64_t intersection, int64_t operand);

}  // namespace fusedloss::cuda
