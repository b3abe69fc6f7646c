#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "../common/binning.h"
#include "histogram_merge.cuh"
#include "histogram_soft.cuh"

// Counts where a filter's table does not fit in shared memory, of samples sorted by their labels: a
// block has some filters and some neighbouring classes to itself, so that its tables are small and
// no other block adds to the same counters. And the gradient of soft counts, which reads as small
// tables.
namespace picnn_fast {
namespace {

struct alignas(8) Ranked {  // read at once
  int32_t sample, label;
};

// Samples in the order of their labels.
struct Sorted {
  const Ranked* ranked;  // [M]
  const int32_t* ends;   // [K]: behind the last sample of each class

  __device__ int begin(int label) const { return label == 0 ? 0 : ends[label - 1]; }
};

// A counting sort, in three steps. `ends` holds zeros, then how many samples each class has, where
// its samples begin, and where they end.
__global__ void __launch_bounds__(kThreads) count_labels(Labels labels, int64_t M, int32_t* ends) {
  const int64_t m = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (m < M) atomicAdd(&ends[labels(m)], 1);
}

// One block; each thread has a stretch of classes.
__global__ void __launch_bounds__(kThreads) find_begins(int32_t* ends, int classes) {
  __shared__ int32_t sums[kThreads];
  const int64_t stretch = ceil_div(classes, kThreads);
  const int64_t first = min(int64_t{classes}, threadIdx.x * stretch);
  const int64_t last = min(int64_t{classes}, first + stretch);
  int32_t sum = 0;
  for (int64_t k = first; k < last; ++k) sum += ends[k];
  sums[threadIdx.x] = sum;
  __syncthreads();
  int32_t begin = 0;
  for (int i = 0; i < static_cast<int>(threadIdx.x); ++i) begin += sums[i];
  for (int64_t k = first; k < last; ++k) {
    const int32_t count = ends[k];
    ends[k] = begin;
    begin += count;
  }
}

// Those of a class come in any order, which no count depends on.
__global__ void __launch_bounds__(kThreads)
    rank_samples(Labels labels, int64_t M, int32_t* ends, Ranked* ranked) {
  const int64_t m = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (m >= M) return;
  const int label = labels(m);
  ranked[atomicAdd(&ends[label], 1)] = {static_cast<int32_t>(m), label};
}

// How blocks share filters and classes: `lanes` threads side by side along the filters.
struct Division {
  int64_t tiles, groups;  // of filters, of classes
  int lanes, classes;     // of a block

  int64_t blocks() const { return tiles * groups; }
};

// A thread's place: filters [filter, filter + FV) of the block's tile, and every `rows`-th sample
// from `row` on of those of the block's classes.
template <int FV>
struct SortedWalk {
  static constexpr int kPieces = 4;

  int64_t first_filter;
  int filters;  // of the block's tile, those beyond N left out
  int first_class, classes, begin, end;
  int filter, row, rows;

  __device__ SortedWalk(const Division& d, const Sorted& sorted, int64_t N, int all_classes) {
    first_filter = blockIdx.x % d.tiles * d.lanes * FV;
    filters = static_cast<int>(min(int64_t{d.lanes} * FV, N - first_filter));
    const int64_t first = int64_t{blockIdx.x} / d.tiles * d.classes;
    first_class = static_cast<int>(first);
    classes = static_cast<int>(min(int64_t{d.classes}, all_classes - first));
    begin = sorted.begin(first_class);
    end = sorted.ends[first_class + classes - 1];
    filter = threadIdx.x % d.lanes * FV;
    row = threadIdx.x / d.lanes;
    rows = kThreads / d.lanes;
  }
  // take(a sample, its values) for each of the thread's samples.
  template <typename T, typename Take>
  __device__ void each(const Samples<const T>& samples, const Ranked* ranked,
                       const Take& take) const {
    if (filter >= filters) return;
    const T* from = samples.data + (first_filter + filter) * samples.filter;
    for (int64_t base = int64_t{begin} + row; base < end; base += kPieces * rows) {
      Ranked at[kPieces];
      Vector<T, FV> value[kPieces];
#pragma unroll
      for (int u = 0; u < kPieces; ++u)
        if (base + u * rows < end) at[u] = ranked[base + u * rows];
#pragma unroll
      for (int u = 0; u < kPieces; ++u) {
        if (base + u * rows < end)
          value[u] = *reinterpret_cast<const Vector<T, FV>*>(from + at[u].sample * samples.sample);
      }
#pragma unroll
      for (int u = 0; u < kPieces; ++u) {
        if (base + u * rows >= end) break;
        take(at[u], value[u]);
      }
    }
  }
  // Where the counters of filter `filter + i` and a class begin in the block's tables.
  __device__ int table(const TableShape& shape, int i, int label) const {
    return (filter + i) * shape.per_filter + (label - first_class) * shape.per_class;
  }
  // put(place in the tables, filter, bin, class) for each of the block's counters of `bins` bins,
  // by all its threads, neighbouring classes side by side.
  template <typename Put>
  __device__ void each_counter(const TableShape& shape, int bins, const Put& put) const {
    const int across = min(classes, 32), together = kThreads / across;
    if (static_cast<int>(threadIdx.x) >= across * together) return;
    for (int i = threadIdx.x / across; i < filters * bins; i += together) {
      const int f = i / bins, j = i % bins;
      for (int k = threadIdx.x % across; k < classes; k += across)
        put(f * shape.per_filter + k * shape.per_class + j, first_filter + f, j, first_class + k);
    }
  }
};

// Counts on grids that reach all samples.
template <typename T, int FV>
__global__ void __launch_bounds__(kThreads, 2)
    count_sorted(Samples<const T> samples, Sorted sorted, Division division, State state,
                 TableShape shape) {
  using C = Accumulate<T>;
  if (*state.bad != -1) return;
  const SortedWalk<FV> place(division, sorted, samples.N, state.classes);
  if (place.begin == place.end) return;
  uint32_t* table = dynamic_shared<uint32_t>();
  for (int i = threadIdx.x; i < place.filters * shape.per_filter; i += kThreads) table[i] = 0;
  Window<C> windows[FV];
#pragma unroll
  for (int i = 0; i < FV; ++i) {
    const int64_t n = place.first_filter + min(place.filter + i, place.filters - 1);
    windows[i].set(grid_of(state.minimum[n], state.maximum[n], state.bins), state.bins);
  }
  __syncthreads();
  place.each(samples, sorted.ranked, [&](const Ranked& at, const Vector<T, FV>& value) {
#pragma unroll
    for (int i = 0; i < FV; ++i) {
      const int bin = windows[i].bin(static_cast<C>(value.lane[i]), 0);
      atomicAdd(&table[place.table(shape, i, at.label) + bin], 1u);
    }
  });
  __syncthreads();
  place.each_counter(shape, shape.bins, [&](int at, int64_t n, int bin, int label) {
    if (table[at] != 0) state.counts[(n * shape.bins + bin) * state.classes + label] += table[at];
  });
}

// Soft counts [N, bins, K], every one of them.
template <typename T, int FV>
__global__ void __launch_bounds__(kThreads, 2)
    add_weights_sorted(Samples<const T> samples, Sorted sorted, Division division,
                       SoftGrid<Accumulate<T>> grid, TableShape shape, int classes,
                       int fraction_bits, Accumulate<T>* counts) {
  using C = Accumulate<T>;
  const SortedWalk<FV> place(division, sorted, samples.N, classes);
  const int entries = place.filters * shape.per_filter;
  const Halves table = {dynamic_shared<uint32_t>(), dynamic_shared<uint32_t>() + entries};
  for (int i = threadIdx.x; i < 2 * entries; i += kThreads) table.low[i] = 0;
  SoftFilter<C> filter[FV];
#pragma unroll
  for (int i = 0; i < FV; ++i)
    filter[i].load(grid, place.first_filter + min(place.filter + i, place.filters - 1));
  const SoftUnit<C> unit(fraction_bits);
  __syncthreads();
  place.each(samples, sorted.ranked, [&](const Ranked& at, const Vector<T, FV>& value) {
#pragma unroll
    for (int i = 0; i < FV; ++i)
      unit.add(table, place.table(shape, i, at.label),
               filter[i].bin(static_cast<C>(value.lane[i])));
  });
  __syncthreads();
  const double inverse = power_of_two<double>(-fraction_bits);
  place.each_counter(shape, shape.bins, [&](int at, int64_t n, int bin, int label) {
    counts[(n * shape.bins + bin) * classes + label] = soft_count<C>(table.get(at), inverse);
  });
}

// The gradient of soft counts, by slopes in shared memory, each of which is read once.
template <typename T, int FV>
__global__ void __launch_bounds__(kThreads, 2)
    soft_backward_sorted(GradCounts<Accumulate<T>> grad_counts, Samples<const T> samples,
                         Sorted sorted, Division division, SoftGrid<Accumulate<T>> grid,
                         TableShape shape, int classes, Samples<T> grad) {
  using C = Accumulate<T>;
  const SortedWalk<FV> place(division, sorted, samples.N, classes);
  if (place.begin == place.end) return;
  C* slopes = dynamic_shared<C>();
  place.each_counter(shape, shape.bins - 1, [&](int at, int64_t n, int bin, int label) {
    slopes[at] = grad_counts.slope(n, bin, label, grid.width[n * grid.width_stride]);
  });
  SoftFilter<C> filter[FV];
#pragma unroll
  for (int i = 0; i < FV; ++i)
    filter[i].load(grid, place.first_filter + min(place.filter + i, place.filters - 1));
  __syncthreads();
  T* to = grad.data + (place.first_filter + place.filter) * grad.filter;
  place.each(samples, sorted.ranked, [&](const Ranked& at, Vector<T, FV>& value) {
#pragma unroll
    for (int i = 0; i < FV; ++i) {
      const auto slope_of = [&](int bin) { return slopes[place.table(shape, i, at.label) + bin]; };
      value.lane[i] = static_cast<T>(filter[i].gradient(static_cast<C>(value.lane[i]), slope_of));
    }
    *reinterpret_cast<Vector<T, FV>*>(to + at.sample * grad.sample) = value;
  });
}

}  // namespace
}  // namespace picnn_fast
