#pragma once

#include "histogram_sliced.h"

#if defined(__AVX512F__)

// Hard counts by bit planes of so many classes that the counts leave the caches: class by class
// into tables of some classes, whose counts lie side by side, so that each line of the counts is
// touched once for all its samples, and each page for several lines.
namespace PICNN_FAST_NAMESPACE {
namespace {

constexpr int64_t kSlicedClassesAtOnce = picnn_fast::kSlicedClassesAtOnce;

// Lines of counts that get something: fetched once enough of them are known, and added to when the
// next ones are, so that neither waits for the other.
class Lines {
 public:
  // Eight lines of eight counts, lines[j] for what is at to[j]; those that `some` names.
  PICNN_FAST_HD void take(__m512i to, const __m128i* lines, __mmask8 some) {
    if (parts_[now_].count > kMost - 8) {
      turn();
    }
    Part& part = parts_[now_];
    std::memcpy(part.lines + part.taken * 8, lines, 8 * sizeof(*lines));
    const __m512i which = _mm512_add_epi64(_mm512_set1_epi64(part.taken * 8),
                                           _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
    _mm512_storeu_si512(part.to + part.count, _mm512_maskz_compress_epi64(some, to));
    _mm512_storeu_si512(part.which + part.count, _mm512_maskz_compress_epi64(some, which));
    part.taken += some != 0 ? 1 : 0;
    part.count += __builtin_popcount(some);
  }
  PICNN_FAST_HD void add_all() {
    turn();
    turn();
  }

 private:
  static constexpr int64_t kMost = 64;

  struct Part {
    alignas(16) __m128i lines[8 * kMost];
    int64_t* to[kMost];
    int64_t which[kMost];  // of the lines
    int64_t count = 0, taken = 0;
  };

  // Always inlined, as all that stores by masks must be: GCC 12 drops calls of it.
  PICNN_FAST_HD void turn() {
    const Part& part = parts_[now_];
    for (int64_t i = 0; i < part.count; ++i) {
      __builtin_prefetch(part.to[i], 1);
    }
    now_ ^= 1;
    add(parts_[now_]);
  }
  // Only counts above 0 are touched: there may be no others.
  static PICNN_FAST_HD void add(Part& part) {
    for (int64_t i = 0; i < part.count; ++i) {
      const __m128i line = part.lines[part.which[i]];
      const __mmask8 some = _mm_test_epi16_mask(line, line);
      const __m512i sum =
          _mm512_add_epi64(_mm512_maskz_loadu_epi64(some, part.to[i]), _mm512_cvtepu16_epi64(line));
      _mm512_mask_storeu_epi64(part.to[i], some, sum);
    }
    part.count = 0;
    part.taken = 0;
  }

  Part parts_[2];
  int now_ = 0;
};

// The samples of one block of filters, on grids that hold them.
template <typename T>
class SlicedClasses {
  using A = Accumulate<T>;
  static constexpr int64_t kAhead = 8;  // rows that are fetched before they are read

 public:
  SlicedClasses(const Histogram<T>& h, int64_t block) : h_(h), filter_(block * kSlicedBlock) {
    filters_ = filters_from(h.samples.filters, filter_, kSlicedBlock);
    for (int64_t p = 0; p < kParts; ++p) {
      const int64_t filters = filters_from(filters_, p * kBlock);
      set_grid(grids_[p], h.ranges + filter_ + p * kBlock, filters);
      underflow_ |= grids_[p].underflow;
    }
  }

  // Adds rows order[0], …, order[count - 1], which are of one class, to its table.
  void count(const int32_t* order, int64_t count, SlicedBuffers& buffers, uint16_t* table) const {
    constexpr int64_t kMost = kGroups * 64;
    for (int64_t from = 0; from < count; from += kMost) {
      const int64_t here = count - from < kMost ? count - from : kMost;
      if (underflow_) {
        write_cells(order + from, here, count - from, buffers.cells,
                    [](const BlockGrid<A>& grid, const A* x, int32_t* inside) {
                      return locate_slowly(grid, x, inside);
                    });
      } else {
        write_cells(order + from, here, count - from, buffers.cells,
                    [](const BlockGrid<A>& grid, const A* x, int32_t* inside) {
                      return locate(grid, x, inside);
                    });
      }
      count_class(h_.cells, buffers, buffers.cells, buffers.order, here, table);
    }
  }

  // Adds the tables of `classes` from `first_class` on to counts [filters, bins, classes].
  PICNN_FAST_HD void add(const uint16_t* tables, int64_t first_class, int64_t classes,
                         int64_t* counts) const {
    const __m512i last_cell = _mm512_set1_epi64(h_.cells - 1);
    const __m512i row_bytes = _mm512_set1_epi64(h_.classes * int64_t{sizeof(int64_t)});
    Lines lines;
    for (int64_t set = 0; set < kSets; ++set) {
      alignas(64) int64_t* rows[8];
      alignas(64) int64_t first_cells[8];
      __mmask8 held = 0;
      for (int64_t j = 0; j < 8; ++j) {
        const int64_t f = filter_of(set, j);
        held |= static_cast<__mmask8>(f < filters_ ? 1 << j : 0);
        const int64_t filter = filter_ + (f < filters_ ? f : 0);
        rows[j] = counts + filter * h_.bins * h_.classes + first_class;
        first_cells[j] = h_.ranges[filter].first;
      }
      for (int64_t cell = 0; cell < h_.cells; ++cell) {
        const uint16_t* from = tables + (set * h_.cells + cell) * 8;
        const __m512i bin = _mm512_and_si512(
            last_cell, _mm512_sub_epi64(_mm512_set1_epi64(cell), _mm512_load_si512(first_cells)));
        const __m512i to =
            _mm512_add_epi64(_mm512_load_si512(rows), _mm512_mullo_epi64(bin, row_bytes));
        for (int64_t k = 0; k < classes; k += 8) {
          __m128i line[8] = {}, any = {};
          for (int64_t i = 0; i < 8 && k + i < classes; ++i) {
            line[i] = _mm_loadu_si128(
                reinterpret_cast<const __m128i*>(from + (k + i) * h_.layout.per_class));
            any = _mm_or_si128(any, line[i]);
          }
          const auto some = static_cast<__mmask8>(held & _mm_test_epi16_mask(any, any));
          transpose(line);
          lines.take(_mm512_add_epi64(to, _mm512_set1_epi64(k * int64_t{sizeof(int64_t)})), line,
                     some);
        }
      }
    }
    lines.add_all();
  }

 private:
  // Of column j of a set, in the layout of the tables.
  static int64_t filter_of(int64_t set, int64_t j) {
    return set / 2 * kBlock + j / 2 * 4 + set % 2 * 2 + j % 2;
  }

  static void transpose(__m128i* x) {
    __m128i a[8], b[8];
    for (int i = 0; i < 4; ++i) {
      a[2 * i] = _mm_unpacklo_epi16(x[i], x[i + 4]);
      a[2 * i + 1] = _mm_unpackhi_epi16(x[i], x[i + 4]);
    }
    for (int i = 0; i < 4; ++i) {
      b[2 * i] = _mm_unpacklo_epi16(a[i], a[i + 4]);
      b[2 * i + 1] = _mm_unpackhi_epi16(a[i], a[i + 4]);
    }
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = _mm_unpacklo_epi16(b[i], b[i + 4]);
      x[2 * i + 1] = _mm_unpackhi_epi16(b[i], b[i + 4]);
    }
  }

  template <typename Find>
  void write_cells(const int32_t* order, int64_t count, int64_t ahead, uint8_t* cells,
                   const Find& find) const {
    const Samples<T>& s = h_.samples;
    const T* x = s.activations + filter_;
    const __m512i modulo = _mm512_set1_epi32(static_cast<int32_t>(h_.cells - 1));
    alignas(64) A buffer[kSlicedBlock] = {};
    alignas(64) int32_t inside[kBlock] = {};
    for (int64_t r = 0; r < count; ++r) {
      const int64_t next = r + kAhead < ahead ? r + kAhead : r;
      const char* fetched = reinterpret_cast<const char*>(x + order[next] * s.sample_stride);
      for (int64_t byte = 0; byte < filters_ * int64_t{sizeof(T)}; byte += 64) {
        __builtin_prefetch(fetched + byte);
      }
      const T* row = x + order[r] * s.sample_stride;
      const A* values = buffer;
      if constexpr (std::is_same_v<T, A>) {
        values = filters_ == kSlicedBlock ? row : buffer;
      }
      if (values == buffer) {
        for (int64_t f = 0; f < filters_; ++f) {
          buffer[f] = widen(row[f]);
        }
      }
      __m512i at[kParts];
      _Pragma("GCC unroll 4") for (int64_t p = 0; p < kParts; ++p) {
        at[p] = _mm512_and_si512(modulo, find(grids_[p], values + p * kBlock, inside));
      }
      _mm512_store_si512(
          cells + r * kSlicedBlock,
          _mm512_packus_epi16(_mm512_packs_epi32(at[0], at[1]), _mm512_packs_epi32(at[2], at[3])));
    }
  }

  const Histogram<T>& h_;
  int64_t filter_, filters_;
  BlockGrid<A> grids_[kParts];
  bool underflow_ = false;
};

template <typename T>
void count_sliced_by_class(const Histogram<T>& h, const int32_t* order, const int64_t* ends,
                           int64_t* counts, int64_t begin, int64_t end) {
  constexpr int64_t kMostRows = picnn_fast::kShortRows;
  SlicedBuffers* buffers = new SlicedBuffers;
  std::memset(buffers->no_cells, 0, sizeof(buffers->no_cells));
  for (int64_t r = 0; r < kGroups * 64; ++r) {
    buffers->order[r] = static_cast<uint16_t>(r);
  }
  const int64_t per_class = h.layout.per_class, size = kSlicedClassesAtOnce * per_class;
  uint16_t* tables = new uint16_t[size];
  const int64_t blocks = picnn_fast::ceil_div(h.samples.filters, kSlicedBlock);
  for (int64_t unit = begin; unit < end; ++unit) {
    const SlicedClasses<T> block(h, unit % blocks);
    const int64_t k = unit / blocks * kSlicedClassesAtOnce;
    const int64_t next =
        k + kSlicedClassesAtOnce < h.classes ? k + kSlicedClassesAtOnce : h.classes;
    bool more = true;
    for (int64_t done = 0; more; done += kMostRows) {
      more = false;
      std::memset(tables, 0, size * sizeof(*tables));
      for (int64_t c = k; c < next; ++c) {
        const int64_t row = (c > 0 ? ends[c - 1] : 0) + done, left = ends[c] - row;
        if (left > 0) {
          block.count(order + row, left < kMostRows ? left : kMostRows, *buffers,
                      tables + (c - k) * per_class);
        }
        more |= left > kMostRows;
      }
      block.add(tables, k, next - k, counts);
    }
  }
  delete[] tables;
  delete buffers;
}

}  // namespace
}  // namespace PICNN_FAST_NAMESPACE

#endif
