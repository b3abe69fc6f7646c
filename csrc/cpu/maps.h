#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../common/spatial.h"
#include "../common/stable.h"
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

// Laid out like `t`, of another type.
inline torch::stable::Tensor empty_like(const torch::stable::Tensor& t,
                                        torch::headeronly::ScalarType type) {
  const torch::stable::Tensor layout = torch::stable::empty_like(t);
  if (layout.scalar_type() == type) {
    return layout;
  }
  std::vector<int64_t> sizes, strides;
  for (int64_t axis = 0; axis < t.dim(); ++axis) {
    sizes.push_back(t.size(axis));
    strides.push_back(layout.stride(axis));
  }
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      t.dim(), sizes.data(), strides.data(),
      type == torch::headeronly::ScalarType::Double ? aoti_torch_dtype_float64()
                                                    : aoti_torch_dtype_float32(),
      aoti_torch_device_type_cpu(), 0, &handle));
  return torch::stable::Tensor(handle);
}

}  // namespace picnn_fast
