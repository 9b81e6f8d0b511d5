// The mse_loss ops on CUDA devices: allocation and launches.
#include "kernels/cuda/mse_loss.h"

#include <tuple>

#include "binding/cuda/device.h"
#include "binding/mse_loss_call.h"
#include "binding/ops.h"
#include "binding/tensors.h"

namespace fusedloss {

using namespace cuda;

std::tuple<Tensor, Tensor> mse_loss_forward(Tensor input, Tensor target, std::optional<Tensor> weight,
                                            int64_t reduction, bool float32_loss, int64_t keep_argument) {
  constexpr const char* op = "mse_loss";
  require_device(op, input, target, weight);
  const DeviceScope scope(input);
  MseLossCall call(op, input, target, weight, reduction, float32_loss);
  const Keep keep = keep_of(keep_argument, op);
  require(keep != Keep::kGradient, op, "a gradient is kept in the forward on the CPU only");
  MseLossParams& params = call.params;
  const ScalarType loss_type = scalar_type(call.loss_dtype);
  void* stream = current_stream(input);

  // (2,) divisor and mean for the backward of a weighted mean, else (0,): nothing that the sizes do not tell.
  const bool save = keep == Keep::kStatistics && call.weighted_mean();
  Tensor kept = allocate_like(input, {save ? 2 : 0}, {1}, ScalarType::Double);

  if (call.reduction == Reduction::kNone) {
    Tensor loss = call.allocate_in_order_of(input, loss_type);
    call.describe(op, loss, params.output);
    call.set_dimensions(&loss, nullptr);
    check(mse_loss_forward_each(params, stream), op);
    return {loss, kept};
  }

  call.set_dimensions(nullptr, nullptr);
  constexpr int64_t doubles = sizeof(MseLossPartial) / sizeof(double);
  Tensor partials =
      allocate_like(input, {mse_loss_chunks_of(params.elements).count * doubles}, {1}, ScalarType::Double);
  Tensor loss = allocate_like(input, {}, {}, loss_type);
  MseLossResult result{};
  result.mean = call.reduction == Reduction::kMean;
  result.partials = static_cast<MseLossPartial*>(writable(partials, op));
  result.loss = writable(loss, op);
  result.loss_dtype = call.loss_dtype;
  result.statistics = save ? static_cast<double*>(writable(kept, op)) : nullptr;
  check(cuda::mse_loss_forward(params, result, stream), op);
  return {loss, kept};
}

Tensor mse_loss(Tensor input, Tensor target, std::optional<Tensor> weight, int64_t reduction, bool float32_loss) {
  return std::get<0>(mse_loss_forward(std::move(input), std::move(target), std::move(weight), reduction, float32_loss,
                                      static_cast<int64_t>(Keep::kNothing)));
}

Tensor mse_loss_backward(Tensor grad, Tensor input, Tensor target, std::optional<Tensor> weight, Tensor statistics,
                         int64_t reduction, int64_t operand) {
  constexpr const char* op = "_mse_loss_backward";
  require_device(op, grad, input, target, weight, statistics);
  const DeviceScope scope(input);
  MseLossCall call(op, input, target, weight, reduction, false);
  MseLossParams& params = call.params;
  require(operand == 0 || operand == 1 || (operand == 2 && weight.has_value()), op,
          "operand must be 0, 1, or 2 with a weight");
  params.wanted = static_cast<MseLossParams::Wanted>(operand);

  MseLossIncoming incoming{};
  const bool each = call.reduction == Reduction::kNone && !is_one_element(grad);
  if (each) {
    call.describe(op, grad, params.element_gradient);
  } else if (params.elements > 0) {
    require(call.reduction == Reduction::kNone ? sizes_of(grad) == call.sizes : grad.numel() == 1, op,
            "grad must have the loss's shape");
    incoming.grad = readable(grad, op);
    incoming.grad_dtype = dtype_of(grad, op);
    require(is_floating(incoming.grad_dtype), op, "grad must be of a floating dtype");
  }
  params.gradient_scale = 1.0;
  if (call.weighted_mean()) {
    require(statistics.numel() == 2 && statistics.scalar_type() == ScalarType::Double && statistics.is_contiguous(), op,
            "statistics must be those of the forward op");
    incoming.statistics = static_cast<const double*>(readable(statistics, op));
  } else if (call.reduction == Reduction::kMean) {
    params.gradient_scale = 1.0 / static_cast<double>(params.elements);
  }

  const Tensor& wanted = operand == 0 ? input : operand == 1 ? target : *weight;
  Tensor gradient = call.allocate_in_order_of(wanted, wanted.scalar_type());
  call.describe(op, gradient, params.output);
  call.set_dimensions(&gradient, each ? &grad : nullptr);
  check(cuda::mse_loss_backward(params, incoming, current_stream(input)), op);
  return gradient;
}

}  // namespace fusedloss
