#pragma once

#include "histogram_sliced.h"

#if defined(__AVX512F__)

// Hard counts by bit planes of so many classes that the counts leave the caches: four classes side
// by side, into tables of some classes, so that each line of the counts is touched once for all its
// samples.
namespace PICNN_FAST_NAMESPACE {
namespace {

constexpr int64_t kSlicedClassesAtOnce = picnn_fast::kSlicedClassesAtOnce;
constexpr int64_t kOfClass = 16;  // samples of a class among the 64 of a group
constexpr int kTables = kSlicedClassesAtOnce / 4;
// Vectors of a table, eight filters of four classes in 16 bits each: one more than there are cells
// keeps tables out of each other's way in the first-level cache.
constexpr int64_t kTable = picnn_fast::kMostSlicedCells + 1;
constexpr int64_t kSetTables = kTables * kTable;
constexpr int64_t kCellsAStep = 8;

// Lines of eight counts that get something, the first four from one table and the others from the
// next. They are added to a few at a time between the counting of other samples, each fetched long
// before: memory and arithmetic take about as long.
class Lines {
 public:
  // The lines to[j] that `some` names get column j of `from` and of the next table.
  PICNN_FAST_HD void take(__m512i to, const __m512i* from, __mmask8 some) {
    const __m512i columns = _mm512_add_epi64(_mm512_set1_epi64(reinterpret_cast<int64_t>(from)),
                                             _mm512_setr_epi64(0, 8, 16, 24, 32, 40, 48, 56));
    _mm512_storeu_si512(to_ + count_, _mm512_maskz_compress_epi64(some, to));
    _mm512_storeu_si512(from_ + count_, _mm512_maskz_compress_epi64(some, columns));
    count_ += __builtin_popcount(some);
  }
  // After so many steps all that was taken is added.
  void start(int64_t steps) { step_ = picnn_fast::ceil_div(count_ + kAhead, steps); }
  PICNN_FAST_HD void step() { run(step_); }
  PICNN_FAST_HD void finish() {
    run(count_ + kAhead);
    count_ = now_ = 0;
  }

 private:
  static constexpr int64_t kAhead = 128;
  static constexpr int64_t kMost =
      kSlicedBlock * picnn_fast::kMostSlicedCells * kSlicedClassesAtOnce / 8;

  PICNN_FAST_HD void run(int64_t lines) {
    const int64_t known = now_ + lines;
    const int64_t fetched = known < count_ ? known : count_;
    const int64_t added = known - kAhead < count_ ? known - kAhead : count_;
    int64_t i = now_ - kAhead;
    for (; now_ < fetched; ++now_, ++i) {
      __builtin_prefetch(to_[now_], 1);
      if (i >= 0) {
        add_line(i);
      }
    }
    for (i = i > 0 ? i : 0; i < added; ++i) {
      add_line(i);
    }
    now_ = added + kAhead;
  }
  // Only counts above 0 are touched: there may be no others. Always inlined, as all that stores by
  // masks must be: GCC 12 drops calls of it.
  PICNN_FAST_HD void add_line(int64_t i) const {
    const __m128i line = _mm_set_epi64x(from_[i][kTable * 8], from_[i][0]);
    const __mmask8 some = _mm_test_epi16_mask(line, line);
    const __m512i sum =
        _mm512_add_epi64(_mm512_maskz_loadu_epi64(some, to_[i]), _mm512_cvtepu16_epi64(line));
    _mm512_mask_storeu_epi64(to_[i], some, sum);
  }

  int64_t* to_[kMost + 8];
  const int64_t* from_[kMost + 8];
  int64_t count_ = 0, now_ = 0, step_ = 0;  // line now_ is fetched next, now_ - kAhead added to
};

// Adds groups of 64 samples, whose cells are in `buffers`, to the tables of four classes, or writes
// them there where `first`: 16 samples of each class, or 64 of class `one`. `missing` says how many
// of them are none, and lie in cell 0.
template <int Bits>
PICNN_FAST_SLICED void count_four_classes(int64_t table_cells, SlicedBuffers& buffers,
                                          int64_t groups, int one, __m512i missing, bool first,
                                          __m512i* tables, Lines& before) {
  slice(buffers, buffers.cells, buffers.order, groups * 64);
  for (int set = 0; set < kSets; ++set) {
    __m512i* table = tables + set * kSetTables;
    if (first) {
      count_set<Bits>(table_cells, buffers.planes[set], groups, table);
    } else {
      __m512i counts[picnn_fast::kMostSlicedCells];
      count_set<Bits>(table_cells, buffers.planes[set], groups, counts);
      for (int64_t cell = 0; cell < table_cells; ++cell) {
        const __m512i more = Bits == 64 ? _mm512_slli_epi64(counts[cell], 16 * one) : counts[cell];
        table[cell] = _mm512_add_epi16(table[cell], more);
      }
    }
    table[0] = _mm512_sub_epi16(table[0], missing);
    before.step();
  }
}

// The samples of one block of filters, on grids that hold them.
template <typename T>
class SlicedClasses {
  using A = Accumulate<T>;
  static constexpr int64_t kAhead = 16;  // rows that are fetched before they are read

 public:
  SlicedClasses(const Histogram<T>& h, int64_t block) : h_(h), filter_(block * kSlicedBlock) {
    filters_ = filters_from(h.samples.filters, filter_, kSlicedBlock);
    for (int64_t p = 0; p < kParts; ++p) {
      const int64_t filters = filters_from(filters_, p * kBlock);
      set_grid(grids_[p], h.ranges + filter_ + p * kBlock, filters);
      underflow_ |= grids_[p].underflow;
    }
  }

  // Writes the tables of four classes: of class k, counts[k] rows from order[rows[k]] on.
  void count(const int32_t* order, const int64_t* rows, const int64_t* counts,
             SlicedBuffers& buffers, __m512i* tables, Lines& before) const {
    // Sixteen samples of each class at a time, as long as two classes have some; of the one that
    // has the most, the rest by itself.
    int most = 0;
    int64_t second = 1;
    for (int k = 1; k < 4; ++k) {
      const int64_t fewer = counts[k] > counts[most] ? counts[most] : counts[k];
      second = fewer > second ? fewer : second;
      most = counts[k] > counts[most] ? k : most;
    }
    const int64_t rounds = picnn_fast::ceil_div(second, kOfClass);
    for (int64_t done = 0; done < rounds; done += kGroups) {
      const int64_t groups = rounds - done < kGroups ? rounds - done : kGroups;
      uint64_t missing = 0;
      for (int k = 0; k < 4; ++k) {
        int64_t left = counts[k] - done * kOfClass;
        for (int64_t g = 0; g < groups; ++g, left -= kOfClass) {
          const int64_t here = left < 0 ? 0 : left < kOfClass ? left : kOfClass;
          uint8_t* cells = buffers.cells + (g * 4 + k) * kOfClass * kSlicedBlock;
          write_cells(order, rows[k] + (done + g) * kOfClass, here, cells);
          std::memset(cells + here * kSlicedBlock, 0, (kOfClass - here) * kSlicedBlock);
          missing += static_cast<uint64_t>(kOfClass - here) << (16 * k);
        }
      }
      count_four_classes<16>(h_.cells, buffers, groups, 0,
                             _mm512_set1_epi64(static_cast<int64_t>(missing)), done == 0, tables,
                             before);
    }
    constexpr int64_t kMost = kGroups * 64;
    for (int64_t done = rounds * kOfClass; done < counts[most]; done += kMost) {
      const int64_t here = counts[most] - done < kMost ? counts[most] - done : kMost;
      const int64_t groups = picnn_fast::ceil_div(here, int64_t{64});
      write_cells(order, rows[most] + done, here, buffers.cells);
      std::memset(buffers.cells + here * kSlicedBlock, 0, (groups * 64 - here) * kSlicedBlock);
      count_four_classes<64>(h_.cells, buffers, groups, most,
                             _mm512_set1_epi64((groups * 64 - here) << (16 * most)), false, tables,
                             before);
    }
  }

  // Takes the lines of counts [filters, bins, classes] that get something from the tables of
  // `classes` from `first_class` on.
  PICNN_FAST_HD void take(const __m512i* tables, int64_t first_class, int64_t classes,
                          int64_t* counts, Lines& lines, Lines& before) const {
    const __m512i last_cell = _mm512_set1_epi64(h_.cells - 1);
    const __m512i row_bytes = _mm512_set1_epi64(h_.classes * int64_t{sizeof(int64_t)});
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
        const __m512i* from = tables + set * kSetTables + cell;
        const __m512i bin = _mm512_and_si512(
            last_cell, _mm512_sub_epi64(_mm512_set1_epi64(cell), _mm512_load_si512(first_cells)));
        const __m512i to =
            _mm512_add_epi64(_mm512_load_si512(rows), _mm512_mullo_epi64(bin, row_bytes));
        for (int64_t k = 0; k < classes; k += 8) {
          const __m512i* four = from + k / 4 * kTable;
          const __m512i any = _mm512_or_si512(four[0], four[kTable]);
          const auto some = static_cast<__mmask8>(held & _mm512_test_epi64_mask(any, any));
          if (some != 0) {
            lines.take(_mm512_add_epi64(to, _mm512_set1_epi64(k * int64_t{sizeof(int64_t)})), four,
                       some);
          }
        }
        if (cell % kCellsAStep == 0) {
          before.step();
        }
      }
    }
  }

 private:
  // Of column j of a set, in the layout of the tables.
  static int64_t filter_of(int64_t set, int64_t j) {
    return set / 2 * kBlock + j / 2 * 4 + set % 2 * 2 + j % 2;
  }

  void write_cells(const int32_t* order, int64_t row, int64_t count, uint8_t* cells) const {
    if (underflow_) {
      write_cells(order, row, count, cells,
                  [](const BlockGrid<A>& grid, const A* x, int32_t* inside) {
                    return locate_slowly(grid, x, inside);
                  });
    } else {
      write_cells(order, row, count, cells,
                  [](const BlockGrid<A>& grid, const A* x, int32_t* inside) {
                    return locate(grid, x, inside);
                  });
    }
  }

  template <typename Find>
  void write_cells(const int32_t* order, int64_t first, int64_t count, uint8_t* cells,
                   const Find& find) const {
    const Samples<T>& s = h_.samples;
    const T* x = s.activations + filter_;
    const __m512i modulo = _mm512_set1_epi32(static_cast<int32_t>(h_.cells - 1));
    alignas(64) A buffer[kSlicedBlock] = {};
    alignas(64) int32_t inside[kBlock] = {};
    for (int64_t r = 0; r < count; ++r) {
      const int64_t next = first + r + kAhead < s.count ? first + r + kAhead : first + r;
      const char* fetched = reinterpret_cast<const char*>(x + order[next] * s.sample_stride);
      for (int64_t byte = 0; byte < filters_ * int64_t{sizeof(T)}; byte += 64) {
        __builtin_prefetch(fetched + byte);
      }
      const T* row = x + order[first + r] * s.sample_stride;
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
  for (int64_t r = 0; r < kGroups * 64; ++r) {
    buffers->order[r] = static_cast<uint16_t>(r);
  }
  __m512i* tables = new __m512i[2 * kSets * kSetTables];
  Lines* lines = new Lines[2];
  int now = 0;
  const int64_t blocks = picnn_fast::ceil_div(h.samples.filters, kSlicedBlock);
  for (int64_t unit = begin; unit < end; ++unit) {
    const SlicedClasses<T> block(h, unit % blocks);
    const int64_t k = unit / blocks * kSlicedClassesAtOnce;
    const int64_t left = h.classes - k;
    const int64_t classes = left < kSlicedClassesAtOnce ? left : kSlicedClassesAtOnce;
    const int64_t first = k > 0 ? ends[k - 1] : 0;
    bool more = ends[k + classes - 1] > first;
    for (int64_t done = 0; more; done += kMostRows) {
      more = false;
      __m512i* unit_tables = tables + now * kSets * kSetTables;
      Lines& before = lines[now ^ 1];
      before.start(kSets * (kTables + picnn_fast::ceil_div(h.cells, kCellsAStep)));
      for (int64_t table = 0; table < picnn_fast::round_up(classes, 8) / 4; ++table) {
        int64_t rows[4], here[4];
        for (int64_t i = 0; i < 4; ++i) {
          const int64_t c = k + table * 4 + i;
          rows[i] = (c > 0 && c < h.classes ? ends[c - 1] : 0) + done;
          const int64_t rest = c < h.classes ? ends[c] - rows[i] : 0;
          here[i] = rest < 0 ? 0 : rest < kMostRows ? rest : kMostRows;
          more |= rest > kMostRows;
        }
        block.count(order, rows, here, *buffers, unit_tables + table * kTable, before);
      }
      block.take(unit_tables, k, classes, counts, lines[now], before);
      before.finish();
      now ^= 1;
    }
  }
  lines[now ^ 1].finish();
  delete[] lines;
  delete[] tables;
  delete buffers;
}

}  // namespace
}  // namespace PICNN_FAST_NAMESPACE

#endif
