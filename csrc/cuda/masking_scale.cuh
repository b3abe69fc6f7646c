#pragma once

// Forward: channels of maps scaled by factors that are drawn or read.

#include <cstdint>
#include <type_traits>

#include "masking_layouts.cuh"

namespace picnn_fast {
namespace {

// Fills `factor` as BernoulliFactors does.
template <typename A>
struct MaskFactors {
  using Factor = A;

  MaskRows<A> rows;
  A* used;  // [B, filters] contiguous, what was read, or null
  int64_t filters;

  __device__ void operator()(int64_t b, int64_t begin, int count, bool writes,
                             Factor* factor) const {
    const A* mask = rows(b);
    for (int i = threadIdx.x; i < count; i += kThreads) {
      factor[i] = mask[(begin + i) * rows.column];
      if (writes && used != nullptr) used[b * filters + begin + i] = factor[i];
    }
    __syncthreads();
  }
};

// x * factor, 0 where the factor is 0 whatever x is. Keeping or dropping needs no arithmetic, so
// that elements may be any unsigned integers of their size.
template <typename Unsigned>
struct Keep {
  using Value = Unsigned;
  __device__ static Value scale(Value x, uint8_t factor) { return factor != 0 ? x : Value{0}; }
};
template <size_t kBytes>
using Bits =
    std::conditional_t<kBytes == 2, uint16_t, std::conditional_t<kBytes == 4, uint32_t, uint64_t>>;
template <typename T>
struct Multiply {
  using Value = T;
  using A = Accumulate<T>;
  __device__ static T scale(T x, A factor) {
    return static_cast<T>(factor == A{0} ? A{0} : static_cast<A>(x) * factor);
  }
};

// y = x * factor over a run of total = channels * S elements, in accesses of W elements. Vectors
// start on 16-byte boundaries; of the first and the last, only the elements inside the run.
template <int W, typename Op, typename Value, typename Factor>
__device__ void scale_run(const Value* x, Value* y, int total, int S, const Factor* factor) {
  const int head = W == 1 ? 0 : misalignment(x);
  for (int start = threadIdx.x * W - head; start < total; start += kUnroll * kThreads * W) {
    Vector<Value, W> value[kUnroll];
    int channel[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int e = start + u * kThreads * W;
      channel[u] = max(e, 0) / S;
      if (e < 0 || e > total - W) continue;
      // With S >= W the elements belong to one channel or two, and dropped ones need not be read.
      const int end = channel[u] + (e - channel[u] * S + W > S ? 1 : 0);
      if (S < W || factor[channel[u]] != 0 || factor[end] != 0)
        value[u] = *reinterpret_cast<const Vector<Value, W>*>(x + e);
      else
        value[u] = {};
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int e = start + u * kThreads * W;
      if (e >= total) continue;
      int c = channel[u], position = max(e, 0) - c * S;
      if (0 <= e && e <= total - W) {
#pragma unroll
        for (int i = 0; i < W; ++i) {
          value[u].lane[i] = Op::scale(value[u].lane[i], factor[c]);
          if (++position == S && i + 1 < W) position = 0, ++c;
        }
        *reinterpret_cast<Vector<Value, W>*>(y + e) = value[u];
      } else {
#pragma unroll 1
        for (int i = max(e, 0); i < min(e + W, total); ++i) {
          y[i] = Op::scale(x[i], factor[c]);
          if (++position == S) position = 0, ++c;
        }
      }
    }
  }
}

template <typename Op, typename Value, typename Factors>
__global__ void __launch_bounds__(kThreads)
    scale_runs(Factors factors, Maps<const Value> in, Maps<Value> out, int64_t N, int S,
               int block_channels) {
  const unsigned groups = static_cast<unsigned>(ceil_div(N, block_channels));
  const int64_t b = blockIdx.x / groups;
  const int64_t begin = int64_t{blockIdx.x % groups} * block_channels;
  const int count = static_cast<int>(min(int64_t{block_channels}, N - begin));
  auto* factor = dynamic_shared<typename Factors::Factor>();
  factors(b, begin, count, true, factor);
  const Value* x = in.data + b * in.batch + begin * S;
  Value* y = out.data + b * out.batch + begin * S;
  constexpr int W = kVectorBytes / sizeof(Value);
  if (misalignment(x) == misalignment(y))
    scale_run<W, Op>(x, y, count * S, S, factor);
  else
    scale_run<1, Op>(x, y, count * S, S, factor);
}

template <int W, typename Op, typename Value, typename Factor>
__device__ void scale_tile(const Tile<Value>& tile, int lanes, const Value* x, int64_t x_position,
                           Value* y, int64_t y_position, int64_t first, int64_t last,
                           const Factor* factor) {
  constexpr int kPieces = Tile<Value>::kVector / W;  // accesses of W elements to a position
  constexpr int kRows = kPieces > kUnroll ? 1 : kUnroll / kPieces;
  Factor mine[kPieces][W];
  bool needed[kPieces];
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    needed[p] = false;
#pragma unroll
    for (int i = 0; i < W; ++i) {
      const int column = (p * lanes + tile.lane) * W + i;
      mine[p][i] = column < tile.count ? factor[column] : Factor{0};
      needed[p] = needed[p] || mine[p][i] != Factor{0};
    }
  }
  for (int64_t s = first + tile.row; s < last; s += kRows * tile.rows) {
    Vector<Value, W> value[kRows][kPieces];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        const int64_t at = s + r * tile.rows;
        value[r][p] = {};
        if (at < last && needed[p])
          value[r][p] = *reinterpret_cast<const Vector<Value, W>*>(x + at * x_position +
                                                                   (p * lanes + tile.lane) * W);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        const int64_t at = s + r * tile.rows;
        const int column = (p * lanes + tile.lane) * W;
        if (at >= last || column >= tile.count) continue;
#pragma unroll
        for (int i = 0; i < W; ++i)
          value[r][p].lane[i] = Op::scale(value[r][p].lane[i], mine[p][i]);
        *reinterpret_cast<Vector<Value, W>*>(y + at * y_position + column) = value[r][p];
      }
    }
  }
}

template <typename Op, typename Value, typename Factors>
__global__ void __launch_bounds__(kThreads)
    scale_channels_last(Factors factors, Maps<const Value> in, Maps<Value> out, int64_t N,
                        int64_t S, int lanes, int splits) {
  const Tile<Value> tile(N, lanes, splits);
  auto* factor = dynamic_shared<typename Factors::Factor>();
  factors(tile.b, tile.begin, tile.count, tile.split == 0, factor);
  const int64_t length = ceil_div(S, splits);
  const int64_t first = tile.split * length, last = min(S, first + length);
  const Value* x = in.data + tile.b * in.batch + tile.begin;
  Value* y = out.data + tile.b * out.batch + tile.begin;
  if (tile.aligned(x, in.position) && tile.aligned(y, out.position))
    scale_tile<Tile<Value>::kVector, Op>(tile, lanes, x, in.position, y, out.position, first, last,
                                         factor);
  else
    scale_tile<1, Op>(tile, lanes, x, in.position, y, out.position, first, last, factor);
}

template <typename Op, typename Value, typename Factors>
__global__ void __launch_bounds__(kThreads)
    scale_strided(Factors factors, Maps<const Value> in, Maps<Value> out, int64_t N, int64_t S,
                  int block_channels, int lanes) {
  const unsigned groups = max(1u, static_cast<unsigned>(ceil_div(N, block_channels)));
  const int64_t b = blockIdx.x / groups;
  const int64_t begin = int64_t{blockIdx.x % groups} * block_channels;
  const int count = static_cast<int>(min(int64_t{block_channels}, N - begin));
  auto* factor = dynamic_shared<typename Factors::Factor>();
  factors(b, begin, count, true, factor);
  for (int i = threadIdx.x / lanes; i < count; i += kThreads / lanes) {
    const Value* x = in.data + b * in.batch + (begin + i) * in.channel;
    Value* y = out.data + b * out.batch + (begin + i) * out.channel;
    for (int64_t s = threadIdx.x % lanes; s < S; s += lanes)
      y[s * out.position] = factor[i] != 0 ? Op::scale(x[s * in.position], factor[i]) : Value{};
  }
}
}  // namespace
}  // namespace picnn_fast
