// Vectors of the width of this file's instruction-set level, as GCC/Clang vector types: the same source for every
// level.
//
// Nothing in this folder's level-compiled files may have external linkage but the kernel table: an inline function
// compiled for AVX-512 could be the copy that the linker keeps for all. Hence the anonymous namespaces.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/dtype.h"
#include "math/elementary.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fusedloss::cpu::FUSEDLOSS_LEVEL {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;  // SSE2, NEON
#endif

template <class E, int kBytes = kVectorBytes>
struct VectorOf {
  typedef E Type __attribute__((vector_size(kBytes)));
  // For memory: any alignment (pairs of two-byte numbers are read as words), may alias.
  typedef E Memory __attribute__((vector_size(kBytes), aligned(1), may_alias));
};

template <class E>
using Vector = typename VectorOf<E>::Type;

// Lanes of a vector of the compute type.
template <class A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

}  // namespace
}  // namespace fusedloss::cpu::FUSEDLOSS_LEVEL

namespace fusedloss::math {
template <>
struct RealTraits<cpu::FUSEDLOSS_LEVEL::Vector<float>> {
  using Element = float;
  using Bits = cpu::FUSEDLOSS_LEVEL::Vector<int32_t>;
  using UnsignedBits = cpu::FUSEDLOSS_LEVEL::Vector<uint32_t>;
};
template <>
struct RealTraits<cpu::FUSEDLOSS_LEVEL::Vector<double>> {
  using Element = double;
  using Bits = cpu::FUSEDLOSS_LEVEL::Vector<int64_t>;
  using UnsignedBits = cpu::FUSEDLOSS_LEVEL::Vector<uint64_t>;
};

// GCC 12 makes a comparison and a blend of `a > b ? a : b`; one instruction means the same, NaN and zeros included.
#if defined(__AVX512F__)  // the masked forms: the plain ones make GCC 12 warn about its own header
template <>
FUSEDLOSS_HOST_DEVICE cpu::FUSEDLOSS_LEVEL::Vector<float> maximum(cpu::FUSEDLOSS_LEVEL::Vector<float> a,
                                                                  cpu::FUSEDLOSS_LEVEL::Vector<float> b) {
  return _mm512_maskz_max_ps(0xffff, a, b);
}
template <>
FUSEDLOSS_HOST_DEVICE cpu::FUSEDLOSS_LEVEL::Vector<float> minimum(cpu::FUSEDLOSS_LEVEL::Vector<float> a,
                                                                  cpu::FUSEDLOSS_LEVEL::Vector<float> b) {
  return _mm512_maskz_min_ps(0xffff, a, b);
}
#elif defined(__AVX2__)
template <>
FUSEDLOSS_HOST_DEVICE cpu::FUSEDLOSS_LEVEL::Vector<float> maximum(cpu::FUSEDLOSS_LEVEL::Vector<float> a,
                                                                  cpu::FUSEDLOSS_LEVEL::Vector<float> b) {
  return _mm256_max_ps(a, b);
}
template <>
FUSEDLOSS_HOST_DEVICE cpu::FUSEDLOSS_LEVEL::Vector<float> minimum(cpu::FUSEDLOSS_LEVEL::Vector<float> a,
                                                                  cpu::FUSEDLOSS_LEVEL::Vector<float> b) {
  return _mm256_min_ps(a, b);
}
#endif

#if defined(__AVX2__)
// As the general one, with as many bits of the fraction as a vector can look up from a table in a register: three or
// four coefficients in place of six. The polynomial's error is 2e-9; the table's entries are rounded. Between exp_floor
// and -126 ln 2 the result is off by up to 2^-127.
template <>
FUSEDLOSS_HOST_DEVICE cpu::FUSEDLOSS_LEVEL::Vector<float> exp(cpu::FUSEDLOSS_LEVEL::Vector<float> x) {
  using V = cpu::FUSEDLOSS_LEVEL::Vector<float>;
  using U = UnsignedBits<V>;
  using K = Constants<V>;
  // Bits of 2^(j / 16) or 2^(j / 8), less those that j itself adds below: `shifted` moved up holds it beside the
  // exponent.
#if defined(__AVX512F__)
  constexpr int table_bits = 4, degree = 3;
  constexpr float coefficients[degree + 1] = {1.0f, 0.69314718f, 0.24023429f, 0.05550515f};  // for |fraction| <= 1/32
  const U table = {0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f,
                   0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c, 0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d};
  const auto look_up = [&](U place) {
    return (U)_mm512_maskz_permutexvar_epi32(0xffff, (__m512i)place, (__m512i)table);
  };
#else
  constexpr int table_bits = 3, degree = 4;
  constexpr float coefficients[degree + 1] = {1.0f, 0.69314718f, 0.24022651f, 0.05550411f, 0.00961813f};  // <= 1/16
  const U table = {0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};
  const auto look_up = [&](U place) { return (U)_mm256_permutevar8x32_epi32((__m256i)table, (__m256i)place); };
#endif
  x = maximum<V>(splat<V>(K::exp_floor), x);
  const V magic = splat<V>(K::round_magic / (1 << table_bits));  // rounds to a step of the table
  const V shifted = x * K::log2_e + magic;
  const V fraction = x * K::log2_e - (shifted - magic);
  const U bits = bit_cast<U>(shifted);
  const U power = look_up(bits) + (bits << (K::mantissa_bits - table_bits));
  V value = splat<V>(coefficients[degree]);
  for (int k = degree - 1; k >= 0; --k) value = value * fraction + coefficients[k];
  value = value * bit_cast<V>(power);  // a product for the sake of NaN, as in the general one
  // A sum that is all that becomes of it must not be fused with it: a loss would have other bits without a gradient.
  asm("" : "+v"(value));
  return value;
}
#endif
}  // namespace fusedloss::math

namespace fusedloss::cpu::FUSEDLOSS_LEVEL {
namespace {

using math::splat;

// ---------------------------------------------------------------------------------------------------------------------
// Two-byte floating-point numbers <-> float, lane by lane, in integer arithmetic: vectorizes at every level.

// U: a vector of uint32_t, or uint32_t.
template <class U>
FUSEDLOSS_HOST_DEVICE U bfloat16_to_float_bits(U bits) {
  return bits << 16;
}

// The upper half is the bfloat16. Round to nearest even; NaN stays NaN (a plain round-up could carry a NaN's mantissa
// over into infinity). V: a vector of float, or float; U: the same of uint32_t.
template <class V, class U>
FUSEDLOSS_HOST_DEVICE U round_to_bfloat16(V value) {
  const U bits = math::bit_cast<U>(value);
  const U rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const U not_a_number = value == value ? U{} : ~U{};
  return rounded | not_a_number;
}

// The same. kPlain: no NaN has bits set in its lower half. Then one instruction does in place of six; to those bits it
// could carry through all of the number. A tie goes away from zero, which is as near.
template <bool kPlain>
FUSEDLOSS_HOST_DEVICE Vector<uint32_t> round_to_bfloat16(Vector<float> value) {
  if constexpr (kPlain) return math::bit_cast<Vector<uint32_t>>(value) + 0x8000u;
  return round_to_bfloat16<Vector<float>, Vector<uint32_t>>(value);
}

// A NaN becomes one that is plain in that sense.
template <class A>
FUSEDLOSS_HOST_DEVICE A plain_nan(A value) {
  return value == value ? value : static_cast<A>(__builtin_nan(""));
}

// V, U: as above.
template <class V, class U>
FUSEDLOSS_HOST_DEVICE U float16_to_float_bits(U half) {
  const U sign = (half & 0x8000u) << 16;
  const U magnitude = (half & 0x7fffu) << 13;
  // The exponent is 112 too small; a product mends it for denormal numbers too.
  const V scaled = math::bit_cast<V>(magnitude) * 5.192296858534828e+33f;  // 2^112
  const U special = magnitude | 0x7f800000u;                               // infinity and NaN
  return sign | (magnitude >= 0x0f800000u ? special : math::bit_cast<U>(scaled));
}

template <class V, class U>
FUSEDLOSS_HOST_DEVICE U float_bits_to_float16(U bits) {
  const U sign = (bits >> 16) & 0x8000u;
  const U magnitude = bits & 0x7fffffffu;
  // Normal results: round to nearest even at bit 13, then move the exponent by 112.
  const U normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 1/2 makes the hardware round at the last bit of a denormal half.
  const U denormal = math::bit_cast<U>(V(math::bit_cast<V>(magnitude) + 0.5f)) - 0x3f000000u;
  const U infinity = bits * 0u + 0x7c00u;
  const U nan = bits * 0u + 0x7e00u;
  U result = magnitude < 0x38800000u ? denormal : normal;
  result = magnitude >= 0x47800000u ? infinity : result;  // 65536 and above; 65520..65535 round up to 0x7c00 above
  result = magnitude > 0x7f800000u ? nan : result;
  return sign | result;
}

// ---------------------------------------------------------------------------------------------------------------------
// Loads and stores of one vector of the compute type.

template <class T>
FUSEDLOSS_HOST_DEVICE Vector<ComputeType<T>> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::Memory*>(p);
}

typedef VectorOf<uint16_t, kVectorBytes / 2>::Type HalfBits;
typedef VectorOf<uint16_t, kVectorBytes / 2>::Memory HalfMemory;

// From and to the bits of a vector in memory; the pointer says of which type.
FUSEDLOSS_HOST_DEVICE Vector<float> widen(Vector<float> value, const float*) { return value; }
FUSEDLOSS_HOST_DEVICE Vector<double> widen(Vector<double> value, const double*) { return value; }
FUSEDLOSS_HOST_DEVICE Vector<float> narrow(Vector<float> value, const float*) { return value; }
FUSEDLOSS_HOST_DEVICE Vector<double> narrow(Vector<double> value, const double*) { return value; }

FUSEDLOSS_HOST_DEVICE Vector<float> widen(HalfBits half, const BFloat16*) {
#if defined(__AVX512F__)  // one permutation that leaves zeros between; a conversion wants a shift besides
  typedef VectorOf<uint16_t>::Type Words;
  Words place;
  for (int i = 0; i < 32; ++i) place[i] = static_cast<uint16_t>(i / 2);
  const __m512i bits = _mm512_castsi256_si512((__m256i)half);
  return (Vector<float>)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, (__m512i)place, bits);
#elif defined(__AVX2__)
  const __m256i bits = _mm256_cvtepu16_epi32((__m128i)half);
  return math::bit_cast<Vector<float>>(bfloat16_to_float_bits((Vector<uint32_t>)bits));
#else
  return math::bit_cast<Vector<float>>(bfloat16_to_float_bits(__builtin_convertvector(half, Vector<uint32_t>)));
#endif
}

FUSEDLOSS_HOST_DEVICE Vector<float> widen(HalfBits half, const Float16*) {
#if defined(__AVX512F__)  // the masked forms: the plain ones make GCC 12 warn about its own header
  return (Vector<float>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)half);
#elif defined(__F16C__)
  return (Vector<float>)_mm256_cvtph_ps((__m128i)half);
#else
  return math::bit_cast<Vector<float>>(
      float16_to_float_bits<Vector<float>>(__builtin_convertvector(half, Vector<uint32_t>)));
#endif
}

FUSEDLOSS_HOST_DEVICE HalfBits narrow(Vector<float> value, const BFloat16*) {
  return __builtin_convertvector(round_to_bfloat16<Vector<float>, Vector<uint32_t>>(value) >> 16, HalfBits);
}

FUSEDLOSS_HOST_DEVICE HalfBits narrow(Vector<float> value, const Float16*) {
#if defined(__AVX512F__)
  return (HalfBits)_mm512_maskz_cvtps_ph(0xffff, (__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return (HalfBits)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  return __builtin_convertvector(float_bits_to_float16<Vector<float>>(math::bit_cast<Vector<uint32_t>>(value)),
                                 HalfBits);
#endif
}

template <>
FUSEDLOSS_HOST_DEVICE Vector<float> load(const BFloat16* p) {
  return widen(*reinterpret_cast<const HalfMemory*>(p), p);
}

template <>
FUSEDLOSS_HOST_DEVICE Vector<float> load(const Float16* p) {
  return widen(*reinterpret_cast<const HalfMemory*>(p), p);
}

template <class T>
FUSEDLOSS_HOST_DEVICE void store(T* p, Vector<ComputeType<T>> value) {
  *reinterpret_cast<typename VectorOf<T>::Memory*>(p) = value;
}

template <>
FUSEDLOSS_HOST_DEVICE void store(BFloat16* p, Vector<float> value) {
  *reinterpret_cast<HalfMemory*>(p) = narrow(value, p);
}

template <>
FUSEDLOSS_HOST_DEVICE void store(Float16* p, Vector<float> value) {
  *reinterpret_cast<HalfMemory*>(p) = narrow(value, p);
}

// Store past the caches, for an output that is not read again soon: saves reading the line before it is overwritten,
// a third of the backward pass on memory (docs/performance.md). Needs p aligned to the bytes written, and
// streaming_fence() before another thread reads. Intrinsics, because GCC has no portable spelling.
#if defined(__AVX2__)
constexpr bool kCanStream = true;
#else
constexpr bool kCanStream = false;
#endif

typedef Vector<uint32_t> Bits;

// A whole vector of bits of numbers of any type; streamed, p is aligned to kVectorBytes.
template <bool kStream>
FUSEDLOSS_HOST_DEVICE void store_bits(void* p, Bits value) {
#if defined(__AVX512F__)
  if constexpr (kStream) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)value);
#elif defined(__AVX2__)
  if constexpr (kStream) return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)value);
#endif
  *reinterpret_cast<VectorOf<uint32_t>::Memory*>(p) = value;
}

template <class T>
FUSEDLOSS_HOST_DEVICE void store_streaming(T* p, Vector<ComputeType<T>> value) {
  if constexpr (sizeof(T) == sizeof(ComputeType<T>)) return store_bits<true>(p, (Bits)value);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2) _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)narrow(value, p));
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 2) _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)narrow(value, p));
#else
  if constexpr (sizeof(T) == 2) store(p, value);
#endif
}

// Two vectors side by side. Streamed, p is aligned to kVectorBytes. kPlain: of round_to_bfloat16().
template <class T, bool kStream, bool kPlain>
FUSEDLOSS_HOST_DEVICE void store_two(T* p, Vector<ComputeType<T>> first, Vector<ComputeType<T>> second) {
#if defined(__AVX2__)
  if constexpr (std::is_same_v<T, BFloat16>) {
    const Vector<uint32_t> low = round_to_bfloat16<kPlain>(first);
    const Vector<uint32_t> high = round_to_bfloat16<kPlain>(second);
#if defined(__AVX512F__)  // both upper halves by one permutation, and no shifts
    typedef VectorOf<uint16_t>::Type Words;
    Words odd;
    for (int i = 0; i < 32; ++i) odd[i] = static_cast<uint16_t>(2 * i + 1);
    store_bits<kStream>(p, (Bits)_mm512_permutex2var_epi16((__m512i)low, (__m512i)odd, (__m512i)high));
#else  // the pack goes half by half, which the permutation mends
    const __m256i packed = _mm256_packus_epi32((__m256i)(low >> 16), (__m256i)(high >> 16));
    store_bits<kStream>(p, (Bits)_mm256_permute4x64_epi64(packed, 0b11011000));
#endif
    return;
  }
#endif
  constexpr int lanes = kLanes<ComputeType<T>>;
  if constexpr (kStream) {
    store_streaming<T>(p, first);
    store_streaming<T>(p + lanes, second);
  } else {
    store<T>(p, first);
    store<T>(p + lanes, second);
  }
}

// A vector of pairs of two-byte numbers, each pair in a word: the numbers at even places and those at odd ones. Of
// bfloat16 each of the two takes one instruction, where two vectors side by side take two. The pointer says the type.
FUSEDLOSS_HOST_DEVICE void split_pairs(Bits pairs, Vector<float>& even, Vector<float>& odd, const BFloat16*) {
  even = math::bit_cast<Vector<float>>(bfloat16_to_float_bits(pairs));
  odd = math::bit_cast<Vector<float>>(pairs & 0xffff0000u);
}

FUSEDLOSS_HOST_DEVICE void split_pairs(Bits pairs, Vector<float>& even, Vector<float>& odd, const Float16* type) {
  even = widen(__builtin_convertvector(pairs, HalfBits), type);
  odd = widen(__builtin_convertvector(pairs >> 16, HalfBits), type);
}

// kPlain: of round_to_bfloat16().
template <bool kPlain>
FUSEDLOSS_HOST_DEVICE Bits join_pairs(Vector<float> even, Vector<float> odd, const BFloat16*) {
  return (round_to_bfloat16<kPlain>(even) >> 16) | (round_to_bfloat16<kPlain>(odd) & 0xffff0000u);
}

template <bool kPlain>
FUSEDLOSS_HOST_DEVICE Bits join_pairs(Vector<float> even, Vector<float> odd, const Float16* type) {
  return __builtin_convertvector(narrow(even, type), Bits) | (__builtin_convertvector(narrow(odd, type), Bits) << 16);
}

FUSEDLOSS_HOST_DEVICE void load_even_odd(const BFloat16* p, Vector<float>& even, Vector<float>& odd) {
  split_pairs(*reinterpret_cast<const VectorOf<uint32_t>::Memory*>(p), even, odd, p);
}

// Numbers that are plain for round_to_bfloat16().
template <bool kStream>
FUSEDLOSS_HOST_DEVICE void store_even_odd(BFloat16* p, Vector<float> even, Vector<float> odd) {
  store_bits<kStream>(p, join_pairs<true>(even, odd, p));
}

// What a block reads is asked for while the block so many before it is computed: the arithmetic in between is time to
// fetch it in, and the hardware's prefetcher, a few lines ahead, leaves it unused. One block is too little time, as a
// core waits for few lines at once.
constexpr int64_t kBlocksAhead = 3;

// Asks for the line at p, into the L2 cache: the L1 cache is full of the block at hand, which would have to give way.
// An address past the end is no fault.
FUSEDLOSS_HOST_DEVICE void ask_for(const void* p) { __builtin_prefetch(p, /*rw=*/0, /*locality=*/2); }

// Asks for what a later block reads where this one reads `count` numbers from p on.
template <class T>
FUSEDLOSS_HOST_DEVICE void ask_ahead(const T* p, int64_t count) {
  constexpr int64_t kLineBytes = 64;
  const char* const from = reinterpret_cast<const char*>(p + kBlocksAhead * count);
  for (int64_t at = 0; at < count * static_cast<int64_t>(sizeof(T)); at += kLineBytes) ask_for(from + at);
}

// Outputs from this size on are streamed: about a core's share of the last-level cache.
constexpr int64_t kStreamingBytes = int64_t{4} << 20;

// Copies `count` numbers past the caches; `to` is aligned to kVectorBytes.
template <class T>
FUSEDLOSS_HOST_DEVICE void stream_copy(T* to, const T* from, int64_t count) {
  constexpr int step = kVectorBytes / static_cast<int>(sizeof(T));
  int64_t i = 0;
  for (; i + step <= count; i += step) {
    store_bits<true>(to + i, *reinterpret_cast<const VectorOf<uint32_t>::Memory*>(from + i));
  }
  for (; i < count; ++i) to[i] = from[i];
}

FUSEDLOSS_HOST_DEVICE void streaming_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

FUSEDLOSS_HOST_DEVICE bool streaming_aligned(const void* p, uintptr_t bytes = kVectorBytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

// The first `count` lanes; the others are `fill` (load) or left alone (store). For the tail of a row.
// Not inlined: tails are rare, and dozens of copies of them would double the size of the library.
template <class T>
__attribute__((noinline)) Vector<ComputeType<T>> load_partial(const T* p, int count, ComputeType<T> fill) {
  constexpr int lanes = kLanes<ComputeType<T>>;
  T buffer[lanes] = {};
  for (int i = 0; i < count; ++i) buffer[i] = p[i];
  Vector<ComputeType<T>> value = load<T>(buffer);
  for (int i = count; i < lanes; ++i) value[i] = fill;
  return value;
}

template <class T>
__attribute__((noinline)) void store_partial(T* p, Vector<ComputeType<T>> value, int count) {
  T buffer[kLanes<ComputeType<T>>];
  store<T>(buffer, value);
  for (int i = 0; i < count; ++i) p[i] = buffer[i];
}

// One number.
template <class T>
FUSEDLOSS_HOST_DEVICE ComputeType<T> load_one(const T* p) {
  return *p;
}
template <>
FUSEDLOSS_HOST_DEVICE float load_one(const BFloat16* p) {
  return math::bit_cast<float>(bfloat16_to_float_bits<uint32_t>(p->bits));
}
template <>
FUSEDLOSS_HOST_DEVICE float load_one(const Float16* p) {
  return math::bit_cast<float>(float16_to_float_bits<float, uint32_t>(p->bits));
}

template <class T>
FUSEDLOSS_HOST_DEVICE void store_one(T* p, ComputeType<T> value) {
  *p = value;
}
template <>
FUSEDLOSS_HOST_DEVICE void store_one(BFloat16* p, float value) {
  p->bits = static_cast<uint16_t>(round_to_bfloat16<float, uint32_t>(value) >> 16);
}
template <>
FUSEDLOSS_HOST_DEVICE void store_one(Float16* p, float value) {
  p->bits = static_cast<uint16_t>(float_bits_to_float16<float, uint32_t>(math::bit_cast<uint32_t>(value)));
}

// The lanes in which two vectors hold the same integer, as bits.
template <class A>
FUSEDLOSS_HOST_DEVICE uint32_t equal_lanes(math::Bits<Vector<A>> a, math::Bits<Vector<A>> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) return _mm512_cmpeq_epi32_mask((__m512i)a, (__m512i)b);
  return _mm512_cmpeq_epi64_mask((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4) return _mm256_movemask_ps((__m256)(a == b));
  return _mm256_movemask_pd((__m256d)(a == b));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes<A>; ++i) bits |= static_cast<uint32_t>(a[i] == b[i]) << i;
  return bits;
#endif
}

// By halves: one after the other, each addition would wait for the last.
template <class V>
FUSEDLOSS_HOST_DEVICE double sum_halves(V value) {
  using E = std::remove_reference_t<decltype(value[0])>;
  if constexpr (sizeof(V) == 2 * sizeof(E)) {
    return static_cast<double>(value[0]) + static_cast<double>(value[1]);
  } else {
    constexpr int half = sizeof(V) / sizeof(E) / 2;
    typename VectorOf<E, sizeof(V) / 2>::Type halves[2];
    __builtin_memcpy(halves, &value, sizeof(V));
    typedef typename VectorOf<double, half* static_cast<int>(sizeof(double))>::Type Sum;
    return sum_halves(Sum(__builtin_convertvector(halves[0], Sum) + __builtin_convertvector(halves[1], Sum)));
  }
}

template <class A>
FUSEDLOSS_HOST_DEVICE double sum_lanes(Vector<A> value) {
  return sum_halves(value);
}

template <class A>
FUSEDLOSS_HOST_DEVICE A maximum_lane(Vector<A> value) {
  A result = value[0];
  for (int i = 1; i < kLanes<A>; ++i) result = math::maximum(result, value[i]);
  return result;
}

}  // namespace
}  // namespace fusedloss::cpu::FUSEDLOSS_LEVEL
