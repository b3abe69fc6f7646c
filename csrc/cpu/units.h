#pragma once

#include <cstdint>
#include <limits>

#include "../common/rounding.h"

// Feature maps as the kernels see them, and how their work is cut up.
namespace picnn_fast {

struct Strides {
  int64_t batch, filter, position;
};

struct MapsShape {
  int64_t batch, filters, positions;
};

// Work is cut into units, a block of filters of one sample, so that any range of units can run on
// any thread with the same result.
struct Units {
  int64_t filters;  // a block
  int64_t blocks;   // a sample
  int64_t count;    // in all
};

// Whole samples where there are enough of them and `most` filters allow it: long sequential runs of
// memory in every layout.
inline Units units_of(const MapsShape& shape, int64_t threads,
                      int64_t most = std::numeric_limits<int64_t>::max()) {
  int64_t filters = shape.filters < most ? shape.filters : most;
  while (filters > 64 && shape.batch * ceil_div(shape.filters, filters) < 4 * threads) {
    filters = round_up(filters / 2, 16);
  }
  filters = filters < 1 ? 1 : filters;
  const int64_t blocks = ceil_div(shape.filters, filters);
  return {filters, blocks, shape.batch * blocks};
}

}  // namespace picnn_fast
