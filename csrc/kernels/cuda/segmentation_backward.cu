// The backward visit to the logits: the gradient of the weighted sum of the terms; and the gradient of soft labels.
#include "kernels/cuda/class_gradients.h"
#include "kernels/cuda/segmentation_pixels.h"
#include "kernels/cuda/segmentation_plain.h"
#include "kernels/cuda/segmentation_rows.h"

namespace fusedloss::cuda {
namespace {

// Up to so many bytes of dL/dI, dL/dP and dL/dT are made once a block and kept in shared memory.
constexpr int64_t kMostTableBytes = int64_t{24} << 10;

template <class T, int kVector>
struct BackwardTile {
  using A = ComputeType<T>;

  const BackwardParams& params;
  const ThreadPixels<A, kVector>& pixels;
  const Logits<T, kVector>& logits;
  const ClassGradients<A>& gradients;
  A weight_sum;           // sum of w; with label smoothing
  int64_t target_offset;  // of the thread's first pixel, class 0, of soft labels
  T* to;                  // gradient of class 0
  int64_t to_stride;      // from class to class

  FUSEDLOSS_DEVICE A label(int v, int64_t c) const { return label_of<A, kVector>(params, pixels, v, target_offset, c); }

  // The gradient of a class: exactly 0 where m is, NaN where the label is bad.
  FUSEDLOSS_DEVICE void write(int64_t c, const A (&value)[kVector]) const {
    const A nan = math::Constants<A>::infinity - math::Constants<A>::infinity;
    Pack<T, kVector> pack;
    FUSEDLOSS_UNROLL
    for (int v = 0; v < kVector; ++v) {
      const A number = pixels.weight[v] == A(0) ? A(0) : value[v];
      pack.values[v] = from_compute<T>(pixels.bad[v] ? nan : number);
    }
    if constexpr (kVector == 1) {
      to[c * to_stride] = pack.values[0];
    } else {
      gpu::store_streaming(reinterpret_cast<Pack<T, kVector>*>(to + c * to_stride), pack);
    }
  }

  // g_c; `twice` is s of math/segmentation.h.
  FUSEDLOSS_DEVICE static A gradient_of(A p, A y, bool by_product, A twice, A w, A d_intersection, A d_predicted) {
    const A share = by_product ? y : math::minimum_intersection_derivative<A>(p, y);
    return math::probability_gradient<true, A>(p, y, share, twice, w, d_intersection, d_predicted);
  }

  FUSEDLOSS_DEVICE void softmax() const {
    const math::Smoothing<A> smoothing = smoothing_of<A>(params);
    const bool soft = params.soft_labels;
    const bool by_product = params.intersection == Intersection::kProduct;
    const bool of_probabilities = params.overlap || params.squared_error;
    A maximum[kVector], inverse_sum[kVector], twice[kVector], of_cross_entropy[kVector], dot[kVector], square[kVector];
    A z[kVector];
    FUSEDLOSS_UNROLL
    for (int v = 0; v < kVector; ++v) {
      const int64_t flat = pixels.flat + v;
      maximum[v] = static_cast<const A*>(params.maximum)[flat];
      inverse_sum[v] = pixels.weight[v] == A(0) ? A(0) : A(1) / static_cast<const A*>(params.sum)[flat];
      const PixelScales<A> scales = pixel_scales<A>(params, flat);
      of_cross_entropy[v] = scales.cross_entropy;
      twice[v] = A(2) * scales.squared_error;
      dot[v] = square[v] = A(0);
    }
    // First visit, of the labels alone where no term is of the probabilities.
    //   class indices  dot = sum_c (dL/dP_c + s w_c p_c) p_c
    //   soft labels    dot = sum_c g_c p_c,  square = sum_c w_c y~_c
    if (of_probabilities || soft) {
      for (int64_t c = 0; c < params.classes; ++c) {
        const A w = class_weight<A>(params, c);
        if (of_probabilities) {
          const A d_predicted = gradients.predicted(c);
          const A d_intersection = gradients.intersection(c);
          read_class(logits, pixels, c, z);
          FUSEDLOSS_UNROLL
          for (int v = 0; v < kVector; ++v) {
            const A p = math::exp_shifted<A>(z[v], maximum[v]) * inverse_sum[v];
            dot[v] += p * (soft ? gradient_of(p, label(v, c), by_product, twice[v], w, d_intersection, d_predicted)
                                : d_predicted + twice[v] * w * p);
          }
        }
        if (soft && params.cross_entropy) {
          FUSEDLOSS_UNROLL
          for (int v = 0; v < kVector; ++v) square[v] += math::soft_label_weight<A>(smoothing, w, label(v, c));
        }
      }
    }

    math::SoftmaxTerms<A> terms[kVector];
    FUSEDLOSS_UNROLL
    for (int v = 0; v < kVector; ++v) {
      const A g = of_cross_entropy[v];
      if (soft) {
        terms[v] = math::soft_label_terms<A>(g, square[v], dot[v]);
        continue;
      }
      const int64_t y = pixels.label[v] < 0 ? 0 : pixels.label[v];
      const A w = class_weight<A>(params, y);
      A share = 0;
      if (of_probabilities) {
        const A exponential = math::exp_shifted<A>(to_compute(logits.at[y * logits.class_stride + v]), maximum[v]);
        share = math::labelled_share<A>(exponential * inverse_sum[v], gradients.intersection(y), twice[v], w);
      }
      terms[v] = math::index_label_terms<A>(smoothing, pixels.weight[v], g, w, weight_sum, dot[v], share);
    }
    for (int64_t c = 0; c < params.classes; ++c) {
      const A w = class_weight<A>(params, c);
      const A d_predicted = gradients.predicted(c);
      const A d_intersection = soft ? gradients.intersection(c) : A(0);
      A value[kVector];
      read_class(logits, pixels, c, z);
      FUSEDLOSS_UNROLL
      for (int v = 0; v < kVector; ++v) {
        const A m = pixels.weight[v];
        const A p = math::exp_shifted<A>(z[v], maximum[v]) * inverse_sum[v];
        if (soft) {
          const A y = label(v, c);
          const A g = gradient_of(p, y, by_product, twice[v], w, d_intersection, d_predicted);
          value[v] = math::soft_label_gradient<A>(p, m, g, math::soft_label_weight<A>(smoothing, w, y), terms[v].common,
                                                  terms[v].smoothed);
        } else {
          const A labelled = pixels.label[v] == c ? terms[v].labelled : A(0);
          value[v] = math::index_label_gradient<true, true, A>(p, m, twice[v], w, d_predicted, terms[v].common,
                                                               labelled, terms[v].smoothed);
        }
      }
      write(c, value);
    }
  }

  // Sigmoid, or no activation: each class by itself.
  FUSEDLOSS_DEVICE void each() const {
    const math::Smoothing<A> smoothing = smoothing_of<A>(params);
    const bool sigmoid = params.activation == Activation::kSigmoid;
    // Of a hard label and a probability the minimum and the product are the same.
    const bool by_product = params.intersection == Intersection::kProduct || (sigmoid && !params.soft_labels);
    A twice[kVector], of_cross_entropy[kVector];
    FUSEDLOSS_UNROLL
    for (int v = 0; v < kVector; ++v) {
      const PixelScales<A> scales = pixel_scales<A>(params, pixels.flat + v);
      of_cross_entropy[v] = scales.cross_entropy / static_cast<A>(params.classes);
      twice[v] = A(2) * scales.squared_error;
    }
    for (int64_t c = 0; c < params.classes; ++c) {
      const A w = class_weight<A>(params, c);
      const A pos_weight = params.pos_weight == nullptr ? A(1) : static_cast<const A*>(params.pos_weight)[c];
      const A d_predicted = gradients.predicted(c);
      const A d_intersection = gradients.intersection(c);
      A z[kVector], value[kVector];
      read_class(logits, pixels, c, z);
      FUSEDLOSS_UNROLL
      for (int v = 0; v < kVector; ++v) {
        const A y = label(v, c);
        if (sigmoid) {
          const math::Sigmoid<A> s = math::sigmoid<A>(z[v]);
          value[v] = s.probability * s.complement *
                     gradient_of(s.probability, y, by_product, twice[v], w, d_intersection, d_predicted);
          if (params.cross_entropy) {
            const A smoothed = smoothing.label * y + smoothing.every;
            value[v] += of_cross_entropy[v] * w * math::binary_cross_entropy_logit_gradient<A>(s, smoothed, pos_weight);
          }
        } else {
          value[v] = gradient_of(z[v], y, by_product, twice[v], w, d_intersection, d_predicted);
        }
        value[v] *= pixels.weight[v];
      }
      write(c, value);
    }
  }
};

// A kRows tile of gradients to memory, whole pixels by a warp. All threads of the block have to come.
template <class T>
FUSEDLOSS_DEVICE void write_rows(const BackwardParams& params, const ChunkPlace& chunk, int64_t tile_first,
                                 const T* tile) {
  const LogitLayout& layout = params.gradient_layout;
  const int64_t pitch = row_pitch<T>(params.classes);
  const int64_t left = chunk.count - tile_first;
  const int count = static_cast<int>(left < kThreads ? left : kThreads);
  T* to = static_cast<T*>(params.gradient) + offset_of(layout, chunk.sample, chunk.first + tile_first);
  gpu::sync_block();  // the gradients are in the tile
  for (int p = gpu::thread() / gpu::kWarp; p < count; p += kWarps) {
    for (int64_t c = gpu::thread() % gpu::kWarp; c < params.classes; c += gpu::kWarp) {
      to[p * layout.pixel_stride + c * layout.class_stride] = tile[p * pitch + c];
    }
  }
}

template <class T, int kVector, Tile kTile, bool kSoftmax>
FUSEDLOSS_KERNEL(kThreads)
backward_kernel(FUSEDLOSS_ARGUMENT BackwardParams params, int64_t tile_bytes, bool keep_table) {
  using A = ComputeType<T>;
  T* tile = reinterpret_cast<T*>(gpu::shared_memory());
  A* table = keep_table ? reinterpret_cast<A*>(gpu::shared_memory() + tile_bytes) : nullptr;
  const ChunkPlace chunk = chunk_place(params, params.chunks, gpu::block());
  const ClassGradients<A> gradients = class_gradients<A>(params, chunk.group, table);
  A weight_sum = 0;
  if (kSoftmax && params.cross_entropy && !params.soft_labels && params.label_smoothing != 0.0) {
    for (int64_t c = 0; c < params.classes; ++c) weight_sum += class_weight<A>(params, c);
  }
  for (int64_t first = 0; first < chunk.count; first += kThreads * kVector) {
    const ThreadPixels<A, kVector> pixels = read_pixels<A, kVector>(params, chunk, first, nullptr);
    if (kTile == Tile::kRows && first > 0) gpu::sync_block();  // the tile before has been written out
    const Logits<T, kVector> logits = load_tile<T, kVector, kTile>(params, chunk, first, pixels, tile);
    if (pixels.inside) {
      T* to = static_cast<T*>(params.gradient) + offset_of(params.gradient_layout, chunk.sample, pixels.pixel);
      int64_t to_stride = params.gradient_layout.class_stride;
      if constexpr (kTile == Tile::kRows) {
        // In place: a class is written when nobody reads its logit again.
        to = tile + gpu::thread() * row_pitch<T>(params.classes);
        to_stride = 1;
      }
      const BackwardTile<T, kVector> at{
          params, pixels,   logits, gradients, weight_sum, offset_of(params.target_layout, chunk.sample, pixels.pixel),
          to,     to_stride};
      if constexpr (kSoftmax) {
        at.softmax();
      } else {
        at.each();
      }
    }
    if constexpr (kTile == Tile::kRows) write_rows<T>(params, chunk, first, tile);
  }
}

// Gradient of the soft labels, one pixel a thread: it is asked for rarely, and by label models that cost far more.
template <class T>
FUSEDLOSS_KERNEL(kThreads)
label_backward_kernel(FUSEDLOSS_ARGUMENT BackwardParams params, bool keep_table) {
  using A = ComputeType<T>;
  const ChunkPlace chunk = chunk_place(params, params.chunks, gpu::block());
  const ClassGradients<A> gradients =
      class_gradients<A>(params, chunk.group, keep_table ? reinterpret_cast<A*>(gpu::shared_memory()) : nullptr);
  const bool by_product = params.intersection == Intersection::kProduct;
  const A smoothing_label = static_cast<A>(1.0 - params.label_smoothing);
  for (int64_t first = 0; first < chunk.count; first += kThreads) {
    const ThreadPixels<A, 1> pixels = read_pixels<A, 1>(params, chunk, first, nullptr);
    if (!pixels.inside) continue;
    const Logits<T, 1> logits = load_tile<T, 1, Tile::kDirect>(params, chunk, first, pixels, static_cast<T*>(nullptr));
    const int64_t target_offset = offset_of(params.target_layout, chunk.sample, pixels.pixel);
    const int64_t to = offset_of(params.gradient_layout, chunk.sample, pixels.pixel);
    const PixelScales<A> scales = pixel_scales<A>(params, pixels.flat);
    const A g = scales.cross_entropy;
    const A m = pixels.weight[0];
    A maximum = 0, sum = 1;
    if (params.activation == Activation::kSoftmax) {
      maximum = static_cast<const A*>(params.maximum)[pixels.flat];
      sum = static_cast<const A*>(params.sum)[pixels.flat];
    }
    for (int64_t c = 0; c < params.classes; ++c) {
      const A z = to_compute(logits.load(c).values[0]);
      const A y = label_of<A, 1>(params, pixels, 0, target_offset, c);
      const A w = class_weight<A>(params, c);
      A p = z, value = 0;
      if (params.activation == Activation::kSoftmax) {
        p = math::exp_shifted<A>(z, maximum) / sum;
        if (g != A(0)) {
          value = math::cross_entropy_label_gradient<A>(g, smoothing_label * w, z, maximum, math::log<A>(sum));
        }
      } else if (params.activation == Activation::kSigmoid) {
        const math::Sigmoid<A> s = math::sigmoid_with_log<A>(z);
        const A pos_weight = params.pos_weight == nullptr ? A(1) : static_cast<const A*>(params.pos_weight)[c];
        p = s.probability;
        if (g != A(0)) {
          value = g / static_cast<A>(params.classes) * w * smoothing_label *
                  math::binary_cross_entropy_label_gradient<A>(s, z, pos_weight);
        }
      }
      const A share = by_product ? p : math::minimum_intersection_derivative<A>(y, p);
      const A scale = A(2) * scales.squared_error * w;
      if (scale != A(0)) value += math::squared_error_gradient<A>(scale, y, p);
      value += gradients.intersection(c) * share + gradients.labelled(c);
      store_number<A>(params.gradient, params.target_dtype, to + c * params.gradient_layout.class_stride,
                      m == A(0) ? A(0) : m * value);
    }
  }
}

// Of the shared memory for dL/dI, dL/dP and dL/dT, or 0.
int64_t table_bytes(const BackwardParams& params) {
  const int64_t bytes = 3 * params.classes * (params.input_dtype == DType::kFloat64 ? 8 : 4);
  return params.overlap && bytes <= kMostTableBytes ? bytes : 0;
}

}  // namespace

int segmentation_backward(const BackwardParams& params, void* stream) {
  if (params.chunks.count == 0) return 0;
  if (takes_rows(params) && params.gradient_layout.class_stride == 1) return backward_rows(params, stream);
  const PlainPlan plain = plain_plan(params, params.gradient);
  if (plain.taken) return backward_plain(params, plain, stream);
  const int64_t of_table = table_bytes(params);
  const bool one_visit = params.activation != Activation::kSoftmax || (!params.overlap && !params.squared_error);
  const Plan plan = plan_of(params, of_table, one_visit, params.gradient);
  return with_kernel(params, plan, [&](auto type, auto vector, auto tile, auto softmax) {
    using T = typename decltype(type)::Type;
    return gpu::launch(backward_kernel<T, vector(), tile(), softmax()>, params.chunks.count, kThreads,
                       static_cast<size_t>(plan.tile_bytes + of_table), static_cast<gpu::Stream>(stream), params,
                       plan.tile_bytes, of_table > 0);
  });
}

int segmentation_label_backward(const BackwardParams& params, void* stream) {
  if (params.chunks.count == 0) return 0;
  const int64_t of_table = table_bytes(params);
  return with_type(params.input_dtype, [&](auto type) {
    return gpu::launch(label_backward_kernel<typename decltype(type)::Type>, params.chunks.count, kThreads,
                       static_cast<size_t>(of_table), static_cast<gpu::Stream>(stream), params, of_table > 0);
  });
}

}  // namespace fusedloss::cuda
