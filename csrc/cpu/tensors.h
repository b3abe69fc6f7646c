#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#include "../common/check.h"
#include "../common/types.h"

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

// Contiguous class indices, every one of them in [0, classes).
inline torch::stable::Tensor class_indices(const torch::stable::Tensor& labels, const char* name,
                                           int64_t count, int64_t classes) {
  check_shape(labels, name, {count});
  STD_TORCH_CHECK(labels.scalar_type() == torch::headeronly::ScalarType::Long, name,
                  ": want int64");
  const torch::stable::Tensor indices = torch::stable::contiguous(labels);
  const int64_t* index = static_cast<const int64_t*>(indices.const_data_ptr());
  // All at once, by their sign bits: a loop that may stop is not vectorised.
  const uint64_t last = static_cast<uint64_t>(classes) - 1;
  uint64_t signs = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t k = static_cast<uint64_t>(index[i]);
    signs |= k | (last - k);
  }
  for (int64_t i = 0; i < count && signs >> 63 != 0; ++i) {
    STD_TORCH_CHECK(index[i] >= 0 && index[i] < classes, name, ": got ", index[i], ", want [0, ",
                    classes, ")");
  }
  return indices;
}

}  // namespace picnn_fast
