#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace picnn_fast {

// The type that sums of a tensor's elements are kept in, as accumulate_dtype in the reference.
inline torch::headeronly::ScalarType accumulate_type(const torch::stable::Tensor& t) {
  using torch::headeronly::ScalarType;
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace picnn_fast
