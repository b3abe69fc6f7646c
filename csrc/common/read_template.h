#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#include "templates.h"

// Host code of the operators on maps [B, N, h, w] that have peaks.
namespace picnn_fast {

inline Offsets offsets_of_maps(const torch::stable::Tensor& maps, const char* name) {
  constexpr int64_t kMostSide = 1 << 15;
  STD_TORCH_CHECK(maps.dim() == 4, name, ": want maps [B, N, h, w]");
  const int64_t height = maps.size(2), width = maps.size(3);
  STD_TORCH_CHECK(1 <= height && height <= kMostSide && 1 <= width && width <= kMostSide, name,
                  ": got maps ", height, " x ", width, ", want sides of 1 to ", kMostSide);
  return {static_cast<int32_t>(height), static_cast<int32_t>(width)};
}

// `values` must outlive what is returned, which points into it.
template <typename A>
Template<A> read_template(const torch::stable::Tensor& maps, const char* name,
                          const torch::stable::Tensor& values) {
  using torch::headeronly::ScalarType;
  const Offsets offsets = offsets_of_maps(maps, name);
  STD_TORCH_CHECK(
      values.dim() == 2 && values.size(0) == offsets.rows() && values.size(1) == offsets.columns(),
      "offsets: want [2 * h - 1, 2 * w - 1]");
  STD_TORCH_CHECK(values.scalar_type() == (sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float),
                  "offsets: want float32, float64 for float64 maps");
  STD_TORCH_CHECK(values.is_contiguous(), "offsets: want them contiguous");
  STD_TORCH_CHECK(values.is_cuda() == maps.is_cuda() && values.get_device() == maps.get_device(),
                  "offsets: want the device of the maps");
  return {static_cast<const A*>(values.const_data_ptr()), offsets};
}

}  // namespace picnn_fast
