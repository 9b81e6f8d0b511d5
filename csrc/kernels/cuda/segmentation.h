// Contract of the segmentation kernels on CUDA: cross-entropy, squared error and overlap statistics of the same
// probabilities, and cross-entropy alone as one setting of them.
//
// All pointers, those of kernels/segmentation.h too, are to device memory; nothing is read on the host and nothing
// waits. The forward is two launches: one visit to the logits that leaves sums per chunk, and one block that adds them
// in the order of the chunks and turns them into the loss and into what the backward needs. The backward is one.
#pragma once

#include "kernels/cuda/bad_label.h"
#include "kernels/segmentation.h"
#include "math/overlap.h"

namespace fusedloss::cuda {

// Classes that an overlap is of: all, or those that have a place.
struct ChosenClasses {
  static constexpr int kMost = 1024;  // the largest C of which some can be chosen: the list travels as an argument
  static constexpr uint16_t kNowhere = 0xffff;

  int64_t count;          // K
  bool all;               // then place is not read
  uint16_t place[kMost];  // of class c among the chosen, or kNowhere
};

// What a chunk adds, beside its table.
enum PartialSum : int { kCrossEntropy, kLabelWeight, kSquaredError, kPixelWeight, kBadLabels, kPartialSums };

// Chunks of all samples, in the order in which they are added up.
struct Chunks {
  int64_t pixels;      // of a chunk; the last of a sample may be smaller
  int64_t per_sample;  // chunks of a sample
  int64_t count;       // of the batch
};

// A function of the shape and the order of the memory alone.
Chunks segmentation_chunks(const SegmentationParams& params);

struct ForwardParams : SegmentationParams {
  Chunks chunks;
  void* cross_entropy_of_pixels;  // (N, S) of cross_entropy_dtype, or nullptr where only the sum is wanted
  DType cross_entropy_dtype;
  double* tables;      // (chunks, 3, C): I, P and T; nullptr without an overlap
  double* partials;    // (chunks, kPartialSums)
  void* accumulators;  // (chunks, 3, C, warps) of A, or nullptr where shared memory holds them
  BadLabelRecord* bad_label;
};

// Bytes of ForwardParams::accumulators; 0 where shared memory is enough.
int64_t segmentation_accumulator_bytes(const ForwardParams& params);

struct FinishParams {
  Chunks chunks;
  int64_t classes;         // C
  int64_t groups;          // G
  bool float64;            // A is double
  const double* tables;    // (chunks, 3, C), or nullptr without an overlap
  const double* partials;  // (chunks, kPartialSums)

  bool cross_entropy;
  bool squared_error;
  bool overlap;
  bool divide_by_label_weight;  // mean of the cross-entropy: over the sum of m w_y; else over that of m
  bool zero_without_pixels;     // a mean over nothing is 0; else 0 / 0
  Output output;
  Absent absent;
  math::OverlapFormula formula;
  double factors[3];   // of the cross-entropy, overlap and Brier term
  const void* weight;  // (C,) of A, or nullptr for ones
  ChosenClasses chosen;

  double* sums;    // scratch: (3, G, C) I, P, T, then (G) sums of m
  double* losses;  // scratch: (G, C) share times loss of each counting class, then (G) sums of w over them

  void* value;  // by output: (), (G, K), (3, G, C) or (3 G C + G + 3,) of value_dtype; nullptr where it is one number
                // a pixel
  DType value_dtype;
  void* terms;  // (3,) of A, or nullptr
  // For an incoming gradient of 1, or nullptr:
  void* table_gradients;  // (3, G, C) of A: dL/dI, dL/dP, dL/dT
  void* scales;           // (2,) of A: dL/d(sum of CE), dL/d(sum of SE)
};

struct BackwardParams : SegmentationParams {
  Chunks chunks;
  Output output;
  const void* grad;  // incoming gradient: of the value, in its shape
  DType grad_dtype;
  int64_t grad_of_sums[2];      // where grad has that of the sum of CE and of SE: 0 but for Output::kSums
  bool grad_of_pixels;          // grad is (N, S), of the cross-entropy or the squared error of each pixel
  const void* table_gradients;  // (3, G, C) of A, or nullptr without an overlap
  const void* scales;           // (2,) of A, or nullptr for ones
  ChosenClasses chosen;
};

// Each returns 0, or what error_text() (kernels/cuda/launch.h) explains. stream: a cudaStream_t.
int segmentation_forward(const ForwardParams& params, void* stream);
int segmentation_finish(const FinishParams& params, void* stream);
int segmentation_backward(const BackwardParams& params, void* stream);
int segmentation_label_backward(const BackwardParams& params, void* stream);  // gradient of the soft labels

}  // namespace fusedloss::cuda
