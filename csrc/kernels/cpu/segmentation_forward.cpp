// Cross-entropy, squared error and overlap statistics of the same probabilities, on the CPU.
//
// Plan. A chunk is a run of pixels of one sample; it goes block by block:
//   1. per pixel: label, weight m
//   2. a class-major tile in the cache: exp(z - m) with its sums, sigmoid(z), or z
//   3. per pixel: cross-entropy;  per class: overlap statistics;  per pixel: squared error
// Class-strided logits are read where they lie; class-innermost ones pass through the tile, which is transposed.
// Cross-entropy alone has kernels of its own (cross_entropy.cpp), which write the gradient in the forward: with an
// overlap term it is not known there.
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/segmentation_block.h"
#include "kernels/cpu/segmentation_forward_tile.h"

namespace fusedloss::cpu::FUSEDLOSS_LEVEL {
namespace {

// Softmax: exponentials into the tile, statistics, and the cross-entropy of each pixel (not yet times m).
// class_weight: w_y of each pixel; of class indices only.
template <class T>
void fill_softmax(SegmentationBlock<T>& block, ComputeType<T>* cross_entropy, ComputeType<T>* class_weight) {
  using A = ComputeType<T>;
  using V = Vector<A>;
  const SegmentationParams& params = block.params;
  const Classes<A>& classes = block.classes;
  SegmentationPixels<A>& pixels = block.pixels;
  A* tile = block.work.tile;
  const int64_t stride = block.work.stride;
  BlockSums<A> sums;
  const Labels labels = !params.cross_entropy           ? Labels::kIndex
                        : params.soft_labels            ? Labels::kSoft
                        : params.label_smoothing != 0.0 ? Labels::kIndexSmoothed
                                                        : Labels::kIndex;
  alignas(64) A label_logit[kBlock<A>];
  block.with_logits([&](const auto* z, int64_t z_stride) {
    if (params.cross_entropy && labels != Labels::kSoft) {  // now, because the tile may be what holds the logits
      for_vectors<A, 1>(block.count, [&](auto, auto partial, int i, int left) {
        const auto read = [&](int64_t c) {
          const auto* row = z + c * z_stride + i;
          return partial() ? load_partial(row, left, A(0)) : load(row);
        };
        store(label_logit + i, of_labels<A>(pixels.place + i, read));
      });
    }
    const auto run = [&](auto kind) {
      block.with_labels([&](const auto* y, int64_t y_stride) {
        forward_tile<kind(), true>(classes, z, z_stride, y, y_stride, block.count, sums, tile, stride, block.ahead(),
                                   Outgoing<T>{});
      });
    };
    switch (labels) {
      case Labels::kIndex:
        return run(std::integral_constant<Labels, Labels::kIndex>{});
      case Labels::kIndexSmoothed:
        return run(std::integral_constant<Labels, Labels::kIndexSmoothed>{});
      default:
        return run(std::integral_constant<Labels, Labels::kSoft>{});
    }
  });
  int not_finite = 0;
  for (int i = 0; i < block.padded; ++i) {
    const A sum = sums.sum[i];
    pixels.sum[i] = sum;
    pixels.inverse_sum[i] = pixels.weight[i] == A(0) ? A(0) : A(1) / sum;
    not_finite += !(sum - sum == A(0));
  }
  if (not_finite > 0) {
    for (int i = 0; i < block.padded; ++i) {
      if (pixels.weight[i] != A(0)) continue;
      for (int64_t c = 0; c < classes.count; ++c) tile[c * stride + i] = 0;
    }
  }
  if (params.maximum != nullptr) {
    __builtin_memcpy(static_cast<A*>(params.maximum) + block.flat, sums.maximum, sizeof(A) * block.count);
    __builtin_memcpy(static_cast<A*>(params.sum) + block.flat, sums.sum, sizeof(A) * block.count);
  }
  if (!params.cross_entropy) return;

  // Of pixels without a label whatever comes out: their weight is 0.
  if (labels != Labels::kSoft) read_class_weights(classes, pixels, block.padded, class_weight);
  const math::Smoothing<V> smoothing{splat<V>(classes.smoothing.label), splat<V>(classes.smoothing.every)};
  const V weight_sum = splat<V>(static_cast<A>(params.weight_sum));
  for (int i = 0; i < block.padded; i += kLanes<A>) {
    V a, b;
    if (labels == Labels::kSoft) {
      a = load(sums.a + i);
      b = load(sums.b + i);
    } else if (labels == Labels::kIndexSmoothed) {
      a = math::index_label_a<V>(smoothing, load(class_weight + i), weight_sum);
      b = math::index_label_b<V>(smoothing, load(class_weight + i), load(label_logit + i) - load(sums.maximum + i),
                                 load(sums.b + i));
    } else {
      a = load(class_weight + i);
      b = a * (load(label_logit + i) - load(sums.maximum + i));
    }
    store(cross_entropy + i, math::cross_entropy<V>(a, b, math::log<V>(load(sums.sum + i))));
  }
}

template <class T>
void fill(SegmentationBlock<T>& block, ComputeType<T>* cross_entropy, ComputeType<T>* class_weight) {
  using A = ComputeType<T>;
  const SegmentationParams& params = block.params;
  if (params.activation == Activation::kSoftmax) return fill_softmax(block, cross_entropy, class_weight);
  block.with_logits([&](const auto* z, int64_t z_stride) {
    const auto run = [&](auto sigmoid, auto soft, auto with_cross_entropy, auto weighted) {
      block.with_labels([&](const auto* y, int64_t y_stride) {
        fill_each<sigmoid(), soft(), with_cross_entropy(), weighted()>(
            block.classes, z, z_stride, static_cast<const A*>(params.pos_weight), y, y_stride, block.count,
            block.pixels, block.work.tile, block.work.stride, cross_entropy);
      });
    };
    const auto with_weights = [&](auto sigmoid, auto with_cross_entropy) {
      block.weighted() ? run(sigmoid, Bool<true>{}, with_cross_entropy, Bool<true>{})
                       : run(sigmoid, Bool<true>{}, with_cross_entropy, Bool<false>{});
    };
    if (params.activation == Activation::kNone) {
      with_weights(Bool<false>{}, Bool<false>{});
    } else if (!params.cross_entropy) {
      with_weights(Bool<true>{}, Bool<false>{});
    } else if (params.soft_labels) {
      with_weights(Bool<true>{}, Bool<true>{});
    } else {
      run(Bool<true>{}, Bool<false>{}, Bool<true>{}, Bool<true>{});
    }
  });
}

// Overlap statistics and squared errors of the tile.
template <class T>
void collect_block(SegmentationBlock<T>& block, ComputeType<T>* squared_error) {
  using A = ComputeType<T>;
  const SegmentationParams& params = block.params;
  const Workspace<A>& work = block.work;
  const int64_t classes = block.classes.count;
  const A* weight = block.classes.weight;
  const auto with_terms = [&](auto run) {
    if (params.squared_error && params.overlap) {
      run(Bool<true>{}, Bool<true>{});
    } else if (params.squared_error) {
      run(Bool<true>{}, Bool<false>{});
    } else if (params.overlap) {
      run(Bool<false>{}, Bool<true>{});
    }
  };
  if (!has_label_tile(params)) {
    with_terms([&](auto squared, auto overlap) {
      collect_labelled<squared(), overlap()>(work.tile, work.stride, block.padded, block.classes, block.pixels,
                                             work.sums, squared_error);
      const auto run = [&](auto weighted) {
        collect_index_labels<A, squared(), overlap(), weighted()>(classes, work.tile, work.stride, block.count, weight,
                                                                  block.pixels, work.sums.predicted, squared_error);
      };
      squared() && weight != nullptr ? run(Bool<squared()>{}) : run(Bool<false>{});
    });
    return;
  }
  block.with_labels([&](const auto* y, int64_t y_stride) {
    with_terms([&](auto squared, auto overlap) {
      const auto run = [&](auto product) {
        collect_soft_labels<A, product(), squared(), overlap()>(
            classes, work.tile, work.stride, y, y_stride, block.count, weight, block.pixels, work.sums, squared_error);
      };
      params.intersection == Intersection::kProduct ? run(Bool<true>{}) : run(Bool<false>{});
    });
  });
}

template <class T>
void collect_plain_block(const SegmentationBlock<T>& block) {
  const SegmentationParams& params = block.params;
  const auto run = [&](auto sigmoid, auto product) {
    block.with_logits([&](const auto* z, int64_t z_stride) {
      block.with_labels([&](const auto* y, int64_t y_stride) {
        collect_plain<sigmoid(), product()>(block.classes, z, z_stride, y, y_stride, block.count, block.work.sums);
      });
    });
  };
  const bool product = params.intersection == Intersection::kProduct;
  if (params.activation == Activation::kSigmoid) {
    product ? run(Bool<true>{}, Bool<true>{}) : run(Bool<true>{}, Bool<false>{});
  } else {
    product ? run(Bool<false>{}, Bool<true>{}) : run(Bool<false>{}, Bool<false>{});
  }
}

// Adds the accumulators of a chunk to its table (3, C) of I, P and T, and empties them.
template <class A>
void flush(const SegmentationParams& params, const OverlapSums<A>& sums, double* table) {
  const int64_t classes = params.classes;
  const bool without_labels = params.squared_error && !has_label_tile(params);  // `predicted`: see collect_labelled
  for (int64_t c = 0; c < classes; ++c) {
    const auto take = [&](A* sum) {
      const double taken = sum_lanes<A>(load(sum + c * kLanes<A>));
      store(sum + c * kLanes<A>, Vector<A>{});
      return taken;
    };
    const double intersection = take(sums.intersection), predicted = take(sums.predicted);
    const double labelled = take(sums.labelled);
    if (table == nullptr) continue;
    table[c] += intersection;
    table[classes + c] += without_labels ? predicted + intersection : predicted;
    table[2 * classes + c] += labelled;
  }
}

template <class T>
SegmentationPartial forward_chunk(const SegmentationParams& params, const Classes<ComputeType<T>>& classes,
                                  const SegmentationChunk& chunk, const Workspace<ComputeType<T>>& work,
                                  double* table) {
  using A = ComputeType<T>;
  using V = Vector<A>;
  SegmentationPartial partial{0.0, 0.0, 0.0, 0.0, -1};
  if (params.overlap) {
    for (int64_t k = 0; k < 3 * params.classes; ++k) table[k] = 0.0;
    flush<A>(params, work.sums, nullptr);
  }
  const bool by_label = params.cross_entropy && params.activation == Activation::kSoftmax && !params.soft_labels;
  const int64_t flushed_every = cross_entropy_chunk_pixels(params.classes);
  int64_t since_flush = 0;
  SegmentationPixels<A> pixels;
  V sum_cross_entropy = {}, sum_label_weight = {}, sum_squared_error = {}, sum_weight = {};
  for (int64_t done = 0; done < chunk.count;) {
    SegmentationBlock<T> block(params, classes, work, chunk, done, pixels);
    if (partial.bad_label < 0) partial.bad_label = block.bad_label;
    alignas(64) A cross_entropy[kBlock<A>], class_weight[kBlock<A>], squared_error[kBlock<A>];
    if (block.plain) {
      collect_plain_block(block);
      partial.pixel_weight += block.count;
    } else {
      fill(block, cross_entropy, class_weight);
      collect_block(block, squared_error);
      for (int i = 0; i < block.padded; i += kLanes<A>) {
        const V m = load(pixels.weight + i);
        sum_weight += m;
        if (params.cross_entropy) {
          const V value = load(cross_entropy + i);
          sum_cross_entropy += m == A(0) ? V{} : m * value;
          if (by_label) sum_label_weight += load(pixels.label_weight + i) * load(class_weight + i);
        }
        if (params.squared_error) {
          const V value = load(squared_error + i);
          const V weighted = m == A(0) ? V{} : m * value;
          sum_squared_error += weighted;
          store(squared_error + i, weighted);
        }
      }
    }
    if (params.squared_error_of_pixels != nullptr) {
      __builtin_memcpy(static_cast<A*>(params.squared_error_of_pixels) + block.flat, squared_error,
                       sizeof(A) * block.count);
    }
    done += block.count;
    since_flush += block.count;
    if (since_flush < flushed_every && done < chunk.count) continue;
    since_flush = 0;
    if (params.overlap) flush<A>(params, work.sums, table);
    partial.cross_entropy += sum_lanes<A>(sum_cross_entropy);
    partial.label_weight += sum_lanes<A>(sum_label_weight);
    partial.squared_error += sum_lanes<A>(sum_squared_error);
    partial.pixel_weight += sum_lanes<A>(sum_weight);
    sum_cross_entropy = sum_label_weight = sum_squared_error = sum_weight = V{};
  }
  return partial;
}

}  // namespace

int64_t segmentation_scratch_bytes(const SegmentationParams& params) {
  return params.input_dtype == DType::kFloat64 ? Workspace<double>::bytes(params.classes)
                                               : Workspace<float>::bytes(params.classes);
}

void segmentation_forward(const SegmentationParams& params, int64_t begin, int64_t end, void* scratch,
                          SegmentationPartial* partials, double* tables) {
  with_input_type(params, scratch, [&](auto* t, const auto& classes, const auto& work) {
    for (int64_t i = begin; i < end; ++i) {
      partials[i] = forward_chunk<Pointee<decltype(t)>>(params, classes, SegmentationChunk(params, i), work,
                                                        tables + i * 3 * params.classes);
    }
  });
}

}  // namespace fusedloss::cpu::FUSEDLOSS_LEVEL
