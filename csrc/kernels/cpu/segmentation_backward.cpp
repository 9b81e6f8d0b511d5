// The gradients of segmentation_forward.cpp's terms, all in one visit.
//
// Plan, by block as in the forward:
//   1. per pixel: label, m
//   2. softmax: a tile of exponentials or probabilities, and the sums over the classes that their gradient needs
//   3. per pixel and class: the gradient
// Written class by class, or transposed on its way to class-innermost memory.
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/segmentation_backward_tile.h"
#include "kernels/cpu/segmentation_block.h"

namespace fusedloss::cpu::FUSEDLOSS_LEVEL {
namespace {

template <class T>
bool streams(const SegmentationParams& params) {
  const int64_t bytes = params.samples * params.classes * params.pixels * static_cast<int64_t>(sizeof(T));
  const bool rows_aligned = params.classes == 1 || params.input_layout.pixel_stride != 1 ||
                            params.gradient_layout.class_stride * static_cast<int64_t>(sizeof(T)) % kVectorBytes == 0;
  return kCanStream && bytes >= kStreamingBytes && rows_aligned;
}

// Where a block's gradient goes.
template <class T>
T* gradient_of(const SegmentationBlock<T>& block) {
  return static_cast<T*>(block.params.gradient) + offset_of(block.params.gradient_layout, block.sample, block.pixel);
}

template <class T>
Rows<T> rows_of(const SegmentationBlock<T>& block, bool stream, Outgoing<T>* outgoing) {
  const auto& work = block.work;
  return {gradient_of(block),
          block.params.gradient_layout.pixel_stride,
          stream,
          reinterpret_cast<T*>(work.rows),
          work.tile,
          work.stride,
          outgoing};
}

// make: as in write_gradient.h. kFinite: no NaN goes in, so that write_gradient() may be kPlain.
template <bool kFinite, class T, class Make>
void write_block(const SegmentationBlock<T>& block, bool stream, Outgoing<T>& outgoing, Make make) {
  T* const gradient = gradient_of(block);
  const int64_t class_stride = block.params.gradient_layout.class_stride;
  if (block.transposed()) {
    gradient_to_rows(make, block.count, block.classes.count, rows_of(block, stream, &outgoing));
  } else if (stream && streaming_aligned(gradient)) {
    gradient_to_classes<kCanStream, kFinite>(make, block.count, block.classes.count, gradient, class_stride);
  } else {
    gradient_to_classes<false, kFinite>(make, block.count, block.classes.count, gradient, class_stride);
  }
}

// Softmax; g: incoming gradient of the cross-entropy. outgoing: the gradient of the block before, then of this one.
template <class T>
void backward_soft_labels(SegmentationBlock<T>& block, const ClassGradients<ComputeType<T>>& gradients,
                          ComputeType<T> g, bool stream, Outgoing<T>& outgoing) {
  using A = ComputeType<T>;
  const Classes<A>& classes = block.classes;
  const Workspace<A>& work = block.work;
  SegmentationPixels<A>& pixels = block.pixels;
  const auto with_labels = [&](auto run) {
    block.with_labels([&](const auto* y, int64_t y_stride) {
      block.params.intersection == Intersection::kProduct ? run(Bool<true>{}, y, y_stride)
                                                          : run(Bool<false>{}, y, y_stride);
    });
  };
  alignas(64) A dot[kBlock<A>], square[kBlock<A>];
  block.with_logits([&](const auto* z, int64_t z_stride) {
    with_labels([&](auto product, const auto* y, int64_t y_stride) {
      probabilities<product()>(classes, z, z_stride, y, y_stride, block.count, pixels, gradients, work.tile,
                               work.stride, dot, square, block.ahead(), outgoing);
    });
  });
  outgoing = {};
  for (int i = 0; i < block.padded; ++i) {
    const math::SoftmaxTerms<A> terms = math::soft_label_terms<A>(g, square[i], dot[i]);
    pixels.common[i] = terms.common;
    pixels.smoothed[i] = terms.smoothed;
  }
  with_labels([&](auto product, const auto* y, int64_t y_stride) {
    write_block<false>(block, stream, outgoing,
                       soft_label_gradient<product()>(classes, static_cast<const A*>(work.tile), work.stride, y,
                                                      y_stride, pixels, gradients));
  });
}

// Likewise.
template <class T>
void backward_index_labels(SegmentationBlock<T>& block, const ClassGradients<ComputeType<T>>& gradients,
                           ComputeType<T> g, bool stream, Outgoing<T>& outgoing) {
  using A = ComputeType<T>;
  using V = Vector<A>;
  const SegmentationParams& params = block.params;
  const Classes<A>& classes = block.classes;
  const Workspace<A>& work = block.work;
  SegmentationPixels<A>& pixels = block.pixels;
  const bool smoothed = params.cross_entropy && params.label_smoothing != 0.0;
  const auto with_terms = [&](auto run) {
    if (smoothed || (params.squared_error && classes.weight != nullptr)) {
      run(std::integral_constant<IndexTerms, IndexTerms::kAll>{});
    } else if (params.squared_error) {
      run(std::integral_constant<IndexTerms, IndexTerms::kSquared>{});
    } else {
      run(std::integral_constant<IndexTerms, IndexTerms::kNone>{});
    }
  };
  alignas(64) A dot[kBlock<A>], square[kBlock<A>], class_weight[kBlock<A>];
  block.with_logits([&](const auto* z, int64_t z_stride) {
    with_terms([&](auto terms) {
      exponentials<terms()>(classes, z, z_stride, block.count, pixels, gradients, work.tile, work.stride, dot, square,
                            block.ahead(), outgoing);
    });
  });
  outgoing = {};
  read_class_weights(classes, pixels, block.padded, class_weight);
  // Without smoothing a = w: (1 - 0) w + 0 times anything finite.
  const math::Smoothing<V> smoothing{splat<V>(classes.smoothing.label), splat<V>(classes.smoothing.every)};
  const V weight_sum = splat<V>(static_cast<A>(params.weight_sum));
  V zero = {};  // NaN after a number that is not finite
  for (int i = 0; i < block.padded; i += kLanes<A>) {
    const V inverse_sum = load(pixels.inverse_sum + i), s = load(pixels.squared_error_scale + i);
    const V w = load(class_weight + i);
    const V share = of_labels<A>(pixels.place + i, [&](int64_t c) {
      const V p = load(work.tile + c * work.stride + i) * inverse_sum;
      return math::labelled_share<V>(p, splat<V>(gradients.d_intersection[c]), s, w);
    });
    const V sum = inverse_sum * (load(dot + i) + s * inverse_sum * load(square + i));
    const math::SoftmaxTerms<V> terms =
        math::index_label_terms<V>(smoothing, load(pixels.weight + i), splat<V>(g), w, weight_sum, sum, share);
    store(pixels.common + i, terms.common);
    store(pixels.labelled + i, terms.labelled);
    store(pixels.smoothed + i, terms.smoothed);
    // The sums over the classes are not finite where an exponential or a class's number is not.
    zero += A(0) * (load(dot + i) + load(square + i) + s + w + terms.common + terms.labelled + terms.smoothed);
  }
  const bool finite = sum_lanes<A>(zero) == 0.0;
  with_terms([&](auto terms) {
    const auto write = [&](auto is_finite) {
      write_block<is_finite()>(block, stream, outgoing,
                               index_label_gradient<terms(), is_finite()>(classes, static_cast<const A*>(work.tile),
                                                                          work.stride, pixels, gradients));
    };
    finite ? write(Bool<true>{}) : write(Bool<false>{});
  });
}

template <class T>
void backward_softmax(SegmentationBlock<T>& block, const ClassGradients<ComputeType<T>>& gradients, bool stream,
                      Outgoing<T>& outgoing) {
  using A = ComputeType<T>;
  const SegmentationParams& params = block.params;
  SegmentationPixels<A>& pixels = block.pixels;
  const A* maximum = static_cast<const A*>(params.maximum) + block.flat;
  const A* sum = static_cast<const A*>(params.sum) + block.flat;
  ask_ahead(maximum, block.count);
  ask_ahead(sum, block.count);
  for (int i = 0; i < block.padded; ++i) {
    const bool inside = i < block.count;
    pixels.maximum[i] = inside ? maximum[i] : A(0);
    pixels.inverse_sum[i] = pixels.weight[i] == A(0) ? A(0) : A(1) / sum[i];
  }
  const A g = static_cast<A>(params.cross_entropy ? params.cross_entropy_scale : 0.0);
  outgoing.send_before(block.count);
  if (params.soft_labels) {
    backward_soft_labels(block, gradients, g, stream, outgoing);
  } else {
    backward_index_labels(block, gradients, g, stream, outgoing);
  }
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
    const auto write = [&](auto streamed, auto* gradient, int64_t gradient_stride) {
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
    };
    T* const gradient = gradient_of(block);
    const int64_t class_stride = params.gradient_layout.class_stride;
    if (block.transposed()) {
      write(Bool<false>{}, block.work.tile, block.work.stride);
      tile_to_rows(block.count, block.classes.count, rows_of<T>(block, stream, nullptr));
    } else if (stream && streaming_aligned(gradient)) {
      write(Bool<kCanStream>{}, gradient, class_stride);
    } else {
      write(Bool<false>{}, gradient, class_stride);
    }
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
  Outgoing<T> outgoing;
  for (int64_t done = 0; done < chunk.count;) {
    SegmentationBlock<T> block(params, classes, work, chunk, done, pixels);
    if (!block.plain && (params.gradient_of_squared_error != nullptr || pixels.scales_filled != block.count)) {
      A* scale = pixels.squared_error_scale;
      read_squared_error_scale<A>(params, block.flat, block.count, block.padded, scale);
      for (int i = 0; i < block.padded; ++i) scale[i] *= A(2);
      pixels.scales_filled = block.count;
    }
    if (params.activation == Activation::kSoftmax) {
      backward_softmax(block, gradients, stream, outgoing);
    } else {
      backward_each(block, gradients, stream);
    }
    done += block.count;
  }
  outgoing.send_before(0);
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

}  // namespace

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
