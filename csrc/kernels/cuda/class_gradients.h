// dL/dI, dL/dP and dL/dT as the backward kernels read them.
#pragma once

#include "kernels/cuda/numbers.h"
#include "kernels/cuda/segmentation.h"

namespace fusedloss::cuda {

// dL/dI, dL/dP and dL/dT of the classes of a chunk's group.
template <class A>
struct ClassGradients {
  const BackwardParams& params;
  int64_t group;
  const A* kept;  // (3, C), or nullptr

  // Incoming gradient times the derivative; exactly none where there is none, also where the derivative is infinite.
  FUSEDLOSS_DEVICE A make(int k, int64_t c) const {
    const int64_t size = params.groups * params.classes;
    const int64_t at = k * size + group * params.classes + c;
    if (gives_sums(params.output)) return load_number<A>(params.grad, params.grad_dtype, at);
    int64_t of_grad = 0;
    if (params.output == Output::kEach) {
      const int64_t place = params.chosen.all ? c : params.chosen.place[c];
      if (!params.chosen.all && place == ChosenClasses::kNowhere) return A(0);
      of_grad = group * params.chosen.count + place;
    }
    const A g = load_number<A>(params.grad, params.grad_dtype, of_grad);
    return g == A(0) ? A(0) : g * static_cast<const A*>(params.table_gradients)[at];
  }

  FUSEDLOSS_DEVICE A of(int k, int64_t c) const {
    if (!params.overlap) return A(0);
    return kept != nullptr ? kept[k * params.classes + c] : make(k, c);
  }
  FUSEDLOSS_DEVICE A intersection(int64_t c) const { return of(0, c); }
  FUSEDLOSS_DEVICE A predicted(int64_t c) const { return of(1, c); }
  FUSEDLOSS_DEVICE A labelled(int64_t c) const { return of(2, c); }
};

// All threads of the block have to come. shared: room for (3, C), or nullptr.
template <class A>
FUSEDLOSS_DEVICE ClassGradients<A> class_gradients(const BackwardParams& params, int64_t group, A* shared) {
  ClassGradients<A> gradients{params, group, nullptr};
  if (!params.overlap || shared == nullptr) return gradients;
  for (int k = 0; k < 3; ++k) {
    for (int64_t c = gpu::thread(); c < params.classes; c += gpu::block_threads()) {
      shared[k * params.classes + c] = gradients.make(k, c);
    }
  }
  gpu::sync_block();
  gradients.kept = shared;
  return gradients;
}

}  // namespace fusedloss::cuda
