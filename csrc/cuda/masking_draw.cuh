#pragma once

// Draws of pseudo-labels and of filters, and the factors of channels that come of them. The fused
// operator works them out in each forward block: the pseudo-label of its sample and the draws of
// its own channels cost less than a second kernel and its round trip through memory.

#include <cmath>
#include <cstdint>

#include "../common/masking.h"
#include "masking_layouts.cuh"

namespace picnn_fast {
namespace {

// A float32 or float64 array, chosen at run time; every value is exact as a double.
struct Reals {
  const void* data;
  bool is_double;
  int64_t row, column;  // strides

  __device__ double operator()(int64_t i, int64_t j) const {
    const int64_t at = i * row + j * column;
    return is_double ? static_cast<const double*>(data)[at]
                     : static_cast<double>(static_cast<const float*>(data)[at]);
  }
};

// Sample `b`'s logit of class `k`, NaN as +inf.
__device__ double logit(const Reals& logits, int64_t b, int64_t k) {
  const double value = logits(b, k);
  return value != value ? HUGE_VAL : value;
}

// The difference rounds once to float32 whether the logits are float32 or float64: rounding a
// double difference of two floats to float gives what a float subtraction gives.
__device__ int64_t class_weight(const Reals& logits, int64_t b, int64_t k, double largest) {
  return softmax_weight(static_cast<float>(logit(logits, b, k) - largest));
}

// Categorical draw from softmax(logits[b]); for the whole block, every thread gets the answer. Each
// thread weighs a stretch of consecutive classes, one scan adds the stretches up, and the thread
// whose stretch holds the threshold looks for the class.
__device__ int64_t draw_pseudo_label(const Reals& logits, int64_t classes, int64_t b, uint64_t seed,
                                     uint32_t rank) {
  __shared__ double warp_largest[kWarps];
  __shared__ int64_t warp_total[kWarps];
  __shared__ int64_t label;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t stretch = ceil_div(classes, kThreads);
  const int64_t first = min(classes, threadIdx.x * stretch);
  const int64_t last = min(classes, first + stretch);

  double largest = -HUGE_VAL;
  for (int64_t k = first; k < last; ++k) largest = fmax(largest, logit(logits, b, k));
  for (int offset = 16; offset > 0; offset /= 2)
    largest = fmax(largest, __shfl_xor_sync(kFullWarp, largest, offset));
  if (lane == 0) warp_largest[warp] = largest;
  if (threadIdx.x == 0) label = classes - 1;  // stays where no class has a weight
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) largest = fmax(largest, warp_largest[w]);

  int64_t sum = 0;
  for (int64_t k = first; k < last; ++k) sum += class_weight(logits, b, k, largest);
  int64_t cumulative = sum;
  for (int offset = 1; offset < 32; offset *= 2) {
    const int64_t below = __shfl_up_sync(kFullWarp, cumulative, offset);
    if (lane >= offset) cumulative += below;
  }
  if (lane == 31) warp_total[warp] = cumulative;
  cumulative -= sum;
  __syncthreads();
  int64_t total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) cumulative += total;
    total += warp_total[w];
  }

  const int64_t threshold = cdf_threshold(random_24_bits(b, seed, Stream::kLabel, rank), total);
  if (cumulative <= threshold && threshold < cumulative + sum) {
    int64_t k = first;
    while ((cumulative += class_weight(logits, b, k, largest)) <= threshold) ++k;
    label = k;
  }
  __syncthreads();
  return label;
}

__global__ void __launch_bounds__(kThreads)
    label_blocks(Reals logits, int64_t classes, const int64_t* seed, uint32_t rank,
                 int64_t* labels) {
  const int64_t b = blockIdx.x;
  const int64_t label = draw_pseudo_label(logits, classes, b, static_cast<uint64_t>(*seed), rank);
  if (threadIdx.x == 0) labels[b] = label;
}

// mask [B, N] contiguous, of count = B * N elements. The threads share the first `checked` rows of
// the table out, and refuse what is no probability there, be it that no element is drawn.
template <typename P>
__global__ void __launch_bounds__(kThreads)
    filter_elements(MaskRows<P> probabilities, int64_t N, int64_t count, int64_t checked,
                    const int64_t* seed, uint32_t rank, P* mask) {
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t threads = int64_t{gridDim.x} * kThreads;
  for (int64_t i = at; i < checked * N; i += threads) {
    const P p = probabilities.mask[i / N * probabilities.row + i % N * probabilities.column];
    PICNN_FAST_DEVICE_ASSERT(p >= 0 && p <= 1);
  }
  if (at >= count) return;
  const uint32_t bits = random_24_bits(at, static_cast<uint64_t>(*seed), Stream::kFilter, rank);
  mask[at] = keeps_filter(bits, probabilities(at / N)[at % N * probabilities.column]);
}

// The blocks share the table out: those of sample b take rows b, b + samples and so on, each its
// own channels. No launch and no pass of its own; and not inlined, so that it takes few registers
// of what follows.
__attribute__((noinline)) __device__ void validate_probabilities(Reals table, int64_t b,
                                                                 int64_t samples, int64_t classes,
                                                                 int64_t begin, int count) {
  for (int64_t k = b; k < classes; k += samples) {
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const double p = table(k, begin + i);
      PICNN_FAST_DEVICE_ASSERT(p >= 0 && p <= 1);
    }
  }
}

// Fills `factor` with those of channels [begin, begin + count) of sample b, for the whole block.
// `writes`: this block, among those that share the channels, writes the side outputs.
// kValidate: and refuses what is no probability.
template <bool kValidate>
struct BernoulliFactors {
  using Factor = uint8_t;

  Reals logits, correspondence;
  int64_t classes, filters;
  int64_t samples;
  const int64_t* seed;
  uint32_t rank;
  float* mask;  // one of the two is null
  double* wide_mask;
  int64_t* pseudo_label;

  __device__ void operator()(int64_t b, int64_t begin, int count, bool writes,
                             Factor* factor) const {
    if (kValidate && writes)
      validate_probabilities(correspondence, b, samples, classes, begin, count);
    const uint64_t key = static_cast<uint64_t>(*seed);
    const int64_t label = draw_pseudo_label(logits, classes, b, key, rank);
    if (writes && begin == 0 && threadIdx.x == 0) pseudo_label[b] = label;
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const int64_t at = b * filters + begin + i;
      const uint32_t bits = random_24_bits(at, key, Stream::kFilter, rank);
      const bool keep = keeps_filter(bits, correspondence(label, begin + i));
      factor[i] = keep;
      if (!writes) continue;
      if (mask != nullptr) {
        mask[at] = keep;
      } else {
        wide_mask[at] = keep;
      }
    }
    __syncthreads();
  }
};

}  // namespace
}  // namespace picnn_fast
