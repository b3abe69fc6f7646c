#pragma once

// How blocks of threads go over maps [B, N, S], by layout:
//   runs           the channels of a sample follow each other in memory ([B, N, h, w] contiguous,
//                  and [B, N] itself). Rows of S = 49 or 196 positions are not 16-byte aligned, so
//                  a block treats the run of all its channels as one array of 16-byte vectors and
//                  looks up the channel of each element.
//   channels_last  the channels of a position follow each other. A thread keeps its channels'
//                  factors (backward: sums) in registers while it walks down the positions.
//   strided        anything else: a few lanes for each channel, one element at a time.

#include <algorithm>
#include <cstdint>

#include "launch.h"
#include "maps.h"

namespace picnn_fast {
namespace {

using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kVectorBytes = 16;
constexpr int kUnroll = 4;             // vectors in flight in each thread
constexpr int kMaxChannels = 512;      // of a block in the run layout: at most two draws a thread
constexpr int64_t kFewBlocks = 264;    // two for each multiprocessor of a large device
constexpr int64_t kManyBlocks = 1024;  // about what the largest devices hold at a time

enum class Layout { kRuns, kChannelsLast, kStrided };

// In elements; T's own alignment is torch's promise.
template <typename T>
__device__ int misalignment(const T* pointer) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(pointer) % kVectorBytes / sizeof(T));
}

template <typename... Tensors>
Layout common_layout(const Tensors&... maps) {
  const auto runs = [](const Tensor& t) {
    const int64_t N = t.size(1), S = positions(t);
    return (S == 1 || position_stride(t, "maps") == 1) && (N == 1 || t.stride(1) == S);
  };
  const auto channels_last = [](const Tensor& t) { return t.size(1) == 1 || t.stride(1) == 1; };
  // A block of the run layout has elements, and counts them in 32 bits.
  const bool fits = ((0 < maps.numel() && positions(maps) < (int64_t{1} << 30)) && ...);
  if (fits && (runs(maps) && ...)) return Layout::kRuns;
  if (((0 < maps.numel() && channels_last(maps)) && ...)) return Layout::kChannelsLast;
  return Layout::kStrided;
}

// The smallest power of two that is at least n, at most limit.
int power_of_two(int64_t n, int limit) {
  int power = 1;
  while (power < n && power < limit) power *= 2;
  return power;
}

// Channels of a block such that a block has at most `elements` of the N * S, all blocks about the
// same.
int channels_per_block(int64_t N, int64_t S, int64_t elements) {
  const int64_t most = std::clamp<int64_t>(elements / std::max<int64_t>(S, 1), 1, kMaxChannels);
  return N == 0 ? 1 : static_cast<int>(ceil_div(N, ceil_div(N, most)));
}

// Threads side by side in the channels-last layout: 512-byte rows, but no wider than the channels,
// and down to 128 bytes where there would be few blocks.
int tile_lanes(int64_t B, int64_t N, int vector) {
  int lanes = power_of_two(ceil_div(N, vector), 32);
  while (lanes > 8 && B * ceil_div(N, lanes * vector) < kManyBlocks) lanes /= 2;
  return lanes;
}

// A block's place in the channels-last layout: `lanes` threads side by side hold a tile of
// channels, kVectorBytes each, and the block's kThreads / lanes rows of them walk down the
// positions.
template <typename Value>
struct Tile {
  static constexpr int kVector = kVectorBytes / sizeof(Value);
  int64_t b, begin;
  int count, split, lane, row, rows;

  __device__ Tile(int64_t N, int lanes, int splits) {
    const int width = lanes * kVector;
    const unsigned tiles = static_cast<unsigned>(ceil_div(N, width));
    begin = int64_t{blockIdx.x % tiles} * width;
    split = static_cast<int>(blockIdx.x / tiles % splits);
    b = blockIdx.x / tiles / splits;
    count = static_cast<int>(min(int64_t{width}, N - begin));
    lane = threadIdx.x % lanes;
    row = threadIdx.x / lanes;
    rows = kThreads / lanes;
  }
  // Whether every row of the tile can be read or written in vectors.
  __device__ bool aligned(const Value* base, int64_t position) const {
    return misalignment(base) == 0 && position % kVector == 0 && count % kVector == 0;
  }
};

// A row of a table for each sample: its own, or that of its label among `classes`.
template <typename A>
struct MaskRows {
  const A* mask;
  int64_t row, column;    // strides
  const int64_t* labels;  // null: a row for each sample
  int64_t label_stride, classes;

  __device__ const A* operator()(int64_t b) const {
    if (labels == nullptr) return mask + b * row;
    const int64_t label = labels[b * label_stride];
    PICNN_FAST_DEVICE_ASSERT(0 <= label && label < classes);
    return mask + label * row;
  }
};

}  // namespace
}  // namespace picnn_fast
