#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "../common/spatial.h"
#include "../common/stable.h"
#include "masking_kernels.h"

// Feature maps as the kernels of the template and filter loss families take them.
namespace picnn_fast {

inline MapsShape shape_of_maps(const torch::stable::Tensor& t) {
  return {t.size(0), t.size(1), positions(t)};
}

inline Strides strides_of_maps(const torch::stable::Tensor& t, const char* name) {
  return {t.stride(0), t.stride(1), position_stride(t, name)};
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
