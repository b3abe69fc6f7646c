#pragma once

// Gradients of what masks come from: of logits and correspondence (PICNN), and of a gate (CSG).
// Sums over samples of one label run in the order of the samples, without atomics: the same bits
// every time.

#include <cmath>
#include <cstdint>

#include "masking_layouts.cuh"

namespace picnn_fast {
namespace {

// Samples whose labels a block looks at together.
constexpr int kLabels = kThreads;

// Rows [B, N] added up by label, [K, N]. A block has one class and a thread a filter.
template <typename A>
struct SumByLabel {
  const A* rows;
  int64_t row, column;  // strides
  const int64_t* labels;
  int64_t label_stride, B, N, K;
  A* sums;  // contiguous

  static int64_t blocks(int64_t N, int64_t K) { return K * ceil_div(N, kThreads); }

  __device__ void operator()(int64_t block) const {
    __shared__ int64_t of_samples[kLabels];
    const int64_t tiles = ceil_div(N, kThreads);
    const int64_t k = block / tiles;
    const int64_t n = block % tiles * kThreads + threadIdx.x;
    A sum = 0;
    for (int64_t first = 0; first < B; first += kLabels) {
      const int count = static_cast<int>(min(int64_t{kLabels}, B - first));
      if (static_cast<int>(threadIdx.x) < count) {
        const int64_t label = labels[(first + threadIdx.x) * label_stride];
        PICNN_FAST_DEVICE_ASSERT(0 <= label && label < K);
        of_samples[threadIdx.x] = label;
      }
      __syncthreads();
      for (int i = 0; i < count; ++i) {
        if (of_samples[i] == k && n < N) sum += rows[(first + i) * row + n * column];
      }
      __syncthreads();
    }
    if (n < N) sums[k * N + n] = sum;
  }
};

template <typename A>
__global__ void __launch_bounds__(kThreads) sum_by_label(SumByLabel<A> sum) {
  sum(blockIdx.x);
}

// Gradients of mask = one_hot @ correspondence, the one-hot label carrying the gradient of
// softmax(logits).
template <typename A>
struct Parameters {
  const A *grad_mask, *logits, *correspondence;  // [B, N], [B, K], [K, N], strided
  int64_t mask_row, mask_column, logits_row, logits_column, table_row, table_column;
  int64_t B, N, K;
  A* grad_logits;  // [B, K] contiguous; where `multiplied`, grad_mask @ correspondence^T before
  bool multiplied;
  SumByLabel<A> table;
};

// Of a warp's maximum or sum, that of the block; every thread gets it.
template <typename A, typename Combine>
__device__ A combine_warps(A value, A* of_warps, const Combine& combine) {
  for (int offset = 16; offset > 0; offset /= 2)
    value = combine(value, __shfl_xor_sync(kFullWarp, value, offset));
  __syncthreads();  // of_warps may still be read
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = value;
  __syncthreads();
  A all = of_warps[0];
  for (int w = 1; w < kWarps; ++w) all = combine(all, of_warps[w]);
  return all;
}

// One sample's logits, for the whole block: a warp a class, then the softmax's own derivative.
template <typename A>
__device__ void logits_gradient(const Parameters<A>& p, int64_t b) {
  __shared__ A of_warps[kWarps];
  const A* logits = p.logits + b * p.logits_row;
  A* grad = p.grad_logits + b * p.K;
  if (!p.multiplied) {
    const A* row = p.grad_mask + b * p.mask_row;
    for (int64_t k = threadIdx.x / 32; k < p.K; k += kWarps) {
      const A* column = p.correspondence + k * p.table_row;
      A sum = 0;
      for (int64_t n = threadIdx.x % 32; n < p.N; n += 32)
        sum += row[n * p.mask_column] * column[n * p.table_column];
      sum = sum_warp(sum);
      if (threadIdx.x % 32 == 0) grad[k] = sum;  // read behind the barriers of combine_warps
    }
  }
  const auto largest = [](A one, A two) { return two > one || two != two ? two : one; };
  const auto add = [](A one, A two) { return one + two; };
  A most = -HUGE_VAL;
  for (int64_t k = threadIdx.x; k < p.K; k += kThreads)
    most = largest(most, logits[k * p.logits_column]);
  most = combine_warps(most, of_warps, largest);
  A total = 0, weighted = 0;
  for (int64_t k = threadIdx.x; k < p.K; k += kThreads) {
    const A weight = exp(logits[k * p.logits_column] - most);
    total += weight;
    weighted += weight * grad[k];
  }
  total = combine_warps(total, of_warps, add);
  weighted = combine_warps(weighted, of_warps, add) / total;
  for (int64_t k = threadIdx.x; k < p.K; k += kThreads)
    grad[k] = exp(logits[k * p.logits_column] - most) / total * (grad[k] - weighted);
}

// The first B blocks a sample's logits each, the others the correspondence.
template <typename A>
__global__ void __launch_bounds__(kThreads) parameters_backward(Parameters<A> p) {
  if (blockIdx.x < p.B)
    logits_gradient(p, int64_t{blockIdx.x});
  else
    p.table(blockIdx.x - p.B);
}

}  // namespace
}  // namespace picnn_fast
