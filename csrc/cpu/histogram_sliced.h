#pragma once

#include "histogram_bit_planes.h"

#if defined(__AVX512F__)

#include "histogram_grids.h"

// Counting by bit planes: the cells of samples, a byte each, and the walk over all samples.
namespace PICNN_FAST_NAMESPACE {
namespace {

constexpr int64_t kSlicedAtOnce = picnn_fast::kSlicedAtOnce;

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

// Processors fetch ahead within a page, but do not look up the next one: this does.
struct PageAhead {
  const char* page;  // two pages behind the first row
  int64_t row_bytes;
  int64_t page_rows;  // a power of two

  PageAhead(const void* first_row, int64_t bytes) : row_bytes(bytes), page_rows(1) {
    while (row_bytes > 0 && 2 * page_rows * row_bytes <= 4096) {
      page_rows *= 2;
    }
    page = static_cast<const char*>(first_row) + 2 * page_rows * row_bytes;
  }
  void fetch(int64_t first, int64_t row) const {  // for row `row` of those that begin with `first`
    if ((row & (page_rows - 1)) == 0) {
      __builtin_prefetch(page + (first + row) * row_bytes);
    }
  }
};

// `Blocks` blocks side by side, all of them in one pass over a stretch of the samples.
template <typename T, int64_t Blocks>
class SlicedBlocks {
  using A = Accumulate<T>;
  static constexpr int64_t kRows = 128 / Blocks, kWidth = Blocks * kSlicedBlock;
  static constexpr int64_t kAllParts = Blocks * kParts;

 public:
  SlicedBlocks(const Histogram<T>& h, uint16_t* tables, int64_t unit)
      : h_(h),
        tables_(tables + unit * h.classes * h.layout.per_class),
        ranges_(h.ranges + unit * kSlicedBlock) {
    filter_ = unit % picnn_fast::ceil_div(h.samples.filters, kSlicedBlock) * kSlicedBlock;
    filters_ = filters_from(h.samples.filters, filter_, kWidth);
    set_grids([](int64_t) { return true; });
  }

  // Writes the cells of rows [row, row + count), block after block. False where a sample is not
  // finite.
  bool write_cells(int64_t row, int64_t count, uint8_t* cells) {
    const Samples<T>& s = h_.samples;
    const PageAhead ahead(s.activations + row * s.sample_stride + filter_ * s.filter_stride,
                          s.sample_stride * static_cast<int64_t>(sizeof(T)));
    alignas(64) A buffer[kRows * kWidth];
    alignas(64) int32_t inside[kAllParts][kBlock];
    for (int64_t from = 0; from < count;) {
      const int64_t here = count - from < kRows ? count - from : kRows;
      const Tile<A> tile = open_tile<kWidth>(s, row + from, here, filter_, buffer);
      std::memset(inside, 0xff, sizeof(inside));
      locate_tile(tile, from, here, count, ahead, cells, inside);
      if (all_inside(inside)) {
        from += here;
        continue;
      }
      // Again on wider grids. Where a grid itself is another one, all starts again: once, if all
      // rows and filters are taken in.
      std::memcpy(before_, ranges_, sizeof(before_));
      bool moved = false;
      if (!widen(tile, here, inside, &moved) ||
          (moved && !widen_by_rows(row, from + here, count, buffer))) {
        return false;
      }
      const auto changed = [&](int64_t part) { return moved || !all_of(inside[part]); };
      move_counts(changed);
      set_grids(changed);
      from = moved ? 0 : from;
    }
    return true;
  }

 private:
  int64_t filters_of(int64_t part) const { return filters_from(filters_, part * kBlock); }

  using Inside = int32_t[kBlock];  // of the filters of a part

  static bool all_inside(const Inside* inside) {
    bool all = true;
    for (int64_t p = 0; p < kAllParts; ++p) {
      all &= all_of(inside[p]);
    }
    return all;
  }

  template <typename Which>
  void set_grids(const Which& which) {
    for (int64_t p = 0; p < kAllParts; ++p) {
      if (which(p)) {
        set_grid(grids_[p], ranges_ + p * kBlock, filters_of(p));
      }
    }
  }

  // Cells of rows [from, from + here), of `count` in all. Never taken into its caller: there, the
  // compiler would keep `inside` twice.
  __attribute__((noinline)) void locate_tile(const Tile<A>& tile, int64_t from, int64_t here,
                                             int64_t count, const PageAhead& ahead, uint8_t* cells,
                                             Inside* inside) const {
    bool underflow = false;
    for (int64_t p = 0; p < kAllParts; ++p) {
      underflow |= grids_[p].underflow;
    }
    const __m512i modulo = _mm512_set1_epi32(static_cast<int32_t>(h_.cells - 1));
    const auto visit = [&](const auto& find) {
      for (int64_t r = 0; r < here; ++r) {
        ahead.fetch(from, r);
        const A* x = tile.rows + r * tile.stride;
        _Pragma("GCC unroll 8") for (int64_t b = 0; b < Blocks; ++b) {
          __m512i at[kParts];
          _Pragma("GCC unroll 4") for (int64_t p = 0; p < kParts; ++p) {
            const int64_t part = b * kParts + p;
            at[p] = _mm512_and_si512(modulo, find(grids_[part], x + part * kBlock, inside[part]));
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
  }

  // Widens the ranges of the parts that do not hold all rows of the tile. False where one of them
  // is not finite.
  bool widen(const Tile<A>& tile, int64_t count, const Inside* inside, bool* moved) {
    for (int64_t p = 0; p < kAllParts; ++p) {
      if (all_of(inside[p])) {
        continue;
      }
      FilterRange* ranges = ranges_ + p * kBlock;
      if (!widen_ranges(part_of(tile, p), count, filters_of(p), ranges)) {
        return false;
      }
      *moved |= leave_grids(h_, before_ + p * kBlock, ranges, filters_of(p));
    }
    return true;
  }

  // Widens all ranges by rows [row + from, row + count).
  bool widen_by_rows(int64_t row, int64_t from, int64_t count, A* buffer) {
    for (; from < count; from += kRows) {
      const int64_t here = count - from < kRows ? count - from : kRows;
      const Tile<A> tile = open_tile<kWidth>(h_.samples, row + from, here, filter_, buffer);
      for (int64_t p = 0; p < kAllParts && filters_of(p) > 0; ++p) {
        if (!widen_ranges(part_of(tile, p), here, filters_of(p), ranges_ + p * kBlock)) {
          return false;
        }
      }
    }
    return true;
  }

  static Tile<A> part_of(const Tile<A>& tile, int64_t part) {
    return {tile.rows + part * kBlock, tile.stride, nullptr, 0};
  }

  template <typename Which>
  void move_counts(const Which& which) {
    for (int64_t p = 0; p < kAllParts; ++p) {
      if (which(p)) {
        move_tables(h_, before_ + p * kBlock, ranges_ + p * kBlock, filters_of(p),
                    tables_ + p / kParts * h_.classes * h_.layout.per_class, p % kParts * kBlock);
      }
    }
  }

  const Histogram<T>& h_;
  uint16_t* tables_;
  FilterRange* ranges_;
  int64_t filter_, filters_;  // the first, and how many
  BlockGrid<A> grids_[kAllParts];
  FilterRange before_[kWidth];
};

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

// Counts units [unit, unit + Blocks), which are of one run. `ends` holds classes + 1 numbers.
template <int64_t Blocks, typename T>
void count_blocks(const Histogram<T>& h, uint16_t* tables, int64_t unit, SlicedBuffers& buffers,
                  int32_t* ends) {
  const int64_t block_cells = h.classes * h.layout.per_class;
  const int64_t run = unit / picnn_fast::ceil_div(h.samples.filters, kSlicedBlock);
  const int64_t first = run * h.rows;
  const int64_t last = h.samples.count < first + h.rows ? h.samples.count : first + h.rows;
  const int64_t pieces = picnn_fast::ceil_div(last - first, kSlicedRows / Blocks);
  const int64_t piece = picnn_fast::ceil_div(last - first, pieces);  // all about as long
  SlicedBlocks<T, Blocks> blocks(h, tables, unit);
  for (int64_t row = first; row < last; row += piece) {
    const int64_t count = last - row < piece ? last - row : piece;
    if (!blocks.write_cells(row, count, buffers.cells)) {
      return;
    }
    sort_rows(h.samples.labels + row, count, h.classes, ends, buffers.order);
    for (int64_t b = 0; b < Blocks; ++b) {
      for (int64_t k = 0; k < h.classes; ++k) {
        const int64_t from = k > 0 ? ends[k - 1] : 0;
        count_class(h.cells, buffers, buffers.cells + b * count * kSlicedBlock,
                    buffers.order + from, ends[k] - from,
                    tables + (unit + b) * block_cells + k * h.layout.per_class);
      }
    }
  }
}

template <typename T>
void count_sliced(const Histogram<T>& h, uint16_t* tables, int64_t begin, int64_t end) {
  const int64_t blocks = picnn_fast::ceil_div(h.samples.filters, kSlicedBlock);
  const int64_t block_cells = h.classes * h.layout.per_class;
  SlicedBuffers* buffers = new SlicedBuffers;
  std::memset(buffers->no_cells, 0, sizeof(buffers->no_cells));
  int32_t* ends = new int32_t[h.classes + 1];
  std::memset(tables + begin * block_cells, 0, (end - begin) * block_cells * sizeof(*tables));
  for (int64_t unit = begin; unit < end;) {
    const int64_t run_end = (unit / blocks + 1) * blocks;
    const int64_t left = (end < run_end ? end : run_end) - unit;
    const auto count_some = [&](auto some) {
      count_blocks<some>(h, tables, unit, *buffers, ends);
      unit += some;
    };
    static_assert(kSlicedAtOnce == 8, "as many as the first of these");
    if (left >= 8) {
      count_some(std::integral_constant<int64_t, 8>{});
    } else if (left >= 4) {
      count_some(std::integral_constant<int64_t, 4>{});
    } else if (left >= 2) {
      count_some(std::integral_constant<int64_t, 2>{});
    } else {
      count_some(std::integral_constant<int64_t, 1>{});
    }
  }
  delete[] ends;
  delete buffers;
}

}  // namespace
}  // namespace PICNN_FAST_NAMESPACE

#endif
