// CUDA kernels of the template family. picnn_fast/reference/templates.py is the definition.
//
// The mask layer reads a map once: its values wait in registers while the peak is looked for. Maps
// are [B, N, positions]; the kernels differ in what lies side by side in memory:
//   mask_maps           positions, or nothing: 8 lanes for each map, a warp or a block for larger
//   ones; several positions at a time, where maps are aligned.
//   mask_channels_last  channels: a thread for each channel and several of its positions.
// Maps too large for the registers of their threads are read a second time. The backward pass is
// the same without the search, and peaks alone without the mask. Threads side by side along a map
// read values of the template side by side; those of a channel each read them anywhere: from shared
// memory, where it has room.

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <climits>
#include <cstring>
#include <optional>
#include <tuple>
#include <type_traits>

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
  const int64_t *labels, *categories;  // of images and channels, or null; of peaks alone
  int64_t label_batch, category_channel;

  __device__ int positions() const { return part.offsets.positions(); }
  __device__ int peak_given(int64_t b, int64_t n) const {
    const int64_t position = peak[b * peak_batch + n * peak_channel];
    PICNN_FAST_DEVICE_ASSERT(0 <= position && position < positions());
    return static_cast<int>(position);
  }
  template <Work kWork>
  __device__ void store_peak(int64_t b, int64_t n, int found) const {
    if constexpr (!kMasks<kWork>) {
      // Behind the last position where the image is of another category than the channel.
      if (labels != nullptr && labels[b * label_batch] != categories[n * category_channel])
        found = positions();
    }
    peak[b * peak_batch + n * peak_channel] = found;
  }
  // `value`: of the template, in units of tau.
  __device__ T masked(T x, A value) const {
    return static_cast<T>(static_cast<A>(x) * mask_value(value, scale));
  }
};

// The numbers of positions that lie `step` apart, as Offsets gives them; one division to begin
// with.
struct Walk {
  int number, column;
  int width, step_number, step_column;

  // step_rows: step / width.
  __device__ Walk(const Offsets& offsets, int first, int step, int step_rows)
      : number(offsets.number(first)),
        column(first % offsets.width),
        width(offsets.width),
        step_number(step + step_rows * (offsets.width - 1)),
        step_column(step - step_rows * offsets.width) {}
  __device__ void advance() {
    number += step_number;
    column += step_column;
    if (column >= width) column -= width, number += width - 1;
  }
  // That of the position `ahead`, at most a row further.
  __device__ int number_ahead(int ahead) const {
    return number + ahead + (ahead > 0 && column + ahead >= width ? width - 1 : 0);
  }
};

// A key that orders as values do, with NaN above all else and one zero; above 0.
template <typename A>
__device__ auto order_key(A x) {
  using Bits = std::conditional_t<sizeof(A) == 8, uint64_t, uint32_t>;
  constexpr Bits kSign = Bits{1} << (8 * sizeof(A) - 1);
  const A value = x + A{0};
  Bits bits;
  memcpy(&bits, &value, sizeof(bits));
  const Bits flip = (bits & kSign) != 0 ? ~Bits{0} : kSign;
  return x != x ? ~Bits{0} : bits ^ flip;
}

// The greatest value so far; of equals, the first position counts.
template <typename A>
struct Peak {
  using Key = std::conditional_t<sizeof(A) == 4, uint32_t, uint64_t>;
  Key key;
  int position;

  static __device__ Peak none() { return {0, INT_MAX}; }
  // A value at a position behind those before.
  __device__ void include_next(A value, int at) {
    const Key other = order_key(value);
    position = other > key ? at : position;
    key = max(key, other);
  }
  __device__ void include(const Peak& other) {
    if (other.key > key || (other.key == key && other.position < position)) *this = other;
  }
  // That of each kLanes neighbours of a warp, for all of them.
  template <int kLanes>
  __device__ void include_lanes() {
    if constexpr (kLanes == 32 && sizeof(A) == 4) {
      const uint32_t most = __reduce_max_sync(kFullWarp, key);
      const unsigned at = key == most ? position : INT_MAX;
      position = static_cast<int>(__reduce_min_sync(kFullWarp, at));
      key = most;
    } else {
      for (int offset = kLanes / 2; offset > 0; offset /= 2) {
        const Key other = __shfl_xor_sync(kFullWarp, key, offset);
        include({other, __shfl_xor_sync(kFullWarp, position, offset)});
      }
    }
  }
};

// Blocks of a multiprocessor such that the values of its threads stay in registers.
template <typename T, int kItems>
constexpr int kBlocksOf = kItems * sizeof(Accumulate<T>) <= 32    ? 4
                          : kItems * sizeof(Accumulate<T>) <= 128 ? 2
                                                                  : 1;

// A map for each kLanes threads: a part of a warp, a warp, or a block. They read and write W
// positions at a time, which then lie side by side, in rows no shorter.
template <typename T, Work kWork, int kLanes, int kItems, int W>
__global__ void __launch_bounds__(kThreads, kBlocksOf<T, kItems * W>)
    mask_maps(Mask<T> p, int lanes_rows) {
  using A = Accumulate<T>;
  using Items = Vector<T, W>;
  static_assert(kLanes <= 32 || kLanes == kThreads);
  constexpr int kStep = kLanes * kItems;
  constexpr bool kWhole = kLanes < kThreads;  // maps have at most kStep times W positions
  const int lane = threadIdx.x % kLanes;
  const int64_t map = int64_t{blockIdx.x} * (kThreads / kLanes) + threadIdx.x / kLanes;
  const int64_t b = map / p.N, n = map % p.N;
  // Lanes without a map take part in the search of their warp.
  const int count = b < p.B ? p.positions() / W : 0;
  const T* x = p.in.data + b * p.in.batch + n * p.in.channel;
  Items value[kItems];
  const auto load = [&](int base) {
    const T* from = x + (base + lane) * W * p.in.position;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (base + i * kLanes + lane < count) value[i] = *reinterpret_cast<const Items*>(from);
      from += kLanes * W * p.in.position;
    }
  };
  load(0);
  int found = 0;
  if constexpr (kFinds<kWork>) {
    auto peak = Peak<A>::none();
    for (int base = 0; base < (kWhole ? 1 : count); base += kStep) {
      if (base > 0) load(base);
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const int at = base + i * kLanes + lane;
        if (at >= count) continue;
#pragma unroll
        for (int e = 0; e < W; ++e) peak.include_next(static_cast<A>(value[i].lane[e]), at * W + e);
      }
    }
    peak.template include_lanes<(kLanes < 32 ? kLanes : 32)>();
    if constexpr (kLanes > 32) {
      __shared__ Peak<A> warp_peak[kWarps];
      if (threadIdx.x % 32 == 0) warp_peak[threadIdx.x / 32] = peak;
      __syncthreads();
      for (int w = 0; w < kWarps; ++w) peak.include(warp_peak[w]);
    }
    if (count == 0) return;
    found = peak.position;
    if (lane == 0) p.template store_peak<kWork>(b, n, found);
    if (kMasks<kWork> && !kWhole && count > kStep) load(0);
  } else {
    if (count == 0) return;
    found = p.peak_given(b, n);
  }
  if constexpr (kMasks<kWork>) {
    const Offsets& offsets = p.part.offsets;
    const A* from_peak = p.part.values + offsets.middle() - offsets.number(found);
    T* y = p.out.data + b * p.out.batch + n * p.out.channel;
    Walk walk(offsets, lane * W, kLanes * W, lanes_rows);
    for (int base = 0; base < (kWhole ? 1 : count); base += kStep) {
      if (base > 0) load(base);
      T* to = y + (base + lane) * W * p.out.position;
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        if (base + i * kLanes + lane < count) {
#pragma unroll
          for (int e = 0; e < W; ++e)
            value[i].lane[e] = p.masked(value[i].lane[e], from_peak[walk.number_ahead(e)]);
          *reinterpret_cast<Items*>(to) = value[i];
        }
        to += kLanes * W * p.out.position;
        walk.advance();
      }
    }
  }
}

// A block holds `lanes` channels of a sample side by side; its kThreads / lanes rows of them walk
// down the positions.
template <typename T, Work kWork, int kItems>
__global__ void __launch_bounds__(kThreads, kBlocksOf<T, kItems>)
    mask_channels_last(Mask<T> p, int lanes, int rows_rows, bool copy_values) {
  using A = Accumulate<T>;
  const unsigned tiles = static_cast<unsigned>(ceil_div(p.N, lanes));
  const int64_t b = blockIdx.x / tiles;
  const int lane = threadIdx.x % lanes, first = threadIdx.x / lanes, rows = kThreads / lanes;
  const int64_t n = int64_t{blockIdx.x % tiles} * lanes + lane;
  const int positions = n < p.N ? p.positions() : 0, step = rows * kItems;
  T value[kItems];
  const auto load = [&](int base) {
    const T* from = p.in.data + b * p.in.batch + n * p.in.channel + (base + first) * p.in.position;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (base + i * rows + first < positions) value[i] = *from;
      from += rows * p.in.position;
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
        if (at < positions) peak.include_next(static_cast<A>(value[i]), at);
      }
    }
    peaks[threadIdx.x] = peak;
    for (int half = rows / 2; half > 0; half /= 2) {
      __syncthreads();
      if (first >= half) continue;
      peak.include(peaks[threadIdx.x + half * lanes]);
      peaks[threadIdx.x] = peak;
    }
    __syncthreads();
    found = peaks[lane].position;
    if (n < p.N && first == 0) p.template store_peak<kWork>(b, n, found);
    if (kMasks<kWork> && positions > step) load(0);
  } else if (n < p.N) {
    found = p.peak_given(b, n);
  }
  if constexpr (!kMasks<kWork>) return;
  const A* from_peak = middle - p.part.offsets.number(found);
  T* y = p.out.data + b * p.out.batch + n * p.out.channel;
  Walk walk(p.part.offsets, first, rows, rows_rows);
  for (int base = 0; base < positions; base += step) {
    if (base > 0) load(base);
    T* to = y + (base + first) * p.out.position;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (base + i * rows + first < positions) *to = p.masked(value[i], from_peak[walk.number]);
      to += rows * p.out.position;
      walk.advance();
    }
  }
}

// ---- Launching --------------------------------------------------------------------------------

// Whether all maps consist of whole, aligned vectors of W positions.
template <int W, typename T>
bool consists_of_vectors(const Maps<T>& maps) {
  return maps.position == 1 && maps.batch % W == 0 && maps.channel % W == 0 &&
         reinterpret_cast<uintptr_t>(maps.data) % sizeof(Vector<T, W>) == 0;
}
template <Work kWork, int W, typename T>
bool in_vectors(const Mask<T>& p) {
  const Offsets& offsets = p.part.offsets;
  return offsets.positions() % W == 0 && offsets.width >= W && consists_of_vectors<W>(p.in) &&
         (!kMasks<kWork> || consists_of_vectors<W>(p.out));
}

template <Work kWork, int W, typename T>
void launch_maps(const Tensor& x, const Mask<T>& p) {
  const int64_t positions = p.part.offsets.positions();
  const auto with_lanes = [&](auto* kernel, int lanes) {
    launch(x, kernel, ceil_div(p.B * p.N, kThreads / lanes), kThreads, 0, p,
           lanes * W / p.part.offsets.width);
  };
  if (positions <= 8 * 8 * W)
    with_lanes(mask_maps<T, kWork, 8, 8, W>, 8);
  else if (positions <= 8 * 32 * W)
    with_lanes(mask_maps<T, kWork, 32, 8, W>, 32);
  else
    with_lanes(mask_maps<T, kWork, kThreads, 16 / W, W>, kThreads);
}

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
    const int rows = kThreads / lanes, rows_rows = rows / p.part.offsets.width;
    if (positions <= 8 * rows)
      launch(x, mask_channels_last<T, kWork, 8>, blocks, kThreads, shared, p, lanes, rows_rows,
             copy);
    else
      launch(x, mask_channels_last<T, kWork, 32>, blocks, kThreads, shared, p, lanes, rows_rows,
             copy);
    return;
  }
  constexpr int W = sizeof(T) == 8 ? 2 : 4;
  if (positions > 8 * 8 && in_vectors<kWork, W>(p))
    launch_maps<kWork, W>(x, p);
  else
    launch_maps<kWork, 1>(x, p);
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

const int64_t* categories_of(const Tensor& t, const char* name, const Tensor& x, int64_t count) {
  check_device(t, name, x, "x");
  check_shape(t, name, {count});
  check_type(t, name, ScalarType::Long, "int64");
  return static_cast<const int64_t*>(t.data_ptr());
}

Tensor map_peaks(const Tensor& x, const std::optional<Tensor>& labels,
                 const std::optional<Tensor>& filter_category) {
  STD_TORCH_CHECK(labels.has_value() == filter_category.has_value(),
                  "labels, filter_category: want both or neither");
  const Tensor peak = empty_peaks(x);
  with_type(x, "x", [&](auto value) {
    auto p = on_maps<decltype(value)>(x, peak);
    p.part.offsets = offsets_of_maps(x, "x");
    if (labels.has_value()) {
      p.labels = categories_of(*labels, "labels", x, x.size(0));
      p.label_batch = labels->stride(0);
      p.categories = categories_of(*filter_category, "filter_category", x, x.size(1));
      p.category_channel = filter_category->stride(0);
    }
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
