// Contract of the segmentation kernels: cross-entropy, squared error and overlap statistics of the same probabilities.
//
// One forward visit to the logits computes whichever terms are asked for; one backward visit writes the gradient of
// their weighted sum. What lies between, the formula on the (G, C) table of overlap statistics, is math/overlap.h.
//
// The logits are seen as in kernels/cross_entropy.h, but samples are folded into pixels only where a group is the
// batch.
#pragma once

#include <cstdint>

#include "kernels/cross_entropy.h"
#include "kernels/dtype.h"

namespace fusedloss {

enum class Activation : int { kSoftmax = 0, kSigmoid = 1, kNone = 2 };
enum class Intersection : int { kMinimum = 0, kProduct = 1 };

// What an op gives as its value.
enum class Output : int {
  kEach = 0,        // the overlap loss of each group and chosen class (G, K), or the loss of each pixel
  kMean = 1,        // the weighted sum of the terms' means
  kSum = 2,         // likewise of their sums
  kStatistics = 3,  // I, P and T: (3, G, C)
  kSums = 4,        // all that the formulas need, for batches whose parts lie on several processes: (3 G C + G + 3)
                    // of double: I, P, T, then m of each group, then the sums of CE, m w_y and SE
};

// Whether the value holds (3, G, C) I, P and T first, for the caller to go on with.
constexpr bool gives_sums(Output output) { return output == Output::kStatistics || output == Output::kSums; }

// Does a class with T = 0 count in its group?
enum class Absent : int { kSkip = 0, kCount = 1, kZero = 2 };

// A: the compute type, double for float64 input and float for all other.
struct SegmentationParams {
  int64_t samples;       // N
  int64_t classes;       // C
  int64_t pixels;        // S, of one sample
  int64_t groups;        // G: N, or 1; sample n is in group n or 0
  int64_t image_pixels;  // of one image: S, but where several images are folded into one sample

  Activation activation;
  Intersection intersection;
  bool cross_entropy;
  bool squared_error;
  bool overlap;

  const void* input;  // (N, C, S) by input_layout, of input_dtype
  LogitLayout input_layout;
  DType input_dtype;

  // Labels: class indices (N, S) of an integer dtype or bool, contiguous; or, with soft_labels, a number for each class
  // (N, C, S) by target_layout, on the CPU also in the other order than the logits (class-innermost beside
  // class-strided): probabilities of a floating dtype, or a mask of bool or uint8 (0 or 1).
  const void* target;
  LogitLayout target_layout;
  DType target_dtype;
  bool soft_labels;
  int64_t ignore_index;  // of class indices only
  // The class that an index means is index - first_label: 0, or 1 for the one class of a binary mask (0 is background).
  int64_t first_label;

  const void* pixel_weight;  // (N, S) of pixel_weight_dtype, contiguous, or nullptr for ones
  DType pixel_weight_dtype;  // floating or bool
  const void* weight;        // (C,) of A, or nullptr for ones
  double weight_sum;         // sum over classes of weight
  const void* pos_weight;    // (C,) of A, or nullptr for ones
  double label_smoothing;

  // Softmax: written by the forward where not nullptr, read by the backward.
  void* maximum;  // (N, S) of A: m = max_c z_c
  void* sum;      // (N, S) of A: sum_c exp(z_c - m)

  // Forward only.
  void* squared_error_of_pixels;  // (N, S) of A, or nullptr where only the sum is wanted

  // Backward only.
  double cross_entropy_scale;             // incoming gradient, over the divisor of the mean
  double squared_error_scale;             // likewise
  const void* gradient_of_squared_error;  // (N, S) of A, contiguous, times the scale; or nullptr for the scale alone
  const void* d_intersection;             // (G, C) of A: dL/dI
  const void* d_predicted;                // (G, C) of A: dL/dP
  const void* d_labelled;                 // (G, C) of A: dL/dT
  void* gradient;  // of the logits by gradient_layout and input_dtype; or of the soft labels, of target_dtype
  LogitLayout gradient_layout;
};

// What one chunk adds to the result. Chunks are summed in the order of their index.
struct SegmentationPartial {
  double cross_entropy;  // sum of CE
  double label_weight;   // sum of m w_y for class indices, 0 for others
  double squared_error;  // sum of SE
  double pixel_weight;   // sum of m
  int64_t bad_label;     // flat position of the chunk's first label outside its range, or -1: in (N, S), or (N, C, S)
                         // for masks
};

// Pixels in a chunk: those of cross_entropy, but so many that the chunks of a batch are no more than 256 and their
// tables, of 3 C doubles each, no more than 4 MiB (or one a sample). A function of the shape alone.
inline int64_t segmentation_chunk_pixels(int64_t classes, int64_t samples, int64_t pixels) {
  const int64_t least = cross_entropy_chunk_pixels(classes);
  const int64_t of_memory = (int64_t{4} << 20) / (24 * (classes > 0 ? classes : 1));
  const int64_t of_batch = of_memory < 256 ? of_memory : 256;
  const int64_t most_chunks = samples < of_batch ? of_batch / samples : 1;
  const int64_t wanted = (pixels + most_chunks - 1) / most_chunks;
  const int64_t rounded = (wanted + least - 1) / least * least;
  return rounded > least ? rounded : least;
}

inline int64_t segmentation_chunks_per_sample(int64_t classes, int64_t samples, int64_t pixels) {
  const int64_t chunk = segmentation_chunk_pixels(classes, samples, pixels);
  return (pixels + chunk - 1) / chunk;
}

}  // namespace fusedloss
