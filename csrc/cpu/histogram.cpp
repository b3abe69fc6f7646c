// CPU operators of the histogram family: check, allocate, and cut the work for the thread pool.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "../common/binning.h"
#include "capability.h"
#include "histogram_kernels.h"
#include "tensors.h"

namespace picnn_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const HistogramKernelTable& kernels() { return PICNN_FAST_KERNELS_IN_USE(histogram_kernels); }

void check_bins(const char* name, int64_t bins) {
  STD_TORCH_CHECK(bins >= 2 && bins <= 1 << 24, name, ": got ", bins, " bins, want 2 to 2**24");
}

// One class index for each of the samples.
Tensor indices_of(const Tensor& activations, const Tensor& labels, int64_t classes) {
  STD_TORCH_CHECK(activations.dim() == 2, "activations: want [samples, filters]");
  return class_indices(labels, "labels", {activations.size(0)}, classes);
}

// `indices` must outlive the result.
template <typename T>
Samples<T> samples_of(const Tensor& activations, const Tensor& indices) {
  Samples<T> samples{};
  samples.count = activations.size(0);
  samples.filters = activations.size(1);
  samples.activations = static_cast<const T*>(activations.const_data_ptr());
  samples.sample_stride = activations.stride(0);
  samples.filter_stride = activations.stride(1);
  samples.labels = static_cast<const int64_t*>(indices.const_data_ptr());
  return samples;
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
  return __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("avx512bitalg") &&
         __builtin_cpu_supports("gfni");
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

enum class Method {
  kBitPlanes,      // count_sliced
  kTables,         // count_short or count_long
  kPlanesByClass,  // range, then count_sliced_by_class
  kByClass,        // range, then count_by_class
  kDirect          // range, then count_into
};

constexpr int64_t kLeastRangeRows = 512;                  // of a run whose ranges alone are found
constexpr int64_t kMostCachedCounts = int64_t{32} << 20;  // bytes

// How the samples of a call are cut and counted.
struct Plan {
  Method method;
  int64_t cells;   // of a filter's table
  int64_t block;   // filters of a block
  int64_t blocks;  // of a run
  int64_t padded;  // filters of a run, in whole blocks
  int64_t rows;    // of a run
  int64_t runs;

  int64_t units() const { return runs * blocks; }
};

// `neighbours`: whether filters are neighbours in memory.
Plan plan_of(int64_t samples, int64_t filters, int64_t bins, int64_t classes, bool bit_planes,
             bool neighbours) {
  Plan plan{};
  plan.cells = 2;
  while (plan.cells < bins) {
    plan.cells *= 2;
  }
  // Where there are samples enough of every class to fill the vectors.
  bit_planes = bit_planes && plan.cells <= kMostSlicedCells && filters >= kSlicedBlock / 2;
  const bool sliced = bit_planes && classes <= kMostSlicedClasses && samples >= 128 * classes;
  static_assert(8 * kMostSlicedClasses * kMostSlicedCells <= kShortRows, "16 bits hold a run");
  plan.block = sliced ? kSlicedBlock : kFilterBlock;
  plan.blocks = ceil_div(filters, plan.block);
  plan.padded = plan.blocks * plan.block;
  // Runs for every thread, each with tables of its own where it has many samples for each cell:
  // clearing the tables and adding them up would cost more than a second read of the samples.
  const int64_t table_cells = classes * plan.cells;
  // Even cut in halves, runs must have rows enough for tables.
  const int64_t most_rows = 8 * table_cells <= kShortRows ? kShortRows : int64_t{1} << 31;
  const int64_t least_rows = std::max<int64_t>(4096, 4 * table_cells);
  // Whole rows are read faster than pieces: a run a thread where there are few blocks.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t splits = sliced ? std::min(threads, ceil_div(kSlicedAtOnce * threads, plan.blocks))
                                : ceil_div(threads, plan.blocks);
  const int64_t wanted =
      std::max(ceil_div(samples, most_rows), std::min(splits, samples / least_rows));
  plan.rows = ceil_div(samples, std::max<int64_t>(1, wanted));
  plan.runs = ceil_div(samples, plan.rows);
  // A table of some classes stays in the fastest cache; adding it up pays where it takes in several
  // samples for each of its cells.
  const bool in_order = neighbours && samples < int64_t{1} << 31;
  const bool by_class = in_order && bins <= 128 && samples * kClassesAtOnce >= 4 * bins * classes;
  // Planes hold sixteen samples of a class, and are made as fast of few: few pay where each would
  // wait for its line of the counts.
  const bool cached = filters * bins * classes * int64_t{sizeof(int64_t)} <= kMostCachedCounts;
  const bool planes_by_class = in_order && bit_planes && classes > kMostSlicedClasses &&
                               samples >= (cached ? 8 : 2) * classes;
  plan.method = sliced                         ? Method::kBitPlanes
                : 4 * table_cells <= plan.rows ? Method::kTables
                : planes_by_class              ? Method::kPlanesByClass
                : by_class                     ? Method::kByClass
                                               : Method::kDirect;
  if (plan.method != Method::kBitPlanes && plan.method != Method::kTables) {
    // Runs have no tables, only ranges, and each thread reads whole rows.
    plan.rows = std::max<int64_t>(kLeastRangeRows, ceil_div(samples, threads));
    plan.runs = ceil_div(samples, plan.rows);
  }
  return plan;
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
template <typename T, typename C>
void add_table(int64_t* counts, const Histogram<T>& h, const Plan& plan, const C* tables,
               int64_t run, int64_t n, const FilterRange& to) {
  const int64_t unit = run * plan.blocks + n / plan.block;
  const FilterRange& from = h.ranges[run * plan.padded + n];
  const TableLayout& layout = h.layout;
  const C* table = tables + unit * h.classes * layout.per_class + layout.place[n % plan.block];
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

// Rows in the order of their classes; those of class k end at ends[k].
struct RowsByClass {
  std::vector<int32_t> order;
  std::vector<int64_t> ends;

  RowsByClass(const int64_t* labels, int64_t count, int64_t classes)
      : order(static_cast<size_t>(count)), ends(static_cast<size_t>(classes + 1)) {
    for (int64_t row = 0; row < count; ++row) {
      ++ends[labels[row] + 1];
    }
    std::partial_sum(ends.begin(), ends.end(), ends.begin());
    for (int64_t row = 0; row < count; ++row) {
      order[ends[labels[row]]++] = static_cast<int32_t>(row);
    }
  }
};

// One call: counts [filters, bins, classes], with the ranges `before` on whose grids they are.
template <typename T>
class Update {
 public:
  Update(const Samples<T>& samples, const std::vector<FilterRange>& before, int64_t bins,
         int64_t classes, const Plan& plan, const HistogramKernels<T>& kernels)
      : before_(before), plan_(plan), kernels_(kernels) {
    ranges_.reserve(static_cast<size_t>(plan.runs * plan.padded));
    for (int64_t run = 0; run < plan.runs; ++run) {
      ranges_.insert(ranges_.end(), before.begin(), before.end());
    }
    h_.samples = samples;
    h_.bins = bins;
    h_.classes = classes;
    h_.rows = plan.rows;
    h_.ranges = ranges_.data();
    h_.cells = plan.cells;
    h_.layout =
        plan.method == Method::kBitPlanes ? sliced_layout(plan.cells) : plain_layout(plan.cells);
  }

  // The ranges after the call; none, and no count is another, where a sample is not finite.
  std::vector<FilterRange> run(int64_t* counts) {
    switch (plan_.method) {
      case Method::kBitPlanes:
        return count_in_tables(kernels_.count_sliced, counts);
      case Method::kTables:
        return plan_.rows <= kShortRows ? count_in_tables(kernels_.count_short, counts)
                                        : count_in_tables(kernels_.count_long, counts);
      case Method::kPlanesByClass:
        return count_in_order(
            kernels_.count_sliced_by_class,
            ceil_div(h_.samples.filters, kSlicedBlock) * ceil_div(h_.classes, kSlicedClassesAtOnce),
            counts);
      case Method::kByClass:
        return count_in_order(kernels_.count_by_class, plan_.blocks, counts);
      case Method::kDirect:
        break;
    }
    return count_in_place(
        plan_.blocks,
        [&](int64_t begin, int64_t end) { kernels_.count_into(h_, counts, begin, end); }, counts);
  }

  // Counting stops at a sample that is not finite: this is the first column that has one.
  int64_t first_not_finite() {
    std::vector<FilterRange> all(
        static_cast<size_t>(ceil_div(h_.samples.filters, kFilterBlock) * kFilterBlock),
        {0, 0, 0, 0, true});
    h_.rows = h_.samples.count;
    h_.ranges = all.data();
    kernels_.range(h_, 0, ceil_div(h_.samples.filters, kFilterBlock));
    int64_t n = 0;
    while (all[static_cast<size_t>(n)].finite) {
      ++n;
    }
    return n;
  }

 private:
  template <typename C>
  std::vector<FilterRange> count_in_tables(void (*kernel)(const Histogram<T>&, C*, int64_t,
                                                          int64_t),
                                           int64_t* counts) {
    const std::unique_ptr<C[]> tables(
        new C[static_cast<size_t>(plan_.units() * h_.classes * h_.layout.per_class)]);
    parallel(plan_.units(), plan_.rows * plan_.block,
             [&](int64_t begin, int64_t end) { kernel(h_, tables.get(), begin, end); });
    return add(counts, [&](int64_t* filter_counts, int64_t n, const FilterRange& to) {
      for (int64_t run = 0; run < plan_.runs; ++run) {
        add_table(filter_counts, h_, plan_, tables.get(), run, n, to);
      }
    });
  }

  std::vector<FilterRange> count_in_order(decltype(HistogramKernels<T>::count_by_class) kernel,
                                          int64_t units, int64_t* counts) {
    const RowsByClass rows(h_.samples.labels, h_.samples.count, h_.classes);
    return count_in_place(
        units,
        [&](int64_t begin, int64_t end) {
          kernel(h_, rows.order.data(), rows.ends.data(), counts, begin, end);
        },
        counts);
  }

  // `count` is of [begin, end) of `units`, into which it cuts the counts.
  template <typename Count>
  std::vector<FilterRange> count_in_place(int64_t units, const Count& count, int64_t* counts) {
    parallel(plan_.units(), plan_.rows * plan_.block,
             [&](int64_t begin, int64_t end) { kernels_.range(h_, begin, end); });
    std::vector<FilterRange> after = add(counts, [](int64_t*, int64_t, const FilterRange&) {});
    if (!after.empty()) {
      h_.ranges = after.data();
      parallel(units, h_.samples.count * h_.samples.filters / units, count);
    }
    return after;
  }

  // Moves the counts to the grids of all samples' ranges, which are returned, and calls
  // add_more(counts of the filter, n, range) for every filter.
  template <typename AddMore>
  std::vector<FilterRange> add(int64_t* counts, const AddMore& add_more) const {
    if (!std::all_of(ranges_.begin(), ranges_.end(), [](const FilterRange& r) { return r.finite; }))
      return {};
    const int64_t filters = h_.samples.filters, cells = h_.bins * h_.classes;
    std::vector<FilterRange> after = joined(before_, ranges_.data(), plan_.runs, filters, h_.bins);
    parallel(filters, cells, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        move_counts(counts + n * cells, h_.bins, h_.classes, before_[n], after[n]);
        add_more(counts + n * cells, n, after[n]);
      }
    });
    return after;
  }

  const std::vector<FilterRange>& before_;
  const Plan& plan_;
  const HistogramKernels<T>& kernels_;
  std::vector<FilterRange> ranges_;  // [runs, padded]
  Histogram<T> h_{};
};

Tensor histogram_update(const Tensor& counts, const Tensor& minimum, const Tensor& maximum,
                        const Tensor& activations, const Tensor& labels) {
  STD_TORCH_CHECK(counts.dim() == 3 && counts.scalar_type() == ScalarType::Long,
                  "counts: want int64 [filters, bins, classes]");
  const int64_t bins = counts.size(1), classes = counts.size(2);
  const Tensor indices = indices_of(activations, labels, classes);
  const int64_t samples = activations.size(0), filters = activations.size(1);
  check_shape(counts, "counts", {filters, bins, classes});
  check_bins("counts", bins);
  for (const auto& [t, name] : {std::pair(&minimum, "minimum"), std::pair(&maximum, "maximum")}) {
    check_shape(*t, name, {filters});
    check_type(*t, name, ScalarType::Double, "float64");
  }
  STD_TORCH_CHECK(counts.is_contiguous() && minimum.is_contiguous() && maximum.is_contiguous(),
                  "counts, minimum, maximum: want contiguous tensors");
  Tensor column = allocate({}, ScalarType::Long);
  int64_t& first_bad = *static_cast<int64_t*>(column.mutable_data_ptr());
  first_bad = -1;
  with_types(activations, "activations", [&](auto value, auto) {
    using T = decltype(value);
    if (samples == 0 || filters == 0) {
      return;
    }
    const HistogramKernels<T>& k = kernels();
    const bool bit_planes = k.count_sliced != nullptr && counts_bits_fast();
    const Plan plan =
        plan_of(samples, filters, bins, classes, bit_planes, activations.stride(1) == 1);
    const std::vector<FilterRange> before = ranges_of(minimum, maximum, bins, plan.padded);
    Update<T> update(samples_of<T>(activations, indices), before, bins, classes, plan, k);
    const std::vector<FilterRange> after =
        update.run(static_cast<int64_t*>(counts.mutable_data_ptr()));
    if (after.empty()) {
      first_bad = update.first_not_finite();
      return;
    }
    double* low = static_cast<double*>(minimum.mutable_data_ptr());
    double* high = static_cast<double*>(maximum.mutable_data_ptr());
    for (int64_t n = 0; n < filters; ++n) {
      low[n] = after[n].minimum;
      high[n] = after[n].maximum;
    }
  });
  return column;
}

void check_scale(const Tensor& low, const Tensor& width, const Tensor& activations) {
  for (const auto& [t, name] : {std::pair(&low, "low"), std::pair(&width, "width")}) {
    check_shape(*t, name, {activations.size(1)});
    check_type(*t, name, accumulate_type(activations), "float32, float64 for float64 activations");
  }
}

// Sums the tables of all runs, in order, into counts [filters, bins, classes].
template <typename T>
void sum_tables(const SoftHistogram<T>& h, int64_t runs, int64_t filter, Accumulate<T>* counts) {
  const int64_t blocks = ceil_div(h.samples.filters, kFilterBlock);
  const int64_t class_cells = kFilterBlock * h.bins;
  const Accumulate<T>* table =
      h.tables + filter / kFilterBlock * h.classes * class_cells + filter % kFilterBlock * h.bins;
  for_class_blocks(h.classes, [&](int64_t begin, int64_t end) {
    for (int64_t bin = 0; bin < h.bins; ++bin) {
      for (int64_t k = begin; k < end; ++k) {
        double sum = 0;
        for (int64_t run = 0; run < runs; ++run) {
          sum += table[(run * blocks * h.classes + k) * class_cells + bin];
        }
        counts[bin * h.classes + k] = static_cast<Accumulate<T>>(sum);
      }
    }
  });
}

template <typename T>
const Accumulate<T>* accumulated(const Tensor& t) {
  return static_cast<const Accumulate<T>*>(t.const_data_ptr());
}

Tensor soft_histogram(const Tensor& activations, const Tensor& labels, const Tensor& low,
                      const Tensor& width, int64_t bins, int64_t classes) {
  check_bins("bins", bins);
  STD_TORCH_CHECK(classes >= 1, "num_classes: got ", classes, ", want at least 1");
  const Tensor indices = indices_of(activations, labels, classes);
  check_scale(low, width, activations);
  const Tensor lows = as_contiguous(low), widths = as_contiguous(width);
  const int64_t samples = activations.size(0), filters = activations.size(1);
  Tensor counts = allocate({filters, bins, classes}, low.scalar_type());
  // By shape alone, so that the order of the sums does not depend on the number of threads.
  const int64_t rows = std::max<int64_t>(4096, classes * bins);
  const int64_t runs = ceil_div(samples, rows), units = runs * ceil_div(filters, kFilterBlock);
  with_types(activations, "activations", [&](auto value, auto) {
    using T = decltype(value);
    using A = Accumulate<T>;
    if (samples == 0) {
      torch::stable::zero_(counts);
      return;
    }
    const std::unique_ptr<A[]> tables(
        new A[static_cast<size_t>(units * kFilterBlock * bins * classes)]);
    SoftHistogram<T> h{};
    h.samples = samples_of<T>(activations, indices);
    h.bins = bins;
    h.classes = classes;
    h.rows = rows;
    h.low = accumulated<T>(lows);
    h.width = accumulated<T>(widths);
    h.tables = tables.get();
    const HistogramKernels<T>& k = kernels();
    parallel(units, std::min(rows, samples) * kFilterBlock,
             [&](int64_t begin, int64_t end) { k.soft(h, begin, end); });
    A* out = static_cast<A*>(counts.mutable_data_ptr());
    parallel(filters, runs * bins * classes, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        sum_tables(h, runs, n, out + n * bins * classes);
      }
    });
  });
  return counts;
}

Tensor soft_histogram_backward(const Tensor& grad_counts, const Tensor& activations,
                               const Tensor& labels, const Tensor& low, const Tensor& width) {
  STD_TORCH_CHECK(grad_counts.dim() == 3, "grad_counts: want [filters, bins, classes]");
  const int64_t bins = grad_counts.size(1), classes = grad_counts.size(2);
  const Tensor indices = indices_of(activations, labels, classes);
  check_scale(low, width, activations);
  check_shape(grad_counts, "grad_counts", {activations.size(1), bins, classes});
  check_type(grad_counts, "grad_counts", accumulate_type(activations), "the dtype of low");
  check_bins("grad_counts", bins);
  const Tensor lows = as_contiguous(low), widths = as_contiguous(width);
  const Tensor grads = as_contiguous(grad_counts);
  Tensor grad = allocate_like(activations);
  constexpr int64_t kRows = 512;
  with_types(activations, "activations", [&](auto value, auto) {
    using T = decltype(value);
    SoftHistogramBackward<T> h{};
    h.samples = samples_of<T>(activations, indices);
    h.bins = bins;
    h.classes = classes;
    h.rows = kRows;
    h.low = accumulated<T>(lows);
    h.width = accumulated<T>(widths);
    h.grad_counts = accumulated<T>(grads);
    h.grad = static_cast<T*>(grad.mutable_data_ptr());
    h.grad_sample_stride = grad.stride(0);
    h.grad_filter_stride = grad.stride(1);
    const HistogramKernels<T>& k = kernels();
    parallel(ceil_div(h.samples.count, kRows) * ceil_div(h.samples.filters, kFilterBlock),
             std::min(kRows, h.samples.count) * kFilterBlock,
             [&](int64_t begin, int64_t end) { k.soft_backward(h, begin, end); });
  });
  return grad;
}

// Of the types that counts have.
template <typename C>
Counts<C> counts_of(const Tensor& counts) {
  STD_TORCH_CHECK(counts.dim() == 3, "counts: want [filters, bins, classes]");
  Counts<C> in{};
  in.filters = counts.size(0);
  in.bins = counts.size(1);
  in.classes = counts.size(2);
  in.counts = static_cast<const C*>(counts.const_data_ptr());
  in.filter_stride = counts.stride(0);
  in.bin_stride = counts.stride(1);
  in.class_stride = counts.stride(2);
  return in;
}

// Calls run with filters [begin, end) and memory to work in.
template <typename C, typename Run>
void for_filters(const Counts<C>& in, const Run& run) {
  parallel(in.filters, in.bins * in.classes, [&](int64_t begin, int64_t end) {
    const int64_t size = information_scratch(in.bins, in.classes);
    const std::unique_ptr<Sums<C>[]> scratch(new Sums<C>[static_cast<size_t>(size)]);
    run(scratch.get(), begin, end);
  });
}

template <typename C>
Tensor information_of(const Tensor& counts, bool by_label, bool corrected, ScalarType type) {
  Information<C> h{};
  h.in = counts_of<C>(counts);
  Tensor out =
      by_label ? allocate({h.in.filters}, type) : allocate({h.in.filters, h.in.classes}, type);
  h.by_label = by_label;
  h.corrected = corrected;
  h.out = static_cast<Sums<C>*>(out.mutable_data_ptr());
  const InformationKernels<C>& k = kernels();
  for_filters(h.in, [&](Sums<C>* scratch, int64_t begin, int64_t end) {
    k.information(h, scratch, begin, end);
  });
  return out;
}

Tensor histogram_information(const Tensor& counts, bool by_label, bool corrected) {
  if (counts.scalar_type() == ScalarType::Long)
    return information_of<int64_t>(counts, by_label, corrected, ScalarType::Double);
  if (counts.scalar_type() == ScalarType::Double)
    return information_of<double>(counts, by_label, corrected, ScalarType::Double);
  check_type(counts, "counts", ScalarType::Float, "int64, float32 or float64");
  return information_of<float>(counts, by_label, corrected, ScalarType::Float);
}

Tensor histogram_information_backward(const Tensor& grad, const Tensor& counts,
                                      const Tensor& information, bool by_label) {
  Tensor out = allocate_like(counts);
  with_real(counts, "counts", [&](auto value) {
    using C = decltype(value);
    InformationBackward<C> h{};
    h.in = counts_of<C>(counts);
    for (const auto& [t, name] :
         {std::pair(&grad, "grad"), std::pair(&information, "information")}) {
      if (by_label)
        check_shape(*t, name, {h.in.filters});
      else
        check_shape(*t, name, {h.in.filters, h.in.classes});
      check_type(*t, name, counts.scalar_type(), "the dtype of counts");
    }
    h.by_label = by_label;
    h.grad = static_cast<const C*>(grad.const_data_ptr());
    h.grad_filter_stride = grad.stride(0);
    h.grad_class_stride = by_label ? 0 : grad.stride(1);
    h.information = static_cast<const C*>(information.const_data_ptr());
    h.information_filter_stride = information.stride(0);
    h.information_class_stride = by_label ? 0 : information.stride(1);
    h.out = static_cast<C*>(out.mutable_data_ptr());
    h.out_filter_stride = out.stride(0);
    h.out_bin_stride = out.stride(1);
    h.out_class_stride = out.stride(2);
    const InformationKernels<C>& k = kernels();
    for_filters(
        h.in, [&](C* scratch, int64_t begin, int64_t end) { k.backward(h, scratch, begin, end); });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(picnn_fast, CPU, m) {
  m.impl("histogram_update", TORCH_BOX(&histogram_update));
  m.impl("soft_histogram", TORCH_BOX(&soft_histogram));
  m.impl("soft_histogram_backward", TORCH_BOX(&soft_histogram_backward));
  m.impl("histogram_information", TORCH_BOX(&histogram_information));
  m.impl("histogram_information_backward", TORCH_BOX(&histogram_information_backward));
}

}  // namespace picnn_fast
