// CUDA kernels of the masking family. picnn_fast/reference/masking.py is the definition.
//
// Maps are [B, N, S]. Three kernels for each of forward and backward, by layout:
//   runs           the channels of a sample follow each other in memory ([B, N, h, w] contiguous,
//                  and [B, N] itself). Rows of S = 49 or 196 positions are not 16-byte aligned, so
//                  a block treats the run of all its channels as one array of 16-byte vectors and
//                  looks up the channel of each element.
//   channels_last  the channels of a position follow each other. A thread keeps its channels'
//   factors
//                  (backward: sums) in registers while it walks down the positions.
//   strided        anything else: a few lanes for each channel, one element at a time.
// Forward blocks work out the pseudo-label of their sample and the draws of their own channels
// first; that costs less than a second kernel and its round trip through memory.
// A backward block holds whole channels, so sums need no atomics and come out the same every time;
// the price is few blocks when B * N is small and S huge.

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <type_traits>

#include "../common/masking.h"
#include "launch.h"
#include "maps.h"

namespace picnn_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kVectorBytes = 16;
constexpr int kUnroll = 4;         // vectors in flight in each thread
constexpr int kMaxChannels = 512;  // of a block in the run layout: at most two draws a thread

template <typename T>
__device__ int misalignment(
    const T* pointer) {  // in elements; T's own alignment is torch's promise
  return static_cast<int>(reinterpret_cast<uintptr_t>(pointer) % kVectorBytes / sizeof(T));
}

// A float32 or float64 array, chosen at run time; every value is exact as a double.
struct Reals {
  const void* data;
  bool is_double;
  int64_t row, column;

  __device__ double operator()(int64_t i, int64_t j) const {
    const int64_t at = i * row + j * column;
    return is_double ? static_cast<const double*>(data)[at]
                     : static_cast<double>(static_cast<const float*>(data)[at]);
  }
};

// ---- What the channels of a sample are scaled by ----------------------------------------------

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

// Each of the two fills `factor` with those of channels [begin, begin + count) of sample b, for the
// whole block. `writes`: this block, among those that share the channels, writes the side outputs.
struct BernoulliFactors {
  using Factor = uint8_t;

  Reals logits, correspondence;
  int64_t classes, filters;
  const int64_t* seed;
  uint32_t rank;
  float* mask;  // one of the two is null
  double* wide_mask;
  int64_t* pseudo_label;

  __device__ void operator()(int64_t b, int64_t begin, int count, bool writes,
                             Factor* factor) const {
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

template <typename A>
struct MaskFactors {
  using Factor = A;

  const A* mask;
  int64_t row, column;  // strides

  __device__ void operator()(int64_t b, int64_t begin, int count, bool, Factor* factor) const {
    for (int i = threadIdx.x; i < count; i += kThreads)
      factor[i] = mask[b * row + (begin + i) * column];
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

// ---- Forward ----------------------------------------------------------------------------------

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

// ---- Backward ---------------------------------------------------------------------------------

template <typename T>
struct Backward {
  using A = Accumulate<T>;
  Maps<const T> grad_masked, features;
  Maps<T> grad_features;
  const A* mask;
  int64_t mask_batch, mask_channel;
  A* grad_mask;  // contiguous
  int64_t N, S;

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
__global__ void __launch_bounds__(kThreads)
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
__device__ void multiply_tile(const Backward<T>& p, const Tile<T>& tile, int lanes, A* sums) {
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
  for (int64_t s = tile.row; s < p.S; s += kRows * tile.rows) {
    Vector<T, W> xs[kRows][kPieces], gs[kRows][kPieces];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int q = 0; q < kPieces; ++q) {
        const int64_t at = s + r * tile.rows;
        const int column = (q * lanes + tile.lane) * W;
        if (at >= p.S || column >= tile.count) continue;
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
        if (at >= p.S || column >= tile.count) continue;
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
__global__ void __launch_bounds__(kThreads) backward_channels_last(Backward<T> p, int lanes) {
  using A = Accumulate<T>;
  const Tile<T> tile(p.N, lanes, 1);
  A* sums = dynamic_shared<A>();
  const bool aligned =
      tile.aligned(p.features.data + tile.b * p.features.batch + tile.begin, p.features.position) &&
      tile.aligned(p.grad_masked.data + tile.b * p.grad_masked.batch + tile.begin,
                   p.grad_masked.position) &&
      tile.aligned(p.grad_features.data + tile.b * p.grad_features.batch + tile.begin,
                   p.grad_features.position);
  if (aligned)
    multiply_tile<Tile<T>::kVector>(p, tile, lanes, sums);
  else
    multiply_tile<1>(p, tile, lanes, sums);
  __syncthreads();
  for (int i = threadIdx.x; i < tile.count; i += kThreads) {
    A sum = 0;
    for (int row = 0; row < tile.rows; ++row) sum += sums[row * lanes * Tile<T>::kVector + i];
    p.grad_mask[tile.b * p.N + tile.begin + i] = sum;
  }
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

// ---- Launching --------------------------------------------------------------------------------

enum class Layout { kRuns, kChannelsLast, kStrided };

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

Reals reals(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double,
                  "picnn_fast: logits and correspondence must be float32 or float64");
  return {t.data_ptr(), type == ScalarType::Double, t.stride(0), t.stride(1)};
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

constexpr int64_t kManyBlocks = 1024;  // about what the largest devices hold at a time

// Threads side by side in the channels-last layout: 512-byte rows, but no wider than the channels,
// and down to 128 bytes where there would be few blocks.
int tile_lanes(int64_t B, int64_t N, int vector) {
  int lanes = power_of_two(ceil_div(N, vector), 32);
  while (lanes > 8 && B * ceil_div(N, lanes * vector) < kManyBlocks) lanes /= 2;
  return lanes;
}

template <typename Op, typename Factors>
void scale(const Tensor& features, const Tensor& masked, const Factors& factors) {
  using Value = typename Op::Value;
  using Factor = typename Factors::Factor;
  const int64_t B = features.size(0), N = features.size(1), S = positions(features);
  const Maps<const Value> in = input_maps<Value>(features);
  const Maps<Value> out = output_maps<Value>(masked);
  // 8 to 64 KB of maps a block: the larger, the less the label and the draws weigh.
  const int64_t size = sizeof(Value);
  const int64_t elements =
      std::clamp<int64_t>(B * N * S * size / (4 * kManyBlocks), 8192, 65536) / size;
  const int channels = channels_per_block(N, S, elements);
  // Without channels, one block a sample still draws the label.
  const int64_t blocks = B * std::max<int64_t>(ceil_div(N, channels), 1);
  switch (common_layout(features, masked)) {
    case Layout::kRuns:
      launch(features, scale_runs<Op, Value, Factors>, blocks, kThreads, channels * sizeof(Factor),
             factors, in, out, N, static_cast<int>(S), channels);
      break;
    case Layout::kChannelsLast: {
      const int vector = Tile<Value>::kVector;
      const int lanes = tile_lanes(B, N, vector);
      const int splits = static_cast<int>(
          std::clamp<int64_t>(S * lanes * vector / elements, 1, std::max<int64_t>(S, 1)));
      launch(features, scale_channels_last<Op, Value, Factors>,
             B * ceil_div(N, lanes * vector) * splits, kThreads, lanes * vector * sizeof(Factor),
             factors, in, out, N, S, lanes, splits);
      break;
    }
    case Layout::kStrided:
      launch(features, scale_strided<Op, Value, Factors>, blocks, kThreads,
             channels * sizeof(Factor), factors, in, out, N, S, channels, power_of_two(S, 32));
      break;
  }
}

template <typename T>
void backward(const Tensor& grad_masked, const Tensor& features, const Tensor& mask,
              const Tensor& grad_features, const Tensor& grad_mask) {
  using A = Accumulate<T>;
  const int64_t B = features.size(0), N = features.size(1), S = positions(features);
  if (B == 0 || N == 0) return;
  const Backward<T> p = {input_maps<T>(grad_masked),
                         input_maps<T>(features),
                         output_maps<T>(grad_features),
                         static_cast<const A*>(mask.data_ptr()),
                         mask.stride(0),
                         mask.stride(1),
                         static_cast<A*>(grad_mask.data_ptr()),
                         N,
                         S};
  constexpr int kVector = Tile<T>::kVector;
  switch (common_layout(grad_masked, features, grad_features)) {
    case Layout::kRuns: {
      // One piece of shared memory a block where channels are short, vectors that overhang
      // included.
      const int channels = channels_per_block(N, S, kStaged<A> - kVector);
      const int lanes = power_of_two(S / 8, 32);
      launch(features, backward_runs<T>, B * ceil_div(N, channels), kThreads,
             (kStaged<A> + channels) * sizeof(A), p, channels, lanes);
      break;
    }
    case Layout::kChannelsLast: {
      const int lanes = tile_lanes(B, N, kVector);
      launch(features, backward_channels_last<T>, B * ceil_div(N, lanes * kVector), kThreads,
             kThreads * kVector * sizeof(A), p, lanes);
      break;
    }
    case Layout::kStrided: {
      const int lanes = power_of_two(S, 32);
      launch(features, backward_strided<T>, B * ceil_div(N, kThreads / lanes), kThreads, 0, p,
             lanes);
      break;
    }
  }
}

void check_maps(const Tensor& maps, const char* name) {
  STD_TORCH_CHECK(maps.dim() >= 2, "picnn_fast: ", name, " must be [B, N, *spatial]");
}
void check_table(const Tensor& table, int64_t rows, int64_t columns, const char* name) {
  STD_TORCH_CHECK(table.dim() == 2 && table.size(0) == rows && table.size(1) == columns,
                  "picnn_fast: ", name, " must be [", rows, ", ", columns, "]");
}

void check_mask(const Tensor& mask, const Tensor& features) {
  check_table(mask, features.size(0), features.size(1), "mask");
  STD_TORCH_CHECK(mask.scalar_type() == accumulate_type(features),
                  "picnn_fast: mask must be float32 (float64 for float64 features)");
}

std::tuple<Tensor, Tensor, Tensor> bernoulli_mask(const Tensor& features, const Tensor& logits,
                                                  const Tensor& correspondence, const Tensor& seed,
                                                  int64_t rank) {
  check_maps(features, "features");
  const int64_t B = features.size(0), N = features.size(1);
  STD_TORCH_CHECK(correspondence.dim() == 2 && correspondence.size(0) > 0,
                  "picnn_fast: correspondence must be [K, N] with K > 0");
  check_device(logits, "logits", features, "features");
  check_device(correspondence, "correspondence", features, "features");
  check_device(seed, "seed", features, "features");
  const int64_t K = correspondence.size(0);
  check_table(correspondence, K, N, "correspondence");
  check_table(logits, B, K, "logits");
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1,
                  "picnn_fast: seed must be one int64");
  Tensor masked = torch::stable::empty_like(features);
  Tensor mask = torch::stable::new_empty(features, {B, N}, accumulate_type(features));
  Tensor pseudo_label = torch::stable::new_empty(features, {B}, ScalarType::Long);
  const bool wide = features.scalar_type() == ScalarType::Double;
  const BernoulliFactors factors = {reals(logits),
                                    reals(correspondence),
                                    K,
                                    N,
                                    static_cast<const int64_t*>(seed.data_ptr()),
                                    static_cast<uint32_t>(rank),
                                    wide ? nullptr : static_cast<float*>(mask.data_ptr()),
                                    wide ? static_cast<double*>(mask.data_ptr()) : nullptr,
                                    static_cast<int64_t*>(pseudo_label.data_ptr())};
  with_type(features, "features",
            [&](auto value) { scale<Keep<Bits<sizeof(value)>>>(features, masked, factors); });
  return {masked, mask, pseudo_label};
}

Tensor mask_channels(const Tensor& features, const Tensor& mask) {
  check_maps(features, "features");
  check_device(mask, "mask", features, "features");
  check_mask(mask, features);
  Tensor masked = torch::stable::empty_like(features);
  with_type(features, "features", [&](auto value) {
    using T = decltype(value);
    using A = Accumulate<T>;
    const MaskFactors<A> factors = {static_cast<const A*>(mask.data_ptr()), mask.stride(0),
                                    mask.stride(1)};
    scale<Multiply<T>>(features, masked, factors);
  });
  return masked;
}

std::tuple<Tensor, Tensor> masking_backward(const Tensor& grad_masked, const Tensor& features,
                                            const Tensor& mask) {
  check_maps(features, "features");
  check_maps(grad_masked, "grad_masked");
  check_device(grad_masked, "grad_masked", features, "features");
  check_device(mask, "mask", features, "features");
  STD_TORCH_CHECK(grad_masked.dim() == features.dim(),
                  "picnn_fast: grad_masked must have the shape of features");
  for (int64_t axis = 0; axis < features.dim(); ++axis)
    STD_TORCH_CHECK(grad_masked.size(axis) == features.size(axis),
                    "picnn_fast: grad_masked must have the shape of features");
  STD_TORCH_CHECK(grad_masked.scalar_type() == features.scalar_type(),
                  "picnn_fast: grad_masked must have the dtype of features");
  const int64_t B = features.size(0), N = features.size(1);
  check_mask(mask, features);
  Tensor grad_features = torch::stable::empty_like(features);
  Tensor grad_mask = torch::stable::new_empty(mask, {B, N});
  with_type(features, "features", [&](auto value) {
    backward<decltype(value)>(grad_masked, features, mask, grad_features, grad_mask);
  });
  return {grad_features, grad_mask};
}

}  // namespace
}  // namespace picnn_fast

PICNN_FAST_REGISTER_CUDA(m) {
  m.impl("bernoulli_mask", TORCH_BOX(&picnn_fast::bernoulli_mask));
  m.impl("mask_channels", TORCH_BOX(&picnn_fast::mask_channels));
  m.impl("masking_backward", TORCH_BOX(&picnn_fast::masking_backward));
}
