// What the launchers return, for who does not know CUDA's headers.
#pragma once

namespace fusedloss::cuda {

// The sentence to a launcher's status other than 0. It stays where it is until the next launch.
const char* error_text(int status);

}  // namespace fusedloss::cuda
