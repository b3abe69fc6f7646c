// CUDA kernels of the template family. picnn_fast/reference/templates.py is the definition.
//
// The mask layer reads a map once: its values wait in registers while the peak is looked for. Maps
// are [B, N, positions]; the kernels differ in what lies side by side in memory:
//   mask_maps           positions, or nothing: a warp for each map, a block for a large one.
//   mask_channels_last  channels: a thread for each channel and several of its positions.
// Maps too large for the registers of their threads are read a second time. The backward pass is
// the same without the search.

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <climits>
#include <cmath>
#include <optional>
#include <tuple>

#include "../common/template_arguments.h"
#include "../common/templates.h"
#include "launch.h"
#include "maps.h"

namespace picnn_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

template <typename T>
struct Mask {
  using A = Accumulate<T>;
  Maps<const T> in;
  Maps<T> out;
  int64_t* peak;  // written where it is looked for
  int64_t peak_batch, peak_channel;
  Template<A> shape;
  A scale;
  int64_t B, N;

  __device__ int positions() const { return shape.height * shape.width; }
  __device__ int peak_given(int64_t b, int64_t n) const {
    const int64_t position = peak[b * peak_batch + n * peak_channel];
    PICNN_FAST_DEVICE_ASSERT(0 <= position && position < positions());
    return static_cast<int>(position);
  }
  __device__ T masked(T x, int position, int row, int column) const {
    const unsigned width = shape.width, at = position;
    const int di = static_cast<int>(at / width) - row, dj = static_cast<int>(at % width) - column;
    return static_cast<T>(static_cast<A>(x) * mask_value(template_value(shape, di, dj), scale));
  }
};

// The greatest value so far. NaN is above all else; of equals, the first position counts.
template <typename A>
struct Peak {
  A value;
  int position;

  static __device__ Peak none() { return {-static_cast<A>(HUGE_VAL), INT_MAX}; }
  __device__ void include(A other, int other_position) {
    const bool above = other > value || (other != other && value == value);
    const bool same = other == value || (other != other && value != value);
    if (above || (same && other_position < position)) {
      value = other;
      position = other_position;
    }
  }
  // Takes in the lanes whose number differs by `offset`; for whole warps.
  __device__ void include_lane(int offset) {
    const A other = __shfl_xor_sync(kFullWarp, value, offset);
    include(other, __shfl_xor_sync(kFullWarp, position, offset));
  }
};

// One map for each kLanes threads, a warp or a block, or kMaps of them in turn: small maps, so that
// enough reads are under way.
template <typename T, bool kFindPeak, int kLanes, int kMaps, int kItems>
__global__ void __launch_bounds__(kThreads, kItems <= 8 ? 4 : 2) mask_maps(Mask<T> p) {
  using A = Accumulate<T>;
  static_assert(kLanes == 32 || (kLanes == kThreads && kMaps == 1));
  constexpr int kStep = kLanes * kItems;
  const int lane = threadIdx.x % kLanes, positions = p.positions();
  const int64_t first = (int64_t{blockIdx.x} * (kThreads / kLanes) + threadIdx.x / kLanes) * kMaps;
  T value[kMaps][kItems];
  const auto load = [&](int m, int base) {
    const int64_t b = (first + m) / p.N, n = (first + m) % p.N;
    if (b >= p.B) return;
    const T* x = p.in.data + b * p.in.batch + n * p.in.channel;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int at = base + i * kLanes + lane;
      if (at < positions) value[m][i] = x[at * p.in.position];
    }
  };
#pragma unroll
  for (int m = 0; m < kMaps; ++m) load(m, 0);
#pragma unroll
  for (int m = 0; m < kMaps; ++m) {
    const int64_t b = (first + m) / p.N, n = (first + m) % p.N;
    if (b >= p.B) return;  // all threads of the map
    int found;
    if constexpr (kFindPeak) {
      auto peak = Peak<A>::none();
      for (int base = 0; base < positions; base += kStep) {
        if (base > 0) load(m, base);
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          const int at = base + i * kLanes + lane;
          if (at < positions) peak.include(static_cast<A>(value[m][i]), at);
        }
      }
      for (int offset = 16; offset > 0; offset /= 2) peak.include_lane(offset);
      if constexpr (kLanes > 32) {
        __shared__ Peak<A> warp_peak[kWarps];
        if (threadIdx.x % 32 == 0) warp_peak[threadIdx.x / 32] = peak;
        __syncthreads();
        for (int w = 0; w < kWarps; ++w) peak.include(warp_peak[w].value, warp_peak[w].position);
      }
      found = peak.position;
      if (lane == 0) p.peak[b * p.peak_batch + n * p.peak_channel] = found;
      if (positions > kStep) load(m, 0);
    } else {
      found = p.peak_given(b, n);
    }
    const int row = found / p.shape.width, column = found % p.shape.width;
    T* y = p.out.data + b * p.out.batch + n * p.out.channel;
    for (int base = 0; base < positions; base += kStep) {
      if (base > 0) load(m, base);
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const int at = base + i * kLanes + lane;
        if (at < positions) y[at * p.out.position] = p.masked(value[m][i], at, row, column);
      }
    }
  }
}

// A block holds `lanes` channels of a sample side by side; its kThreads / lanes rows of them walk
// down the positions.
template <typename T, bool kFindPeak, int kItems>
__global__ void __launch_bounds__(kThreads, kItems <= 8 ? 4 : 2)
    mask_channels_last(Mask<T> p, int lanes) {
  using A = Accumulate<T>;
  const unsigned tiles = static_cast<unsigned>(ceil_div(p.N, lanes));
  const int64_t b = blockIdx.x / tiles;
  const int lane = threadIdx.x % lanes, first = threadIdx.x / lanes, rows = kThreads / lanes;
  const int64_t n = int64_t{blockIdx.x % tiles} * lanes + lane;
  const int positions = n < p.N ? p.positions() : 0, step = rows * kItems;
  T value[kItems];
  const auto load = [&](int base) {
    const T* x = p.in.data + b * p.in.batch + n * p.in.channel;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int at = base + i * rows + first;
      if (at < positions) value[i] = x[at * p.in.position];
    }
  };
  load(0);
  int found = 0;
  if constexpr (kFindPeak) {
    __shared__ Peak<A> peaks[kThreads];
    auto peak = Peak<A>::none();
    for (int base = 0; base < positions; base += step) {
      if (base > 0) load(base);
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const int at = base + i * rows + first;
        if (at < positions) peak.include(static_cast<A>(value[i]), at);
      }
    }
    peaks[threadIdx.x] = peak;
    for (int half = rows / 2; half > 0; half /= 2) {
      __syncthreads();
      if (first >= half) continue;
      const Peak<A> other = peaks[threadIdx.x + half * lanes];
      peak.include(other.value, other.position);
      peaks[threadIdx.x] = peak;
    }
    __syncthreads();
    found = peaks[lane].position;
    if (n < p.N && first == 0) p.peak[b * p.peak_batch + n * p.peak_channel] = found;
    if (positions > step) load(0);
  } else if (n < p.N) {
    found = p.peak_given(b, n);
  }
  const int row = found / p.shape.width, column = found % p.shape.width;
  T* y = p.out.data + b * p.out.batch + n * p.out.channel;
  for (int base = 0; base < positions; base += step) {
    if (base > 0) load(base);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int at = base + i * rows + first;
      if (at < positions) y[at * p.out.position] = p.masked(value[i], at, row, column);
    }
  }
}

// ---- Launching --------------------------------------------------------------------------------

template <typename T, bool kFindPeak>
void mask(const Tensor& x, const Tensor& masked, const Tensor& peak,
          const Template<Accumulate<T>>& shape, double scale) {
  const int64_t B = x.size(0), N = x.size(1), P = positions(x);
  if (B == 0 || N == 0) return;
  const Mask<T> p = {input_maps<T>(x),
                     output_maps<T>(masked),
                     static_cast<int64_t*>(peak.data_ptr()),
                     peak.stride(0),
                     peak.stride(1),
                     shape,
                     static_cast<Accumulate<T>>(scale),
                     B,
                     N};
  if (N > 1 && P > 1 && p.in.channel == 1 && p.in.position != 1) {
    int lanes = 128 / sizeof(T);  // one line of memory
    while (lanes / 2 >= N) lanes /= 2;
    const int64_t blocks = B * ceil_div(N, lanes);
    if (P <= 8 * (kThreads / lanes))
      launch(x, mask_channels_last<T, kFindPeak, 8>, blocks, kThreads, 0, p, lanes);
    else
      launch(x, mask_channels_last<T, kFindPeak, 32>, blocks, kThreads, 0, p, lanes);
    return;
  }
  const auto with_warps = [&](auto* kernel, int64_t maps) {
    launch(x, kernel, ceil_div(B * N, kWarps * maps), kThreads, 0, p);
  };
  if (P <= 2 * 32)
    with_warps(mask_maps<T, kFindPeak, 32, 4, 2>, 4);
  else if (P <= 8 * 32)
    with_warps(mask_maps<T, kFindPeak, 32, 1, 8>, 1);
  else
    launch(x, mask_maps<T, kFindPeak, kThreads, 1, 16>, B * N, kThreads, 0, p);
}

void check_maps(const Tensor& maps, const char* name) {
  STD_TORCH_CHECK(maps.dim() == 4, "picnn_fast: ", name, " must be [B, N, h, w]");
}

std::tuple<Tensor, Tensor> template_mask(const Tensor& x, const std::optional<Tensor>& table,
                                         int64_t profile, int64_t norm, double slope, int64_t limit,
                                         double scale) {
  check_maps(x, "x");
  Tensor masked = torch::stable::empty_like(x);
  Tensor peak = torch::stable::new_empty(x, {x.size(0), x.size(1)}, ScalarType::Long);
  with_type(x, "x", [&](auto value) {
    using T = decltype(value);
    const auto shape = read_template<Accumulate<T>>(x, table, profile, norm, slope, limit);
    mask<T, true>(x, masked, peak, shape, scale);
  });
  return {masked, peak};
}

Tensor template_mask_backward(const Tensor& grad_masked, const Tensor& peak,
                              const std::optional<Tensor>& table, int64_t profile, int64_t norm,
                              double slope, int64_t limit, double scale) {
  check_maps(grad_masked, "grad_masked");
  check_device(peak, "peak", grad_masked, "grad_masked");
  STD_TORCH_CHECK(peak.scalar_type() == ScalarType::Long && peak.dim() == 2 &&
                      peak.size(0) == grad_masked.size(0) && peak.size(1) == grad_masked.size(1),
                  "picnn_fast: peak must be int64 [B, N]");
  Tensor grad = torch::stable::empty_like(grad_masked);
  with_type(grad_masked, "grad_masked", [&](auto value) {
    using T = decltype(value);
    const auto shape =
        read_template<Accumulate<T>>(grad_masked, table, profile, norm, slope, limit);
    mask<T, false>(grad_masked, grad, peak, shape, scale);
  });
  return grad;
}

}  // namespace
}  // namespace picnn_fast

PICNN_FAST_REGISTER_CUDA(m) {
  m.impl("template_mask", TORCH_BOX(&picnn_fast::template_mask));
  m.impl("template_mask_backward", TORCH_BOX(&picnn_fast::template_mask_backward));
}
