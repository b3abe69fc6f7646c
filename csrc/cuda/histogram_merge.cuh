#pragma once

#include <cmath>
#include <cstdint>

#include "../common/binning.h"
#include "histogram_grids.cuh"

// Hard counts: what a call adds to, what its blocks leave, and how this is brought together.
namespace picnn_fast {
namespace {

// What the blocks hand to the merging kernel, for each split and filter.
struct Partial {
  double* range;    // [splits, N, 2], with the range so far
  int32_t* grid;    // [splits, N, 2]: exponent and first cell of the table
  uint32_t* table;  // [splits, N, bins, K]
};

struct State {
  int64_t* counts;  // [N, bins, K]
  double *minimum, *maximum;
  int64_t* bad;  // the first column with a number that is not finite, or -1
  int64_t N, bins;
  int classes;

  __device__ void report(int64_t filter) const {  // -1 is the largest of the unsigned numbers
    atomicMin(reinterpret_cast<Wide*>(bad), static_cast<Wide>(filter));
  }
};

// A block a filter: its counts go to the grid of the whole range, and the tables of all splits on
// top. Without tables, only the first.
__global__ void __launch_bounds__(kThreads) merge(State state, Partial partial, int64_t splits) {
  if (*state.bad != -1) return;
  const int64_t n = blockIdx.x;
  double low = HUGE_VAL, high = -HUGE_VAL;
  for (int64_t s = 0; s < splits; ++s) {
    low = min(low, partial.range[(s * state.N + n) * 2]);
    high = max(high, partial.range[(s * state.N + n) * 2 + 1]);
  }
  const Grid grid = grid_of(low, high, state.bins);
  int64_t* counts = state.counts + n * state.bins * state.classes;
  if (state.minimum[n] <= state.maximum[n]) {
    const Grid before = grid_of(state.minimum[n], state.maximum[n], state.bins);
    const auto at = [&](int64_t j, int k) -> int64_t& { return counts[j * state.classes + k]; };
    if (!same(before, grid)) regrid<BlockThreads>(before, grid, state.bins, state.classes, at);
  }
  // The old range has been read. No outcome depends on it: where nothing was moved, which has
  // barriers of its own, old and new range, or half of each, have the same grid.
  __syncthreads();
  if (threadIdx.x == 0) {
    state.minimum[n] = low;
    state.maximum[n] = high;
  }
  if (partial.table == nullptr) return;
  const int64_t cells = state.bins * state.classes;
  for (int64_t i = threadIdx.x; i < cells; i += kThreads) {
    const int64_t j = i / state.classes, k = i % state.classes;
    int64_t sum = 0;
    for (int64_t s = 0; s < splits; ++s) {
      const int64_t at = s * state.N + n;
      const int shift = min(grid.exponent - partial.grid[at * 2], 31);
      const int64_t start = (grid.first + j) * (int64_t{1} << shift) - partial.grid[at * 2 + 1];
      const int64_t stop = min(start + (int64_t{1} << shift), state.bins);
      for (int64_t c = max(start, int64_t{0}); c < stop; ++c)
        sum += partial.table[at * cells + c * state.classes + k];
    }
    counts[i] += sum;
  }
}

}  // namespace
}  // namespace picnn_fast
