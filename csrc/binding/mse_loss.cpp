// The mse_loss ops on the CPU: allocation, chunks, and the last sum.
#include "kernels/mse_loss.h"

#include <tuple>

#include "binding/mse_loss_call.h"
#include "binding/ops.h"
#include "binding/tensors.h"
#include "kernels/cpu/dispatch.h"

namespace fusedloss {
std::tuple<Tensor, Tensor> mse_loss_forward(Tensor input, Tensor target, std::optional<Tensor> weight,
                                            int64_t reduction, bool float32_loss, int64_t keep_argument) {
  constexpr const char* op = "mse_loss";
  MseLossCall call(op, input, target, weight, reduction, float32_loss);
  const Keep keep = keep_of(keep_argument, op);
  MseLossParams& params = call.params;

  Tensor loss;
  Tensor kept;
  Tensor* output = nullptr;
  if (call.reduction == Reduction::kNone) {
    loss = call.allocate_in_order_of(input, scalar_type(call.loss_dtype));
    call.describe(op, loss, params.output);
    output = &loss;
  }
  if (keep == Keep::kGradient) {
    require(call.reduction != Reduction::kNone && !weight.has_value(), op,
            "a gradient can be kept of a mean or a sum without weights only");
    kept = call.allocate_in_order_of(input, input.scalar_type());
    call.describe(op, kept, params.output);
    params.gradient_scale = call.reduction == Reduction::kMean ? 1.0 / static_cast<double>(params.elements) : 1.0;
    output = &kept;
  }
  call.set_dimensions(output, nullptr);

  const int64_t chunks = mse_loss_chunks(params.elements);
  std::vector<MseLossPartial> partials(chunks);
  const cpu::KernelTable& kernels = cpu::kernels();
  for_chunks(chunks, [&](int64_t begin, int64_t end) {
    (keep == Keep::kGradient ? kernels.mse_loss_forward_and_gradient : kernels.mse_loss_forward)(params, begin, end,
                                                                                                 partials.data());
  });
  double sum = 0.0;
  double divisor = 0.0;
  for (const MseLossPartial& partial : partials) {
    sum += partial.loss;
    divisor += partial.weight;
  }
  if (!weight.has_value()) divisor = static_cast<double>(params.elements);

  if (keep != Keep::kGradient) {
    // (2,) divisor and mean for the backward of a weighted mean, else (0,): nothing that the sizes do not tell.
    const bool save = keep == Keep::kStatistics && call.weighted_mean();
    kept = allocate({save ? 2 : 0}, {1}, ScalarType::Double);
    if (save) {
      double* saved = static_cast<double*>(kept.mutable_data_ptr());
      saved[0] = divisor;
      saved[1] = sum / divisor;
    }
  }
  if (call.reduction != Reduction::kNone) {
    loss = scalar_tensor(call.reduction == Reduction::kMean ? sum / divisor : sum, scalar_type(call.loss_dtype));
  }
  return {loss, kept};
}

void mse_loss_rescale(Tensor gradient, Tensor grad, Tensor input, Tensor target, std::optional<Tensor> weight,
                      int64_t reduction) {
  constexpr const char* op = "_mse_loss_rescale_";
  require(grad.numel() == 1, op, "grad must be one number");
  const double g = first_element(grad, op);
  if (g == 1.0) return;
  // From the operands again, so that the result is rounded once.
  MseLossCall call(op, input, target, weight, reduction, false);
  MseLossParams& params = call.params;
  require(call.reduction != Reduction::kNone && !weight.has_value(), op,
          "reduction must be a mean or a sum, unweighted");
  require(gradient.scalar_type() == input.scalar_type(), op, "gradient must be of input's dtype");
  call.describe(op, gradient, params.output);
  params.wanted = MseLossParams::Wanted::kInput;
  params.gradient_scale = call.reduction == Reduction::kMean ? g / static_cast<double>(params.elements) : g;
  call.set_dimensions(&gradient, nullptr);
  const cpu::KernelTable& kernels = cpu::kernels();
  for_chunks(mse_loss_chunks(params.elements),
             [&](int64_t begin, int64_t end) { kernels.mse_loss_backward(params, begin, end); });
}

Tensor mse_loss(Tensor input, Tensor target, std::optional<Tensor> weight, int64_t reduction, bool float32_loss) {
  return std::get<0>(
      mse_loss_forward(std::move(input), std::move(target), std::move(weight), reduction, float32_loss, 0));
}

Tensor mse_loss_backward(Tensor grad, Tensor input, Tensor target, std::optional<Tensor> weight, Tensor statistics,
                         int64_t reduction, int64_t operand) {
  constexpr const char* op = "_mse_loss_backward";
  MseLossCall call(op, input, target, weight, reduction, false);
  MseLossParams& params = call.params;
  require(operand == 0 || operand == 1 || (operand == 2 && weight.has_value()), op,
          "operand must be 0, 1, or 2 with a weight");
  params.wanted = static_cast<MseLossParams::Wanted>(operand);

  params.gradient_scale = 1.0;
  const bool each = call.reduction == Reduction::kNone && !is_one_element(grad);
  if (each) {
    call.describe(op, grad, params.element_gradient);
  } else if (params.elements > 0) {
    require(call.reduction == Reduction::kNone ? sizes_of(grad) == call.sizes : grad.numel() == 1, op,
            "grad must have the loss's shape");
    params.gradient_scale = first_element(grad, op);
  }
  if (call.weighted_mean()) {
    require(statistics.numel() == 2 && statistics.scalar_type() == ScalarType::Double && statistics.is_contiguous(), op,
            "statistics must be those of the forward op");
    const double* saved = static_cast<const double*>(readable(statistics, op));
    params.gradient_scale /= saved[0];
    params.weighted_mean = operand == 2 ? saved[1] : 0.0;
  } else if (call.reduction == Reduction::kMean) {
    params.gradient_scale /= static_cast<double>(params.elements);
  }

  const Tensor& wanted = operand == 0 ? input : operand == 1 ? target : *weight;
  Tensor gradient = call.allocate_in_order_of(wanted, wanted.scalar_type());
  call.describe(op, gradient, params.output);
  call.set_dimensions(&gradient, each ? &grad : nullptr);
  const cpu::KernelTable& kernels = cpu::kernels();
  for_chunks(mse_loss_chunks(params.elements),
             [&](int64_t begin, int64_t end) { kernels.mse_loss_backward(params, begin, end); });
  return gradient;
}

}  // namespace fusedloss
