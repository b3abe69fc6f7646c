#pragma once

// The filter loss of filters that fit a block each: its maps, then its responses, its weights and
// its gradient in one shared array. A product takes the place of the rows it was made from.

#include <cmath>

#include "filter_loss_products.cuh"
#include "filter_loss_statistics.cuh"
#include "launch.h"

namespace picnn_fast {
namespace {

// The shared memory of a block. Rows of the matrix hold what belongs to positions, 0 to a multiple
// of kUnit, and behind that what belongs to the negative template.
template <typename A>
struct Resident {
  Entry<A>* values;
  A *matrix, *column, *sums, *row;
  LogSum<A>* scratch;
  int* number;

  static __host__ __device__ int depth(const Offsets& o) {
    return (o.positions() + kUnit - 1) / kUnit * kUnit;
  }
  static __host__ __device__ int stride(const Offsets& o) { return depth(o) + kPad; }
  static int64_t bytes(const Offsets& o, int64_t B) {
    return (B * (stride(o) + 1) + 2 * (o.positions() + 1) + 2 * kThreads) * sizeof(A) +
           o.count() * sizeof(Entry<A>) + depth(o) * sizeof(int);
  }
  __device__ Resident(const Offsets& o, int B) {
    values = dynamic_shared<Entry<A>>();
    matrix = reinterpret_cast<A*>(values + o.count());
    column = matrix + B * stride(o);
    sums = column + o.positions() + 1;
    row = sums + o.positions() + 1;
    scratch = reinterpret_cast<LogSum<A>*>(row + B);
    number = reinterpret_cast<int*>(scratch + kThreads);
  }
};

// matrix = matrix · templates, but for the last column. A warp does kStrip rows of one of `groups`
// groups of columns, and rows change when all warps have read them.
template <bool kGradient, bool kShort, int kTiles, typename A>
__device__ void multiply_in_place(const Resident<A>& shared, const Offsets& offsets, int B,
                                  int groups, bool plain) {
  const int stride = shared.stride(offsets), positions = offsets.positions();
  const int warp = threadIdx.x / 32, strips = kWarps / groups;
  const int tiles = shared.depth(offsets) / kUnit;
  const int begin = tiles * (warp % groups) / groups, end = tiles * (warp % groups + 1) / groups;
  Product<A> p;
  p.number = shared.number;
  p.count = positions;
  p.middle = shared.values + offsets.middle();
  p.offsets = offsets;
  p.first = begin * kUnit;
  p.tiles = end - begin;
  for (int base = 0; base < B; base += strips * kStrip) {
    const int strip = base + warp / groups * kStrip;
    const bool busy = strip < B;
    A sum[2][kTiles][4] = {};
    if (busy) {
      p.set_rows(shared.matrix, stride, strip, B);
      multiply<kGradient, kShort>(p, plain, sum);
    }
    __syncthreads();
    if (!busy) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        if (j >= p.tiles) break;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int b = strip + p.row_of(half, e), column = p.column_of(j, e);
          if (b < B && column < positions) shared.matrix[b * stride + column] = sum[half][j][e];
        }
      }
    }
  }
  __syncthreads();
}

// What the threads of a block do for its filter, one step after the other.
template <typename T>
struct ResidentFilter {
  using A = Accumulate<T>;
  const Problem<T>& p;
  const Resident<A> shared;
  const int64_t n = blockIdx.x;
  const int B, positions, templates, depth, stride;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  __device__ explicit ResidentFilter(const Problem<T>& problem)
      : p(problem),
        shared(problem.part.offsets, static_cast<int>(problem.B)),
        B(static_cast<int>(problem.B)),
        positions(problem.positions()),
        templates(problem.templates()),
        depth(Resident<A>::depth(problem.part.offsets)),
        stride(Resident<A>::stride(problem.part.offsets)) {}

  __device__ A& place(int b, int t) const {
    return shared.matrix[b * stride + (t < positions ? t : depth)];
  }

  // Whether the matrix units take all of this thread's share.
  __device__ bool load_template() const {
    bool fits = true;
    for (int i = threadIdx.x; i < p.part.offsets.count(); i += kThreads) {
      const A value = p.part.values[i] * p.tau;
      shared.values[i] = Entry<A>::of(value);
      fits = fits && fits_units(value);
    }
    for (int k = threadIdx.x; k < depth; k += kThreads)
      shared.number[k] = number_on_map(p.part.offsets, k);
    return fits;
  }
  // The maps, and the responses to the negative template. Likewise.
  __device__ bool load_maps() const {
    bool fits = true;
    for (int b = warp; b < B; b += kWarps) {
      const T* x = p.x.data + b * p.x.batch + n * p.x.channel;
      A sum = 0;
#pragma unroll 8
      for (int k = lane; k < depth; k += 32) {
        const A value = k < positions ? static_cast<A>(x[k * p.x.position]) : A{0};
        shared.matrix[b * stride + k] = value;
        fits = fits && fits_units(value);
        sum += value;
      }
      sum = sum_warp(sum);
      if (lane != 0) continue;
      shared.matrix[b * stride + depth] = -p.tau * sum;
      p.check_assigned(b, n);
    }
    return fits;
  }

  // finish(t, what of_sample(b, t) of all samples come to), for each template.
  template <typename Value, typename OfSample, typename Finish>
  __device__ void all_columns(Value none, const OfSample& of_sample, const Finish& finish) const {
    const Columns share(templates);
    for (int base = 0; base < templates; base += share.across) {
      const int t = base + share.column;
      auto value = none;
      if (share.part < share.parts && t < templates)
        for (int b = share.part; b < B; b += share.parts) value.include(of_sample(b, t));
      value = share.combine(value, shared.scratch);
      if (share.part == 0 && t < templates) finish(t, value);
    }
    __syncthreads();
  }

  // The statistics of templates and of samples.
  __device__ void find_statistics() const {
    auto ratio = LogSum<A>::none();
    all_columns(
        LogSum<A>::none(), [&](int b, int t) { return LogSum<A>::one(place(b, t)); },
        [&](int t, const LogSum<A>& sum) {
          const A log_sum = sum.value();
          shared.column[t] = p.is_running() ? p.renew_log_mean(n, t, log_sum) : log_sum;
          ratio.include(LogSum<A>::one(log_sum - shared.column[t]));
        });
    if (p.is_running()) {
      const A log_ratio = p.renew_log_ratio(n, combine_block(ratio, shared.scratch).value());
      for (int b = threadIdx.x; b < B; b += kThreads) shared.row[b] = log_ratio;
    } else {
      for (int b = warp; b < B; b += kWarps) {
        auto sum = LogSum<A>::none();
        for (int t = lane; t < templates; t += 32)
          sum.include(LogSum<A>::one(place(b, t) - shared.column[t]));
        for (int offset = 16; offset > 0; offset /= 2) {
          const A largest = __shfl_xor_sync(kFullWarp, sum.largest, offset);
          sum.include({largest, __shfl_xor_sync(kFullWarp, sum.sum, offset)});
        }
        if (lane == 0) shared.row[b] = sum.value() - std::log(static_cast<A>(templates));
      }
    }
    __syncthreads();
  }

  __device__ void store_loss() const {
    auto total = Sum<A>::none();
    all_columns(
        Sum<A>::none(),
        [&](int b, int t) {
          return Sum<A>{p.term(b, n, t, place(b, t), shared.column[t], shared.row[b])};
        },
        [&](int t, const Sum<A>& sum) {
          shared.sums[t] = sum.sum;
          total.include(sum);
        });
    total = combine_block(total, shared.scratch);
    if (threadIdx.x == 0) p.loss[n] = -p.scale * total.sum;
  }

  // Responses become weights. Whether the matrix units take all of this thread's share.
  __device__ bool weigh() const {
    bool fits = true;
    for (int b = warp; b < B; b += kWarps) {
      for (int t = lane; t < templates; t += 32) {
        A& s = place(b, t);
        s = p.weight(b, n, t, s, shared.column[t], shared.row[b], shared.sums[t]);
        fits = fits && fits_units(s);
      }
    }
    return fits;
  }

  __device__ void store_gradient() const {
    for (int b = warp; b < B; b += kWarps) {
      A* grad = p.grad.data + b * p.grad.batch + n * p.grad.channel;
      const A negative = -p.tau * shared.matrix[b * stride + depth];
      for (int k = lane; k < positions; k += 32)
        grad[k * p.grad.position] = shared.matrix[b * stride + k] + negative;
    }
  }
};

template <typename T, int kTiles>
__global__ void __launch_bounds__(kThreads, sizeof(Accumulate<T>) == 8 ? 1 : 2)
    resident_filter(Problem<T> p, int groups) {
  const ResidentFilter<T> filter(p);
  const bool template_fits = __syncthreads_and(filter.load_template());
  bool plain = __syncthreads_or(!(filter.load_maps() && template_fits));
  multiply_in_place<false, kShortMaps<T>, kTiles>(filter.shared, p.part.offsets, filter.B, groups,
                                                  plain);
  filter.find_statistics();
  filter.store_loss();
  if (p.grad.data == nullptr) return;
  plain = __syncthreads_or(!(filter.weigh() && template_fits));
  multiply_in_place<true, false, kTiles>(filter.shared, p.part.offsets, filter.B, groups, plain);
  filter.store_gradient();
}

}  // namespace
}  // namespace picnn_fast
