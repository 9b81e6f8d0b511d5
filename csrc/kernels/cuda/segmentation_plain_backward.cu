// Backward of softmax with class indices from registers: segmentation_plain.h.
#include "kernels/cuda/class_gradients.h"
#include "kernels/cuda/segmentation_plain.h"

namespace fusedloss::cuda {
namespace {

template <class T, int kClasses, bool kTeams, bool kProbabilities>
FUSEDLOSS_KERNEL_FOR(kPlainThreads, 2)
backward_plain_kernel(FUSEDLOSS_ARGUMENT BackwardParams params, FUSEDLOSS_ARGUMENT PlainPlan plan) {
  constexpr int V = kPlainVector;
  const PlainPlace<kTeams> place(plan, params.classes);
  const int classes = static_cast<int>(params.classes);
  const int tile_pixels = plain_tile_pixels(place.team);
  const bool squared = kProbabilities && params.squared_error;

  char* shared = gpu::shared_memory();
  T* tile = reinterpret_cast<T*>(shared);  // (tile_pixels, C), rows only
  shared += plan.tile_bytes;
  float* exchange = reinterpret_cast<float*>(shared);  // (2, warps, pixels), teams only
  if (kTeams) shared += 2 * kPlainWarps * kTeamPixels * sizeof(float);
  float* d_intersection = reinterpret_cast<float*>(shared);  // (C)
  float* d_predicted = d_intersection + classes;             // (C)
  float* weights = d_predicted + classes;                    // (C)

  // The last chunk first: the end of what the forward has read is still in the cache.
  const ChunkPlace chunk = chunk_place(params, params.chunks, params.chunks.count - 1 - gpu::block());
  if (kProbabilities) {
    const ClassGradients<float> gradients{params, chunk.group, nullptr};
    for (int c = gpu::thread(); c < classes; c += kPlainThreads) {
      d_intersection[c] = gradients.intersection(c);
      d_predicted[c] = gradients.predicted(c);
      weights[c] = class_weight<float>(params, c);
    }
    gpu::sync_block();
  }
  const T* input = static_cast<const T*>(params.input) + offset_of(params.input_layout, chunk.sample, chunk.first);
  T* gradient = static_cast<T*>(params.gradient) + offset_of(params.gradient_layout, chunk.sample, chunk.first);
  const int64_t pixel_stride = params.input_layout.pixel_stride;
  const int64_t class_stride = params.input_layout.class_stride;
  const float nan = math::Constants<float>::infinity - math::Constants<float>::infinity;
  PixelScales<float> scales{0.0f, 0.0f};
  if (!params.grad_of_pixels) scales = pixel_scales<float>(params, 0);

  int turn = 0;
  for (int64_t tile_first = 0; tile_first < chunk.count; tile_first += tile_pixels, ++turn) {
    const int64_t left = chunk.count - tile_first;
    const int elements = (left < tile_pixels ? static_cast<int>(left) : tile_pixels) * classes;
    bool inside[V];
    FUSEDLOSS_UNROLL
    for (int v = 0; v < V; ++v) inside[v] = place.pixel(v) < left;
    PlainLogits<kClasses> logits;
    T* own = tile + place.pixel(0) * classes + place.first;  // rows
    if (place.rows) {
      copy_rows_in(tile, input + tile_first * classes, elements);
      logits.load_rows(own, classes, place.count, inside);
    } else {
      const T* at = input + tile_first + place.pixel(0) + place.first * class_stride;
      logits.load_columns(at, static_cast<uint32_t>(class_stride), place.count, inside[0]);
    }
    PixelState<float> pixels[V];
    float maximum[V], scale[V];
    FUSEDLOSS_UNROLL
    for (int v = 0; v < V; ++v) {
      maximum[v] = scale[v] = 0.0f;
      if (!inside[v]) continue;
      const int64_t pixel = chunk.first + tile_first + place.pixel(v);
      const int64_t flat = chunk.sample * params.pixels + pixel;
      pixels[v] = read_pixel<float>(params, chunk.sample, pixel, nullptr);
      maximum[v] = static_cast<const float*>(params.maximum)[flat];
      const float sum = static_cast<const float*>(params.sum)[flat];
      scale[v] = pixels[v].weight == 0.0f ? 0.0f : 1.0f / sum;
    }
    logits.exponentials(place.count, maximum);
    FUSEDLOSS_UNROLL
    for (int v = 0; v < V; ++v) {
      if (pixels[v].weight == 0.0f) logits.drop(v);
    }
    for_classes<kClasses>(place.count, [&](int k, int v) { logits.z[k][v] *= scale[v]; });

    // dot = sum_c (dL/dP_c + s w_c p_c) p_c, as in segmentation_backward.cu.
    float dot[V] = {0.0f, 0.0f}, twice[V] = {0.0f, 0.0f}, of_cross_entropy[V];
    FUSEDLOSS_UNROLL
    for (int v = 0; v < V; ++v) {
      if (params.grad_of_pixels && inside[v]) {
        const int64_t pixel = chunk.first + tile_first + place.pixel(v);
        scales = pixel_scales<float>(params, chunk.sample * params.pixels + pixel);
      }
      of_cross_entropy[v] = scales.cross_entropy;
      twice[v] = 2.0f * scales.squared_error;
    }
    // Of what lies behind the warp's classes nothing is read: its probability is 0.
    const auto of_class = [&](const float* numbers, int k) {
      return k < place.count ? numbers[place.first + k] : 0.0f;
    };
    if constexpr (kProbabilities) {
      if (squared) {
        for_classes<kClasses>(place.count, [&](int k, int v) {
          const float p = logits.z[k][v];
          dot[v] += p * (of_class(d_predicted, k) + twice[v] * of_class(weights, k) * p);
        });
      } else {
        for_classes<kClasses>(place.count, [&](int k, int v) { dot[v] += logits.z[k][v] * of_class(d_predicted, k); });
      }
      if constexpr (kTeams) {
        float* all = exchange + turn % 2 * kPlainWarps * kTeamPixels;
        FUSEDLOSS_UNROLL
        for (int v = 0; v < V; ++v) all[place.warp * kTeamPixels + v * gpu::kWarp + place.lane] = dot[v];
        gpu::sync_block();
        const float* team = all + place.group * place.team * kTeamPixels + place.lane;
        FUSEDLOSS_UNROLL
        for (int v = 0; v < V; ++v) {
          dot[v] = 0.0f;
          for (int i = 0; i < place.team; ++i) dot[v] += team[i * kTeamPixels + v * gpu::kWarp];
        }
      }
    }

    math::SoftmaxTerms<float> terms[V];
    int own_label[V];
    bool seldom = false;
    FUSEDLOSS_UNROLL
    for (int v = 0; v < V; ++v) {
      const float m = pixels[v].weight;
      own_label[v] = place.own(pixels[v].label);
      seldom |= m == 0.0f;
      terms[v] = {0.0f, 0.0f, 0.0f};
      if (m == 0.0f) continue;
      const int64_t y = pixels[v].label;
      const float w = class_weight<float>(params, y);
      float share = 0.0f;
      if constexpr (kProbabilities) {
        const float z = to_compute(input[(tile_first + place.pixel(v)) * pixel_stride + y * class_stride]);
        const float p = math::exp_shifted<float>(z, maximum[v]) * scale[v];
        share = math::labelled_share<float>(p, d_intersection[y], twice[v], w);
      }
      terms[v] = math::index_label_terms<float>({1.0f, 0.0f}, m, of_cross_entropy[v], w, 0.0f, dot[v], share);
    }
    // In rows a gradient takes the place of its logit in the tile, which nobody but this thread has read.
    T* to = gradient + tile_first + place.pixel(0) + place.first * params.gradient_layout.class_stride;
    const uint32_t to_stride = static_cast<uint32_t>(params.gradient_layout.class_stride);
    // Exactly 0 without weight, NaN where the label is bad: asked for all lanes at once, because most need neither.
    seldom = gpu::any(seldom);
    const auto write = [&](int k, float (&value)[V]) {
      if (seldom) {
        FUSEDLOSS_UNROLL
        for (int v = 0; v < V; ++v) {
          value[v] = pixels[v].weight == 0.0f ? 0.0f : value[v];
          value[v] = pixels[v].bad ? nan : value[v];
        }
      }
      if (place.rows) {
        FUSEDLOSS_UNROLL
        for (int v = 0; v < V; ++v) {
          if (inside[v]) own[v * gpu::kWarp * classes + k] = from_compute<T>(value[v]);
        }
      } else if (inside[0]) {
        gpu::store_streaming(reinterpret_cast<Pack<T, V>*>(to + k * to_stride),
                             pair_from_compute<T>(value[0], value[1]));
      }
    };
    FUSEDLOSS_UNROLL
    for (int k = 0; k < kClasses; ++k) {
      if (k >= place.count) continue;
      float value[V];
      if (kProbabilities) {
        const float d = d_predicted[place.first + k];
        const float w = weights[place.first + k];
        FUSEDLOSS_UNROLL
        for (int v = 0; v < V; ++v) {
          const float labelled = own_label[v] == k ? terms[v].labelled : 0.0f;
          const float m = pixels[v].weight;
          value[v] = squared ? math::index_label_gradient<true, true, float>(logits.z[k][v], m, twice[v], w, d,
                                                                             terms[v].common, labelled, 0.0f)
                             : math::index_label_gradient<false, false, float>(logits.z[k][v], m, 0.0f, 0.0f, d,
                                                                               terms[v].common, labelled, 0.0f);
        }
      } else {
        FUSEDLOSS_UNROLL
        for (int v = 0; v < V; ++v) {
          const float labelled = own_label[v] == k ? terms[v].labelled : 0.0f;
          value[v] = math::index_label_gradient<false, false, float>(logits.z[k][v], 0.0f, 0.0f, 0.0f, 0.0f,
                                                                     terms[v].common, labelled, 0.0f);
        }
      }
      write(k, value);
    }
    if (place.rows) copy_rows_out(gradient + tile_first * classes, tile, elements);
  }
}

}  // namespace

int backward_plain(const BackwardParams& params, const PlainPlan& plan, void* stream) {
  return with_plain_kernel(params, plan, [&](auto type, auto classes, auto teams, auto probabilities) {
    using T = typename decltype(type)::Type;
    return gpu::launch(backward_plain_kernel<T, classes(), teams(), probabilities()>, params.chunks.count,
                       kPlainThreads, static_cast<size_t>(plan.shared_bytes), static_cast<gpu::Stream>(stream), params,
                       plan);
  });
}

}  // namespace fusedloss::cuda
