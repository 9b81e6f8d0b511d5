// exp and log as branch-free polynomials, so that a loop over them becomes vector code at every instruction-set level.
//
// The standard library's versions are calls per number; 44 million of them are the whole time of a loss. The
// coefficients are minimax fits on the reduced range, made with mpmath; their errors stand beside them.
#pragma once

#include "math/real.h"

namespace fusedloss::math {

// The coefficients are functions, because device code may use a constant array only where it is declared in place.
template <class E>
struct ElementaryConstants;

template <>
struct ElementaryConstants<float> {
  static constexpr float log2_e = 1.44269504088896341f;
  static constexpr float ln2_high = 6.9313812256e-01f;  // trailing zeros: exponent * ln2_high is exact
  static constexpr float ln2_low = 9.0580006145e-06f;
  static constexpr float infinity = __builtin_inff();
  static constexpr float lowest = -__FLT_MAX__;
  // Adding 1.5 * 2^mantissa_bits rounds to an integer and leaves that integer in the low bits.
  static constexpr float round_magic = 12582912.0f;
  static constexpr int mantissa_bits = 23;
  static constexpr float exponent_floor = -127.0f;      // 2^-127 built from exponent bits alone is exactly 0
  static constexpr float exp_floor = -88.0296919311f;   // exponent_floor ln 2
  static constexpr float exp_ceiling = 88.7228391117f;  // 128 ln 2
  static constexpr int32_t sqrt_half_bits = 0x3f3504f3;
  // 2^f on [-1/2, 1/2], lowest order first; relative error 2e-9.
  static constexpr int exp2_degree = 6;
  FUSEDLOSS_HOST_DEVICE static constexpr float exp2_coefficient(int k) {
    constexpr float values[7] = {1.0f,
                                 0.6931472028559701f,
                                 0.24022647913498202f,
                                 0.055503324696931644f,
                                 0.009618437366505061f,
                                 0.0013398874866911f,
                                 0.00015353360507637f};
    return values[k];
  }
  // log((1 + s) / (1 - s)) = 2 s + s R(s^2); FreeBSD's e_logf.c gives the fit and its error, 2^-34.
  static constexpr int log_terms = 4;
  FUSEDLOSS_HOST_DEVICE static constexpr float log_coefficient(int k) {
    constexpr float values[4] = {0.66666662693f, 0.40000972152f, 0.28498786688f, 0.24279078841f};
    return values[k];
  }
  // atanh(s) = s + s z P(z), z = s^2 in [0, 1/9]; relative error 2^-27.
  static constexpr int atanh_degree = 3;
  FUSEDLOSS_HOST_DEVICE static constexpr float atanh_coefficient(int k) {
    constexpr float values[4] = {0.333332081429f, 0.200107636146f, 0.140009027093f, 0.140059930865f};
    return values[k];
  }
};

template <>
struct ElementaryConstants<double> {
  static constexpr double log2_e = 1.44269504088896340736;
  static constexpr double ln2_high = 6.93147180369123816490e-01;
  static constexpr double ln2_low = 1.90821492927058770002e-10;
  static constexpr double infinity = __builtin_inf();
  static constexpr double lowest = -__DBL_MAX__;
  static constexpr double round_magic = 6755399441055744.0;
  static constexpr int mantissa_bits = 52;
  static constexpr double exponent_floor = -1023.0;
  static constexpr double exp_floor = -709.089565712824051;
  static constexpr double exp_ceiling = 709.782712893383996;
  static constexpr int64_t sqrt_half_bits = 0x3fe6a09e667f3bcd;
  // Relative error 3e-18.
  static constexpr int exp2_degree = 11;
  FUSEDLOSS_HOST_DEVICE static constexpr double exp2_coefficient(int k) {
    constexpr double values[12] = {1.0,
                                   0.6931471805599453,
                                   0.24022650695910158,
                                   0.055504108664821625,
                                   0.009618129107587256,
                                   0.001333355814640647,
                                   0.00015403530463724353,
                                   1.5252733841556773e-05,
                                   1.3215432535912375e-06,
                                   1.0178057087733941e-07,
                                   7.074194297288521e-09,
                                   4.4558179083360645e-10};
    return values[k];
  }
  // FreeBSD's e_log.c, error 2^-58.
  static constexpr int log_terms = 7;
  FUSEDLOSS_HOST_DEVICE static constexpr double log_coefficient(int k) {
    constexpr double values[7] = {6.666666666666735130e-01, 3.999999999940941908e-01, 2.857142874366239149e-01,
                                  2.222219843214978396e-01, 1.818357216161805012e-01, 1.531383769920937332e-01,
                                  1.479819860511658591e-01};
    return values[k];
  }
};

template <class Real>
using Constants = ElementaryConstants<Element<Real>>;

// e^x; infinite at exp_ceiling (for which nothing larger may be given), exactly 0 from exp_floor down, NaN for NaN. The
// product with log2(e) costs up to |x| / 2 units in the last place, which in a probability e^x <= 1 is an absolute
// error below the dtype's rounding of 1.
template <class Real>
FUSEDLOSS_HOST_DEVICE Real exp(Real x) {
  using K = Constants<Real>;
#if defined(__CUDA_ARCH__)
  // The hardware has one instruction for 2^t, with an error of two units in the last place. exp2f() would spend four
  // more on results below 2^-126, which are 0 here.
  if constexpr (sizeof(Real) == sizeof(float)) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * K::log2_e));
    return power;
  }
#endif
  x = maximum<Real>(splat<Real>(K::exp_floor), x);                     // the second where one is NaN
  const Real magic = splat<Real>(K::round_magic - K::exponent_floor);  // with the bias of the exponent
  const Real shifted = x * K::log2_e + magic;
  const Real fraction = x * K::log2_e - (shifted - magic);  // in [-1/2, 1/2]
  Real power = splat<Real>(K::exp2_coefficient(K::exp2_degree));
  for (int k = K::exp2_degree - 1; k >= 0; --k) power = power * fraction + K::exp2_coefficient(k);
  // The low bits of `shifted`, moved up into the exponent, are 2^integer part. A product and not a sum of bits: of a
  // NaN the low bits are anything, and a sum could turn it into a number.
  using U = UnsignedBits<Real>;
  return power * bit_cast<Real>(bit_cast<U>(shifted) << K::mantissa_bits);
}

// Natural logarithm of a normal positive number, of 0 (-inf), of infinity and of NaN. Not for negative or denormal
// numbers.
template <class Real>
FUSEDLOSS_HOST_DEVICE Real log(Real x) {
  using K = Constants<Real>;
  using B = Bits<Real>;
  const B bits = bit_cast<B>(x);
  const B exponent = (bits - K::sqrt_half_bits) >> K::mantissa_bits;  // so that the mantissa is in [sqrt(1/2), sqrt(2))
  using U = UnsignedBits<Real>;
  const Real mantissa = bit_cast<Real>(bit_cast<U>(bits) - (bit_cast<U>(exponent) << K::mantissa_bits));
  // An integer becomes a floating-point number by the same addition that exp takes apart.
  const Real e = bit_cast<Real>(bit_cast<B>(splat<Real>(K::round_magic)) + exponent) - K::round_magic;

  const Real f = mantissa - Element<Real>(1);
  const Real s = f / (f + Element<Real>(2));
  const Real z = s * s;
  Real r = splat<Real>(K::log_coefficient(K::log_terms - 1));
  for (int k = K::log_terms - 2; k >= 0; --k) r = r * z + K::log_coefficient(k);
  r = r * z;
  const Real half_square = f * f * Element<Real>(0.5);
  const Real value = e * K::ln2_high + (f - (half_square - (s * (half_square + r) + e * K::ln2_low)));

  const Real infinity = splat<Real>(K::infinity);
  const Real zero = Real{};
  return x == zero ? -infinity : (x < infinity ? value : x);
}

// log(1 + t) for t in [0, 1], with all digits where t is small; NaN for NaN.
template <class Real>
FUSEDLOSS_HOST_DEVICE Real log1p(Real t) {
  using K = Constants<Real>;
  if constexpr (sizeof(Element<Real>) == sizeof(float)) {
    // log(1 + t) = 2 atanh(t / (2 + t)): half of the instructions of the logarithm, which takes its argument apart.
    const Real s = t / (t + Element<Real>(2));
    const Real z = s * s;
    Real p = splat<Real>(K::atanh_coefficient(K::atanh_degree));
    for (int k = K::atanh_degree - 1; k >= 0; --k) p = p * z + K::atanh_coefficient(k);
    const Real twice = s + s;
    return twice * (z * p) + twice;
  } else {
    // In double that polynomial is as long as all of log. What the sum has lost of t comes back to first order.
    const Real one = splat<Real>(Element<Real>(1));
    const Real sum = one + t;
    return log<Real>(sum) + (t - (sum - one)) / sum;
  }
}

}  // namespace fusedloss::math
