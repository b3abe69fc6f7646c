// CUDA kernels of the template family. picnn_fast/reference/templates.py is the definition.
//
// The mask layer reads a map once: its values wait in registers while the peak is looked for. Maps
// are [B, N, positions]; the kernels differ in what lies side by side in memory:
//   mask_maps           positions, or nothing: a warp for each map, a block for a large one.
//   mask_channels_last  channels: a thread for each channel and several of its positions.
// Maps too large for the registers of their threads are read a second time. The backward pass is
// the same without the search, and peaks alone without the mask. Threads side by side along a map
// read values of the template side by side; those of a channel each read them anywhere: from shared
// memory, where it has room.

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <climits>
#include <cmath>
#include <tuple>

#include "../common/read_template.h"
#include "../common/templates.h"
#include "launch.h"
#include "maps.h"

namespace picnn_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// What a kernel does with the peaks: finds them, masks by those given, or finds them and masks.
enum class Work { kPeaks, kMask, kBoth };
template <Work kWork>
constexpr bool kFinds = kWork != Work::kMask;
template <Work kWork>
constexpr bool kMasks = kWork != Work::kPeaks;

template <typename T>
struct Mask {
  using A = Accumulate<T>;
  Maps<const T> in;
  Maps<T> out;
  int64_t* peak;  // written where it is looked for
  int64_t peak_batch, peak_channel;
  Template<A> part;  // no values where only peaks are found
  A scale;
  int64_t B, N;

  __device__ int positions() const { return part.offsets.positions(); }
  __device__ int peak_given(int64_t b, int64_t n) const {
    const int64_t position = peak[b * peak_batch + n * peak_channel];
    PICNN_FAST_DEVICE_ASSERT(0 <= position && position < positions());
    return static_cast<int>(position);
  }
  // `middle`: the value at offset 0, in the template's values or a copy. `peak`: its number.
  __device__ T masked(T x, int position, const A* middle, int peak) const {
    const A value = middle[part.offsets.number(position) - peak];
    return static_cast<T>(static_cast<A>(x) * mask_value(value, scale));
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
template <typename T, Work kWork, int kLanes, int kMaps, int kItems>
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
    if constexpr (kFinds<kWork>) {
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
      if (kMasks<kWork> && positions > kStep) load(m, 0);
    } else {
      found = p.peak_given(b, n);
    }
    if constexpr (!kMasks<kWork>) continue;
    const A* middle = p.part.values + p.part.offsets.middle();
    const int number = p.part.offsets.number(found);
    T* y = p.out.data + b * p.out.batch + n * p.out.channel;
    for (int base = 0; base < positions; base += kStep) {
      if (base > 0) load(m, base);
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const int at = base + i * kLanes + lane;
        if (at < positions) y[at * p.out.position] = p.masked(value[m][i], at, middle, number);
      }
    }
  }
}

// A block holds `lanes` channels of a sample side by side; its kThreads / lanes rows of them walk
// down the positions.
template <typename T, Work kWork, int kItems>
__global__ void __launch_bounds__(kThreads, kItems <= 8 ? 4 : 2)
    mask_channels_last(Mask<T> p, int lanes, bool copy_values) {
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
  const A* middle = p.part.values + p.part.offsets.middle();
  if (kMasks<kWork> && copy_values) {
    A* values = dynamic_shared<A>();
    const int count = static_cast<int>(p.part.offsets.count());
    for (int i = threadIdx.x; i < count; i += kThreads) values[i] = p.part.values[i];
    middle = values + p.part.offsets.middle();
    __syncthreads();
  }
  int found = 0;
  if constexpr (kFinds<kWork>) {
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
    if (kMasks<kWork> && positions > step) load(0);
  } else if (n < p.N) {
    found = p.peak_given(b, n);
  }
  if constexpr (!kMasks<kWork>) return;
  const int number = p.part.offsets.number(found);
  T* y = p.out.data + b * p.out.batch + n * p.out.channel;
  for (int base = 0; base < positions; base += step) {
    if (base > 0) load(base);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int at = base + i * rows + first;
      if (at < positions) y[at * p.out.position] = p.masked(value[i], at, middle, number);
    }
  }
}

// ---- Launching --------------------------------------------------------------------------------

template <Work kWork, typename T>
void launch_mask(const Tensor& x, const Mask<T>& p) {
  const int64_t positions = p.part.offsets.positions();
  if (p.N > 1 && positions > 1 && p.in.channel == 1 && p.in.position != 1) {
    constexpr int64_t kMostCopied = 16 << 10;  // bytes of values: leaves room for other blocks
    int lanes = 128 / sizeof(T);               // one line of memory
    while (lanes / 2 >= p.N) lanes /= 2;
    const int64_t blocks = p.B * ceil_div(p.N, lanes);
    const int64_t bytes = p.part.offsets.count() * static_cast<int64_t>(sizeof(Accumulate<T>));
    const bool copy = kMasks<kWork> && bytes <= kMostCopied;
    const size_t shared = copy ? bytes : 0;
    if (positions <= 8 * (kThreads / lanes))
      launch(x, mask_channels_last<T, kWork, 8>, blocks, kThreads, shared, p, lanes, copy);
    else
      launch(x, mask_channels_last<T, kWork, 32>, blocks, kThreads, shared, p, lanes, copy);
    return;
  }
  const auto with_warps = [&](auto* kernel, int64_t maps) {
    launch(x, kernel, ceil_div(p.B * p.N, kWarps * maps), kThreads, 0, p);
  };
  if (positions <= 2 * 32)
    with_warps(mask_maps<T, kWork, 32, 4, 2>, 4);
  else if (positions <= 8 * 32)
    with_warps(mask_maps<T, kWork, 32, 1, 8>, 1);
  else
    launch(x, mask_maps<T, kWork, kThreads, 1, 16>, p.B * p.N, kThreads, 0, p);
}

// The maps and their peaks, and no template yet.
template <typename T>
Mask<T> on_maps(const Tensor& x, const Tensor& peak) {
  Mask<T> p{};
  p.in = input_maps<T>(x);
  p.peak = static_cast<int64_t*>(peak.data_ptr());
  p.peak_batch = peak.stride(0);
  p.peak_channel = peak.stride(1);
  p.B = x.size(0);
  p.N = x.size(1);
  return p;
}

template <Work kWork>
Tensor mask(const Tensor& x, const char* name, const Tensor& peak, const Tensor& offsets,
            double scale) {
  Tensor masked = torch::stable::empty_like(x);
  with_type(x, name, [&](auto value) {
    using T = decltype(value);
    auto p = on_maps<T>(x, peak);
    p.part = read_template<Accumulate<T>>(x, name, offsets);
    p.scale = static_cast<Accumulate<T>>(scale);
    p.out = output_maps<T>(masked);
    if (x.numel() > 0) launch_mask<kWork>(x, p);
  });
  return masked;
}

Tensor empty_peaks(const Tensor& x) {
  offsets_of_maps(x, "x");
  return torch::stable::new_empty(x, {x.size(0), x.size(1)}, ScalarType::Long);
}

Tensor map_peaks(const Tensor& x) {
  const Tensor peak = empty_peaks(x);
  with_type(x, "x", [&](auto value) {
    auto p = on_maps<decltype(value)>(x, peak);
    p.part.offsets = offsets_of_maps(x, "x");
    if (x.numel() > 0) launch_mask<Work::kPeaks>(x, p);
  });
  return peak;
}

std::tuple<Tensor, Tensor> template_mask(const Tensor& x, const Tensor& offsets, double scale) {
  const Tensor peak = empty_peaks(x);
  return {mask<Work::kBoth>(x, "x", peak, offsets, scale), peak};
}

Tensor template_mask_backward(const Tensor& grad_masked, const Tensor& peak, const Tensor& offsets,
                              double scale) {
  offsets_of_maps(grad_masked, "grad_masked");
  check_device(peak, "peak", grad_masked, "grad_masked");
  check_shape(peak, "peak", {grad_masked.size(0), grad_masked.size(1)});
  check_type(peak, "peak", ScalarType::Long, "int64");
  return mask<Work::kMask>(grad_masked, "grad_masked", peak, offsets, scale);
}

}  // namespace
}  // namespace picnn_fast

PICNN_FAST_REGISTER_CUDA(m) {
  m.impl("map_peaks", TORCH_BOX(&picnn_fast::map_peaks));
  m.impl("template_mask", TORCH_BOX(&picnn_fast::template_mask));
  m.impl("template_mask_backward", TORCH_BOX(&picnn_fast::template_mask_backward));
}
