#pragma once

// Backward: the gradient of the maps and that of the mask in one read of both inputs. A block holds
// whole channels, or in the channels-last layout a piece of their positions whose sums a second
// kernel adds up in order: so sums need no atomics and come out the same every time. In the other
// layouts the price is few blocks when B * N is small and S huge.

#include <cstdint>

#include "masking_layouts.cuh"
#include "masking_scale.cuh"

namespace picnn_fast {
namespace {

template <typename T>
struct Backward {
  using A = Accumulate<T>;
  Maps<const T> grad_masked, features;
  Maps<T> grad_features;
  const A* mask;
  int64_t mask_batch, mask_channel;
  A* grad_mask;  // contiguous; in the channels-last layout for each split of the positions
  int64_t B, N, S;

  __device__ A factor(int64_t b, int64_t channel) const {
    return mask[b * mask_batch + channel * mask_channel];
  }
};

// Elements of a run whose products wait in shared memory to be summed: 16 KB.
template <typename A>
constexpr int kStaged = 16384 / sizeof(A);

// Elements [begin, end) of the run that starts at x, g and y: y = g * factor, products[e - origin]
// = x * g. origin is where the 16-byte vectors start.
template <int W, typename T, typename A = Accumulate<T>>
__device__ void multiply_run(const Backward<T>& p, int64_t b, int64_t first_channel, const T* x,
                             const T* g, T* y, int origin, int begin, int end, int S, A* products) {
  constexpr int kSteps = kStaged<A> / (kThreads * W);
  constexpr int kInFlight = kSteps < kUnroll ? kSteps : kUnroll;
  constexpr int kStore = W * sizeof(A) < kVectorBytes ? W : kVectorBytes / sizeof(A);
  for (int step = 0; step < kSteps; step += kInFlight) {
    Vector<T, W> xs[kInFlight], gs[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int e = origin + ((step + u) * kThreads + static_cast<int>(threadIdx.x)) * W;
      if (e < begin || e > end - W) continue;
      xs[u] = *reinterpret_cast<const Vector<T, W>*>(x + e);
      gs[u] = *reinterpret_cast<const Vector<T, W>*>(g + e);
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int e = origin + ((step + u) * kThreads + static_cast<int>(threadIdx.x)) * W;
      if (e >= end) continue;
      int c = max(e, begin) / S, position = max(e, begin) - c * S;
      A factor = p.factor(b, first_channel + c);
      if (begin <= e && e <= end - W) {
        Vector<A, kStore> product[W / kStore];
#pragma unroll
        for (int i = 0; i < W; ++i) {
          product[i / kStore].lane[i % kStore] =
              static_cast<A>(xs[u].lane[i]) * static_cast<A>(gs[u].lane[i]);
          gs[u].lane[i] = Multiply<T>::scale(gs[u].lane[i], factor);
          if (++position == S && i + 1 < W) {
            position = 0;
            factor = p.factor(b, first_channel + ++c);
          }
        }
        *reinterpret_cast<Vector<T, W>*>(y + e) = gs[u];
#pragma unroll
        for (int i = 0; i < W / kStore; ++i)
          reinterpret_cast<Vector<A, kStore>*>(products + (e - origin))[i] = product[i];
      } else {
#pragma unroll 1
        for (int i = max(e, begin); i < min(e + W, end); ++i) {
          products[i - origin] = static_cast<A>(x[i]) * static_cast<A>(g[i]);
          y[i] = Multiply<T>::scale(g[i], p.factor(b, first_channel + i / S));
        }
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 3)
    backward_runs(Backward<T> p, int block_channels, int lanes) {
  using A = Accumulate<T>;
  const int S = static_cast<int>(p.S);
  const unsigned groups = static_cast<unsigned>(ceil_div(p.N, block_channels));
  const int64_t b = blockIdx.x / groups;
  const int64_t first_channel = int64_t{blockIdx.x % groups} * block_channels;
  const int count = static_cast<int>(min(int64_t{block_channels}, p.N - first_channel));
  A* products = dynamic_shared<A>();
  A* sums = products + kStaged<A>;
  for (int i = threadIdx.x; i < count; i += kThreads) sums[i] = 0;

  const T* x = p.features.data + b * p.features.batch + first_channel * S;
  const T* g = p.grad_masked.data + b * p.grad_masked.batch + first_channel * S;
  T* y = p.grad_features.data + b * p.grad_features.batch + first_channel * S;
  constexpr int W = kVectorBytes / sizeof(T);
  const int head = misalignment(x);
  const bool aligned = head == misalignment(g) && head == misalignment(y);
  const int total = count * S;
  // 64-bit: the step past the last piece may leave 32.
  for (int64_t piece = aligned ? -head : 0; piece < total; piece += kStaged<A>) {
    const int origin = static_cast<int>(piece);
    const int begin = max(origin, 0);
    const int end = static_cast<int>(min(piece + kStaged<A>, int64_t{total}));
    if (aligned)
      multiply_run<W>(p, b, first_channel, x, g, y, origin, begin, end, S, products);
    else
      multiply_run<1>(p, b, first_channel, x, g, y, origin, begin, end, S, products);
    __syncthreads();
    const int last = (end - 1) / S;
    for (int base = begin / S; base <= last; base += kThreads / lanes) {
      const int c = base + threadIdx.x / lanes;
      A sum = 0;
      if (c <= last) {
        const int stop = min((c + 1) * S, end);
        for (int e = max(c * S, begin) + threadIdx.x % lanes; e < stop; e += lanes)
          sum += products[e - origin];
      }
      sum = sum_warp(sum, lanes);
      if (c <= last && threadIdx.x % lanes == 0) sums[c] += sum;
    }
    __syncthreads();
  }
  for (int i = threadIdx.x; i < count; i += kThreads)
    p.grad_mask[b * p.N + first_channel + i] = sums[i];
}

template <int W, typename T, typename A = Accumulate<T>>
__device__ void multiply_tile(const Backward<T>& p, const Tile<T>& tile, int lanes, int64_t first,
                              int64_t last, A* sums) {
  constexpr int kPieces = Tile<T>::kVector / W;
  constexpr int kRows = kPieces > kUnroll ? 1 : kUnroll / kPieces;
  const T* x = p.features.data + tile.b * p.features.batch + tile.begin;
  const T* g = p.grad_masked.data + tile.b * p.grad_masked.batch + tile.begin;
  T* y = p.grad_features.data + tile.b * p.grad_features.batch + tile.begin;
  A factor[kPieces][W], sum[kPieces][W];
#pragma unroll
  for (int q = 0; q < kPieces; ++q) {
#pragma unroll
    for (int i = 0; i < W; ++i) {
      const int column = (q * lanes + tile.lane) * W + i;
      factor[q][i] = column < tile.count ? p.factor(tile.b, tile.begin + column) : A{0};
      sum[q][i] = 0;
    }
  }
  for (int64_t s = first + tile.row; s < last; s += kRows * tile.rows) {
    Vector<T, W> xs[kRows][kPieces], gs[kRows][kPieces];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int q = 0; q < kPieces; ++q) {
        const int64_t at = s + r * tile.rows;
        const int column = (q * lanes + tile.lane) * W;
        if (at >= last || column >= tile.count) continue;
        xs[r][q] = *reinterpret_cast<const Vector<T, W>*>(x + at * p.features.position + column);
        gs[r][q] = *reinterpret_cast<const Vector<T, W>*>(g + at * p.grad_masked.position + column);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int q = 0; q < kPieces; ++q) {
        const int64_t at = s + r * tile.rows;
        const int column = (q * lanes + tile.lane) * W;
        if (at >= last || column >= tile.count) continue;
#pragma unroll
        for (int i = 0; i < W; ++i) {
          sum[q][i] += static_cast<A>(xs[r][q].lane[i]) * static_cast<A>(gs[r][q].lane[i]);
          gs[r][q].lane[i] = Multiply<T>::scale(gs[r][q].lane[i], factor[q][i]);
        }
        *reinterpret_cast<Vector<T, W>*>(y + at * p.grad_features.position + column) = gs[r][q];
      }
    }
  }
  // sums is [rows, lanes * kVector].
#pragma unroll
  for (int q = 0; q < kPieces; ++q) {
#pragma unroll
    for (int i = 0; i < W; ++i)
      sums[(tile.row * kPieces * lanes + q * lanes + tile.lane) * W + i] = sum[q][i];
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    backward_channels_last(Backward<T> p, int lanes, int splits) {
  using A = Accumulate<T>;
  const Tile<T> tile(p.N, lanes, splits);
  const int64_t length = ceil_div(p.S, splits);
  const int64_t first = tile.split * length, last = min(p.S, first + length);
  A* sums = dynamic_shared<A>();
  const bool aligned =
      tile.aligned(p.features.data + tile.b * p.features.batch + tile.begin, p.features.position) &&
      tile.aligned(p.grad_masked.data + tile.b * p.grad_masked.batch + tile.begin,
                   p.grad_masked.position) &&
      tile.aligned(p.grad_features.data + tile.b * p.grad_features.batch + tile.begin,
                   p.grad_features.position);
  if (aligned)
    multiply_tile<Tile<T>::kVector>(p, tile, lanes, first, last, sums);
  else
    multiply_tile<1>(p, tile, lanes, first, last, sums);
  __syncthreads();
  for (int i = threadIdx.x; i < tile.count; i += kThreads) {
    A sum = 0;
    for (int row = 0; row < tile.rows; ++row) sum += sums[row * lanes * Tile<T>::kVector + i];
    p.grad_mask[(tile.split * p.B + tile.b) * p.N + tile.begin + i] = sum;
  }
}

// sums [count], of partial [splits, count].
template <typename A>
__global__ void __launch_bounds__(kThreads)
    add_splits(const A* partial, int splits, int64_t count, A* sums) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= count) return;
  A sum = 0;
  for (int64_t s = 0; s < splits; ++s) sum += partial[s * count + i];
  sums[i] = sum;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) backward_strided(Backward<T> p, int lanes) {
  using A = Accumulate<T>;
  const int block_channels = kThreads / lanes;
  const unsigned groups = static_cast<unsigned>(ceil_div(p.N, block_channels));
  const int64_t b = blockIdx.x / groups;
  const int64_t c = int64_t{blockIdx.x % groups} * block_channels + threadIdx.x / lanes;
  const int lane = threadIdx.x % lanes;
  A sum = 0;
  if (c < p.N) {
    const T* x = p.features.data + b * p.features.batch + c * p.features.channel;
    const T* g = p.grad_masked.data + b * p.grad_masked.batch + c * p.grad_masked.channel;
    T* y = p.grad_features.data + b * p.grad_features.batch + c * p.grad_features.channel;
    const A factor = p.factor(b, c);
    for (int64_t s = lane; s < p.S; s += lanes) {
      const T grad = g[s * p.grad_masked.position];
      sum += static_cast<A>(x[s * p.features.position]) * static_cast<A>(grad);
      y[s * p.grad_features.position] = Multiply<T>::scale(grad, factor);
    }
  }
  sum = sum_warp(sum, lanes);
  if (c < p.N && lane == 0) p.grad_mask[b * p.N + c] = sum;
}
}  // namespace
}  // namespace picnn_fast
