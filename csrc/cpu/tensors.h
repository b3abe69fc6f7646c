#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <cstdint>
#include <initializer_list>

#include "../common/check.h"
#include "../common/stable.h"
#include "../common/types.h"
#include "indices.h"

// What the CPU operators ask of their arguments.
namespace picnn_fast {

// At least this many elements for each thread: below that, waking one costs more than it saves.
constexpr int64_t kGrainElements = 16384;

inline Storage storage(const torch::stable::Tensor& t, const char* name) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Storage::kFloat;
    case ScalarType::Double:
      return Storage::kDouble;
    case ScalarType::Half:
      return Storage::kHalf;
    case ScalarType::BFloat16:
      return Storage::kBFloat16;
    default:
      STD_TORCH_CHECK(false, name, ": want float32, float64, bfloat16 or float16");
  }
}

// Calls run with a value of the type of the elements, and one of the type of their sums.
template <typename Run>
void with_types(const torch::stable::Tensor& t, const char* name, const Run& run) {
  switch (storage(t, name)) {
    case Storage::kFloat:
      return run(float{}, float{});
    case Storage::kDouble:
      return run(double{}, double{});
    case Storage::kHalf:
      return run(Half{}, float{});
    case Storage::kBFloat16:
      return run(BFloat16{}, float{});
  }
}

// Calls run with a value of the type of the elements, float or double.
template <typename Run>
void with_real(const torch::stable::Tensor& t, const char* name, const Run& run) {
  using torch::headeronly::ScalarType;
  const bool wide = t.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(wide || t.scalar_type() == ScalarType::Float, name, ": want float32 or float64");
  wide ? run(double{}) : run(float{});
}

// Uninitialised tensors. torch::stable::new_empty and empty_like look their operator up by name in
// the dispatcher at each call, which costs more than a small operator's own work.
inline torch::stable::Tensor allocate_strided(const int64_t* sizes, const int64_t* strides,
                                              int64_t axes, torch::headeronly::ScalarType type) {
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      axes, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      aoti_torch_device_type_cpu(), 0, &handle));
  return torch::stable::Tensor(handle);
}

inline torch::stable::Tensor allocate(std::initializer_list<int64_t> sizes,
                                      torch::headeronly::ScalarType type) {
  constexpr size_t kMost = 4;
  STD_TORCH_CHECK(sizes.size() <= kMost, "picnn_fast: more axes than an operator has");
  std::array<int64_t, kMost> strides{};
  int64_t stride = 1;
  for (size_t axis = sizes.size(); axis-- > 0;) {
    strides[axis] = stride;
    stride *= sizes.begin()[axis] > 1 ? sizes.begin()[axis] : 1;
  }
  return allocate_strided(sizes.begin(), strides.data(), static_cast<int64_t>(sizes.size()), type);
}

// Whether the elements of [B, N, h, w] lie densely in the order B, h, w, N.
inline bool is_channels_last(const torch::stable::Tensor& t) {
  if (t.dim() != 4) {
    return false;
  }
  const int64_t filters = t.size(1), height = t.size(2), width = t.size(3);
  return t.stride(1) == 1 && t.stride(3) == filters && t.stride(2) == width * filters &&
         t.stride(0) == height * width * filters;
}

// Laid out like `t`, of any type.
inline torch::stable::Tensor allocate_like(const torch::stable::Tensor& t,
                                           torch::headeronly::ScalarType type) {
  const bool dense = t.is_contiguous() || is_channels_last(t);
  const torch::stable::Tensor layout = dense ? t : torch::stable::empty_like(t);
  if (!dense && layout.scalar_type() == type) {
    return layout;
  }
  int64_t *sizes = nullptr, *strides = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(layout.get(), &sizes));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(layout.get(), &strides));
  return allocate_strided(sizes, strides, layout.dim(), type);
}

inline torch::stable::Tensor allocate_like(const torch::stable::Tensor& t) {
  return allocate_like(t, t.scalar_type());
}

// `t` itself where it is contiguous, without the dispatcher.
inline torch::stable::Tensor as_contiguous(const torch::stable::Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// Indices of the shape wanted, contiguous, whatever they are.
inline torch::stable::Tensor contiguous_indices(const torch::stable::Tensor& t, const char* name,
                                                std::initializer_list<int64_t> shape) {
  check_shape(t, name, shape);
  STD_TORCH_CHECK(t.scalar_type() == torch::headeronly::ScalarType::Long, name, ": want int64");
  return as_contiguous(t);
}

// Class indices of the shape wanted, contiguous, every one of them in [0, classes).
inline torch::stable::Tensor class_indices(const torch::stable::Tensor& labels, const char* name,
                                           std::initializer_list<int64_t> shape, int64_t classes) {
  const torch::stable::Tensor indices = contiguous_indices(labels, name, shape);
  const int64_t count = labels.numel();
  const int64_t* index = static_cast<const int64_t*>(indices.const_data_ptr());
  const bool valid = all_below(index, count, classes);
  for (int64_t i = 0; i < count && !valid; ++i) {
    STD_TORCH_CHECK(index[i] >= 0 && index[i] < classes, name, ": got ", index[i], ", want [0, ",
                    classes, ")");
  }
  return indices;
}

}  // namespace picnn_fast
