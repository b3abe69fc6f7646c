#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "../common/spatial.h"

namespace picnn_fast {

template <typename T>
struct Maps {  // [B, N, positions], strides in elements
  T* data;
  int64_t batch, channel, position;
};

template <typename T>
Maps<const T> input_maps(const torch::stable::Tensor& t) {
  return {static_cast<const T*>(t.data_ptr()), t.stride(0), t.stride(1),
          position_stride(t, "maps")};
}
template <typename T>
Maps<T> output_maps(const torch::stable::Tensor& t) {
  return {static_cast<T*>(t.data_ptr()), t.stride(0), t.stride(1), position_stride(t, "maps")};
}

}  // namespace picnn_fast
