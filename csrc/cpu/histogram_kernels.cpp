// Compiled once for each instruction set: setup.py passes PICNN_FAST_NAMESPACE and
// PICNN_FAST_KERNELS. Only headers whose functions live in that namespace may be included.
#include "histogram_kernels.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../common/binning.h"
#include "scalar.h"

namespace PICNN_FAST_NAMESPACE {
namespace {

using picnn_fast::FilterRange;
using picnn_fast::Histogram;
using picnn_fast::HistogramKernels;
using picnn_fast::Samples;
using picnn_fast::SoftHistogram;
using picnn_fast::SoftHistogramBackward;
using picnn_fast::Storage;

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
  const A* rows;        // kBlock filters side by side
  int64_t stride;       // of rows
  const char* next;     // the same rows of the tile that comes next
  int64_t next_stride;  // in bytes
};

// Rows [row, row + count) of one block of filters. Read where they lie if they lie side by side in
// the accumulation type, else gathered into `buffer`, 0 standing for filters beyond the last.
template <typename T, typename A>
Tile<A> open_tile(const Samples& s, int64_t row, int64_t count, int64_t filter, A* buffer) {
  const T* x =
      static_cast<const T*>(s.activations) + row * s.sample_stride + filter * s.filter_stride;
  const int64_t filters = s.filters - filter < kBlock ? s.filters - filter : kBlock;
  if constexpr (std::is_same_v<T, A>) {
    if (s.filter_stride == 1 && filters == kBlock) {
      return {x, s.sample_stride, nullptr, 0};
    }
  }
  if (filters < kBlock) {
    std::memset(buffer, 0, count * kBlock * sizeof(A));
  }
  if (s.filter_stride == 1 && filters == kBlock) {
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t f = 0; f < kBlock; ++f) {
        buffer[r * kBlock + f] = widen(x[r * s.sample_stride + f]);
      }
    }
  } else if (s.filter_stride == 1) {
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t f = 0; f < filters; ++f) {
        buffer[r * kBlock + f] = widen(x[r * s.sample_stride + f]);
      }
    }
  } else {
    for (int64_t f = 0; f < filters; ++f) {
      const T* column = x + f * s.filter_stride;
      for (int64_t r = 0; r < count; ++r) {
        buffer[r * kBlock + f] = widen(column[r * s.sample_stride]);
      }
    }
  }
  return {buffer, kBlock, nullptr, 0};
}

// Calls visit(unit, first row, count, tile) for every tile of units [begin, end). For rows that
// follow each other, as many blocks in turn as have `block_bytes` of tables in the second-level
// cache together, so that memory is read in long stretches.
template <typename T, typename A, typename Visit>
void for_tiles(const Samples& s, int64_t rows, int64_t block_bytes, int64_t begin, int64_t end,
               const Visit& visit) {
  constexpr int64_t kTableBytes = 256 << 10;
  const int64_t together = block_bytes < kTableBytes ? kTableBytes / (block_bytes + 1) + 1 : 1;
  const int64_t blocks = picnn_fast::filter_blocks(s.filters);
  alignas(64) A buffer[kTileRows * kBlock];
  while (begin < end) {
    const int64_t run = begin / blocks;
    int64_t stop = end < (run + 1) * blocks ? end : (run + 1) * blocks;
    stop = stop < begin + together ? stop : begin + together;
    const int64_t last = s.count < (run + 1) * rows ? s.count : (run + 1) * rows;
    for (int64_t row = run * rows; row < last; row += kTileRows) {
      const int64_t count = last - row < kTileRows ? last - row : kTileRows;
      for (int64_t unit = begin; unit < stop; ++unit) {
        Tile<A> tile = open_tile<T, A>(s, row, count, (unit - run * blocks) * kBlock, buffer);
        const bool turn = unit + 1 == stop;  // back to the first block, further down
        const int64_t next_row = !turn ? row : row + kTileRows < last ? row + kTileRows : row;
        const int64_t next_filter = ((turn ? begin : unit + 1) - run * blocks) * kBlock;
        tile.next = reinterpret_cast<const char*>(static_cast<const T*>(s.activations) +
                                                  next_row * s.sample_stride +
                                                  next_filter * s.filter_stride);
        tile.next_stride = s.sample_stride * static_cast<int64_t>(sizeof(T));
        visit(unit, row, count, tile);
      }
    }
    begin = stop;
  }
}

// Widens the ranges of a block by the rows of a tile; grids are left as they are. False where a
// value is not finite.
template <typename A>
bool widen_ranges(const Tile<A>& tile, int64_t count, int64_t filters, FilterRange* ranges) {
  alignas(64) A least[kBlock], most[kBlock], residue[kBlock];
  for (int64_t f = 0; f < kBlock; ++f) {
    least[f] = most[f] = tile.rows[f];
    residue[f] = 0;
  }
  for (int64_t r = 0; r < count; ++r) {
    const A* __restrict__ row = tile.rows + r * tile.stride;
    PICNN_FAST_FOR_BLOCK(f) {
      const A x = row[f];
      least[f] = x < least[f] ? x : least[f];
      most[f] = x > most[f] ? x : most[f];
      residue[f] += x - x;  // NaN from infinity and NaN
    }
  }
  bool finite = true;
  for (int64_t f = 0; f < filters; ++f) {
    FilterRange& range = ranges[f];
    range.finite = range.finite && residue[f] == 0;
    finite = finite && range.finite;
    range.minimum = least[f] < range.minimum ? least[f] : range.minimum;
    range.maximum = most[f] > range.maximum ? most[f] : range.maximum;
  }
  return finite;
}

Grid grid_before(const FilterRange& range) {
  const CellScale<double> scale = cell_scale<double>(range.exponent);
  return {range.exponent, cell_of(range.minimum, scale), cell_of(range.maximum, scale)};
}

// Moves the counts of one filter to a grid that is `shift` exponents coarser.
template <typename C>
void coarsen(C* table, const Histogram& h, const Grid& from, int shift) {
  C* merged = new C[h.cells];
  const int64_t modulo = h.cells - 1;
  for (int64_t k = 0; k < h.classes; ++k) {
    C* row = table + k * kBlock * h.cells;
    std::memset(merged, 0, h.cells * sizeof(C));
    for (int32_t cell = from.first; cell <= from.last; ++cell) {
      merged[coarser_cell(cell, shift) & modulo] += row[cell & modulo];
    }
    std::memcpy(row, merged, h.cells * sizeof(C));
  }
  delete[] merged;
}

template <typename A>
struct BlockScale {
  alignas(64) A inverse[kBlock];
  alignas(64) A width[kBlock];
};

// The range of each filter in the samples' own type, not a float wider; what lies outside, NaN and
// infinity among it, widens the range.
template <typename A>
struct BlockBounds {
  alignas(64) A low[kBlock];
  alignas(64) A high[kBlock];
};

template <typename A>
void set_bounds(BlockBounds<A>& bounds, int64_t f, const FilterRange* range) {
  constexpr A infinity = std::numeric_limits<A>::infinity();
  A low = -infinity, high = infinity;  // beyond the last filter, where every sample is 0
  if (range != nullptr) {
    low = static_cast<A>(range->minimum);
    high = static_cast<A>(range->maximum);
    low = static_cast<double>(low) < range->minimum ? std::nextafter(low, infinity) : low;
    high = static_cast<double>(high) > range->maximum ? std::nextafter(high, -infinity) : high;
  }
  bounds.low[f] = low;
  bounds.high[f] = high;
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

template <typename A>
void set_scale(BlockScale<A>& scale, int64_t f, int exponent) {
  const CellScale<A> one = cell_scale<A>(exponent);
  scale.inverse[f] = one.inverse;
  scale.width[f] = one.width;
}

// Widens the ranges of a block by rows of a tile, and moves what was counted to the new grids.
// False where a value is not finite.
template <typename A, typename C>
bool widen_tables(const Histogram& h, const Tile<A>& tile, int64_t count, int64_t filters,
                  bool fresh, FilterRange* ranges, C* table) {
  FilterRange before[kBlock];
  std::memcpy(before, ranges, filters * sizeof(FilterRange));
  if (!widen_ranges(tile, count, filters, ranges)) {
    return false;
  }
  for (int64_t f = 0; f < filters; ++f) {
    FilterRange& range = ranges[f];
    if (range.minimum != before[f].minimum || range.maximum != before[f].maximum) {
      range.exponent = grid_of(range.minimum, range.maximum, h.bins).exponent;
      if (!fresh && range.exponent != before[f].exponent) {
        coarsen(table + f * h.cells, h, grid_before(before[f]),
                range.exponent - before[f].exponent);
      }
    }
  }
  return true;
}

// C is the type of the counters.
template <typename T, typename A, typename C>
void count(const Histogram& h, int64_t begin, int64_t end) {
  const int64_t blocks = picnn_fast::filter_blocks(h.samples.filters);
  const int64_t class_cells = kBlock * h.cells;
  const uint32_t modulo = static_cast<uint32_t>(h.cells - 1);
  alignas(64) uint32_t place[kBlock];
  for (int64_t f = 0; f < kBlock; ++f) {
    place[f] = static_cast<uint32_t>(f * h.cells);
  }
  for_tiles<T, A>(
      h.samples, h.rows, h.classes * class_cells * int64_t{sizeof(C)}, begin, end,
      [&](int64_t unit, int64_t row, int64_t count, const Tile<A>& tile) {
        const int64_t first_filter = unit % blocks * kBlock;
        const int64_t left = h.samples.filters - first_filter;
        const int64_t filters = left < kBlock ? left : kBlock;
        FilterRange* ranges = h.ranges + unit * kBlock;
        C* table = static_cast<C*>(h.tables) + unit * h.classes * class_cells;
        const bool fresh = row % h.rows == 0;
        if (fresh) {
          std::memset(table, 0, h.classes * class_cells * sizeof(C));
        }
        for (int64_t f = 0; f < filters; ++f) {
          if (!ranges[f].finite) {
            return;
          }
        }
        BlockScale<A> scale;
        BlockBounds<A> bounds;
        bool underflow = false;  // of a product below 0, whose floor would be wrong
        const auto prepare = [&] {
          underflow = false;
          for (int64_t f = 0; f < kBlock; ++f) {
            const FilterRange* range = f < filters ? ranges + f : nullptr;
            set_scale(scale, f, range != nullptr ? range->exponent : 0);
            set_bounds(bounds, f, range);
            underflow |= range != nullptr && range->exponent > 0 && range->minimum < 0;
          }
        };
        prepare();
        const int64_t* labels = h.samples.labels + row;
        alignas(64) uint32_t at[kStepRows * kBlock];
        alignas(64) int32_t inside[kBlock];
        const auto locate = [&](int64_t from, int64_t to, const auto& cell) {
          std::memset(inside, 0xff, sizeof(inside));
          for (int64_t r = from; r < to; ++r) {
            const A* __restrict__ x = tile.rows + r * tile.stride;
            uint32_t* __restrict__ out = at + (r - from) * kBlock;
            PICNN_FAST_FOR_BLOCK(f) {
              inside[f] = (x[f] >= bounds.low[f]) & (x[f] <= bounds.high[f]) ? inside[f] : 0;
            }
            PICNN_FAST_FOR_BLOCK(f) {
              out[f] = (static_cast<uint32_t>(cell(x[f], f)) & modulo) | place[f];
            }
          }
        };
        for (int64_t from = 0; from < count;) {
          const int64_t to = count < from + kStepRows ? count : from + kStepRows;
          if (underflow) {
            locate(from, to, [&](A x, int64_t f) {
              return cell_of(x, CellScale<A>{scale.inverse[f], scale.width[f]});
            });
          } else {
            locate(from, to, [&](A x, int64_t f) { return floor_cell(x, scale.inverse[f]); });
          }
          int32_t all = -1;
          for (int64_t f = 0; f < kBlock; ++f) {
            all &= inside[f];
          }
          if (all == 0) {  // seldom: once the range is known, a sample in M widens it
            Tile<A> rest = tile;
            rest.rows += from * tile.stride;
            if (!widen_tables(h, rest, count - from, filters, fresh && from == 0, ranges, table)) {
              return;
            }
            prepare();
            continue;
          }
          for (int64_t r = from; r < to; ++r) {
            // Into the second level: the first is full of tables.
            __builtin_prefetch(tile.next + r * tile.next_stride, 0, 2);
            C* __restrict__ class_table = table + labels[r] * class_cells;
            const uint32_t* __restrict__ in = at + (r - from) * kBlock;
            for (int64_t f = 0; f < kBlock; ++f) {
              ++class_table[in[f]];
            }
          }
          from = to;
        }
      });
}

template <typename T, typename A>
void range(const Histogram& h, int64_t begin, int64_t end) {
  const int64_t blocks = picnn_fast::filter_blocks(h.samples.filters);
  for_tiles<T, A>(h.samples, h.rows, 0, begin, end,
                  [&](int64_t unit, int64_t, int64_t count, const Tile<A>& tile) {
                    const int64_t left = h.samples.filters - unit % blocks * kBlock;
                    widen_ranges(tile, count, left < kBlock ? left : kBlock,
                                 h.ranges + unit * kBlock);
                  });
}

template <typename T, typename A>
void count_into(const Histogram& h, int64_t begin, int64_t end) {
  const int64_t filter_cells = h.bins * h.classes;
  for_tiles<T, A>(h.samples, h.samples.count, kBlock * filter_cells * int64_t{sizeof(int64_t)},
                  begin, end, [&](int64_t block, int64_t row, int64_t count, const Tile<A>& tile) {
                    const int64_t first_filter = block * kBlock;
                    const int64_t left = h.samples.filters - first_filter;
                    const int64_t filters = left < kBlock ? left : kBlock;
                    const FilterRange* ranges = h.ranges + first_filter;
                    BlockScale<A> scale;
                    alignas(64) int32_t first[kBlock] = {};
                    for (int64_t f = 0; f < kBlock; ++f) {
                      set_scale(scale, f, f < filters ? ranges[f].exponent : 0);
                      first[f] = f < filters ? ranges[f].first : 0;
                    }
                    int64_t* table = h.counts + first_filter * filter_cells;
                    const int64_t* labels = h.samples.labels + row;
                    alignas(64) int32_t bin[kStepRows * kBlock];
                    for (int64_t from = 0; from < count; from += kStepRows) {
                      const int64_t to = count < from + kStepRows ? count : from + kStepRows;
                      for (int64_t r = from; r < to; ++r) {
                        const A* __restrict__ x = tile.rows + r * tile.stride;
                        int32_t* __restrict__ out = bin + (r - from) * kBlock;
                        PICNN_FAST_FOR_BLOCK(f) {
                          out[f] = cell_of(x[f], CellScale<A>{scale.inverse[f], scale.width[f]}) -
                                   first[f];
                        }
                      }
                      // These tables are larger than the caches: ask for all counts before waiting
                      // for one.
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

// low and width of a block; filters beyond the last lie in bin 0.
template <typename A>
void soft_scale(const void* low, const void* width, int64_t first, int64_t filters, A* block_low,
                A* block_width) {
  for (int64_t f = 0; f < kBlock; ++f) {
    const bool real = first + f < filters;
    block_low[f] = real ? static_cast<const A*>(low)[first + f] : A(0);
    block_width[f] = real ? static_cast<const A*>(width)[first + f] : A(1);
  }
}

template <typename A>
struct PairOf;
template <>
struct PairOf<float> {
  typedef float type __attribute__((vector_size(8)));
};
template <>
struct PairOf<double> {
  typedef double type __attribute__((vector_size(16)));
};
template <typename A>
using Pair = typename PairOf<A>::type;

template <typename T, typename A>
void soft(const SoftHistogram& h, int64_t begin, int64_t end) {
  const int64_t blocks = picnn_fast::filter_blocks(h.samples.filters);
  const int64_t class_cells = kBlock * h.bins;
  const A last = static_cast<A>(h.bins - 1);
  for_tiles<T, A>(
      h.samples, h.rows, h.classes * class_cells * int64_t{sizeof(A)}, begin, end,
      [&](int64_t unit, int64_t row, int64_t count, const Tile<A>& tile) {
        A* table = static_cast<A*>(h.tables) + unit * h.classes * class_cells;
        if (row % h.rows == 0) {
          std::memset(table, 0, h.classes * class_cells * sizeof(A));
        }
        alignas(64) A low[kBlock], width[kBlock];
        soft_scale(h.low, h.width, unit % blocks * kBlock, h.samples.filters, low, width);
        alignas(64) uint32_t place[kBlock];
        for (int64_t f = 0; f < kBlock; ++f) {
          place[f] = static_cast<uint32_t>(f * h.bins);
        }
        const int64_t* labels = h.samples.labels + row;
        alignas(64) uint32_t at[kStepRows * kBlock];
        alignas(64) A weights[kStepRows * kBlock * 2];
        for (int64_t from = 0; from < count; from += kStepRows) {
          const int64_t to = count < from + kStepRows ? count : from + kStepRows;
          for (int64_t r = from; r < to; ++r) {
            const A* __restrict__ x = tile.rows + r * tile.stride;
            const int64_t step = (r - from) * kBlock;
            PICNN_FAST_FOR_BLOCK(f) {
              const SoftBin<A> bin = soft_bin(soft_position(x[f], low[f], width[f]), last);
              at[step + f] = static_cast<uint32_t>(bin.below) + place[f];
              weights[(step + f) * 2] = A(1) - bin.upper;
              weights[(step + f) * 2 + 1] = bin.upper;
            }
          }
          for (int64_t r = from; r < to; ++r) {
            A* __restrict__ class_table = table + labels[r] * class_cells;
            const int64_t step = (r - from) * kBlock;
            for (int64_t f = 0; f < kBlock; ++f) {
              // Both bins at once.
              Pair<A> sum, weight;
              std::memcpy(&sum, class_table + at[step + f], sizeof(sum));
              std::memcpy(&weight, weights + (step + f) * 2, sizeof(weight));
              sum += weight;
              std::memcpy(class_table + at[step + f], &sum, sizeof(sum));
            }
          }
        }
      });
}

template <typename T, typename A>
void soft_backward(const SoftHistogramBackward& h, int64_t begin, int64_t end) {
  const int64_t blocks = picnn_fast::filter_blocks(h.samples.filters);
  const int64_t filter_cells = h.bins * h.classes;
  const A last = static_cast<A>(h.bins - 1);
  for_tiles<T, A>(
      h.samples, h.rows, kBlock * filter_cells * int64_t{sizeof(A)}, begin, end,
      [&](int64_t unit, int64_t row, int64_t count, const Tile<A>& tile) {
        const int64_t first_filter = unit % blocks * kBlock;
        const int64_t left = h.samples.filters - first_filter;
        const int64_t filters = left < kBlock ? left : kBlock;
        alignas(64) A low[kBlock], width[kBlock];
        soft_scale(h.low, h.width, first_filter, h.samples.filters, low, width);
        const A* grad_counts = static_cast<const A*>(h.grad_counts) + first_filter * filter_cells;
        T* out = static_cast<T*>(h.grad) + row * h.grad_sample_stride +
                 first_filter * h.grad_filter_stride;
        const int64_t* labels = h.samples.labels + row;
        alignas(64) A position[kStepRows * kBlock], difference[kStepRows * kBlock] = {};
        alignas(64) int32_t below[kStepRows * kBlock];
        for (int64_t from = 0; from < count; from += kStepRows) {
          const int64_t to = count < from + kStepRows ? count : from + kStepRows;
          for (int64_t r = from; r < to; ++r) {
            const A* __restrict__ x = tile.rows + r * tile.stride;
            const int64_t step = (r - from) * kBlock;
            PICNN_FAST_FOR_BLOCK(f) {
              const A t = soft_position(x[f], low[f], width[f]);
              const bool inside = (t >= A(0)) & (t < last);
              position[step + f] = t;
              below[step + f] = static_cast<int32_t>(inside ? t : A(0));
            }
          }
          for (int64_t r = from; r < to; ++r) {
            const A* class_grad = grad_counts + labels[r];
            const int64_t step = (r - from) * kBlock;
            for (int64_t f = 0; f < filters; ++f) {
              const A* pair = class_grad + f * filter_cells + below[step + f] * h.classes;
              difference[step + f] = pair[h.classes] - pair[0];
            }
          }
          for (int64_t r = from; r < to; ++r) {
            const int64_t step = (r - from) * kBlock;
            alignas(64) T grad[kBlock];
            PICNN_FAST_FOR_BLOCK(f) {
              const A t = position[step + f];
              const A slope = difference[step + f] / width[f];
              const A outside = t == t ? A(0) : t;
              const bool inside = (t >= A(0)) & (t < last);
              grad[f] = narrow<T>(inside ? slope : outside);
            }
            T* to_row = out + r * h.grad_sample_stride;
            if (h.grad_filter_stride == 1 && filters == kBlock) {
              std::memcpy(static_cast<void*>(to_row), grad, sizeof(grad));
            } else {
              for (int64_t f = 0; f < filters; ++f) {
                to_row[f * h.grad_filter_stride] = grad[f];
              }
            }
          }
        }
      });
}

void count_any(const Histogram& h, Storage storage, int64_t begin, int64_t end) {
  with_storage(storage, [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    h.rows <= picnn_fast::kShortRows ? count<T, A, uint16_t>(h, begin, end)
                                     : count<T, A, uint32_t>(h, begin, end);
  });
}

void range_any(const Histogram& h, Storage storage, int64_t begin, int64_t end) {
  with_storage(storage, [&](auto t, auto a) { range<decltype(t), decltype(a)>(h, begin, end); });
}

void count_into_any(const Histogram& h, Storage storage, int64_t begin, int64_t end) {
  with_storage(storage,
               [&](auto t, auto a) { count_into<decltype(t), decltype(a)>(h, begin, end); });
}

void soft_any(const SoftHistogram& h, Storage storage, int64_t begin, int64_t end) {
  with_storage(storage, [&](auto t, auto a) { soft<decltype(t), decltype(a)>(h, begin, end); });
}

void soft_backward_any(const SoftHistogramBackward& h, Storage storage, int64_t begin,
                       int64_t end) {
  with_storage(storage,
               [&](auto t, auto a) { soft_backward<decltype(t), decltype(a)>(h, begin, end); });
}

}  // namespace
}  // namespace PICNN_FAST_NAMESPACE

namespace picnn_fast {
const HistogramKernels PICNN_FAST_KERNELS = {
    PICNN_FAST_NAMESPACE::count_any, PICNN_FAST_NAMESPACE::range_any,
    PICNN_FAST_NAMESPACE::count_into_any, PICNN_FAST_NAMESPACE::soft_any,
    PICNN_FAST_NAMESPACE::soft_backward_any};
}  // namespace picnn_fast
