// CUDA kernels of the histogram family. picnn_fast/reference/histogram.py is the definition.
//
// Activations are [M, N]. A block takes a tile of neighbouring filters and a stretch of samples,
// and keeps the tables of its filters in shared memory. Its threads read 16-byte vectors along
// filters or along samples, whichever is contiguous, or single elements.
//
// Hard counts read the activations once: a block counts on the grid of the samples that it has seen
// itself, widening it as it goes, and a second kernel brings the blocks' tables to the grid of all.
// That is exact, because a grid follows from its range alone and a wider one only merges bins.
// Where a filter's table does not fit in shared memory, there are two passes: the range, then
// counts by global atomics.
//
// Soft counts are sums of integers, weights times a power of two, so that they do not depend on the
// order in which atomics arrive.

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>
#include <type_traits>

#include "../common/binning.h"
#include "launch.h"

namespace picnn_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Wide = unsigned long long;  // what 64-bit atomics take

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kVectorBytes = 16;
constexpr int kMaxFilters = 64;         // of a block: 128 bytes of the narrowest type
constexpr int kSharedBytes = 43 << 10;  // of tables: 48 KB less the fixed arrays below
constexpr int64_t kBlocks = 384;        // one round of three to a multiprocessor on a large device
constexpr int64_t kMaxRows = int64_t{1} << 30;  // of a block: its counters have 32 bits
constexpr Wide kPoison = Wide{1} << 63;         // a soft count with a NaN in it

template <typename T>
struct Samples {
  T* data;                 // [M, N]
  int64_t sample, filter;  // strides in elements
  int64_t M, N;
};

struct Labels {
  const int64_t* data;
  int64_t stride;
  int classes;

  __device__ int operator()(int64_t m) const {
    const int64_t label = data[m * stride];
    PICNN_FAST_DEVICE_ASSERT(0 <= label && label < classes);
    return static_cast<int>(label);
  }
};

// How the blocks of a launch share [M, N]. Of a block's threads, `lanes` lie side by side along the
// filters, the rest along the samples.
struct Tiling {
  int64_t tiles;   // of filters
  int64_t splits;  // of samples
  int64_t rows;    // samples of a split
  int lanes;
  bool filters_fast;  // neighbouring threads hold neighbouring filters, not samples

  int64_t blocks() const { return tiles * splits; }
};

// A thread's place: filters [filter, filter + FV) of the block's tile, and in each step kPieces
// runs of RV samples. FV or RV is 1; vectors along filters never cross N.
template <int FV, int RV>
struct Walk {
  static constexpr int kVector = FV * RV;
  static constexpr int kPieces = kVector == 1 ? 8 : kVector == 8 ? 2 : 4;

  int64_t split, first_filter, begin, end;
  int filters;     // of the block's tile, those beyond N included
  int rows_apart;  // from one piece to the next
  int filter, row;
  bool active;

  __device__ Walk(const Tiling& t, int64_t M, int64_t N) {
    const int threads = kThreads / t.lanes, i = threadIdx.x;
    split = blockIdx.x / t.tiles;
    filters = t.lanes * FV;
    first_filter = blockIdx.x % t.tiles * filters;
    filter = (t.filters_fast ? i % t.lanes : i / threads) * FV;
    row = (t.filters_fast ? i / t.lanes : i % threads) * RV;
    rows_apart = threads * RV;
    begin = split * t.rows;
    end = min(M, begin + t.rows);
    active = first_filter + filter < N;
  }
  __device__ int step() const { return rows_apart * kPieces; }
  // Samples of a step count from its base: those of a piece from row(piece), and the thread has
  // those below left(base).
  __device__ int row_of(int piece) const { return piece * rows_apart + row; }
  __device__ int left(int64_t base) const {
    return active ? static_cast<int>(min(end - base, int64_t{step()})) : 0;
  }
  template <typename T>
  __device__ T* address(const Samples<T>& s, int64_t base, int piece) const {
    return s.data + (base + row_of(piece)) * s.sample + (first_filter + filter) * s.filter;
  }

  // What the thread does not have is left as it was.
  template <typename T>
  __device__ void load(const Samples<const T>& s, int64_t base,
                       T (&value)[kPieces][kVector]) const {
#pragma unroll
    for (int u = 0; u < kPieces; ++u) {
      const T* from = address(s, base, u);
      const int have = left(base) - row_of(u);
      if (have >= RV) {
        *reinterpret_cast<Vector<T, kVector>*>(value[u]) =
            *reinterpret_cast<const Vector<T, kVector>*>(from);
      } else {
#pragma unroll
        for (int j = 0; j < RV - 1; ++j)
          if (j < have) value[u][j] = from[j];
      }
    }
  }
  template <typename T>
  __device__ void store(const Samples<T>& s, int64_t base,
                        const T (&value)[kPieces][kVector]) const {
#pragma unroll
    for (int u = 0; u < kPieces; ++u) {
      T* to = address(s, base, u);
      const int have = left(base) - row_of(u);
      if (have >= RV) {
        *reinterpret_cast<Vector<T, kVector>*>(to) =
            *reinterpret_cast<const Vector<T, kVector>*>(value[u]);
      } else {
#pragma unroll
        for (int j = 0; j < RV - 1; ++j)
          if (j < have) to[j] = value[u][j];
      }
    }
  }
};

// ---- Ranges and grids -------------------------------------------------------------------------

// A key that orders as the numbers do.
__device__ Wide order_key(double x) {
  Wide bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits >> 63 != 0 ? ~bits : bits | Wide{1} << 63;
}
__device__ double of_order_key(Wide key) {
  const Wide bits = key >> 63 != 0 ? key & ~(Wide{1} << 63) : ~key;
  double x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

template <typename C>
__device__ bool is_finite(C x) {
  return x - x == C{0};
}

// Range of each filter of a block, as keys in shared memory.
struct BlockRange {
  Wide lowest[kMaxFilters], highest[kMaxFilters];

  // Takes in every thread's range of its filters, if finite. All threads of the block call it.
  template <typename C, typename Place, int FV>
  __device__ void include(const Tiling& t, const Place& place, const C (&least)[FV],
                          const C (&most)[FV]) {
    const int apart = t.filters_fast ? t.lanes : 1;  // lanes of a warp with the same filters
    const int together = min(32 / apart, kThreads / t.lanes);
#pragma unroll
    for (int i = 0; i < FV; ++i) {
      C low = least[i], high = most[i];
      for (int offset = apart * together / 2; offset >= apart; offset /= 2) {
        low = min(low, __shfl_xor_sync(kFullWarp, low, offset));
        high = max(high, __shfl_xor_sync(kFullWarp, high, offset));
      }
      if (threadIdx.x % 32 / apart % together == 0 && is_finite(low) && is_finite(high)) {
        atomicMin(&lowest[place.filter + i], order_key(low));
        atomicMax(&highest[place.filter + i], order_key(high));
      }
    }
  }
};

struct BlockThreads {
  static __device__ int rank() { return threadIdx.x; }
  static __device__ int size() { return kThreads; }
  static __device__ void wait() { __syncthreads(); }
};
struct WarpThreads {
  static __device__ int rank() { return threadIdx.x % 32; }
  static __device__ int size() { return 32; }
  static __device__ void wait() { __syncwarp(); }
};

// Moves one filter's counts, in place, from the grid `from` to `to`, which contains it. at(j, k) is
// the counter of bin j and class k. All threads of the group call it.
template <typename Group, typename At>
__device__ void regrid(const Grid& from, const Grid& to, int64_t bins, int classes, const At& at) {
  using Count = std::remove_reference_t<decltype(at(0, 0))>;
  const int shift = min(to.exponent - from.exponent, 31);
  const int64_t first = coarser_cell(from.first, shift);
  const int64_t total = bins * classes, ahead = (total - 1) / Group::size() * Group::size();
  // Bins of one new bin are added up where the filter's first bin stays 0. They lie at its own
  // place or behind it.
  for (int64_t base = 0; shift > 0 && base < total; base += Group::size()) {
    const int64_t i = base + Group::rank(), j = i / classes;
    const int k = static_cast<int>(i % classes);
    Count sum = 0;
    if (i < total) {
      const int64_t start = (first + j) * (int64_t{1} << shift) - from.first;
      const int64_t stop = min(start + (int64_t{1} << shift), bins);
      for (int64_t c = max(start, int64_t{0}); c < stop; ++c) sum += at(c, k);
    }
    Group::wait();
    if (i < total) at(j, k) = sum;
    Group::wait();
  }
  // Then all move up, from behind, to make room for a lower minimum.
  const int64_t up = first - to.first;
  for (int64_t base = ahead; up > 0 && base >= 0; base -= Group::size()) {
    const int64_t i = base + Group::rank(), j = i / classes;
    const int k = static_cast<int>(i % classes);
    const Count moved = i < total && j >= up ? at(j - up, k) : Count{0};
    Group::wait();
    if (i < total) at(j, k) = moved;
    Group::wait();
  }
}

__device__ bool same(const Grid& a, const Grid& b) {
  return a.exponent == b.exponent && a.first == b.first;
}

// The values that a filter's table takes without widening, and their bins.
template <typename C>
struct Window {
  C low, high;
  CellScale<C> scale;
  int first;

  __device__ void set(const Grid& grid, int64_t bins) {
    scale = cell_scale<C>(grid.exponent);
    first = grid.first;
    // |x| < 2^(exponent + 21): as far as cells have 22 bits.
    const int64_t past = min(grid.first + bins, int64_t{1} << (kCellBits + 1));
    // The outermost edges may overflow.
    const double largest = std::is_same_v<C, float> ? FLT_MAX : DBL_MAX;
    const double from = ldexp(static_cast<double>(grid.first), grid.exponent);
    const double to = ldexp(static_cast<double>(past), grid.exponent);
    low = static_cast<C>(max(from, -largest));
    high = to > largest ? static_cast<C>(HUGE_VAL) : static_cast<C>(to);
  }
  __device__ void close() {  // takes nothing
    low = static_cast<C>(HUGE_VAL);
    high = -low;
    scale = {1, 1};
    first = 0;
  }
  __device__ bool open() const { return low < high; }
  // `none` outside, which is where NaN and infinity are. Without a branch.
  __device__ int bin(C x, int none) const {
    const bool inside = low <= x && x < high;
    const int cell = cell_of(inside ? x : C{0}, scale);
    return inside ? cell - first : none;
  }
};

// ---- Hard counts ------------------------------------------------------------------------------

// Where a filter's counters lie in a block's shared memory: bins of a class side by side, and
// behind them one counter at least for what has no bin. The odd distance between classes, and that
// between filters, which is 2 modulo 32, keep the samples of a warp in different banks when their
// bins are equal (the zeros behind a ReLU).
struct TableShape {
  int bins, classes;
  int per_class, per_filter;

  TableShape(int64_t bins_, int64_t classes_)  // bins * classes as far as tables fit
      : bins(static_cast<int>(bins_)),
        classes(static_cast<int>(classes_)),
        per_class((bins + 1) | 1),
        per_filter((per_class * classes + 29) / 32 * 32 + 2) {}
};

// What the blocks hand to the merging kernel, for each split and filter.
struct Partial {
  double* range;    // [splits, N, 2], with the range so far
  int32_t* grid;    // [splits, N, 2]: exponent and first cell of the table
  uint32_t* table;  // [splits, N, bins, K]
};

struct State {
  int64_t* counts;  // [N, bins, K]
  double *minimum, *maximum;
  int64_t* bad;  // the first column with a number that is not finite, or -1
  int64_t N, bins;
  int classes;

  __device__ void report(int64_t filter) const {  // -1 is the largest of the unsigned numbers
    atomicMin(reinterpret_cast<Wide*>(bad), static_cast<Wide>(filter));
  }
};

template <typename T, int FV, int RV>
__global__ void __launch_bounds__(kThreads, 3)
    count_tiles(Samples<const T> samples, Labels labels, Tiling tiling, State state,
                TableShape shape, Partial partial) {
  using C = Accumulate<T>;
  using Place = Walk<FV, RV>;
  constexpr int kPieces = Place::kPieces;
  __shared__ BlockRange range;
  __shared__ Grid grids[kMaxFilters];
  __shared__ Window<C> windows[kMaxFilters];  // open: the filter has a grid
  static_assert(sizeof(range) + sizeof(grids) + sizeof(windows) + kSharedBytes <= 48 << 10);
  uint32_t* table = dynamic_shared<uint32_t>();
  const Place place(tiling, samples.M, samples.N);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  for (int i = threadIdx.x; i < place.filters * shape.per_filter; i += kThreads) table[i] = 0;
  for (int i = threadIdx.x; i < place.filters; i += kThreads) {
    const int64_t n = place.first_filter + i;
    const double low = n < state.N ? state.minimum[n] : HUGE_VAL;
    const double high = n < state.N ? state.maximum[n] : -HUGE_VAL;
    range.lowest[i] = order_key(low);
    range.highest[i] = order_key(high);
    windows[i].close();
    if (low <= high) {
      grids[i] = grid_of(low, high, state.bins);
      windows[i].set(grids[i], state.bins);
    }
  }
  __syncthreads();

  C least[FV], most[FV];
#pragma unroll
  for (int i = 0; i < FV; ++i) {
    least[i] = static_cast<C>(HUGE_VAL);
    most[i] = -least[i];
  }
  for (int64_t base = place.begin; base < place.end; base += place.step()) {
    const int left = place.left(base);
    int counter[kPieces][FV * RV];  // in class 0
    // Finds the bins, and whether one of the samples has none. The values are not kept: they are
    // read again in the rare case, and registers are scarce.
    const auto find_bins = [&] {
      alignas(kVectorBytes) T value[kPieces][FV * RV];
#pragma unroll
      for (int u = 0; u < kPieces; ++u)
#pragma unroll
        for (int e = 0; e < FV * RV; ++e) value[u][e] = static_cast<T>(NAN);  // has no bin
      place.load(samples, base, value);
      bool outside = false;
#pragma unroll
      for (int i = 0; i < FV; ++i) {
        const Window<C> window = windows[place.filter + i];
        const int filter = (place.filter + i) * shape.per_filter;
#pragma unroll
        for (int u = 0; u < kPieces; ++u) {
#pragma unroll
          for (int e = i; e < FV * RV; e += FV) {
            const C x = static_cast<C>(value[u][e]);
            const int bin = window.bin(x, shape.bins);
            counter[u][e] = filter + bin;
            least[i] = min(least[i], x);  // of a number and NaN, the number
            most[i] = max(most[i], x);
            outside = outside || (bin == shape.bins && place.row_of(u) + e / FV < left);
          }
        }
      }
      return outside;
    };
    // Asked for together with the values, to wait for memory once.
    int row[kPieces][RV];
    bool labels_in_range = true;
#pragma unroll
    for (int u = 0; u < kPieces; ++u) {
#pragma unroll
      for (int j = 0; j < RV; ++j) {
        const int m = place.row_of(u) + j;
        const int64_t label = m < left ? labels.data[(base + m) * labels.stride] : 0;
        labels_in_range = labels_in_range && 0 <= label && label < labels.classes;
        row[u][j] = static_cast<int>(label) * shape.per_class;
      }
    }
    const bool some_outside = __syncthreads_or(find_bins());
    PICNN_FAST_DEVICE_ASSERT(labels_in_range);
    if (some_outside) {
#pragma unroll 1
      for (int u = 0; u < kPieces; ++u) {
        const T* from = place.address(samples, base, u);
#pragma unroll
        for (int e = 0; e < FV * RV; ++e) {
          if (place.row_of(u) + e / FV < left && !is_finite(static_cast<C>(from[e])))
            state.report(place.first_filter + place.filter + e % FV);
        }
      }
      range.include(tiling, place, least, most);
      __syncthreads();
      for (int f = warp; f < place.filters; f += kWarps) {
        const double low = of_order_key(range.lowest[f]), high = of_order_key(range.highest[f]);
        if (!(low <= high)) continue;
        const Grid wider = grid_of(low, high, state.bins);
        const auto at = [&](int64_t j, int k) -> uint32_t& {
          return table[f * shape.per_filter + k * shape.per_class + j];
        };
        if (windows[f].open() && !same(grids[f], wider))
          regrid<WarpThreads>(grids[f], wider, state.bins, shape.classes, at);
        __syncwarp();
        if (lane == 0) {
          grids[f] = wider;
          windows[f].set(wider, state.bins);
        }
      }
      __syncthreads();
      find_bins();
    }
#pragma unroll
    for (int u = 0; u < kPieces; ++u) {
#pragma unroll
      for (int j = 0; j < RV; ++j) {
#pragma unroll
        for (int i = 0; i < FV; ++i) atomicAdd(&table[counter[u][j * FV + i] + row[u][j]], 1u);
      }
    }
  }
  range.include(tiling, place, least, most);
  __syncthreads();

  const int filters = static_cast<int>(min(int64_t{place.filters}, state.N - place.first_filter));
  const int64_t out = place.split * state.N + place.first_filter;
  for (int f = threadIdx.x; f < filters; f += kThreads) {
    partial.range[(out + f) * 2] = of_order_key(range.lowest[f]);
    partial.range[(out + f) * 2 + 1] = of_order_key(range.highest[f]);
    partial.grid[(out + f) * 2] = windows[f].open() ? grids[f].exponent : 0;
    partial.grid[(out + f) * 2 + 1] = windows[f].open() ? grids[f].first : 0;
  }
  const int cells = shape.bins * shape.classes;
  for (int i = threadIdx.x; i < filters * cells; i += kThreads) {
    const int f = i / cells, j = i % cells / shape.classes, k = i % shape.classes;
    partial.table[out * cells + i] = table[f * shape.per_filter + k * shape.per_class + j];
  }
}

// Ranges alone, where tables do not fit.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    find_range(Samples<const T> samples, Tiling tiling, State state, Partial partial) {
  using C = Accumulate<T>;
  using Place = Walk<1, 1>;
  __shared__ BlockRange range;
  const Place place(tiling, samples.M, samples.N);
  for (int i = threadIdx.x; i < place.filters; i += kThreads) {
    const int64_t n = place.first_filter + i;
    range.lowest[i] = order_key(n < state.N ? state.minimum[n] : HUGE_VAL);
    range.highest[i] = order_key(n < state.N ? state.maximum[n] : -HUGE_VAL);
  }
  __syncthreads();
  C least[1] = {static_cast<C>(HUGE_VAL)}, most[1] = {-least[0]};
  bool finite = true;
  for (int64_t base = place.begin; base < place.end; base += place.step()) {
    T value[Place::kPieces][1];
    place.load(samples, base, value);
#pragma unroll
    for (int u = 0; u < Place::kPieces; ++u) {
      if (place.row_of(u) >= place.left(base)) continue;
      const C x = static_cast<C>(value[u][0]);
      finite = finite && is_finite(x);
      least[0] = min(least[0], x);
      most[0] = max(most[0], x);
    }
  }
  if (!finite) state.report(place.first_filter + place.filter);
  range.include(tiling, place, least, most);
  __syncthreads();
  for (int f = threadIdx.x; f < place.filters; f += kThreads) {
    const int64_t n = place.first_filter + f;
    if (n >= state.N) continue;
    partial.range[(place.split * state.N + n) * 2] = of_order_key(range.lowest[f]);
    partial.range[(place.split * state.N + n) * 2 + 1] = of_order_key(range.highest[f]);
  }
}

// A block a filter: its counts go to the grid of the whole range, and the tables of all splits on
// top. Without tables, only the first.
__global__ void __launch_bounds__(kThreads) merge(State state, Partial partial, int64_t splits) {
  if (*state.bad != -1) return;
  const int64_t n = blockIdx.x;
  double low = HUGE_VAL, high = -HUGE_VAL;
  for (int64_t s = 0; s < splits; ++s) {
    low = min(low, partial.range[(s * state.N + n) * 2]);
    high = max(high, partial.range[(s * state.N + n) * 2 + 1]);
  }
  const Grid grid = grid_of(low, high, state.bins);
  int64_t* counts = state.counts + n * state.bins * state.classes;
  if (state.minimum[n] <= state.maximum[n]) {
    const Grid before = grid_of(state.minimum[n], state.maximum[n], state.bins);
    const auto at = [&](int64_t j, int k) -> int64_t& { return counts[j * state.classes + k]; };
    if (!same(before, grid)) regrid<BlockThreads>(before, grid, state.bins, state.classes, at);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    state.minimum[n] = low;
    state.maximum[n] = high;
  }
  if (partial.table == nullptr) return;
  const int64_t cells = state.bins * state.classes;
  for (int64_t i = threadIdx.x; i < cells; i += kThreads) {
    const int64_t j = i / state.classes, k = i % state.classes;
    int64_t sum = 0;
    for (int64_t s = 0; s < splits; ++s) {
      const int64_t at = s * state.N + n;
      const int shift = min(grid.exponent - partial.grid[at * 2], 31);
      const int64_t start = (grid.first + j) * (int64_t{1} << shift) - partial.grid[at * 2 + 1];
      const int64_t stop = min(start + (int64_t{1} << shift), state.bins);
      for (int64_t c = max(start, int64_t{0}); c < stop; ++c)
        sum += partial.table[at * cells + c * state.classes + k];
    }
    counts[i] += sum;
  }
}

// Counts on grids that reach all samples.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    count_directly(Samples<const T> samples, Labels labels, Tiling tiling, State state) {
  using C = Accumulate<T>;
  using Place = Walk<1, 1>;
  if (*state.bad != -1) return;
  const Place place(tiling, samples.M, samples.N);
  if (!place.active) return;
  const int64_t n = place.first_filter + place.filter;
  Window<C> window;
  window.set(grid_of(state.minimum[n], state.maximum[n], state.bins), state.bins);
  int64_t* counts = state.counts + n * state.bins * state.classes;
  for (int64_t base = place.begin; base < place.end; base += place.step()) {
    T value[Place::kPieces][1];
    place.load(samples, base, value);
#pragma unroll
    for (int u = 0; u < Place::kPieces; ++u) {
      if (place.row_of(u) >= place.left(base)) continue;
      const int label = labels(base + place.row_of(u));
      const int64_t bin = window.bin(static_cast<C>(value[u][0]), 0);
      atomicAdd(reinterpret_cast<Wide*>(&counts[bin * state.classes + label]), Wide{1});
    }
  }
}

// ---- Soft counts ------------------------------------------------------------------------------

template <typename C>
struct SoftGrid {
  const C *low, *width;
  int64_t low_stride, width_stride;
  int64_t bins;
};

// One filter's.
template <typename C>
struct SoftFilter {
  C low, width, last;

  __device__ void load(const SoftGrid<C>& g, int64_t n) {
    low = g.low[n * g.low_stride];
    width = g.width[n * g.width_stride];
    last = static_cast<C>(g.bins - 1);
  }
};

// 64-bit counters in shared memory as two halves: there is no 64-bit addition in hardware.
struct Halves {
  uint32_t *low, *high;

  __device__ void add(int at, Wide amount) const {
    const uint32_t part = static_cast<uint32_t>(amount);
    const uint32_t old = atomicAdd(&low[at], part);
    const uint32_t rest = static_cast<uint32_t>(amount >> 32) + (old + part < old ? 1u : 0u);
    if (rest != 0) atomicAdd(&high[at], rest);
  }
  __device__ void poison(int at) const { atomicOr(&high[at], 0x80000000u); }
  __device__ Wide get(int at) const { return Wide{high[at]} << 32 | low[at]; }
};

// sums [N, bins, K] in units of 2^-fraction_bits. `staged`: by way of shared memory.
template <typename T, int FV, int RV>
__global__ void __launch_bounds__(kThreads)
    add_weights(Samples<const T> samples, Labels labels, Tiling tiling,
                SoftGrid<Accumulate<T>> grid, TableShape shape, bool staged, int fraction_bits,
                Wide* sums) {
  using C = Accumulate<T>;
  using Place = Walk<FV, RV>;
  const Place place(tiling, samples.M, samples.N);
  const int entries = place.filters * shape.per_filter;
  const Halves table = {dynamic_shared<uint32_t>(), dynamic_shared<uint32_t>() + entries};
  if (staged) {
    for (int i = threadIdx.x; i < 2 * entries; i += kThreads) table.low[i] = 0;
    __syncthreads();
  }
  SoftFilter<C> filter[FV];
#pragma unroll
  for (int i = 0; i < FV; ++i)
    filter[i].load(grid, min(place.first_filter + place.filter + i, samples.N - 1));
  const C unit = power_of_two<C>(fraction_bits);
  const Wide one = Wide{1} << fraction_bits;
  for (int64_t base = place.begin; base < place.end; base += place.step()) {
    alignas(kVectorBytes) T value[Place::kPieces][FV * RV];
    place.load(samples, base, value);
#pragma unroll
    for (int u = 0; u < Place::kPieces; ++u) {
#pragma unroll
      for (int j = 0; j < RV; ++j) {
        if (place.row_of(u) + j >= place.left(base)) continue;
        const int label = labels(base + place.row_of(u) + j);
#pragma unroll
        for (int i = 0; i < FV; ++i) {
          const C t =
              soft_position(static_cast<C>(value[u][j * FV + i]), filter[i].low, filter[i].width);
          const SoftBin<C> bin = soft_bin(t, filter[i].last);
          const bool nan = bin.upper != bin.upper;
          const Wide upper = nan ? 0 : static_cast<Wide>(llrint(bin.upper * unit));
          if (staged) {
            const int at =
                (place.filter + i) * shape.per_filter + label * shape.per_class + bin.below;
            if (upper != one) table.add(at, one - upper);
            if (upper != 0) table.add(at + 1, upper);
            if (nan) {
              table.poison(at);
              table.poison(at + 1);
            }
          } else {
            const int64_t n = place.first_filter + place.filter + i;
            Wide* at = sums + (n * grid.bins + bin.below) * labels.classes + label;
            if (upper != one) atomicAdd(at, one - upper);
            if (upper != 0) atomicAdd(at + labels.classes, upper);
            if (nan) {
              atomicOr(at, kPoison);
              atomicOr(at + labels.classes, kPoison);
            }
          }
        }
      }
    }
  }
  if (!staged) return;
  __syncthreads();
  const int filters = static_cast<int>(min(int64_t{place.filters}, samples.N - place.first_filter));
  const int cells = shape.bins * shape.classes;
  for (int i = threadIdx.x; i < filters * cells; i += kThreads) {
    const int f = i / cells, j = i % cells / shape.classes, k = i % shape.classes;
    const Wide sum = table.get(f * shape.per_filter + k * shape.per_class + j);
    Wide* to = sums + place.first_filter * cells + i;
    if ((sum & kPoison) != 0)
      atomicOr(to, kPoison);
    else if (sum != 0)
      atomicAdd(to, sum);
  }
}

template <typename C>
__global__ void __launch_bounds__(kThreads)
    convert_sums(const Wide* sums, C* counts, int64_t total, int fraction_bits) {
  const double unit = power_of_two<double>(-fraction_bits);
  const int64_t apart = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < total; i += apart)
    counts[i] =
        static_cast<C>((sums[i] & kPoison) != 0 ? NAN : static_cast<double>(sums[i]) * unit);
}

template <typename C>
struct GradCounts {
  const C* data;  // [N, bins, K]
  int64_t filter, bin, label;

  // (G[n, b + 1, y] - G[n, b, y]) / width
  __device__ C slope(int64_t n, int64_t b, int64_t y, C width) const {
    const C* at = data + n * filter + b * bin + y * label;
    return (at[bin] - at[0]) / width;
  }
};

template <typename T, int FV, int RV>
__global__ void __launch_bounds__(kThreads)
    soft_backward(GradCounts<Accumulate<T>> grad_counts, Samples<const T> samples, Labels labels,
                  Tiling tiling, SoftGrid<Accumulate<T>> grid, TableShape shape, bool staged,
                  Samples<T> grad) {
  using C = Accumulate<T>;
  using Place = Walk<FV, RV>;
  const Place place(tiling, samples.M, samples.N);
  C* slopes = dynamic_shared<C>();
  if (staged) {
    const int filters =
        static_cast<int>(min(int64_t{place.filters}, samples.N - place.first_filter));
    const int cells = (shape.bins - 1) * shape.classes;
    for (int i = threadIdx.x; i < filters * cells; i += kThreads) {
      const int f = i / cells, b = i % cells / shape.classes, y = i % shape.classes;
      const int64_t n = place.first_filter + f;
      slopes[f * shape.per_filter + y * shape.per_class + b] =
          grad_counts.slope(n, b, y, grid.width[n * grid.width_stride]);
    }
    __syncthreads();
  }
  SoftFilter<C> filter[FV];
#pragma unroll
  for (int i = 0; i < FV; ++i)
    filter[i].load(grid, min(place.first_filter + place.filter + i, samples.N - 1));
  for (int64_t base = place.begin; base < place.end; base += place.step()) {
    alignas(kVectorBytes) T value[Place::kPieces][FV * RV];
    place.load(samples, base, value);
#pragma unroll
    for (int u = 0; u < Place::kPieces; ++u) {
#pragma unroll
      for (int j = 0; j < RV; ++j) {
        if (place.row_of(u) + j >= place.left(base)) continue;
        const int label = labels(base + place.row_of(u) + j);
#pragma unroll
        for (int i = 0; i < FV; ++i) {
          const C t =
              soft_position(static_cast<C>(value[u][j * FV + i]), filter[i].low, filter[i].width);
          C result = t == t ? C{0} : t;
          if (C{0} <= t && t < filter[i].last) {
            const int b = static_cast<int>(t);
            result =
                staged ? slopes[(place.filter + i) * shape.per_filter + label * shape.per_class + b]
                       : grad_counts.slope(place.first_filter + place.filter + i, b, label,
                                           filter[i].width);
          }
          value[u][j * FV + i] = static_cast<T>(result);
        }
      }
    }
    place.store(grad, base, value);
  }
}

// ---- Launching --------------------------------------------------------------------------------

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

// Tiles of at most `most_filters` filters; at least `least_rows` samples a block.
template <int FV, int RV>
Tiling make_tiling(const Tensor& activations, int64_t most_filters, int64_t least_rows) {
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
  const int64_t splits = std::max<int64_t>(kBlocks / t.tiles, 1);
  t.rows = std::min(std::max(ceil_div(M, splits), least_rows), kMaxRows);
  t.rows = ceil_div(t.rows, step) * step;
  t.splits = ceil_div(M, t.rows);
  return t;
}

template <typename T>
Samples<const T> input(const Tensor& t) {
  return {static_cast<const T*>(t.data_ptr()), t.stride(0), t.stride(1), t.size(0), t.size(1)};
}

// Filters of a tile whose tables fit in shared memory. Bins and classes beyond any table give 0.
int64_t filters_that_fit(int64_t bins, int64_t classes, int64_t entry_bytes) {
  constexpr int64_t kMost = kSharedBytes;
  if (bins > kMost || classes > kMost) return 0;
  if (bins * classes * entry_bytes > kMost) return 0;
  return kMost / (TableShape(bins, classes).per_filter * entry_bytes);
}

template <typename T>
void update(const State& state, const Tensor& minimum, const Tensor& counts,
            const Tensor& activations, const Labels& labels) {
  const int64_t N = state.N, bins = state.bins, classes = state.classes;
  const Samples<const T> samples = input<T>(activations);
  const int64_t fitting = filters_that_fit(bins, classes, sizeof(uint32_t));
  const auto partial = [&](const Tensor& range) {
    return Partial{static_cast<double*>(range.data_ptr()), nullptr, nullptr};
  };
  const auto in_tiles = [&](auto fv, auto rv) {
    constexpr int FV = fv, RV = rv;
    // At least 16 bytes of each sample are worth reading at a time.
    const bool along = RV > 1 || activations.stride(0) < activations.stride(1);
    const int64_t least = along ? 1 : std::min<int64_t>(kVectorBytes / sizeof(T), N);
    if (fitting < least) return false;
    // Tables of all blocks together take less than the activations.
    const Tiling tiling = make_tiling<FV, RV>(activations, fitting, 4 * bins * classes);
    const TableShape shape(bins, classes);
    const Tensor range = torch::stable::new_empty(minimum, {tiling.splits, N, 2});
    const Tensor grid = torch::stable::new_empty(minimum, {tiling.splits, N, 2}, ScalarType::Int);
    const Tensor table =
        torch::stable::new_empty(counts, {tiling.splits, N, bins, classes}, ScalarType::Int);
    Partial out = partial(range);
    out.grid = static_cast<int32_t*>(grid.data_ptr());
    out.table = static_cast<uint32_t*>(table.data_ptr());
    const size_t shared = size_t{sizeof(uint32_t)} * tiling.lanes * FV * shape.per_filter;
    launch(activations, count_tiles<T, FV, RV>, tiling.blocks(), kThreads, shared, samples, labels,
           tiling, state, shape, out);
    launch(activations, merge, N, kThreads, 0, state, out, tiling.splits);
    return true;
  };
  bool done = false;
  with_vectors<T>(common_layout<T>(activations),
                  [&](auto fv, auto rv) { done = in_tiles(fv, rv); });
  if (done) return;
  const Tiling tiling = make_tiling<1, 1>(activations, kMaxFilters, 1);
  const Tensor range = torch::stable::new_empty(minimum, {tiling.splits, N, 2});
  launch(activations, find_range<T>, tiling.blocks(), kThreads, 0, samples, tiling, state,
         partial(range));
  launch(activations, merge, N, kThreads, 0, state, partial(range), tiling.splits);
  launch(activations, count_directly<T>, tiling.blocks(), kThreads, 0, samples, labels, tiling,
         state);
}

void check_samples(const Tensor& activations, const Tensor& labels) {
  STD_TORCH_CHECK(activations.dim() == 2, "picnn_fast: activations must be [M, N]");
  check_device(labels, "labels", activations, "activations");
  STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long && labels.dim() == 1 &&
                      labels.size(0) == activations.size(0),
                  "picnn_fast: labels must be int64 [M]");
}
void check_range(const Tensor& t, const Tensor& activations, const char* name) {
  check_device(t, name, activations, "activations");
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Double && t.dim() == 1 &&
                      t.size(0) == activations.size(1) && t.is_contiguous(),
                  "picnn_fast: ", name, " must be float64 [N], contiguous");
}
void check_table(const Tensor& t, const Tensor& activations, const char* name) {
  check_device(t, name, activations, "activations");
  STD_TORCH_CHECK(t.dim() == 3 && t.size(0) == activations.size(1) && t.size(1) >= 2 &&
                      t.size(2) <= std::numeric_limits<int32_t>::max(),
                  "picnn_fast: ", name, " must be [N, bins, K] with bins >= 2");
}

Labels make_labels(const Tensor& labels, int64_t classes) {
  return {static_cast<const int64_t*>(labels.data_ptr()), labels.stride(0),
          static_cast<int>(classes)};
}

Tensor histogram_update(const Tensor& counts, const Tensor& minimum, const Tensor& maximum,
                        const Tensor& activations, const Tensor& labels) {
  check_samples(activations, labels);
  check_table(counts, activations, "counts");
  STD_TORCH_CHECK(counts.scalar_type() == ScalarType::Long && counts.is_contiguous(),
                  "picnn_fast: counts must be int64, contiguous");
  check_range(minimum, activations, "minimum");
  check_range(maximum, activations, "maximum");
  Tensor column = torch::stable::new_empty(labels, {}, ScalarType::Long);
  torch::stable::fill_(column, -1);
  const State state = {static_cast<int64_t*>(counts.data_ptr()),
                       static_cast<double*>(minimum.data_ptr()),
                       static_cast<double*>(maximum.data_ptr()),
                       static_cast<int64_t*>(column.data_ptr()),
                       counts.size(0),
                       counts.size(1),
                       static_cast<int>(counts.size(2))};
  with_type(activations, "activations", [&](auto value) {
    if (activations.numel() > 0)
      update<decltype(value)>(state, minimum, counts, activations,
                              make_labels(labels, counts.size(2)));
  });
  return column;
}

void check_soft(const Tensor& activations, const Tensor& labels, const Tensor& low,
                const Tensor& width, int64_t bins) {
  check_samples(activations, labels);
  for (const Tensor* t : {&low, &width}) {
    const char* name = t == &low ? "low" : "width";
    check_device(*t, name, activations, "activations");
    STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == activations.size(1) &&
                        t->scalar_type() == accumulate_type(activations),
                    "picnn_fast: ", name, " must be float32 [N] (float64 for float64 activations)");
  }
  STD_TORCH_CHECK(2 <= bins && bins <= int64_t{1} << 24,
                  "picnn_fast: bins must be in [2, 2**24], not ", bins);
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

Tensor soft_histogram(const Tensor& activations, const Tensor& labels, const Tensor& low,
                      const Tensor& width, int64_t bins, int64_t num_classes) {
  check_soft(activations, labels, low, width, bins);
  STD_TORCH_CHECK(0 <= num_classes && num_classes <= std::numeric_limits<int32_t>::max(),
                  "picnn_fast: num_classes must be in [0, 2**31), not ", num_classes);
  const int64_t M = activations.size(0), N = activations.size(1);
  Tensor counts = torch::stable::new_empty(low, {N, bins, num_classes});
  const Tensor sums = torch::stable::new_zeros(labels, {N, bins, num_classes}, ScalarType::Long);
  // The finest unit, of those the weights can tell apart, of which M cannot reach kPoison.
  int fraction_bits = accumulate_type(activations) == ScalarType::Double ? 52 : 24;
  while (fraction_bits > 0 && (M >> (62 - fraction_bits)) != 0) --fraction_bits;
  auto* sum = static_cast<Wide*>(sums.data_ptr());
  with_type(activations, "activations", [&](auto value) {
    using T = decltype(value);
    using C = Accumulate<T>;
    if (activations.numel() > 0) {
      with_vectors<T>(common_layout<T>(activations), [&](auto fv, auto rv) {
        constexpr int FV = fv, RV = rv;
        with_tables<FV, RV>(
            activations, bins, num_classes, sizeof(Wide),
            [&](const Tiling& tiling, const TableShape& shape, bool staged, size_t shared) {
              launch(activations, add_weights<T, FV, RV>, tiling.blocks(), kThreads, shared,
                     input<T>(activations), make_labels(labels, num_classes), tiling,
                     soft_grid<C>(low, width, bins), shape, staged, fraction_bits, sum);
            });
      });
    }
    const int64_t total = counts.numel();
    launch(activations, convert_sums<C>, std::min<int64_t>(ceil_div(total, kThreads), 8 * kBlocks),
           kThreads, 0, static_cast<const Wide*>(sum), static_cast<C*>(counts.data_ptr()), total,
           fraction_bits);
  });
  return counts;
}

Tensor soft_histogram_backward(const Tensor& grad_counts, const Tensor& activations,
                               const Tensor& labels, const Tensor& low, const Tensor& width) {
  check_table(grad_counts, activations, "grad_counts");
  const int64_t bins = grad_counts.size(1), classes = grad_counts.size(2);
  check_soft(activations, labels, low, width, bins);
  STD_TORCH_CHECK(grad_counts.scalar_type() == accumulate_type(activations),
                  "picnn_fast: grad_counts must have the dtype of low");
  Tensor grad = torch::stable::empty_like(activations);
  with_type(activations, "activations", [&](auto value) {
    using T = decltype(value);
    using C = Accumulate<T>;
    if (activations.numel() == 0) return;
    const GradCounts<C> slopes = {static_cast<const C*>(grad_counts.data_ptr()),
                                  grad_counts.stride(0), grad_counts.stride(1),
                                  grad_counts.stride(2)};
    const Samples<T> out = {static_cast<T*>(grad.data_ptr()), grad.stride(0), grad.stride(1),
                            grad.size(0), grad.size(1)};
    with_vectors<T>(common_layout<T>(activations, grad), [&](auto fv, auto rv) {
      constexpr int FV = fv, RV = rv;
      with_tables<FV, RV>(
          activations, bins, classes, sizeof(C),
          [&](const Tiling& tiling, const TableShape& shape, bool staged, size_t shared) {
            launch(activations, soft_backward<T, FV, RV>, tiling.blocks(), kThreads, shared, slopes,
                   input<T>(activations), make_labels(labels, classes), tiling,
                   soft_grid<C>(low, width, bins), shape, staged, out);
          });
    });
  });
  return grad;
}

}  // namespace
}  // namespace picnn_fast

PICNN_FAST_REGISTER_CUDA(m) {
  m.impl("histogram_update", TORCH_BOX(&picnn_fast::histogram_update));
  m.impl("soft_histogram", TORCH_BOX(&picnn_fast::soft_histogram));
  m.impl("soft_histogram_backward", TORCH_BOX(&picnn_fast::soft_histogram_backward));
}
