// The device of a call: whether all tensors are there, its stream, its errors.
//
// With FUSEDLOSS_CUDA_ON_HOST, under which a host compiler builds the kernels for the tests (tests/cuda_host), that
// device is the CPU.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "binding/tensors.h"
#include "kernels/cuda/launch.h"

#if !defined(FUSEDLOSS_CUDA_ON_HOST) && !defined(USE_CUDA)
#error "torch declares its CUDA streams under USE_CUDA only"
#endif

namespace fusedloss::cuda {

// "cuda:1"
inline std::string device_text(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  if (tensor.is_cuda()) return "cuda:" + std::to_string(tensor.get_device_index());
  return "a device of another kind";
}

inline void require_same_device(const char* op, const Tensor& like, const Tensor& other) {
  const std::string wanted = device_text(like);
  const std::string got = device_text(other);
  if (wanted == got) return;
  throw std::invalid_argument(std::string(op) + ": all tensors must be on the first one's device, " + wanted +
                              ", got one on " + got);
}
inline void require_same_device(const char* op, const Tensor& like, const std::optional<Tensor>& other) {
  if (other.has_value()) require_same_device(op, like, *other);
}

// The dispatcher comes here when one of the tensors is on a GPU; kernels need all of them there. Others: tensors, or
// optional ones.
template <class... Others>
void require_device(const char* op, const Tensor& like, const Others&... others) {
#if defined(FUSEDLOSS_CUDA_ON_HOST)
  const bool right = like.is_cpu();
#else
  const bool right = like.is_cuda();
#endif
  if (!right) {
    throw std::invalid_argument(std::string(op) + ": the first tensor must be on a CUDA device, got " +
                                device_text(like));
  }
  (require_same_device(op, like, others), ...);
}

// Makes a tensor's device the current one, where it is not, until the end of the scope: kernels go to the current one.
class DeviceScope {
 public:
#if defined(FUSEDLOSS_CUDA_ON_HOST)
  explicit DeviceScope(const Tensor&) {}
#else
  explicit DeviceScope(const Tensor& tensor) {
    const int32_t index = tensor.get_device_index();
    if (torch::stable::accelerator::getCurrentDeviceIndex() != index) guard_.emplace(index);
  }
#endif
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

#if !defined(FUSEDLOSS_CUDA_ON_HOST)
 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
#endif
};

// torch's current stream on the tensor's device, a cudaStream_t.
inline void* current_stream(const Tensor& tensor) {
#if defined(FUSEDLOSS_CUDA_ON_HOST)
  (void)tensor;
  return nullptr;
#else
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
#endif
}

// status: of a launcher.
inline void check(int status, const char* op) {
  if (status != 0) throw std::runtime_error(std::string(op) + ": " + error_text(status));
}

}  // namespace fusedloss::cuda
