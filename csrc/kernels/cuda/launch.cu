#include "kernels/cuda/launch.h"

#include "kernels/cuda/gpu.h"

namespace fusedloss::cuda {

const char* error_text(int status) { return gpu::error_text(status); }

}  // namespace fusedloss::cuda
