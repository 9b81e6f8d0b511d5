// What the formulas need to know about the number they are written for.
//
// Every formula in this folder is a template over `Real`: float or double on any device, and on the CPU also a vector
// of them (kernels/cpu/simd.h adds that specialization). The body is the same text for all: arithmetic, comparisons and
// `condition ? a : b` mean the same for a number and, lane by lane, for a GCC/Clang vector.
#pragma once

#include <cstdint>

// Asks __CUDACC__ (is nvcc reading this file?), not __CUDA_ARCH__: the attribute must be there in nvcc's host pass too.
#if defined(__CUDACC__)
#define FUSEDLOSS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FUSEDLOSS_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace fusedloss::math {

// Element: the number in a lane. Bits, UnsignedBits: integers of the same width, for exponent arithmetic; unsigned
// where bits are shifted out to the left, which for signed numbers C++17 leaves undefined.
template <class Real>
struct RealTraits;

template <>
struct RealTraits<float> {
  using Element = float;
  using Bits = int32_t;
  using UnsignedBits = uint32_t;
};

template <>
struct RealTraits<double> {
  using Element = double;
  using Bits = int64_t;
  using UnsignedBits = uint64_t;
};

template <class Real>
using Element = typename RealTraits<Real>::Element;

template <class Real>
using Bits = typename RealTraits<Real>::Bits;

template <class Real>
using UnsignedBits = typename RealTraits<Real>::UnsignedBits;

template <class To, class From>
FUSEDLOSS_HOST_DEVICE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast reads the same bytes as another type");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

// The same number in every lane. A sum with zero is the one spelling that GCC and Clang take for scalars and vectors.
template <class Real>
FUSEDLOSS_HOST_DEVICE Real splat(Element<Real> value) {
  return value + Real{};
}

// The second where one of the two is NaN. simd.h has both for vectors of float.
template <class Real>
FUSEDLOSS_HOST_DEVICE Real maximum(Real a, Real b) {
  return a > b ? a : b;
}

template <class Real>
FUSEDLOSS_HOST_DEVICE Real minimum(Real a, Real b) {
  return a < b ? a : b;
}

}  // namespace fusedloss::math
