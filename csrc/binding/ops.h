// The ops of the CPU library; library.cpp gives their schemas.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

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
