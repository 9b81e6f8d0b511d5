// Cross-entropy, squared error and overlap statistics of the same probabilities, on the CPU.
//
// Plan. A chunk is a run of pixels of one sample; it goes block by block:
//   forward    1. per pixel: label, weight m
//              2. a class-major tile in the cache: exp(z - m) with its sums, sigmoid(z), or z
//              3. per pixel: cross-entropy;  per class: overlap statistics;  per pixel: squared error
//   backward   1. per pixel: label, m
//              2. softmax: the tile of probabilities, and the sums over the classes that their gradient needs
//              3. per pixel and class: the gradient
// Class-strided logits are read and gradients written where they lie; class-innermost ones pass through the tile, which
// is transposed. Cross-entropy alone has kernels of its own (cross_entropy.cpp), which write the gradient in the
// forward: with an overlap term it is not known there.
#include <type_traits>

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/segmentation_block.h"

namespace fusedloss::cpu::FUSEDLOSS_LEVEL {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Forward

// w_y of each pixel, also of those without a label.
template <class A>
void read_class_weights(const Classes<A>& classes, const SegmentationPixels<A>& pixels, int padded, A* out) {
  if (classes.weight == nullptr) {
    for (int i = 0; i < padded; ++i) out[i] = 1;
  } else {
    for (int i = 0; i < padded; ++i) out[i] = classes.weight[pixels.place[i]];
  }
}

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
  block.with_logits([&](const auto* z, int64_t z_stride) {
    const auto run = [&](auto kind) {
      block.with_labels([&](const auto* y, int64_t y_stride) {
        forward_tile<kind(), true>(classes, z, z_stride, y, y_stride, block.count, sums, tile, stride);
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
  alignas(64) A label_logit[kBlock<A>];
  if (labels != Labels::kSoft) {
    for (int i = 0; i < block.count; ++i) label_logit[i] = block.logit(i, pixels.place[i]) - sums.maximum[i];
    for (int i = block.count; i < block.padded; ++i) label_logit[i] = 0;
    read_class_weights(classes, pixels, block.padded, class_weight);
  }
  const math::Smoothing<V> smoothing{splat<V>(classes.smoothing.label), splat<V>(classes.smoothing.every)};
  const V weight_sum = splat<V>(static_cast<A>(params.weight_sum));
  for (int i = 0; i < block.padded; i += kLanes<A>) {
    V a, b;
    if (labels == Labels::kSoft) {
      a = load(sums.a + i);
      b = load(sums.b + i);
    } else if (labels == Labels::kIndexSmoothed) {
      a = math::index_label_a<V>(smoothing, load(class_weight + i), weight_sum);
      b = math::index_label_b<V>(smoothing, load(class_weight + i), load(label_logit + i), load(sums.b + i));
    } else {
      a = load(class_weight + i);
      b = a * load(label_logit + i);
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

// I and T of a class, side by side so that both are added at once.
typedef double Pair __attribute__((vector_size(16), may_alias));

// Overlap statistics and squared errors of the tile.
template <class T>
void collect_block(SegmentationBlock<T>& block, ComputeType<T>* squared_error) {
  using A = ComputeType<T>;
  const SegmentationParams& params = block.params;
  const Workspace<A>& work = block.work;
  const bool soft = has_label_tile(params);
  const auto run = [&](auto is_soft, auto product, auto squared, auto overlap) {
    block.with_labels([&](const auto* y, int64_t y_stride) {
      collect<A, is_soft(), product(), squared(), overlap()>(block.classes.count, work.tile, work.stride, y, y_stride,
                                                             block.count, block.classes.weight, block.pixels, work.sums,
                                                             squared_error);
    });
  };
  const auto with_terms = [&](auto is_soft, auto product) {
    if (params.squared_error && params.overlap) {
      run(is_soft, product, Bool<true>{}, Bool<true>{});
    } else if (params.squared_error) {
      run(is_soft, product, Bool<true>{}, Bool<false>{});
    } else if (params.overlap) {
      run(is_soft, product, Bool<false>{}, Bool<true>{});
    }
  };
  if (!soft) {
    with_terms(Bool<false>{}, Bool<false>{});
  } else if (params.intersection == Intersection::kProduct) {
    with_terms(Bool<true>{}, Bool<true>{});
  } else {
    with_terms(Bool<true>{}, Bool<false>{});
  }
  if (soft || !params.overlap) return;
  // Class indices touch one class of a pixel.
  const int64_t classes = block.classes.count;
  const SegmentationPixels<A>& pixels = block.pixels;
  const auto add = [&](int i, Pair* part) {
    const int64_t c = pixels.place[i];
    const A m = pixels.label_weight[i];
    const A p = work.tile[c * work.stride + i] * pixels.inverse_sum[i];
    part[c] += Pair{static_cast<double>(m * p), static_cast<double>(m)};
  };
  Pair* parts = reinterpret_cast<Pair*>(work.of_labels);
  for (int i = 0; i < block.padded; i += 4) {  // vectors have 2, 4 or more lanes; see zero_tail for what is past them
    add(i, parts);
    add(i + 1, parts + classes);
    if (kLanes<A> == 2 && i + 2 >= block.padded) break;
    add(i + 2, parts + 2 * classes);
    add(i + 3, parts + 3 * classes);
  }
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
void flush(const SegmentationParams& params, const Workspace<A>& work, double* table) {
  const int64_t classes = params.classes;
  const auto empty = [&](A* sums, double* into) {
    for (int64_t c = 0; c < classes; ++c) {
      if (into != nullptr) into[c] += sum_lanes<A>(load(sums + c * kLanes<A>));
      store(sums + c * kLanes<A>, Vector<A>{});
    }
  };
  const bool soft = has_label_tile(params);
  empty(work.sums.predicted, table == nullptr ? nullptr : table + classes);
  if (soft) {
    empty(work.sums.intersection, table);
    empty(work.sums.labelled, table == nullptr ? nullptr : table + 2 * classes);
    return;
  }
  for (int64_t c = 0; c < classes; ++c) {
    for (int part = 0; part < 4; ++part) {
      double* sums = work.of_labels + (part * classes + c) * 2;
      if (table != nullptr) {
        table[c] += sums[0];
        table[2 * classes + c] += sums[1];
      }
      sums[0] = sums[1] = 0.0;
    }
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
    flush<A>(params, work, nullptr);
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
    if (params.overlap) flush<A>(params, work, table);
    partial.cross_entropy += sum_lanes<A>(sum_cross_entropy);
    partial.label_weight += sum_lanes<A>(sum_label_weight);
    partial.squared_error += sum_lanes<A>(sum_squared_error);
    partial.pixel_weight += sum_lanes<A>(sum_weight);
    sum_cross_entropy = sum_label_weight = sum_squared_error = sum_weight = V{};
  }
  return partial;
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward

template <class T>
bool streams(const SegmentationParams& params) {
  const int64_t bytes = params.samples * params.classes * params.pixels * static_cast<int64_t>(sizeof(T));
  const bool rows_aligned = params.classes == 1 || params.input_layout.pixel_stride != 1 ||
                            params.gradient_layout.class_stride * static_cast<int64_t>(sizeof(T)) % kVectorBytes == 0;
  return kCanStream && bytes >= kStreamingBytes && rows_aligned;
}

// The tile as rows of the gradient. Where it is streamed, by way of the label tile, which is done with by now.
template <class T>
void write_rows(const SegmentationBlock<T>& block, T* gradient, bool stream) {
  using A = ComputeType<T>;
  const Workspace<A>& work = block.work;
  const int64_t row_stride = block.params.gradient_layout.pixel_stride;
  const int classes = block.classes.count;
  const int stride = static_cast<int>(work.stride);
  if (!stream || row_stride != classes || !streaming_aligned(gradient)) {
    tile_to_rows(work.tile, stride, block.count, classes, gradient, row_stride);
    return;
  }
  T* rows = reinterpret_cast<T*>(work.labels);
  tile_to_rows(work.tile, stride, block.count, classes, rows, classes);
  stream_copy(gradient, rows, block.count * classes);
}

// Calls write(streams, gradient, stride from class to class) for where a block's gradient is computed to: memory, or
// the tile, which then goes there.
template <class T, class Write>
void write_block(const SegmentationBlock<T>& block, bool stream, Write write) {
  const LogitLayout& layout = block.params.gradient_layout;
  T* gradient = static_cast<T*>(block.params.gradient) + offset_of(layout, block.sample, block.pixel);
  if (block.transposed()) {
    write(Bool<false>{}, block.work.tile, block.work.stride);
    write_rows(block, gradient, stream);
  } else if (stream && streaming_aligned(gradient)) {
    write(Bool<kCanStream>{}, gradient, layout.class_stride);
  } else {
    write(Bool<false>{}, gradient, layout.class_stride);
  }
}

template <class T>
void backward_softmax(SegmentationBlock<T>& block, const ClassGradients<ComputeType<T>>& gradients, bool stream) {
  using A = ComputeType<T>;
  const SegmentationParams& params = block.params;
  const Classes<A>& classes = block.classes;
  const Workspace<A>& work = block.work;
  SegmentationPixels<A>& pixels = block.pixels;
  const A* maximum = static_cast<const A*>(params.maximum) + block.flat;
  const A* sum = static_cast<const A*>(params.sum) + block.flat;
  prefetch(maximum + block.count, block.count * static_cast<int64_t>(sizeof(A)));
  prefetch(sum + block.count, block.count * static_cast<int64_t>(sizeof(A)));
  for (int i = 0; i < block.padded; ++i) {
    const bool inside = i < block.count;
    pixels.maximum[i] = inside ? maximum[i] : A(0);
    pixels.inverse_sum[i] = pixels.weight[i] == A(0) ? A(0) : A(1) / sum[i];
  }
  const bool full = params.squared_error || (params.cross_entropy && params.label_smoothing != 0.0);
  const bool product = params.intersection == Intersection::kProduct;
  const auto with_kind = [&](auto visit) {
    if (params.soft_labels) {
      product ? visit(Bool<true>{}, Bool<true>{}, Bool<false>{}) : visit(Bool<true>{}, Bool<false>{}, Bool<false>{});
    } else {
      full ? visit(Bool<false>{}, Bool<false>{}, Bool<true>{}) : visit(Bool<false>{}, Bool<false>{}, Bool<false>{});
    }
  };

  alignas(64) A dot[kBlock<A>], square[kBlock<A>];
  with_kind([&](auto soft, auto is_product, auto is_full) {
    block.with_logits([&](const auto* z, int64_t z_stride) {
      block.with_labels([&](const auto* y, int64_t y_stride) {
        probabilities<soft(), is_product(), is_full()>(classes, z, z_stride, y, y_stride, block.count, pixels,
                                                       gradients, work.tile, work.stride, dot, square);
      });
    });
  });

  const A g = static_cast<A>(params.cross_entropy ? params.cross_entropy_scale : 0.0);
  if (params.soft_labels) {
    for (int i = 0; i < block.padded; ++i) {
      const math::SoftmaxTerms<A> terms = math::soft_label_terms<A>(g, square[i], dot[i]);
      pixels.common[i] = terms.common;
      pixels.smoothed[i] = terms.smoothed;
    }
  } else {
    alignas(64) A class_weight[kBlock<A>], of_label[kBlock<A>];
    read_class_weights(classes, pixels, block.padded, class_weight);
    for (int i = 0; i < block.padded; ++i) {
      const int64_t c = pixels.place[i];
      of_label[i] = math::labelled_share<A>(work.tile[c * work.stride + i], gradients.d_intersection[c],
                                            pixels.squared_error_scale[i], class_weight[i]);
    }
    // Without smoothing a = w: (1 - 0) w + 0 times anything finite.
    const A weight_sum = static_cast<A>(params.weight_sum);
    for (int i = 0; i < block.padded; ++i) {
      const math::SoftmaxTerms<A> terms =
          math::index_label_terms<A>(classes.smoothing, pixels.weight[i], g, class_weight[i], weight_sum,
                                     dot[i] + pixels.squared_error_scale[i] * square[i], of_label[i]);
      pixels.common[i] = terms.common;
      pixels.labelled[i] = terms.labelled;
      pixels.smoothed[i] = terms.smoothed;
    }
  }
  write_block(block, stream, [&](auto streamed, auto* gradient, int64_t gradient_stride) {
    with_kind([&](auto soft, auto is_product, auto is_full) {
      block.with_labels([&](const auto* y, int64_t y_stride) {
        softmax_gradient<soft(), is_product(), is_full(), streamed()>(
            classes, work.tile, work.stride, y, y_stride, block.count, pixels, gradients, gradient, gradient_stride);
      });
    });
  });
}

template <class T>
void backward_each(SegmentationBlock<T>& block, const ClassGradients<ComputeType<T>>& gradients, bool stream) {
  using A = ComputeType<T>;
  const SegmentationParams& params = block.params;
  const A g =
      static_cast<A>(params.cross_entropy ? params.cross_entropy_scale / static_cast<double>(params.classes) : 0.0);
  const bool full = params.squared_error || params.cross_entropy;
  if (full) {
    for (int i = 0; i < block.padded; ++i) block.pixels.smoothed[i] = g;
  }
  const bool product = params.intersection == Intersection::kProduct;
  block.with_logits([&](const auto* z, int64_t z_stride) {
    write_block(block, stream, [&](auto streamed, auto* gradient, int64_t gradient_stride) {
      const auto run = [&](auto sigmoid, auto soft, auto is_product, auto weighted) {
        const auto with_terms = [&](auto full) {
          block.with_labels([&](const auto* y, int64_t y_stride) {
            gradient_of_each<sigmoid(), soft(), is_product(), full(), weighted(), streamed()>(
                block.classes, z, z_stride, static_cast<const A*>(params.pos_weight), y, y_stride, block.count,
                block.pixels, gradients, gradient, gradient_stride);
          });
        };
        full ? with_terms(Bool<true>{}) : with_terms(Bool<false>{});
      };
      const auto with_weights = [&](auto sigmoid, auto is_product) {
        block.weighted() ? run(sigmoid, Bool<true>{}, is_product, Bool<true>{})
                         : run(sigmoid, Bool<true>{}, is_product, Bool<false>{});
      };
      if (params.activation == Activation::kNone) {
        product ? with_weights(Bool<false>{}, Bool<true>{}) : with_weights(Bool<false>{}, Bool<false>{});
      } else if (!params.soft_labels) {
        run(Bool<true>{}, Bool<false>{}, Bool<true>{}, Bool<true>{});
      } else {
        product ? with_weights(Bool<true>{}, Bool<true>{}) : with_weights(Bool<true>{}, Bool<false>{});
      }
    });
  });
}

template <class A>
ClassGradients<A> gradients_of(const SegmentationParams& params, const SegmentationChunk& chunk) {
  const auto row = [&](const void* table) { return static_cast<const A*>(table) + chunk.group * params.classes; };
  return {row(params.d_intersection), row(params.d_predicted), row(params.d_labelled)};
}

// Incoming gradient of the squared error of `count` pixels, 0 past them.
template <class A>
void read_squared_error_scale(const SegmentationParams& params, int64_t flat, int count, int padded, A* out) {
  const A scale = static_cast<A>(params.squared_error ? params.squared_error_scale : 0.0);
  const A* each = static_cast<const A*>(params.gradient_of_squared_error);
  for (int i = 0; i < padded; ++i) out[i] = i >= count ? A(0) : each == nullptr ? scale : scale * each[flat + i];
}

template <class T>
void backward_chunk(const SegmentationParams& params, const Classes<ComputeType<T>>& classes,
                    const SegmentationChunk& chunk, const Workspace<ComputeType<T>>& work, bool stream) {
  using A = ComputeType<T>;
  const ClassGradients<A> gradients = gradients_of<A>(params, chunk);
  SegmentationPixels<A> pixels;
  for (int64_t done = 0; done < chunk.count;) {
    SegmentationBlock<T> block(params, classes, work, chunk, done, pixels);
    if (!block.plain && (params.gradient_of_squared_error != nullptr || pixels.scales_filled != block.count)) {
      A* scale = pixels.squared_error_scale;
      read_squared_error_scale<A>(params, block.flat, block.count, block.padded, scale);
      for (int i = 0; i < block.padded; ++i) scale[i] *= A(2);
      pixels.scales_filled = block.count;
    }
    if (params.activation == Activation::kSoftmax) {
      backward_softmax(block, gradients, stream);
    } else {
      backward_each(block, gradients, stream);
    }
    done += block.count;
  }
  if (stream) streaming_fence();
}

// Gradient of the soft labels. Plain loops: it is asked for rarely, and by label models that cost far more.
template <class T>
void label_backward_chunk(const SegmentationParams& params, const Classes<ComputeType<T>>& classes,
                          const SegmentationChunk& chunk, const Workspace<ComputeType<T>>& work) {
  using A = ComputeType<T>;
  const ClassGradients<A> gradients = gradients_of<A>(params, chunk);
  const A g = static_cast<A>(params.cross_entropy ? params.cross_entropy_scale : 0.0);
  const bool product = params.intersection == Intersection::kProduct;
  SegmentationPixels<A> pixels;
  for (int64_t done = 0; done < chunk.count;) {
    SegmentationBlock<T> block(params, classes, work, chunk, done, pixels, /*may_be_plain=*/false);
    alignas(64) A squared_error_scale[kBlock<A>];
    read_squared_error_scale<A>(params, block.flat, block.count, block.count, squared_error_scale);
    const A* maximum = static_cast<const A*>(params.maximum) + block.flat;
    const A* sum = static_cast<const A*>(params.sum) + block.flat;
    const auto one = [&](int i, int64_t c) {
      const A m = block.pixels.weight[i];
      if (m == A(0)) return A(0);
      const A z = block.logit(i, c);
      const A y = block.label(i, c);
      const A w = classes.weight_of(c);
      A p = z, of_cross_entropy = 0;
      if (params.activation == Activation::kSoftmax) {
        p = math::exp_shifted<A>(z, maximum[i]) / sum[i];
        if (g != A(0)) {
          of_cross_entropy = math::cross_entropy_label_gradient<A>(g, classes.smoothing.label * w, z, maximum[i],
                                                                   math::log<A>(sum[i]));
        }
      } else if (params.activation == Activation::kSigmoid) {
        const math::Sigmoid<A> s = math::sigmoid_with_log<A>(z);
        const A pos_weight = params.pos_weight == nullptr ? A(1) : static_cast<const A*>(params.pos_weight)[c];
        p = s.probability;
        if (g != A(0)) {
          of_cross_entropy = g / static_cast<A>(classes.count) * w * classes.smoothing.label *
                             math::binary_cross_entropy_label_gradient<A>(s, z, pos_weight);
        }
      }
      const A share = product ? p : math::minimum_intersection_derivative<A>(y, p);
      const A scale = A(2) * squared_error_scale[i] * w;
      const A square = scale == A(0) ? A(0) : math::squared_error_gradient<A>(scale, y, p);
      return m * (gradients.d_intersection[c] * share + gradients.d_labelled[c] + square + of_cross_entropy);
    };
    with_floating_type(params.target_dtype, [&](auto* type) {
      using Y = Pointee<decltype(type)>;
      const LogitLayout& layout = params.gradient_layout;
      Y* gradient = static_cast<Y*>(params.gradient) + offset_of(layout, block.sample, block.pixel);
      for (int64_t c = 0; c < params.classes; ++c) {
        for (int i = 0; i < block.count; ++i) {
          store_one(gradient + i * layout.pixel_stride + c * layout.class_stride,
                    static_cast<ComputeType<Y>>(one(i, c)));
        }
      }
    });
    done += block.count;
  }
}

// Calls f(T*, classes, workspace) with the element type of the logits.
template <class F>
void with_input_type(const SegmentationParams& params, void* scratch, F f) {
  with_floating_type(params.input_dtype, [&](auto* t) {
    using A = ComputeType<Pointee<decltype(t)>>;
    f(t, classes_of<A>(params), Workspace<A>(scratch, params.classes));
  });
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

void segmentation_backward(const SegmentationParams& params, int64_t begin, int64_t end, void* scratch) {
  with_input_type(params, scratch, [&](auto* t, const auto& classes, const auto& work) {
    using T = Pointee<decltype(t)>;
    const bool stream = streams<T>(params);
    for (int64_t i = begin; i < end; ++i) {
      backward_chunk<T>(params, classes, SegmentationChunk(params, i), work, stream);
    }
  });
}

void segmentation_label_backward(const SegmentationParams& params, int64_t begin, int64_t end, void* scratch) {
  with_input_type(params, scratch, [&](auto* t, const auto& classes, const auto& work) {
    for (int64_t i = begin; i < end; ++i) {
      label_backward_chunk<Pointee<decltype(t)>>(params, classes, SegmentationChunk(params, i), work);
    }
  });
}

}  // namespace fusedloss::cpu::FUSEDLOSS_LEVEL
