#pragma once

#include <cmath>
#include <cstdint>

#include "../common/binning.h"
#include "histogram_walk.cuh"

// Soft counts, sums of integers: weights times a power of two, so that they do not depend on the
// order in which atomics arrive. And their gradient.
namespace picnn_fast {
namespace {

constexpr Wide kPoison = Wide{1} << 63;  // a soft count with a NaN in it

template <typename C>
struct SoftGrid {
  const C *low, *width;
  int64_t low_stride, width_stride;
  int64_t bins;
};

// One filter's.
template <typename C>
struct SoftFilter {
  C low, width, last;

  __device__ void load(const SoftGrid<C>& g, int64_t n) {
    low = g.low[n * g.low_stride];
    width = g.width[n * g.width_stride];
    last = static_cast<C>(g.bins - 1);
  }
  __device__ SoftBin<C> bin(C x) const { return soft_bin(soft_position(x, low, width), last); }
  // slope_of(the bin below), 0 beyond the outer centres, NaN of NaN.
  template <typename SlopeOf>
  __device__ C gradient(C x, const SlopeOf& slope_of) const {
    const C t = soft_position(x, low, width);
    if (C{0} <= t && t < last) return slope_of(static_cast<int>(t));
    return t == t ? C{0} : t;
  }
};

// 64-bit counters in shared memory as two halves: there is no 64-bit addition in hardware.
struct Halves {
  uint32_t *low, *high;

  __device__ void add(int at, Wide amount) const {
    const uint32_t part = static_cast<uint32_t>(amount);
    const uint32_t old = atomicAdd(&low[at], part);
    const uint32_t rest = static_cast<uint32_t>(amount >> 32) + (old + part < old ? 1u : 0u);
    if (rest != 0) atomicAdd(&high[at], rest);
  }
  __device__ void poison(int at) const { atomicOr(&high[at], 0x80000000u); }
  __device__ Wide get(int at) const { return Wide{high[at]} << 32 | low[at]; }
};

// Weights in units of 2^-fraction_bits.
template <typename C>
struct SoftUnit {
  C unit;
  Wide one;

  __device__ explicit SoftUnit(int fraction_bits)
      : unit(power_of_two<C>(fraction_bits)), one(Wide{1} << fraction_bits) {}
  // That of the upper of two bins, 0 for NaN.
  __device__ Wide upper(const SoftBin<C>& bin) const {
    return bin.upper != bin.upper ? 0 : static_cast<Wide>(llrint(bin.upper * unit));
  }
  // Adds to the two bins of a sample; `at`: bin 0 of its class.
  __device__ void add(const Halves& table, int at, const SoftBin<C>& bin) const {
    const Wide above = upper(bin);
    if (above != one) table.add(at + bin.below, one - above);
    if (above != 0) table.add(at + bin.below + 1, above);
    if (bin.upper != bin.upper) {
      table.poison(at + bin.below);
      table.poison(at + bin.below + 1);
    }
  }
};

// `inverse`: 2^-fraction_bits.
template <typename C>
__device__ C soft_count(Wide sum, double inverse) {
  return static_cast<C>((sum & kPoison) != 0 ? NAN : static_cast<double>(sum) * inverse);
}

// sums [N, bins, K] in units of 2^-fraction_bits. `staged`: by way of shared memory.
template <typename T, int FV, int RV>
__global__ void __launch_bounds__(kThreads, 2)
    add_weights(Samples<const T> samples, Labels labels, Tiling tiling,
                SoftGrid<Accumulate<T>> grid, TableShape shape, bool staged, int fraction_bits,
                Wide* sums) {
  using C = Accumulate<T>;
  using Place = Walk<FV, RV>;
  const Place place(tiling, samples.M, samples.N);
  const int entries = place.filters * shape.per_filter;
  const Halves table = {dynamic_shared<uint32_t>(), dynamic_shared<uint32_t>() + entries};
  if (staged) {
    for (int i = threadIdx.x; i < 2 * entries; i += kThreads) table.low[i] = 0;
    __syncthreads();
  }
  SoftFilter<C> filter[FV];
#pragma unroll
  for (int i = 0; i < FV; ++i)
    filter[i].load(grid, min(place.first_filter + place.filter + i, samples.N - 1));
  const SoftUnit<C> unit(fraction_bits);
  for (int64_t base = place.begin; base < place.end; base += place.step()) {
    alignas(kVectorBytes) T value[Place::kPieces][FV * RV];
    place.load(samples, base, value);
#pragma unroll
    for (int u = 0; u < Place::kPieces; ++u) {
#pragma unroll
      for (int j = 0; j < RV; ++j) {
        if (place.row_of(u) + j >= place.left(base)) continue;
        const int label = labels(base + place.row_of(u) + j);
#pragma unroll
        for (int i = 0; i < FV; ++i) {
          const SoftBin<C> bin = filter[i].bin(static_cast<C>(value[u][j * FV + i]));
          if (staged) {
            unit.add(table, (place.filter + i) * shape.per_filter + label * shape.per_class, bin);
          } else {
            const Wide upper = unit.upper(bin);
            const int64_t n = place.first_filter + place.filter + i;
            Wide* at = sums + (n * grid.bins + bin.below) * labels.classes + label;
            if (upper != unit.one) atomicAdd(at, unit.one - upper);
            if (upper != 0) atomicAdd(at + labels.classes, upper);
            if (bin.upper != bin.upper) {
              atomicOr(at, kPoison);
              atomicOr(at + labels.classes, kPoison);
            }
          }
        }
      }
    }
  }
  if (!staged) return;
  __syncthreads();
  const int filters = static_cast<int>(min(int64_t{place.filters}, samples.N - place.first_filter));
  const int cells = shape.bins * shape.classes;
  for (int i = threadIdx.x; i < filters * cells; i += kThreads) {
    const int f = i / cells, j = i % cells / shape.classes, k = i % shape.classes;
    const Wide sum = table.get(f * shape.per_filter + k * shape.per_class + j);
    Wide* to = sums + place.first_filter * cells + i;
    if ((sum & kPoison) != 0)
      atomicOr(to, kPoison);
    else if (sum != 0)
      atomicAdd(to, sum);
  }
}

template <typename C>
__global__ void __launch_bounds__(kThreads)
    convert_sums(const Wide* sums, C* counts, int64_t total, int fraction_bits) {
  const double unit = power_of_two<double>(-fraction_bits);
  const int64_t apart = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < total; i += apart)
    counts[i] = soft_count<C>(sums[i], unit);
}

template <typename C>
struct GradCounts {
  const C* data;  // [N, bins, K]
  int64_t filter, bin, label;

  // (G[n, b + 1, y] - G[n, b, y]) / width
  __device__ C slope(int64_t n, int64_t b, int64_t y, C width) const {
    const C* at = data + n * filter + b * bin + y * label;
    return (at[bin] - at[0]) / width;
  }
};

template <typename T, int FV, int RV>
__global__ void __launch_bounds__(kThreads, 2)
    soft_backward(GradCounts<Accumulate<T>> grad_counts, Samples<const T> samples, Labels labels,
                  Tiling tiling, SoftGrid<Accumulate<T>> grid, TableShape shape, bool staged,
                  Samples<T> grad) {
  using C = Accumulate<T>;
  using Place = Walk<FV, RV>;
  const Place place(tiling, samples.M, samples.N);
  C* slopes = dynamic_shared<C>();
  if (staged) {
    const int filters =
        static_cast<int>(min(int64_t{place.filters}, samples.N - place.first_filter));
    const int cells = (shape.bins - 1) * shape.classes;
    for (int i = threadIdx.x; i < filters * cells; i += kThreads) {
      const int f = i / cells, b = i % cells / shape.classes, y = i % shape.classes;
      const int64_t n = place.first_filter + f;
      slopes[f * shape.per_filter + y * shape.per_class + b] =
          grad_counts.slope(n, b, y, grid.width[n * grid.width_stride]);
    }
    __syncthreads();
  }
  SoftFilter<C> filter[FV];
#pragma unroll
  for (int i = 0; i < FV; ++i)
    filter[i].load(grid, min(place.first_filter + place.filter + i, samples.N - 1));
  for (int64_t base = place.begin; base < place.end; base += place.step()) {
    alignas(kVectorBytes) T value[Place::kPieces][FV * RV];
    place.load(samples, base, value);
#pragma unroll
    for (int u = 0; u < Place::kPieces; ++u) {
#pragma unroll
      for (int j = 0; j < RV; ++j) {
        if (place.row_of(u) + j >= place.left(base)) continue;
        const int label = labels(base + place.row_of(u) + j);
#pragma unroll
        for (int i = 0; i < FV; ++i) {
          const auto slope_of = [&](int bin) {
            if (staged)
              return slopes[(place.filter + i) * shape.per_filter + label * shape.per_class + bin];
            return grad_counts.slope(place.first_filter + place.filter + i, bin, label,
                                     filter[i].width);
          };
          const C result = filter[i].gradient(static_cast<C>(value[u][j * FV + i]), slope_of);
          value[u][j * FV + i] = static_cast<T>(result);
        }
      }
    }
    place.store(grad, base, value);
  }
}

}  // namespace
}  // namespace picnn_fast
