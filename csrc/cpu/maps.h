#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>

#include "../common/spatial.h"
#include "tensors.h"
#include "units.h"

// Tensors of feature maps, as the CPU operators hand them to their kernels.
namespace picnn_fast {

inline MapsShape shape_of_maps(const torch::stable::Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() >= 2, name, ": want [batch, filters, *spatial]");
  return {t.size(0), t.size(1), positions(t)};
}

inline Strides strides_of_maps(const torch::stable::Tensor& t, const char* name) {
  return {t.stride(0), t.stride(1), position_stride(t, name)};
}

template <typename F>
void parallel_units(const MapsShape& shape, const Units& units, const F& run) {
  const int64_t elements = std::max<int64_t>(1, units.filters * shape.positions);
  const int64_t grain = std::max<int64_t>(1, kGrainElements / elements);
  torch::stable::parallel_for(0, units.count, grain, run);
}

// Whether an output is so large that little of it would still be cached when it is read: then
// streaming saves more than the later reads cost. (What the system reports as the size of the last
// level is useless on a shared host.)
inline bool exceeds_cache(const torch::stable::Tensor& t) {
  constexpr int64_t kThreshold = 8 << 20;
  return t.numel() * static_cast<int64_t>(t.element_size()) > kThreshold;
}

}  // namespace picnn_fast
