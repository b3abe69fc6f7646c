// CUDA kernels of the mutual information family. picnn_fast/reference/mutual_information.py is the
// definition, csrc/common/mutual_information.h the arithmetic of a point.
//
// Torch's sort orders each filter by value, and the places of the sorted samples by class. A thread
// a sample then does what does not depend on the number of classes: its own class, its neighbours
// whatever their class, and those again without each class that holds one of them. Threads follow
// the sorted order, so that what a warp reads lies close together.
// Sums are integers, digamma times a power of two: atomic additions in any order give the same.

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

#include "../common/digamma.h"
#include "../common/mutual_information.h"
#include "launch.h"

namespace picnn_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;

__device__ int64_t thread_number() { return int64_t{blockIdx.x} * kThreads + threadIdx.x; }

// What the kernels read and write. "Sorted" rows hold the samples of a filter by value, "grouped"
// rows by class and then by value.
struct Tables {
  int64_t filters, samples, classes, n_neighbors;
  const double* values;           // sorted
  const int32_t* labels;          // sorted
  double* class_values;           // grouped
  int32_t* rank;                  // sorted: place in the grouped row
  uint32_t *run_begin, *run_end;  // sorted: see SortedFilter
  int32_t* alone;         // sorted: how many samples up to here are the only ones of their class
  const int32_t* starts;  // [classes + 1]: where each class begins in grouped rows
  const int64_t* psi;     // [samples + 1]: digamma times a power of two
  int64_t* class_sums;    // [filters, classes]
  int64_t *base_sums, *joint_sums;

  __device__ SortedFilter filter(int64_t n) const {
    const int64_t row = n * samples;
    return {values + row, labels + row, run_begin + row, run_end + row, samples};
  }
  __device__ int64_t class_size(int64_t c) const { return int64_t{starts[c + 1]} - starts[c]; }
};

__device__ bool finite(const SortedFilter& f) {  // NaN is sorted last
  return -HUGE_VAL < f.values[0] && f.values[f.samples - 1] < HUGE_VAL;
}

__device__ void add(int64_t* sum, int64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(sum), static_cast<unsigned long long>(value));
}

// Adds the values of a warp; every lane takes part.
__device__ void add_warp(int64_t* sum, int64_t value) {
  value = sum_warp(value);
  if (threadIdx.x % 32 == 0) add(sum, value);
}

// ---- Tables -----------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads)
    sorted_labels(const int64_t* order, const int64_t* labels, int64_t stride, int64_t count,
                  int64_t classes, int32_t* out) {
  const int64_t i = thread_number();
  if (i >= count) return;
  const int64_t label = labels[order[i] * stride];
  PICNN_FAST_DEVICE_ASSERT(0 <= label && label < classes);
  out[i] = static_cast<int32_t>(label);
}

__global__ void __launch_bounds__(kThreads) digamma_table(int64_t samples, int bits, int64_t* psi) {
  const int64_t m = thread_number();
  if (m <= samples) psi[m] = m == 0 ? 0 : llrint(ldexp(digamma(m), bits));
}

// The first place of each class in ascending labels.
__global__ void __launch_bounds__(kThreads)
    class_starts(const int32_t* labels, int64_t samples, int64_t classes, int32_t* starts) {
  const int64_t c = thread_number();
  if (c > classes) return;
  int64_t low = 0, high = samples;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (labels[middle] < c)
      low = middle + 1;
    else
      high = middle;
  }
  starts[c] = static_cast<int32_t>(low);
}

// Of places[first] and on, which ascend, how many follow each other without a gap; walking by
// `direction`, at most `limit`.
__device__ int64_t gapless(const int64_t* places, int64_t first, int64_t limit, int direction) {
  const auto joined = [&](int64_t steps) {
    return places[first + direction * steps] == places[first] + direction * steps;
  };
  int64_t inside = 0, step = 1;
  while (inside + step <= limit && joined(inside + step)) {
    inside += step;
    step *= 2;
  }
  int64_t outside = min(inside + step, limit + 1);
  while (outside - inside > 1) {
    const int64_t middle = inside + (outside - inside) / 2;
    if (joined(middle))
      inside = middle;
    else
      outside = middle;
  }
  return inside;
}

// `grouped`: the sorted places, by class.
__global__ void __launch_bounds__(kThreads) class_tables(Tables t, const int64_t* grouped) {
  const int64_t i = thread_number();
  if (i >= t.filters * t.samples) return;
  const int64_t row = i / t.samples * t.samples, q = i - row;
  const int64_t p = grouped[i];
  const int32_t c = t.labels[row + p];
  t.class_values[i] = t.values[row + p];
  t.rank[row + p] = static_cast<int32_t>(q);
  t.run_begin[row + p] = static_cast<uint32_t>(p - gapless(grouped + row, q, q - t.starts[c], -1));
  t.run_end[row + p] =
      static_cast<uint32_t>(p + gapless(grouped + row, q, t.starts[c + 1] - 1 - q, 1) + 1);
  t.alone[row + p] = t.class_size(c) == 1;  // not added up yet
}

// ---- Estimate ---------------------------------------------------------------------------------

__device__ Range within(const SortedFilter& f, int64_t p, double radius) {
  return {first_within(f.values, 0, p, f.values[p], radius),
          end_within(f.values, p, f.samples, f.values[p], radius)};
}

// psi(m) + psi(n) - psi(k) of the p-th sorted sample within its own class, which has others: for
// the row of the class, and for the joint estimate, which leaves out classes of one sample.
struct OwnClass {
  int64_t row, joint;
};
__device__ OwnClass own_class(const Tables& t, const SortedFilter& f, int64_t n, int64_t p) {
  const int32_t y = f.labels[p];
  const int64_t row = n * t.samples, size = t.class_size(y);
  const double* own = t.class_values + row + t.starts[y];
  const int64_t j = t.rank[row + p] - t.starts[y];
  const int64_t k = min(t.n_neighbors, size - 1);
  const double distance = brute_force(size, t.n_neighbors)
                              ? rounded_distance(own, size, j, k)
                              : window_distance(own, j, k, window_begin(own, size, j, k, 0));
  const Range near = within(f, p, radius_below(distance));
  const int64_t m = near.end - near.begin;
  const int32_t* alone = t.alone + row;
  const int64_t kept = m - (alone[near.end - 1] - (near.begin > 0 ? alone[near.begin - 1] : 0));
  const int64_t label = t.psi[size] - t.psi[k];
  // When all the others are one sample, the row leaves it out too.
  return {label + t.psi[t.samples - size == 1 ? kept : m], label + t.psi[kept]};
}

// Where more than 2k + 1 samples are not of a class, the sum of psi(m) over them is that over all
// samples without regard to classes (base_sums), minus that over the class's own, plus corrections
// for the samples that have the class among their neighbours. Of this, what the p-th sorted sample
// contributes: adds the corrections, returns psi(m), and adds to `own` what its own class gets.
__device__ int64_t rest(const Tables& t, const SortedFilter& f, int64_t n, int64_t p,
                        int64_t* own) {
  const int64_t k = t.n_neighbors;
  const int64_t begin = window_begin(f.values, t.samples, p, k, 0);
  const double distance = window_distance(f.values, p, k, begin);
  const Range near = within(f, p, radius_below(distance));
  const int64_t m = near.end - near.begin;
  const int64_t base = t.psi[m];
  // More than k equal samples: without one of them m is less by one for all the others, be it in
  // their windows or not. If it is alone in its class, its own thread sees to it.
  const bool crowd = distance == 0;
  const int32_t y = f.labels[p];
  if (!brute_force(t.samples - t.class_size(y), k)) {
    *own -= base;
    if (crowd && t.class_size(y) == 1) *own += (m - 1) * (t.psi[m - 1] - base);
  }
  for (int64_t w = begin; w <= begin + k; ++w) {
    const int32_t c = f.labels[w];
    const int64_t size = t.class_size(c);
    if (c == y || brute_force(t.samples - size, k) || (crowd && size == 1)) continue;
    int64_t before = 0, missing = 0;
    for (int64_t i = begin; i < w; ++i) before += f.labels[i] == c;
    if (before > 0) continue;
    for (int64_t i = w; i <= begin + k; ++i) missing += f.labels[i] == c;
    const Range others = within_without_class(f, p, k, begin, c, missing);
    const bool left_out = size == 1 && others.begin <= w && w < others.end;
    add(t.class_sums + n * t.classes + c, t.psi[others.end - others.begin - left_out] - base);
  }
  return base;
}

__global__ void __launch_bounds__(kThreads) count_neighbors(Tables t) {
  const unsigned blocks = static_cast<unsigned>(ceil_div(t.samples, kThreads));
  const int64_t n = blockIdx.x / blocks;
  const int64_t p = int64_t{blockIdx.x % blocks} * kThreads + threadIdx.x;
  const SortedFilter f = t.filter(n);
  if (!finite(f)) return;
  int64_t base = 0, joint = 0;
  if (p < t.samples) {
    const int32_t y = f.labels[p];
    int64_t own = 0;
    if (t.class_size(y) > 1) {
      const OwnClass terms = own_class(t, f, n, p);
      own = terms.row;
      joint = terms.joint;
    }
    if (!brute_force(t.samples, t.n_neighbors)) base = rest(t, f, n, p, &own);
    add(t.class_sums + n * t.classes + y, own);
  }
  add_warp(t.base_sums + n, base);
  add_warp(t.joint_sums + n, joint);
}

// The grouped values of a filter but for those of one class.
struct Others {
  const double* values;
  int64_t gap_begin, gap;
  __device__ double operator[](int64_t i) const { return values[i < gap_begin ? i : i + gap]; }
};

// The rest in rows where it has at most 2k + 1 samples: a thread for each of them.
__global__ void __launch_bounds__(kThreads) count_few_others(Tables t, int64_t slots) {
  const int64_t i = thread_number();
  const int64_t n = i / (t.classes * slots);
  if (n >= t.filters) return;
  const int64_t c = i / slots % t.classes, e = i % slots;
  const int64_t class_size = t.class_size(c), size = t.samples - class_size;
  const SortedFilter f = t.filter(n);
  if (size < 2 || !brute_force(size, t.n_neighbors) || e >= size || !finite(f)) return;
  const double* grouped = t.class_values + n * t.samples;
  const Others others = {grouped, t.starts[c], class_size};
  const double x = others[e];
  const double radius =
      radius_below(rounded_distance(others, size, e, min(t.n_neighbors, size - 1)));
  // What the searches look for holds at the end they start from, wherever x is.
  int64_t m = end_within(f.values, 0, t.samples, x, radius) -
              first_within(f.values, 0, t.samples - 1, x, radius);
  if (class_size == 1 && fabs(grouped[t.starts[c]] - x) <= radius) --m;
  add(t.class_sums + n * t.classes + c, t.psi[m]);
}

// psi(samples) - sum / samples, floored at 0; NaN without samples.
__device__ double estimate(const Tables& t, int64_t samples, int64_t sum, double one) {
  if (samples == 0) return NAN;
  const double count = static_cast<double>(samples);
  return fmax(0.0, (static_cast<double>(t.psi[samples]) - static_cast<double>(sum) / count) / one);
}

__global__ void __launch_bounds__(kThreads)
    estimates(Tables t, double one, double* per_class, double* joint) {
  const int64_t i = thread_number();
  const int64_t c = i / t.filters, n = i % t.filters;
  if (c > t.classes) return;
  double* out = c < t.classes ? per_class + i : joint + n;
  if (!finite(t.filter(n))) {
    *out = NAN;
  } else if (c == t.classes) {
    const int64_t alone = t.alone[(n + 1) * t.samples - 1];
    *out = estimate(t, t.samples - alone, t.joint_sums[n], one);
  } else {
    const int64_t size = t.class_size(c), others = t.samples - size;
    int64_t sum = t.class_sums[n * t.classes + c];
    if (!brute_force(others, t.n_neighbors)) sum += t.base_sums[n];
    if (others > 1) sum += others * (t.psi[others] - t.psi[min(t.n_neighbors, others - 1)]);
    *out = estimate(t, (size > 1 ? size : 0) + (others > 1 ? others : 0), sum, one);
  }
}

// ---- Launching --------------------------------------------------------------------------------

// Along the last axis. torch::stable::sort needs a newer torch than the others used here.
std::tuple<Tensor, Tensor> stable_sort(const Tensor& self) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(self), from(std::optional<bool>(true)), from(int64_t{-1}),
                                    from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

void accumulate_rows(const Tensor& self) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(self), from(int64_t{-1}),
                                    from(std::optional<ScalarType>(self.scalar_type()))};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::cumsum_", "", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

template <typename... Parameters, typename... Arguments>
void launch_threads(const Tensor& on, void (*kernel)(Parameters...), int64_t threads,
                    Arguments... arguments) {
  launch(on, kernel, ceil_div(threads, kThreads), kThreads, 0, arguments...);
}

// Memory beside the arguments: 45 bytes for each element of values at most, the sort's own
// included.
std::tuple<Tensor, Tensor> knn_mutual_information(const Tensor& values, const Tensor& labels,
                                                  int64_t num_classes, int64_t n_neighbors) {
  STD_TORCH_CHECK(values.dim() == 2, "values: got ", values.dim(), " axes, want [N, M]");
  check_type(values, "values", ScalarType::Double, "float64");
  const int64_t N = values.size(0), M = values.size(1), K = num_classes;
  check_device(labels, "labels", values, "values");
  check_shape(labels, "labels", {M});
  check_type(labels, "labels", ScalarType::Long, "int64");
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(M < kLimit && 0 <= K && K < kLimit, "values, num_classes: got ", M,
                  " samples and ", K, " classes, want fewer than 2^31 - 1");
  STD_TORCH_CHECK(n_neighbors >= 1, "n_neighbors: got ", n_neighbors, ", want 1 or more");
  Tensor per_class = torch::stable::new_empty(values, {K, N});
  Tensor joint = torch::stable::new_empty(values, {N});
  if (N == 0) return {per_class, joint};
  if (M == 0) return {torch::stable::fill_(per_class, NAN), torch::stable::fill_(joint, NAN)};

  const auto table = [&](ScalarType type) {
    return torch::stable::new_empty(values, {N, M}, type);
  };
  auto [sorted, order] = stable_sort(torch::stable::contiguous(values));
  const Tensor column_labels = table(ScalarType::Int);
  launch_threads(values, sorted_labels, N * M, data<int64_t>(order), data<int64_t>(labels),
                 labels.stride(0), N * M, K, data<int32_t>(column_labels));
  order = Tensor();
  auto [in_order, grouped] = stable_sort(column_labels);
  const Tensor starts = torch::stable::new_empty(values, {K + 1}, ScalarType::Int);
  launch_threads(values, class_starts, K + 1, data<int32_t>(in_order), M, K, data<int32_t>(starts));
  in_order = Tensor();

  // |psi(m)| + |psi(n) - psi(k)| < 2 (ln M + 1), and sums over M samples fit into 63 bits: a term
  // is off by 2^-43 for M = 50,000, by 2^-37 for four million.
  const double samples = static_cast<double>(M);
  const int bits = static_cast<int>(62 - std::log2(samples * (std::log(samples) + 1)));
  const Tensor psi = torch::stable::new_empty(values, {M + 1}, ScalarType::Long);
  launch_threads(values, digamma_table, M + 1, M, bits, data<int64_t>(psi));

  const Tensor class_values = table(ScalarType::Double), rank = table(ScalarType::Int);
  const Tensor run_begin = table(ScalarType::Int), run_end = table(ScalarType::Int);
  const Tensor alone = table(ScalarType::Int);
  const Tensor sums = torch::stable::new_zeros(values, {N, K + 2}, ScalarType::Long);
  Tables t{};
  t.filters = N;
  t.samples = M;
  t.classes = K;
  t.n_neighbors = std::min(n_neighbors, M);  // no label has more neighbours
  t.values = data<double>(sorted);
  t.labels = data<int32_t>(column_labels);
  t.class_values = data<double>(class_values);
  t.rank = data<int32_t>(rank);
  t.run_begin = data<uint32_t>(run_begin);
  t.run_end = data<uint32_t>(run_end);
  t.alone = data<int32_t>(alone);
  t.starts = data<int32_t>(starts);
  t.psi = data<int64_t>(psi);
  t.class_sums = data<int64_t>(sums);
  t.base_sums = data<int64_t>(sums) + N * K;
  t.joint_sums = data<int64_t>(sums) + N * (K + 1);
  launch_threads(values, class_tables, N * M, t, data<int64_t>(grouped));
  grouped = Tensor();
  accumulate_rows(alone);
  launch(values, count_neighbors, N * ceil_div(M, kThreads), kThreads, 0, t);
  const int64_t slots = std::min(2 * t.n_neighbors + 1, M);
  launch_threads(values, count_few_others, N * K * slots, t, slots);
  launch_threads(values, estimates, N * (K + 1), t, std::ldexp(1.0, bits), data<double>(per_class),
                 data<double>(joint));
  return {per_class, joint};
}

}  // namespace
}  // namespace picnn_fast

PICNN_FAST_REGISTER_CUDA(m) {
  m.impl("knn_mutual_information", TORCH_BOX(&picnn_fast::knn_mutual_information));
}
