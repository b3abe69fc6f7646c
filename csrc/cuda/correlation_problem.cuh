#pragma once

#include <cstdint>

#include "launch.h"
#include "maps.h"

// What the kernels of the correlation family are told of the maps and their groups.
namespace picnn_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

template <typename T>
struct Problem {
  using A = Accumulate<T>;
  Maps<const T> in;
  const A* mean;          // [N, P]
  const int64_t* groups;  // [N]
  const bool* positive;   // [B] or null: all images count
  A* norms;               // [B, N]
  A* sums;                // [B, G, P]
  int64_t B, N, G, P;

  __device__ bool counts(int64_t b) const { return positive == nullptr || positive[b]; }
  __device__ int64_t group(int64_t n) const {
    const int64_t g = groups[n];
    PICNN_FAST_DEVICE_ASSERT(0 <= g && g < G);
    return g;
  }
  __device__ A centred(int64_t b, int64_t n, int64_t p) const {
    const T x = in.data[b * in.batch + n * in.channel + p * in.position];
    return static_cast<A>(x) - mean[n * P + p];
  }
};

}  // namespace
}  // namespace picnn_fast
