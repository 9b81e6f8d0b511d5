// The forward visit to the logits: sums of every chunk, and what the backward needs of every pixel.
#include "kernels/cuda/reduce.h"
#include "kernels/cuda/segmentation_pixels.h"
#include "kernels/cuda/segmentation_plain.h"
#include "kernels/cuda/segmentation_rows.h"

namespace fusedloss::cuda {
namespace {

// Sums I, P and T of a chunk's classes: a number a thread where shared memory holds them (nothing to wait for), else a
// number a warp, to which the warp adds its sum.
template <class A>
struct Accumulators {
  A* at;  // (3, C, pitch)
  int64_t classes;
  bool by_thread;

  FUSEDLOSS_DEVICE int64_t pitch() const { return by_thread ? kThreads + 1 : kWarps; }

  FUSEDLOSS_DEVICE void clear() const {
    const int64_t numbers = 3 * classes * pitch();
    for (int64_t i = gpu::thread(); i < numbers; i += kThreads) at[i] = A(0);
    gpu::sync_block();
  }

  // Statistic k of class c; all lanes of the warp have to come.
  FUSEDLOSS_DEVICE void add(int k, int64_t c, A value) const {
    if (by_thread) return add_own(k, c, value);
    value = warp_sum(value);
    if (gpu::thread() % gpu::kWarp == 0) at[(k * classes + c) * pitch() + gpu::thread() / gpu::kWarp] += value;
  }

  // by_thread only: each thread may come with another class.
  FUSEDLOSS_DEVICE void add_own(int k, int64_t c, A value) const {
    at[(k * classes + c) * pitch() + gpu::thread()] += value;
  }

  FUSEDLOSS_DEVICE void write(double* table) const {
    const int numbers = by_thread ? kThreads : kWarps;
    gpu::sync_block();
    for (int64_t i = gpu::thread(); i < 3 * classes; i += kThreads) {
      double sum = 0.0;
      for (int j = 0; j < numbers; ++j) sum += static_cast<double>(at[i * pitch() + j]);
      table[i] = sum;
    }
  }
};

constexpr int64_t kSumsBytes = kPartialSums * kWarps * sizeof(double);

// Sums of a thread over its pixels of a chunk.
template <class A>
struct ThreadSums {
  A cross_entropy = 0;
  A label_weight = 0;
  A squared_error = 0;
  A pixel_weight = 0;
  int bad_labels = 0;
};

template <class T, int kVector>
struct ForwardTile {
  using A = ComputeType<T>;

  const ForwardParams& params;
  const ThreadPixels<A, kVector>& pixels;
  const Logits<T, kVector>& logits;
  const Accumulators<A>& accumulators;
  int64_t target_offset;  // of the thread's first pixel, class 0, of soft labels
  A cross_entropy[kVector];
  A squared_error[kVector];
  A label_weight[kVector];  // w_y; softmax with class indices

  FUSEDLOSS_DEVICE A label(int v, int64_t c) const { return label_of<A, kVector>(params, pixels, v, target_offset, c); }

  FUSEDLOSS_DEVICE void softmax() {
    A maximum[kVector], sum[kVector], z[kVector];
    FUSEDLOSS_UNROLL
    for (int v = 0; v < kVector; ++v) {
      // Not -infinity: a class of -infinity must give exp(-infinity) = 0, not exp(NaN).
      maximum[v] = math::Constants<A>::lowest;
      sum[v] = A(0);
    }
    for (int64_t c = 0; c < params.classes; ++c) {
      read_class(logits, pixels, c, z);
      FUSEDLOSS_UNROLL
      for (int v = 0; v < kVector; ++v) maximum[v] = math::maximum<A>(z[v], maximum[v]);
    }
    // Of the cross-entropy: see math/cross_entropy.h.
    const math::Smoothing<A> smoothing = smoothing_of<A>(params);
    const bool soft = params.cross_entropy && params.soft_labels;
    const bool smooth = params.cross_entropy && !params.soft_labels && params.label_smoothing != 0.0;
    A a[kVector], b[kVector], weight_sum = 0;
    FUSEDLOSS_UNROLL
    for (int v = 0; v < kVector; ++v) a[v] = b[v] = A(0);
    for (int64_t c = 0; c < params.classes; ++c) {
      read_class(logits, pixels, c, z);
      if (smooth || soft) {
        const A w = class_weight<A>(params, c);
        weight_sum += w;
        FUSEDLOSS_UNROLL
        for (int v = 0; v < kVector; ++v) {
          const A share = soft ? math::soft_label_weight<A>(smoothing, w, label(v, c)) : w;
          a[v] += share;
          b[v] += share * (z[v] - maximum[v]);
        }
      }
      FUSEDLOSS_UNROLL
      for (int v = 0; v < kVector; ++v) sum[v] += math::exp_shifted<A>(z[v], maximum[v]);
    }

    FUSEDLOSS_UNROLL
    for (int v = 0; v < kVector; ++v) {
      cross_entropy[v] = label_weight[v] = A(0);
      if (!pixels.inside) continue;
      if (params.maximum != nullptr) {
        static_cast<A*>(params.maximum)[pixels.flat + v] = maximum[v];
        static_cast<A*>(params.sum)[pixels.flat + v] = sum[v];
      }
      if (!params.cross_entropy) continue;
      if (!soft && pixels.label[v] >= 0) {
        const int64_t c = pixels.label[v];
        const A w = class_weight<A>(params, c);
        const A label_logit = to_compute(logits.at[c * logits.class_stride + v]) - maximum[v];
        label_weight[v] = w;
        a[v] = smooth ? math::index_label_a<A>(smoothing, w, weight_sum) : w;
        b[v] = smooth ? math::index_label_b<A>(smoothing, w, label_logit, b[v]) : w * label_logit;
      }
      cross_entropy[v] = math::cross_entropy<A>(a[v], b[v], math::log<A>(sum[v]));
    }
    if (!params.overlap && !params.squared_error) return;

    A scale[kVector];
    FUSEDLOSS_UNROLL
    for (int v = 0; v < kVector; ++v) {
      scale[v] = pixels.weight[v] == A(0) ? A(0) : A(1) / sum[v];
      squared_error[v] = A(0);
    }
    for (int64_t c = 0; c < params.classes; ++c) {
      A p[kVector];
      read_class(logits, pixels, c, z);
      FUSEDLOSS_UNROLL
      for (int v = 0; v < kVector; ++v) {
        p[v] = pixels.weight[v] == A(0) ? A(0) : math::exp_shifted<A>(z[v], maximum[v]) * scale[v];
      }
      collect(c, p);
    }
    if (params.overlap && !params.soft_labels && accumulators.by_thread) {
      // Class indices touch one class of a pixel.
      FUSEDLOSS_UNROLL
      for (int v = 0; v < kVector; ++v) {
        const int64_t c = pixels.label[v];
        const A m = pixels.weight[v];
        if (c < 0 || m == A(0)) continue;
        const A p = math::exp_shifted<A>(to_compute(logits.at[c * logits.class_stride + v]), maximum[v]) * scale[v];
        accumulators.add_own(0, c, m * p);
        accumulators.add_own(2, c, m);
      }
    }
  }

  // Sigmoid, or no activation: each class by itself.
  FUSEDLOSS_DEVICE void each() {
    const math::Smoothing<A> smoothing = smoothing_of<A>(params);
    const A share = A(1) / static_cast<A>(params.classes);
    FUSEDLOSS_UNROLL
    for (int v = 0; v < kVector; ++v) cross_entropy[v] = squared_error[v] = label_weight[v] = A(0);
    for (int64_t c = 0; c < params.classes; ++c) {
      A z[kVector];
      read_class(logits, pixels, c, z);
      const A w = class_weight<A>(params, c) * share;
      const A pos_weight = params.pos_weight == nullptr ? A(1) : static_cast<const A*>(params.pos_weight)[c];
      FUSEDLOSS_UNROLL
      for (int v = 0; v < kVector; ++v) {
        if (pixels.weight[v] == A(0)) {
          z[v] = A(0);
          continue;
        }
        if (params.activation == Activation::kNone) continue;
        const math::Sigmoid<A> s = math::sigmoid_with_log<A>(z[v]);
        if (params.cross_entropy) {
          const A y = smoothing.label * label(v, c) + smoothing.every;
          cross_entropy[v] += w * math::binary_cross_entropy<A>(s, z[v], y, pos_weight);
        }
        z[v] = s.probability;
      }
      if (params.overlap || params.squared_error) collect(c, z);
    }
  }

  // Adds a class's probabilities, 0 where m is, to the statistics and the squared errors.
  FUSEDLOSS_DEVICE void collect(int64_t c, const A (&p)[kVector]) {
    const bool labels_later =
        !params.soft_labels && accumulators.by_thread && params.activation == Activation::kSoftmax;
    A intersection = 0, predicted = 0, labelled = 0;
    bool any_label = false;
    const A w = params.squared_error ? class_weight<A>(params, c) : A(0);
    FUSEDLOSS_UNROLL
    for (int v = 0; v < kVector; ++v) {
      const A m = pixels.weight[v];
      if (labels_later && !params.squared_error) {
        predicted += m * p[v];
        continue;
      }
      const A y = m == A(0) ? A(0) : label(v, c);
      if (params.squared_error) squared_error[v] += w * math::squared_error<A>(p[v], y);
      if (!params.overlap) continue;
      predicted += m * p[v];
      if (labels_later) continue;
      const bool product = params.intersection == Intersection::kProduct;
      intersection += m * (product ? p[v] * y : math::minimum_intersection<A>(p[v], y));
      labelled += m * y;
      any_label |= y != A(0);
    }
    if (!params.overlap) return;
    accumulators.add(1, c, predicted);
    if (labels_later) return;
    // In a warp of neighbors most classes have no label. Without activation a probability may be negative, and then the
    // minimum with 0 is not 0.
    const bool skip = !params.soft_labels && params.activation != Activation::kNone;
    if (!accumulators.by_thread && skip && !gpu::any(any_label)) return;
    accumulators.add(0, c, intersection);
    accumulators.add(2, c, labelled);
  }
};

template <class T, int kVector, Tile kTile, bool kSoftmax>
FUSEDLOSS_KERNEL(kThreads)
forward_kernel(FUSEDLOSS_ARGUMENT ForwardParams params, int64_t tile_bytes, bool by_thread) {
  using A = ComputeType<T>;
  char* shared = gpu::shared_memory();
  double* for_sums = reinterpret_cast<double*>(shared);  // (partial sums, warps)
  T* tile = reinterpret_cast<T*>(shared + kSumsBytes);
  Accumulators<A> accumulators{nullptr, params.classes, by_thread};
  if (params.overlap) {
    accumulators.at = params.accumulators == nullptr
                          ? reinterpret_cast<A*>(shared + kSumsBytes + tile_bytes)
                          : static_cast<A*>(params.accumulators) + gpu::block() * 3 * params.classes * kWarps;
    accumulators.clear();
  }
  const ChunkPlace chunk = chunk_place(params, params.chunks, gpu::block());
  ThreadSums<A> sums;
  for (int64_t first = 0; first < chunk.count; first += kThreads * kVector) {
    const ThreadPixels<A, kVector> pixels = read_pixels<A, kVector>(params, chunk, first, params.bad_label);
    if (kTile == Tile::kRows && first > 0) gpu::sync_block();  // the tile before has been read
    const Logits<T, kVector> logits = load_tile<T, kVector, kTile>(params, chunk, first, pixels, tile);
    ForwardTile<T, kVector> at{
        params, pixels, logits, accumulators, offset_of(params.target_layout, chunk.sample, pixels.pixel), {}, {}, {}};
    if constexpr (kSoftmax) {
      at.softmax();
    } else {
      at.each();
    }
    if (!pixels.inside) continue;
    const A nan = math::Constants<A>::infinity - math::Constants<A>::infinity;
    FUSEDLOSS_UNROLL
    for (int v = 0; v < kVector; ++v) {
      const A m = pixels.weight[v];
      sums.bad_labels += pixels.bad[v];
      sums.pixel_weight += m;
      if (params.cross_entropy) {
        const A value = m == A(0) ? A(0) : m * at.cross_entropy[v];
        sums.cross_entropy += value;
        sums.label_weight += m * at.label_weight[v];
        if (params.cross_entropy_of_pixels != nullptr) {
          store_number<A>(params.cross_entropy_of_pixels, params.cross_entropy_dtype, pixels.flat + v,
                          pixels.bad[v] ? nan : value);
        }
      }
      if (params.squared_error) {
        const A value = m == A(0) ? A(0) : m * at.squared_error[v];
        sums.squared_error += value;
        if (params.squared_error_of_pixels != nullptr) {
          static_cast<A*>(params.squared_error_of_pixels)[pixels.flat + v] = pixels.bad[v] ? nan : value;
        }
      }
    }
  }
  if (params.overlap) accumulators.write(params.tables + gpu::block() * 3 * params.classes);
  const double of_chunk[kPartialSums] = {static_cast<double>(sums.cross_entropy),
                                         static_cast<double>(sums.label_weight),
                                         static_cast<double>(sums.squared_error),
                                         static_cast<double>(sums.pixel_weight), static_cast<double>(sums.bad_labels)};
  block_sums(of_chunk, for_sums, params.partials + gpu::block() * kPartialSums);
}

int64_t compute_bytes(const SegmentationParams& params) { return params.input_dtype == DType::kFloat64 ? 8 : 4; }

// Shared memory of the accumulators: a number a thread up to here, else a number a warp.
constexpr int64_t kMostThreadBytes = int64_t{48} << 10;
// More than so much of shared memory for a number a warp, and they go to device memory.
constexpr int64_t kMostWarpBytes = int64_t{32} << 10;

struct AccumulatorPlan {
  bool by_thread;
  int64_t shared_bytes;
  int64_t bytes_of_chunk;  // of device memory
};

AccumulatorPlan accumulator_plan(const SegmentationParams& params) {
  if (!params.overlap) return {true, 0, 0};
  const int64_t numbers = 3 * params.classes * compute_bytes(params);
  const int64_t of_threads = numbers * (kThreads + 1);
  const int64_t limit = gpu::shared_memory_limit() / 2;
  if (of_threads <= kMostThreadBytes && of_threads <= limit) return {true, of_threads, 0};
  const int64_t of_warps = numbers * kWarps;
  if (of_warps <= kMostWarpBytes && of_warps <= limit) return {false, of_warps, 0};
  return {false, 0, of_warps};
}

}  // namespace

Chunks segmentation_chunks(const SegmentationParams& params) {
  Chunks chunks{1, 0, 0};
  if (params.classes == 0 || params.samples * params.pixels == 0) return chunks;
  // Whole tiles of every width: 128 threads of up to 8 pixels, or of one where classes are innermost.
  const int64_t least = takes_rows(params)                      ? rows_at_once(params)
                        : params.input_layout.pixel_stride == 1 ? kThreads * 8
                                                                : kThreads;
  // Enough blocks for any GPU, few enough that the tables, 24 C bytes each, stay within 4 MiB.
  int64_t most = (int64_t{4} << 20) / (24 * params.classes);
  if (!params.overlap || most > 2048) most = 2048;
  const int64_t of_sample = most > params.samples ? most / params.samples : 1;
  const int64_t wanted = (params.pixels + of_sample - 1) / of_sample;
  chunks.pixels = (wanted + least - 1) / least * least;
  chunks.per_sample = (params.pixels + chunks.pixels - 1) / chunks.pixels;
  chunks.count = chunks.per_sample * params.samples;
  return chunks;
}

int64_t segmentation_accumulator_bytes(const ForwardParams& params) {
  return accumulator_plan(params).bytes_of_chunk * params.chunks.count;
}

int segmentation_forward(const ForwardParams& params, void* stream) {
  if (params.chunks.count == 0) return 0;
  if (takes_rows(params)) return forward_rows(params, stream);
  const PlainPlan plain = plain_plan(params, nullptr);
  if (plain.taken) return forward_plain(params, plain, stream);
  const AccumulatorPlan sums = accumulator_plan(params);
  const int64_t other = kSumsBytes + sums.shared_bytes;
  const Plan plan = plan_of(params, other, false, nullptr);
  return with_kernel(params, plan, [&](auto type, auto vector, auto tile, auto softmax) {
    using T = typename decltype(type)::Type;
    return gpu::launch(forward_kernel<T, vector(), tile(), softmax()>, params.chunks.count, kThreads,
                       static_cast<size_t>(plan.tile_bytes + other), static_cast<gpu::Stream>(stream), params,
                       plan.tile_bytes, sums.by_thread);
  });
}

}  // namespace fusedloss::cuda
