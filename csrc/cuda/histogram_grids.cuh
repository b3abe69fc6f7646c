#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../common/binning.h"
#include "histogram_walk.cuh"

// Ranges, and the grids that follow from them.
namespace picnn_fast {
namespace {

// A key that orders as the numbers do.
__device__ Wide order_key(double x) {
  Wide bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits >> 63 != 0 ? ~bits : bits | Wide{1} << 63;
}
__device__ double of_order_key(Wide key) {
  const Wide bits = key >> 63 != 0 ? key & ~(Wide{1} << 63) : ~key;
  double x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

template <typename C>
__device__ bool is_finite(C x) {
  return x - x == C{0};
}

// Range of each filter of a block, as keys in shared memory.
struct BlockRange {
  Wide lowest[kMaxFilters], highest[kMaxFilters];

  // Takes in every thread's range of its filters, if finite. All threads of the block call it.
  template <typename C, typename Place, int FV>
  __device__ void include(const Tiling& t, const Place& place, const C (&least)[FV],
                          const C (&most)[FV]) {
    const int apart = t.filters_fast ? t.lanes : 1;  // lanes of a warp with the same filters
    const int together = min(32 / apart, kThreads / t.lanes);
#pragma unroll
    for (int i = 0; i < FV; ++i) {
      C low = least[i], high = most[i];
      for (int offset = apart * together / 2; offset >= apart; offset /= 2) {
        low = min(low, __shfl_xor_sync(kFullWarp, low, offset));
        high = max(high, __shfl_xor_sync(kFullWarp, high, offset));
      }
      if (threadIdx.x % 32 / apart % together == 0 && is_finite(low) && is_finite(high)) {
        atomicMin(&lowest[place.filter + i], order_key(low));
        atomicMax(&highest[place.filter + i], order_key(high));
      }
    }
  }
};

struct BlockThreads {
  static __device__ int rank() { return threadIdx.x; }
  static __device__ int size() { return kThreads; }
  static __device__ void wait() { __syncthreads(); }
};
struct WarpThreads {
  static __device__ int rank() { return threadIdx.x % 32; }
  static __device__ int size() { return 32; }
  static __device__ void wait() { __syncwarp(); }
};

// Moves one filter's counts, in place, from the grid `from` to `to`, which contains it. at(j, k) is
// the counter of bin j and class k. All threads of the group call it, and wait before they read
// what others moved.
template <typename Group, typename At>
__device__ void regrid(const Grid& from, const Grid& to, int64_t bins, int classes, const At& at) {
  using Count = std::remove_reference_t<decltype(at(0, 0))>;
  const int shift = min(to.exponent - from.exponent, 31);
  const int64_t first = coarser_cell(from.first, shift);
  const int64_t total = bins * classes, ahead = (total - 1) / Group::size() * Group::size();
  // Bins of one new bin are added up where the filter's first bin stays 0. They lie at its own
  // place or behind it.
  for (int64_t base = 0; shift > 0 && base < total; base += Group::size()) {
    const int64_t i = base + Group::rank(), j = i / classes;
    const int k = static_cast<int>(i % classes);
    Count sum = 0;
    if (i < total) {
      const int64_t start = (first + j) * (int64_t{1} << shift) - from.first;
      const int64_t stop = min(start + (int64_t{1} << shift), bins);
      for (int64_t c = max(start, int64_t{0}); c < stop; ++c) sum += at(c, k);
    }
    Group::wait();
    if (i < total) at(j, k) = sum;
    Group::wait();
  }
  // Then all move up, from behind, to make room for a lower minimum.
  const int64_t up = first - to.first;
  for (int64_t base = ahead; up > 0 && base >= 0; base -= Group::size()) {
    const int64_t i = base + Group::rank(), j = i / classes;
    const int k = static_cast<int>(i % classes);
    const Count moved = i < total && j >= up ? at(j - up, k) : Count{0};
    Group::wait();
    // Nothing written here is read again: the next step reads further in front.
    if (i < total) at(j, k) = moved;
  }
}

__device__ bool same(const Grid& a, const Grid& b) {
  return a.exponent == b.exponent && a.first == b.first;
}

// The values that a filter's table takes without widening, and their bins.
template <typename C>
struct Window {
  C low, high;
  CellScale<C> scale;
  int first;

  __device__ void set(const Grid& grid, int64_t bins) {
    scale = cell_scale<C>(grid.exponent);
    first = grid.first;
    // |x| < 2^(exponent + 21): as far as cells have 22 bits.
    const int64_t past = min(grid.first + bins, int64_t{1} << (kCellBits + 1));
    // The outermost edges may overflow.
    const double largest = std::is_same_v<C, float> ? FLT_MAX : DBL_MAX;
    const double from = ldexp(static_cast<double>(grid.first), grid.exponent);
    const double to = ldexp(static_cast<double>(past), grid.exponent);
    low = static_cast<C>(max(from, -largest));
    high = to > largest ? static_cast<C>(HUGE_VAL) : static_cast<C>(to);
  }
  __device__ void close() {  // takes nothing
    low = static_cast<C>(HUGE_VAL);
    high = -low;
    scale = {1, 1};
    first = 0;
  }
  __device__ bool open() const { return low < high; }
  // `none` outside, which is where NaN and infinity are. Without a branch.
  __device__ int bin(C x, int none) const {
    const bool inside = low <= x && x < high;
    const int cell = cell_of(inside ? x : C{0}, scale);
    return inside ? cell - first : none;
  }
};

}  // namespace
}  // namespace picnn_fast
