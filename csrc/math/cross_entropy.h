// Cross-entropy of one pixel: value and derivatives side by side. docs/derivations/cross_entropy.md derives them.
//
//   logits z (C), weights w (C), smoothed label y~ = (1 - e) y + e / C, maximum m = max z, S = sum exp(z_c - m)
//
//   value      CE     = sum_c w_c y~_c (log S - (z_c - m))  =  a log S - b
//                       with  a = sum_c w_c y~_c  and  b = sum_c w_c y~_c (z_c - m)
//   derivative dz_c   = a p_c - w_c y~_c,                p_c = exp(z_c - m) / S
//              dy_c   = (1 - e) w_c (log S - (z_c - m))
//
// Everything is written relative to the maximum: z_c - m is exact or nearly so, while log S + m would lose
// log S's digits for large logits.
#pragma once

#include "math/elementary.h"

namespace fusedloss::math {

// How label smoothing splits a label's weight: `label` for the labelled class, `every` for each class.
template <class E>
struct Smoothing {
  E label;  // 1 - e
  E every;  // e / C
};

template <class Real>
FUSEDLOSS_HOST_DEVICE Real exp_shifted(Real logit, Real maximum) {
  return exp<Real>(logit - maximum);
}

template <class Real>
FUSEDLOSS_HOST_DEVICE Real cross_entropy(Real a, Real b, Real log_sum) {
  return a * log_sum - b;
}

// a and b when the label is a class index: label_weight is w_y, all_weights is sum_c w_c,
// all_logits is sum_c w_c (z_c - m) (both read only where smoothing is on).
template <class Real>
FUSEDLOSS_HOST_DEVICE Real index_label_a(Smoothing<Real> smoothing, Real label_weight, Real all_weights) {
  return smoothing.label * label_weight + smoothing.every * all_weights;
}
template <class Real>
FUSEDLOSS_HOST_DEVICE Real index_label_b(Smoothing<Real> smoothing, Real label_weight, Real label_logit,
                                         Real all_logits) {
  return smoothing.label * label_weight * label_logit + smoothing.every * all_logits;
}

// w_c y~_c of a soft label.
template <class Real>
FUSEDLOSS_HOST_DEVICE Real soft_label_weight(Smoothing<Element<Real>> smoothing, Element<Real> weight, Real label) {
  return weight * (smoothing.label * label + smoothing.every);
}

// dL/dz_c for incoming gradient g: (g a / S) exp(z_c - m) - g w_c y~_c.
template <class Real>
FUSEDLOSS_HOST_DEVICE Real cross_entropy_logit_gradient(Real g_times_a_over_sum, Real exponential,
                                                        Real g_times_label_weight) {
  return g_times_a_over_sum * exponential - g_times_label_weight;
}

// dL/dy_c for incoming gradient g.
template <class Real>
FUSEDLOSS_HOST_DEVICE Real cross_entropy_label_gradient(Real g, Element<Real> label_weight, Real logit, Real maximum,
                                                        Real log_sum) {
  return g * label_weight * (log_sum - (logit - maximum));
}

}  // namespace fusedloss::math
