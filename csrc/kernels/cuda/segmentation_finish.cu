// From the sums of the chunks to the loss and to what the backward needs: one block, in an order that is always the
// same, in double.
#include <algorithm>

#include "kernels/cuda/numbers.h"
#include "kernels/cuda/reduce.h"
#include "kernels/cuda/segmentation.h"

namespace fusedloss::cuda {
namespace {

// Of a block, where there is something for each, or else of a small one, whose barriers are cheaper.
constexpr int kMostThreads = 1024;
constexpr int kFewThreads = 128;

FUSEDLOSS_DEVICE int warps() { return gpu::block_threads() / gpu::kWarp; }
FUSEDLOSS_DEVICE double not_a_number() { return __builtin_nan(""); }

struct Finish {
  const FinishParams& params;
  double* shared;  // (threads)
  double* totals;  // (kPartialSums), in shared memory
  int64_t size;    // G C
  int64_t chunks_of_group;

  FUSEDLOSS_DEVICE double& weight_of_group(int64_t g) const { return params.sums[3 * size + g]; }
  FUSEDLOSS_DEVICE double& class_weights_of_group(int64_t g) const { return params.losses[size + g]; }
  FUSEDLOSS_DEVICE double labelled(int64_t g, int64_t c) const {
    return params.sums[2 * size + g * params.classes + c];
  }

  FUSEDLOSS_DEVICE double class_weight(int64_t c) const {
    if (params.weight == nullptr) return 1.0;
    return params.float64 ? static_cast<const double*>(params.weight)[c]
                          : static_cast<double>(static_cast<const float*>(params.weight)[c]);
  }

  FUSEDLOSS_DEVICE void store(void* data, int64_t i, double value) const {
    store_number<double>(data, params.float64 ? DType::kFloat64 : DType::kFloat32, i, value);
  }

  // Of a class among the chosen, or -1.
  FUSEDLOSS_DEVICE int64_t place(int64_t c) const {
    if (params.chosen.all) return c;
    const uint16_t place = params.chosen.place[c];
    return place == ChosenClasses::kNowhere ? -1 : place;
  }

  FUSEDLOSS_DEVICE bool counts(int64_t g, int64_t c) const {
    if (place(c) < 0 || weight_of_group(g) == 0.0) return false;
    return params.absent != Absent::kSkip || labelled(g, c) != 0.0;
  }

  // A mean over nothing.
  FUSEDLOSS_DEVICE double divide(double numerator, double denominator) const {
    return params.zero_without_pixels && denominator == 0.0 ? 0.0 : numerator / denominator;
  }

  // The partial sums over all chunks. After the next barrier they are there.
  FUSEDLOSS_DEVICE void add_partials() const {
    double sums[kPartialSums] = {};
    for (int64_t i = gpu::thread(); i < params.chunks.count; i += gpu::block_threads()) {
      FUSEDLOSS_UNROLL
      for (int k = 0; k < kPartialSums; ++k) sums[k] += params.partials[i * kPartialSums + k];
    }
    block_sums(sums, shared, totals);
  }

  // One of them over a group's chunks, for all lanes of a warp.
  FUSEDLOSS_DEVICE double sum_of_group(PartialSum k, int64_t g) const {
    double sum = 0.0;
    for (int64_t i = gpu::thread() % gpu::kWarp; i < chunks_of_group; i += gpu::kWarp) {
      sum += params.partials[(g * chunks_of_group + i) * kPartialSums + k];
    }
    return warp_sum(sum);
  }

  // Few numbers of many chunks, as of a batch that is one group, would be a few threads that wait for memory: then
  // several share a number, and each takes every so many-th chunk.
  FUSEDLOSS_DEVICE void add_tables() const {
    const int64_t threads = gpu::block_threads();
    const int64_t numbers = 3 * size;
    int64_t sharing = numbers == 0 ? 1 : threads / numbers;
    if (sharing < 1) sharing = 1;
    const int64_t at_once = sharing > 1 ? numbers : threads;
    const int64_t part = gpu::thread() / at_once;
    for (int64_t first = 0; first < numbers; first += at_once) {
      const int64_t i = first + gpu::thread() % at_once;  // in (3, G, C)
      const bool mine = part < sharing && i < numbers;
      double sum = 0.0;
      if (mine) {
        const int64_t c = i % params.classes;
        const int64_t g = i / params.classes % params.groups;
        const int64_t k = i / size;
        const double* table = params.tables + (g * chunks_of_group * 3 + k) * params.classes + c;
        FUSEDLOSS_UNROLL_BY(8)
        for (int64_t chunk = part; chunk < chunks_of_group; chunk += sharing) {
          sum += table[chunk * 3 * params.classes];
        }
      }
      shared[gpu::thread()] = sum;
      gpu::sync_block();
      if (mine && part == 0) {
        sum = 0.0;
        for (int64_t p = 0; p < sharing; ++p) sum += shared[p * at_once + gpu::thread()];
        params.sums[i] = sum;
      }
      gpu::sync_block();
    }
  }

  // Sums of w over the counting classes of each group; how many groups have one.
  FUSEDLOSS_DEVICE double count_groups() const {
    double counting = 0.0;
    const int lane = gpu::thread() % gpu::kWarp;
    for (int64_t g = gpu::thread() / gpu::kWarp; g < params.groups; g += warps()) {
      double weights = 0.0;
      bool any = false;
      for (int64_t c = lane; c < params.classes; c += gpu::kWarp) {
        if (!counts(g, c)) continue;
        any = true;
        weights += class_weight(c);
      }
      weights = warp_sum(weights);
      any = gpu::any(any);
      if (lane != 0) continue;
      class_weights_of_group(g) = weights;
      counting += any ? 1.0 : 0.0;
    }
    return block_sum(counting, shared);
  }

  // Losses, and the derivatives of the value, of each group and class.
  FUSEDLOSS_DEVICE void fill_losses(double counting_groups) const {
    for (int64_t i = gpu::thread(); i < size; i += gpu::block_threads()) {
      const int64_t g = i / params.classes;
      const int64_t c = i % params.classes;
      const bool counting = counts(g, c);
      math::OverlapLoss loss{0.0, 0.0, 0.0, 0.0};
      if (counting && (params.absent != Absent::kZero || labelled(g, c) != 0.0)) {
        loss = math::overlap_loss(params.formula, params.sums[i], params.sums[size + i], params.sums[2 * size + i]);
      }
      double share = 1.0;
      if (params.output == Output::kSum) share = class_weight(c);
      if (params.output == Output::kMean) {
        const double weights = class_weights_of_group(g);
        share = weights == 0.0 || !counting ? 0.0 : class_weight(c) / weights / counting_groups;
      }
      params.losses[i] = counting ? share * loss.value : 0.0;
      if (params.output == Output::kEach && place(c) >= 0 && params.value != nullptr) {
        store_number<double>(params.value, params.value_dtype, g * params.chosen.count + place(c), loss.value);
      }
      if (params.table_gradients == nullptr) continue;
      const double factor = params.output == Output::kEach ? 1.0 : share * params.factors[1];
      // Exactly none, also where the derivative is infinite.
      const bool none = !counting || factor == 0.0;
      store(params.table_gradients, i, none ? 0.0 : factor * loss.d_intersection);
      store(params.table_gradients, size + i, none ? 0.0 : factor * loss.d_predicted);
      store(params.table_gradients, 2 * size + i, none ? 0.0 : factor * loss.d_labelled);
    }
  }

  FUSEDLOSS_DEVICE void write_statistics() const {
    for (int64_t i = gpu::thread(); i < 3 * size; i += gpu::block_threads()) {
      store_number<double>(params.value, params.value_dtype, i, params.overlap ? params.sums[i] : 0.0);
      if (params.table_gradients != nullptr) store(params.table_gradients, i, 1.0);
    }
    if (params.output != Output::kSums) return;
    for (int64_t g = gpu::thread(); g < params.groups; g += gpu::block_threads()) {
      store_number<double>(params.value, params.value_dtype, 3 * size + g, weight_of_group(g));
    }
  }

  // Numbers of the groups in which there was a bad label.
  FUSEDLOSS_DEVICE void spoil_groups() const {
    gpu::sync_block();  // the numbers have been written
    const bool statistics = gives_sums(params.output);
    const int64_t row = statistics ? params.classes : params.chosen.count;
    for (int64_t g = gpu::thread() / gpu::kWarp; g < params.groups; g += warps()) {
      if (sum_of_group(kBadLabels, g) == 0.0) continue;
      for (int64_t k = 0; k < (statistics ? 3 : 1); ++k) {
        for (int64_t c = gpu::thread() % gpu::kWarp; c < row; c += gpu::kWarp) {
          store_number<double>(params.value, params.value_dtype, (k * params.groups + g) * row + c, not_a_number());
        }
      }
    }
  }
};

FUSEDLOSS_KERNEL(kMostThreads) finish_kernel(FUSEDLOSS_ARGUMENT FinishParams params) {
  double* const shared = reinterpret_cast<double*>(gpu::shared_memory());
  const Finish finish{params, shared, shared + gpu::block_threads(), params.groups * params.classes,
                      params.groups > 0 ? params.chunks.count / params.groups : 0};
  for (int64_t g = gpu::thread() / gpu::kWarp; g < params.groups; g += warps()) {
    const double weight = finish.sum_of_group(kPixelWeight, g);
    if (gpu::thread() % gpu::kWarp == 0) finish.weight_of_group(g) = weight;
  }
  if (params.overlap && params.tables != nullptr) finish.add_tables();
  finish.add_partials();
  gpu::sync_block();
  const double pixel_weight = finish.totals[kPixelWeight];
  const bool bad = finish.totals[kBadLabels] != 0.0;

  double overlap = 0.0;
  if (gives_sums(params.output)) {
    finish.write_statistics();
  } else if (params.overlap) {
    finish.fill_losses(finish.count_groups());
    gpu::sync_block();
    for (int64_t i = gpu::thread(); i < finish.size; i += gpu::block_threads()) overlap += params.losses[i];
    overlap = block_sum(overlap, finish.shared);
  }
  const bool many = gives_sums(params.output) || (params.output == Output::kEach && params.overlap);
  if (many && bad && params.value != nullptr) finish.spoil_groups();

  if (gpu::thread() != 0) return;
  const double cross_entropy = finish.totals[kCrossEntropy];
  const double squared_error = finish.totals[kSquaredError];
  const double label_weight = finish.totals[kLabelWeight];
  if (params.output == Output::kSums) {
    const double sums[3] = {cross_entropy, label_weight, squared_error};
    for (int k = 0; k < 3; ++k) {
      store_number<double>(params.value, params.value_dtype, 3 * finish.size + params.groups + k,
                           bad ? not_a_number() : sums[k]);
    }
  }
  const bool scalar = params.output == Output::kMean || params.output == Output::kSum;
  const bool mean = params.output == Output::kMean;
  const double divisor = params.divide_by_label_weight ? label_weight : pixel_weight;
  double terms[3] = {0.0, 0.0, 0.0};
  double scales[2] = {0.0, 0.0};
  if (params.cross_entropy) {
    if (scalar) terms[0] = mean ? finish.divide(cross_entropy, divisor) : cross_entropy;
    scales[0] = mean ? finish.divide(params.factors[0], divisor) : params.factors[0];
  }
  if (params.overlap && scalar) terms[1] = overlap;
  if (params.squared_error) {
    if (scalar) terms[2] = mean ? finish.divide(squared_error, pixel_weight) : squared_error;
    scales[1] = mean ? finish.divide(params.factors[2], pixel_weight) : params.factors[2];
  }
  if (bad) {
    if (params.cross_entropy) terms[0] = not_a_number();
    if (params.overlap) terms[1] = not_a_number();
    if (params.squared_error) terms[2] = not_a_number();
  }
  if (scalar && params.value != nullptr) {
    double loss = 0.0;
    if (params.cross_entropy) loss += params.factors[0] * terms[0];
    if (params.overlap) loss += params.factors[1] * terms[1];
    if (params.squared_error) loss += params.factors[2] * terms[2];
    store_number<double>(params.value, params.value_dtype, 0, loss);
  }
  if (params.terms != nullptr) {
    for (int k = 0; k < 3; ++k) finish.store(params.terms, k, terms[k]);
  }
  if (params.scales != nullptr) {
    for (int k = 0; k < 2; ++k) finish.store(params.scales, k, scales[k]);
  }
}

}  // namespace

int segmentation_finish(const FinishParams& params, void* stream) {
  // A function of the shape alone, as the order of the sums has to be: chunks, numbers of a table, a warp a group.
  int64_t wanted = params.chunks.count;
  if (params.overlap) wanted = std::max({wanted, 3 * params.groups * params.classes, params.groups * gpu::kWarp});
  const int threads = wanted <= kFewThreads ? kFewThreads : kMostThreads;
  return gpu::launch(finish_kernel, 1, threads, (threads + kPartialSums) * sizeof(double),
                     static_cast<gpu::Stream>(stream), params);
}

}  // namespace fusedloss::cuda
