#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#include "check.h"
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
  const Offsets offsets = offsets_of_maps(maps, name);
  check_shape(values, "offsets", {offsets.rows(), offsets.columns()});
  check_accumulate_type(values, "offsets", maps);
  STD_TORCH_CHECK(values.is_contiguous(), "offsets: want them contiguous");
  check_device(values, "offsets", maps, name);
  return {static_cast<const A*>(values.const_data_ptr()), offsets};
}

}  // namespace picnn_fast
