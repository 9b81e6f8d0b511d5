// The ops; library.cpp gives their schemas. Two libraries define them, one for the CPU and one for CUDA devices
// (cuda/), the latter without those that rescale a gradient. None of the latter waits for the device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace fusedloss {

torch::stable::Tensor cross_entropy(torch::stable::Tensor input, torch::stable::Tensor target,
                                    std::optional<torch::stable::Tensor> weight, int64_t ignore_index,
                                    int64_t reduction, double label_smoothing, bool float32_loss);

// (loss, what `keep` asks for)
std::tuple<torch::stable::Tensor, torch::stable::Tensor> cross_entropy_forward(
    torch::stable::Tensor input, torch::stable::Tensor target, std::optional<torch::stable::Tensor> weight,
    int64_t ignore_index, int64_t reduction, double label_smoothing, bool float32_loss, int64_t keep);

// Turns the gradient that a forward kept into the one for the incoming gradient `grad`.
void cross_entropy_rescale(torch::stable::Tensor gradient, torch::stable::Tensor grad, torch::stable::Tensor input,
                           torch::stable::Tensor target, std::optional<torch::stable::Tensor> weight,
                           int64_t ignore_index, int64_t reduction, double label_smoothing);

// The gradient of operand 0 (input) or 1 (target probabilities).
torch::stable::Tensor cross_entropy_backward(torch::stable::Tensor grad, torch::stable::Tensor input,
                                             torch::stable::Tensor target, std::optional<torch::stable::Tensor> weight,
                                             torch::stable::Tensor statistics, int64_t ignore_index, int64_t reduction,
                                             double label_smoothing, int64_t operand);

// (loss, terms): the value that `output` asks for, and (3,) cross-entropy, overlap and Brier term before their factors.
std::tuple<torch::stable::Tensor, torch::stable::Tensor> segmentation(
    torch::stable::Tensor input, torch::stable::Tensor target, std::optional<torch::stable::Tensor> weight,
    std::optional<torch::stable::Tensor> pixel_weight, std::optional<torch::stable::Tensor> pos_weight,
    int64_t activation, int64_t ignore_index, int64_t output, double cross_entropy, double iou, double brier,
    double alpha, double beta, double label_smoothing, std::vector<int64_t> classes, bool per_image, int64_t absent,
    double smooth, double eps, bool log, double gamma, int64_t intersection);

// (loss, terms, statistics for the backward: empty without `keep`)
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> segmentation_forward(
    torch::stable::Tensor input, torch::stable::Tensor target, std::optional<torch::stable::Tensor> weight,
    std::optional<torch::stable::Tensor> pixel_weight, std::optional<torch::stable::Tensor> pos_weight,
    int64_t activation, int64_t ignore_index, int64_t output, double cross_entropy, double iou, double brier,
    double alpha, double beta, double label_smoothing, std::vector<int64_t> classes, bool per_image, int64_t absent,
    double smooth, double eps, bool log, double gamma, int64_t intersection, bool keep);

// The gradient of operand 0 (input) or 1 (soft labels).
torch::stable::Tensor segmentation_backward(torch::stable::Tensor grad, torch::stable::Tensor input,
                                            torch::stable::Tensor target, std::optional<torch::stable::Tensor> weight,
                                            std::optional<torch::stable::Tensor> pixel_weight,
                                            std::optional<torch::stable::Tensor> pos_weight,
                                            torch::stable::Tensor statistics, int64_t activation, int64_t ignore_index,
                                            int64_t output, double cross_entropy, double iou, double brier,
                                            double alpha, double beta, double label_smoothing,
                                            std::vector<int64_t> classes, bool per_image, int64_t absent, double smooth,
                                            double eps, bool log, double gamma, int64_t intersection, int64_t operand);

torch::stable::Tensor mse_loss(torch::stable::Tensor input, torch::stable::Tensor target,
                               std::optional<torch::stable::Tensor> weight, int64_t reduction, bool float32_loss);

// (loss, what `keep` asks for)
std::tuple<torch::stable::Tensor, torch::stable::Tensor> mse_loss_forward(torch::stable::Tensor input,
                                                                          torch::stable::Tensor target,
                                                                          std::optional<torch::stable::Tensor> weight,
                                                                          int64_t reduction, bool float32_loss,
                                                                          int64_t keep);

void mse_loss_rescale(torch::stable::Tensor gradient, torch::stable::Tensor grad, torch::stable::Tensor input,
                      torch::stable::Tensor target, std::optional<torch::stable::Tensor> weight, int64_t reduction);

// The gradient of operand 0 (input), 1 (target) or 2 (weight), of their common (broadcast) shape.
torch::stable::Tensor mse_loss_backward(torch::stable::Tensor grad, torch::stable::Tensor input,
                                        torch::stable::Tensor target, std::optional<torch::stable::Tensor> weight,
                                        torch::stable::Tensor statistics, int64_t reduction, int64_t operand);

}  // namespace fusedloss
