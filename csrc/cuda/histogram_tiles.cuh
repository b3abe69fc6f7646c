#pragma once

#include <cmath>
#include <cstdint>

#include "../common/binning.h"
#include "histogram_merge.cuh"

// Hard counts in one reading of the activations: a block counts on the grid of the samples that it
// has seen itself, widening it as it goes.
namespace picnn_fast {
namespace {

// A block's ranges, grids and windows, in shared memory beside its tables.
template <typename C>
struct BlockGrids {
  BlockRange range;
  Grid grids[kMaxFilters];
  Window<C> windows[kMaxFilters];  // open: the filter has a grid

  // From the ranges so far.
  template <typename Place>
  __device__ void start(const Place& place, const State& state) {
    for (int i = threadIdx.x; i < place.filters; i += kThreads) {
      const int64_t n = place.first_filter + i;
      const double low = n < state.N ? state.minimum[n] : HUGE_VAL;
      const double high = n < state.N ? state.maximum[n] : -HUGE_VAL;
      range.lowest[i] = order_key(low);
      range.highest[i] = order_key(high);
      windows[i].close();
      if (low <= high) {
        grids[i] = grid_of(low, high, state.bins);
        windows[i].set(grids[i], state.bins);
      }
    }
  }

  // Brings tables, grids and windows to the ranges, which have grown: a warp a filter.
  template <typename Place>
  __device__ void widen(const Place& place, const State& state, const TableShape& shape,
                        uint32_t* table) {
    for (int f = threadIdx.x / 32; f < place.filters; f += kWarps) {
      const double low = of_order_key(range.lowest[f]), high = of_order_key(range.highest[f]);
      if (!(low <= high)) continue;
      const Grid wider = grid_of(low, high, state.bins);
      const auto at = [&](int64_t j, int k) -> uint32_t& {
        return table[f * shape.per_filter + k * shape.per_class + j];
      };
      if (windows[f].open() && !same(grids[f], wider))
        regrid<WarpThreads>(grids[f], wider, state.bins, shape.classes, at);
      // No lane may find half of what lane 0 writes; fibres have no such lanes.
      __syncwarp();
      if (threadIdx.x % 32 == 0) {
        grids[f] = wider;
        windows[f].set(wider, state.bins);
      }
    }
  }

  template <typename Place>
  __device__ void store(const Place& place, const State& state, const TableShape& shape,
                        const uint32_t* table, const Partial& partial) const {
    const int filters = static_cast<int>(min(int64_t{place.filters}, state.N - place.first_filter));
    const int64_t out = place.split * state.N + place.first_filter;
    for (int f = threadIdx.x; f < filters; f += kThreads) {
      partial.range[(out + f) * 2] = of_order_key(range.lowest[f]);
      partial.range[(out + f) * 2 + 1] = of_order_key(range.highest[f]);
      partial.grid[(out + f) * 2] = windows[f].open() ? grids[f].exponent : 0;
      partial.grid[(out + f) * 2 + 1] = windows[f].open() ? grids[f].first : 0;
    }
    const int cells = shape.bins * shape.classes;
    for (int i = threadIdx.x; i < filters * cells; i += kThreads) {
      const int f = i / cells, j = i % cells / shape.classes, k = i % shape.classes;
      partial.table[out * cells + i] = table[f * shape.per_filter + k * shape.per_class + j];
    }
  }
};

// What a thread of count_tiles holds of its samples.
template <typename T, int FV, int RV>
struct ThreadCounters {
  using C = Accumulate<T>;
  using Place = Walk<FV, RV>;
  static constexpr int kPieces = Place::kPieces;

  C least[FV], most[FV];
  int counter[kPieces][FV * RV];  // of a step: in class 0
  int row[kPieces][RV];           // of a step: what the class adds

  __device__ ThreadCounters() {
#pragma unroll
    for (int i = 0; i < FV; ++i) {
      least[i] = static_cast<C>(HUGE_VAL);
      most[i] = -least[i];
    }
  }

  // Finds the bins of a step, and whether one of the samples has none. The values are not kept:
  // they are read again in the rare case, and registers are scarce.
  __device__ bool find_bins(const Place& place, const Samples<const T>& samples, int64_t base,
                            const Window<C>* windows, const TableShape& shape) {
    alignas(kVectorBytes) T value[kPieces][FV * RV];
#pragma unroll
    for (int u = 0; u < kPieces; ++u)
#pragma unroll
      for (int e = 0; e < FV * RV; ++e) value[u][e] = static_cast<T>(NAN);  // has no bin
    place.load(samples, base, value);
    const int left = place.left(base);
    bool outside = false;
#pragma unroll
    for (int i = 0; i < FV; ++i) {
      const Window<C> window = windows[place.filter + i];
      const int filter = (place.filter + i) * shape.per_filter;
#pragma unroll
      for (int u = 0; u < kPieces; ++u) {
#pragma unroll
        for (int e = i; e < FV * RV; e += FV) {
          const C x = static_cast<C>(value[u][e]);
          const int bin = window.bin(x, shape.bins);
          counter[u][e] = filter + bin;
          least[i] = min(least[i], x);  // of a number and NaN, the number
          most[i] = max(most[i], x);
          outside = outside || (bin == shape.bins && place.row_of(u) + e / FV < left);
        }
      }
    }
    return outside;
  }

  // Finds the classes of a step; false where a label is none.
  __device__ bool find_classes(const Place& place, const Labels& labels, int64_t base,
                               const TableShape& shape) {
    const int left = place.left(base);
    bool in_range = true;
#pragma unroll
    for (int u = 0; u < kPieces; ++u) {
#pragma unroll
      for (int j = 0; j < RV; ++j) {
        const int m = place.row_of(u) + j;
        const int64_t label = m < left ? labels.data[(base + m) * labels.stride] : 0;
        in_range = in_range && 0 <= label && label < labels.classes;
        row[u][j] = static_cast<int>(label) * shape.per_class;
      }
    }
    return in_range;
  }

  // Reports the samples of a step that are not finite.
  __device__ void report(const Place& place, const Samples<const T>& samples, int64_t base,
                         const State& state) const {
    const int left = place.left(base);
#pragma unroll 1
    for (int u = 0; u < kPieces; ++u) {
      const T* from = place.address(samples, base, u);
#pragma unroll
      for (int e = 0; e < FV * RV; ++e) {
        if (place.row_of(u) + e / FV < left && !is_finite(static_cast<C>(from[e])))
          state.report(place.first_filter + place.filter + e % FV);
      }
    }
  }

  __device__ void count(uint32_t* table) const {
#pragma unroll
    for (int u = 0; u < kPieces; ++u) {
#pragma unroll
      for (int j = 0; j < RV; ++j) {
#pragma unroll
        for (int i = 0; i < FV; ++i) atomicAdd(&table[counter[u][j * FV + i] + row[u][j]], 1u);
      }
    }
  }
};

template <typename T, int FV, int RV>
__global__ void __launch_bounds__(kThreads, 2)
    count_tiles(Samples<const T> samples, Labels labels, Tiling tiling, State state,
                TableShape shape, Partial partial) {
  using C = Accumulate<T>;
  __shared__ BlockGrids<C> block;
  static_assert(sizeof(block) <= kFixedBytes);
  uint32_t* table = dynamic_shared<uint32_t>();
  const Walk<FV, RV> place(tiling, samples.M, samples.N);
  for (int i = threadIdx.x; i < place.filters * shape.per_filter; i += kThreads) table[i] = 0;
  block.start(place, state);
  __syncthreads();

  ThreadCounters<T, FV, RV> own;
  for (int64_t base = place.begin; base < place.end; base += place.step()) {
    // Labels are asked for together with the values, to wait for memory once.
    const bool labels_in_range = own.find_classes(place, labels, base, shape);
    const bool outside =
        __syncthreads_or(own.find_bins(place, samples, base, block.windows, shape));
    PICNN_FAST_DEVICE_ASSERT(labels_in_range);
    if (outside) {
      own.report(place, samples, base, state);
      block.range.include(tiling, place, own.least, own.most);
      __syncthreads();
      block.widen(place, state, shape, table);
      __syncthreads();
      own.find_bins(place, samples, base, block.windows, shape);
    }
    own.count(table);
  }
  block.range.include(tiling, place, own.least, own.most);
  __syncthreads();
  block.store(place, state, shape, table, partial);
}

}  // namespace
}  // namespace picnn_fast
