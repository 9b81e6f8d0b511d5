// Overlap loss of one class in one group of pixels: value and derivatives side by side.
// docs/derivations/overlap.md derives them.
//
//   I = sum m min(p, y) (or sum m p y),  P = sum m p,  T = sum m y,  FP = P - I,  FN = T - I
//
//   value      score = (I + smooth) / max(I + alpha FP + beta FN + smooth, eps)
//              loss  = max(1 - score, 0)^gamma   or, with log,  max(-log(max(score, eps)), 0)^gamma
//   derivative dI, dP, dT of the loss; 0 where a max takes its constant
//
// In double and with the standard library's functions: there are (G, C) of these, not one a pixel.
#pragma once

#include <cmath>

#include "math/real.h"

namespace fusedloss::math {

struct OverlapFormula {
  double alpha;
  double beta;
  double smooth;
  double eps;
  double gamma;
  bool log;
};

struct OverlapLoss {
  double value;
  double d_intersection;
  double d_predicted;
  double d_labelled;
};

FUSEDLOSS_HOST_DEVICE OverlapLoss overlap_loss(const OverlapFormula& formula, double intersection, double predicted,
                                               double labelled) {
  const double numerator = intersection + formula.smooth;
  const double sum = intersection + formula.alpha * (predicted - intersection) +
                     formula.beta * (labelled - intersection) + formula.smooth;
  const bool free = !(sum < formula.eps);  // also where it is NaN
  const double denominator = free ? sum : formula.eps;
  const double score = numerator / denominator;

  // Loss as a function of the score, before the power.
  const double logged = score < formula.eps ? formula.eps : score;
  const double distance = formula.log ? -std::log(logged) : 1.0 - score;
  const double base = distance < 0.0 ? 0.0 : distance;
  double d_score = formula.log ? (score < formula.eps ? 0.0 : -1.0 / score) : -1.0;
  if (distance < 0.0) d_score = 0.0;
  double value = base;
  if (formula.gamma != 1.0) {
    value = base == 0.0 ? 0.0 : std::pow(base, formula.gamma);
    // At 0 the power may have an infinite derivative; the loss is at its least there.
    d_score = base == 0.0 ? 0.0 : d_score * formula.gamma * std::pow(base, formula.gamma - 1.0);
  }

  OverlapLoss loss;
  loss.value = value;
  const double d_numerator = d_score / denominator;
  const double d_denominator = free ? -d_score * score / denominator : 0.0;
  loss.d_intersection = d_numerator + d_denominator * (1.0 - formula.alpha - formula.beta);
  loss.d_predicted = d_denominator * formula.alpha;
  loss.d_labelled = d_denominator * formula.beta;
  return loss;
}

// Intersection of one pixel and class, and its derivative with regard to the first argument. At a tie of the minimum
// each of the two has half of it.
template <class Real>
FUSEDLOSS_HOST_DEVICE Real minimum_intersection_derivative(Real of, Real other) {
  const Real one = splat<Real>(Element<Real>(1)), half = splat<Real>(Element<Real>(0.5));
  const Real below = of < other ? one : Real{};
  return of == other ? half : below;
}

// NaN where one of them is.
template <class Real>
FUSEDLOSS_HOST_DEVICE Real minimum_intersection(Real a, Real b) {
  return b == b ? minimum<Real>(b, a) : b;
}

}  // namespace fusedloss::math
