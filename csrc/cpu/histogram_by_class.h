#pragma once

#include <cstdint>
#include <cstring>

#include "../common/binning.h"
#include "histogram_grids.h"
#include "histogram_tiles.h"

// Hard counts of so many classes that the counts leave the caches: class by class, a few of them in
// a small table, so that each line of the counts is touched once for all its samples.
namespace PICNN_FAST_NAMESPACE {
namespace {

constexpr int64_t kClassesAtOnce = picnn_fast::kClassesAtOnce;

// The samples of one block of filters that lie in some rows, on grids that hold them.
template <typename T>
struct BlockOfClasses {
  using A = Accumulate<T>;

  const Histogram<T>& h;
  int64_t filter, filters, first_class;
  BlockScale<A> scale;
  alignas(64) int32_t first[kBlock];
  alignas(64) int32_t place[kBlock];  // of a filter in the table

  BlockOfClasses(const Histogram<T>& h_, int64_t block, int64_t first_class_)
      : h(h_), filter(block * kBlock), first_class(first_class_) {
    filters = filters_from(h.samples.filters, filter);
    for (int64_t f = 0; f < kBlock; ++f) {
      scale.set(f, f < filters ? h.ranges[filter + f].exponent : 0);
      first[f] = f < filters ? h.ranges[filter + f].first : 0;
      place[f] = static_cast<int32_t>(f * h.bins);
    }
  }

  // Adds rows order[0], …, order[count - 1] to table [kBlock, bins, kClassesAtOnce]; those that
  // follow, `ahead` of them, are fetched. Filters are neighbours in memory.
  void count(const int32_t* order, int64_t count, int64_t ahead, uint16_t* table) const {
    const Samples<T>& s = h.samples;
    const T* x = s.activations + filter;
    alignas(64) A values[kStepRows * kBlock] = {};
    alignas(64) int32_t at[kStepRows * kBlock];
    for (int64_t from = 0; from < count; from += kStepRows) {
      const int64_t here = count - from < kStepRows ? count - from : kStepRows;
      for (int64_t r = 0; r < here; ++r) {
        if (from + r + kStepRows < count + ahead) {
          __builtin_prefetch(x + order[from + r + kStepRows] * s.sample_stride);
        }
        const T* row = x + order[from + r] * s.sample_stride;
        if (filters == kBlock) {
          for (int64_t f = 0; f < kBlock; ++f) {
            values[r * kBlock + f] = widen(row[f]);
          }
        } else {
          for (int64_t f = 0; f < filters; ++f) {
            values[r * kBlock + f] = widen(row[f]);
          }
        }
      }
      for (int64_t r = 0; r < here; ++r) {
        const A* __restrict__ value = values + r * kBlock;
        int32_t* __restrict__ out = at + r * kBlock;
        PICNN_FAST_FOR_BLOCK(f) {
          const int32_t bin = cell_of(value[f], scale.of(f)) - first[f];
          out[f] = (bin + place[f]) * static_cast<int32_t>(kClassesAtOnce);
        }
      }
      for (int64_t r = 0; r < here; ++r) {
        uint16_t* class_table = table + (s.labels[order[from + r]] - first_class);
        const int32_t* in = at + r * kBlock;
        for (int64_t f = 0; f < filters; ++f) {
          ++class_table[in[f]];
        }
      }
    }
  }

  // Adds the table to counts [filters, bins, classes] and clears it.
  void add(uint16_t* table, int64_t* counts) const {
    const int64_t left = h.classes - first_class;
    const int64_t classes = left < kClassesAtOnce ? left : kClassesAtOnce;
    int64_t* to = counts + filter * h.bins * h.classes + first_class;
    for (int64_t cell = 0; cell < filters * h.bins; ++cell, to += h.classes) {
      uint16_t* from = table + cell * kClassesAtOnce;
      uint64_t some[2];
      static_assert(sizeof(some) == kClassesAtOnce * sizeof(*from));
      std::memcpy(some, from, sizeof(some));
      if ((some[0] | some[1]) == 0) {
        continue;
      }
      for (int64_t k = 0; k < classes; ++k) {
        to[k] += from[k];
      }
      std::memset(from, 0, sizeof(some));
    }
  }
};

template <typename T>
void count_by_class(const Histogram<T>& h, const int32_t* order, const int64_t* ends,
                    int64_t* counts, int64_t begin, int64_t end) {
  constexpr int64_t kMostRows = picnn_fast::kShortRows;
  uint16_t* table = new uint16_t[kBlock * h.bins * kClassesAtOnce]();
  for (int64_t k = 0; k < h.classes; k += kClassesAtOnce) {
    const int64_t next = k + kClassesAtOnce < h.classes ? k + kClassesAtOnce : h.classes;
    const int64_t first = k > 0 ? ends[k - 1] : 0, last = ends[next - 1];
    // The blocks in turn, while their rows' pages are known.
    for (int64_t b = begin; b < end; ++b) {
      const BlockOfClasses<T> block(h, b, k);
      for (int64_t row = first; row < last; row += kMostRows) {
        const int64_t count = last - row < kMostRows ? last - row : kMostRows;
        block.count(order + row, count, last - row - count, table);
        block.add(table, counts);
      }
    }
  }
  delete[] table;
}

}  // namespace
}  // namespace PICNN_FAST_NAMESPACE
