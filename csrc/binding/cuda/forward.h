// The two launches of a forward, with the memory between them.
#pragma once

#include "binding/cuda/device.h"
#include "binding/cuda/records.h"
#include "kernels/cuda/segmentation.h"

namespace fusedloss::cuda {

// Fills in what params and finish have in common, takes scratch memory, and launches both.
inline void run_forward(const char* op, const Tensor& like, ForwardParams& params, FinishParams& finish) {
  params.chunks = segmentation_chunks(params);
  params.bad_label = bad_label_memory(like);
  const int64_t tables = params.overlap ? params.chunks.count * 3 * params.classes : 0;
  const int64_t partials = params.chunks.count * kPartialSums;
  const int64_t sums = 3 * params.groups * params.classes + params.groups;
  const int64_t losses = params.groups * params.classes + params.groups;
  const int64_t accumulators = (segmentation_accumulator_bytes(params) + 7) / 8;
  Tensor scratch = allocate_like(like, {tables + partials + sums + losses + accumulators}, {1}, ScalarType::Double);
  double* at = static_cast<double*>(scratch.mutable_data_ptr());
  params.tables = params.overlap ? at : nullptr;
  params.partials = at + tables;
  finish.sums = params.partials + partials;
  finish.losses = finish.sums + sums;
  params.accumulators = accumulators > 0 ? finish.losses + losses : nullptr;

  finish.chunks = params.chunks;
  finish.classes = params.classes;
  finish.groups = params.groups;
  finish.float64 = params.input_dtype == DType::kFloat64;
  finish.tables = params.tables;
  finish.partials = params.partials;
  finish.cross_entropy = params.cross_entropy;
  finish.squared_error = params.squared_error;
  finish.overlap = params.overlap;
  finish.weight = params.weight;
  void* stream = current_stream(like);
  check(cuda::segmentation_forward(params, stream), op);
  check(cuda::segmentation_finish(finish, stream), op);
}

}  // namespace fusedloss::cuda
