// Cross-entropy of rows with many classes, forward and backward.
#include "kernels/cuda/segmentation_rows.h"

#include "kernels/cuda/reduce.h"

namespace fusedloss::cuda {
namespace {

constexpr int kRowWarps = kRowThreads / gpu::kWarp;

// Which sums over the classes the labels need, as on the CPU: none but sum exp, or their own. A kernel that knows that
// it needs none has the registers to read ahead.
enum class RowLabels { kIndex, kOther };

template <class T, RowLabels kLabels>
constexpr int kReadAhead = kLabels != RowLabels::kIndex ? 1
                           : sizeof(T) == 8             ? 2
                                                        : 4;

// Calls visit(first class, its numbers as an array of the compute type, and of neighbors) until the lanes of a team
// have seen the whole row: single numbers up to the first 16-byte boundary and after the last, packs in between.
// kAtOnce: packs that a lane asks for before it waits for the first.
template <class T, int kTeam, int kAtOnce, class Visit>
FUSEDLOSS_DEVICE void for_row(const T* row, int64_t classes, int lane, Visit visit) {
  using A = ComputeType<T>;
  constexpr int kWide = 16 / sizeof(T);
  const int past = static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(T) % kWide);
  int64_t head = past == 0 ? 0 : kWide - past;
  if (head > classes) head = classes;
  const int64_t packs = (classes - head) / kWide;
  const auto one = [&](int64_t c) {
    const A z[1] = {to_compute(row[c])};
    visit(c, z);
  };
  for (int64_t c = lane; c < head; c += kTeam) one(c);
  FUSEDLOSS_UNROLL_BY(kAtOnce)
  for (int64_t i = lane; i < packs; i += kTeam) {
    const int64_t c = head + i * kWide;
    const Pack<T, kWide> pack = load_pack<T, kWide>(row + c);
    A z[kWide];
    FUSEDLOSS_UNROLL
    for (int v = 0; v < kWide; ++v) z[v] = to_compute(pack.values[v]);
    visit(c, z);
  }
  for (int64_t c = head + packs * kWide + lane; c < classes; c += kTeam) one(c);
}

// What is summed over the classes, relative to the largest logit so far; math/cross_entropy.h says what a and b are.
template <class A>
struct RowSums {
  // Not -infinity: a class of -infinity must give exp(-infinity) = 0, not exp(NaN).
  A maximum = math::Constants<A>::lowest;
  A sum = 0;
  A a = 0;
  A b = 0;

  FUSEDLOSS_DEVICE void move_to(A larger) {
    if (larger == maximum) return;
    sum *= math::exp_shifted<A>(maximum, larger);
    if (a != A(0)) b -= a * (larger - maximum);  // of nothing the difference may be infinite
    maximum = larger;
  }

  FUSEDLOSS_DEVICE void add(RowSums other) {
    const A larger = math::maximum<A>(other.maximum, maximum);
    move_to(larger);
    other.move_to(larger);
    sum += other.sum;
    a += other.a;
    b += other.b;
  }

  // The first lane of the warp gets the sums of all.
  FUSEDLOSS_DEVICE void add_warp() {
    for (int lanes = gpu::kWarp / 2; lanes > 0; lanes /= 2) {
      add({gpu::shuffle_xor(maximum, lanes), gpu::shuffle_xor(sum, lanes), gpu::shuffle_xor(a, lanes),
           gpu::shuffle_xor(b, lanes)});
    }
  }
};

// The sum of w over the classes. All threads of the block have to come, and all get it. shared: (warps).
template <class A>
FUSEDLOSS_DEVICE A sum_of_class_weights(const SegmentationParams& params, double* shared) {
  if (params.weight == nullptr) return static_cast<A>(params.classes);
  double sum = 0.0;
  for (int64_t c = gpu::thread(); c < params.classes; c += kRowThreads) {
    sum += static_cast<double>(class_weight<A>(params, c));
  }
  return static_cast<A>(block_sum(sum, shared));
}

// What both kernels know of the labels of all rows.
template <class A, RowLabels kLabels>
struct RowSetting {
  const SegmentationParams& params;
  math::Smoothing<A> smoothing;
  bool soft;     // a number for each class
  bool smooth;   // class indices with label smoothing
  A weight_sum;  // sum of w; with label smoothing

  // All threads of the block have to come. shared: (warps).
  FUSEDLOSS_DEVICE RowSetting(const SegmentationParams& params, double* shared)
      : params(params),
        smoothing(smoothing_of<A>(params)),
        soft(kLabels != RowLabels::kIndex && params.soft_labels),
        smooth(kLabels != RowLabels::kIndex && !params.soft_labels),
        weight_sum(smooth ? sum_of_class_weights<A>(params, shared) : A(0)) {}

  // w_c y~_c of a soft label; `labels`: where the row's begin.
  FUSEDLOSS_DEVICE A label_weight(int64_t labels, int64_t c) const {
    const A y = load_number<A>(params.target, params.target_dtype, labels + c * params.target_layout.class_stride);
    return math::soft_label_weight<A>(smoothing, class_weight<A>(params, c), y);
  }
};

template <class T, int kTeam, RowLabels kLabels>
FUSEDLOSS_KERNEL(kRowThreads)
forward_rows_kernel(FUSEDLOSS_ARGUMENT ForwardParams params) {
  using A = ComputeType<T>;
  double* for_sums = reinterpret_cast<double*>(gpu::shared_memory());                         // (partial sums, warps)
  RowSums<A>* of_warps = reinterpret_cast<RowSums<A>*>(for_sums + kPartialSums * kRowWarps);  // (warps)
  const ChunkPlace chunk = chunk_place(params, params.chunks, gpu::block());
  const int lane = gpu::thread() % kTeam;
  const RowSetting<A, kLabels> setting(params, for_sums);
  const A nan = math::Constants<A>::infinity - math::Constants<A>::infinity;
  double cross_entropy = 0.0, label_weight = 0.0, pixel_weight = 0.0, bad_labels = 0.0;
  for (int64_t i = gpu::thread() / kTeam; i < chunk.count; i += kRowThreads / kTeam) {
    const int64_t pixel = chunk.first + i;
    const T* row = static_cast<const T*>(params.input) + offset_of(params.input_layout, chunk.sample, pixel);
    const int64_t labels = offset_of(params.target_layout, chunk.sample, pixel);
    RowSums<A> sums;
    for_row<T, kTeam, kReadAhead<T, kLabels>>(row, params.classes, lane, [&](int64_t c, const auto& z) {
      constexpr int n = sizeof(z) / sizeof(A);
      A larger = sums.maximum;
      FUSEDLOSS_UNROLL
      for (int v = 0; v < n; ++v) larger = math::maximum<A>(z[v], larger);
      sums.move_to(larger);
      FUSEDLOSS_UNROLL
      for (int v = 0; v < n; ++v) {
        sums.sum += math::exp_shifted<A>(z[v], larger);
        if constexpr (kLabels != RowLabels::kIndex) {
          const A share = setting.soft ? setting.label_weight(labels, c + v) : class_weight<A>(params, c + v);
          sums.a += share;
          sums.b += share * (z[v] - larger);
        }
      }
    });
    sums.add_warp();
    if constexpr (kTeam > gpu::kWarp) {
      if (gpu::thread() % gpu::kWarp == 0) of_warps[gpu::thread() / gpu::kWarp] = sums;
      gpu::sync_block();
      if (gpu::thread() == 0) {
        for (int warp = 1; warp < kRowWarps; ++warp) sums.add(of_warps[warp]);
      }
      gpu::sync_block();  // the sums have been read
    }
    if (lane != 0) continue;

    const PixelState<A> state = read_pixel<A>(params, chunk.sample, pixel, params.bad_label);
    const int64_t flat = chunk.sample * params.pixels + pixel;
    if (params.maximum != nullptr) {
      static_cast<A*>(params.maximum)[flat] = sums.maximum;
      static_cast<A*>(params.sum)[flat] = sums.sum;
    }
    A a = sums.a, b = sums.b, w = 0;
    if (!setting.soft && state.label >= 0) {
      w = class_weight<A>(params, state.label);
      const A label_logit = to_compute(row[state.label]) - sums.maximum;
      a = setting.smooth ? math::index_label_a<A>(setting.smoothing, w, setting.weight_sum) : w;
      b = setting.smooth ? math::index_label_b<A>(setting.smoothing, w, label_logit, sums.b) : w * label_logit;
    }
    const A m = state.weight;
    const A value = m == A(0) ? A(0) : m * math::cross_entropy<A>(a, b, math::log<A>(sums.sum));
    cross_entropy += static_cast<double>(value);
    label_weight += static_cast<double>(m * w);
    pixel_weight += static_cast<double>(m);
    bad_labels += state.bad ? 1.0 : 0.0;
    if (params.cross_entropy_of_pixels != nullptr) {
      store_number<A>(params.cross_entropy_of_pixels, params.cross_entropy_dtype, flat, state.bad ? nan : value);
    }
  }
  const double of_chunk[kPartialSums] = {cross_entropy, label_weight, 0.0, pixel_weight, bad_labels};
  block_sums(of_chunk, for_sums, params.partials + gpu::block() * kPartialSums);
}

template <class T, int kTeam, RowLabels kLabels>
FUSEDLOSS_KERNEL(kRowThreads)
backward_rows_kernel(FUSEDLOSS_ARGUMENT BackwardParams params) {
  using A = ComputeType<T>;
  double* for_sums = reinterpret_cast<double*>(gpu::shared_memory());  // (warps)
  const ChunkPlace chunk = chunk_place(params, params.chunks, gpu::block());
  const int lane = gpu::thread() % kTeam;
  const RowSetting<A, kLabels> setting(params, for_sums);
  const A nan = math::Constants<A>::infinity - math::Constants<A>::infinity;
  for (int64_t i = gpu::thread() / kTeam; i < chunk.count; i += kRowThreads / kTeam) {
    const int64_t pixel = chunk.first + i;
    const int64_t flat = chunk.sample * params.pixels + pixel;
    const T* row = static_cast<const T*>(params.input) + offset_of(params.input_layout, chunk.sample, pixel);
    T* to = static_cast<T*>(params.gradient) + offset_of(params.gradient_layout, chunk.sample, pixel);
    // Whether a pack of the row is one of the gradient's too.
    const bool alike = reinterpret_cast<uintptr_t>(row) % 16 == reinterpret_cast<uintptr_t>(to) % 16;
    const int64_t labels = offset_of(params.target_layout, chunk.sample, pixel);
    const PixelState<A> state = read_pixel<A>(params, chunk.sample, pixel, nullptr);
    const A m = state.weight;
    const A g = m == A(0) ? A(0) : pixel_scales<A>(params, flat).cross_entropy;
    const A maximum = static_cast<const A*>(params.maximum)[flat];
    const A inverse_sum = m == A(0) ? A(0) : A(1) / static_cast<const A*>(params.sum)[flat];
    math::SoftmaxTerms<A> terms;
    if (setting.soft) {
      A sum = 0;
      for (int64_t c = lane; c < params.classes; c += kTeam) sum += setting.label_weight(labels, c);
      if constexpr (kTeam > gpu::kWarp) {
        sum = static_cast<A>(block_sum(static_cast<double>(sum), for_sums));
      } else {
        sum = warp_sum(sum);
      }
      terms = math::soft_label_terms<A>(g, sum, A(0));
    } else {
      const A w = class_weight<A>(params, state.label < 0 ? 0 : state.label);
      terms = math::index_label_terms<A>(setting.smoothing, m, g, w, setting.weight_sum, A(0), A(0));
    }
    for_row<T, kTeam, kReadAhead<T, kLabels>>(row, params.classes, lane, [&](int64_t c, const auto& z) {
      constexpr int n = sizeof(z) / sizeof(A);
      Pack<T, n> pack;
      FUSEDLOSS_UNROLL
      for (int v = 0; v < n; ++v) {
        const A p = math::exp_shifted<A>(z[v], maximum) * inverse_sum;
        A value;
        if (setting.soft) {
          value = math::soft_label_gradient<A>(p, m, A(0), setting.label_weight(labels, c + v), terms.common,
                                               terms.smoothed);
        } else {
          const A labelled = state.label == c + v ? terms.labelled : A(0);
          value =
              setting.smooth
                  ? math::index_label_gradient<true, true, A>(p, m, A(0), class_weight<A>(params, c + v), A(0),
                                                              terms.common, labelled, terms.smoothed)
                  : math::index_label_gradient<false, false, A>(p, m, A(0), A(0), A(0), terms.common, labelled, A(0));
        }
        value = m == A(0) ? A(0) : value;
        pack.values[v] = from_compute<T>(state.bad ? nan : value);
      }
      if (alike) {
        gpu::store_streaming(reinterpret_cast<Pack<T, n>*>(to + c), pack);
      } else {
        FUSEDLOSS_UNROLL
        for (int v = 0; v < n; ++v) to[c + v] = pack.values[v];
      }
    });
  }
}

// Calls f(TypeName<T>, kTeam, kLabels), the last two as integral constants.
template <class F>
int with_row_kernel(const SegmentationParams& params, F f) {
  return with_type(params.input_dtype, [&](auto type) {
    const auto with_labels = [&](auto team) {
      return params.soft_labels || params.label_smoothing != 0.0
                 ? f(type, team, std::integral_constant<RowLabels, RowLabels::kOther>{})
                 : f(type, team, std::integral_constant<RowLabels, RowLabels::kIndex>{});
    };
    return team_is_warp(params) ? with_labels(std::integral_constant<int, gpu::kWarp>{})
                                : with_labels(std::integral_constant<int, kRowThreads>{});
  });
}

}  // namespace

int forward_rows(const ForwardParams& params, void* stream) {
  return with_row_kernel(params, [&](auto type, auto team, auto labels) {
    using T = typename decltype(type)::Type;
    return gpu::launch(forward_rows_kernel<T, team(), labels()>, params.chunks.count, kRowThreads,
                       kRowWarps * (kPartialSums * sizeof(double) + sizeof(RowSums<ComputeType<T>>)),
                       static_cast<gpu::Stream>(stream), params);
  });
}

int backward_rows(const BackwardParams& params, void* stream) {
  return with_row_kernel(params, [&](auto type, auto team, auto labels) {
    using T = typename decltype(type)::Type;
    return gpu::launch(backward_rows_kernel<T, team(), labels()>, params.chunks.count, kRowThreads,
                       kRowWarps * sizeof(double), static_cast<gpu::Stream>(stream), params);
  });
}

}  // namespace fusedloss::cuda
