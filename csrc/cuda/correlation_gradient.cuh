#pragma once

#include "../common/correlation.h"
#include "correlation_problem.cuh"

// The gradient of û of each image and group, and from it that of a map: a warp for each map, or
// side by side where channels lie so in memory.
namespace picnn_fast {
namespace {

// The gradients of û, [B, G, P] in any order of the last two.
template <typename A>
struct Toward {
  A* data;
  int64_t group, position;
  __device__ A& at(int64_t b, int64_t g, int64_t p, int64_t G, int64_t P) const {
    return data[b * G * P + g * group + p * position];
  }
};

// A thread for each image and position.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    group_gradients(const A* sums, const A* moments, const A* grad_loss, Toward<A> toward,
                    int64_t B, int64_t G, int64_t P) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t b = index / P, p = index % P;
  if (b >= B) return;
  const A scale = *grad_loss / static_cast<A>(B);
  sums += b * G * P + p;
  A total = 0, weighted = 0;
  for (int64_t g = 0; g < G; ++g) {
    const A sum = sums[g * P];
    total += sum;
    weighted += group_gradient(moments[g], moments[G + g], scale).total * sum;
  }
  for (int64_t g = 0; g < G; ++g) {
    const auto gradient = group_gradient(moments[g], moments[G + g], scale);
    toward.at(b, g, p, G, P) = gradient.own * sums[g * P] + gradient.total * total + weighted;
  }
}

// A warp for each map; of up to 32 * kItems positions it is read once.
template <typename T, int kItems>
__global__ void __launch_bounds__(kThreads)
    gradient_rows(Problem<T> q, Toward<Accumulate<T>> toward, Maps<T> out) {
  using A = Accumulate<T>;
  constexpr int kStep = 32 * kItems;
  const int64_t map = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  const int64_t b = map / q.N, n = map % q.N;
  const int lane = threadIdx.x % 32;
  if (b >= q.B) return;  // a whole warp
  T* y = out.data + b * out.batch + n * out.channel;
  if (!q.counts(b)) {
    for (int64_t p = lane; p < q.P; p += 32) y[p * out.position] = static_cast<T>(A{0});
    return;
  }
  const int64_t g = q.group(n);
  A u[kItems], to[kItems], product = 0;
  const auto load = [&](int64_t first) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int64_t p = first + i * 32 + lane;
      u[i] = p < q.P ? q.centred(b, n, p) : A{0};
      to[i] = p < q.P ? toward.at(b, g, p, q.G, q.P) : A{0};
    }
  };
  for (int64_t first = 0; first < q.P; first += kStep) {
    load(first);
#pragma unroll
    for (int i = 0; i < kItems; ++i) product += u[i] * to[i];
  }
  const auto gradient = map_gradient(q.norms[map], sum_warp(product));
  for (int64_t first = 0; first < q.P; first += kStep) {
    if (q.P > kStep) load(first);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int64_t p = first + i * 32 + lane;
      if (p < q.P)
        y[p * out.position] = static_cast<T>(gradient.unit * to[i] - gradient.along * u[i]);
    }
  }
}

// A block holds `lanes` channels of an image side by side; its kThreads / lanes rows of them walk
// down the positions, twice: the maps come from the cache the second time.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    gradient_columns(Problem<T> q, Toward<Accumulate<T>> toward, Maps<T> out, int lanes) {
  using A = Accumulate<T>;
  __shared__ A products[kThreads];
  const int64_t tiles = ceil_div(q.N, lanes);
  const int64_t b = blockIdx.x / tiles;
  const int lane = threadIdx.x % lanes, row = threadIdx.x / lanes, rows = kThreads / lanes;
  const int64_t n = blockIdx.x % tiles * lanes + lane;
  const bool counts = q.counts(b);
  const int64_t positions = n < q.N ? q.P : 0;
  const int64_t g = n < q.N ? q.group(n) : 0;
  A product = 0;
  if (counts) {
    for (int64_t p = row; p < positions; p += rows)
      product += q.centred(b, n, p) * toward.at(b, g, p, q.G, q.P);
  }
  products[threadIdx.x] = product;
  for (int half = rows / 2; half > 0; half /= 2) {
    __syncthreads();
    if (row < half) products[threadIdx.x] += products[threadIdx.x + half * lanes];
  }
  __syncthreads();
  MapGradient<A> gradient = {0, 0};
  if (counts && n < q.N) gradient = map_gradient(q.norms[b * q.N + n], products[lane]);
  T* y = out.data + b * out.batch + n * out.channel;
  for (int64_t p = row; p < positions; p += rows) {
    A value = 0;
    if (counts)
      value = gradient.unit * toward.at(b, g, p, q.G, q.P) - gradient.along * q.centred(b, n, p);
    y[p * out.position] = static_cast<T>(value);
  }
}

}  // namespace
}  // namespace picnn_fast
