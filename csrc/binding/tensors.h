// Between torch's tensors and the kernels' raw pointers: types, allocation, checks. Stable ABI only.
#pragma once

#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/dtype.h"
#include "kernels/reduction.h"

namespace fusedloss {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A private op called by hand with anything must not reach memory that is not there. The public functions check first
// and word it for users; these are the last line. std::invalid_argument arrives in Python as ValueError.
inline void require(bool condition, const char* op, const char* wanted) {
  if (!condition) throw std::invalid_argument(std::string(op) + ": " + wanted);
}

// The data of a tensor. Its storage can have been resized under it; then there is no data, whatever the sizes say.
inline const void* readable(const Tensor& tensor, const char* op) {
  const void* data = tensor.const_data_ptr();
  require(data != nullptr || tensor.numel() == 0, op, "an argument has no memory (its storage was resized)");
  return data;
}
inline void* writable(const Tensor& tensor, const char* op) { return const_cast<void*>(readable(tensor, op)); }

DType dtype_of(const Tensor& tensor, const char* op);
bool is_floating(DType dtype);
ScalarType scalar_type(DType dtype);
Reduction reduction_of(int64_t value, const char* op);

// What a forward op keeps for the backward: nothing, statistics, or the gradient for an incoming gradient of 1.
enum class Keep : int { kNothing = 0, kStatistics = 1, kGradient = 2 };
Keep keep_of(int64_t value, const char* op);

// A tensor on the CPU that is not initialized. Large ones ask for huge pages, since the first write to a fresh 4 KiB
// page costs a fault (two thirds of the backward pass, docs/performance.md), and larger ones reuse memory
// (reused_memory.h).
Tensor allocate(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType dtype);

// The same on the device of `like`, of which nothing else counts.
Tensor allocate_like(const Tensor& like, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                     ScalarType dtype);

std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& sizes);
std::vector<int64_t> sizes_of(const Tensor& tensor);
std::vector<int64_t> strides_of(const Tensor& tensor);

// A zero-dimensional tensor of `dtype` that holds `value`.
Tensor scalar_tensor(double value, ScalarType dtype);

// Element 0 of a floating-point tensor on the CPU.
double first_element(const Tensor& tensor, const char* op);

// True where all elements are the same one in memory, as in the gradient that a sum sends back.
bool is_one_element(const Tensor& tensor);

// "(0, 3, 7)"
std::string position_text(int64_t flat, const std::vector<int64_t>& sizes);

// The integer at a flat position of a contiguous tensor.
int64_t integer_at(const void* data, DType dtype, int64_t flat);

// Memory for the length of a scope, aligned to a cache line.
class Scratch {
 public:
  explicit Scratch(int64_t bytes)
      : data_(bytes > 0 ? ::operator new(static_cast<size_t>(bytes), kAlignment) : nullptr) {}
  ~Scratch() { ::operator delete(data_, kAlignment); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  void* const data_;
};

// Runs f(begin, end) over the chunks, by threads where there is more than one chunk.
template <class F>
void for_chunks(int64_t chunks, const F& f) {
  if (chunks <= 1) {
    if (chunks == 1) f(0, 1);
    return;
  }
  torch::stable::parallel_for(0, chunks, 1, f);
}

}  // namespace fusedloss
