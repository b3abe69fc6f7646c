#pragma once

#include <cstdint>
#include <cstring>

#include "../common/binning.h"
#include "histogram_grids.h"
#include "histogram_tiles.h"

// Hard counts: in tables that follow a growing range, or straight into the counts.
namespace PICNN_FAST_NAMESPACE {
namespace {

// Counts the rows of a tile, widening ranges and grids on the way.
template <typename T, typename C>
void count_tile(const Histogram<T>& h, const Tile<Accumulate<T>>& tile, int64_t count,
                const int64_t* labels, int64_t filters, const uint32_t* place, FilterRange* ranges,
                C* table) {
  using A = Accumulate<T>;
  const uint32_t modulo = static_cast<uint32_t>(h.cells - 1);
  BlockGrid<A> grid;
  set_grid(grid, ranges, filters);
  alignas(64) uint32_t at[kStepRows * kBlock];
  alignas(64) int32_t inside[kBlock];
  for (int64_t from = 0; from < count;) {
    const int64_t to = count < from + kStepRows ? count : from + kStepRows;
    std::memset(inside, 0xff, sizeof(inside));
    with_cell<A>(grid.underflow, [&](const auto& cell) {
      for (int64_t r = from; r < to; ++r) {
        locate_row(grid, tile.rows + r * tile.stride, modulo, place, cell, at + (r - from) * kBlock,
                   inside);
      }
    });
    if (!all_of(inside)) {  // seldom: once the range is known, a sample in M widens it
      Tile<A> rest = tile;
      rest.rows += from * tile.stride;
      FilterRange before[kBlock];
      std::memcpy(before, ranges, filters * sizeof(FilterRange));
      if (!widen_ranges(rest, count - from, filters, ranges)) {
        return;
      }
      move_tables(h, before, ranges, filters, table, 0);
      set_grid(grid, ranges, filters);
      continue;
    }
    for (int64_t r = from; r < to; ++r) {
      // Into the second level: the first is full of tables.
      __builtin_prefetch(tile.next + r * tile.next_stride, 0, 2);
      C* __restrict__ class_table = table + labels[r] * h.layout.per_class;
      const uint32_t* __restrict__ in = at + (r - from) * kBlock;
      for (int64_t f = 0; f < kBlock; ++f) {
        ++class_table[in[f]];
      }
    }
    from = to;
  }
}

template <typename T, typename C>
void count(const Histogram<T>& h, C* tables, int64_t begin, int64_t end) {
  const int64_t blocks = picnn_fast::ceil_div(h.samples.filters, kBlock);
  const int64_t block_cells = h.classes * h.layout.per_class;
  alignas(64) uint32_t place[kBlock];
  for (int64_t f = 0; f < kBlock; ++f) {
    place[f] = static_cast<uint32_t>(h.layout.place[f]);
  }
  for_tiles(h.samples, h.rows, block_cells * int64_t{sizeof(C)}, begin, end,
            [&](int64_t unit, int64_t row, int64_t count, const Tile<Accumulate<T>>& tile) {
              const int64_t filters = filters_from(h.samples.filters, unit % blocks * kBlock);
              FilterRange* ranges = h.ranges + unit * kBlock;
              C* table = tables + unit * block_cells;
              if (row % h.rows == 0) {
                std::memset(table, 0, block_cells * sizeof(C));
              }
              if (all_finite(ranges, filters)) {
                count_tile(h, tile, count, h.samples.labels + row, filters, place, ranges, table);
              }
            });
}

// Blocks whose ranges are found at once, in the registers there are: memory is read in long
// stretches.
constexpr int64_t kBlocksAtOnce = kVectorBytes / 16;

template <typename T>
void range(const Histogram<T>& h, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  constexpr int64_t kRows = kTileRows / kBlocksAtOnce, kWidth = kBlocksAtOnce * kBlock;
  const Samples<T>& s = h.samples;
  const int64_t blocks = picnn_fast::ceil_div(s.filters, kBlock);
  alignas(64) A buffer[kRows * kWidth];
  while (begin < end) {
    const int64_t run = begin / blocks, first = run * blocks;
    const int64_t stop = end < first + blocks ? end : first + blocks;
    const int64_t last = s.count < (run + 1) * h.rows ? s.count : (run + 1) * h.rows;
    for (int64_t row = run * h.rows; row < last; row += kRows) {
      const int64_t count = last - row < kRows ? last - row : kRows;
      for (int64_t unit = begin; unit < stop;) {
        const int64_t filter = (unit - first) * kBlock;
        FilterRange* ranges = h.ranges + unit * kBlock;
        if (unit + kBlocksAtOnce <= stop && filter + kWidth <= s.filters) {
          widen_ranges<kBlocksAtOnce>(open_tile<kWidth>(s, row, count, filter, buffer), count,
                                      kWidth, ranges);
          unit += kBlocksAtOnce;
        } else {
          widen_ranges(open_tile(s, row, count, filter, buffer), count,
                       filters_from(s.filters, filter), ranges);
          ++unit;
        }
      }
    }
    begin = stop;
  }
}

template <typename T>
void count_into(const Histogram<T>& h, int64_t* counts, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const int64_t filter_cells = h.bins * h.classes;
  for_tiles(h.samples, h.samples.count, kBlock * filter_cells * int64_t{sizeof(int64_t)}, begin,
            end, [&](int64_t block, int64_t row, int64_t count, const Tile<A>& tile) {
              const int64_t first_filter = block * kBlock;
              const int64_t filters = filters_from(h.samples.filters, first_filter);
              const FilterRange* ranges = h.ranges + first_filter;
              BlockScale<A> scale;
              alignas(64) int32_t first[kBlock] = {};
              for (int64_t f = 0; f < kBlock; ++f) {
                scale.set(f, f < filters ? ranges[f].exponent : 0);
                first[f] = f < filters ? ranges[f].first : 0;
              }
              int64_t* table = counts + first_filter * filter_cells;
              const int64_t* labels = h.samples.labels + row;
              alignas(64) int32_t bin[kStepRows * kBlock];
              for (int64_t from = 0; from < count; from += kStepRows) {
                const int64_t to = count < from + kStepRows ? count : from + kStepRows;
                for (int64_t r = from; r < to; ++r) {
                  const A* __restrict__ x = tile.rows + r * tile.stride;
                  int32_t* __restrict__ out = bin + (r - from) * kBlock;
                  PICNN_FAST_FOR_BLOCK(f) { out[f] = cell_of(x[f], scale.of(f)) - first[f]; }
                }
                // These tables are larger than the caches: ask for all counts before waiting for
                // one.
                const auto visit = [&](auto&& use) {
                  for (int64_t r = from; r < to; ++r) {
                    int64_t* class_table = table + labels[r];
                    const int32_t* in = bin + (r - from) * kBlock;
                    for (int64_t f = 0; f < filters; ++f) {
                      use(class_table + f * filter_cells + in[f] * h.classes);
                    }
                  }
                };
                visit([](int64_t* place) { __builtin_prefetch(place, 1); });
                visit([](int64_t* place) { ++*place; });
              }
            });
}

}  // namespace
}  // namespace PICNN_FAST_NAMESPACE
