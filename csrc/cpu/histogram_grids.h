#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../common/binning.h"
#include "histogram_kernels.h"
#include "histogram_tiles.h"
#include "scalar.h"
#include "vector.h"

// Where the samples of a block lie on its filters' grids, and what becomes of grids and tables when
// a range grows.
namespace PICNN_FAST_NAMESPACE {
namespace {

using picnn_fast::FilterRange;
using picnn_fast::Histogram;

// Widens the ranges of some blocks side by side by the rows of a tile; grids are left as they are.
// False where a value is not finite.
template <int64_t Blocks = 1, typename A>
bool widen_ranges(const Tile<A>& tile, int64_t count, int64_t filters, FilterRange* ranges) {
  constexpr int64_t kVectors = Blocks * kBlock / kLanes<A>;
  Vector<A> least[kVectors], most[kVectors], residue[kVectors];
  for (int64_t v = 0; v < kVectors; ++v) {
    least[v] = most[v] = load<A>(tile.rows + v * kLanes<A>);
    residue[v] = Vector<A>{};
  }
  for (int64_t r = 0; r < count; ++r) {
    const A* row = tile.rows + r * tile.stride;
    for (int64_t v = 0; v < kVectors; ++v) {
      const Vector<A> x = load<A>(row + v * kLanes<A>);
      least[v] = x < least[v] ? x : least[v];
      most[v] = x > most[v] ? x : most[v];
      residue[v] += x - x;  // NaN from infinity and NaN
    }
  }
  bool finite = true;
  for (int64_t f = 0; f < filters; ++f) {
    FilterRange& range = ranges[f];
    const A low = least[f / kLanes<A>][f % kLanes<A>], high = most[f / kLanes<A>][f % kLanes<A>];
    range.finite = range.finite && residue[f / kLanes<A>][f % kLanes<A>] == 0;
    finite = finite && range.finite;
    range.minimum = low < range.minimum ? low : range.minimum;
    range.maximum = high > range.maximum ? high : range.maximum;
  }
  return finite;
}

inline bool all_finite(const FilterRange* ranges, int64_t filters) {
  bool finite = true;
  for (int64_t f = 0; f < filters; ++f) {
    finite = finite && ranges[f].finite;
  }
  return finite;
}

inline Grid grid_before(const FilterRange& range) {
  const CellScale<double> scale = cell_scale<double>(range.exponent);
  return {range.exponent, cell_of(range.minimum, scale), cell_of(range.maximum, scale)};
}

// Moves the counts of one filter to a grid that is `shift` exponents coarser.
template <typename T, typename C>
void coarsen(C* table, const Histogram<T>& h, const Grid& from, int shift) {
  C* merged = new C[h.cells];
  const int64_t modulo = h.cells - 1;
  for (int64_t k = 0; k < h.classes; ++k) {
    C* column = table + k * h.layout.per_class;
    std::memset(merged, 0, h.cells * sizeof(C));
    for (int32_t cell = from.first; cell <= from.last; ++cell) {
      merged[coarser_cell(cell, shift) & modulo] += column[(cell & modulo) * h.layout.per_cell];
    }
    for (int64_t cell = 0; cell < h.cells; ++cell) {
      column[cell * h.layout.per_cell] = merged[cell];
    }
  }
  delete[] merged;
}

// After ranges have grown: moves what was counted, from filter `first` of the tables on, to the new
// grids.
template <typename T, typename C>
void move_tables(const Histogram<T>& h, const FilterRange* before, FilterRange* ranges,
                 int64_t filters, C* table, int64_t first) {
  for (int64_t f = 0; f < filters; ++f) {
    FilterRange& range = ranges[f];
    if (range.differs(before[f])) {
      range.exponent = grid_of(range.minimum, range.maximum, h.bins).exponent;
      if (range.exponent != before[f].exponent && before[f].has_samples()) {
        coarsen(table + h.layout.place[first + f], h, grid_before(before[f]),
                range.exponent - before[f].exponent);
      }
    }
  }
}

// Whether any range has grown beyond what its grid can hold.
template <typename T>
bool leave_grids(const Histogram<T>& h, const FilterRange* before, const FilterRange* ranges,
                 int64_t filters) {
  bool leave = false;
  for (int64_t f = 0; f < filters && !leave; ++f) {
    leave = ranges[f].differs(before[f]) &&
            grid_of(ranges[f].minimum, ranges[f].maximum, h.bins).exponent != ranges[f].exponent;
  }
  return leave;
}

template <typename A>
struct BlockScale {
  alignas(64) A inverse[kBlock];
  alignas(64) A width[kBlock];

  CellScale<A> of(int64_t f) const { return {inverse[f], width[f]}; }
  void set(int64_t f, int exponent) {
    const CellScale<A> one = cell_scale<A>(exponent);
    inverse[f] = one.inverse;
    width[f] = one.width;
  }
};

// What places the samples of a block on its grids.
template <typename A>
struct BlockGrid {
  BlockScale<A> scale;
  // The range of each filter in the samples' own type, not a float wider; what lies outside, NaN
  // and infinity among it, widens the range.
  alignas(64) A low[kBlock];
  alignas(64) A high[kBlock];
  bool underflow;  // of a product below 0, whose floor would be wrong
};

// Filters beyond the last, where every sample is 0, have no bounds; there may be no others.
template <typename A>
void set_grid(BlockGrid<A>& grid, const FilterRange* ranges, int64_t filters) {
  constexpr A infinity = std::numeric_limits<A>::infinity();
  grid.underflow = false;
  for (int64_t f = 0; f < kBlock; ++f) {
    grid.low[f] = -infinity;
    grid.high[f] = infinity;
    grid.scale.set(f, f < filters ? ranges[f].exponent : 0);
    if (f < filters) {
      const FilterRange& range = ranges[f];
      const A low = static_cast<A>(range.minimum), high = static_cast<A>(range.maximum);
      grid.low[f] = static_cast<double>(low) < range.minimum ? std::nextafter(low, infinity) : low;
      grid.high[f] =
          static_cast<double>(high) > range.maximum ? std::nextafter(high, -infinity) : high;
      grid.underflow |= range.exponent > 0 && range.minimum < 0;
    }
  }
}

// floor(x * inverse), which is the cell of x where no product underflows.
template <typename A>
int32_t floor_cell(A x, A inverse) {
  const A scaled = x * inverse;
#if defined(__x86_64__) && !defined(__SSE4_1__)  // no instruction for it, and no vectors then
  const int32_t truncated = static_cast<int32_t>(scaled);
  return truncated - (static_cast<A>(truncated) > scaled ? 1 : 0);
#else
  return static_cast<int32_t>(std::floor(scaled));
#endif
}

// out = cell modulo a power of two | place, of one sample of a block. Clears `inside` of a filter
// whose range does not hold it, and takes 0 in its place, whose cell is a number at least.
template <typename A, typename Cell>
PICNN_FAST_HD void locate_row(const BlockGrid<A>& grid, const A* __restrict__ x, uint32_t modulo,
                              const uint32_t* __restrict__ place, const Cell& cell,
                              uint32_t* __restrict__ out, int32_t* __restrict__ inside) {
  alignas(64) A held[kBlock];
  PICNN_FAST_FOR_BLOCK(f) {
    const bool holds = (x[f] >= grid.low[f]) & (x[f] <= grid.high[f]);
    inside[f] = holds ? inside[f] : 0;
    held[f] = holds ? x[f] : A(0);
  }
  PICNN_FAST_FOR_BLOCK(f) {
    out[f] = (static_cast<uint32_t>(cell(grid.scale, held[f], f)) & modulo) | place[f];
  }
}

// Calls run with a function that finds cells.
template <typename A, typename Run>
PICNN_FAST_HD void with_cell(bool underflow, const Run& run) {
  if (underflow) {
    run([](const BlockScale<A>& scale, A x, int64_t f) { return cell_of(x, scale.of(f)); });
  } else {
    run([](const BlockScale<A>& scale, A x, int64_t f) { return floor_cell(x, scale.inverse[f]); });
  }
}

inline bool all_of(const int32_t* flags) {
  int32_t all = -1;
  for (int64_t f = 0; f < kBlock; ++f) {
    all &= flags[f];
  }
  return all != 0;
}

}  // namespace
}  // namespace PICNN_FAST_NAMESPACE
