// Contract of the cross-entropy kernels.
//
// The logits are seen as N samples of S pixels of C classes, whatever the number of spatial dimensions. One of the two
// inner strides is 1:
//
//   class-strided   (N, C, H, W) contiguous:          pixel_stride 1, class_stride H W
//   class-innermost (N, C) rows and channels_last:    class_stride 1, pixel_stride C
//
// The binding folds samples into pixels where the memory allows it, so (N, C) rows arrive as one sample of N pixels.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

namespace fusedloss {

// Strides in elements.
struct LogitLayout {
  int64_t sample_stride;
  int64_t class_stride;
  int64_t pixel_stride;
};

struct CrossEntropyParams {
  int64_t samples;  // N
  int64_t classes;  // C, below 2^31
  int64_t pixels;   // S, of one sample

  const void* input;  // (N, C, S) by input_layout, of input_dtype
  LogitLayout input_layout;
  DType input_dtype;

  // Labels: class indices (N, S) of an integer dtype, contiguous; or, with soft_labels, probabilities (N, C, S) by
  // target_layout, of input_dtype or, for two-byte logits, float32. They lie in the order of the logits; beside up to
  // kCrossEntropyTileClasses classes on the CPU also in the other (class-innermost beside class-strided).
  const void* target;
  LogitLayout target_layout;
  DType target_dtype;
  bool soft_labels;

  const void* weight;      // (C,) of the compute type, or nullptr for ones
  double weight_sum;       // sum over classes of weight, C without one
  int64_t ignore_index;    // compared with the label after widening to 64 bits; class-index labels only
  double label_smoothing;  // in [0, 1]

  // Written by the forward, read by the backward. Together they give probabilities without a second look for the
  // maximum; one number (log-sum-exp) would not do, it loses the digits of the probabilities of large logits.
  void* maximum;  // (N, S) of the compute type: m = max_c z_c
  void* sum;      // (N, S) of the compute type: sum_c exp(z_c - m)

  // Forward only.
  void* loss;  // (N, S) of loss_dtype, or nullptr where only the sum is wanted
  DType loss_dtype;

  // Backward; and forward, where it is to write the gradient at once (gradient not nullptr).
  const void* pixel_gradient;  // (N, S) of loss_dtype, times gradient_scale; or nullptr for gradient_scale alone
  double gradient_scale;       // incoming gradient, over the divisor of the mean
  void* gradient;  // of the logits by gradient_layout and input_dtype; or of the soft labels, of target_dtype
  LogitLayout gradient_layout;
};

// Up to so many classes the CPU kernels turn what is class-innermost into a class-major tile. Above, a row of classes
// fills its vectors well, and a tile of them would outgrow its share of the L2 cache.
constexpr int kCrossEntropyTileClasses = 192;

// What one chunk adds to the result. Chunks are summed in the order of their index.
struct CrossEntropyPartial {
  double loss;
  double weight;      // the divisor of the mean: sum of w_y, or the number of pixels for soft labels
  int64_t bad_label;  // flat (N, S) position of the chunk's first label outside [0, C), or -1
};

// Pixels in a chunk: a function of the shape alone, so that the same sums are formed for any number of threads.
// Enough logits (64 Ki) to be worth a thread's time, few enough that many threads share even one small image.
// A multiple of 128, the widest block that the CPU kernels work on.
inline int64_t cross_entropy_chunk_pixels(int64_t classes) {
  const int64_t wanted = 65536 / (classes > 0 ? classes : 1);
  if (classes >= 2048) return wanted > 1 ? wanted : 1;
  return wanted < 128 ? 128 : wanted / 128 * 128;
}

inline int64_t cross_entropy_chunks_per_sample(int64_t classes, int64_t pixels) {
  const int64_t chunk = cross_entropy_chunk_pixels(classes);
  return (pixels + chunk - 1) / chunk;
}

}  // namespace fusedloss
