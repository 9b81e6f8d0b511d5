// torch's numbering of `reduction`.
#pragma once

namespace fusedloss {

enum class Reduction : int { kNone = 0, kMean = 1, kSum = 2 };

}  // namespace fusedloss
