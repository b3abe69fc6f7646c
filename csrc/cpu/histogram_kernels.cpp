// Compiled once for each instruction set: setup.py passes PICNN_FAST_NAMESPACE and
// PICNN_FAST_KERNELS. Only headers whose functions live in that namespace may be included.
#include "histogram_kernels.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

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

// Rows [row, row + count) of `Width` filters. Read where they lie if they lie side by side in the
// accumulation type, else gathered into `buffer`, 0 standing for filters beyond the last.
template <typename T, typename A, int64_t Width = kBlock>
Tile<A> open_tile(const Samples& s, int64_t row, int64_t count, int64_t filter, A* buffer) {
  const T* x =
      static_cast<const T*>(s.activations) + row * s.sample_stride + filter * s.filter_stride;
  const int64_t filters = s.filters - filter < Width ? s.filters - filter : Width;
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
template <typename T, typename A, typename Visit>
void for_tiles(const Samples& s, int64_t rows, int64_t block_bytes, int64_t begin, int64_t end,
               const Visit& visit) {
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

template <typename A>
struct BlockScale {
  alignas(64) A inverse[kBlock];
  alignas(64) A width[kBlock];
};

template <typename A>
void set_scale(BlockScale<A>& scale, int64_t f, int exponent) {
  const CellScale<A> one = cell_scale<A>(exponent);
  scale.inverse[f] = one.inverse;
  scale.width[f] = one.width;
}

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
    set_scale(grid.scale, f, f < filters ? ranges[f].exponent : 0);
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
// whose range does not hold it; its cell is then worth nothing.
template <typename A, typename Cell>
PICNN_FAST_HD void locate_row(const BlockGrid<A>& grid, const A* __restrict__ x, uint32_t modulo,
                              const uint32_t* __restrict__ place, const Cell& cell,
                              uint32_t* __restrict__ out, int32_t* __restrict__ inside) {
  PICNN_FAST_FOR_BLOCK(f) {
    inside[f] = (x[f] >= grid.low[f]) & (x[f] <= grid.high[f]) ? inside[f] : 0;
  }
  PICNN_FAST_FOR_BLOCK(f) {
    out[f] = (static_cast<uint32_t>(cell(grid.scale, x[f], f)) & modulo) | place[f];
  }
}

// Calls run with a function that finds cells.
template <typename A, typename Run>
PICNN_FAST_HD void with_cell(bool underflow, const Run& run) {
  if (underflow) {
    run([](const BlockScale<A>& scale, A x, int64_t f) {
      return cell_of(x, CellScale<A>{scale.inverse[f], scale.width[f]});
    });
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

// After ranges have grown: moves what was counted, from filter `first` of the tables on, to the new
// grids.
template <typename C>
void move_tables(const Histogram& h, const FilterRange* before, FilterRange* ranges,
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

bool all_finite(const FilterRange* ranges, int64_t filters) {
  bool finite = true;
  for (int64_t f = 0; f < filters; ++f) {
    finite = finite && ranges[f].finite;
  }
  return finite;
}

// C is the type of the counters.
template <typename T, typename A, typename C>
void count(const Histogram& h, int64_t begin, int64_t end) {
  const int64_t blocks = picnn_fast::ceil_div(h.samples.filters, kBlock);
  const int64_t class_cells = h.layout.per_class;
  const uint32_t modulo = static_cast<uint32_t>(h.cells - 1);
  alignas(64) uint32_t place[kBlock];
  for (int64_t f = 0; f < kBlock; ++f) {
    place[f] = static_cast<uint32_t>(h.layout.place[f]);
  }
  for_tiles<T, A>(
      h.samples, h.rows, h.classes * class_cells * int64_t{sizeof(C)}, begin, end,
      [&](int64_t unit, int64_t row, int64_t count, const Tile<A>& tile) {
        const int64_t left = h.samples.filters - unit % blocks * kBlock;
        const int64_t filters = left < kBlock ? left : kBlock;
        FilterRange* ranges = h.ranges + unit * kBlock;
        C* table = static_cast<C*>(h.tables) + unit * h.classes * class_cells;
        if (row % h.rows == 0) {
          std::memset(table, 0, h.classes * class_cells * sizeof(C));
        }
        if (!all_finite(ranges, filters)) {
          return;
        }
        BlockGrid<A> grid;
        set_grid(grid, ranges, filters);
        const int64_t* labels = h.samples.labels + row;
        alignas(64) uint32_t at[kStepRows * kBlock];
        alignas(64) int32_t inside[kBlock];
        for (int64_t from = 0; from < count;) {
          const int64_t to = count < from + kStepRows ? count : from + kStepRows;
          std::memset(inside, 0xff, sizeof(inside));
          with_cell<A>(grid.underflow, [&](const auto& cell) {
            for (int64_t r = from; r < to; ++r) {
              locate_row(grid, tile.rows + r * tile.stride, modulo, place, cell,
                         at + (r - from) * kBlock, inside);
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

#if defined(__AVX512F__)

// Counting without a counter's load and store for each sample. The cells of the samples of one
// class, six bits each, are cut into bit planes: one vector holds bit b of 64 samples of eight
// filters. The AND of six planes or their complements marks the samples in one cell, and its
// population count is added in a register.
#define PICNN_FAST_SLICED __attribute__((target("avx512vpopcntdq,gfni")))
constexpr int64_t kSlicedBlock = picnn_fast::kSlicedBlock;
constexpr int64_t kParts = kSlicedBlock / kBlock;
// Rows of 64 cells, as many as the second-level cache has room for, shared out among the blocks of
// a pass: memory is read by whole rows, every page once, where there are at most eight blocks.
constexpr int64_t kSlicedRows = 16384;
constexpr int64_t kSlicedAtOnce = picnn_fast::kSlicedAtOnce;
constexpr int kPlanes = 6;
constexpr int kSets = 8;         // of eight filters
constexpr int64_t kGroups = 16;  // of 64 samples, whose planes stay in the fastest cache
static_assert(int64_t{1} << kPlanes == picnn_fast::kMostSlicedCells, "a plane for every bit");

struct SlicedBuffers {
  alignas(64) uint8_t cells[kSlicedRows * kSlicedBlock];
  alignas(64) uint8_t no_cells[kSlicedBlock];
  alignas(64) __m512i columns[kSets][8];
  alignas(64) __m512i planes[kSets][kGroups][kPlanes];
  uint16_t order[kSlicedRows];
};

// In every lane of 16 bytes, out[j] = the bytes 2j of all eight vectors, then the bytes 2j + 1.
PICNN_FAST_SLICED inline void transpose_bytes(const __m512i* in, __m512i* out) {
  __m512i pairs[8], fours[8];
  for (int i = 0; i < 4; ++i) {
    pairs[2 * i] = _mm512_unpacklo_epi8(in[i], in[i + 4]);
    pairs[2 * i + 1] = _mm512_unpackhi_epi8(in[i], in[i + 4]);
  }
  for (int i = 0; i < 4; ++i) {
    fours[i * 2] = _mm512_unpacklo_epi8(pairs[i], pairs[i + 4]);
    fours[i * 2 + 1] = _mm512_unpackhi_epi8(pairs[i], pairs[i + 4]);
  }
  for (int i = 0; i < 4; ++i) {
    out[i * 2] = _mm512_unpacklo_epi8(fours[i], fours[i + 4]);
    out[i * 2 + 1] = _mm512_unpackhi_epi8(fours[i], fours[i + 4]);
  }
}

// The planes of `count` samples, those rows of cells that `order` names: 64 samples a group, the
// last one filled up with cell 0. Set j has bytes 16 l + 2 j and 16 l + 2 j + 1 of each lane l.
PICNN_FAST_SLICED void slice(SlicedBuffers& buffers, const uint8_t* cells, const uint16_t* order,
                             int64_t count) {
  // Multiplied by the bits of a quadword, each byte of this matrix takes out one of its columns.
  const __m512i transpose_bits = _mm512_set1_epi64(0x8040201008040201);
  for (int64_t group = 0; group * 64 < count; ++group) {
    for (int64_t eight = 0; eight < 8; ++eight) {
      __m512i rows[8], columns[kSets];
      for (int64_t i = 0; i < 8; ++i) {
        const int64_t sample = group * 64 + eight * 8 + i;
        rows[i] = _mm512_load_si512(sample < count ? cells + order[sample] * kSlicedBlock
                                                   : buffers.no_cells);
      }
      transpose_bytes(rows, columns);  // eight samples of one filter in each quadword
      for (int set = 0; set < kSets; ++set) {
        buffers.columns[set][eight] =
            _mm512_gf2p8affine_epi64_epi8(transpose_bits, columns[set], 0);
      }
    }
    for (int set = 0; set < kSets; ++set) {
      // Eight planes of the even filters, a byte for every eight samples, then of the odd ones.
      __m512i bytes[8];
      transpose_bytes(buffers.columns[set], bytes);
      for (int pair = 0; pair < kPlanes / 2; ++pair) {
        buffers.planes[set][group][2 * pair] = _mm512_unpacklo_epi64(bytes[pair], bytes[pair + 4]);
        buffers.planes[set][group][2 * pair + 1] =
            _mm512_unpackhi_epi64(bytes[pair], bytes[pair + 4]);
      }
    }
  }
}

// x & (y or its complement) & (z or its complement)
template <int Y, int Z>
PICNN_FAST_SLICED inline __m512i both(__m512i x, __m512i y, __m512i z) {
  return _mm512_ternarylogic_epi64(x, y, z, 1 << (4 + 2 * Y + Z));
}

template <int First, int Second>
PICNN_FAST_SLICED inline void count_four(__m512i within, const __m512i* planes, __m512i* sums) {
  const __m512i four = both<First, Second>(within, planes[3], planes[2]);
  const auto add = [&](int i, __m512i cell) __attribute__((target("avx512vpopcntdq,gfni"))) {
    sums[i] = _mm512_add_epi64(sums[i], _mm512_popcnt_epi64(cell));
  };
  add(0, both<0, 0>(four, planes[1], planes[0]));
  add(1, both<0, 1>(four, planes[1], planes[0]));
  add(2, both<1, 0>(four, planes[1], planes[0]));
  add(3, both<1, 1>(four, planes[1], planes[0]));
}

// Adds to `sums` how many samples lie in the 16 cells whose upper two bits are First and Second.
template <int First, int Second>
PICNN_FAST_SLICED void count_sixteen(const __m512i (*planes)[kPlanes], int64_t groups,
                                     __m512i* out) {
  __m512i sums[16];
  for (int i = 0; i < 16; ++i) {
    sums[i] = _mm512_setzero_si512();
  }
  for (int64_t group = 0; group < groups; ++group) {
    const __m512i* p = planes[group];
    const __m512i within = both<First, Second>(_mm512_set1_epi64(-1), p[5], p[4]);
    count_four<0, 0>(within, p, sums);
    count_four<0, 1>(within, p, sums + 4);
    count_four<1, 0>(within, p, sums + 8);
    count_four<1, 1>(within, p, sums + 12);
  }
  std::memcpy(out, sums, sizeof(sums));
}

// Adds the samples of one class to its tables.
PICNN_FAST_SLICED void count_class(const Histogram& h, SlicedBuffers& buffers, const uint8_t* cells,
                                   const uint16_t* order, int64_t count, uint16_t* table) {
  constexpr int64_t kMost = kGroups * 64;
  for (int64_t from = 0; from < count; from += kMost) {
    const int64_t here = count - from < kMost ? count - from : kMost;
    const int64_t groups = (here + 63) / 64;
    slice(buffers, cells, order + from, here);
    for (int set = 0; set < kSets; ++set) {
      const __m512i(*planes)[kPlanes] = buffers.planes[set];
      __m512i counts[picnn_fast::kMostSlicedCells];
      count_sixteen<0, 0>(planes, groups, counts);
      counts[0] = _mm512_sub_epi64(counts[0], _mm512_set1_epi64(groups * 64 - here));
      if (h.cells > 16) {
        count_sixteen<0, 1>(planes, groups, counts + 16);
      }
      if (h.cells > 32) {
        count_sixteen<1, 0>(planes, groups, counts + 32);
        count_sixteen<1, 1>(planes, groups, counts + 48);
      }
      __m128i* sums = reinterpret_cast<__m128i*>(table + set * 8 * h.cells);
      for (int64_t cell = 0; cell < h.cells; ++cell) {
        const __m128i sum =
            _mm_add_epi16(_mm_loadu_si128(sums + cell), _mm512_cvtepi64_epi16(counts[cell]));
        _mm_storeu_si128(sums + cell, sum);
      }
    }
  }
}

// The cells of sixteen samples, not yet modulo anything.
template <typename A>
__m512i locate_slowly(const BlockGrid<A>& grid, const A* x, int32_t* inside) {
  alignas(64) uint32_t cells[kBlock];
  const uint32_t place[kBlock] = {};
  with_cell<A>(grid.underflow, [&](const auto& cell) {
    locate_row(grid, x, ~uint32_t{0}, place, cell, cells, inside);
  });
  return _mm512_load_si512(cells);
}

PICNN_FAST_HD __m512i locate(const BlockGrid<double>& grid, const double* x, int32_t* inside) {
  return locate_slowly(grid, x, inside);
}

PICNN_FAST_HD __m512i locate(const BlockGrid<float>& grid, const float* from, int32_t* inside) {
  const __m512 x = _mm512_loadu_ps(from);
  const __mmask16 above = _mm512_cmp_ps_mask(x, _mm512_load_ps(grid.low), _CMP_GE_OQ);
  const __mmask16 within = _mm512_mask_cmp_ps_mask(above, x, _mm512_load_ps(grid.high), _CMP_LE_OQ);
  _mm512_store_si512(inside, _mm512_maskz_mov_epi32(within, _mm512_load_si512(inside)));
  return _mm512_cvt_roundps_epi32(_mm512_mul_ps(x, _mm512_load_ps(grid.scale.inverse)),
                                  _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}

// Whether any range has grown beyond what its grid can hold.
bool leave_grids(const Histogram& h, const FilterRange* before, const FilterRange* ranges,
                 int64_t filters) {
  bool leave = false;
  for (int64_t f = 0; f < filters && !leave; ++f) {
    leave = ranges[f].differs(before[f]) &&
            grid_of(ranges[f].minimum, ranges[f].maximum, h.bins).exponent != ranges[f].exponent;
  }
  return leave;
}

// Blocks side by side, all of them in one pass over the samples.
template <typename A>
struct SlicedBlocks {
  int64_t unit, filter, filters;  // the first unit and filter, and how many filters
  BlockGrid<A> grids[kSlicedAtOnce * kParts];

  int64_t filters_of(int64_t part) const {
    const int64_t left = filters - part * kBlock;
    return left < 0 ? 0 : left < kBlock ? left : kBlock;
  }
};

// Writes the cells of rows [row, row + count) of some blocks, block after block. False where a
// sample is not finite.
template <typename T, typename A, int64_t Blocks>
bool write_cells(const Histogram& h, SlicedBlocks<A>& blocks, int64_t row, int64_t count,
                 uint8_t* cells) {
  constexpr int64_t kRows = 128 / Blocks, kWidth = Blocks * kSlicedBlock;
  constexpr int64_t kAllParts = Blocks * kParts;
  const __m512i modulo = _mm512_set1_epi32(static_cast<int32_t>(h.cells - 1));
  // Processors fetch ahead within a page, but do not look up the next one.
  const int64_t row_bytes = h.samples.sample_stride * static_cast<int64_t>(sizeof(T));
  int64_t page_rows = 1;  // a power of two
  while (row_bytes > 0 && 2 * page_rows * row_bytes <= 4096) {
    page_rows *= 2;
  }
  const char* page = reinterpret_cast<const char*>(static_cast<const T*>(h.samples.activations) +
                                                   blocks.filter * h.samples.filter_stride) +
                     (row + 2 * page_rows) * row_bytes;
  FilterRange* ranges = h.ranges + blocks.unit * kSlicedBlock;
  FilterRange before[kWidth];
  uint16_t* tables =
      static_cast<uint16_t*>(h.tables) + blocks.unit * h.classes * h.layout.per_class;
  alignas(64) A buffer[kRows * kWidth];
  alignas(64) int32_t inside[kAllParts][kBlock];
  for (int64_t from = 0; from < count;) {
    const int64_t here = count - from < kRows ? count - from : kRows;
    const Tile<A> tile =
        open_tile<T, A, kWidth>(h.samples, row + from, here, blocks.filter, buffer);
    bool underflow = false;
    for (int64_t p = 0; p < kAllParts; ++p) {
      underflow |= blocks.grids[p].underflow;
    }
    std::memset(inside, 0xff, sizeof(inside));
    const auto visit = [&](const auto& find) {
      for (int64_t r = 0; r < here; ++r) {
        if ((r & (page_rows - 1)) == 0) {
          __builtin_prefetch(page + (from + r) * row_bytes);
        }
        const A* x = tile.rows + r * tile.stride;
        _Pragma("GCC unroll 8") for (int64_t b = 0; b < Blocks; ++b) {
          __m512i at[kParts];
          _Pragma("GCC unroll 4") for (int64_t p = 0; p < kParts; ++p) {
            const int64_t part = b * kParts + p;
            at[p] =
                _mm512_and_si512(modulo, find(blocks.grids[part], x + part * kBlock, inside[part]));
          }
          // Each 16 bytes: four filters of every part.
          _mm512_store_si512(cells + (b * count + from + r) * kSlicedBlock,
                             _mm512_packus_epi16(_mm512_packs_epi32(at[0], at[1]),
                                                 _mm512_packs_epi32(at[2], at[3])));
        }
      }
    };
    if (underflow) {
      visit([](const BlockGrid<A>& grid, const A* x, int32_t* in) {
        return locate_slowly(grid, x, in);
      });
    } else {
      visit([](const BlockGrid<A>& grid, const A* x, int32_t* in) { return locate(grid, x, in); });
    }
    bool wider = false, moved = false;
    for (int64_t p = 0; p < kAllParts; ++p) {
      if (all_of(inside[p])) {
        continue;
      }
      if (!wider) {
        std::memcpy(before, ranges, sizeof(before));
        wider = true;
      }
      const Tile<A> part{tile.rows + p * kBlock, tile.stride, nullptr, 0};
      if (!widen_ranges(part, here, blocks.filters_of(p), ranges + p * kBlock)) {
        return false;
      }
      moved |= leave_grids(h, before + p * kBlock, ranges + p * kBlock, blocks.filters_of(p));
    }
    // On other grids all starts again: once, if all rows and filters are taken in.
    for (int64_t at = from + here; at < count && moved; at += kRows) {
      const int64_t some = count - at < kRows ? count - at : kRows;
      const Tile<A> rows =
          open_tile<T, A, kWidth>(h.samples, row + at, some, blocks.filter, buffer);
      for (int64_t p = 0; p < kAllParts && blocks.filters_of(p) > 0; ++p) {
        const Tile<A> part{rows.rows + p * kBlock, rows.stride, nullptr, 0};
        if (!widen_ranges(part, some, blocks.filters_of(p), ranges + p * kBlock)) {
          return false;
        }
      }
    }
    for (int64_t p = 0; p < kAllParts && wider; ++p) {
      if (moved || !all_of(inside[p])) {
        uint16_t* table = tables + p / kParts * h.classes * h.layout.per_class;
        move_tables(h, before + p * kBlock, ranges + p * kBlock, blocks.filters_of(p), table,
                    p % kParts * kBlock);
        set_grid(blocks.grids[p], ranges + p * kBlock, blocks.filters_of(p));
      }
    }
    from = moved ? 0 : wider ? from : from + here;
  }
  return true;
}

// Rows of samples in the order of their classes; those of class k end at ends[k].
inline void sort_rows(const int64_t* labels, int64_t count, int64_t classes, int32_t* ends,
                      uint16_t* order) {
  std::memset(ends, 0, (classes + 1) * sizeof(*ends));
  for (int64_t r = 0; r < count; ++r) {
    ++ends[labels[r] + 1];
  }
  for (int64_t k = 0; k < classes; ++k) {
    ends[k + 1] += ends[k];
  }
  for (int64_t r = 0; r < count; ++r) {
    order[ends[labels[r]]++] = static_cast<uint16_t>(r);
  }
}

template <typename T, typename A>
void count_sliced(const Histogram& h, int64_t begin, int64_t end) {
  const int64_t blocks = picnn_fast::ceil_div(h.samples.filters, kSlicedBlock);
  const int64_t block_cells = h.classes * h.layout.per_class;
  SlicedBuffers* buffers = new SlicedBuffers;
  std::memset(buffers->no_cells, 0, sizeof(buffers->no_cells));
  int32_t* ends = new int32_t[h.classes + 1];
  uint16_t* tables = static_cast<uint16_t*>(h.tables);
  std::memset(tables + begin * block_cells, 0, (end - begin) * block_cells * sizeof(*tables));
  for (int64_t unit = begin; unit < end;) {
    const int64_t run = unit / blocks;
    const int64_t stop = end < (run + 1) * blocks ? end : (run + 1) * blocks;
    int64_t block_count = kSlicedAtOnce;
    while (block_count > stop - unit) {
      block_count /= 2;
    }
    const int64_t rows = kSlicedRows / block_count;
    SlicedBlocks<A> at_once;
    at_once.unit = unit;
    at_once.filter = unit % blocks * kSlicedBlock;
    const int64_t most = block_count * kSlicedBlock, left = h.samples.filters - at_once.filter;
    at_once.filters = left < most ? left : most;
    for (int64_t p = 0; p < block_count * kParts; ++p) {
      set_grid(at_once.grids[p], h.ranges + unit * kSlicedBlock + p * kBlock,
               at_once.filters_of(p));
    }
    const int64_t last =
        h.samples.count < (run + 1) * h.rows ? h.samples.count : (run + 1) * h.rows;
    const int64_t pieces = picnn_fast::ceil_div(last - run * h.rows, rows);
    const int64_t piece = picnn_fast::ceil_div(last - run * h.rows, pieces);  // all about as long
    for (int64_t row = run * h.rows; row < last; row += piece) {
      const int64_t count = last - row < piece ? last - row : piece;
      const auto write = block_count == 8   ? write_cells<T, A, 8>
                         : block_count == 4 ? write_cells<T, A, 4>
                         : block_count == 2 ? write_cells<T, A, 2>
                                            : write_cells<T, A, 1>;
      if (!write(h, at_once, row, count, buffers->cells)) {
        break;
      }
      sort_rows(h.samples.labels + row, count, h.classes, ends, buffers->order);
      for (int64_t b = 0; b < block_count; ++b) {
        for (int64_t k = 0; k < h.classes; ++k) {
          const int64_t from = k > 0 ? ends[k - 1] : 0;
          count_class(h, *buffers, buffers->cells + b * count * kSlicedBlock, buffers->order + from,
                      ends[k] - from, tables + (unit + b) * block_cells + k * h.layout.per_class);
        }
      }
    }
    unit += block_count;
  }
  delete[] ends;
  delete buffers;
}

#endif

template <typename T, typename A>
void range(const Histogram& h, int64_t begin, int64_t end) {
  const int64_t blocks = picnn_fast::ceil_div(h.samples.filters, kBlock);
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
  const int64_t blocks = picnn_fast::ceil_div(h.samples.filters, kBlock);
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
  const int64_t blocks = picnn_fast::ceil_div(h.samples.filters, kBlock);
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

#if defined(__AVX512F__)
void count_sliced_any(const Histogram& h, Storage storage, int64_t begin, int64_t end) {
  with_storage(storage,
               [&](auto t, auto a) { count_sliced<decltype(t), decltype(a)>(h, begin, end); });
}
#else
constexpr decltype(HistogramKernels::count_sliced) count_sliced_any = nullptr;
#endif

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
    PICNN_FAST_NAMESPACE::count_any, PICNN_FAST_NAMESPACE::count_sliced_any,
    PICNN_FAST_NAMESPACE::range_any, PICNN_FAST_NAMESPACE::count_into_any,
    PICNN_FAST_NAMESPACE::soft_any,  PICNN_FAST_NAMESPACE::soft_backward_any};
}  // namespace picnn_fast
