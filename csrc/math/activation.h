// From logits to probabilities, and back with a gradient.
//
//   softmax  p_c = exp(z_c - m) / S     dz_c = p_c (g_c - sum_k g_k p_k)     with g = dL/dp
//   sigmoid  p   = 1 / (1 + exp(-z))    dz   = p (1 - p) g
//
// Binary cross-entropy belongs to the sigmoid, because its value needs the same exponential:
//
//   value      BCE  = w+ y softplus(-z) + (1 - y) softplus(z),   softplus(z) = max(z, 0) + log(1 + exp(-|z|))
//   derivative dz   = (1 - y) p - w+ y (1 - p)
//              dy   = w+ softplus(-z) - softplus(z)
#pragma once

#include "math/elementary.h"

namespace fusedloss::math {

// What a logit's exponential exp(-|z|) gives.
template <class Real>
struct Sigmoid {
  Real probability;
  Real complement;  // 1 - p, with all its digits where p is almost 1
  Real log1p;       // log(1 + exp(-|z|))
};

// One division for both p and 1 - p, since it is the slowest step. The quotient is p, so that p is as good as it can
// be: a minimum with labels of few bits sees its last one.

// Without log1p, which is left 0.
template <class Real>
FUSEDLOSS_HOST_DEVICE Sigmoid<Real> sigmoid(Real logit) {
  using K = Constants<Real>;
  const Real one = splat<Real>(Element<Real>(1));
  // exp(-z), infinite below about -88 (float) or -709: then p is 0 and exp(-z) p is NaN, which minimum() makes 1.
  const Real t = exp<Real>(minimum<Real>(splat<Real>(K::exp_ceiling), -logit));
  Sigmoid<Real> result;
  result.probability = one / (one + t);
  result.complement = minimum<Real>(t * result.probability, one);
  result.log1p = Real{};
  return result;
}

template <class Real>
FUSEDLOSS_HOST_DEVICE Sigmoid<Real> sigmoid_with_log(Real logit) {
  const Real one = splat<Real>(Element<Real>(1));
  const Real zero = Real{};
  const Real t = exp<Real>(minimum<Real>(logit, -logit));  // in (0, 1]
  Sigmoid<Real> result;
  result.probability = (logit < zero ? t : one) / (one + t);
  result.complement = logit < zero ? one - result.probability : t * result.probability;
  result.log1p = log1p<Real>(t);
  return result;
}

template <class Real>
FUSEDLOSS_HOST_DEVICE Real binary_cross_entropy(const Sigmoid<Real>& s, Real logit, Real label,
                                                Element<Real> pos_weight) {
  const Real zero = Real{};
  const Real positive = maximum<Real>(-logit, zero) + s.log1p;  // softplus(-z)
  const Real negative = maximum<Real>(logit, zero) + s.log1p;   // softplus(z)
  return pos_weight * label * positive + (Element<Real>(1) - label) * negative;
}

template <class Real>
FUSEDLOSS_HOST_DEVICE Real binary_cross_entropy_logit_gradient(const Sigmoid<Real>& s, Real label,
                                                               Element<Real> pos_weight) {
  return (Element<Real>(1) - label) * s.probability - pos_weight * label * s.complement;
}

template <class Real>
FUSEDLOSS_HOST_DEVICE Real binary_cross_entropy_label_gradient(const Sigmoid<Real>& s, Real logit,
                                                               Element<Real> pos_weight) {
  const Real zero = Real{};
  return pos_weight * (maximum<Real>(-logit, zero) + s.log1p) - (maximum<Real>(logit, zero) + s.log1p);
}

}  // namespace fusedloss::math
