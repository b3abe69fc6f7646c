// CUDA kernels of the filter loss. picnn_fast/reference/filter_loss.py is the definition.
//
// For one filter, the maps [B, P] times the templates [P, P + 1] give the responses s, of which
// come the statistics of each template (over the batch) and of each sample (over the templates),
// the weights ds, and, times the templates again, the gradient. Responses never leave a block:
//   resident  a block for each filter holds its maps, then its responses, its weights and its
//             gradient in one shared array: a product takes the place of the rows it was made from.
//   tiled     where these do not fit: a few kernels that hand each other statistics alone, and
//             work out the responses of 32 to 128 samples and some of the templates again each
//             time.
// Templates are looked up in their values at each offset. Float products run on the matrix units,
// three for each as matrix_units.h has it (two where the maps have 16 bits), since exp(s) would
// magnify the rounding of one; those of float64, and of infinities, NaN and what may overflow, do
// not.
// Sums are added up in an order that depends on the sizes alone.

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>

#include "../common/read_template.h"
#include "../common/templates.h"
#include "launch.h"
#include "maps.h"
#include "matrix_units.h"

namespace picnn_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kStrip = 32;     // rows of a warp's product
constexpr int kUnit = 8;       // columns and depth of one step of it
constexpr int kMostTiles = 8;  // of kUnit columns: 64 sums a thread
// Beyond a multiple of 32: the lanes of a step then read different banks.
constexpr int kPad = 4;

// ---- Templates --------------------------------------------------------------------------------

// A value of a template, as products take it.
template <typename A>
struct Entry {
  A whole;
  __device__ static Entry of(A x) { return {x}; }
  __device__ A value() const { return whole; }
};
template <>
struct Entry<float> {
  Split parts;
  __device__ static Entry of(float x) {
    Entry entry;  // nvcc 13.0 breaks down over an expression here
    entry.parts = splits(x) ? split(x) : Split{x, 0};
    return entry;
  }
  __device__ float value() const { return parts.high + parts.low; }
};

// The number of a position, or of the last one where there is none: lanes look there all the same.
__device__ inline int number_on_map(const Offsets& offsets, int position) {
  return offsets.number(min(position, offsets.positions() - 1));
}

// ---- Products ---------------------------------------------------------------------------------

// What a warp needs for kStrip rows of a product with the templates.
template <typename A>
struct Product {
  const A* matrix;
  int row[4];              // where this lane's begin: g, g + 8, g + 16, g + 24, g = lane / 4
  const int* number;       // of the offset of each position (or template) that is summed over
  int count;               // of them; rows and numbers go on to a multiple of kUnit, rows with 0
  const Entry<A>* middle;  // the values of offsets, from number 0
  Offsets offsets;
  int first, tiles;  // columns: kUnit * tiles from the first

  // Rows below `rows`, from `strip` on, of a matrix.
  __device__ void set_rows(const A* matrix_, int stride, int strip, int rows) {
    matrix = matrix_;
    for (int q = 0; q < 4; ++q) row[q] = min(strip + kUnit * q + lane() / 4, rows - 1) * stride;
  }
  __device__ static int lane() { return threadIdx.x % 32; }
  // Where this lane's element e of a 16 x 8 tile of the product belongs: see matrix_units.h.
  __device__ static int row_of(int half, int e) { return 16 * half + lane() / 4 + e / 2 * 8; }
  __device__ int column_of(int tile, int e) const {
    return first + kUnit * tile + lane() % 4 * 2 + e % 2;
  }
};

// sum += rows · templates. kGradient: rows hold weights of templates and columns are positions,
// otherwise the reverse. kShort: rows hold 10-bit mantissas. `plain`: without the matrix units.
template <bool kGradient, bool kShort, int kTiles, typename A>
__device__ void multiply(const Product<A>& p, bool plain, A (&sum)[2][kTiles][4]) {
  const auto look_up = [&](int number, int column) {
    return p.middle[kGradient ? column - number : number - column];
  };
  if constexpr (std::is_same_v<A, float>) {
    if (!plain) {
      const int group = p.lane() / 4, place = p.lane() % 4;
      int column[kTiles];
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
        column[j] = number_on_map(p.offsets, p.first + kUnit * j + group);
#pragma unroll 1
      for (int k = place; k < p.count + place; k += kUnit) {
        float high[2][4], low[2][4];
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const Split x = split(p.matrix[p.row[e / 2] + k + e % 2 * 4]);
          high[e / 4][e / 2 % 2 + e % 2 * 2] = x.high;
          low[e / 4][e / 2 % 2 + e % 2 * 2] = x.low;
        }
        const int near = p.number[k], far = p.number[k + 4];
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          if (j >= p.tiles) break;
          const Split a = look_up(near, column[j]).parts, b = look_up(far, column[j]).parts;
          const float t_high[2] = {a.high, b.high}, t_low[2] = {a.low, b.low};
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            if constexpr (!kShort) multiply_tiles(sum[half][j], low[half], t_high);
            multiply_tiles(sum[half][j], high[half], t_low);
            multiply_tiles(sum[half][j], high[half], t_high);
          }
        }
      }
      return;
    }
  }
  int column[kTiles][2];
#pragma unroll
  for (int j = 0; j < kTiles; ++j)
#pragma unroll
    for (int c = 0; c < 2; ++c) column[j][c] = number_on_map(p.offsets, p.column_of(j, c));
#pragma unroll 1
  for (int k = 0; k < p.count; ++k) {
    const int number = p.number[k];
    A x[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) x[q] = p.matrix[p.row[q] + k];
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      if (j >= p.tiles) break;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const A t = look_up(number, column[j][c]).value();
#pragma unroll
        for (int q = 0; q < 4; ++q) sum[q / 2][j][q % 2 * 2 + c] += x[q] * t;
      }
    }
  }
}

// Whether maps of type T have 10-bit mantissas or shorter ones.
template <typename T>
constexpr bool kShortMaps = sizeof(T) == 2;

// Whether the matrix units take x.
template <typename A>
__device__ bool fits_units(A x) {
  if constexpr (std::is_same_v<A, float>)
    return splits(x);
  else
    return true;
}

// ---- Statistics -------------------------------------------------------------------------------

template <typename A>
struct Sum {
  A sum;
  __device__ static Sum none() { return {0}; }
  __device__ void include(const Sum& other) { sum += other.sum; }
};

// The logarithm of a sum of exponentials. As torch.logsumexp: infinite where a term is +inf, -inf
// without terms, NaN with a NaN.
template <typename A>
struct LogSum {
  A largest, sum;  // the sum is relative to the largest term

  __device__ static LogSum none() { return {-static_cast<A>(HUGE_VAL), 0}; }
  __device__ static LogSum one(A x) {
    return {x, x == -static_cast<A>(HUGE_VAL) ? A{0} : x == x ? A{1} : x};
  }
  __device__ void include(const LogSum& other) {
    if (other.largest > largest) {
      sum = sum * std::exp(largest - other.largest) + other.sum;
      largest = other.largest;
    } else {
      const bool same = other.largest == largest;
      sum += same ? other.sum : other.sum * std::exp(other.largest - largest);
    }
  }
  __device__ A value() const { return largest + std::log(sum); }
};

// How the threads of a block share columns: `across` side by side, each in `parts` that take turns
// along the other axis.
struct Columns {
  int across, parts, column, part;

  __device__ explicit Columns(int count) {
    across = min((count + 31) / 32 * 32, kThreads);
    parts = kThreads / across;
    column = threadIdx.x % across;
    part = threadIdx.x / across;
  }
  // The parts' values put together, in part 0.
  template <typename Value>
  __device__ Value combine(Value value, void* scratch) const {
    auto* values = static_cast<Value*>(scratch);
    __syncthreads();
    values[threadIdx.x] = value;
    __syncthreads();
    if (part == 0)
      for (int q = 1; q < parts; ++q) value.include(values[threadIdx.x + q * across]);
    return value;
  }
};

// The threads' values put together, for all of them.
template <typename Value>
__device__ Value combine_block(Value value, void* scratch) {
  auto* values = static_cast<Value*>(scratch);
  __syncthreads();
  values[threadIdx.x] = value;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half)
      values[threadIdx.x].include(values[threadIdx.x + half]);
  }
  __syncthreads();
  return values[0];
}

// The arguments of the running estimates. `new_log_mean` is null for the other operator.
template <typename A>
struct Running {
  const A *log_mean, *log_ratio;
  A *new_log_mean, *new_log_ratio;
  int64_t mean_filter, mean_template, ratio_filter;  // strides of the old ones
  int64_t new_mean_filter, new_mean_template, new_ratio_filter;
  A log_kept, log_taken;    // of the shares of the old estimate and of this batch
  bool replaces;            // nothing is kept
  const int64_t* assigned;  // or null
  int64_t assigned_batch, assigned_filter;

  __device__ A moving_average(A old, A batch) const {
    if (replaces || old == -static_cast<A>(HUGE_VAL)) return batch;
    auto both = LogSum<A>::one(old + log_kept);
    both.include(LogSum<A>::one(batch + log_taken));
    return both.value();
  }
};

template <typename T>
struct Problem {
  using A = Accumulate<T>;
  Maps<const T> x;
  Maps<A> grad;  // no data where it is not wanted
  int64_t B, N;
  Template<A> part;
  A tau;
  A scale;  // of the loss: 1 / templates, and in the running form 1 / B too
  A* loss;
  Running<A> running;

  __device__ bool is_running() const { return running.new_log_mean != nullptr; }
  __device__ int positions() const { return part.offsets.positions(); }
  __device__ int templates() const { return positions() + 1; }

  __device__ void check_assigned(int64_t b, int64_t n) const {
    if (running.assigned == nullptr) return;
    const int64_t t = running.assigned[b * running.assigned_batch + n * running.assigned_filter];
    PICNN_FAST_DEVICE_ASSERT(0 <= t && t < templates());
  }
  __device__ bool counts(int64_t b, int64_t n, int t) const {
    return running.assigned == nullptr ||
           running.assigned[b * running.assigned_batch + n * running.assigned_filter] == t;
  }
  // With log_given = s - column, where `column` is the statistic of the template and `row` that of
  // the sample: the loss is -scale times the sum of terms.
  __device__ A term(int64_t b, int64_t n, int t, A s, A column, A row) const {
    const A log_given = s - column;
    return counts(b, n, t) ? std::exp(log_given) * (log_given - row) : A{0};
  }
  // ds. `sum`: of the template's terms.
  __device__ A weight(int64_t b, int64_t n, int t, A s, A column, A row, A sum) const {
    const A log_given = s - column;
    const A centred = is_running() ? log_given - row : log_given - row - sum;
    return counts(b, n, t) ? -scale * (std::exp(log_given) * centred) : A{0};
  }
  // Renews log_mean from the log of the sum of exp(s) over the batch, and returns it.
  __device__ A renew_log_mean(int64_t n, int t, A log_sum) const {
    const Running<A>& r = running;
    const A old = r.log_mean[n * r.mean_filter + t * r.mean_template];
    const A now = B == 0 ? old : r.moving_average(old, log_sum - std::log(static_cast<A>(B)));
    r.new_log_mean[n * r.new_mean_filter + t * r.new_mean_template] = now;
    return now;
  }
  // The same of log_ratio, from the log of the sum over batch and templates; by all threads.
  __device__ A renew_log_ratio(int64_t n, A log_sum) const {
    const Running<A>& r = running;
    const A old = r.log_ratio[n * r.ratio_filter];
    const A count = static_cast<A>(B) * static_cast<A>(templates());
    const A now = B == 0 ? old : r.moving_average(old, log_sum - std::log(count));
    if (threadIdx.x == 0) r.new_log_ratio[n * r.new_ratio_filter] = now;
    return now;
  }
};

// ---- Resident ---------------------------------------------------------------------------------

// The shared memory of a block. Rows of the matrix hold what belongs to positions, 0 to a multiple
// of kUnit, and behind that what belongs to the negative template.
template <typename A>
struct Resident {
  Entry<A>* values;
  A *matrix, *column, *sums, *row;
  LogSum<A>* scratch;
  int* number;

  static __host__ __device__ int depth(const Offsets& o) {
    return (o.positions() + kUnit - 1) / kUnit * kUnit;
  }
  static __host__ __device__ int stride(const Offsets& o) { return depth(o) + kPad; }
  static int64_t bytes(const Offsets& o, int64_t B) {
    return (B * (stride(o) + 1) + 2 * (o.positions() + 1) + 2 * kThreads) * sizeof(A) +
           o.count() * sizeof(Entry<A>) + depth(o) * sizeof(int);
  }
  __device__ Resident(const Offsets& o, int B) {
    values = dynamic_shared<Entry<A>>();
    matrix = reinterpret_cast<A*>(values + o.count());
    column = matrix + B * stride(o);
    sums = column + o.positions() + 1;
    row = sums + o.positions() + 1;
    scratch = reinterpret_cast<LogSum<A>*>(row + B);
    number = reinterpret_cast<int*>(scratch + kThreads);
  }
};

// matrix = matrix · templates, but for the last column. A warp does kStrip rows of one of `groups`
// groups of columns, and rows change when all warps have read them.
template <bool kGradient, bool kShort, int kTiles, typename A>
__device__ void multiply_in_place(const Resident<A>& shared, const Offsets& offsets, int B,
                                  int groups, bool plain) {
  const int stride = shared.stride(offsets), positions = offsets.positions();
  const int warp = threadIdx.x / 32, strips = kWarps / groups;
  const int tiles = shared.depth(offsets) / kUnit;
  const int begin = tiles * (warp % groups) / groups, end = tiles * (warp % groups + 1) / groups;
  Product<A> p;
  p.number = shared.number;
  p.count = positions;
  p.middle = shared.values + offsets.middle();
  p.offsets = offsets;
  p.first = begin * kUnit;
  p.tiles = end - begin;
  for (int base = 0; base < B; base += strips * kStrip) {
    const int strip = base + warp / groups * kStrip;
    const bool busy = strip < B;
    A sum[2][kTiles][4] = {};
    if (busy) {
      p.set_rows(shared.matrix, stride, strip, B);
      multiply<kGradient, kShort>(p, plain, sum);
    }
    __syncthreads();
    if (!busy) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        if (j >= p.tiles) break;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int b = strip + p.row_of(half, e), column = p.column_of(j, e);
          if (b < B && column < positions) shared.matrix[b * stride + column] = sum[half][j][e];
        }
      }
    }
  }
  __syncthreads();
}

template <typename T, int kTiles>
__global__ void __launch_bounds__(kThreads, sizeof(Accumulate<T>) == 8 ? 1 : 2)
    resident_filter(Problem<T> p, int groups) {
  using A = Accumulate<T>;
  const int64_t n = blockIdx.x;
  const int B = static_cast<int>(p.B), positions = p.positions(), templates = p.templates();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Resident<A> shared(p.part.offsets, B);
  const int depth = shared.depth(p.part.offsets), stride = shared.stride(p.part.offsets);
  const auto place = [&](int b, int t) -> A& {
    return shared.matrix[b * stride + (t < positions ? t : depth)];
  };

  bool fits = true;
  for (int i = threadIdx.x; i < p.part.offsets.count(); i += kThreads) {
    const A value = p.part.values[i] * p.tau;
    shared.values[i] = Entry<A>::of(value);
    fits = fits && fits_units(value);
  }
  for (int k = threadIdx.x; k < depth; k += kThreads)
    shared.number[k] = number_on_map(p.part.offsets, k);
  const bool templates_fit = __syncthreads_and(fits);
  for (int b = warp; b < B; b += kWarps) {
    const T* x = p.x.data + b * p.x.batch + n * p.x.channel;
    A sum = 0;
#pragma unroll 8
    for (int k = lane; k < depth; k += 32) {
      const A value = k < positions ? static_cast<A>(x[k * p.x.position]) : A{0};
      shared.matrix[b * stride + k] = value;
      fits = fits && fits_units(value);
      sum += value;
    }
    sum = sum_warp(sum);
    if (lane != 0) continue;
    shared.matrix[b * stride + depth] = -p.tau * sum;
    p.check_assigned(b, n);
  }
  bool plain = __syncthreads_or(!fits);
  multiply_in_place<false, kShortMaps<T>, kTiles>(shared, p.part.offsets, B, groups, plain);

  const Columns share(templates);
  const auto all_columns = [&](auto none, const auto& of_sample, const auto& finish) {
    for (int base = 0; base < templates; base += share.across) {
      const int t = base + share.column;
      auto value = none;
      if (share.part < share.parts && t < templates)
        for (int b = share.part; b < B; b += share.parts) value.include(of_sample(b, t));
      value = share.combine(value, shared.scratch);
      if (share.part == 0 && t < templates) finish(t, value);
    }
    __syncthreads();
  };
  auto ratio = LogSum<A>::none();
  all_columns(
      LogSum<A>::none(), [&](int b, int t) { return LogSum<A>::one(place(b, t)); },
      [&](int t, const LogSum<A>& sum) {
        const A log_sum = sum.value();
        shared.column[t] = p.is_running() ? p.renew_log_mean(n, t, log_sum) : log_sum;
        ratio.include(LogSum<A>::one(log_sum - shared.column[t]));
      });
  if (p.is_running()) {
    const A log_ratio = p.renew_log_ratio(n, combine_block(ratio, shared.scratch).value());
    for (int b = threadIdx.x; b < B; b += kThreads) shared.row[b] = log_ratio;
  } else {
    for (int b = warp; b < B; b += kWarps) {
      auto sum = LogSum<A>::none();
      for (int t = lane; t < templates; t += 32)
        sum.include(LogSum<A>::one(place(b, t) - shared.column[t]));
      for (int offset = 16; offset > 0; offset /= 2) {
        const A largest = __shfl_xor_sync(kFullWarp, sum.largest, offset);
        sum.include({largest, __shfl_xor_sync(kFullWarp, sum.sum, offset)});
      }
      if (lane == 0) shared.row[b] = sum.value() - std::log(static_cast<A>(templates));
    }
  }
  __syncthreads();
  auto total = Sum<A>::none();
  all_columns(
      Sum<A>::none(),
      [&](int b, int t) {
        return Sum<A>{p.term(b, n, t, place(b, t), shared.column[t], shared.row[b])};
      },
      [&](int t, const Sum<A>& sum) {
        shared.sums[t] = sum.sum;
        total.include(sum);
      });
  total = combine_block(total, shared.scratch);
  if (threadIdx.x == 0) p.loss[n] = -p.scale * total.sum;
  if (p.grad.data == nullptr) return;

  fits = templates_fit;
  for (int b = warp; b < B; b += kWarps) {
    for (int t = lane; t < templates; t += 32) {
      A& s = place(b, t);
      s = p.weight(b, n, t, s, shared.column[t], shared.row[b], shared.sums[t]);
      fits = fits && fits_units(s);
    }
  }
  plain = __syncthreads_or(!fits);
  multiply_in_place<true, false, kTiles>(shared, p.part.offsets, B, groups, plain);
  for (int b = warp; b < B; b += kWarps) {
    A* grad = p.grad.data + b * p.grad.batch + n * p.grad.channel;
    const A negative = -p.tau * shared.matrix[b * stride + depth];
    for (int k = lane; k < positions; k += 32)
      grad[k * p.grad.position] = shared.matrix[b * stride + k] + negative;
  }
}

// ---- Tiled ------------------------------------------------------------------------------------

template <typename A>
constexpr int kTileTiles = sizeof(A) == 8 ? 2 : 4;  // of a warp: 16 or 32 columns
constexpr int kChunk = 32;  // positions of the maps in shared memory at a time
template <typename A>
constexpr int kMostColumns = kWarps * kTileTiles<A> * kUnit;

// A block's tile of responses: `down` warps of kStrip rows, kWarps / down side by side. At most
// 48 KB of shared memory.
template <typename A>
struct TileShape {
  int down;

  __host__ __device__ int rows() const { return down * kStrip; }
  __host__ __device__ int columns() const { return kMostColumns<A> / down; }
  __host__ __device__ int stride() const { return columns() + kPad; }
  int64_t bytes() const {
    return (rows() * (stride() + 1) + 2 * kThreads) * sizeof(A) + kMostColumns<A> * sizeof(int);
  }
};

// What the kernels hand each other.
template <typename A>
struct Statistics {
  Entry<A>* values;  // [offsets]
  int* unfit;        // [1]: a value that the matrix units do not take
  A* negative;       // [N, B]: responses to the negative template
  A* column;         // [N, templates]
  A* row;            // [N, B], in the running form [N]
  A* sums;           // [N, templates]: of terms
};

template <typename A>
struct TileMemory {
  A *matrix, *negative;
  LogSum<A>* scratch;
  int* number;

  __device__ explicit TileMemory(const TileShape<A>& shape) {
    matrix = dynamic_shared<A>();
    negative = matrix + shape.rows() * shape.stride();
    scratch = reinterpret_cast<LogSum<A>*>(negative + shape.rows());
    number = reinterpret_cast<int*>(scratch + kThreads);
  }
};

// Values of the templates at each offset, for all the blocks to come.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    template_values(Template<A> part, A tau, Statistics<A> s) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= part.offsets.count()) return;
  const A value = part.values[i] * tau;
  s.values[i] = Entry<A>::of(value);
  if (!fits_units(value)) atomicMax(s.unfit, 1);
}

// A warp for each map.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    negative_responses(Problem<T> p, Statistics<Accumulate<T>> s) {
  using A = Accumulate<T>;
  const int64_t map = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  const int64_t n = map % p.N, b = map / p.N;  // neighbours in memory side by side
  if (b >= p.B) return;
  const T* x = p.x.data + b * p.x.batch + n * p.x.channel;
  A sum = 0;
#pragma unroll 4
  for (int k = threadIdx.x % 32; k < p.positions(); k += 32)
    sum += static_cast<A>(x[k * p.x.position]);
  sum = sum_warp(sum);
  if (threadIdx.x % 32 != 0) return;
  s.negative[n * p.B + b] = -p.tau * sum;
  p.check_assigned(b, n);
}

// A warp's share of a tile of products.
template <typename A>
__device__ Product<A> tile_product(const TileShape<A>& shape, const TileMemory<A>& memory,
                                   const Statistics<A>& s, const Offsets& offsets, int column) {
  Product<A> p;
  p.number = memory.number;
  p.middle = s.values + offsets.middle();
  p.offsets = offsets;
  p.first = column + static_cast<int>(threadIdx.x / 32) / shape.down * kTileTiles<A> * kUnit;
  const int left = (offsets.positions() - p.first + kUnit - 1) / kUnit;
  p.tiles = max(0, min(left, kTileTiles<A>));
  return p;
}
template <typename A>
__device__ int warp_strip(const TileShape<A>& shape) {
  return static_cast<int>(threadIdx.x / 32) % shape.down * kStrip;
}

// The responses of samples from b on to templates from t on, in memory.matrix. Elements beyond
// either are left undefined.
template <typename T>
__device__ void respond(const Problem<T>& p, const Statistics<Accumulate<T>>& s,
                        const TileShape<Accumulate<T>>& shape,
                        const TileMemory<Accumulate<T>>& memory, int64_t n, int64_t b, int t) {
  using A = Accumulate<T>;
  constexpr int kChunkStride = kChunk + kPad;
  const int positions = p.positions(), strip = warp_strip(shape);
  auto product = tile_product(shape, memory, s, p.part.offsets, t);
  product.set_rows(memory.matrix, kChunkStride, strip, shape.rows());
  A sum[2][kTileTiles<A>][4] = {};
  const int unfit = *s.unfit;
  for (int first = 0; first < positions; first += kChunk) {
    bool fits = unfit == 0;
    __syncthreads();
    for (int i = threadIdx.x; i < shape.rows() * kChunk; i += kThreads) {
      const int row = i / kChunk, k = i % kChunk;
      const bool inside = b + row < p.B && first + k < positions;
      const A value =
          inside
              ? static_cast<A>(
                    p.x.data[(b + row) * p.x.batch + n * p.x.channel + (first + k) * p.x.position])
              : A{0};
      memory.matrix[row * kChunkStride + k] = value;
      fits = fits && fits_units(value);
    }
    if (threadIdx.x < kChunk)
      memory.number[threadIdx.x] = number_on_map(p.part.offsets, first + threadIdx.x);
    const bool plain = __syncthreads_or(!fits);
    product.count = min(kChunk, positions - first);
    if (product.tiles > 0) multiply<false, kShortMaps<T>>(product, plain, sum);
  }
  __syncthreads();
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int j = 0; j < kTileTiles<A>; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int column = product.column_of(j, e);
        if (column < positions)
          memory.matrix[(strip + product.row_of(half, e)) * shape.stride() + column - t] =
              sum[half][j][e];
      }
  if (t <= positions && positions < t + shape.columns())
    for (int row = threadIdx.x; row < shape.rows() && b + row < p.B; row += kThreads)
      memory.matrix[row * shape.stride() + positions - t] = s.negative[n * p.B + b + row];
  __syncthreads();
}

template <typename T>
__device__ Accumulate<T> row_statistic(const Problem<T>& p, const Statistics<Accumulate<T>>& s,
                                       int64_t n, int64_t b) {
  return s.row[p.is_running() ? n : n * p.B + b];
}

// Log of the sum of exp(s) over the batch for each template, or the sum of its terms.
template <typename T, bool kTerms>
__global__ void __launch_bounds__(kThreads, 2)
    tiled_columns(Problem<T> p, Statistics<Accumulate<T>> s, TileShape<Accumulate<T>> shape) {
  using A = Accumulate<T>;
  const TileMemory<A> memory(shape);
  const unsigned tiles = static_cast<unsigned>(ceil_div(p.templates(), shape.columns()));
  const int64_t n = blockIdx.x / tiles;
  const int first = static_cast<int>(blockIdx.x % tiles) * shape.columns();
  const Columns share(shape.columns());
  const int t = first + share.column;
  auto value = std::conditional_t<kTerms, Sum<A>, LogSum<A>>::none();
  A column = 0;
  if (kTerms && t < p.templates()) column = s.column[n * p.templates() + t];
  for (int64_t b = 0; b < p.B; b += shape.rows()) {
    respond(p, s, shape, memory, n, b, first);
    const int rows = static_cast<int>(min(p.B - b, int64_t{shape.rows()}));
    if (t >= p.templates()) continue;
    for (int row = share.part; row < rows; row += share.parts) {
      const A response = memory.matrix[row * shape.stride() + share.column];
      if constexpr (kTerms)
        value.sum += p.term(b + row, n, t, response, column, row_statistic(p, s, n, b + row));
      else
        value.include(LogSum<A>::one(response));
    }
  }
  value = share.combine(value, memory.scratch);
  if (share.part != 0 || t >= p.templates()) return;
  if constexpr (kTerms)
    s.sums[n * p.templates() + t] = value.sum;
  else
    s.column[n * p.templates() + t] = value.value();
}

// The running estimates of a filter, which take the place of its statistics.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    renew_estimates(Problem<T> p, Statistics<Accumulate<T>> s) {
  using A = Accumulate<T>;
  __shared__ LogSum<A> scratch[kThreads];
  const int64_t n = blockIdx.x;
  auto ratio = LogSum<A>::none();
  for (int t = threadIdx.x; t < p.templates(); t += kThreads) {
    A& column = s.column[n * p.templates() + t];
    const A log_mean = p.renew_log_mean(n, t, column);
    ratio.include(LogSum<A>::one(column - log_mean));
    column = log_mean;
  }
  const A log_ratio = p.renew_log_ratio(n, combine_block(ratio, scratch).value());
  if (threadIdx.x == 0) s.row[n] = log_ratio;
}

// log p(x_b) of the batch form.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    tiled_rows(Problem<T> p, Statistics<Accumulate<T>> s, TileShape<Accumulate<T>> shape) {
  using A = Accumulate<T>;
  const TileMemory<A> memory(shape);
  const unsigned tiles = static_cast<unsigned>(ceil_div(p.B, shape.rows()));
  const int64_t n = blockIdx.x / tiles, first = int64_t{blockIdx.x % tiles} * shape.rows();
  const Columns share(shape.rows());  // rows, here
  const int64_t b = first + share.column;
  auto sum = LogSum<A>::none();
  for (int t = 0; t < p.templates(); t += shape.columns()) {
    respond(p, s, shape, memory, n, first, t);
    const int columns = min(p.templates() - t, shape.columns());
    if (b >= p.B) continue;
    for (int i = share.part; i < columns; i += share.parts)
      sum.include(LogSum<A>::one(memory.matrix[share.column * shape.stride() + i] -
                                 s.column[n * p.templates() + t + i]));
  }
  sum = share.combine(sum, memory.scratch);
  if (share.part == 0 && b < p.B)
    s.row[n * p.B + b] = sum.value() - std::log(static_cast<A>(p.templates()));
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    filter_losses(Problem<T> p, Statistics<Accumulate<T>> s) {
  using A = Accumulate<T>;
  __shared__ Sum<A> scratch[kThreads];
  const int64_t n = blockIdx.x;
  auto sum = Sum<A>::none();
  for (int t = threadIdx.x; t < p.templates(); t += kThreads)
    sum.sum += s.sums[n * p.templates() + t];
  sum = combine_block(sum, scratch);
  if (threadIdx.x == 0) p.loss[n] = -p.scale * sum.sum;
}

// The gradient of a tile of samples: adds up over the templates in global memory, each element by
// one thread.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    tiled_gradient(Problem<T> p, Statistics<Accumulate<T>> s, TileShape<Accumulate<T>> shape) {
  using A = Accumulate<T>;
  const TileMemory<A> memory(shape);
  const unsigned tiles = static_cast<unsigned>(ceil_div(p.B, shape.rows()));
  const int64_t n = blockIdx.x / tiles, b = int64_t{blockIdx.x % tiles} * shape.rows();
  const int positions = p.positions(), stride = shape.stride(), strip = warp_strip(shape);
  for (int t = 0; t < p.templates(); t += shape.columns()) {
    respond(p, s, shape, memory, n, b, t);
    bool fits = *s.unfit == 0;
    for (int i = threadIdx.x; i < shape.rows() * shape.columns(); i += kThreads) {
      const int row = i / shape.columns(), column = i % shape.columns();
      A& response = memory.matrix[row * stride + column];
      A weight = 0;
      if (b + row < p.B && t + column <= positions) {
        const int64_t at = n * p.templates() + t + column;
        weight = p.weight(b + row, n, t + column, response, s.column[at],
                          row_statistic(p, s, n, b + row), s.sums[at]);
      }
      fits = fits && fits_units(weight);
      const bool negative = t + column == positions;
      if (negative) memory.negative[row] = weight;
      response = negative ? A{0} : weight;
    }
    for (int i = threadIdx.x; i < shape.columns(); i += kThreads)
      memory.number[i] = number_on_map(p.part.offsets, t + i);
    const bool plain = __syncthreads_or(!fits);
    const bool last = positions < t + shape.columns();
    for (int column = 0; column < positions; column += shape.columns()) {
      auto product = tile_product(shape, memory, s, p.part.offsets, column);
      if (product.tiles == 0) continue;
      product.set_rows(memory.matrix, stride, strip, shape.rows());
      product.count = min(shape.columns(), positions - t);
      A sum[2][kTileTiles<A>][4] = {};
      multiply<true, false>(product, plain, sum);
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int j = 0; j < kTileTiles<A>; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int row = strip + product.row_of(half, e), k = product.column_of(j, e);
            if (b + row >= p.B || k >= positions) continue;
            A& grad =
                p.grad.data[(b + row) * p.grad.batch + n * p.grad.channel + k * p.grad.position];
            A value = sum[half][j][e];
            if (t > 0) value += grad;
            if (last) value -= p.tau * memory.negative[row];
            grad = value;
          }
    }
  }
}

// ---- Launching --------------------------------------------------------------------------------

// How many groups the warps of a resident block divide the columns into, and how many tiles of
// columns a warp has at most: the least time, and of equals the most columns a warp.
struct Division {
  int groups, tiles;
};
Division divide(int64_t B, int depth) {
  const int64_t strips = ceil_div(B, kStrip), all = depth / kUnit;
  Division best{};
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int groups = 1; groups <= kWarps; groups *= 2) {
    const int64_t tiles = ceil_div(all, groups), time = ceil_div(strips * groups, kWarps) * tiles;
    if (tiles > kMostTiles || time >= least) continue;
    least = time;
    best = {groups, static_cast<int>(tiles)};
  }
  return best;  // no groups: too many columns
}

template <typename T>
void run_tiled(const Tensor& x, const Problem<T>& p) {
  using A = Accumulate<T>;
  const int64_t B = p.B, N = p.N, templates = p.part.offsets.positions() + 1;
  const ScalarType type = accumulate_type(x);
  const int64_t count = p.part.offsets.count();
  const Tensor values = torch::stable::new_empty(
      x, {count * static_cast<int64_t>(sizeof(Entry<A>) / sizeof(A))}, type);
  const Tensor unfit = torch::stable::new_zeros(x, {1}, ScalarType::Int);
  const Tensor negative = torch::stable::new_empty(x, {N, B}, type);
  const Tensor column = torch::stable::new_empty(x, {N, templates}, type);
  const bool running = p.running.new_log_mean != nullptr;
  const Tensor row = torch::stable::new_empty(x, {N, running ? 1 : B}, type);
  const Tensor sums = torch::stable::new_empty(x, {N, templates}, type);
  const Statistics<A> s = {
      static_cast<Entry<A>*>(values.data_ptr()), static_cast<int*>(unfit.data_ptr()),
      static_cast<A*>(negative.data_ptr()),      static_cast<A*>(column.data_ptr()),
      static_cast<A*>(row.data_ptr()),           static_cast<A*>(sums.data_ptr())};
  TileShape<A> shape{4};
  while (shape.down > 1 && shape.down / 2 * kStrip >= B) shape.down /= 2;
  const auto shared = static_cast<size_t>(shape.bytes());
  const int64_t in_columns = N * ceil_div(templates, shape.columns());
  const int64_t in_rows = N * ceil_div(B, shape.rows());
  launch(x, template_values<A>, ceil_div(count, kThreads), kThreads, 0, p.part, p.tau, s);
  launch(x, negative_responses<T>, ceil_div(B * N, kWarps), kThreads, 0, p, s);
  launch(x, tiled_columns<T, false>, in_columns, kThreads, shared, p, s, shape);
  if (running)
    launch(x, renew_estimates<T>, N, kThreads, 0, p, s);
  else
    launch(x, tiled_rows<T>, in_rows, kThreads, shared, p, s, shape);
  launch(x, tiled_columns<T, true>, in_columns, kThreads, shared, p, s, shape);
  launch(x, filter_losses<T>, N, kThreads, 0, p, s);
  if (p.grad.data != nullptr) launch(x, tiled_gradient<T>, in_rows, kThreads, shared, p, s, shape);
}

template <typename T>
void run(const Tensor& x, const Problem<T>& p) {
  using A = Accumulate<T>;
  const int64_t bytes = Resident<A>::bytes(p.part.offsets, p.B);
  const Division division = divide(p.B, Resident<A>::depth(p.part.offsets));
  if (division.groups == 0 || bytes > most_shared_bytes(x))
    run_tiled(x, p);
  else if (division.tiles <= kMostTiles / 2)
    launch(x, resident_filter<T, kMostTiles / 2>, p.N, kThreads, bytes, p, division.groups);
  else
    launch(x, resident_filter<T, kMostTiles>, p.N, kThreads, bytes, p, division.groups);
}

// Of x's shape and layout, in the type of its sums.
Tensor empty_gradient(const Tensor& x) {
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{from(x),
                                    from(std::optional<ScalarType>(accumulate_type(x))),
                                    from(std::nullopt),
                                    from(std::nullopt),
                                    from(std::nullopt),
                                    from(std::nullopt)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

struct Results {
  Tensor loss, grad;
};

// `set_running` fills in the arguments of the running form.
template <typename SetRunning>
Results filter_loss(const Tensor& x, const Tensor& offsets, double tau, bool with_grad,
                    bool running, const SetRunning& set_running) {
  offsets_of_maps(x, "x");
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  const int64_t B = x.size(0), N = x.size(1);
  STD_TORCH_CHECK(B <= kMost, "picnn_fast: x must be of fewer than 2^31 samples");
  const Tensor loss = torch::stable::new_empty(x, {N}, accumulate_type(x));
  const Tensor grad =
      with_grad ? empty_gradient(x) : torch::stable::new_empty(x, {0}, accumulate_type(x));
  with_type(x, "x", [&](auto value) {
    using T = decltype(value);
    using A = Accumulate<T>;
    const auto part = read_template<A>(x, "x", offsets);
    STD_TORCH_CHECK(part.offsets.count() <= kMost,
                    "picnn_fast: x must be maps with fewer than 2^31 offsets");
    const double templates = static_cast<double>(x.size(2) * x.size(3) + 1);
    Problem<T> p{};
    p.x = input_maps<T>(x);
    if (with_grad) p.grad = output_maps<A>(grad);
    p.B = B;
    p.N = N;
    p.part = part;
    p.tau = static_cast<A>(tau);
    const double samples = running ? static_cast<double>(std::max<int64_t>(B, 1)) : 1.0;
    p.scale = static_cast<A>(1 / (templates * samples));
    p.loss = static_cast<A*>(loss.data_ptr());
    set_running(p.running);
    run(x, p);
  });
  return {loss, grad};
}

std::tuple<Tensor, Tensor> batch_filter_loss(const Tensor& x, const Tensor& offsets, double tau,
                                             bool with_grad) {
  const Results results = filter_loss(x, offsets, tau, with_grad, false, [](const auto&) {});
  return {results.loss, results.grad};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> running_filter_loss(
    const Tensor& x, const Tensor& log_mean, const Tensor& log_ratio, double momentum,
    const std::optional<Tensor>& assigned, const Tensor& offsets, double tau, bool with_grad) {
  offsets_of_maps(x, "x");
  const int64_t B = x.size(0), N = x.size(1), templates = x.size(2) * x.size(3) + 1;
  check_device(log_mean, "log_mean", x, "x");
  check_device(log_ratio, "log_ratio", x, "x");
  STD_TORCH_CHECK(log_mean.dim() == 2 && log_mean.size(0) == N && log_mean.size(1) == templates &&
                      log_mean.scalar_type() == accumulate_type(x),
                  "picnn_fast: log_mean must be float32 [N, h * w + 1] (float64 for float64 x)");
  STD_TORCH_CHECK(log_ratio.dim() == 1 && log_ratio.size(0) == N &&
                      log_ratio.scalar_type() == accumulate_type(x),
                  "picnn_fast: log_ratio must be float32 [N] (float64 for float64 x)");
  STD_TORCH_CHECK(0 < momentum && momentum <= 1, "picnn_fast: momentum must be in (0, 1], not ",
                  momentum);
  if (assigned.has_value()) {
    check_device(*assigned, "assigned", x, "x");
    STD_TORCH_CHECK(assigned->dim() == 2 && assigned->size(0) == B && assigned->size(1) == N &&
                        assigned->scalar_type() == ScalarType::Long,
                    "picnn_fast: assigned must be int64 [B, N]");
  }
  const Tensor new_log_mean =
      torch::stable::new_empty(log_mean, {log_mean.size(0), log_mean.size(1)});
  const Tensor new_log_ratio = torch::stable::new_empty(log_ratio, {log_ratio.size(0)});
  const Results results = filter_loss(x, offsets, tau, with_grad, true, [&](auto& running) {
    using A = std::remove_reference_t<decltype(*running.new_log_mean)>;
    running = {static_cast<const A*>(log_mean.data_ptr()),
               static_cast<const A*>(log_ratio.data_ptr()),
               static_cast<A*>(new_log_mean.data_ptr()),
               static_cast<A*>(new_log_ratio.data_ptr()),
               log_mean.stride(0),
               log_mean.stride(1),
               log_ratio.stride(0),
               new_log_mean.stride(0),
               new_log_mean.stride(1),
               new_log_ratio.stride(0),
               static_cast<A>(std::log1p(-momentum)),
               static_cast<A>(std::log(momentum)),
               momentum == 1,
               nullptr,
               0,
               0};
    if (!assigned.has_value()) return;
    running.assigned = static_cast<const int64_t*>(assigned->data_ptr());
    running.assigned_batch = assigned->stride(0);
    running.assigned_filter = assigned->stride(1);
  });
  return {results.loss, results.grad, new_log_mean, new_log_ratio};
}

}  // namespace
}  // namespace picnn_fast

PICNN_FAST_REGISTER_CUDA(m) {
  m.impl("filter_loss", TORCH_BOX(&picnn_fast::batch_filter_loss));
  m.impl("filter_loss_running", TORCH_BOX(&picnn_fast::running_filter_loss));
}
