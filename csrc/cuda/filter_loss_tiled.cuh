#pragma once

// The filter loss of filters that no block holds: a few kernels that hand each other statistics
// alone, and work out the responses of 32 to 128 samples and some of the templates again each time.

#include <cmath>
#include <type_traits>

#include "filter_loss_products.cuh"
#include "filter_loss_statistics.cuh"
#include "launch.h"

namespace picnn_fast {
namespace {

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

}  // namespace
}  // namespace picnn_fast
