#include "binding/tensors.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "binding/huge_pages.h"
#include "binding/reused_memory.h"

// torch has it from 2.11 on, and the headers of 2.10, the oldest that this binary runs under, do not name it. Weak, so
// that it is null there.
extern "C" AOTI_TORCH_EXPORT __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* tensor, int32_t layout, const uint8_t* opaque_metadata,
    int64_t opaque_metadata_size, void (*deleter)(void* data, void* context), void* context);

namespace fusedloss {

DType dtype_of(const Tensor& tensor, const char* op) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Byte:
      return DType::kUInt8;
    case ScalarType::Short:
      return DType::kInt16;
    case ScalarType::Int:
      return DType::kInt32;
    case ScalarType::Long:
      return DType::kInt64;
    case ScalarType::Bool:
      return DType::kBool;
    default:
      throw std::invalid_argument(std::string(op) + ": an argument's dtype is not supported");
  }
}

bool is_floating(DType dtype) { return dtype <= DType::kBFloat16; }

ScalarType scalar_type(DType dtype) {
  constexpr ScalarType types[] = {ScalarType::Double,   ScalarType::Float, ScalarType::Half,
                                  ScalarType::BFloat16, ScalarType::Byte,  ScalarType::Short,
                                  ScalarType::Int,      ScalarType::Long,  ScalarType::Bool};
  return types[static_cast<int>(dtype)];
}

Reduction reduction_of(int64_t value, const char* op) {
  require(value >= 0 && value <= 2, op, "reduction must be 0 (none), 1 (mean) or 2 (sum)");
  return static_cast<Reduction>(value);
}

Keep keep_of(int64_t value, const char* op) {
  require(value >= 0 && value <= 2, op, "keep must be 0 (nothing), 1 (statistics) or 2 (the gradient)");
  return static_cast<Keep>(value);
}

namespace {

Tensor allocate_on(int32_t device_type, int32_t device_index, const std::vector<int64_t>& sizes,
                   const std::vector<int64_t>& strides, ScalarType dtype) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  static_cast<int32_t>(dtype), device_type, device_index, &handle));
  return Tensor(handle);
}

// 0 where the number is too large: torch's allocator then says so.
int64_t storage_bytes(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType dtype) {
  int64_t elements = 1, bytes = 0;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 0) return 0;
    int64_t more = 0;
    if (__builtin_mul_overflow(sizes[d] - 1, strides[d], &more)) return 0;
    if (__builtin_add_overflow(elements, more, &elements)) return 0;
  }
  const auto size = static_cast<int64_t>(aoti_torch_dtype_element_size(static_cast<int32_t>(dtype)));
  return __builtin_mul_overflow(elements, size, &bytes) ? 0 : bytes;
}

// A tensor on the CPU whose loan ends when the last view of it dies.
Tensor lent_tensor(const reuse::Loan& loan, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                   ScalarType dtype) {
  constexpr int32_t no_index = -1;  // torch refuses 0
  const auto end = [](void*, void* number) { reuse::give_back(reinterpret_cast<uintptr_t>(number)); };
  AtenTensorHandle handle = nullptr;
  const AOTITorchError error =
      torch_from_blob(loan.data, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), /*storage_offset=*/0,
                      static_cast<int32_t>(dtype), aoti_torch_device_type_cpu(), no_index, &handle,
                      aoti_torch_layout_strided(), nullptr, 0, end, reinterpret_cast<void*>(loan.number));
  if (error != AOTI_TORCH_SUCCESS) reuse::give_back(loan.number);
  TORCH_ERROR_CODE_CHECK(error);
  return Tensor(handle);
}

}  // namespace

const char* reuse::refused_by_torch() { return torch_from_blob == nullptr ? "torch is older than 2.11" : nullptr; }

Tensor allocate(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType dtype) {
  const int64_t bytes = storage_bytes(sizes, strides, dtype);
  if (bytes >= reuse::kLeastBytes && reuse::refused_by_torch() == nullptr) {
    const reuse::Loan loan = reuse::lend(bytes);
    if (loan.data != nullptr) return lent_tensor(loan, sizes, strides, dtype);
  }
  Tensor tensor = allocate_on(aoti_torch_device_type_cpu(), 0, sizes, strides, dtype);
  if (bytes >= kLeastAdvisedBytes) advise_huge_pages(tensor.mutable_data_ptr(), bytes);
  return tensor;
}

Tensor allocate_like(const Tensor& like, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                     ScalarType dtype) {
  if (like.is_cpu()) return allocate(sizes, strides, dtype);
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  return allocate_on(device_type, like.get_device_index(), sizes, strides, dtype);
}

std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= sizes[d] > 1 ? sizes[d] : 1;
  }
  return strides;
}

std::vector<int64_t> sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

std::vector<int64_t> strides_of(const Tensor& tensor) {
  const auto strides = tensor.strides();
  return {strides.begin(), strides.end()};
}

Tensor scalar_tensor(double value, ScalarType dtype) {
  Tensor tensor = allocate({}, {}, dtype);
  void* data = tensor.mutable_data_ptr();
  switch (dtype) {
    case ScalarType::Double:
      *static_cast<double*>(data) = value;
      break;
    case ScalarType::Float:
      *static_cast<float*>(data) = static_cast<float>(value);
      break;
    case ScalarType::Half:
      *static_cast<c10::Half*>(data) = static_cast<float>(value);
      break;
    default:
      *static_cast<c10::BFloat16*>(data) = static_cast<float>(value);
  }
  return tensor;
}

double first_element(const Tensor& tensor, const char* op) {
  require(tensor.numel() >= 1, op, "the incoming gradient must not be empty");
  const void* data = readable(tensor, op);
  switch (dtype_of(tensor, op)) {
    case DType::kFloat64:
      return *static_cast<const double*>(data);
    case DType::kFloat32:
      return *static_cast<const float*>(data);
    case DType::kFloat16:
      return static_cast<float>(*static_cast<const c10::Half*>(data));
    case DType::kBFloat16:
      return static_cast<float>(*static_cast<const c10::BFloat16*>(data));
    default:
      throw std::invalid_argument(std::string(op) + ": the incoming gradient must be of a floating dtype");
  }
}

bool is_one_element(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 0 || (sizes[d] > 1 && strides[d] != 0)) return false;
  }
  return true;
}

std::string position_text(int64_t flat, const std::vector<int64_t>& sizes) {
  std::vector<int64_t> index(sizes.size());
  for (size_t d = sizes.size(); d-- > 0;) {
    index[d] = flat % sizes[d];
    flat /= sizes[d];
  }
  std::string text = "(";
  for (size_t d = 0; d < index.size(); ++d) text += (d > 0 ? ", " : "") + std::to_string(index[d]);
  return text + ")";
}

int64_t integer_at(const void* data, DType dtype, int64_t flat) {
  switch (dtype) {
    case DType::kUInt8:
      return static_cast<const uint8_t*>(data)[flat];
    case DType::kInt16:
      return static_cast<const int16_t*>(data)[flat];
    case DType::kInt32:
      return static_cast<const int32_t*>(data)[flat];
    default:
      return static_cast<const int64_t*>(data)[flat];
  }
}

}  // namespace fusedloss
