// Compiled once for each instruction set: setup.py passes PICNN_FAST_NAMESPACE and
// PICNN_FAST_KERNELS. Only headers whose functions live in that namespace may be included.
#include "masking_kernels.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../common/masking.h"
#include "masking_rows.h"
#include "philox_simd.h"
#include "scalar.h"
#include "streaming.h"
#include "vector.h"

namespace PICNN_FAST_NAMESPACE {
namespace {

using picnn_fast::DrawFilters;
using picnn_fast::DrawLabels;
using picnn_fast::FilterKernels;
using picnn_fast::MapKernels;
using picnn_fast::MaskingBackward;
using picnn_fast::ParameterKernels;
using picnn_fast::ParametersBackward;
using picnn_fast::ScaleMaps;
using picnn_fast::Strides;
using picnn_fast::Units;

// The step is a constant where logits are contiguous, so that the loops vectorise; the maximum is
// kept in lanes for the same reason.
template <typename L, typename Step>
PICNN_FAST_HD int64_t weigh_classes(const L* logits, Step step, int64_t classes, int64_t* weights) {
  constexpr L infinity = std::numeric_limits<L>::infinity();
  constexpr int kMaxima = 16;
  const auto logit = [&](int64_t k) {
    const L x = logits[k * step];
    return x != x ? infinity : x;
  };
  L maxima[kMaxima];
  for (int l = 0; l < kMaxima; ++l) {
    maxima[l] = -infinity;
  }
  int64_t k = 0;
  for (; k + kMaxima <= classes; k += kMaxima) {
    for (int l = 0; l < kMaxima; ++l) {
      const L x = logit(k + l);
      maxima[l] = x > maxima[l] ? x : maxima[l];
    }
  }
  for (; k < classes; ++k) {
    const L x = logit(k);
    maxima[0] = x > maxima[0] ? x : maxima[0];
  }
  L maximum = -infinity;
  for (int l = 0; l < kMaxima; ++l) {
    maximum = maxima[l] > maximum ? maxima[l] : maximum;
  }
  int64_t total = 0;
  for (k = 0; k < classes; ++k) {
    const int64_t weight = softmax_weight(static_cast<float>(logit(k) - maximum));
    weights[k] = weight;
    total += weight;
  }
  return total;
}

template <typename L>
int64_t draw_label(const L* logits, int64_t stride, int64_t classes, uint32_t bits,
                   int64_t* weights) {
  const int64_t total =
      stride == 1 ? weigh_classes(logits, std::integral_constant<int64_t, 1>{}, classes, weights)
                  : weigh_classes(logits, stride, classes, weights);
  const int64_t threshold = cdf_threshold(bits, total);
  int64_t cumulative = 0;
  for (int64_t k = 0; k < classes; ++k) {
    cumulative += weights[k];
    if (cumulative > threshold) {
      return k;
    }
  }
  return classes - 1;
}

template <typename L>
void draw_labels(const DrawLabels<L>& d, int64_t begin, int64_t end, int64_t* scratch) {
  for (int64_t b = begin; b < end; ++b) {
    const uint32_t bits = random_24_bits(b, d.seed, Stream::kLabel, d.rank);
    d.labels[b] =
        draw_label(d.logits + b * d.sample_stride, d.class_stride, d.classes, bits, scratch);
  }
}

template <typename P, typename A>
void draw_filters(const DrawFilters<P, A>& d, int64_t begin, int64_t end) {
  constexpr int64_t kRun = 512;
  uint32_t draws[kRun];
  for (int64_t b = begin; b < end; ++b) {
    const int64_t row = d.rows != nullptr ? d.rows[b] : b;
    const P* __restrict__ p = d.probabilities + row * d.row_stride;
    const int64_t stride = d.filter_stride;
    A* __restrict__ mask = d.mask + b * d.filters;
    const uint64_t first = static_cast<uint64_t>(b) * static_cast<uint64_t>(d.filters);
    for (int64_t begin_run = 0; begin_run < d.filters; begin_run += kRun) {
      const int64_t count = d.filters - begin_run < kRun ? d.filters - begin_run : kRun;
      random_24_bits_run(draws, count, first + static_cast<uint64_t>(begin_run), d.seed,
                         Stream::kFilter, d.rank);
      const P* __restrict__ run = p + begin_run * stride;
      const auto keep = [&](auto step) {  // a constant where rows are contiguous: vectorises
        for (int64_t i = 0; i < count; ++i) {
          mask[begin_run + i] = keeps_filter<P>(draws[i], run[i * step]) ? A{1} : A{0};
        }
      };
      stride == 1 ? keep(std::integral_constant<int64_t, 1>{}) : keep(stride);
    }
  }
}

template <typename T, typename A>
PICNN_FAST_HD T scaled(T x, A mask) {
  return mask == A{0} ? T{} : narrow<T>(static_cast<A>(widen(x) * mask));
}

template <typename T, typename A, bool kBinary>
PICNN_FAST_HD T masked(T x, A mask) {
  if constexpr (kBinary) {
    return mask == A{0} ? T{} : x;
  } else {
    return scaled(x, mask);
  }
}

// One sample, filters [begin, end).
struct Unit {
  int64_t batch, begin, end;
};

Unit unit(const Units& units, int64_t index, int64_t filters) {
  const int64_t begin = index % units.blocks * units.filters;
  const int64_t end = begin + units.filters;
  return {index / units.blocks, begin, end < filters ? end : filters};
}

// How many rows of `length` elements to write between two flushes of a sink.
template <typename T>
int64_t rows_at_once(int64_t length) {
  return length > 0 && length < Sink<T>::kPreferred ? Sink<T>::kPreferred / length : 1;
}

// Kept rows lie far apart, where the processor does not foresee them: ask for those among the next
// few ahead of time.
template <typename T, typename A>
PICNN_FAST_HD void prefetch_rows(const T* x, int64_t stride, int64_t positions, const A* mask,
                                 int64_t begin, int64_t end) {
  constexpr int64_t kLine = 64, kMostLines = 128;
  const int64_t bytes = positions * static_cast<int64_t>(sizeof(T));
  const int64_t stop = begin + rows_at_once<T>(positions);
  int64_t lines = 0;
  for (int64_t i = begin; i < end && i < stop && lines < kMostLines; ++i) {
    if (mask[i] != A{0}) {
      const char* row = reinterpret_cast<const char*>(x + i * stride);
      for (int64_t at = 0; at < bytes && lines < kMostLines; at += kLine, ++lines) {
        __builtin_prefetch(row + at);
      }
    }
  }
}

// Whether so many rows are dropped that it pays to look which, rather than to read them all.
template <typename A>
PICNN_FAST_HD bool mostly_dropped(const A* mask, int64_t begin, int64_t end) {
  int64_t dropped = 0;
  for (int64_t i = begin; i < end; ++i) {
    dropped += mask[i] == A{0} ? 1 : 0;
  }
  return 4 * dropped > end - begin;
}

// Rows [begin, end) of one sample, densely into `out`. Where many are dropped, as by a Bernoulli
// mask, clear them all at once, and do not even read them.
template <typename T, typename A, bool kBinary>
PICNN_FAST_HD void scale_rows(const T* x, int64_t stride, T* __restrict__ out, int64_t positions,
                              const A* mask, int64_t begin, int64_t end) {
  const bool clear = mostly_dropped(mask, begin, end);
  if (clear) {
    std::memset(static_cast<void*>(out), 0, (end - begin) * positions * sizeof(T));
  }
  for (int64_t i = begin; i < end; ++i, out += positions) {
    const A m = mask[i];
    const T* __restrict__ row = x + i * stride;
    if (m == A{0}) {
      if (!clear) {
        std::memset(static_cast<void*>(out), 0, positions * sizeof(T));
      }
    } else if (kBinary || m == A{1}) {
      std::memcpy(static_cast<void*>(out), row, positions * sizeof(T));
    } else {
      for (int64_t p = 0; p < positions; ++p) {
        out[p] = narrow<T>(static_cast<A>(widen(row[p]) * m));
      }
    }
  }
}

template <typename T, bool kBinary>
PICNN_FAST_HD void scale_channels_last(const ScaleMaps<T>& s, const Unit& u, Sink<T>& sink) {
  using A = Accumulate<T>;
  const int64_t positions = s.shape.positions;
  const A* __restrict__ mask = s.mask + u.batch * s.shape.filters + u.begin;
  const T* x = s.maps + u.batch * s.maps_strides.batch + u.begin;
  T* out = s.out + u.batch * s.out_strides.batch + u.begin;
  const int64_t width = u.end - u.begin;
  const int64_t step = s.out_strides.position == width ? rows_at_once<T>(width) : 1;
  for (int64_t p = 0; p < positions; p += step) {
    const int64_t rows = step < positions - p ? step : positions - p;
    T* stretch = sink.open(out + p * s.out_strides.position, rows * width);
    for (int64_t r = 0; r < rows; ++r) {
      const T* __restrict__ row = x + (p + r) * s.maps_strides.position;
      T* __restrict__ out_row = stretch + r * width;
      for (int64_t i = 0; i < width; ++i) {
        out_row[i] = masked<T, A, kBinary>(row[i], mask[i]);
      }
    }
    sink.close();
  }
}

template <typename T, bool kBinary>
PICNN_FAST_HD void scale_contiguous(const ScaleMaps<T>& s, const Unit& u, Sink<T>& sink) {
  using A = Accumulate<T>;
  const int64_t positions = s.shape.positions, stride = s.maps_strides.filter;
  const A* mask = s.mask + u.batch * s.shape.filters;
  const T* x = s.maps + u.batch * s.maps_strides.batch;
  T* out = s.out + u.batch * s.out_strides.batch;
  const int64_t step = rows_at_once<T>(positions);
  for (int64_t first = u.begin; first < u.end; first += step) {
    const int64_t last = first + step < u.end ? first + step : u.end;
    T* stretch = sink.open(out + first * positions, (last - first) * positions);
    prefetch_rows(x, stride, positions, mask, last, u.end);
    scale_rows<T, A, kBinary>(x, stride, stretch, positions, mask, first, last);
    sink.close();
  }
}

template <typename T, bool kBinary>
PICNN_FAST_HD void scale_strided(const ScaleMaps<T>& s, const Unit& u) {
  using A = Accumulate<T>;
  const Strides from = s.maps_strides, to = s.out_strides;
  const A* mask = s.mask + u.batch * s.shape.filters;
  const T* x = s.maps + u.batch * from.batch;
  T* out = s.out + u.batch * to.batch;
  for (int64_t i = u.begin; i < u.end; ++i) {
    for (int64_t p = 0; p < s.shape.positions; ++p) {
      out[i * to.filter + p * to.position] =
          masked<T, A, kBinary>(x[i * from.filter + p * from.position], mask[i]);
    }
  }
}

// Past the caches in whole vectors, where a unit's maps allow it.
template <typename T, bool kBinary>
PICNN_FAST_HD bool stream_scaled(const ScaleMaps<T>& s, const Unit& u) {
  if constexpr (kBinary || std::is_same_v<T, Accumulate<T>>) {
    using Kind = std::conditional_t<kBinary, KeepNumbers<T>, ScaleNumbers<T>>;
    const Strides from = s.maps_strides, to = s.out_strides;
    const int64_t positions = s.shape.positions, filters = u.end - u.begin;
    const T* x = s.maps + u.batch * from.batch + u.begin * from.filter;
    T* out = s.out + u.batch * to.batch + u.begin * to.filter;
    const Accumulate<T>* mask = s.mask + u.batch * s.shape.filters + u.begin;
    if (from.filter == 1 && to.filter == 1 && fills_lines(out, to.position, filters)) {
      for (int64_t i = 0; i < filters; i += kFiltersInLines) {
        const int64_t count = kFiltersInLines < filters - i ? kFiltersInLines : filters - i;
        write_lines<T, Kind>(x + i, from.position, out + i, to.position, positions, mask + i,
                             count);
      }
      return true;
    }
    if (from.position == 1 && to.position == 1 && from.filter == positions &&
        to.filter == positions && positions > 0) {
      if constexpr (kBinary) {
        write_kept<T>(x, out, positions, mask, filters);
        return true;
      } else if (positions >= kLanes<T> && !mostly_dropped(mask, 0, filters)) {
        const int64_t ahead = 2 * rows_at_once<T>(positions);
        write_scaled<T>(x, out, positions, mask, filters,
                        [&](int64_t i) { prefetch_row(x + (i + ahead) * positions, positions); });
        return true;
      }
    }
  }
  return false;
}

template <typename T, bool kBinary>
void scale(const ScaleMaps<T>& s, int64_t begin, int64_t end) {
  const Strides from = s.maps_strides, to = s.out_strides;
  const bool channels_last = from.filter == 1 && to.filter == 1;
  const bool contiguous = from.position == 1 && to.position == 1 && to.filter == s.shape.positions;
  Sink<T> sink(s.stream);
  for (int64_t index = begin; index < end; ++index) {
    const Unit u = unit(s.units, index, s.shape.filters);
    if (s.stream && stream_scaled<T, kBinary>(s, u)) {
      continue;
    }
    if (channels_last) {
      scale_channels_last<T, kBinary>(s, u, sink);
    } else if (contiguous) {
      scale_contiguous<T, kBinary>(s, u, sink);
    } else {
      scale_strided<T, kBinary>(s, u);
    }
  }
}

// Sums over positions run in kSums interleaved partial sums, added pairwise at the end: the same
// order on every instruction set.
constexpr int kSums = 16;

// kSums running sums.
template <typename A>
class LaneSums {
 public:
  template <typename T>
  void add_products(const T* x, const T* y) {
    for (int i = 0; i < kParts; ++i) {
      parts_[i] += load<A>(x + i * kLanes<A>) * load<A>(y + i * kLanes<A>);
    }
  }

  // The same for the last `count` of kSums elements; a bitwise and, so that NaN is left out too.
  template <typename T>
  void add_last_products(const T* x, const T* y, int64_t count) {
    using Bits = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
    static constexpr Bits kMask[2 * kSums] = {0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,
                                              0,  0,  0,  0,  0,  -1, -1, -1, -1, -1, -1,
                                              -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
    for (int i = 0; i < kParts; ++i) {
      Vector<A> product = load<A>(x + i * kLanes<A>) * load<A>(y + i * kLanes<A>);
      Vector<Bits> bits, mask;
      std::memcpy(&mask, kMask + count + i * kLanes<A>, sizeof(mask));
      std::memcpy(&bits, &product, sizeof(bits));
      bits &= mask;
      std::memcpy(&product, &bits, sizeof(bits));
      parts_[i] += product;
    }
  }

  // Lane l with lane l + 8, then + 4, + 2, + 1, whatever the width.
  A sum() {
    for (int parts = kParts / 2; parts > 0; parts /= 2) {
      for (int i = 0; i < parts; ++i) {
        parts_[i] += parts_[i + parts];
      }
    }
    return fold<A>(parts_[0], [](const auto& one, const auto& other) { return one + other; });
  }

 private:
  static constexpr int kParts = kSums / kLanes<A>;

  Vector<A> parts_[kParts] = {};
};

template <typename T, typename A>
PICNN_FAST_HD A dot(const T* x, const T* grad, int64_t positions) {
  if (positions < kSums) {
    A sum = 0;
    for (int64_t p = 0; p < positions; ++p) {
      sum += static_cast<A>(widen(x[p])) * static_cast<A>(widen(grad[p]));
    }
    return sum;
  }
  LaneSums<A> sums;
  int64_t p = 0;
  for (; p + kSums <= positions; p += kSums) {
    sums.add_products(x + p, grad + p);
  }
  if (p < positions) {
    sums.add_last_products(x + positions - kSums, grad + positions - kSums, positions - p);
  }
  return sums.sum();
}

template <typename T>
PICNN_FAST_HD void backward_channels_last(const MaskingBackward<T>& s, const Unit& u,
                                          Sink<T>& sink) {
  using A = Accumulate<T>;
  const int64_t positions = s.shape.positions;
  const T* x = s.maps + u.batch * s.maps_strides.batch + u.begin;
  const T* grad = s.grad + u.batch * s.grad_strides.batch + u.begin;
  T* out = s.grad_maps + u.batch * s.grad_maps_strides.batch + u.begin;
  const A* __restrict__ mask = s.mask + u.batch * s.shape.filters + u.begin;
  A* __restrict__ sums = s.grad_mask + u.batch * s.shape.filters + u.begin;
  const int64_t width = u.end - u.begin;
  const int64_t step = s.grad_maps_strides.position == width ? rows_at_once<T>(width) : 1;
  std::memset(sums, 0, width * sizeof(A));
  for (int64_t p = 0; p < positions; p += step) {
    const int64_t rows = step < positions - p ? step : positions - p;
    T* stretch = sink.open(out + p * s.grad_maps_strides.position, rows * width);
    for (int64_t r = 0; r < rows; ++r) {
      const T* __restrict__ row = x + (p + r) * s.maps_strides.position;
      const T* __restrict__ grad_row = grad + (p + r) * s.grad_strides.position;
      T* __restrict__ out_row = stretch + r * width;
      for (int64_t i = 0; i < width; ++i) {
        sums[i] += static_cast<A>(widen(row[i])) * static_cast<A>(widen(grad_row[i]));
        out_row[i] = scaled(grad_row[i], mask[i]);
      }
    }
    sink.close();
  }
}

template <typename T>
PICNN_FAST_HD void backward_contiguous(const MaskingBackward<T>& s, const Unit& u, Sink<T>& sink) {
  using A = Accumulate<T>;
  const int64_t positions = s.shape.positions;
  const T* x = s.maps + u.batch * s.maps_strides.batch;
  const T* grad = s.grad + u.batch * s.grad_strides.batch;
  T* out = s.grad_maps + u.batch * s.grad_maps_strides.batch;
  const A* mask = s.mask + u.batch * s.shape.filters;
  A* grad_mask = s.grad_mask + u.batch * s.shape.filters;
  const int64_t step = rows_at_once<T>(positions);
  for (int64_t first = u.begin; first < u.end; first += step) {
    const int64_t last = first + step < u.end ? first + step : u.end;
    T* stretch = sink.open(out + first * positions, (last - first) * positions);
    for (int64_t i = first; i < last; ++i) {
      grad_mask[i] =
          dot<T, A>(x + i * s.maps_strides.filter, grad + i * s.grad_strides.filter, positions);
    }
    scale_rows<T, A, false>(grad, s.grad_strides.filter, stretch, positions, mask, first, last);
    sink.close();
  }
}

template <typename T>
PICNN_FAST_HD void backward_strided(const MaskingBackward<T>& s, const Unit& u) {
  using A = Accumulate<T>;
  const Strides from = s.maps_strides, grad_from = s.grad_strides, to = s.grad_maps_strides;
  const T* x = s.maps + u.batch * from.batch;
  const T* grad = s.grad + u.batch * grad_from.batch;
  T* out = s.grad_maps + u.batch * to.batch;
  const A* mask = s.mask + u.batch * s.shape.filters;
  for (int64_t i = u.begin; i < u.end; ++i) {
    A sum = 0;
    for (int64_t p = 0; p < s.shape.positions; ++p) {
      const T g = grad[i * grad_from.filter + p * grad_from.position];
      const T value = x[i * from.filter + p * from.position];
      sum += static_cast<A>(widen(value)) * static_cast<A>(widen(g));
      out[i * to.filter + p * to.position] = scaled(g, mask[i]);
    }
    s.grad_mask[u.batch * s.shape.filters + i] = sum;
  }
}

template <typename T>
PICNN_FAST_HD bool stream_gradients(const MaskingBackward<T>& s, const Unit& u) {
  if constexpr (std::is_same_v<T, Accumulate<T>>) {
    const Strides from = s.maps_strides, grad_from = s.grad_strides, to = s.grad_maps_strides;
    const int64_t positions = s.shape.positions, filters = u.end - u.begin;
    const T* x = s.maps + u.batch * from.batch + u.begin * from.filter;
    const T* grad = s.grad + u.batch * grad_from.batch + u.begin * grad_from.filter;
    T* out = s.grad_maps + u.batch * to.batch + u.begin * to.filter;
    const T* mask = s.mask + u.batch * s.shape.filters + u.begin;
    T* sums = s.grad_mask + u.batch * s.shape.filters + u.begin;
    if (from.filter == 1 && grad_from.filter == 1 && to.filter == 1 &&
        fills_lines(out, to.position, filters)) {
      for (int64_t i = 0; i < filters; i += kFiltersInLines) {
        const int64_t count = kFiltersInLines < filters - i ? kFiltersInLines : filters - i;
        backward_lines<T>(x + i, from.position, grad + i, grad_from.position, out + i, to.position,
                          positions, mask + i, sums + i, count);
      }
      return true;
    }
    if (from.position == 1 && grad_from.position == 1 && to.position == 1 &&
        grad_from.filter == positions && to.filter == positions && positions >= kLanes<T>) {
      const int64_t ahead = 2 * rows_at_once<T>(positions);
      write_scaled<T>(grad, out, positions, mask, filters, [&](int64_t i) {
        prefetch_row(x + (i + ahead) * from.filter, positions);
        prefetch_row(grad + (i + ahead) * positions, positions);
        sums[i] = dot<T, T>(x + i * from.filter, grad + i * positions, positions);
      });
      return true;
    }
  }
  return false;
}

template <typename T>
void backward(const MaskingBackward<T>& s, int64_t begin, int64_t end) {
  const Strides from = s.maps_strides, grad_from = s.grad_strides, to = s.grad_maps_strides;
  const bool channels_last = from.filter == 1 && grad_from.filter == 1 && to.filter == 1;
  const bool contiguous = from.position == 1 && grad_from.position == 1 && to.position == 1 &&
                          to.filter == s.shape.positions;
  Sink<T> sink(s.stream);
  for (int64_t index = begin; index < end; ++index) {
    const Unit u = unit(s.units, index, s.shape.filters);
    if (s.stream && stream_gradients<T>(s, u)) {
      continue;
    }
    if (channels_last) {
      backward_channels_last(s, u, sink);
    } else if (contiguous) {
      backward_contiguous(s, u, sink);
    } else {
      backward_strided(s, u);
    }
  }
}

template <typename A>
void logits_backward(const ParametersBackward<A>& s, int64_t begin, int64_t end, A* exponentials) {
  for (int64_t b = begin; b < end; ++b) {
    const A* grad_mask = s.grad_mask + b * s.filters;
    const A* logits = s.logits + b * s.classes;
    A* out = s.grad_logits + b * s.classes;
    A maximum = logits[0], total = 0, mean = 0;
    for (int64_t k = 1; k < s.classes; ++k) {
      maximum = logits[k] > maximum ? logits[k] : maximum;
    }
    const auto grad_y1 = [&](int64_t k) {
      return s.grad_y1 != nullptr
                 ? s.grad_y1[b * s.classes + k]
                 : dot<A, A>(s.correspondence + k * s.filters, grad_mask, s.filters);
    };
    for (int64_t k = 0; k < s.classes; ++k) {
      const A e = std::exp(logits[k] - maximum), grad = grad_y1(k);
      total += e;
      mean += e * grad;
      exponentials[k] = e;
      out[k] = grad;
    }
    mean /= total;
    for (int64_t k = 0; k < s.classes; ++k) {
      out[k] = exponentials[k] / total * (out[k] - mean);
    }
  }
}

template <typename A>
void correspondence_backward(const ParametersBackward<A>& s, int64_t begin, int64_t end) {
  for (int64_t k = 0; k < s.classes; ++k) {
    std::memset(s.grad_correspondence + k * s.filters + begin, 0, (end - begin) * sizeof(A));
  }
  for (int64_t b = 0; b < s.batch; ++b) {
    const A* __restrict__ row = s.grad_mask + b * s.filters;
    A* __restrict__ sums = s.grad_correspondence + s.labels[b] * s.filters;
    for (int64_t i = begin; i < end; ++i) {
      sums[i] += row[i];
    }
  }
}

template <typename T>
constexpr MapKernels<T> map_kernels() {
  MapKernels<T> kernels{};
  kernels.keep = scale<T, true>;
  kernels.scale = scale<T, false>;
  kernels.backward = backward<T>;
  return kernels;
}

template <typename A>
constexpr ParameterKernels<A> parameter_kernels() {
  ParameterKernels<A> kernels{};
  kernels.draw_labels = draw_labels<A>;
  kernels.logits_backward = logits_backward<A>;
  kernels.correspondence_backward = correspondence_backward<A>;
  return kernels;
}

template <typename P, typename A>
constexpr FilterKernels<P, A> filter_kernels() {
  return {draw_filters<P, A>};
}

constexpr picnn_fast::MaskingKernels all_kernels() {
  return {map_kernels<float>(),
          map_kernels<double>(),
          map_kernels<Half>(),
          map_kernels<BFloat16>(),
          parameter_kernels<float>(),
          parameter_kernels<double>(),
          filter_kernels<float, float>(),
          filter_kernels<float, double>(),
          filter_kernels<double, float>(),
          filter_kernels<double, double>()};
}

}  // namespace
}  // namespace PICNN_FAST_NAMESPACE

namespace picnn_fast {
constexpr MaskingKernels PICNN_FAST_KERNELS = PICNN_FAST_NAMESPACE::all_kernels();
}  // namespace picnn_fast
