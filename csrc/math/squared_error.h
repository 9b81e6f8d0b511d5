// Squared error of one element: value and derivatives side by side. docs/derivations/squared_error.md derives them.
//
//   value      SE = w (x - y)^2
//   derivative dx = 2 w (x - y),  dy = -dx,  dw = (x - y)^2
#pragma once

#include "math/real.h"

namespace fusedloss::math {

template <class Real>
FUSEDLOSS_HOST_DEVICE Real squared_error(Real input, Real target) {
  const Real difference = input - target;
  return difference * difference;
}

// dL/dx for incoming gradient g; dL/dy is its negative.
template <class Real>
FUSEDLOSS_HOST_DEVICE Real squared_error_gradient(Real twice_g, Real input, Real target) {
  return twice_g * (input - target);
}

}  // namespace fusedloss::math
