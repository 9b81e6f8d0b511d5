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

// with_log: whether log1p is wanted.
template <bool kLog, class Real>
FUSEDLOSS_HOST_DEVICE Sigmoid<Real> sigmoid(Real logit) {
  const Real one = splat<Real>(Element<Real>(1));
  const Real zero = Real{};
  const Real t = exp<Real>(logit < zero ? logit : -logit);  // in (0, 1]
  const Real sum = one + t;
  Sigmoid<Real> result;
  // One division, which is half of the time of this function. The quotient is p, so that p is as good as it can be: a
  // minimum with labels of few bits sees its last one.
  result.probability = (logit < zero ? t : one) / sum;
  result.complement = logit < zero ? one - result.probability : t * result.probability;
  if constexpr (kLog) {
    // What the sum has lost of t comes back to first order.
    result.log1p = log<Real>(sum) + (t - (sum - one)) / sum;
  } else {
    result.log1p = zero;
  }
  return result;
}

template <class Real>
FUSEDLOSS_HOST_DEVICE Real binary_cross_entropy(const Sigmoid<Real>& s, Real logit, Real label,
                                                Element<Real> pos_weight) {
  const Real zero = Real{};
  const Real positive = (logit < zero ? -logit : zero) + s.log1p;  // softplus(-z)
  const Real negative = (logit > zero ? logit : zero) + s.log1p;   // softplus(z)
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
  return pos_weight * ((logit < zero ? -logit : zero) + s.log1p) - ((logit > zero ? logit : zero) + s.log1p);
}

}  // namespace fusedloss::math
