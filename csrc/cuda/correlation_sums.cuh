#pragma once

#include <cmath>

#include "../common/correlation.h"
#include "correlation_problem.cuh"

// The sums of û by group and the norms of the maps: a block for each image and group, whose warps
// take the group's filters. A map of up to 256 positions waits in registers while its norm is found
// and is read once; the norms of larger ones are found before.
namespace picnn_fast {
namespace {

// A warp for each map.
template <typename T>
__global__ void __launch_bounds__(kThreads) find_norms(Problem<T> q) {
  using A = Accumulate<T>;
  const int64_t map = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  const int64_t b = map / q.N, n = map % q.N;
  if (b >= q.B) return;  // a whole warp
  A squares = 0;
  if (q.counts(b)) {
    for (int64_t p = threadIdx.x % 32; p < q.P; p += 32) {
      const A u = q.centred(b, n, p);
      squares += u * u;
    }
  }
  squares = sum_warp(squares);
  if (threadIdx.x % 32 == 0) q.norms[map] = sqrt(squares);
}

// A block for each image, group and tile of 32 * kItems positions.
template <typename T, int kItems, bool kFindNorms>
__global__ void __launch_bounds__(kThreads) sum_groups(Problem<T> q) {
  using A = Accumulate<T>;
  constexpr int kTile = 32 * kItems;
  __shared__ A partial[kWarps][kTile];
  const int64_t tiles = ceil_div(q.P, kTile);
  const int64_t first = blockIdx.x % tiles * kTile;
  const int64_t g = blockIdx.x / tiles % q.G, b = blockIdx.x / tiles / q.G;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool counts = q.counts(b);
  A total[kItems] = {};
  for (int64_t some = warp * 32; some < q.N; some += kThreads) {
    const int64_t mine = some + lane;
    unsigned members = __ballot_sync(kFullWarp, mine < q.N && q.group(mine) == g);
    if (!counts) {
      if (kFindNorms && (members >> lane & 1u) != 0) q.norms[b * q.N + mine] = 0;
      continue;
    }
    for (; members != 0; members &= members - 1) {
      const int64_t n = some + __ffs(static_cast<int>(members)) - 1;
      A u[kItems], norm;
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const int64_t p = first + i * 32 + lane;
        u[i] = p < q.P ? q.centred(b, n, p) : A{0};
      }
      if constexpr (kFindNorms) {
        A squares = 0;
#pragma unroll
        for (int i = 0; i < kItems; ++i) squares += u[i] * u[i];
        norm = sqrt(sum_warp(squares));
        if (lane == 0) q.norms[b * q.N + n] = norm;
      } else {
        norm = q.norms[b * q.N + n];
      }
      const A inverse = inverse_norm(norm);
#pragma unroll
      for (int i = 0; i < kItems; ++i) total[i] += u[i] * inverse;
    }
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) partial[warp][i * 32 + lane] = total[i];
  __syncthreads();
  for (int at = threadIdx.x; at < kTile && first + at < q.P; at += kThreads) {
    A sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += partial[w][at];
    q.sums[(b * q.G + g) * q.P + first + at] = sum;
  }
}

}  // namespace
}  // namespace picnn_fast
