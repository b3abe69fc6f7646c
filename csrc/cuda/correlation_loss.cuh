#pragma once

#include "../common/correlation.h"
#include "correlation_problem.cuh"

// Num and Den of each group, and the loss, from the sums by group alone.
namespace picnn_fast {
namespace {

// A block for each image: ⟨S, S⟩ and ⟨S, Σ S⟩ of every group, [B, 2, G].
template <typename A>
__global__ void __launch_bounds__(kThreads)
    find_moments(const A* sums, A* of_images, int64_t G, int64_t P) {
  constexpr int kTile = 1024;
  __shared__ A total[kTile];
  const int64_t b = blockIdx.x;
  sums += b * G * P;
  A* within = of_images + b * 2 * G;
  A* across = within + G;
  for (int64_t first = 0; first < P; first += kTile) {
    const int count = static_cast<int>(P - first < kTile ? P - first : kTile);
    __syncthreads();
    for (int p = threadIdx.x; p < count; p += kThreads) {
      A sum = 0;
      for (int64_t g = 0; g < G; ++g) sum += sums[g * P + first + p];
      total[p] = sum;
    }
    __syncthreads();
    for (int64_t g = threadIdx.x / 32; g < G; g += kWarps) {
      A own = 0, all = 0;
      for (int p = threadIdx.x % 32; p < count; p += 32) {
        const A sum = sums[g * P + first + p];
        own += sum * sum;
        all += sum * total[p];
      }
      own = sum_warp(own);
      all = sum_warp(all);
      if (threadIdx.x % 32 != 0) continue;
      within[g] = first == 0 ? own : within[g] + own;
      across[g] = first == 0 ? all : across[g] + all;
    }
  }
}

// One block: Num and Den of every group, [2, G], and the loss.
template <typename T>
__global__ void __launch_bounds__(kThreads) finish(Problem<T> q, const Accumulate<T>* of_images,
                                                   Accumulate<T>* moments, Accumulate<T>* loss) {
  using A = Accumulate<T>;
  __shared__ A losses[kWarps];
  A counted = 0;
  for (int64_t b = threadIdx.x % 32; b < q.B; b += 32) counted += q.counts(b) ? 1 : 0;
  counted = sum_warp(counted);
  const A images = static_cast<A>(q.B > 0 ? q.B : 1);
  A total = 0;
  for (int64_t n = threadIdx.x; n < q.N; n += kThreads) q.group(n);  // others are refused
  for (int64_t g = threadIdx.x; g < q.G; g += kThreads) {
    A size = 0, own = 0, all = 0;
    for (int64_t n = 0; n < q.N; ++n) size += q.groups[n] == g ? 1 : 0;
    for (int64_t b = 0; b < q.B; ++b) {
      own += of_images[b * 2 * q.G + g];
      all += of_images[(b * 2 + 1) * q.G + g];
    }
    const A within = (own + counted * size * size) / images;
    const A across = (all + counted * size * static_cast<A>(q.N)) / images;
    moments[g] = within;
    moments[q.G + g] = across;
    total += group_loss(within, across);
  }
  total = sum_warp(total);
  if (threadIdx.x % 32 == 0) losses[threadIdx.x / 32] = total;
  __syncthreads();
  if (threadIdx.x != 0) return;
  total = 0;
  for (int w = 0; w < kWarps; ++w) total += losses[w];
  *loss = total;
}

}  // namespace
}  // namespace picnn_fast
