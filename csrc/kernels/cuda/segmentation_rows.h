// Cross-entropy of rows with many classes side by side in memory (vocabularies, ImageNet): which of them these kernels
// take from segmentation_forward() and segmentation_backward(), and how the threads are shared out.
//
// A row has a warp, or all of a block, as its team, whose lanes read 16 bytes at a time. Maximum and sum are found in
// one visit, so that a step moves the logits three times: read, read again, and the gradient written.
#pragma once

#include "kernels/cuda/segmentation_pixels.h"

namespace fusedloss::cuda {

constexpr int kRowThreads = 256;

inline int64_t row_bytes(const SegmentationParams& params) { return params.classes * bytes_of(params.input_dtype); }

// Shorter rows are copied to shared memory and have a thread each (Tile::kRows): up to here at least four blocks of
// them have room on a multiprocessor.
constexpr int64_t kLeastRowBytes = 384;
// Longer ones have a block as their team: then a lane of a warp would make 32 visits.
constexpr int64_t kMostWarpRowBytes = int64_t{16} << 10;

inline bool takes_rows(const SegmentationParams& params) {
  const bool cross_entropy_alone = params.cross_entropy && !params.overlap && !params.squared_error;
  // Of a mask all classes have to be looked at before one is believed.
  const bool mask = params.soft_labels && (params.target_dtype == DType::kUInt8 || params.target_dtype == DType::kBool);
  return cross_entropy_alone && !mask && params.activation == Activation::kSoftmax &&
         params.input_layout.class_stride == 1 && params.input_layout.pixel_stride != 1 &&
         row_bytes(params) > kLeastRowBytes;
}

inline bool team_is_warp(const SegmentationParams& params) { return row_bytes(params) <= kMostWarpRowBytes; }

// Rows that a block works on at once.
inline int64_t rows_at_once(const SegmentationParams& params) {
  return team_is_warp(params) ? kRowThreads / gpu::kWarp : 1;
}

int forward_rows(const ForwardParams& params, void* stream);
int backward_rows(const BackwardParams& params, void* stream);

}  // namespace fusedloss::cuda
