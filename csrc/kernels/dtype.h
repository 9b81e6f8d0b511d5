// Element types of the arrays that kernels read and write; torch-free, so the binding translates once.
#pragma once

#include <cstdint>

namespace fusedloss {

enum class DType : int32_t { kFloat64, kFloat32, kFloat16, kBFloat16, kUInt8, kInt16, kInt32, kInt64, kBool };

// Two-byte floating-point numbers as bits; kernels convert them (kernels/cpu/simd.h) and never compute in them.
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// What a kernel computes in: float64 for float64, float32 for everything else.
template <class T>
struct ComputeTypeOf {
  using Type = float;
};
template <>
struct ComputeTypeOf<double> {
  using Type = double;
};
template <class T>
using ComputeType = typename ComputeTypeOf<T>::Type;

}  // namespace fusedloss
