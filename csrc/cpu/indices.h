#pragma once

#include <cstdint>

#include "../common/macros.h"

// Indices as kernels see them, which may not include tensors.h.
namespace picnn_fast {

// Whether all are in [0, end). By sign bits: a loop that may stop is not vectorised.
PICNN_FAST_HD bool all_below(const int64_t* indices, int64_t count, int64_t end) {
  const uint64_t last = static_cast<uint64_t>(end) - 1;
  uint64_t signs = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto index = static_cast<uint64_t>(indices[i]);
    signs |= index | (last - index);
  }
  return signs >> 63 == 0;
}

}  // namespace picnn_fast
