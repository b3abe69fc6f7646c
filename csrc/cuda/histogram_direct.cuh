#pragma once

#include <cmath>
#include <cstdint>

#include "../common/binning.h"
#include "histogram_merge.cuh"

// Hard counts where a filter's table does not fit in shared memory: the range, and when the ranges
// of all blocks are merged, counts by global atomics.
namespace picnn_fast {
namespace {

// Ranges alone, where tables do not fit.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    find_range(Samples<const T> samples, Tiling tiling, State state, Partial partial) {
  using C = Accumulate<T>;
  using Place = Walk<1, 1>;
  __shared__ BlockRange range;
  const Place place(tiling, samples.M, samples.N);
  for (int i = threadIdx.x; i < place.filters; i += kThreads) {
    const int64_t n = place.first_filter + i;
    range.lowest[i] = order_key(n < state.N ? state.minimum[n] : HUGE_VAL);
    range.highest[i] = order_key(n < state.N ? state.maximum[n] : -HUGE_VAL);
  }
  __syncthreads();
  C least[1] = {static_cast<C>(HUGE_VAL)}, most[1] = {-least[0]};
  bool finite = true;
  for (int64_t base = place.begin; base < place.end; base += place.step()) {
    T value[Place::kPieces][1];
    place.load(samples, base, value);
#pragma unroll
    for (int u = 0; u < Place::kPieces; ++u) {
      if (place.row_of(u) >= place.left(base)) continue;
      const C x = static_cast<C>(value[u][0]);
      finite = finite && is_finite(x);
      least[0] = min(least[0], x);
      most[0] = max(most[0], x);
    }
  }
  if (!finite) state.report(place.first_filter + place.filter);
  range.include(tiling, place, least, most);
  __syncthreads();
  for (int f = threadIdx.x; f < place.filters; f += kThreads) {
    const int64_t n = place.first_filter + f;
    if (n >= state.N) continue;
    partial.range[(place.split * state.N + n) * 2] = of_order_key(range.lowest[f]);
    partial.range[(place.split * state.N + n) * 2 + 1] = of_order_key(range.highest[f]);
  }
}

// Counts on grids that reach all samples.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    count_directly(Samples<const T> samples, Labels labels, Tiling tiling, State state) {
  using C = Accumulate<T>;
  using Place = Walk<1, 1>;
  if (*state.bad != -1) return;
  const Place place(tiling, samples.M, samples.N);
  if (!place.active) return;
  const int64_t n = place.first_filter + place.filter;
  Window<C> window;
  window.set(grid_of(state.minimum[n], state.maximum[n], state.bins), state.bins);
  int64_t* counts = state.counts + n * state.bins * state.classes;
  for (int64_t base = place.begin; base < place.end; base += place.step()) {
    T value[Place::kPieces][1];
    place.load(samples, base, value);
#pragma unroll
    for (int u = 0; u < Place::kPieces; ++u) {
      if (place.row_of(u) >= place.left(base)) continue;
      const int label = labels(base + place.row_of(u));
      const int64_t bin = window.bin(static_cast<C>(value[u][0]), 0);
      atomicAdd(reinterpret_cast<Wide*>(&counts[bin * state.classes + label]), Wide{1});
    }
  }
}

}  // namespace
}  // namespace picnn_fast
