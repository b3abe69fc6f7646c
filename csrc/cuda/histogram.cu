// CUDA operators of the histogram family. picnn_fast/reference/histogram.py is the definition.
//
// Activations are [M, N]. A block takes a tile of neighbouring filters and a stretch of samples,
// and keeps the tables of its filters in shared memory. Its threads read 16-byte vectors along
// filters or along samples, whichever is contiguous, or single elements.
//
// Hard counts read the activations once, in tiles whose tables a second kernel brings to the grid
// of all samples. That is exact, because a grid follows from its range alone and a wider one only
// merges bins. Where a filter's table does not fit in shared memory, ranges are found first, and
// samples, if they are many, sorted by their labels, so that a block counts some of the classes;
// for soft counts and their gradient, too.

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "histogram_direct.cuh"
#include "histogram_information.cuh"
#include "histogram_merge.cuh"
#include "histogram_soft.cuh"
#include "histogram_sorted.cuh"
#include "histogram_tiles.cuh"
#include "launch.h"

namespace picnn_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum class Layout { kFilters, kSamples, kSingle };  // along which axis vectors lie

template <typename T>
bool vectors(const Tensor& t, int along) {
  constexpr int kVector = kVectorBytes / sizeof(T);
  const int other = 1 - along;
  return t.size(along) >= kVector && t.stride(along) == 1 &&
         reinterpret_cast<uintptr_t>(t.data_ptr()) % kVectorBytes == 0 &&
         (t.size(other) == 1 || t.stride(other) % kVector == 0);
}

template <typename T, typename... Tensors>
Layout common_layout(const Tensor& first, const Tensors&... others) {
  const bool whole = first.size(1) % (kVectorBytes / sizeof(T)) == 0;
  if (whole && vectors<T>(first, 1) && (vectors<T>(others, 1) && ...)) return Layout::kFilters;
  if (vectors<T>(first, 0) && (vectors<T>(others, 0) && ...)) return Layout::kSamples;
  return Layout::kSingle;
}

// Calls run(FV, RV) with the vector sizes of the layout as compile-time constants.
template <typename T, typename Run>
void with_vectors(Layout layout, const Run& run) {
  using One = std::integral_constant<int, 1>;
  using Vector = std::integral_constant<int, kVectorBytes / sizeof(T)>;
  switch (layout) {
    case Layout::kFilters:
      run(Vector{}, One{});
      break;
    case Layout::kSamples:
      run(One{}, Vector{});
      break;
    case Layout::kSingle:
      run(One{}, One{});
      break;
  }
}

// Tiles of at most `most_filters` filters; at least `least_rows` samples a block, in about
// `blocks`.
template <int FV, int RV>
Tiling make_tiling(const Tensor& activations, int64_t most_filters, int64_t least_rows,
                   int64_t blocks = kBlocks) {
  const int64_t M = activations.size(0), N = activations.size(1);
  Tiling t{};
  t.filters_fast = FV > 1 || (RV == 1 && activations.stride(1) <= activations.stride(0));
  // 128 bytes side by side; along samples, a few filters that share the reading of labels.
  const int64_t wanted = t.filters_fast ? 128 / activations.element_size() : 4;
  const int64_t filters = std::min({wanted, most_filters, int64_t{kMaxFilters}});
  t.lanes = 1;
  while (t.lanes * 2 * FV <= filters && t.lanes < 32 && t.lanes * FV < N) t.lanes *= 2;
  t.tiles = ceil_div(N, t.lanes * FV);
  const int64_t step = kThreads / t.lanes * RV * Walk<FV, RV>::kPieces;
  const int64_t splits = std::max<int64_t>(blocks / t.tiles, 1);
  t.rows = std::min(std::max(ceil_div(M, splits), least_rows), kMaxRows);
  t.rows = round_up(t.rows, step);
  t.splits = ceil_div(M, t.rows);
  return t;
}

template <typename T>
Samples<const T> input(const Tensor& t) {
  return {static_cast<const T*>(t.data_ptr()), t.stride(0), t.stride(1), t.size(0), t.size(1)};
}

// Filters of a tile whose tables fit in `most` bytes. Bins and classes beyond any table give 0.
int64_t filters_that_fit(int64_t bins, int64_t classes, int64_t entry_bytes,
                         int64_t most = kSharedBytes) {
  if (bins > most || classes > most) return 0;
  if (bins * classes * entry_bytes > most) return 0;
  return most / (TableShape(bins, classes).per_filter * entry_bytes);
}

// Blocks of a few filters and classes, whose tables fit in shared memory; without lanes, none fit.
template <int FV>
Division divide(const Tensor& activations, int64_t bins, int64_t classes, int64_t entry_bytes) {
  constexpr int64_t kLeastClasses = 4;  // 32 bytes of counters side by side
  const int64_t N = activations.size(1);
  const auto fitting = [&](int64_t filters, int64_t most) {
    // Rows of counters of a filter are rounded up, by at most 32.
    return (most / entry_bytes / filters - 32) / ((bins + 1) | 1);
  };
  const int64_t all = most_shared_bytes(activations);
  const int64_t most = fitting(FV, kSharedBytes) > 0 ? kSharedBytes : all;
  int64_t lanes = std::max<int64_t>(64 / activations.element_size() / FV, 1);
  while (lanes > 1 && (lanes / 2 * FV >= N || fitting(lanes * FV, most) < kLeastClasses))
    lanes /= 2;
  int64_t fit = fitting(lanes * FV, most);
  if (fit < 1) return {};
  // As many classes as fill the pieces in which memory is read and written.
  if (fit > kLeastClasses)
    fit -= fit % (fit < 2 * kLeastClasses ? kLeastClasses : 2 * kLeastClasses);
  fit = std::min(fit, classes);
  return {ceil_div(N, lanes * FV), ceil_div(classes, fit), static_cast<int>(lanes),
          static_cast<int>(fit)};
}

// Whether so many samples are worth clearing and reading the tables of all classes.
bool worth_sorting(int64_t samples, int64_t bins, int64_t classes) {
  return samples <= kMaxRows && bins <= kMaxRows && samples * 8 / bins >= classes;
}

// The samples' order, and what holds it.
struct SortedSamples {
  Tensor ends, ranked;

  SortedSamples(const Tensor& of_labels, const Labels& labels)
      : ends(torch::stable::new_zeros(of_labels, {labels.classes}, ScalarType::Int)),
        ranked(torch::stable::new_empty(of_labels, {of_labels.size(0), 2}, ScalarType::Int)) {
    const int64_t M = of_labels.size(0), blocks = ceil_div(M, kThreads);
    auto* end = static_cast<int32_t*>(ends.data_ptr());
    launch(ends, count_labels, blocks, kThreads, 0, labels, M, end);
    launch(ends, find_begins, 1, kThreads, 0, end, labels.classes);
    launch(ends, rank_samples, blocks, kThreads, 0, labels, M, end,
           static_cast<Ranked*>(ranked.data_ptr()));
  }
  Sorted view() const {
    return {static_cast<const Ranked*>(ranked.data_ptr()),
            static_cast<const int32_t*>(ends.data_ptr())};
  }
};

// Runs `use` on samples sorted by their labels, with tables of so many bytes a cell of some of the
// classes and the shared memory they take; false where not even those of one class fit.
template <int FV, typename Use>
bool with_classes(const Tensor& activations, const Tensor& of_labels, const Labels& labels,
                  int64_t bins, size_t entry_bytes, const Use& use) {
  const Division division =
      divide<FV>(activations, bins, labels.classes, static_cast<int64_t>(entry_bytes));
  if (division.lanes == 0) return false;
  const TableShape shape(bins, division.classes);
  const SortedSamples sorted(of_labels, labels);
  use(sorted.view(), division, shape, entry_bytes * division.lanes * FV * shape.per_filter);
  return true;
}

// One call of histogram_update on activations of type T.
template <typename T>
struct Update {
  const State& state;
  const Tensor& minimum;
  const Tensor& counts;
  const Tensor& activations;
  const Tensor& of_labels;
  const Labels& labels;

  void run() const {
    bool done = false;
    with_vectors<T>(common_layout<T>(activations),
                    [&](auto fv, auto rv) { done = count_in_tiles<fv, rv>(); });
    if (!done) count_in_two_passes();
  }

  // False where the tables of a tile do not fit in shared memory.
  template <int FV, int RV>
  bool count_in_tiles() const {
    // At least 16 bytes of each sample are worth reading at a time.
    const bool along = RV > 1 || activations.stride(0) < activations.stride(1);
    const int64_t least = along ? 1 : std::min<int64_t>(kVectorBytes / sizeof(T), state.N);
    int64_t fitting = filters_that_fit(state.bins, state.classes, sizeof(uint32_t));
    // A block that has a multiprocessor's memory to itself still spares a second reading, and
    // atomics in global memory.
    if (fitting < least)
      fitting = std::min(least, filters_that_fit(state.bins, state.classes, sizeof(uint32_t),
                                                 most_shared_bytes(activations) - kFixedBytes));
    if (fitting < least) return false;
    // Tables of all blocks together have no more counters than there are activations: few filters
    // of many samples keep a device busy all the same.
    const Tiling tiling =
        make_tiling<FV, RV>(activations, fitting, state.bins * state.classes, kCountBlocks);
    const TableShape shape(state.bins, state.classes);
    const Tensor range = torch::stable::new_empty(minimum, {tiling.splits, state.N, 2});
    const Tensor grid =
        torch::stable::new_empty(minimum, {tiling.splits, state.N, 2}, ScalarType::Int);
    const Tensor table = torch::stable::new_empty(
        counts, {tiling.splits, state.N, state.bins, state.classes}, ScalarType::Int);
    const Partial partial = {static_cast<double*>(range.data_ptr()),
                             static_cast<int32_t*>(grid.data_ptr()),
                             static_cast<uint32_t*>(table.data_ptr())};
    const size_t shared = size_t{sizeof(uint32_t)} * tiling.lanes * FV * shape.per_filter;
    launch(activations, count_tiles<T, FV, RV>, tiling.blocks(), kThreads, shared,
           input<T>(activations), labels, tiling, state, shape, partial);
    launch(activations, merge, state.N, kThreads, 0, state, partial, tiling.splits);
    return true;
  }

  void count_in_two_passes() const {
    const Tiling tiling = make_tiling<1, 1>(activations, kMaxFilters, 1);
    const Tensor range = torch::stable::new_empty(minimum, {tiling.splits, state.N, 2});
    Partial partial{};
    partial.range = static_cast<double*>(range.data_ptr());
    launch(activations, find_range<T>, tiling.blocks(), kThreads, 0, input<T>(activations), tiling,
           state, partial);
    launch(activations, merge, state.N, kThreads, 0, state, partial, tiling.splits);
    bool done = false;
    if (worth_sorting(activations.size(0), state.bins, state.classes)) {
      if (common_layout<T>(activations) == Layout::kFilters)
        done = count_by_class<kVectorBytes / sizeof(T)>();
      else
        done = count_by_class<1>();
    }
    if (done) return;
    launch(activations, count_directly<T>, tiling.blocks(), kThreads, 0, input<T>(activations),
           labels, tiling, state);
  }

  // False where the tables of a class do not fit in shared memory.
  template <int FV>
  bool count_by_class() const {
    const auto run = [&](const Sorted& sorted, const Division& division, const TableShape& shape,
                         size_t shared) {
      launch(activations, count_sorted<T, FV>, division.blocks(), kThreads, shared,
             input<T>(activations), sorted, division, state, shape);
    };
    return with_classes<FV>(activations, of_labels, labels, state.bins, sizeof(uint32_t), run);
  }
};

void check_samples(const Tensor& activations, const Tensor& labels) {
  STD_TORCH_CHECK(activations.dim() == 2, "activations: got ", activations.dim(),
                  " axes, want [M, N]");
  check_device(labels, "labels", activations, "activations");
  check_shape(labels, "labels", {activations.size(0)});
  check_type(labels, "labels", ScalarType::Long, "int64");
}
void check_range(const Tensor& t, const Tensor& activations, const char* name) {
  check_device(t, name, activations, "activations");
  check_shape(t, name, {activations.size(1)});
  check_type(t, name, ScalarType::Double, "float64");
  STD_TORCH_CHECK(t.is_contiguous(), name, ": want it contiguous");
}
void check_table(const Tensor& t, const Tensor& activations, const char* name) {
  check_device(t, name, activations, "activations");
  STD_TORCH_CHECK(t.dim() == 3 && t.size(0) == activations.size(1) && t.size(1) >= 2 &&
                      t.size(2) <= std::numeric_limits<int32_t>::max(),
                  name, ": want [N, bins, K] with 2 bins or more");
}

Labels make_labels(const Tensor& labels, int64_t classes) {
  return {static_cast<const int64_t*>(labels.data_ptr()), labels.stride(0),
          static_cast<int>(classes)};
}

Tensor histogram_update(const Tensor& counts, const Tensor& minimum, const Tensor& maximum,
                        const Tensor& activations, const Tensor& labels) {
  check_samples(activations, labels);
  check_table(counts, activations, "counts");
  check_type(counts, "counts", ScalarType::Long, "int64");
  STD_TORCH_CHECK(counts.is_contiguous(), "counts: want them contiguous");
  check_range(minimum, activations, "minimum");
  check_range(maximum, activations, "maximum");
  Tensor column = torch::stable::new_empty(labels, {}, ScalarType::Long);
  torch::stable::fill_(column, -1);
  State state{};
  state.counts = static_cast<int64_t*>(counts.data_ptr());
  state.minimum = static_cast<double*>(minimum.data_ptr());
  state.maximum = static_cast<double*>(maximum.data_ptr());
  state.bad = static_cast<int64_t*>(column.data_ptr());
  state.N = counts.size(0);
  state.bins = counts.size(1);
  state.classes = static_cast<int>(counts.size(2));
  const Labels label_of = make_labels(labels, counts.size(2));
  with_type(activations, "activations", [&](auto value) {
    if (activations.numel() > 0)
      Update<decltype(value)>{state, minimum, counts, activations, labels, label_of}.run();
  });
  return column;
}

void check_soft(const Tensor& activations, const Tensor& labels, const Tensor& low,
                const Tensor& width, int64_t bins) {
  check_samples(activations, labels);
  for (const Tensor* t : {&low, &width}) {
    const char* name = t == &low ? "low" : "width";
    check_device(*t, name, activations, "activations");
    check_shape(*t, name, {activations.size(1)});
    check_accumulate_type(*t, name, activations);
  }
  STD_TORCH_CHECK(2 <= bins && bins <= int64_t{1} << 24, "bins: got ", bins, ", want 2 to 2**24");
}

template <typename C>
SoftGrid<C> soft_grid(const Tensor& low, const Tensor& width, int64_t bins) {
  return {static_cast<const C*>(low.data_ptr()), static_cast<const C*>(width.data_ptr()),
          low.stride(0), width.stride(0), bins};
}

// Shared tables of the soft kernels: worth their filling where samples are several to a counter.
template <int FV, int RV, typename Run>
void with_tables(const Tensor& activations, int64_t bins, int64_t classes, int64_t entry_bytes,
                 const Run& run) {
  const int64_t fitting = filters_that_fit(bins, classes, entry_bytes);
  const bool staged = fitting >= FV && activations.size(0) >= 2 * bins * classes;
  const Tiling tiling = staged ? make_tiling<FV, RV>(activations, fitting, 4 * bins * classes)
                               : make_tiling<FV, RV>(activations, kMaxFilters, 1);
  const TableShape shape(staged ? bins : 0, staged ? classes : 0);
  const size_t shared = staged ? tiling.lanes * FV * shape.per_filter * entry_bytes : 0;
  run(tiling, shape, staged, shared);
}

// One call of soft_histogram on activations of type T.
template <typename T>
struct SoftUpdate {
  using C = Accumulate<T>;
  const Tensor& activations;
  const Tensor& of_labels;
  const Labels labels;
  const SoftGrid<C> grid;
  const int fraction_bits;
  const Tensor& counts;  // [N, bins, K]

  void run() const {
    if (activations.numel() > 0 && in_order()) return;
    const Tensor sums = torch::stable::new_zeros(
        of_labels, {counts.size(0), counts.size(1), counts.size(2)}, ScalarType::Long);
    auto* sum = static_cast<Wide*>(sums.data_ptr());
    if (activations.numel() > 0) {
      with_vectors<T>(common_layout<T>(activations), [&](auto fv, auto rv) {
        constexpr int FV = fv, RV = rv;
        with_tables<FV, RV>(
            activations, grid.bins, labels.classes, sizeof(Wide),
            [&](const Tiling& tiling, const TableShape& shape, bool staged, size_t shared) {
              launch(activations, add_weights<T, FV, RV>, tiling.blocks(), kThreads, shared,
                     input<T>(activations), labels, tiling, grid, shape, staged, fraction_bits,
                     sum);
            });
      });
    }
    const int64_t total = counts.numel();
    launch(activations, convert_sums<C>, std::min<int64_t>(ceil_div(total, kThreads), 8 * kBlocks),
           kThreads, 0, static_cast<const Wide*>(sum), static_cast<C*>(counts.data_ptr()), total,
           fraction_bits);
  }

  // By class, where tables of all classes do not fit in shared memory; else false.
  bool in_order() const {
    if (!worth_sorting(activations.size(0), grid.bins, labels.classes)) return false;
    const bool along = common_layout<T>(activations) == Layout::kFilters;
    return along ? add_by_class<kVectorBytes / sizeof(T)>() : add_by_class<1>();
  }

  template <int FV>
  bool add_by_class() const {
    if (filters_that_fit(grid.bins, labels.classes, sizeof(Wide)) >= FV) return false;
    const auto run = [&](const Sorted& sorted, const Division& division, const TableShape& shape,
                         size_t shared) {
      launch(activations, add_weights_sorted<T, FV>, division.blocks(), kThreads, shared,
             input<T>(activations), sorted, division, grid, shape, labels.classes, fraction_bits,
             static_cast<C*>(counts.data_ptr()));
    };
    return with_classes<FV>(activations, of_labels, labels, grid.bins, sizeof(Wide), run);
  }
};

Tensor soft_histogram(const Tensor& activations, const Tensor& labels, const Tensor& low,
                      const Tensor& width, int64_t bins, int64_t num_classes) {
  check_soft(activations, labels, low, width, bins);
  STD_TORCH_CHECK(0 <= num_classes && num_classes <= std::numeric_limits<int32_t>::max(),
                  "num_classes: got ", num_classes, ", want 0 to 2**31 - 1");
  const int64_t M = activations.size(0), N = activations.size(1);
  const Tensor counts = torch::stable::new_empty(low, {N, bins, num_classes});
  // The finest unit, of those the weights can tell apart, of which M cannot reach kPoison.
  int fraction_bits = accumulate_type(activations) == ScalarType::Double ? 52 : 24;
  while (fraction_bits > 0 && (M >> (62 - fraction_bits)) != 0) --fraction_bits;
  with_type(activations, "activations", [&](auto value) {
    using T = decltype(value);
    SoftUpdate<T>{activations,
                  labels,
                  make_labels(labels, num_classes),
                  soft_grid<Accumulate<T>>(low, width, bins),
                  fraction_bits,
                  counts}
        .run();
  });
  return counts;
}

// One call of soft_histogram_backward on activations of type T.
template <typename T>
struct SoftBackward {
  using C = Accumulate<T>;
  const Tensor& activations;
  const Tensor& of_labels;
  const Labels labels;
  const SoftGrid<C> grid;
  const GradCounts<C> slopes;
  const Tensor& grad;

  void run() const {
    if (activations.numel() == 0 || in_order()) return;
    with_vectors<T>(common_layout<T>(activations, grad), [&](auto fv, auto rv) {
      constexpr int FV = fv, RV = rv;
      with_tables<FV, RV>(
          activations, grid.bins, labels.classes, sizeof(C),
          [&](const Tiling& tiling, const TableShape& shape, bool staged, size_t shared) {
            launch(activations, soft_backward<T, FV, RV>, tiling.blocks(), kThreads, shared, slopes,
                   input<T>(activations), labels, tiling, grid, shape, staged, out());
          });
    });
  }

  // By class, where slopes of all classes do not fit in shared memory, and filters lie side by
  // side: samples of a class do not. Else false.
  bool in_order() const {
    if (activations.stride(1) > activations.stride(0) || grad.stride(1) > grad.stride(0))
      return false;
    // A slope costs as much in shared memory as a value saves, or nearly.
    if (activations.numel() < PICNN_FAST_MANY_ELEMENTS ||
        !worth_sorting(activations.size(0) / 4, grid.bins, labels.classes))
      return false;
    const bool along = common_layout<T>(activations, grad) == Layout::kFilters;
    return along ? by_class<kVectorBytes / sizeof(T)>() : by_class<1>();
  }

  template <int FV>
  bool by_class() const {
    if (filters_that_fit(grid.bins, labels.classes, sizeof(C)) >= FV) return false;
    const auto run = [&](const Sorted& sorted, const Division& division, const TableShape& shape,
                         size_t shared) {
      launch(activations, soft_backward_sorted<T, FV>, division.blocks(), kThreads, shared, slopes,
             input<T>(activations), sorted, division, grid, shape, labels.classes, out());
    };
    return with_classes<FV>(activations, of_labels, labels, grid.bins, sizeof(C), run);
  }

  Samples<T> out() const {
    return {static_cast<T*>(grad.data_ptr()), grad.stride(0), grad.stride(1), grad.size(0),
            grad.size(1)};
  }
};

Tensor soft_histogram_backward(const Tensor& grad_counts, const Tensor& activations,
                               const Tensor& labels, const Tensor& low, const Tensor& width) {
  check_table(grad_counts, activations, "grad_counts");
  const int64_t bins = grad_counts.size(1), classes = grad_counts.size(2);
  check_soft(activations, labels, low, width, bins);
  check_accumulate_type(grad_counts, "grad_counts", activations);
  const Tensor grad = torch::stable::empty_like(activations);
  with_type(activations, "activations", [&](auto value) {
    using T = decltype(value);
    using C = Accumulate<T>;
    const GradCounts<C> slopes = {static_cast<const C*>(grad_counts.data_ptr()),
                                  grad_counts.stride(0), grad_counts.stride(1),
                                  grad_counts.stride(2)};
    SoftBackward<T>{
        activations, labels, make_labels(labels, classes), soft_grid<C>(low, width, bins),
        slopes,      grad}
        .run();
  });
  return grad;
}

// A filter's table of counts, with memory for its marginals.
template <typename C>
struct Table {
  Tensor per_bin, per_class;
  Counts<C> view{};

  Table(const Tensor& counts, ScalarType sums)
      : per_bin(torch::stable::new_empty(counts, {counts.size(0), counts.size(1)}, sums)),
        per_class(torch::stable::new_empty(counts, {counts.size(0), counts.size(2)}, sums)) {
    view.data = static_cast<const C*>(counts.data_ptr());
    view.filter = counts.stride(0);
    view.bin = counts.stride(1);
    view.class_step = counts.stride(2);
    view.bins = counts.size(1);
    view.K = counts.size(2);
    view.per_bin = static_cast<Sums<C>*>(per_bin.data_ptr());
    view.per_class = static_cast<Sums<C>*>(per_class.data_ptr());
  }
};

template <typename C>
void inform(const Tensor& counts, bool by_label, bool corrected, const Tensor& out) {
  const Table<C> table(counts, out.scalar_type());
  launch(counts, find_information<C>, counts.size(0), kThreads, 0, table.view, by_label, corrected,
         static_cast<Sums<C>*>(out.data_ptr()));
}

Tensor histogram_information(const Tensor& counts, bool by_label, bool corrected) {
  STD_TORCH_CHECK(counts.dim() == 3, "counts: want [N, bins, K]");
  const bool narrow = counts.scalar_type() == ScalarType::Float;
  const ScalarType type = narrow ? ScalarType::Float : ScalarType::Double;
  const int64_t N = counts.size(0);
  const Tensor out = by_label ? torch::stable::new_empty(counts, {N}, type)
                              : torch::stable::new_empty(counts, {N, counts.size(2)}, type);
  if (narrow) {
    inform<float>(counts, by_label, corrected, out);
  } else if (counts.scalar_type() == ScalarType::Double) {
    inform<double>(counts, by_label, corrected, out);
  } else {
    check_type(counts, "counts", ScalarType::Long, "int64, float32 or float64");
    inform<int64_t>(counts, by_label, corrected, out);
  }
  return out;
}

template <typename A>
void backpropagate(const Tensor& grad, const Tensor& counts, const Tensor& information,
                   bool by_label, const Tensor& out) {
  const Table<A> table(counts, counts.scalar_type());
  const auto per_class = [&](const Tensor& t) -> PerClass<A> {
    return {static_cast<const A*>(t.data_ptr()), t.stride(0), by_label ? 0 : t.stride(1)};
  };
  launch(counts, find_slopes<A>, counts.size(0), kThreads, 0, table.view, by_label, per_class(grad),
         per_class(information), static_cast<A*>(out.data_ptr()), out.stride(0), out.stride(1),
         out.stride(2));
}

Tensor histogram_information_backward(const Tensor& grad, const Tensor& counts,
                                      const Tensor& information, bool by_label) {
  STD_TORCH_CHECK(counts.dim() == 3, "counts: want [N, bins, K]");
  const ScalarType type = counts.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double,
                  "counts: want float32 or float64");
  for (const Tensor* t : {&grad, &information}) {
    const char* name = t == &grad ? "grad" : "information";
    check_device(*t, name, counts, "counts");
    if (by_label)
      check_shape(*t, name, {counts.size(0)});
    else
      check_shape(*t, name, {counts.size(0), counts.size(2)});
    check_type(*t, name, type, "the dtype of counts");
  }
  const Tensor out = torch::stable::empty_like(counts);
  if (type == ScalarType::Double)
    backpropagate<double>(grad, counts, information, by_label, out);
  else
    backpropagate<float>(grad, counts, information, by_label, out);
  return out;
}

}  // namespace
}  // namespace picnn_fast

PICNN_FAST_REGISTER_CUDA(m) {
  m.impl("histogram_update", TORCH_BOX(&picnn_fast::histogram_update));
  m.impl("soft_histogram", TORCH_BOX(&picnn_fast::soft_histogram));
  m.impl("soft_histogram_backward", TORCH_BOX(&picnn_fast::soft_histogram_backward));
  m.impl("histogram_information", TORCH_BOX(&picnn_fast::histogram_information));
  m.impl("histogram_information_backward", TORCH_BOX(&picnn_fast::histogram_information_backward));
}
