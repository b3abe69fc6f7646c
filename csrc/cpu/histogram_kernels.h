#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/macros.h"
#include "../common/rounding.h"
#include "../common/types.h"

// The loops of the histogram family, compiled once for each instruction set
// (histogram_kernels.cpp).
namespace picnn_fast {

// Filters are taken in blocks, so that the tables of a block stay in the fastest caches. Buffers
// hold whole blocks; the last may be part empty.
constexpr int64_t kFilterBlock = 16;
constexpr int64_t kSlicedBlock = 64;  // of count_sliced

// Activations [count, filters] of any strides; labels contiguous and in range.
template <typename T>
struct Samples {
  int64_t count, filters;
  const T* activations;
  int64_t sample_stride, filter_stride;
  const int64_t* labels;
};

// What is known of one filter: the range of its samples (+inf, -inf without any) and their grid.
struct FilterRange {
  double minimum, maximum;
  int32_t exponent, first;
  bool finite;

  PICNN_FAST_HD bool has_samples() const { return minimum <= maximum; }
  PICNN_FAST_HD bool differs(const FilterRange& other) const {
    return minimum != other.minimum || maximum != other.maximum;
  }
};

// Tables of 16-bit counters are half as large, and more of them stay in the fastest cache.
constexpr int64_t kShortRows = 65535;

constexpr int64_t kSlicedAtOnce = 8;  // blocks
constexpr int64_t kMostSlicedCells = 64;
constexpr int64_t kMostSlicedClasses = 64;  // with more, few samples of a class are near each other

constexpr int64_t kClassesAtOnce = 8;         // of count_by_class: a cache line of counts
constexpr int64_t kSlicedClassesAtOnce = 16;  // of count_sliced_by_class

// The tables of a block count at class * per_class + place[filter] + cell * per_cell. Those of
// count_sliced keep eight filters side by side, in the order its vectors have them: of the 64 cells
// of a sample, each 16 bytes hold four filters of each of four parts, and a row of eight counters
// two neighbours of each 16 bytes.
struct TableLayout {
  int64_t per_class, per_cell;
  int32_t place[kSlicedBlock];
};

// Samples are cut into runs of `rows`. A unit is one block of filters of one run, so that any range
// of units can go to any thread: unit = run * blocks + block.
template <typename T>
struct Histogram {
  Samples<T> samples;
  int64_t bins, classes;
  int64_t rows;         // less than 2^32; tables of up to kShortRows count in 16 bits
  FilterRange* ranges;  // [units, filters of a block]; in: the range so far
  // Cell c of a filter is counted at c modulo `cells`, a power of two and at least `bins`: a range
  // that grows within its grid moves nothing.
  int64_t cells;
  TableLayout layout;  // of tables [units, classes, layout.per_class]
};

template <typename T>
struct SoftHistogram {
  Samples<T> samples;
  int64_t bins, classes;
  int64_t rows;              // of a run
  const Accumulate<T>* low;  // contiguous, as all below
  const Accumulate<T>* width;
  Accumulate<T>* tables;  // [units, classes, kFilterBlock, bins], uninitialised
};

template <typename T>
struct SoftHistogramBackward {
  Samples<T> samples;
  int64_t bins, classes;
  int64_t rows;
  const Accumulate<T>* low;
  const Accumulate<T>* width;
  const Accumulate<T>* grad_counts;  // [filters, bins, classes]
  T* grad;                           // like activations
  int64_t grad_sample_stride, grad_filter_stride;
};

// Counts [filters, bins, classes] of any strides: int64_t, float or double.
template <typename C>
struct Counts {
  int64_t filters, bins, classes;
  const C* counts;
  int64_t filter_stride, bin_stride, class_stride;
};

// The type that counts are added up in.
template <typename C>
using Sums = std::conditional_t<std::is_same_v<C, float>, float, double>;

template <typename C>
struct Information {
  Counts<C> in;
  bool by_label, corrected;
  Sums<C>* out;  // [filters, classes], or [filters] by label
};

template <typename C>
struct InformationBackward {
  Counts<C> in;
  bool by_label;
  const C* grad;  // [filters, classes], or [filters] by label, as the information
  int64_t grad_filter_stride, grad_class_stride;
  const C* information;
  int64_t information_filter_stride, information_class_stride;
  C* out;  // [filters, bins, classes]
  int64_t out_filter_stride, out_bin_stride, out_class_stride;
};

// Bins are taken so many at a time, in rows that hold whole such steps, or are one of 4 or 8.
constexpr int64_t kInformationLanes = 16;
PICNN_FAST_HD int64_t padded_bins(int64_t bins) {
  return bins <= 4 ? 4 : bins <= 8 ? 8 : round_up(bins, kInformationLanes);
}

// Numbers that the kernels below work with.
inline int64_t information_scratch(int64_t bins, int64_t classes) {
  return padded_bins(bins) * (classes + 2) + classes;
}

// Of filters [begin, end), with information_scratch() numbers to work with.
template <typename C>
struct InformationKernels {
  void (*information)(const Information<C>&, Sums<C>* scratch, int64_t begin, int64_t end);
  void (*backward)(const InformationBackward<C>&, C* scratch, int64_t begin, int64_t end);
};

template <typename T>
struct HistogramKernels {
  // Ranges and tables, uninitialised, of units [begin, end). A unit with a range that is not finite
  // has no table.
  void (*count_short)(const Histogram<T>&, uint16_t* tables, int64_t begin, int64_t end);
  void (*count_long)(const Histogram<T>&, uint32_t* tables, int64_t begin, int64_t end);
  // The same for blocks of kSlicedBlock filters and at most kMostSlicedCells cells. Null where this
  // build has none; the processor must have VPOPCNTDQ, BITALG and GFNI.
  void (*count_sliced)(const Histogram<T>&, uint16_t* tables, int64_t begin, int64_t end);
  // Ranges alone, in blocks of kFilterBlock, as all that follows.
  void (*range)(const Histogram<T>&, int64_t begin, int64_t end);
  // Adds all samples of filter blocks [begin, end) to counts [filters, bins, classes], on the grids
  // of `ranges` [blocks, kFilterBlock], which hold them.
  void (*count_into)(const Histogram<T>&, int64_t* counts, int64_t begin, int64_t end);
  // The same for filters that are neighbours in memory: rows in the order of their classes, those
  // of class k before ends[k], some classes at a time.
  void (*count_by_class)(const Histogram<T>&, const int32_t* order, const int64_t* ends,
                         int64_t* counts, int64_t begin, int64_t end);
  // The same by bit planes, under the conditions of count_sliced. A unit is one block of
  // kSlicedBlock filters of kSlicedClassesAtOnce classes: unit = classes * blocks + block.
  void (*count_sliced_by_class)(const Histogram<T>&, const int32_t* order, const int64_t* ends,
                                int64_t* counts, int64_t begin, int64_t end);
  // Units [begin, end).
  void (*soft)(const SoftHistogram<T>&, int64_t begin, int64_t end);
  void (*soft_backward)(const SoftHistogramBackward<T>&, int64_t begin, int64_t end);
};

// Converts to the kernels of any one type.
struct HistogramKernelTable : HistogramKernels<float>,
                              HistogramKernels<double>,
                              HistogramKernels<Half>,
                              HistogramKernels<BFloat16>,
                              InformationKernels<int64_t>,  // no gradient
                              InformationKernels<float>,
                              InformationKernels<double> {};

extern const HistogramKernelTable histogram_kernels_default;
#ifdef __x86_64__
extern const HistogramKernelTable histogram_kernels_avx2;
extern const HistogramKernelTable histogram_kernels_avx512;
#endif

}  // namespace picnn_fast
