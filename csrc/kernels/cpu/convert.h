// Runs of numbers of a type known at run time, as the compute type or as class indices.
#pragma once

#include "kernels/cpu/simd.h"

namespace fusedloss::cpu::FUSEDLOSS_LEVEL {
namespace {

// Calls f with a null pointer of the element type, so that a generic lambda can name it.
template <class F>
FUSEDLOSS_HOST_DEVICE void with_floating_type(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(static_cast<double*>(nullptr));
    case DType::kFloat32:
      return f(static_cast<float*>(nullptr));
    case DType::kFloat16:
      return f(static_cast<Float16*>(nullptr));
    default:
      return f(static_cast<BFloat16*>(nullptr));
  }
}

template <class F>
FUSEDLOSS_HOST_DEVICE void with_label_type(DType dtype, F f) {
  switch (dtype) {
    case DType::kUInt8:
      return f(static_cast<uint8_t*>(nullptr));
    case DType::kInt16:
      return f(static_cast<int16_t*>(nullptr));
    case DType::kInt32:
      return f(static_cast<int32_t*>(nullptr));
    default:
      return f(static_cast<int64_t*>(nullptr));
  }
}

template <class A, class T>
FUSEDLOSS_HOST_DEVICE A convert_one(const T* p) {
  return static_cast<A>(load_one(p));
}

// out[i] = source[first + i * stride], i < count; source has `dtype`, any floating type.
template <class A>
void read_numbers(const void* source, DType dtype, int64_t first, int64_t stride, int count, A* out) {
  with_floating_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* p = static_cast<const T*>(source) + first;
    if constexpr (sizeof(ComputeType<T>) == sizeof(A)) {
      if (stride == 1) {
        int i = 0;
        for (; i + kLanes<A> <= count; i += kLanes<A>) store<A>(out + i, load<T>(p + i));
        for (; i < count; ++i) out[i] = load_one(p + i);
        return;
      }
    }
    for (int i = 0; i < count; ++i) out[i] = convert_one<A>(p + i * stride);
  });
}

// target[first + i * stride] = values[i], i < count.
template <class A>
void write_numbers(void* target, DType dtype, int64_t first, int64_t stride, int count, const A* values) {
  with_floating_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* p = static_cast<T*>(target) + first;
    int i = 0;
    if constexpr (sizeof(ComputeType<T>) == sizeof(A)) {
      if (stride == 1) {
        for (; i + kLanes<A> <= count; i += kLanes<A>) store<T>(p + i, load<A>(values + i));
      }
    }
    for (; i < count; ++i) store_one(p + i * stride, static_cast<ComputeType<T>>(values[i]));
  });
}

// labels[i] = the class of pixel first + i, or -1 where it is ignored or outside [0, classes).
// Returns the position of the first label that is neither ignored nor a class, or -1.
template <class B>
int64_t read_labels(const void* source, DType dtype, int64_t first, int count, int64_t ignore_index, int64_t classes,
                    B* labels) {
  int64_t bad = -1;
  with_label_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* p = static_cast<const T*>(source) + first;
    ask_ahead(p, count);
    int bad_count = 0;
    for (int i = 0; i < count; ++i) {
      const int64_t label = p[i];
      const bool ignored = label == ignore_index;
      const bool inside = static_cast<uint64_t>(label) < static_cast<uint64_t>(classes);
      bad_count += !ignored && !inside;
      labels[i] = !ignored && inside ? static_cast<B>(label) : B(-1);
    }
    if (bad_count > 0) {
      int i = 0;
      while (p[i] == ignore_index || static_cast<uint64_t>(p[i]) < static_cast<uint64_t>(classes)) ++i;
      bad = first + i;
    }
  });
  return bad;
}

}  // namespace
}  // namespace fusedloss::cpu::FUSEDLOSS_LEVEL
