#pragma once

#include <algorithm>
#include <cstdint>

#include "launch.h"

// How the blocks of a launch, and the threads of a block, share activations [M, N] and their
// tables.
namespace picnn_fast {
namespace {

using Wide = unsigned long long;  // what 64-bit atomics take

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kVectorBytes = 16;
constexpr int kMaxFilters = 64;       // of a block: 128 bytes of the narrowest type
constexpr int kFixedBytes = 5 << 10;  // of a block's other arrays in shared memory
constexpr int kSharedBytes = (48 << 10) - kFixedBytes;  // of tables, where several blocks share it
constexpr int64_t kBlocks = 384;       // one round of three to a multiprocessor on a large device
constexpr int64_t kCountBlocks = 264;  // of two: hard counts take the registers of so many
constexpr int64_t kMaxRows = int64_t{1} << 30;  // of a block: its counters have 32 bits

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

}  // namespace
}  // namespace picnn_fast
