// CPU operators of the histogram family: check, allocate, and cut the work for the thread pool.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "../common/binning.h"
#include "capability.h"
#include "histogram_kernels.h"
#include "tensors.h"

namespace picnn_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const HistogramKernels& kernels() { return PICNN_FAST_KERNELS_IN_USE(histogram_kernels); }

void check_type(const Tensor& t, const char* name, ScalarType type, const char* want) {
  STD_TORCH_CHECK(t.scalar_type() == type, name, ": want ", want);
}

void check_bins(const char* name, int64_t bins) {
  STD_TORCH_CHECK(bins >= 2 && bins <= 1 << 24, name, ": got ", bins, " bins, want 2 to 2**24");
}

// One class index for each of the samples.
Tensor indices_of(const Tensor& activations, const Tensor& labels, int64_t classes) {
  STD_TORCH_CHECK(activations.dim() == 2, "activations: want [samples, filters]");
  return class_indices(labels, "labels", activations.size(0), classes);
}

// `indices` must outlive the result.
Samples samples_of(const Tensor& activations, const Tensor& indices) {
  return {activations.size(0),          activations.size(1),
          activations.const_data_ptr(), activations.stride(0),
          activations.stride(1),        static_cast<const int64_t*>(indices.const_data_ptr())};
}

// A table of its own for every filter.
TableLayout plain_layout(int64_t cells) {
  TableLayout layout{kFilterBlock * cells, 1, {}};
  for (int64_t f = 0; f < kFilterBlock; ++f) {
    layout.place[f] = static_cast<int32_t>(f * cells);
  }
  return layout;
}

// A cache line between classes keeps them out of each other's way in the first-level cache, where
// powers of two collide.
TableLayout sliced_layout(int64_t cells) {
  TableLayout layout{kSlicedBlock * cells + 32, 8, {}};
  for (int64_t f = 0; f < kSlicedBlock; ++f) {
    const int64_t part = f / 16, lane = f % 16 / 4, set = part * 2 + f % 4 / 2;
    layout.place[f] = static_cast<int32_t>(set * cells * 8 + lane * 2 + f % 2);
  }
  return layout;
}

bool counts_bits_fast() {
#ifdef __x86_64__
  return __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("gfni");
#else
  return false;
#endif
}

template <typename F>
void parallel(int64_t count, int64_t elements_each, const F& run) {
  torch::stable::parallel_for(
      0, count, std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, elements_each)), run);
}

Grid grid_of(const FilterRange& range, int64_t bins) {
  return PICNN_FAST_NAMESPACE::grid_of(range.minimum, range.maximum, bins);
}

// The range so far of each filter.
std::vector<FilterRange> ranges_of(const Tensor& minimum, const Tensor& maximum, int64_t bins,
                                   int64_t padded) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  const int64_t filters = minimum.numel();
  const double* low = static_cast<const double*>(minimum.const_data_ptr());
  const double* high = static_cast<const double*>(maximum.const_data_ptr());
  std::vector<FilterRange> ranges(static_cast<size_t>(padded),
                                  {infinity, -infinity, kSmallestExponent, 0, true});
  for (int64_t n = 0; n < filters; ++n) {
    const bool empty = low[n] == infinity && high[n] == -infinity;
    STD_TORCH_CHECK(empty || (std::isfinite(low[n]) && std::isfinite(high[n]) && low[n] <= high[n]),
                    "minimum, maximum: got [", low[n], ", ", high[n], "] for filter ", n,
                    ", want a finite range, or [inf, -inf] for none");
    ranges[n].minimum = low[n];
    ranges[n].maximum = high[n];
    if (!empty) {
      const Grid grid = grid_of(ranges[n], bins);
      ranges[n].exponent = grid.exponent;
      ranges[n].first = grid.first;
    }
  }
  return ranges;
}

// The first filter with a sample that is not finite, in any run; -1 where all are.
int64_t first_not_finite(const FilterRange* ranges, int64_t runs, int64_t padded, int64_t filters) {
  for (int64_t n = 0; n < filters; ++n) {
    for (int64_t run = 0; run < runs; ++run) {
      if (!ranges[run * padded + n].finite) {
        return n;
      }
    }
  }
  return -1;
}

// Ranges of all runs together, with their grid.
std::vector<FilterRange> joined(const std::vector<FilterRange>& before, const FilterRange* ranges,
                                int64_t runs, int64_t filters, int64_t bins) {
  std::vector<FilterRange> result = before;
  const int64_t padded = static_cast<int64_t>(before.size());
  for (int64_t n = 0; n < filters; ++n) {
    FilterRange& range = result[n];
    for (int64_t run = 0; run < runs; ++run) {
      const FilterRange& other = ranges[run * padded + n];
      range.minimum = std::min(range.minimum, other.minimum);
      range.maximum = std::max(range.maximum, other.maximum);
    }
    if (range.differs(before[n])) {
      const Grid grid = grid_of(range, bins);
      range.exponent = grid.exponent;
      range.first = grid.first;
    }
  }
  return result;
}

// Moves the counts [bins, classes] of one filter from one range's grid to that of a wider one.
void move_counts(int64_t* counts, int64_t bins, int64_t classes, const FilterRange& from,
                 const FilterRange& to) {
  if (!from.has_samples() || (from.exponent == to.exponent && from.first == to.first)) {
    return;
  }
  const Grid old = grid_of(from, bins);
  std::vector<int64_t> moved(static_cast<size_t>(bins * classes));
  for (int64_t bin = 0; bin <= old.last - old.first; ++bin) {
    const int32_t cell = old.first + static_cast<int32_t>(bin);
    const int64_t place = coarser_cell(cell, to.exponent - from.exponent) - to.first;
    for (int64_t k = 0; k < classes; ++k) {
      moved[place * classes + k] += counts[bin * classes + k];
    }
  }
  std::copy(moved.begin(), moved.end(), counts);
}

// Tables have a row for each class, counts a column: crossing over, only so many rows at once stay
// in the first-level cache, where they lie a power of two apart.
template <typename F>
void for_class_blocks(int64_t classes, const F& visit) {
  constexpr int64_t kClasses = 8;
  for (int64_t begin = 0; begin < classes; begin += kClasses) {
    visit(begin, std::min(classes, begin + kClasses));
  }
}

// Adds the table of filter n of one run.
template <typename C>
void add_table(int64_t* counts, const Histogram& h, int64_t block, int64_t run, int64_t n,
               const FilterRange& to) {
  const int64_t unit = run * ceil_div(h.samples.filters, block) + n / block;
  const FilterRange& from = h.ranges[unit * block + n % block];
  const TableLayout& layout = h.layout;
  const C* table = static_cast<const C*>(h.tables) + unit * h.classes * layout.per_class +
                   layout.place[n % block];
  const Grid grid = grid_of(from, h.bins);
  const int shift = to.exponent - from.exponent;
  for_class_blocks(h.classes, [&](int64_t begin, int64_t end) {
    for (int32_t cell = grid.first; cell <= grid.last; ++cell) {
      int64_t* bin = counts + (coarser_cell(cell, shift) - to.first) * h.classes;
      const C* column = table + (cell & (h.cells - 1)) * layout.per_cell;
      for (int64_t k = begin; k < end; ++k) {
        bin[k] += column[k * layout.per_class];
      }
    }
  });
}

Tensor histogram_update(const Tensor& counts, const Tensor& minimum, const Tensor& maximum,
                        const Tensor& activations, const Tensor& labels) {
  STD_TORCH_CHECK(counts.dim() == 3 && counts.scalar_type() == ScalarType::Long,
                  "counts: want int64 [filters, bins, classes]");
  const Storage type = storage(activations, "activations");
  const int64_t bins = counts.size(1), classes = counts.size(2);
  const Tensor indices = indices_of(activations, labels, classes);
  const int64_t filters = activations.size(1);
  check_shape(counts, "counts", {filters, bins, classes});
  check_bins("counts", bins);
  for (const auto& [t, name] : {std::pair(&minimum, "minimum"), std::pair(&maximum, "maximum")}) {
    check_shape(*t, name, {filters});
    check_type(*t, name, ScalarType::Double, "float64");
  }
  STD_TORCH_CHECK(counts.is_contiguous() && minimum.is_contiguous() && maximum.is_contiguous(),
                  "counts, minimum, maximum: want contiguous tensors");
  const Samples samples = samples_of(activations, indices);
  Tensor column = torch::stable::new_empty(labels, {}, ScalarType::Long);
  int64_t& first_bad = *static_cast<int64_t*>(column.mutable_data_ptr());
  first_bad = -1;
  if (samples.count == 0 || filters == 0) {
    return column;
  }

  int64_t cells = 2;
  while (cells < bins) {
    cells *= 2;
  }
  const HistogramKernels& k = kernels();
  // Where there are samples enough of every class to fill the vectors.
  const bool sliced = k.count_sliced != nullptr && counts_bits_fast() &&
                      cells <= kMostSlicedCells && filters >= kSlicedBlock / 2 &&
                      classes <= kMostSlicedClasses && samples.count >= 128 * classes;
  static_assert(8 * kMostSlicedClasses * kMostSlicedCells <= kShortRows, "16 bits hold a run");
  const int64_t block = sliced ? kSlicedBlock : kFilterBlock;
  const int64_t blocks = ceil_div(filters, block), padded = blocks * block;
  // Runs for every thread, each with tables of its own where it has many samples for each cell:
  // clearing the tables and adding them up would cost more than a second read of the samples.
  const int64_t table_cells = classes * cells;
  // Even cut in halves, runs must have rows enough for tables.
  const int64_t most_rows = 8 * table_cells <= kShortRows ? kShortRows : int64_t{1} << 31;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t least_rows = std::max<int64_t>(4096, 4 * table_cells);
  // Whole rows are read faster than pieces: a run a thread where there are few blocks.
  const int64_t splits = sliced ? std::min(threads, ceil_div(kSlicedAtOnce * threads, blocks))
                                : ceil_div(threads, blocks);
  const int64_t wanted =
      std::max(ceil_div(samples.count, most_rows), std::min(splits, samples.count / least_rows));
  const int64_t rows = ceil_div(samples.count, std::max<int64_t>(1, wanted));
  const int64_t runs = ceil_div(samples.count, rows);

  const std::vector<FilterRange> before = ranges_of(minimum, maximum, bins, padded);
  std::vector<FilterRange> ranges;
  ranges.reserve(static_cast<size_t>(runs * padded));
  for (int64_t run = 0; run < runs; ++run) {
    ranges.insert(ranges.end(), before.begin(), before.end());
  }
  int64_t* count = static_cast<int64_t*>(counts.mutable_data_ptr());
  Histogram h{samples,
              bins,
              classes,
              rows,
              ranges.data(),
              cells,
              sliced ? sliced_layout(cells) : plain_layout(cells),
              nullptr,
              count};
  const int64_t unit_elements = rows * block;
  const bool use_tables = sliced || 4 * table_cells <= rows;
  const bool short_counts = rows <= kShortRows;
  std::unique_ptr<unsigned char[]> tables;
  if (use_tables) {
    tables.reset(new unsigned char[static_cast<size_t>(
        runs * blocks * classes * h.layout.per_class *
        (short_counts ? sizeof(uint16_t) : sizeof(uint32_t)))]);
    h.tables = tables.get();
  }
  const auto count_or_range = sliced ? k.count_sliced : use_tables ? k.count : k.range;
  parallel(runs * blocks, unit_elements,
           [&](int64_t begin, int64_t end) { count_or_range(h, type, begin, end); });

  if (first_not_finite(ranges.data(), runs, padded, filters) >= 0) {
    // Counting stops at a sample that is not finite: ask for the first column that has one.
    std::vector<FilterRange> all(
        static_cast<size_t>(ceil_div(filters, kFilterBlock) * kFilterBlock), {0, 0, 0, 0, true});
    h.rows = samples.count;
    h.ranges = all.data();
    k.range(h, type, 0, ceil_div(filters, kFilterBlock));
    first_bad = first_not_finite(all.data(), 1, 0, filters);
    return column;
  }
  std::vector<FilterRange> after = joined(before, ranges.data(), runs, filters, bins);
  parallel(filters, bins * classes, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      int64_t* filter_counts = count + n * bins * classes;
      move_counts(filter_counts, bins, classes, before[n], after[n]);
      for (int64_t run = 0; use_tables && run < runs; ++run) {
        short_counts ? add_table<uint16_t>(filter_counts, h, block, run, n, after[n])
                     : add_table<uint32_t>(filter_counts, h, block, run, n, after[n]);
      }
    }
  });
  if (!use_tables) {
    h.ranges = after.data();
    parallel(blocks, samples.count * kFilterBlock,
             [&](int64_t begin, int64_t end) { k.count_into(h, type, begin, end); });
  }
  double* low = static_cast<double*>(minimum.mutable_data_ptr());
  double* high = static_cast<double*>(maximum.mutable_data_ptr());
  for (int64_t n = 0; n < filters; ++n) {
    low[n] = after[n].minimum;
    high[n] = after[n].maximum;
  }
  return column;
}

void check_scale(const Tensor& low, const Tensor& width, const Tensor& activations) {
  for (const auto& [t, name] : {std::pair(&low, "low"), std::pair(&width, "width")}) {
    check_shape(*t, name, {activations.size(1)});
    check_type(*t, name, accumulate_type(activations), "float32, float64 for float64 activations");
  }
}

// Sums the tables of all runs, in order, into counts [filters, bins, classes].
template <typename A>
void sum_tables(const SoftHistogram& h, int64_t runs, int64_t filter, A* counts) {
  const int64_t blocks = ceil_div(h.samples.filters, kFilterBlock);
  const int64_t class_cells = kFilterBlock * h.bins;
  const A* table = static_cast<const A*>(h.tables) +
                   filter / kFilterBlock * h.classes * class_cells + filter % kFilterBlock * h.bins;
  for_class_blocks(h.classes, [&](int64_t begin, int64_t end) {
    for (int64_t bin = 0; bin < h.bins; ++bin) {
      for (int64_t k = begin; k < end; ++k) {
        double sum = 0;
        for (int64_t run = 0; run < runs; ++run) {
          sum += table[(run * blocks * h.classes + k) * class_cells + bin];
        }
        counts[bin * h.classes + k] = static_cast<A>(sum);
      }
    }
  });
}

Tensor soft_histogram(const Tensor& activations, const Tensor& labels, const Tensor& low,
                      const Tensor& width, int64_t bins, int64_t classes) {
  const Storage type = storage(activations, "activations");
  check_bins("bins", bins);
  STD_TORCH_CHECK(classes >= 1, "num_classes: got ", classes, ", want at least 1");
  const Tensor indices = indices_of(activations, labels, classes);
  check_scale(low, width, activations);
  const Tensor lows = torch::stable::contiguous(low), widths = torch::stable::contiguous(width);
  const Samples samples = samples_of(activations, indices);
  Tensor counts = torch::stable::new_empty(low, {samples.filters, bins, classes});
  const int64_t blocks = ceil_div(samples.filters, kFilterBlock);
  // By shape alone, so that the order of the sums does not depend on the number of threads.
  const int64_t rows = std::max<int64_t>(4096, classes * bins);
  const int64_t runs = std::max<int64_t>(1, ceil_div(samples.count, rows));
  const bool wide = type == Storage::kDouble;
  const std::unique_ptr<unsigned char[]> tables(new unsigned char[static_cast<size_t>(
      runs * blocks * kFilterBlock * bins * classes * (wide ? sizeof(double) : sizeof(float)))]);
  const SoftHistogram h{
      samples, bins, classes, rows, lows.const_data_ptr(), widths.const_data_ptr(), tables.get()};
  if (samples.count == 0) {
    return torch::stable::zero_(counts);
  }
  const HistogramKernels& k = kernels();
  parallel(runs * blocks, std::min(rows, samples.count) * kFilterBlock,
           [&](int64_t begin, int64_t end) { k.soft(h, type, begin, end); });
  void* out = counts.mutable_data_ptr();
  parallel(samples.filters, runs * bins * classes, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t at = n * bins * classes;
      wide ? sum_tables(h, runs, n, static_cast<double*>(out) + at)
           : sum_tables(h, runs, n, static_cast<float*>(out) + at);
    }
  });
  return counts;
}

Tensor soft_histogram_backward(const Tensor& grad_counts, const Tensor& activations,
                               const Tensor& labels, const Tensor& low, const Tensor& width) {
  const Storage type = storage(activations, "activations");
  STD_TORCH_CHECK(grad_counts.dim() == 3, "grad_counts: want [filters, bins, classes]");
  const int64_t bins = grad_counts.size(1), classes = grad_counts.size(2);
  const Tensor indices = indices_of(activations, labels, classes);
  check_scale(low, width, activations);
  check_shape(grad_counts, "grad_counts", {activations.size(1), bins, classes});
  check_type(grad_counts, "grad_counts", accumulate_type(activations), "the dtype of low");
  check_bins("grad_counts", bins);
  const Tensor lows = torch::stable::contiguous(low), widths = torch::stable::contiguous(width);
  const Tensor grads = torch::stable::contiguous(grad_counts);
  const Samples samples = samples_of(activations, indices);
  Tensor grad = torch::stable::empty_like(activations);
  constexpr int64_t kRows = 512;
  const SoftHistogramBackward h{samples,
                                bins,
                                classes,
                                kRows,
                                lows.const_data_ptr(),
                                widths.const_data_ptr(),
                                grads.const_data_ptr(),
                                grad.mutable_data_ptr(),
                                grad.stride(0),
                                grad.stride(1)};
  const HistogramKernels& k = kernels();
  parallel(ceil_div(samples.count, kRows) * ceil_div(samples.filters, kFilterBlock),
           std::min(kRows, samples.count) * kFilterBlock,
           [&](int64_t begin, int64_t end) { k.soft_backward(h, type, begin, end); });
  return grad;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(picnn_fast, CPU, m) {
  m.impl("histogram_update", TORCH_BOX(&histogram_update));
  m.impl("soft_histogram", TORCH_BOX(&soft_histogram));
  m.impl("soft_histogram_backward", TORCH_BOX(&soft_histogram_backward));
}

}  // namespace picnn_fast
