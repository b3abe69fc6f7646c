#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <sstream>

// What operators ask of their arguments. The wrappers in picnn_fast check them in full; this, and
// what the families check, keeps a direct call from reading or writing where it must not.
namespace picnn_fast {

// The type that sums of a tensor's elements are kept in, as accumulate_dtype in the reference.
inline torch::headeronly::ScalarType accumulate_type(const torch::stable::Tensor& t) {
  using torch::headeronly::ScalarType;
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_shape(const torch::stable::Tensor& t, const char* name,
                        std::initializer_list<int64_t> want) {
  bool same = t.dim() == static_cast<int64_t>(want.size());
  for (size_t d = 0; same && d < want.size(); ++d) {
    same = t.size(static_cast<int64_t>(d)) == want.begin()[d];
  }
  if (same) {
    return;
  }
  std::ostringstream message;
  message << name << ": got shape [";
  for (int64_t d = 0; d < t.dim(); ++d) {
    message << (d == 0 ? "" : ", ") << t.size(d);
  }
  message << "], want [";
  for (size_t d = 0; d < want.size(); ++d) {
    message << (d == 0 ? "" : ", ") << want.begin()[d];
  }
  STD_TORCH_CHECK(false, message.str(), "]");
}

inline void check_type(const torch::stable::Tensor& t, const char* name,
                       torch::headeronly::ScalarType type, const char* want) {
  STD_TORCH_CHECK(t.scalar_type() == type, name, ": want ", want);
}

// The type of sums of the elements of `maps`.
inline void check_accumulate_type(const torch::stable::Tensor& t, const char* name,
                                  const torch::stable::Tensor& maps) {
  check_type(t, name, accumulate_type(maps), "float32, float64 for float64 maps");
}

inline void check_device(const torch::stable::Tensor& t, const char* name,
                         const torch::stable::Tensor& other, const char* other_name) {
  STD_TORCH_CHECK(
      t.is_cuda() == other.is_cuda() && t.get_device_index() == other.get_device_index(), name,
      ": want the device of ", other_name);
}

}  // namespace picnn_fast
