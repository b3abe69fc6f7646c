#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

// Feature maps [batch, filters, *spatial] read as [batch, filters, positions]: host code of the
// operators. Spatial axes must lie in memory as one axis would, as in every dense layout; the
// Python wrappers copy what does not.
namespace picnn_fast {

// Number of positions of a map, 1 without spatial axes.
inline int64_t positions(const torch::stable::Tensor& maps) {
  int64_t count = 1;
  for (int64_t axis = 2; axis < maps.dim(); ++axis) {
    count *= maps.size(axis);
  }
  return count;
}

// Of maps [batch, filters, h, w]: an operator to which no position means nothing refuses them.
inline void check_has_positions(const torch::stable::Tensor& maps, const char* name) {
  STD_TORCH_CHECK(positions(maps) > 0, name, ": got ", maps.size(2), " x ", maps.size(3),
                  ", want at least one position");
}

// Elements from one position to the next.
inline int64_t position_stride(const torch::stable::Tensor& maps, const char* name) {
  int64_t stride = 1, expected = 0;
  bool seen = false;  // an axis of more than one position; an expanded one has stride 0
  for (int64_t axis = maps.dim() - 1; axis >= 2; --axis) {
    const int64_t size = maps.size(axis);
    if (size == 1) {
      continue;
    }
    STD_TORCH_CHECK(!seen || maps.stride(axis) == expected || maps.numel() == 0, name,
                    ": the strides of the spatial axes are not those of one axis; flatten them");
    stride = seen ? stride : maps.stride(axis);
    expected = maps.stride(axis) * size;
    seen = true;
  }
  return stride;
}

}  // namespace picnn_fast
