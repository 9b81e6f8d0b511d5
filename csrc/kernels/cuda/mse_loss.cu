// mse_loss on a GPU.
//
// Plan. The forward is a sum of each chunk, a block each, then one block that adds the chunks' sums in their order.
// What is made element by element (the loss without reduction, the gradients) is one launch without chunks. Both come
// in two kinds:
//
//   same   all arrays have one dtype and lie alike, without weights: 16 bytes an access, several of them under way
//   any    every dtype, stride, broadcast and weight: elements one by one, or, where the innermost dimension lies in
//          groups of four in every array, four neighbors at a time
//
// A thread adds a tile's elements in the compute type and everything larger in float64.
#include "kernels/cuda/mse_loss.h"

#include "kernels/cuda/gpu.h"
#include "kernels/cuda/numbers.h"
#include "kernels/cuda/reduce.h"
#include "math/squared_error.h"

namespace fusedloss::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;     // accesses that a thread has under way, and steps of a tile
constexpr int kNeighbors = 4;  // of `any`, where they lie together
constexpr size_t kSumBytes = kThreads / gpu::kWarp * sizeof(double);

template <class T>
constexpr int kLanes = static_cast<int>(16 / sizeof(T));

// Accesses to each array in each_same. Numbers of two bytes are twice as many registers once they are converted, and
// with more than 64 of these a thread there would be too few threads to wait for memory.
template <class T, bool kEach>
constexpr int kSteps = sizeof(T) == 2 || kEach ? kUnroll / 2 : kUnroll;

// What is made of an element.
enum class Value : int { kLoss, kInputGradient, kTargetGradient, kWeightGradient };

struct SumParams : MseLossParams {
  MseLossChunks chunks;
  MseLossPartial* partials;  // (chunks)
};

struct EachParams : MseLossParams {
  Value value;
  MseLossIncoming incoming;
};

// --- elements of any dtype, anywhere ---------------------------------------------------------------------------------

// Where an element lies in each array, in elements.
template <class Index>
struct Place {
  Index input;
  Index target;
  Index weight;
  Index element_gradient;
  Index output;
};

// at: flat, in the order of the dimensions. Arrays that are not there have strides of 0.
template <class Index>
FUSEDLOSS_DEVICE Place<Index> place_of(const MseLossParams& params, Index at) {
  Place<Index> place{0, 0, 0, 0, 0};
  for (int d = params.dimensions - 1; d >= 0; --d) {
    Index index = at;
    if (d > 0) {
      const Index size = static_cast<Index>(params.sizes[d]);
      at /= size;
      index -= at * size;
    }
    place.input += index * static_cast<Index>(params.input.strides[d]);
    place.target += index * static_cast<Index>(params.target.strides[d]);
    place.weight += index * static_cast<Index>(params.weight.strides[d]);
    place.element_gradient += index * static_cast<Index>(params.element_gradient.strides[d]);
    place.output += index * static_cast<Index>(params.output.strides[d]);
  }
  return place;
}

template <class T, class A>
FUSEDLOSS_DEVICE void read_neighbors(const void* data, int64_t at, A (&numbers)[kNeighbors]) {
  constexpr int kCount = kLanes<T> < kNeighbors ? kLanes<T> : kNeighbors;
  FUSEDLOSS_UNROLL
  for (int i = 0; i < kNeighbors; i += kCount) {
    const Pack<T, kCount> pack = load_pack<T, kCount>(static_cast<const T*>(data) + at + i);
    FUSEDLOSS_UNROLL
    for (int v = 0; v < kCount; ++v) numbers[i + v] = static_cast<A>(to_compute(pack.values[v]));
  }
}

// kVector neighbors of the innermost dimension, `last`.
template <class A, int kVector>
FUSEDLOSS_DEVICE void read(const StridedArray& array, int last, int64_t at, A (&numbers)[kVector]) {
  if constexpr (kVector == 1) {
    numbers[0] = load_number<A>(array.data, array.dtype, at);
  } else if (array.strides[last] == 0) {
    const A number = load_number<A>(array.data, array.dtype, at);
    FUSEDLOSS_UNROLL
    for (int v = 0; v < kVector; ++v) numbers[v] = number;
  } else {
    switch (array.dtype) {
      case DType::kFloat64:
        return read_neighbors<double>(array.data, at, numbers);
      case DType::kFloat32:
        return read_neighbors<float>(array.data, at, numbers);
      case DType::kFloat16:
        return read_neighbors<Float16>(array.data, at, numbers);
      default:
        return read_neighbors<BFloat16>(array.data, at, numbers);
    }
  }
}

template <class T, class A>
FUSEDLOSS_DEVICE void write_neighbors(void* data, int64_t at, const A (&numbers)[kNeighbors]) {
  constexpr int kCount = kLanes<T> < kNeighbors ? kLanes<T> : kNeighbors;
  FUSEDLOSS_UNROLL
  for (int i = 0; i < kNeighbors; i += kCount) {
    Pack<T, kCount> pack;
    FUSEDLOSS_UNROLL
    for (int v = 0; v < kCount; ++v) pack.values[v] = from_compute<T>(static_cast<ComputeType<T>>(numbers[i + v]));
    store_pack(static_cast<T*>(data) + at + i, pack);
  }
}

template <class A, int kVector>
FUSEDLOSS_DEVICE void write(const StridedArray& array, int64_t at, const A (&numbers)[kVector]) {
  void* data = const_cast<void*>(array.data);
  if constexpr (kVector == 1) {
    store_number<A>(data, array.dtype, at, numbers[0]);
  } else {
    switch (array.dtype) {
      case DType::kFloat64:
        return write_neighbors<double>(data, at, numbers);
      case DType::kFloat32:
        return write_neighbors<float>(data, at, numbers);
      case DType::kFloat16:
        return write_neighbors<Float16>(data, at, numbers);
      default:
        return write_neighbors<BFloat16>(data, at, numbers);
    }
  }
}

// --- sums ------------------------------------------------------------------------------------------------------------

struct Run {
  int64_t begin;
  int64_t end;
};

FUSEDLOSS_DEVICE Run chunk_of_block(const SumParams& params) {
  const int64_t begin = gpu::block() * params.chunks.elements;
  const int64_t end = begin + params.chunks.elements;
  return {begin, end < params.elements ? end : params.elements};
}

template <class T>
FUSEDLOSS_KERNEL(kThreads)
sum_same(FUSEDLOSS_ARGUMENT SumParams params) {
  using A = ComputeType<T>;
  constexpr int kVector = kLanes<T>;
  const T* x = static_cast<const T*>(params.input.data);
  const T* y = static_cast<const T*>(params.target.data);
  const Run chunk = chunk_of_block(params);
  double total = 0.0;
  for (int64_t tile = chunk.begin; tile < chunk.end; tile += kThreads * kVector * kUnroll) {
    // All loads before the first number is used.
    Pack<T, kVector> inputs[kUnroll];
    Pack<T, kVector> targets[kUnroll];
    FUSEDLOSS_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = tile + (u * kThreads + gpu::thread()) * kVector;
      const bool inside = at + kVector <= chunk.end;
      inputs[u] = inside ? load_pack<T, kVector>(x + at) : Pack<T, kVector>{};
      targets[u] = inside ? load_pack<T, kVector>(y + at) : Pack<T, kVector>{};
    }
    A sums[kUnroll];
    FUSEDLOSS_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      sums[u] = A(0);
      FUSEDLOSS_UNROLL
      for (int v = 0; v < kVector; ++v) {
        sums[u] += math::squared_error<A>(to_compute(inputs[u].values[v]), to_compute(targets[u].values[v]));
      }
    }
    total += (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
  // The last few, which fill no vector.
  const int64_t rest = (chunk.end - chunk.begin) % kVector;
  if (gpu::thread() < rest) {
    const int64_t at = chunk.end - rest + gpu::thread();
    total += math::squared_error<A>(to_compute(x[at]), to_compute(y[at]));
  }
  const double loss = block_sum(total, reinterpret_cast<double*>(gpu::shared_memory()));
  if (gpu::thread() == 0) params.partials[gpu::block()] = {loss, 0.0};
}

template <class A, class Index, int kVector>
FUSEDLOSS_DEVICE void add_elements(const MseLossParams& params, int64_t at, A& loss_sum, A& weight_sum) {
  const Place<Index> place = place_of<Index>(params, static_cast<Index>(at));
  const int last = params.dimensions - 1;
  A x[kVector];
  A y[kVector];
  read(params.input, last, place.input, x);
  read(params.target, last, place.target, y);
  if (params.weight.data == nullptr) {
    FUSEDLOSS_UNROLL
    for (int v = 0; v < kVector; ++v) loss_sum += math::squared_error<A>(x[v], y[v]);
  } else {
    A w[kVector];
    read(params.weight, last, place.weight, w);
    FUSEDLOSS_UNROLL
    for (int v = 0; v < kVector; ++v) {
      loss_sum += math::squared_error<A>(x[v], y[v]) * w[v];
      weight_sum += w[v];
    }
  }
}

template <class A, class Index, int kVector>
FUSEDLOSS_KERNEL(kThreads)
sum_any(FUSEDLOSS_ARGUMENT SumParams params) {
  const Run chunk = chunk_of_block(params);
  const int64_t rest = (chunk.end - chunk.begin) % kVector;
  const int64_t whole = chunk.end - rest;
  constexpr int kStep = kThreads * kVector;
  double loss = 0.0;
  double weight = 0.0;
  for (int64_t tile = chunk.begin; tile < whole; tile += kStep * kUnroll) {
    const auto add_tile = [&](A& loss_sum, A& weight_sum) {
      FUSEDLOSS_UNROLL_BY(1)
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t at = tile + u * kStep + gpu::thread() * kVector;
        if (at < whole) add_elements<A, Index, kVector>(params, at, loss_sum, weight_sum);
      }
    };
    if constexpr (sizeof(A) == sizeof(double)) {
      add_tile(loss, weight);  // sums of its own would be registers for nothing
    } else {
      A loss_sum = A(0);
      A weight_sum = A(0);
      add_tile(loss_sum, weight_sum);
      loss += loss_sum;
      weight += weight_sum;
    }
  }
  if (kVector > 1 && gpu::thread() < rest) {
    A loss_sum = A(0);
    A weight_sum = A(0);
    add_elements<A, Index, 1>(params, whole + gpu::thread(), loss_sum, weight_sum);
    loss += loss_sum;
    weight += weight_sum;
  }
  double* shared = reinterpret_cast<double*>(gpu::shared_memory());
  loss = block_sum(loss, shared);
  weight = params.weight.data == nullptr ? 0.0 : block_sum(weight, shared);
  if (gpu::thread() == 0) params.partials[gpu::block()] = {loss, weight};
}

struct FinishParams : MseLossResult {
  int64_t chunks;
  int64_t elements;
  bool weighted;
};

FUSEDLOSS_KERNEL(kThreads)
finish(FUSEDLOSS_ARGUMENT FinishParams params) {
  double sum = 0.0;
  double divisor = 0.0;
  for (int64_t i = gpu::thread(); i < params.chunks; i += kThreads) {
    sum += params.partials[i].loss;
    divisor += params.partials[i].weight;
  }
  double* shared = reinterpret_cast<double*>(gpu::shared_memory());
  sum = block_sum(sum, shared);
  divisor = params.weighted ? block_sum(divisor, shared) : static_cast<double>(params.elements);
  if (gpu::thread() != 0) return;
  store_number<double>(params.loss, params.loss_dtype, 0, params.mean ? sum / divisor : sum);
  if (params.statistics != nullptr) {
    params.statistics[0] = divisor;
    params.statistics[1] = sum / divisor;
  }
}

// --- element by element ----------------------------------------------------------------------------------------------

// kWeightedMean: whether there may be statistics. Room for a division costs registers where there is none.
template <bool kWeightedMean>
FUSEDLOSS_DEVICE double incoming_scale(const EachParams& params) {
  double scale = params.gradient_scale;
  const MseLossIncoming& incoming = params.incoming;
  if (incoming.grad != nullptr) scale *= load_number<double>(incoming.grad, incoming.grad_dtype, 0);
  if (kWeightedMean && incoming.statistics != nullptr) scale /= incoming.statistics[0];
  return scale;
}

// A block has one tile. kEach: element_gradient is there.
template <class T, bool kLoss, bool kEach>
FUSEDLOSS_KERNEL(kThreads)
each_same(FUSEDLOSS_ARGUMENT EachParams params) {
  using A = ComputeType<T>;
  constexpr int kVector = kLanes<T>;
  constexpr int kCount = kSteps<T, kEach>;
  const T* x = static_cast<const T*>(params.input.data);
  const T* y = static_cast<const T*>(params.target.data);
  const T* g = static_cast<const T*>(params.element_gradient.data);
  T* out = static_cast<T*>(const_cast<void*>(params.output.data));
  const int64_t tile = gpu::block() * (kThreads * kVector * kCount);

  // All loads before the first number is used, the incoming gradient's among them.
  Pack<T, kVector> inputs[kCount];
  Pack<T, kVector> targets[kCount];
  Pack<T, kVector> gradients[kEach ? kCount : 1];
  FUSEDLOSS_UNROLL
  for (int u = 0; u < kCount; ++u) {
    const int64_t at = tile + (u * kThreads + gpu::thread()) * kVector;
    const bool inside = at + kVector <= params.elements;
    inputs[u] = inside ? load_pack<T, kVector>(x + at) : Pack<T, kVector>{};
    targets[u] = inside ? load_pack<T, kVector>(y + at) : Pack<T, kVector>{};
    if constexpr (kEach) gradients[u] = inside ? load_pack<T, kVector>(g + at) : Pack<T, kVector>{};
  }
  const A scale = kLoss ? A(1) : static_cast<A>(incoming_scale<false>(params));
  const A twice = params.value == Value::kTargetGradient ? A(-2) : A(2);
  const auto value_of = [scale, twice](A input, A target, A gradient) -> A {
    if constexpr (kLoss) {
      return math::squared_error<A>(input, target);
    } else {
      return math::squared_error_gradient<A>((kEach ? scale * gradient : scale) * twice, input, target);
    }
  };
  FUSEDLOSS_UNROLL
  for (int u = 0; u < kCount; ++u) {
    const int64_t at = tile + (u * kThreads + gpu::thread()) * kVector;
    if (at + kVector > params.elements) continue;
    Pack<T, kVector> result;
    FUSEDLOSS_UNROLL
    for (int v = 0; v < kVector; ++v) {
      const A gradient = kEach ? to_compute(gradients[kEach ? u : 0].values[v]) : A(1);
      result.values[v] =
          from_compute<T>(value_of(to_compute(inputs[u].values[v]), to_compute(targets[u].values[v]), gradient));
    }
    store_pack(out + at, result);
  }
  // The last few, which fill no vector.
  const int64_t rest = params.elements % kVector;
  if (gpu::block() == gpu::blocks() - 1 && gpu::thread() < rest) {
    const int64_t at = params.elements - rest + gpu::thread();
    const A gradient = kEach ? to_compute(g[at]) : A(1);
    out[at] = from_compute<T>(value_of(to_compute(x[at]), to_compute(y[at]), gradient));
  }
}

// mean: of a weighted mean, for the gradient of the weights.
template <class A, class Index, int kVector>
FUSEDLOSS_DEVICE void make_elements(const EachParams& params, int64_t at, A scale, A mean) {
  const Place<Index> place = place_of<Index>(params, static_cast<Index>(at));
  const int last = params.dimensions - 1;
  A x[kVector];
  A y[kVector];
  A factor[kVector];
  read(params.input, last, place.input, x);
  read(params.target, last, place.target, y);
  FUSEDLOSS_UNROLL
  for (int v = 0; v < kVector; ++v) factor[v] = scale;
  if (params.element_gradient.data != nullptr) {
    A g[kVector];
    read(params.element_gradient, last, place.element_gradient, g);
    FUSEDLOSS_UNROLL
    for (int v = 0; v < kVector; ++v) factor[v] *= g[v];
  }
  if (params.weight.data != nullptr && params.value != Value::kWeightGradient) {
    A w[kVector];
    read(params.weight, last, place.weight, w);
    FUSEDLOSS_UNROLL
    for (int v = 0; v < kVector; ++v) factor[v] *= w[v];
  }
  A result[kVector];
  const A twice = params.value == Value::kTargetGradient ? A(-2) : A(2);
  FUSEDLOSS_UNROLL
  for (int v = 0; v < kVector; ++v) {
    if (params.value == Value::kLoss) {
      result[v] = math::squared_error<A>(x[v], y[v]) * factor[v];
    } else if (params.value == Value::kWeightGradient) {
      result[v] = factor[v] * (math::squared_error<A>(x[v], y[v]) - mean);
    } else {
      result[v] = math::squared_error_gradient<A>(factor[v] * twice, x[v], y[v]);
    }
  }
  write(params.output, place.output, result);
}

template <class A, class Index, int kVector>
FUSEDLOSS_KERNEL(kThreads)
each_any(FUSEDLOSS_ARGUMENT EachParams params) {
  // By one thread, since a division of float64 by all of them takes longer than their elements on many GPUs.
  A* shared = reinterpret_cast<A*>(gpu::shared_memory());
  if (gpu::thread() == 0) {
    const bool centered = params.value == Value::kWeightGradient && params.incoming.statistics != nullptr;
    shared[0] = static_cast<A>(incoming_scale<true>(params));
    shared[1] = centered ? static_cast<A>(params.incoming.statistics[1]) : A(0);
  }
  gpu::sync_block();
  const A scale = shared[0];
  const A mean = shared[1];
  constexpr int kStep = kThreads * kVector;
  const int64_t rest = params.elements % kVector;
  const int64_t whole = params.elements - rest;
  FUSEDLOSS_UNROLL_BY(1)
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t at = (gpu::block() * kUnroll + u) * kStep + gpu::thread() * kVector;
    if (at < whole) make_elements<A, Index, kVector>(params, at, scale, mean);
  }
  if (kVector > 1 && gpu::block() == gpu::blocks() - 1 && gpu::thread() < rest) {
    make_elements<A, Index, 1>(params, whole + gpu::thread(), scale, mean);
  }
}

// --- which kernel ----------------------------------------------------------------------------------------------------

bool aligned(const StridedArray& array, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(array.data) % static_cast<uintptr_t>(bytes) == 0;
}

// Whether `f` is true of every array that is there.
template <class F>
bool all_arrays(const MseLossParams& params, F f) {
  for (const StridedArray* array :
       {&params.input, &params.target, &params.weight, &params.element_gradient, &params.output}) {
    if (array->data != nullptr && !f(*array)) return false;
  }
  return true;
}

bool all_same(const MseLossParams& params) {
  return params.dimensions == 1 && params.weight.data == nullptr && all_arrays(params, [&](const StridedArray& array) {
           return array.dtype == params.input.dtype && array.strides[0] == 1 && aligned(array, 16);
         });
}

// Whether the innermost dimension can be read in groups of kNeighbors.
bool in_neighbors(const MseLossParams& params) {
  const int last = params.dimensions - 1;
  if (last > 0 && params.sizes[last] % kNeighbors != 0) return false;
  return all_arrays(params, [&](const StridedArray& array) {
    if (array.strides[last] == 0) return &array != &params.output;
    const int64_t bytes = bytes_of(array.dtype) * kNeighbors;
    if (array.strides[last] != 1 || !aligned(array, bytes < 16 ? bytes : 16)) return false;
    for (int d = 0; d < last; ++d) {
      if (array.strides[d] % kNeighbors != 0) return false;
    }
    return true;
  });
}

// Whether 32 bits hold every flat index and every offset: a division of 64 bits costs several of 32.
bool in_32_bits(const MseLossParams& params) {
  constexpr int64_t most = int64_t{1} << 31;
  return params.elements < most && all_arrays(
                                       params,
                                       [&](const StridedArray& array) {
                                         int64_t offset = 0;
                                         for (int d = 0; d < params.dimensions; ++d) {
                                           if (params.sizes[d] > 1 && array.strides[d] >= most) return false;
                                           offset += (params.sizes[d] - 1) * array.strides[d];
                                           if (offset >= most) return false;
                                         }
                                         return true;
                                       });
}

template <class A, class I, int kCount>
struct AnyKind {
  using Compute = A;
  using Index = I;
  static constexpr int kVector = kCount;
};

// Calls f(AnyKind) for the `any` kernel that these arrays need.
template <class F>
int with_kind(const MseLossParams& params, F f) {
  const bool neighbors = in_neighbors(params);
  const bool narrow = in_32_bits(params);
  if (params.float64) {
    if (narrow) return neighbors ? f(AnyKind<double, uint32_t, kNeighbors>{}) : f(AnyKind<double, uint32_t, 1>{});
    return neighbors ? f(AnyKind<double, uint64_t, kNeighbors>{}) : f(AnyKind<double, uint64_t, 1>{});
  }
  if (narrow) return neighbors ? f(AnyKind<float, uint32_t, kNeighbors>{}) : f(AnyKind<float, uint32_t, 1>{});
  return neighbors ? f(AnyKind<float, uint64_t, kNeighbors>{}) : f(AnyKind<float, uint64_t, 1>{});
}

int launch_sums(const SumParams& params, gpu::Stream stream) {
  if (all_same(params)) {
    return with_type(params.input.dtype, [&](auto type) {
      using T = typename decltype(type)::Type;
      return gpu::launch(sum_same<T>, params.chunks.count, kThreads, kSumBytes, stream, params);
    });
  }
  return with_kind(params, [&](auto kind) {
    using Kind = decltype(kind);
    return gpu::launch(sum_any<typename Kind::Compute, typename Kind::Index, Kind::kVector>, params.chunks.count,
                       kThreads, kSumBytes, stream, params);
  });
}

// Blocks whose threads take `vector` neighbors so many times.
int64_t blocks_for(const MseLossParams& params, int vector, int times) {
  const int64_t tile = static_cast<int64_t>(kThreads) * vector * times;
  return (params.elements + tile - 1) / tile;
}

template <class T, bool kLoss, bool kEach>
int launch_each_same(const EachParams& params, gpu::Stream stream) {
  return gpu::launch(each_same<T, kLoss, kEach>, blocks_for(params, kLanes<T>, kSteps<T, kEach>), kThreads, 0, stream,
                     params);
}

int launch_each(const EachParams& params, gpu::Stream stream) {
  if (params.elements == 0) return 0;
  if (all_same(params)) {
    return with_type(params.input.dtype, [&](auto type) {
      using T = typename decltype(type)::Type;
      if (params.value == Value::kLoss) return launch_each_same<T, true, false>(params, stream);
      if (params.element_gradient.data != nullptr) return launch_each_same<T, false, true>(params, stream);
      return launch_each_same<T, false, false>(params, stream);
    });
  }
  return with_kind(params, [&](auto kind) {
    using Kind = decltype(kind);
    using A = typename Kind::Compute;
    return gpu::launch(each_any<A, typename Kind::Index, Kind::kVector>, blocks_for(params, Kind::kVector, kUnroll),
                       kThreads, 2 * sizeof(A), stream, params);
  });
}

}  // namespace

int mse_loss_forward(const MseLossParams& params, const MseLossResult& result, void* stream) {
  const gpu::Stream on = static_cast<gpu::Stream>(stream);
  const MseLossChunks chunks = mse_loss_chunks_of(params.elements);
  if (chunks.count > 0) {
    const int status = launch_sums({params, chunks, result.partials}, on);
    if (status != 0) return status;
  }
  const FinishParams last{result, chunks.count, params.elements, params.weight.data != nullptr};
  return gpu::launch(finish, 1, kThreads, kSumBytes, on, last);
}

int mse_loss_forward_each(const MseLossParams& params, void* stream) {
  EachParams each{params, Value::kLoss, {}};
  each.gradient_scale = 1.0;
  return launch_each(each, static_cast<gpu::Stream>(stream));
}

int mse_loss_backward(const MseLossParams& params, const MseLossIncoming& incoming, void* stream) {
  const Value value = params.wanted == MseLossParams::Wanted::kInput    ? Value::kInputGradient
                      : params.wanted == MseLossParams::Wanted::kTarget ? Value::kTargetGradient
                                                                        : Value::kWeightGradient;
  return launch_each({params, value, incoming}, static_cast<gpu::Stream>(stream));
}

}  // namespace fusedloss::cuda
