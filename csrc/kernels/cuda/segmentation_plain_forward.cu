// Forward of softmax with class indices from registers: segmentation_plain.h.
#include "kernels/cuda/reduce.h"
#include "kernels/cuda/segmentation_plain.h"

namespace fusedloss::cuda {
namespace {

struct MaximumAndSum {
  float maximum;
  float sum;
};

// Blocks of a multiprocessor: two leave a thread 128 registers, into which the statistics of teams do not fit.
template <bool kStatisticsOfTeams>
constexpr int kForwardBlocks = kStatisticsOfTeams ? 1 : 2;

// Sums over the block's slots of each class to `table`, (C) of double. slots_of: (C, slots + 1). A warp has a class.
FUSEDLOSS_DEVICE void write_sums(double* table, const float* slots_of, int classes, int slots) {
  const int lane = gpu::thread() % gpu::kWarp;
  for (int c = gpu::thread() / gpu::kWarp; c < classes; c += kPlainWarps) {
    double sum = 0.0;
    for (int slot = lane; slot < slots; slot += gpu::kWarp) {
      sum += static_cast<double>(slots_of[c * (slots + 1) + slot]);
    }
    sum = warp_sum(sum);
    if (lane == 0) table[c] = sum;
  }
}

template <class T, int kClasses, bool kTeams, bool kProbabilities>
FUSEDLOSS_KERNEL_FOR(kPlainThreads, kForwardBlocks<kTeams && kProbabilities>)
forward_plain_kernel(FUSEDLOSS_ARGUMENT ForwardParams params, FUSEDLOSS_ARGUMENT PlainPlan plan) {
  constexpr int V = kPlainVector;
  const PlainPlace<kTeams> place(plan, params.classes);
  const int classes = static_cast<int>(params.classes);
  const int slots = kPlainThreads / place.team;
  const int tile_pixels = plain_tile_pixels(place.team);

  char* shared = gpu::shared_memory();
  double* for_sums = reinterpret_cast<double*>(shared);  // (partial sums, warps)
  shared += kPartialSums * kPlainWarps * sizeof(double);
  T* tile = reinterpret_cast<T*>(shared);  // (tile_pixels, C), rows only
  shared += plan.tile_bytes;
  MaximumAndSum* exchange = reinterpret_cast<MaximumAndSum*>(shared);  // (2, warps, pixels), teams only
  if (kTeams) shared += 2 * kPlainWarps * kTeamPixels * sizeof(MaximumAndSum);
  float* intersection = reinterpret_cast<float*>(shared);  // (C, slots + 1)
  float* labelled = intersection + classes * (slots + 1);  // likewise
  const bool overlap = kProbabilities && params.overlap;
  const bool squared = kProbabilities && params.squared_error;
  if (overlap) {
    for (int i = gpu::thread(); i < 2 * classes * (slots + 1); i += kPlainThreads) intersection[i] = 0.0f;
    gpu::sync_block();
  }

  const ChunkPlace chunk = chunk_place(params, params.chunks, gpu::block());
  const T* input = static_cast<const T*>(params.input) + offset_of(params.input_layout, chunk.sample, chunk.first);
  const int64_t pixel_stride = params.input_layout.pixel_stride;
  const int64_t class_stride = params.input_layout.class_stride;
  const float nan = math::Constants<float>::infinity - math::Constants<float>::infinity;

  float predicted[kClasses];
  FUSEDLOSS_UNROLL
  for (int k = 0; k < kClasses; ++k) predicted[k] = 0.0f;
  float cross_entropy = 0.0f, label_weight = 0.0f, squared_error = 0.0f, pixel_weight = 0.0f;
  int bad_labels = 0;

  int turn = 0;
  for (int64_t tile_first = 0; tile_first < chunk.count; tile_first += tile_pixels, ++turn) {
    bool inside[V];
    FUSEDLOSS_UNROLL
    for (int v = 0; v < V; ++v) inside[v] = tile_first + place.pixel(v) < chunk.count;
    PlainLogits<kClasses> logits;
    if (place.rows) {
      const int64_t left = chunk.count - tile_first;
      const int pixels = left < tile_pixels ? static_cast<int>(left) : tile_pixels;
      if (turn > 0) gpu::sync_block();  // the tile before has been read
      copy_rows_in(tile, input + tile_first * classes, pixels * classes);
      logits.load_rows(tile + place.pixel(0) * classes + place.first, classes, place.count, inside);
    } else {
      const T* at = input + tile_first + place.pixel(0) + place.first * class_stride;
      logits.load_columns(at, static_cast<uint32_t>(class_stride), place.count, inside[0]);
    }
    // One warp of a team has what is to be done once a pixel, in turn.
    const bool leads = !kTeams || place.member == turn % place.team;
    PixelState<float> pixels[V];
    FUSEDLOSS_UNROLL
    for (int v = 0; v < V; ++v) {
      if (!inside[v] || !(kProbabilities || leads)) continue;
      pixels[v] = read_pixel<float>(params, chunk.sample, chunk.first + tile_first + place.pixel(v),
                                    leads ? params.bad_label : nullptr);
    }

    float maximum[V], sum[V];
    FUSEDLOSS_UNROLL
    for (int v = 0; v < V; ++v) {
      // Not -infinity: a class of -infinity must give exp(-infinity) = 0, not exp(NaN).
      maximum[v] = math::Constants<float>::lowest;
      sum[v] = 0.0f;
    }
    for_classes<kClasses>(place.count, [&](int k, int v) { maximum[v] = gpu::larger(logits.z[k][v], maximum[v]); });
    logits.exponentials(place.count, maximum);
    for_classes<kClasses>(place.count, [&](int k, int v) { sum[v] += logits.z[k][v]; });
    float factor[V] = {1.0f, 1.0f};  // from the warp's maximum to the team's
    if constexpr (kTeams) {
      MaximumAndSum* all = exchange + turn % 2 * kPlainWarps * kTeamPixels;
      FUSEDLOSS_UNROLL
      for (int v = 0; v < V; ++v) all[place.warp * kTeamPixels + v * gpu::kWarp + place.lane] = {maximum[v], sum[v]};
      gpu::sync_block();
      const MaximumAndSum* team = all + place.group * place.team * kTeamPixels + place.lane;
      FUSEDLOSS_UNROLL
      for (int v = 0; v < V; ++v) {
        const float own = maximum[v];
        for (int i = 0; i < place.team; ++i) {
          maximum[v] = gpu::larger(team[i * kTeamPixels + v * gpu::kWarp].maximum, maximum[v]);
        }
        sum[v] = 0.0f;
        for (int i = 0; i < place.team; ++i) {
          const MaximumAndSum one = team[i * kTeamPixels + v * gpu::kWarp];
          sum[v] += one.sum * math::exp_shifted<float>(one.maximum, maximum[v]);
        }
        factor[v] = math::exp_shifted<float>(own, maximum[v]);
      }
    }

    float scale[V];
    FUSEDLOSS_UNROLL
    for (int v = 0; v < V; ++v) {
      const float m = pixels[v].weight;
      scale[v] = m == 0.0f ? 0.0f : factor[v] / sum[v];
      if (kProbabilities && m == 0.0f && !(sum[v] < math::Constants<float>::infinity)) logits.drop(v);
      if (!leads || !inside[v]) continue;
      const int64_t pixel = chunk.first + tile_first + place.pixel(v);
      const int64_t flat = chunk.sample * params.pixels + pixel;
      if (params.maximum != nullptr) {
        static_cast<float*>(params.maximum)[flat] = maximum[v];
        static_cast<float*>(params.sum)[flat] = sum[v];
      }
      bad_labels += pixels[v].bad;
      pixel_weight += m;
      float value = 0.0f;
      if (m != 0.0f) {
        const int64_t y = pixels[v].label;
        const float z = to_compute(input[(tile_first + place.pixel(v)) * pixel_stride + y * class_stride]);
        if (params.cross_entropy) {
          const float w = class_weight<float>(params, y);
          value = m * math::cross_entropy<float>(w, w * (z - maximum[v]), math::log<float>(sum[v]));
          cross_entropy += value;
          label_weight += m * w;
        }
        if (overlap) {
          const int at = static_cast<int>(y) * (slots + 1) + place.slot();
          intersection[at] += m * (math::exp_shifted<float>(z, maximum[v]) / sum[v]);
          labelled[at] += m;
        }
      }
      if (params.cross_entropy_of_pixels != nullptr) {
        store_number<float>(params.cross_entropy_of_pixels, params.cross_entropy_dtype, flat,
                            pixels[v].bad ? nan : value);
      }
    }
    if constexpr (!kProbabilities) continue;
    if (overlap) {
      for_classes<kClasses>(place.count,
                            [&](int k, int v) { predicted[k] += pixels[v].weight * (logits.z[k][v] * scale[v]); });
    }
    if (squared) {
      float of_pixel[V] = {0.0f, 0.0f};
      int own_label[V];
      FUSEDLOSS_UNROLL
      for (int v = 0; v < V; ++v) own_label[v] = place.own(pixels[v].label);
      const auto add = [&](int k, int v, float w) {
        const float y = own_label[v] == k ? 1.0f : 0.0f;
        of_pixel[v] += w * math::squared_error<float>(logits.z[k][v] * scale[v], y);
      };
      if (params.weight == nullptr) {
        for_classes<kClasses>(place.count, [&](int k, int v) { add(k, v, 1.0f); });
      } else {
        for_classes<kClasses>(place.count, [&](int k, int v) {
          if (k < place.count) add(k, v, class_weight<float>(params, place.first + k));
        });
      }
      FUSEDLOSS_UNROLL
      for (int v = 0; v < V; ++v) squared_error += pixels[v].weight == 0.0f ? 0.0f : pixels[v].weight * of_pixel[v];
    }
  }

  if (overlap) {
    double* table = params.tables + gpu::block() * 3 * classes;
    gpu::sync_block();  // all of I and T is there
    write_sums(table, intersection, classes, slots);
    write_sums(table + 2 * classes, labelled, classes, slots);
    gpu::sync_block();  // and has been read: P takes the place of I
    FUSEDLOSS_UNROLL
    for (int k = 0; k < kClasses; ++k) {
      if (k < place.count) intersection[(place.first + k) * (slots + 1) + place.slot()] = predicted[k];
    }
    gpu::sync_block();
    write_sums(table + classes, intersection, classes, slots);
  }
  const double sums[kPartialSums] = {static_cast<double>(cross_entropy), static_cast<double>(label_weight),
                                     static_cast<double>(squared_error), static_cast<double>(pixel_weight),
                                     static_cast<double>(bad_labels)};
  block_sums(sums, for_sums, params.partials + gpu::block() * kPartialSums);
}

}  // namespace

int forward_plain(const ForwardParams& params, const PlainPlan& plan, void* stream) {
  return with_plain_kernel(params, plan, [&](auto type, auto classes, auto teams, auto probabilities) {
    using T = typename decltype(type)::Type;
    return gpu::launch(forward_plain_kernel<T, classes(), teams(), probabilities()>, params.chunks.count, kPlainThreads,
                       static_cast<size_t>(plan.shared_bytes), static_cast<gpu::Stream>(stream), params, plan);
  });
}

}  // namespace fusedloss::cuda
