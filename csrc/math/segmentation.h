// Gradient of the weighted sum of cross-entropy, squared error and overlap at one pixel, from their probabilities.
// docs/derivations/probabilities.md and overlap.md derive it.
//
//   of a probability          g_c  = dL/dP_c + dL/dI_c dI/dp_c + s w_c (p_c - y_c)
//   softmax, class indices    dz_c = p_c (m (dL/dP_c + s w_c p_c) + K) + [c = y] L - w_c E
//   softmax, soft labels      dz_c = m (p_c (g_c + K) - E w_c y~_c)
//
// m: the pixel's weight; s: twice the incoming gradient of its squared error; K, L, E: numbers of the pixel, below.
#pragma once

#include "math/cross_entropy.h"
#include "math/overlap.h"
#include "math/squared_error.h"

namespace fusedloss::math {

// g_c but for the pixel's weight. intersection_derivative: dI/dp_c, which is y for the product and
// minimum_intersection_derivative() for the minimum. Without kSquared there is no squared error.
template <bool kSquared, class Real>
FUSEDLOSS_HOST_DEVICE Real probability_gradient(Real p, Real y, Real intersection_derivative, Real s,
                                                Element<Real> weight, Element<Real> d_intersection,
                                                Element<Real> d_predicted) {
  const Real g = d_predicted + d_intersection * intersection_derivative;
  if constexpr (!kSquared) return g;
  // Without that term nothing, also where p is infinite.
  const Real square = squared_error_gradient<Real>(s * weight, p, y);
  return g + (s == Element<Real>(0) ? Real{} : square);
}

// K, L and E.
template <class Real>
struct SoftmaxTerms {
  Real common;
  Real labelled;
  Real smoothed;
};

// What of dL/dp_y p_y the labelled class has beside what every class has: p_y (dL/dI_y - s w_y).
template <class Real>
FUSEDLOSS_HOST_DEVICE Real labelled_share(Real p, Real d_intersection, Real s, Real label_weight) {
  return p * (d_intersection - s * label_weight);
}

// g: incoming gradient of the cross-entropy; label_weight: w_y; all_weights: sum of w, read with label smoothing;
// dot: sum_c p_c (dL/dP_c + s w_c p_c); share: labelled_share() of the label.
template <class Real>
FUSEDLOSS_HOST_DEVICE SoftmaxTerms<Real> index_label_terms(Smoothing<Real> smoothing, Real m, Real g, Real label_weight,
                                                           Real all_weights, Real dot, Real share) {
  const Real a = index_label_a<Real>(smoothing, label_weight, all_weights);
  return {m * (g * a - (dot + share)), m * (share - g * smoothing.label * label_weight), m * g * smoothing.every};
}

// g as above; label_weights: sum_c w_c y~_c; dot: sum_c p_c g_c.
template <class Real>
FUSEDLOSS_HOST_DEVICE SoftmaxTerms<Real> soft_label_terms(Real g, Real label_weights, Real dot) {
  return {g * label_weights - dot, Real{}, g};
}

// dz_c with class indices. labelled: L for the labelled class, 0 for others. Without kSquared there is no squared
// error, without kSmoothed no label smoothing. p may be any multiple of the probability, as exp(z - maximum) is, where
// m, s and common come divided by that factor.
template <bool kSquared, bool kSmoothed, class Real>
FUSEDLOSS_HOST_DEVICE Real index_label_gradient(Real p, Real m, Real s, Element<Real> weight, Element<Real> d_predicted,
                                                Real common, Real labelled, Real smoothed) {
  Real each = d_predicted * m + common;
  if constexpr (kSquared) each += s * m * weight * p;
  const Real value = p * each + labelled;
  if constexpr (kSmoothed) return value - weight * smoothed;
  return value;
}

// dz_c with soft labels. g: probability_gradient(); label_weight: w_c y~_c.
template <class Real>
FUSEDLOSS_HOST_DEVICE Real soft_label_gradient(Real p, Real m, Real g, Real label_weight, Real common, Real smoothed) {
  return m * (p * (g + common) - smoothed * label_weight);
}

}  // namespace fusedloss::math
