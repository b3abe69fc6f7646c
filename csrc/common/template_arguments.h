#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>

#include "templates.h"

// Host code of the operators that take a template.
namespace picnn_fast {

// For maps [B, N, h, w]. `table` must outlive what is returned, which points into it.
template <typename A>
Template<A> read_template(const torch::stable::Tensor& maps,
                          const std::optional<torch::stable::Tensor>& table, int64_t profile,
                          int64_t norm, double slope, int64_t limit) {
  using torch::headeronly::ScalarType;
  constexpr int64_t kMostSide = 1 << 15;
  STD_TORCH_CHECK(maps.dim() == 4, "x: want maps [B, N, h, w]");
  const int64_t height = maps.size(2), width = maps.size(3);
  STD_TORCH_CHECK(1 <= height && height <= kMostSide && 1 <= width && width <= kMostSide,
                  "x: got maps ", height, " x ", width, ", want sides of 1 to ", kMostSide);
  STD_TORCH_CHECK(kGradient <= profile && profile <= kTable, "profile: got ", profile,
                  ", want 0, 1 or 2");
  STD_TORCH_CHECK(norm == 1 || norm == 2, "norm: got ", norm, ", want 1 or 2");
  const A* values = nullptr;
  if (profile == kTable) {
    STD_TORCH_CHECK(table.has_value(), "table: got none, want one for this profile");
    STD_TORCH_CHECK(
        table->dim() == 2 && table->size(0) == 2 * height - 1 && table->size(1) == 2 * width - 1,
        "table: want [2 * h - 1, 2 * w - 1]");
    STD_TORCH_CHECK(
        table->scalar_type() == (sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float),
        "table: want float32, float64 for float64 maps");
    STD_TORCH_CHECK(table->is_contiguous(), "table: want it contiguous");
    STD_TORCH_CHECK(table->is_cuda() == maps.is_cuda() && table->get_device() == maps.get_device(),
                    "table: want the device of the maps");
    values = static_cast<const A*>(table->const_data_ptr());
  }
  const int64_t most = std::numeric_limits<int32_t>::max();
  return {values,
          static_cast<int32_t>(profile),
          static_cast<int32_t>(norm),
          static_cast<A>(slope),
          static_cast<int32_t>(std::min(std::max<int64_t>(limit, 0), most)),
          static_cast<int32_t>(height),
          static_cast<int32_t>(width)};
}

}  // namespace picnn_fast
