// Numbers of every dtype in memory, as the compute type in registers; and vectors of neighbors in one access.
#pragma once

#include <type_traits>

#include "kernels/cuda/gpu.h"
#include "kernels/dtype.h"

namespace fusedloss::cuda {

template <class T>
FUSEDLOSS_DEVICE ComputeType<T> to_compute(T value) {
  return value;
}
template <>
FUSEDLOSS_DEVICE float to_compute(Float16 value) {
  return gpu::float_of_half(value.bits);
}
template <>
FUSEDLOSS_DEVICE float to_compute(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float number;
  __builtin_memcpy(&number, &bits, sizeof(number));
  return number;
}

template <class T>
FUSEDLOSS_DEVICE T from_compute(ComputeType<T> value) {
  return value;
}
template <>
FUSEDLOSS_DEVICE Float16 from_compute(float value) {
  return {gpu::half_of_float(value)};
}
template <>
FUSEDLOSS_DEVICE BFloat16 from_compute(float value) {
  return {gpu::bfloat16_of_float(value)};
}

// kCount neighbors, read and written in one access where their address is a multiple of their bytes.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  static_assert(sizeof(T) * kCount <= 16, "one access has at most 16 bytes");
  T values[kCount];
};

template <class T, int kCount>
FUSEDLOSS_DEVICE Pack<T, kCount> load_pack(const T* at) {
  gpu::expect_aligned(at, sizeof(Pack<T, kCount>));
  return *reinterpret_cast<const Pack<T, kCount>*>(at);
}

template <class T, int kCount>
FUSEDLOSS_DEVICE void store_pack(T* at, const Pack<T, kCount>& pack) {
  gpu::expect_aligned(at, sizeof(pack));
  *reinterpret_cast<Pack<T, kCount>*>(at) = pack;
}

// Two neighbors from two numbers.
template <class T>
FUSEDLOSS_DEVICE Pack<T, 2> pair_from_compute(float first, float second) {
  Pack<T, 2> pair;
  if constexpr (std::is_same_v<T, float>) {
    pair.values[0] = first;
    pair.values[1] = second;
  } else {
    const uint32_t bits =
        std::is_same_v<T, Float16> ? gpu::halves_of_floats(first, second) : gpu::bfloat16s_of_floats(first, second);
    __builtin_memcpy(&pair, &bits, sizeof(pair));
  }
  return pair;
}

// Element i of an array of any floating dtype, or of a mask (0 or 1). A: float or double.
template <class A>
FUSEDLOSS_DEVICE A load_number(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kFloat64:
      return static_cast<A>(static_cast<const double*>(data)[i]);
    case DType::kFloat32:
      return static_cast<A>(static_cast<const float*>(data)[i]);
    case DType::kFloat16:
      return static_cast<A>(to_compute(static_cast<const Float16*>(data)[i]));
    case DType::kBFloat16:
      return static_cast<A>(to_compute(static_cast<const BFloat16*>(data)[i]));
    default:  // bool, uint8
      return static_cast<const uint8_t*>(data)[i] != 0 ? A(1) : A(0);
  }
}

template <class A>
FUSEDLOSS_DEVICE void store_number(void* data, DType dtype, int64_t i, A value) {
  switch (dtype) {
    case DType::kFloat64:
      static_cast<double*>(data)[i] = static_cast<double>(value);
      return;
    case DType::kFloat32:
      static_cast<float*>(data)[i] = static_cast<float>(value);
      return;
    case DType::kFloat16:
      static_cast<Float16*>(data)[i] = from_compute<Float16>(static_cast<float>(value));
      return;
    default:
      static_cast<BFloat16*>(data)[i] = from_compute<BFloat16>(static_cast<float>(value));
  }
}

// Element i of an array of labels, widened.
FUSEDLOSS_DEVICE int64_t load_label(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kInt64:
      return static_cast<const int64_t*>(data)[i];
    case DType::kInt32:
      return static_cast<const int32_t*>(data)[i];
    case DType::kInt16:
      return static_cast<const int16_t*>(data)[i];
    default:  // uint8, bool
      return static_cast<const uint8_t*>(data)[i];
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// On the host

template <class T>
struct TypeName {
  using Type = T;
};

// Calls f(TypeName<T>{}) with the floating type of a dtype.
template <class F>
int with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(TypeName<double>{});
    case DType::kFloat32:
      return f(TypeName<float>{});
    case DType::kFloat16:
      return f(TypeName<Float16>{});
    default:
      return f(TypeName<BFloat16>{});
  }
}

// Of a floating dtype.
inline int64_t bytes_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace fusedloss::cuda
