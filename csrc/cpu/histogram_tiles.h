#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "histogram_kernels.h"
#include "scalar.h"

// Samples as the loops of the histogram family read them: some rows of a block of filters at a
// time, in the accumulation type.
namespace PICNN_FAST_NAMESPACE {
namespace {

using picnn_fast::Samples;

constexpr int64_t kBlock = picnn_fast::kFilterBlock;

// Loops over a block are vectorised only where they are not unrolled before.
#define PICNN_FAST_FOR_BLOCK(f) _Pragma("GCC unroll 1") for (int64_t f = 0; f < kBlock; ++f)
// Rows looked at at once: they stay in the second-level cache between two passes.
constexpr int64_t kTileRows = 512;
// Rows whose places are worked out before the tables are touched. The places go through memory:
// moving the lanes of a vector to scalar registers one by one takes longer.
constexpr int64_t kStepRows = 32;

template <typename A>
struct Tile {
  const A* rows;        // the filters side by side
  int64_t stride;       // of rows
  const char* next;     // the same rows of the tile that comes next
  int64_t next_stride;  // in bytes
};

// Of the filters of a block from `first` on, how many there are.
inline int64_t filters_from(int64_t filters, int64_t first, int64_t most = kBlock) {
  const int64_t left = filters - first;
  return left < 0 ? 0 : left < most ? left : most;
}

// Rows [row, row + count) of `Width` filters. Read where they lie if they lie side by side in the
// accumulation type, else gathered into `buffer`, 0 standing for filters beyond the last.
template <int64_t Width = kBlock, typename T, typename A>
Tile<A> open_tile(const Samples<T>& s, int64_t row, int64_t count, int64_t filter, A* buffer) {
  const T* x = s.activations + row * s.sample_stride + filter * s.filter_stride;
  const int64_t filters = filters_from(s.filters, filter, Width);
  if constexpr (std::is_same_v<T, A>) {
    if (s.filter_stride == 1 && filters == Width) {
      return {x, s.sample_stride, nullptr, 0};
    }
  }
  if (filters < Width) {
    std::memset(buffer, 0, count * Width * sizeof(A));
  }
  if (s.filter_stride == 1 && filters == Width) {
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t f = 0; f < Width; ++f) {
        buffer[r * Width + f] = widen(x[r * s.sample_stride + f]);
      }
    }
  } else if (s.filter_stride == 1) {
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t f = 0; f < filters; ++f) {
        buffer[r * Width + f] = widen(x[r * s.sample_stride + f]);
      }
    }
  } else {
    for (int64_t f = 0; f < filters; ++f) {
      const T* column = x + f * s.filter_stride;
      for (int64_t r = 0; r < count; ++r) {
        buffer[r * Width + f] = widen(column[r * s.sample_stride]);
      }
    }
  }
  return {buffer, Width, nullptr, 0};
}

// Calls visit(unit, first row, count, tile) for every tile of units [begin, end). For rows that
// follow each other, as many blocks in turn as have `block_bytes` of tables in the second-level
// cache together, so that memory is read in long stretches.
template <typename T, typename Visit>
void for_tiles(const Samples<T>& s, int64_t rows, int64_t block_bytes, int64_t begin, int64_t end,
               const Visit& visit) {
  using A = Accumulate<T>;
  constexpr int64_t kTableBytes = 256 << 10;
  const int64_t together = block_bytes < kTableBytes ? kTableBytes / (block_bytes + 1) + 1 : 1;
  const int64_t blocks = picnn_fast::ceil_div(s.filters, kBlock);
  alignas(64) A buffer[kTileRows * kBlock];
  while (begin < end) {
    const int64_t run = begin / blocks;
    int64_t stop = end < (run + 1) * blocks ? end : (run + 1) * blocks;
    stop = stop < begin + together ? stop : begin + together;
    const int64_t last = s.count < (run + 1) * rows ? s.count : (run + 1) * rows;
    for (int64_t row = run * rows; row < last; row += kTileRows) {
      const int64_t count = last - row < kTileRows ? last - row : kTileRows;
      for (int64_t unit = begin; unit < stop; ++unit) {
        Tile<A> tile = open_tile(s, row, count, (unit - run * blocks) * kBlock, buffer);
        const bool turn = unit + 1 == stop;  // back to the first block, further down
        const int64_t next_row = !turn ? row : row + kTileRows < last ? row + kTileRows : row;
        const int64_t next_filter = ((turn ? begin : unit + 1) - run * blocks) * kBlock;
        tile.next = reinterpret_cast<const char*>(s.activations + next_row * s.sample_stride +
                                                  next_filter * s.filter_stride);
        tile.next_stride = s.sample_stride * static_cast<int64_t>(sizeof(T));
        visit(unit, row, count, tile);
      }
    }
    begin = stop;
  }
}

}  // namespace
}  // namespace PICNN_FAST_NAMESPACE
