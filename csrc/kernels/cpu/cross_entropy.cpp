// Cross-entropy on the CPU.
//
// Plan. A chunk is a run of pixels of one sample; it goes block by block (kBlock pixels):
//   forward    1. per pixel, over the classes: maximum m, then S = sum exp(z - m) and the sums its labels need
//              2. per pixel: log S, the labelled logit, the loss
//              3. where the gradient is wanted at once: the two steps below, on exponentials that step 1 kept in the
//              cache
//   backward   1. per pixel: label, incoming gradient
//              2. per pixel and class: p = exp(z - m) / S, gradient
// The visits over the classes differ by memory layout (Visit); everything per pixel is shared.
#include <type_traits>

#include "kernels/cpu/convert.h"
#include "kernels/cpu/cross_entropy_row.h"
#include "kernels/cpu/cross_entropy_tile.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/write_gradient.h"

namespace fusedloss::cpu::FUSEDLOSS_LEVEL {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Which way through memory

enum class Visit {
  kStrided,     // class-strided: the memory is class-major already
  kTransposed,  // class-innermost, few classes: turned into a class-major tile in the cache first
  kRows,        // class-innermost, many classes: vectors along the classes
};

inline Visit choose_visit(const CrossEntropyParams& params) {
  if (params.input_layout.pixel_stride == 1) return Visit::kStrided;
  return params.classes <= kCrossEntropyTileClasses ? Visit::kTransposed : Visit::kRows;
}

// Whether the visit reads soft labels where they lie. If not, they pass through a tile as the logits of kTransposed do.
inline bool labels_in_place(const CrossEntropyParams& params, Visit visit) {
  return visit == Visit::kRows || (visit == Visit::kStrided && params.target_layout.pixel_stride == 1);
}

// Numbers in a class-major tile.
template <class A>
int64_t tile_size(int64_t classes) {
  return classes * kTileStride<A>;
}

// Tiles of the caller's: on the stack they would not fit a small thread's.
int tiles_in(Visit visit, const CrossEntropyParams& params) {
  const int labels = params.soft_labels && !labels_in_place(params, visit) ? 1 : 0;
  if (visit == Visit::kTransposed) return 2 + labels;
  return visit == Visit::kStrided && params.classes <= kCrossEntropyTileClasses ? 1 + labels : 0;
}

inline int64_t offset_of(const LogitLayout& layout, int64_t sample, int64_t pixel) {
  return sample * layout.sample_stride + pixel * layout.pixel_stride;
}

// ---------------------------------------------------------------------------------------------------------------------
// Chunks

// The pixels [first, first + count) of a sample.
struct Chunk {
  int64_t sample;
  int64_t first;
  int64_t count;

  Chunk(const CrossEntropyParams& params, int64_t index) {
    const int64_t size = cross_entropy_chunk_pixels(params.classes);
    const int64_t per_sample = cross_entropy_chunks_per_sample(params.classes, params.pixels);
    sample = index / per_sample;
    first = index % per_sample * size;
    count = params.pixels - first < size ? params.pixels - first : size;
  }
};

template <class A>
Classes<A> classes_of(const CrossEntropyParams& params) {
  const A smoothing = static_cast<A>(params.label_smoothing);
  return {static_cast<int>(params.classes),
          static_cast<const A*>(params.weight),
          {static_cast<A>(1.0 - params.label_smoothing), smoothing / static_cast<A>(params.classes)}};
}

// ---------------------------------------------------------------------------------------------------------------------
// A block of pixels

// Pixels visited before the next visit to the same ones: few enough that their logits stay in the L2 cache.
template <class A>
int block_pixels(const CrossEntropyParams& params, Visit visit) {
  constexpr int64_t kCachedBytes = 128 << 10;
  const int64_t fit = kCachedBytes / (params.classes * static_cast<int64_t>(sizeof(A)));
  if (fit >= kBlock<A>) return kBlock<A>;
  if (visit == Visit::kRows) return fit > 1 ? static_cast<int>(fit) : 1;
  // Less than this of each class row is not worth the row's own cache and page table misses.
  constexpr int64_t least = kBlock<A> / 2;
  return static_cast<int>(fit > least ? fit / least * least : least);
}

// Pixels up to the end of the last vector: those past `count` count as ignored.
template <class A>
int padded(int count) {
  return (count + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

// The labels of a block, and the weight of each: 0 where it is ignored.
template <class A>
struct alignas(64) BlockLabels {
  math::Bits<A> label[kBlock<A>];  // class, or -1
  math::Bits<A> place[kBlock<A>];  // class, or 0: a class that may be read without asking
  A weight[kBlock<A>];
  int64_t bad;  // position of the first label that is neither ignored nor a class, or -1

  void read(const CrossEntropyParams& params, const Classes<A>& classes, int64_t flat, int count) {
    bad = read_labels(params.target, params.target_dtype, flat, count, params.ignore_index, params.classes, label);
    for (int i = count; i < padded<A>(count); ++i) label[i] = -1;
    for (int i = 0; i < padded<A>(count); ++i) {
      place[i] = label[i] < 0 ? math::Bits<A>(0) : label[i];
      weight[i] = label[i] < 0 ? A(0) : A(1);
    }
    if (classes.weight == nullptr) return;  // a look-up in the loop above would keep it from going by vectors
    for (int i = 0; i < count; ++i) weight[i] = label[i] < 0 ? A(0) : classes.weight[label[i]];
  }
};

// Some pixels of one sample, and the way through memory to them.
template <Labels kLabels, class T, class Y>
class Block {
 public:
  using A = ComputeType<T>;

  const int count;     // at most kBlock
  const int64_t flat;  // position of the first pixel in (N, S)

  Block(const CrossEntropyParams& params, Visit visit, const Classes<A>& classes, const Chunk& chunk, int64_t done,
        int most, void* scratch)
      : count(static_cast<int>(chunk.count - done < most ? chunk.count - done : most)),
        flat(chunk.sample * params.pixels + chunk.first + done),
        params_(params),
        visit_(visit),
        classes_(classes),
        sample_(chunk.sample),
        pixel_(chunk.first + done),
        z_(static_cast<const T*>(params.input) + offset_of(params.input_layout, sample_, pixel_)),
        z_tile_(static_cast<A*>(scratch)),
        rows_(visit == Visit::kTransposed ? z_tile_ + tile_size<A>(classes.count) : nullptr),
        y_tile_(kLabels == Labels::kSoft && !labels_in_place(params, visit)
                    ? z_tile_ + (tiles_in(visit, params) - 1) * tile_size<A>(classes.count)
                    : nullptr) {
    const int64_t left = params.pixels - pixel_;
    if (visit == Visit::kTransposed) {
      rows_to_tile(z_, params.input_layout.pixel_stride, count, left, classes.count, z_tile_, kTileStride<A>);
    }
    if constexpr (kLabels == Labels::kSoft) {
      y_ = static_cast<const Y*>(params.target) + offset_of(params.target_layout, sample_, pixel_);
      if (y_tile_ != nullptr) {
        pixels_to_tile(y_, params.target_layout, count, left, classes.count, y_tile_, kTileStride<A>);
      }
    }
  }

  // The logit of each pixel's label; of a pixel without one whatever comes out. Before forward(), for the tile may hold
  // the logits.
  void labelled_logits(const BlockLabels<A>& labels, A* out) const {
    const auto take = [&](const auto* z, int64_t stride) {
      for_vectors<A, 1>(count, [&](auto, auto partial, int i, int left) {
        const auto read = [&](int64_t c) {
          const auto* row = z + c * stride + i;
          return partial() ? load_partial(row, left, A(0)) : load(row);
        };
        store(out + i, of_labels<A>(labels.place + i, read));
      });
    };
    switch (visit_) {
      case Visit::kStrided:
        return take(z_, params_.input_layout.class_stride);
      case Visit::kTransposed:
        return take(static_cast<const A*>(z_tile_), kTileStride<A>);
      case Visit::kRows:
        for (int i = 0; i < count; ++i) out[i] = load_one(row(i) + labels.place[i]);
    }
  }

  // The sums over the classes. keep: backward() follows at once, and may find the exponentials in the tile.
  // outgoing: the gradient of the block before, which is gone when this returns.
  void forward(BlockSums<A>& sums, bool keep, Outgoing<T>& outgoing) {
    outgoing.send_before(count);
    const int64_t z_stride = params_.input_layout.class_stride;
    A* tile = z_tile_;
    const Ahead<T> ahead{z_, params_.input_layout, count};
    switch (visit_) {
      case Visit::kStrided: {
        kept_ = keep && classes_.count <= kCrossEntropyTileClasses;
        with_labels([&](const auto* y, int64_t y_stride) {
          if (kept_) {
            forward_tile<kLabels, true>(classes_, z_, z_stride, y, y_stride, count, sums, tile, kTileStride<A>, ahead,
                                        outgoing);
          } else {
            forward_tile<kLabels, false>(classes_, z_, z_stride, y, y_stride, count, sums, tile, kTileStride<A>, ahead,
                                         outgoing);
          }
        });
        break;
      }
      case Visit::kTransposed:
        kept_ = true;
        if constexpr (kLabels == Labels::kSoft) {
          forward_tile<kLabels, true>(classes_, tile, kTileStride<A>, y_tile_, kTileStride<A>, count, sums, tile,
                                      kTileStride<A>, ahead, outgoing);
        } else {
          forward_tile<kLabels, true>(classes_, tile, kTileStride<A>, y_, 0, count, sums, tile, kTileStride<A>, ahead,
                                      outgoing);
        }
        break;
      case Visit::kRows:
        for (int i = 0; i < count; ++i) forward_row<kLabels>(classes_, row(i), label_row(i), i, sums);
    }
    outgoing = {};
  }

  // Writes the gradient; finite: what prepare_gradients() found. Uses up the tile. Rows that are streamed are left to
  // `outgoing`, if there is one.
  void backward(const BlockGradients<A>& pixels, bool finite, bool stream, Outgoing<T>* outgoing) {
    T* gradient = static_cast<T*>(params_.gradient) + offset_of(params_.gradient_layout, sample_, pixel_);
    const A* tile = z_tile_;
    switch (visit_) {
      case Visit::kStrided: {
        const auto write = [&](auto kept, auto is_finite, auto streamed, const auto* z, int64_t z_stride) {
          with_labels([&](const auto* y, int64_t y_stride) {
            gradient_to_classes<streamed(), is_finite()>(
                logit_gradient<kLabels, kept(), is_finite()>(classes_, z, z_stride, y, y_stride, pixels), count,
                classes_.count, gradient, params_.gradient_layout.class_stride);
          });
        };
        using IfFinite = std::bool_constant<kLabels != Labels::kSoft>;
        const auto from = [&](auto kept, const auto* z, int64_t z_stride) {
          if (!finite) {
            write(kept, std::false_type{}, std::false_type{}, z, z_stride);
          } else if (stream && streaming_aligned(gradient)) {
            write(kept, IfFinite{}, std::bool_constant<kCanStream>{}, z, z_stride);
          } else {
            write(kept, IfFinite{}, std::false_type{}, z, z_stride);
          }
        };
        if (kept_) {
          from(std::true_type{}, tile, kTileStride<A>);
        } else {
          from(std::false_type{}, z_, params_.input_layout.class_stride);
        }
        break;
      }
      case Visit::kTransposed: {
        const auto write = [&](auto kept, const auto* y, int64_t stride) {
          gradient_to_rows(logit_gradient<kLabels, kept(), false>(classes_, tile, kTileStride<A>, y, stride, pixels),
                           count, classes_.count,
                           Rows<T>{gradient, params_.gradient_layout.pixel_stride, stream, reinterpret_cast<T*>(rows_),
                                   z_tile_, kTileStride<A>, outgoing});
        };
        const auto from = [&](auto kept) {
          if constexpr (kLabels == Labels::kSoft) {
            write(kept, static_cast<const A*>(y_tile_), kTileStride<A>);
          } else {
            write(kept, y_, 0);
          }
        };
        kept_ ? from(std::true_type{}) : from(std::false_type{});
        break;
      }
      case Visit::kRows:
        for (int i = 0; i < count; ++i) {
          T* gradient_row = gradient + i * params_.gradient_layout.pixel_stride;
          const auto write = [&](auto streamed, auto plain) {
            backward_row<kLabels, streamed(), plain()>(classes_, row(i), label_row(i), i, pixels, gradient_row);
          };
          const auto round = [&](auto streamed) {
            if constexpr (std::is_same_v<T, BFloat16> && kLabels != Labels::kSoft) {
              if (finite) return write(streamed, std::true_type{});
            }
            write(streamed, std::false_type{});
          };
          if (stream && row_streams(gradient_row, classes_.count)) {
            round(std::bool_constant<kCanStream>{});
          } else {
            round(std::false_type{});
          }
        }
    }
  }

 private:
  const T* row(int i) const { return z_ + i * params_.input_layout.pixel_stride; }
  const Y* label_row(int i) const {
    return kLabels == Labels::kSoft ? y_ + i * params_.target_layout.pixel_stride : nullptr;
  }

  // Calls f(labels, stride from class to class), of kStrided: where they lie, or in the tile.
  template <class F>
  void with_labels(F f) const {
    if constexpr (kLabels == Labels::kSoft) {
      if (y_tile_ != nullptr) return f(static_cast<const A*>(y_tile_), kTileStride<A>);
    }
    f(y_, params_.target_layout.class_stride);
  }

  const CrossEntropyParams& params_;
  const Visit visit_;
  const Classes<A>& classes_;
  const int64_t sample_;
  const int64_t pixel_;
  const T* const z_;
  const Y* y_ = nullptr;  // soft labels where they lie
  bool kept_ = false;     // the tile holds exponentials
  A* const z_tile_;       // logits (kTransposed), then exponentials
  A* const rows_;         // kTransposed: the gradient on its way to memory
  A* const y_tile_;       // soft labels, or nullptr: labels_in_place()
};

// ---------------------------------------------------------------------------------------------------------------------
// What is said of each pixel

// Incoming gradient of `count` pixels.
template <class A>
void read_pixel_gradient(const CrossEntropyParams& params, int64_t flat, int count, A* g) {
  const A scale = static_cast<A>(params.gradient_scale);
  if (params.pixel_gradient == nullptr) {
    for (int i = 0; i < count; ++i) g[i] = scale;
    return;
  }
  read_numbers<A>(params.pixel_gradient, params.loss_dtype, flat, 1, count, g);
  for (int i = 0; i < count; ++i) g[i] *= scale;
}

// Everything that the visits need to know of the block's pixels. False where NaN or infinity goes into the gradient of
// class indices, or would if its pixel were not ignored.
// maximum, sum: (count); labels: of index labels.
template <Labels kLabels, class A>
bool prepare_gradients(const CrossEntropyParams& params, const Classes<A>& classes, int64_t flat, int count,
                       const A* maximum, const A* sum, const BlockLabels<A>& labels, BlockGradients<A>& pixels) {
  int finite_count = 0;
  read_pixel_gradient<A>(params, flat, count, pixels.g);
  for (int i = 0; i < count; ++i) {
    pixels.maximum[i] = maximum[i];
    pixels.inverse_sum[i] = A(1) / sum[i];
  }
  if constexpr (kLabels != Labels::kSoft) {
    const A weight_sum = static_cast<A>(params.weight_sum);
    for (int i = 0; i < count; ++i) {
      const bool ignored = labels.label[i] < 0;
      const A w = labels.weight[i];
      const A g = ignored ? A(0) : pixels.g[i];
      pixels.label[i] = labels.label[i];
      pixels.g[i] = g;
      const A a = kLabels == Labels::kIndex ? w : math::index_label_a<A>(classes.smoothing, w, weight_sum);
      pixels.g_times_a_over_sum[i] = ignored ? A(0) : g * a * pixels.inverse_sum[i];
      pixels.g_times_label[i] = g * classes.smoothing.label * w;
      // S is not finite where a logit is not, and the next two where anything else of the pixel is not. Smoothing gives
      // the weight of every class to every pixel.
      A all = sum[i] + pixels.g_times_a_over_sum[i] + pixels.g_times_label[i];
      if constexpr (kLabels == Labels::kIndexSmoothed) all += weight_sum;
      finite_count += all - all == A(0) && sum[i] > A(0);
    }
  }
  for (int i = count; i < padded<A>(count); ++i) {
    pixels.maximum[i] = pixels.inverse_sum[i] = pixels.g[i] = 0;
    pixels.g_times_a_over_sum[i] = pixels.g_times_label[i] = 0;
    pixels.label[i] = -1;
  }
  return kLabels == Labels::kSoft || finite_count == count;
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward

template <Labels kLabels, class T, class Y>
CrossEntropyPartial forward_chunk(const CrossEntropyParams& params, Visit visit, const Classes<ComputeType<T>>& classes,
                                  const Chunk& chunk, bool stream, void* scratch) {
  using A = ComputeType<T>;
  using V = Vector<A>;
  using B = math::Bits<A>;
  CrossEntropyPartial partial{0.0, 0.0, -1};
  const math::Smoothing<V> smoothing{splat<V>(classes.smoothing.label), splat<V>(classes.smoothing.every)};
  const V weight_sum = splat<V>(static_cast<A>(params.weight_sum));
  const int most = block_pixels<A>(params, visit);

  Outgoing<T> outgoing;
  for (int64_t done = 0; done < chunk.count; done += most) {
    Block<kLabels, T, Y> block(params, visit, classes, chunk, done, most, scratch);
    const int count = block.count;
    // Lanes past `count` are computed on whatever is there and thrown away.
    alignas(64) A loss[kBlock<A>], label_logit[kBlock<A>];
    BlockLabels<A> labels;
    if constexpr (kLabels != Labels::kSoft) {
      labels.read(params, classes, block.flat, count);
      if (partial.bad_label < 0) partial.bad_label = labels.bad;
      block.labelled_logits(labels, label_logit);
    }
    BlockSums<A> sums;
    block.forward(sums, params.gradient != nullptr, outgoing);
    V block_loss = {}, block_weight = {};
    for (int i = 0; i < count; i += kLanes<A>) {
      const V log_s = math::log<V>(load(sums.sum + i));
      V a, b;
      if constexpr (kLabels == Labels::kSoft) {
        a = load(sums.a + i);
        b = load(sums.b + i);
      } else {
        const V w = load(labels.weight + i);
        const V logit = load(label_logit + i) - load(sums.maximum + i);
        if constexpr (kLabels == Labels::kIndexSmoothed) {
          a = math::index_label_a<V>(smoothing, w, weight_sum);
          b = math::index_label_b<V>(smoothing, w, logit, load(sums.b + i));
        } else {
          a = w;
          b = w * logit;
        }
        block_weight += w;
      }
      V value = math::cross_entropy<V>(a, b, log_s);
      if constexpr (kLabels != Labels::kSoft) {
        const auto label = *reinterpret_cast<const typename VectorOf<B>::Memory*>(labels.label + i);
        value = label < B(0) ? V{} : value;
      } else if (i + kLanes<A> > count) {
        for (int lane = count - i; lane < kLanes<A>; ++lane) value[lane] = 0;
      }
      store(loss + i, value);
      block_loss += value;
    }
    partial.loss += sum_lanes<A>(block_loss);
    partial.weight += kLabels == Labels::kSoft ? count : sum_lanes<A>(block_weight);

    if (params.maximum != nullptr) {
      __builtin_memcpy(static_cast<A*>(params.maximum) + block.flat, sums.maximum, sizeof(A) * count);
      __builtin_memcpy(static_cast<A*>(params.sum) + block.flat, sums.sum, sizeof(A) * count);
    }
    if (params.loss != nullptr) write_numbers<A>(params.loss, params.loss_dtype, block.flat, 1, count, loss);
    if (params.gradient != nullptr) {
      BlockGradients<A> pixels;
      const bool finite =
          prepare_gradients<kLabels, A>(params, classes, block.flat, count, sums.maximum, sums.sum, labels, pixels);
      block.backward(pixels, finite, stream, &outgoing);
    }
  }
  outgoing.send_before(0);
  if (stream) streaming_fence();
  return partial;
}

// The divisor of the mean alone, for a forward that writes the gradient too and so has to know it first.
template <class A>
CrossEntropyPartial label_weight_chunk(const CrossEntropyParams& params, const Classes<A>& classes,
                                       const Chunk& chunk) {
  CrossEntropyPartial partial{0.0, 0.0, -1};
  for (int64_t done = 0; done < chunk.count; done += kBlock<A>) {
    const int count = static_cast<int>(chunk.count - done < kBlock<A> ? chunk.count - done : kBlock<A>);
    BlockLabels<A> labels;
    labels.read(params, classes, chunk.sample * params.pixels + chunk.first + done, count);
    if (partial.bad_label < 0) partial.bad_label = labels.bad;
    Vector<A> sum = {};
    for (int i = 0; i < count; i += kLanes<A>) sum += load(labels.weight + i);
    partial.weight += sum_lanes<A>(sum);
  }
  return partial;
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward

template <Labels kLabels, class T, class Y>
void backward_chunk(const CrossEntropyParams& params, Visit visit, const Classes<ComputeType<T>>& classes,
                    const Chunk& chunk, bool stream, void* scratch) {
  using A = ComputeType<T>;
  const int most = block_pixels<A>(params, visit);
  for (int64_t done = 0; done < chunk.count; done += most) {
    Block<kLabels, T, Y> block(params, visit, classes, chunk, done, most, scratch);
    BlockLabels<A> labels;
    if constexpr (kLabels != Labels::kSoft) labels.read(params, classes, block.flat, block.count);
    BlockGradients<A> pixels;
    const bool finite = prepare_gradients<kLabels, A>(params, classes, block.flat, block.count,
                                                      static_cast<const A*>(params.maximum) + block.flat,
                                                      static_cast<const A*>(params.sum) + block.flat, labels, pixels);
    block.backward(pixels, finite, stream, nullptr);
  }
  if (stream) streaming_fence();
}

// Gradient of the soft labels. Plain loops: it is asked for rarely, and by label models that cost far more.
template <class T, class Y>
void label_backward_chunk(const CrossEntropyParams& params, const Classes<ComputeType<T>>& classes,
                          const Chunk& chunk) {
  using A = ComputeType<T>;
  const int64_t flat = chunk.sample * params.pixels + chunk.first;
  const T* z = static_cast<const T*>(params.input) + offset_of(params.input_layout, chunk.sample, chunk.first);
  Y* gradient = static_cast<Y*>(params.gradient) + offset_of(params.gradient_layout, chunk.sample, chunk.first);
  const A* maximum = static_cast<const A*>(params.maximum) + flat;
  const A* sum = static_cast<const A*>(params.sum) + flat;

  for (int64_t done = 0; done < chunk.count; done += kBlock<A>) {
    const int count = static_cast<int>(chunk.count - done < kBlock<A> ? chunk.count - done : kBlock<A>);
    alignas(64) A g[kBlock<A>];
    read_pixel_gradient<A>(params, flat + done, count, g);
    const auto one = [&](int64_t i, int64_t c) {
      const A logit = load_one(z + i * params.input_layout.pixel_stride + c * params.input_layout.class_stride);
      const A value = math::cross_entropy_label_gradient<A>(g[i - done], classes.smoothing.label * classes.weight_of(c),
                                                            logit, maximum[i], math::log<A>(sum[i]));
      store_one(gradient + i * params.gradient_layout.pixel_stride + c * params.gradient_layout.class_stride, value);
    };
    if (params.input_layout.pixel_stride == 1) {
      for (int64_t c = 0; c < params.classes; ++c) {
        for (int64_t i = done; i < done + count; ++i) one(i, c);
      }
    } else {
      for (int64_t i = done; i < done + count; ++i) {
        for (int64_t c = 0; c < params.classes; ++c) one(i, c);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// From run-time types to the templates above

// Calls f(labels, T*, Y*) with labels a compile-time constant.
template <class F>
FUSEDLOSS_HOST_DEVICE void with_types(const CrossEntropyParams& params, F f) {
  with_floating_type(params.input_dtype, [&](auto* t) {
    if (!params.soft_labels) {
      if (params.label_smoothing != 0.0) {
        f(std::integral_constant<Labels, Labels::kIndexSmoothed>{}, t, t);
      } else {
        f(std::integral_constant<Labels, Labels::kIndex>{}, t, t);
      }
    } else if (params.target_dtype == params.input_dtype) {
      f(std::integral_constant<Labels, Labels::kSoft>{}, t, t);
    } else {
      if constexpr (sizeof(*t) == 2)
        f(std::integral_constant<Labels, Labels::kSoft>{}, t, static_cast<float*>(nullptr));
    }
  });
}

// Is the gradient written past the caches? A small one is better left there for whoever reads it next.
template <class T>
bool streams(const CrossEntropyParams& params, Visit visit) {
  const int64_t bytes = params.samples * params.classes * params.pixels * static_cast<int64_t>(sizeof(T));
  const bool rows_aligned = visit != Visit::kStrided ||
                            params.gradient_layout.class_stride * static_cast<int64_t>(sizeof(T)) % kVectorBytes == 0;
  return kCanStream && bytes >= kStreamingBytes && rows_aligned;
}

template <class P>
using Pointee = std::remove_pointer_t<P>;

}  // namespace

int64_t cross_entropy_scratch_bytes(const CrossEntropyParams& params) {
  const int tiles = tiles_in(choose_visit(params), params);
  return tiles * (params.input_dtype == DType::kFloat64
                      ? tile_size<double>(params.classes) * static_cast<int64_t>(sizeof(double))
                      : tile_size<float>(params.classes) * static_cast<int64_t>(sizeof(float)));
}

void cross_entropy_label_weights(const CrossEntropyParams& params, int64_t begin, int64_t end,
                                 CrossEntropyPartial* partials) {
  const auto run = [&](const auto& classes) {
    for (int64_t i = begin; i < end; ++i) partials[i] = label_weight_chunk(params, classes, Chunk(params, i));
  };
  if (params.input_dtype == DType::kFloat64) {
    run(classes_of<double>(params));
  } else {
    run(classes_of<float>(params));
  }
}

void cross_entropy_forward(const CrossEntropyParams& params, int64_t begin, int64_t end, void* scratch,
                           CrossEntropyPartial* partials) {
  const Visit visit = choose_visit(params);
  with_types(params, [&](auto labels, auto* t, auto* y) {
    using T = Pointee<decltype(t)>;
    const auto classes = classes_of<ComputeType<T>>(params);
    const bool stream = params.gradient != nullptr && streams<T>(params, visit);
    for (int64_t i = begin; i < end; ++i) {
      partials[i] =
          forward_chunk<labels(), T, Pointee<decltype(y)>>(params, visit, classes, Chunk(params, i), stream, scratch);
    }
  });
}

void cross_entropy_backward(const CrossEntropyParams& params, int64_t begin, int64_t end, void* scratch) {
  const Visit visit = choose_visit(params);
  with_types(params, [&](auto labels, auto* t, auto* y) {
    using T = Pointee<decltype(t)>;
    const auto classes = classes_of<ComputeType<T>>(params);
    const bool stream = streams<T>(params, visit);
    for (int64_t i = begin; i < end; ++i) {
      backward_chunk<labels(), T, Pointee<decltype(y)>>(params, visit, classes, Chunk(params, i), stream, scratch);
    }
  });
}

void cross_entropy_label_backward(const CrossEntropyParams& params, int64_t begin, int64_t end) {
  with_types(params, [&](auto labels, auto* t, auto* y) {
    if constexpr (labels() == Labels::kSoft) {
      using T = Pointee<decltype(t)>;
      const auto classes = classes_of<ComputeType<T>>(params);
      for (int64_t i = begin; i < end; ++i) {
        label_backward_chunk<T, Pointee<decltype(y)>>(params, classes, Chunk(params, i));
      }
    }
  });
}

}  // namespace fusedloss::cpu::FUSEDLOSS_LEVEL
