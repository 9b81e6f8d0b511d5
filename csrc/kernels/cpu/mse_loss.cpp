// mse_loss on the CPU.
//
// Plan. A chunk of elements goes in runs that lie in one row of the innermost dimension and fit a tile. An array of the
// compute type with stride 1 is read where it lies; any other (two-byte numbers, another dtype, broadcast, strided) is
// converted into a tile in the L1 cache first, so that the loops below know one type and one stride.
#include "math/squared_error.h"

#include "kernels/cpu/convert.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/simd.h"

namespace fusedloss::cpu::FUSEDLOSS_LEVEL {
namespace {

constexpr int kTileElements = 1024;

template <class A>
struct alignas(64) Tile {
  A values[kTileElements];
};

template <class A>
constexpr DType kDTypeOf = sizeof(A) == 8 ? DType::kFloat64 : DType::kFloat32;

// Where a run of elements lies in each array.
class Runs {
 public:
  // Calls visit(Position, count) for the runs that make up the elements [begin, end).
  template <class Visit>
  static void visit(const MseLossParams& params, int64_t begin, int64_t end, Visit visit) {
    const int last = params.dimensions - 1;
    const int64_t inner = params.sizes[last];
    for (int64_t at = begin; at < end;) {
      Runs position{};
      int64_t rest = at;
      for (int d = last; d >= 0; --d) {
        position.index_[d] = d == 0 ? rest : rest % params.sizes[d];
        rest /= params.sizes[d];
      }
      position.last_ = last;
      int64_t count = inner - position.index_[last];
      if (count > end - at) count = end - at;
      if (count > kTileElements) count = kTileElements;
      visit(position, static_cast<int>(count));
      at += count;
    }
  }

  int64_t offset_in(const StridedArray& array) const {
    int64_t offset = 0;
    for (int d = 0; d <= last_; ++d) offset += index_[d] * array.strides[d];
    return offset;
  }

  int64_t stride_in(const StridedArray& array) const { return array.strides[last_]; }

  // The run as numbers of the compute type: in place, or converted into `tile`.
  template <class A>
  const A* read(const StridedArray& array, int count, Tile<A>& tile) const {
    const int64_t offset = offset_in(array);
    const int64_t stride = stride_in(array);
    if (array.dtype == kDTypeOf<A> && stride == 1) return static_cast<const A*>(array.data) + offset;
    read_numbers<A>(array.data, array.dtype, offset, stride, count, tile.values);
    return tile.values;
  }

 private:
  int64_t index_[kMaxDimensions];
  int last_;
};

// Calls body(i, load) for vectors of `count` elements; load(p) reads p[i...], with zeros past the end.
template <class A, class Body>
FUSEDLOSS_HOST_DEVICE void for_elements(int count, Body body) {
  int i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) {
    body(i, kLanes<A>, [i](const A* p) { return load<A>(p + i); });
  }
  if (i < count) {
    const int n = count - i;
    body(i, n, [i, n](const A* p) { return load_partial<A>(p + i, n, 0); });
  }
}

// Is the gradient stored where it belongs, or by way of a tile that is converted?
template <class A>
bool written_in_place(const MseLossParams& params) {
  return params.output.dtype == kDTypeOf<A> && params.output.strides[params.dimensions - 1] == 1;
}

// Is it written past the caches? A small one is better left there for whoever reads it next.
template <class A>
bool streams(const MseLossParams& params) {
  return kCanStream && params.elements * static_cast<int64_t>(sizeof(A)) >= kStreamingBytes;
}

// sum (x - y)^2 of a run, and with kGradient the gradient of x into `out`. Four independent sums hide the latency of an
// addition.
template <class A, bool kGradient>
double visit_run(const A* x, const A* y, int count, Vector<A> twice_g, bool stream, A* out) {
  using V = Vector<A>;
  constexpr int lanes = kLanes<A>;
  V sums[4] = {};
  int i = 0;
  for (; i + 4 * lanes <= count; i += 4 * lanes) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const V input = load<A>(x + i + v * lanes);
      const V target = load<A>(y + i + v * lanes);
      sums[v] += math::squared_error<V>(input, target);
      if constexpr (kGradient) {
        const V gradient = math::squared_error_gradient<V>(twice_g, input, target);
        if (stream) {
          store_streaming<A>(out + i + v * lanes, gradient);
        } else {
          store<A>(out + i + v * lanes, gradient);
        }
      }
    }
  }
  const int done = i;
  for_elements<A>(count - done, [&](int at, int n, auto read) {
    const V input = read(x + done);
    const V target = read(y + done);
    sums[0] += math::squared_error<V>(input, target);
    if constexpr (kGradient) {
      const V gradient = math::squared_error_gradient<V>(twice_g, input, target);
      if (n == lanes) {
        store<A>(out + done + at, gradient);
      } else {
        store_partial<A>(out + done + at, gradient, n);
      }
    }
  });
  return sum_lanes<A>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class A>
MseLossPartial forward_chunk(const MseLossParams& params, int64_t begin, int64_t end) {
  using V = Vector<A>;
  MseLossPartial partial{0.0, 0.0};
  Tile<A> x_tile, y_tile, w_tile, loss;
  Runs::visit(params, begin, end, [&](const Runs& at, int count) {
    const A* x = at.read<A>(params.input, count, x_tile);
    const A* y = at.read<A>(params.target, count, y_tile);
    const A* w = params.weight.data == nullptr ? nullptr : at.read<A>(params.weight, count, w_tile);
    if (w == nullptr && params.output.data == nullptr) {
      partial.loss += visit_run<A, false>(x, y, count, V{}, false, nullptr);
      return;
    }
    V loss_sum = {}, weight_sum = {};
    for_elements<A>(count, [&](int i, int, auto read) {
      V value = math::squared_error<V>(read(x), read(y));
      if (w != nullptr) {
        value *= read(w);
        weight_sum += read(w);
      }
      loss_sum += value;
      store(loss.values + i, value);
    });
    partial.loss += sum_lanes<A>(loss_sum);
    partial.weight += sum_lanes<A>(weight_sum);
    if (params.output.data != nullptr) {
      write_numbers<A>(const_cast<void*>(params.output.data), params.output.dtype, at.offset_in(params.output),
                       at.stride_in(params.output), count, loss.values);
    }
  });
  return partial;
}

// The loss and the gradient of the input from one read of both operands; without weights.
template <class A>
MseLossPartial forward_and_gradient_chunk(const MseLossParams& params, int64_t begin, int64_t end) {
  MseLossPartial partial{0.0, 0.0};
  Tile<A> x_tile, y_tile, result;
  const Vector<A> twice_g = splat<Vector<A>>(static_cast<A>(2.0 * params.gradient_scale));
  const bool in_place = written_in_place<A>(params);
  const bool stream = streams<A>(params);
  Runs::visit(params, begin, end, [&](const Runs& at, int count) {
    const A* x = at.read<A>(params.input, count, x_tile);
    const A* y = at.read<A>(params.target, count, y_tile);
    void* data = const_cast<void*>(params.output.data);
    const int64_t offset = at.offset_in(params.output);
    A* out = in_place ? static_cast<A*>(data) + offset : result.values;
    partial.loss += visit_run<A, true>(x, y, count, twice_g, in_place && stream && streaming_aligned(out), out);
    if (!in_place) {
      write_numbers<A>(data, params.output.dtype, offset, at.stride_in(params.output), count, out);
    }
  });
  if (stream) streaming_fence();
  return partial;
}

template <class A>
void backward_chunk(const MseLossParams& params, int64_t begin, int64_t end) {
  using V = Vector<A>;
  using Wanted = MseLossParams::Wanted;
  Tile<A> x_tile, y_tile, w_tile, g_tile, result;
  const A scale = static_cast<A>(params.gradient_scale);
  const A mean = static_cast<A>(params.weighted_mean);
  const A twice = params.wanted == Wanted::kTarget ? A(-2) : A(2);
  const bool in_place = written_in_place<A>(params);
  const bool stream = streams<A>(params);

  Runs::visit(params, begin, end, [&](const Runs& at, int count) {
    const A* x = at.read<A>(params.input, count, x_tile);
    const A* y = at.read<A>(params.target, count, y_tile);
    const A* w = params.weight.data == nullptr ? nullptr : at.read<A>(params.weight, count, w_tile);
    const A* g = params.element_gradient.data == nullptr ? nullptr : at.read<A>(params.element_gradient, count, g_tile);
    void* data = const_cast<void*>(params.output.data);
    const int64_t offset = at.offset_in(params.output);
    A* out = in_place ? static_cast<A*>(data) + offset : result.values;

    if (w == nullptr && g == nullptr && in_place && stream && streaming_aligned(out) && count % kLanes<A> == 0) {
      const V twice_g = splat<V>(twice * scale);
      for (int i = 0; i < count; i += kLanes<A>) {
        store_streaming<A>(out + i, math::squared_error_gradient<V>(twice_g, load<A>(x + i), load<A>(y + i)));
      }
      return;
    }
    for_elements<A>(count, [&](int i, int n, auto read) {
      V incoming = splat<V>(scale);
      if (g != nullptr) incoming *= read(g);
      V value;
      if (params.wanted == Wanted::kWeight) {
        value = incoming * (math::squared_error<V>(read(x), read(y)) - mean);
      } else {
        if (w != nullptr) incoming *= read(w);
        value = math::squared_error_gradient<V>(incoming * twice, read(x), read(y));
      }
      if (n == kLanes<A>) {
        store<A>(out + i, value);
      } else {
        store_partial<A>(out + i, value, n);
      }
    });
    if (!in_place) {
      write_numbers<A>(data, params.output.dtype, offset, at.stride_in(params.output), count, out);
    }
  });
  if (stream) streaming_fence();
}

// The elements of chunk i.
inline int64_t chunk_begin(int64_t i) { return i * kMseLossChunk; }
inline int64_t chunk_end(const MseLossParams& params, int64_t i) {
  const int64_t end = (i + 1) * kMseLossChunk;
  return end < params.elements ? end : params.elements;
}

}  // namespace

void mse_loss_forward(const MseLossParams& params, int64_t begin, int64_t end, MseLossPartial* partials) {
  for (int64_t i = begin; i < end; ++i) {
    partials[i] = params.float64 ? forward_chunk<double>(params, chunk_begin(i), chunk_end(params, i))
                                 : forward_chunk<float>(params, chunk_begin(i), chunk_end(params, i));
  }
}

void mse_loss_forward_and_gradient(const MseLossParams& params, int64_t begin, int64_t end, MseLossPartial* partials) {
  for (int64_t i = begin; i < end; ++i) {
    partials[i] = params.float64 ? forward_and_gradient_chunk<double>(params, chunk_begin(i), chunk_end(params, i))
                                 : forward_and_gradient_chunk<float>(params, chunk_begin(i), chunk_end(params, i));
  }
}

void mse_loss_backward(const MseLossParams& params, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    if (params.float64) {
      backward_chunk<double>(params, chunk_begin(i), chunk_end(params, i));
    } else {
      backward_chunk<float>(params, chunk_begin(i), chunk_end(params, i));
    }
  }
}

}  // namespace fusedloss::cpu::FUSEDLOSS_LEVEL
