// Compiled once for each instruction set: setup.py passes PICNN_FAST_NAMESPACE and
// PICNN_FAST_KERNELS. Only headers whose functions live in that namespace may be included.
#include "templates_kernels.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "scalar.h"
#include "streaming.h"
#include "transpose.h"
#include "vector.h"

namespace PICNN_FAST_NAMESPACE {
namespace {

using picnn_fast::Accumulate;
using picnn_fast::kFiltersAtOnce;
using picnn_fast::MapPeaks;
using picnn_fast::PanelLayout;
using picnn_fast::Strides;
using picnn_fast::TemplateMask;
using picnn_fast::TemplatesKernel;

// The first of the greatest numbers, NaN above all else.
template <typename T>
int64_t find_peak(const T* map, int64_t stride, int64_t positions) {
  auto best = widen(map[0]);
  int64_t peak = 0;
  for (int64_t p = 1; p < positions; ++p) {
    const auto x = widen(map[p * stride]);
    if (!(x <= best) && best == best) {
      best = x;
      peak = p;
    }
  }
  return peak;
}

// The same of a dense map, in lanes that each keep the first of their greatest numbers.
template <typename T, typename A>
PICNN_FAST_HD int64_t find_peak_dense(const T* __restrict__ map, int64_t positions) {
  using Index = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  constexpr int kCount = kLanes<A>;
  if (positions < kCount) {
    return find_peak(map, 1, positions);
  }
  Index lane[kCount];
  for (int l = 0; l < kCount; ++l) {
    lane[l] = l;
  }
  const Vector<Index> first = load<Index>(lane);
  Vector<A> best = load<A>(map);
  Vector<Index> index = first, nan = best != best;
  const auto take = [&](int64_t p) {
    const Vector<A> x = load<A>(map + p);
    const Vector<Index> greater = x > best;
    best = greater ? x : best;
    index = greater ? first + static_cast<Index>(p) : index;
    nan |= x != x;
  };
  for (int64_t p = kCount; p + kCount <= positions; p += kCount) {
    take(p);
  }
  take(positions - kCount);  // what is left, and some once more
  const A greatest = fold<A>(best, [](auto one, auto other) { return one > other ? one : other; });
  constexpr Index kNone = std::numeric_limits<Index>::max();
  index = (best == broadcast(greatest) ? index : broadcast(kNone)) | nan;  // -1 where NaN was
  const Index peak =
      fold<Index>(index, [](auto one, auto other) { return one < other ? one : other; });
  return peak < 0 ? find_peak(map, 1, positions) : peak;
}

template <typename T, typename A>
PICNN_FAST_HD T masked(T x, A mask) {
  return narrow<T>(static_cast<A>(widen(x) * mask));
}

// Whole vectors, the last of which may overlap the one before.
template <typename T, typename A>
PICNN_FAST_HD void mask_dense(const T* __restrict__ x, const A* __restrict__ mask,
                              T* __restrict__ out, int64_t count) {
  if (count < kLanes<A>) {
    for (int64_t p = 0; p < count; ++p) {
      out[p] = masked<T, A>(x[p], mask[p]);
    }
    return;
  }
  const auto run = [&](int64_t p) { store<A>(load<A>(x + p) * load<A>(mask + p), out + p); };
  int64_t p = 0;
  for (; p + kLanes<A> <= count; p += kLanes<A>) {
    run(p);
  }
  if (p < count) {
    run(count - kLanes<A>);
  }
}

// One dense map, or one whose positions are apart.
template <typename T>
PICNN_FAST_HD void mask_map(const TemplateMask<T>& s, int64_t peak, const T* from,
                            int64_t from_stride, T* to, int64_t to_stride) {
  using A = Accumulate<T>;
  const PanelLayout& layout = s.layout;
  const A* first = s.masks + layout.begin(peak);
  for (int64_t segment = 0; segment < layout.segments; ++segment) {
    const A* mask = first + segment * layout.per_segment;
    const T* x = from + segment * layout.length * from_stride;
    T* out = to + segment * layout.length * to_stride;
    if (from_stride == 1 && to_stride == 1) {
      mask_dense(x, mask, out, layout.length);
    } else {
      for (int64_t p = 0; p < layout.length; ++p) {
        out[p * to_stride] = masked<T, A>(x[p * from_stride], mask[p]);
      }
    }
  }
}

// Filters side by side in memory: rows of `count` numbers, of the same position.
template <typename T, typename A>
void find_peaks(const T* maps, int64_t stride, int64_t positions, int64_t count, int64_t* peak) {
  A best[kFiltersAtOnce];
  int32_t index[kFiltersAtOnce];
  for (int64_t i = 0; i < count; ++i) {
    best[i] = widen(maps[i]);
    index[i] = 0;
  }
  for (int64_t p = 1; p < positions; ++p) {
    const T* __restrict__ row = maps + p * stride;
    const auto here = static_cast<int32_t>(p);
    for (int64_t i = 0; i < count; ++i) {
      const A x = widen(row[i]);
      const bool take = !(x <= best[i]) & (best[i] == best[i]);
      best[i] = take ? x : best[i];
      index[i] = take ? here : index[i];
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    peak[i] = index[i];
  }
}

// Rows of filters side by side: where they are read and written, and what is fetched meanwhile.
template <typename T>
struct Rows {
  const T* maps;
  const T* ahead;
  bool far_ahead;  // read only after many others
  int64_t stride;
  T* out;
  T* out_ahead;  // none if null
  int64_t out_stride;
  bool stream;  // whole aligned vectors, past the caches
};

// Of the first `count` of kRun positions in a row, kVectors vectors of filters times the masks of
// peaks whose masks begin at `begins`.
template <typename T, typename A, int kVectors>
PICNN_FAST_HD void mask_vectors(const A* masks, const int64_t* begins, const Rows<T> rows,
                                int64_t count, int64_t at) {
  constexpr int kSecondLevel = 1;  // of cache, rather than all
  Vector<A> runs[kVectors][kRun<A>];
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 4
    for (int k = 0; k < kRun<A>; ++k) {
      runs[v][k] = load_runs(masks, begins + at + v * kLanes<A> + k);
    }
    transpose<A, kRun<A>>(runs[v]);
  }
#pragma GCC unroll 4
  for (int k = 0; k < kRun<A>; ++k) {
    if (k < count) {
      const T* ahead = rows.ahead + k * rows.stride + at;
      if (rows.far_ahead) {
        __builtin_prefetch(ahead, /*rw=*/0, kSecondLevel);
      } else {
        __builtin_prefetch(ahead);
      }
      if (rows.out_ahead != nullptr) {
        __builtin_prefetch(rows.out_ahead + k * rows.out_stride + at, /*rw=*/1);
      }
      const T* from = rows.maps + k * rows.stride + at;
      T* to = rows.out + k * rows.out_stride + at;
      if constexpr (std::is_same_v<T, BFloat16> && kVectors == 2) {
        const Vector<A> x = load<A>(from) * runs[0][k];
        const Vector<A> y = load<A>(from + kLanes<A>) * runs[1][k];
        rows.stream ? stream_both(x, y, to) : store_both(x, y, to);
        continue;
      }
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        const Vector<A> x = load<A>(from + v * kLanes<A>) * runs[v][k];
        rows.stream ? stream_vector<A>(x, to + v * kLanes<A>) : store<A>(x, to + v * kLanes<A>);
      }
    }
  }
}

// Of all `filters`.
template <typename T, typename A>
void mask_rows(const A* masks, const int64_t* begins, const Rows<T> rows, int64_t count,
               int64_t filters) {
  // As many numbers as vectors of A hold at most: whole lines, of the widest vectors.
  constexpr int kVectors = sizeof(A) / sizeof(T);
  constexpr int64_t kNumbers = kVectors * kLanes<A>;
  int64_t i = 0;
  for (; i + kNumbers <= filters; i += kNumbers) {
    mask_vectors<T, A, kVectors>(masks, begins, rows, count, i);
  }
  for (; i + kLanes<A> <= filters; i += kLanes<A>) {
    mask_vectors<T, A, 1>(masks, begins, rows, count, i);
  }
  if (i < filters && filters >= kLanes<A>) {
    mask_vectors<T, A, 1>(masks, begins, rows, count, filters - kLanes<A>);
    return;
  }
  for (; i < filters; ++i) {
    for (int64_t k = 0; k < count; ++k) {
      rows.out[k * rows.out_stride + i] =
          masked<T, A>(rows.maps[k * rows.stride + i], masks[begins[i] + k]);
    }
  }
}

// `next`, if not null, are the maps that follow. They are fetched while these are written: finding
// peaks would wait for memory otherwise. Where peaks are given, rows further on are. Of numbers
// narrower than masks so are rows that are written into the caches, and `next` no nearer than the
// second level of cache: measured to pay for these alone.
template <typename T>
void mask_side_by_side(const TemplateMask<T>& s, const T* maps, const T* next, T* out,
                       int64_t* peak, int64_t filters, Sink<T>& sink) {
  using A = Accumulate<T>;
  constexpr int64_t kAhead = 2 * Sink<T>::kPreferred, kLine = 64 / sizeof(T);
  const int64_t stride = s.in.maps_strides.position, out_stride = s.out_strides.position;
  const int64_t rows_ahead = kAhead / filters > kRun<A> ? kAhead / filters : kRun<A>;
  if (s.find_peak) {
    find_peaks<T, A>(maps, stride, s.in.shape.positions, filters, peak);
  }
  const PanelLayout& layout = s.layout;
  int64_t begins[kFiltersAtOnce];
  for (int64_t i = 0; i < filters; ++i) {
    begins[i] = layout.begin(peak[i]);
  }
  const bool aligned = reinterpret_cast<uintptr_t>(out) % 64 == 0 && out_stride % kLine == 0;
  const bool lines = s.stream && aligned && filters % kLine == 0;
  const bool dense = !lines && out_stride == filters;
  const bool narrow_rows = !s.stream && sizeof(T) < sizeof(A);
  const T* ahead = s.find_peak ? (next != nullptr ? next : maps) : maps + rows_ahead * stride;
  for (int64_t segment = 0; segment < layout.segments; ++segment) {
    const A* panel = s.masks + segment * layout.per_segment;
    for (int64_t first = 0; first < layout.length; first += kRun<A>) {
      const int64_t left = layout.length - first, count = left < kRun<A> ? left : kRun<A>;
      const int64_t p = segment * layout.length + first;
      T* to = out + p * out_stride;
      T* stretch = dense ? sink.open(to, count * filters) : to;
      T* to_ahead = narrow_rows ? to + rows_ahead * out_stride : nullptr;
      const Rows<T> rows{maps + p * stride,
                         ahead + p * stride,
                         s.find_peak && narrow_rows,
                         stride,
                         stretch,
                         to_ahead,
                         out_stride,
                         lines};
      mask_rows<T, A>(panel + first, begins, rows, count, filters);
      if (dense) {
        sink.close();
      }
    }
  }
}

// Filters of one unit of work: those from `first` on of a sample.
struct Block {
  int64_t sample, first, count;
};

template <typename T>
PICNN_FAST_HD Block block_of(const MapPeaks<T>& s, int64_t unit) {
  const int64_t first = unit % s.units.blocks * s.units.filters, left = s.shape.filters - first;
  return {unit / s.units.blocks, first, s.units.filters < left ? s.units.filters : left};
}

template <typename T>
PICNN_FAST_HD const T* maps_of(const MapPeaks<T>& s, const Block& block) {
  return s.maps + block.sample * s.maps_strides.batch + block.first * s.maps_strides.filter;
}

template <typename T>
void peaks(const MapPeaks<T>& s, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const int64_t positions = s.shape.positions, stride = s.maps_strides.position;
  for (int64_t unit = begin; unit < end; ++unit) {
    const Block block = block_of(s, unit);
    const T* maps = maps_of(s, block);
    int64_t* peak = s.peak + block.sample * s.shape.filters + block.first;
    if (s.side_by_side) {
      find_peaks<T, A>(maps, stride, positions, block.count, peak);
      continue;
    }
    for (int64_t i = 0; i < block.count; ++i) {
      const T* map = maps + i * s.maps_strides.filter;
      peak[i] =
          stride == 1 ? find_peak_dense<T, A>(map, positions) : find_peak(map, stride, positions);
    }
  }
}

// Maps of a block whose positions follow one another, in the output too.
template <typename T>
void mask_dense_maps(const TemplateMask<T>& s, const T* maps, T* out, int64_t* peak, int64_t count,
                     Sink<T>& sink) {
  using A = Accumulate<T>;
  const int64_t positions = s.in.shape.positions, most = Sink<T>::kPreferred / positions;
  const int64_t step = most > 1 ? most : 1;
  for (int64_t i = 0; i < count; i += step) {
    const int64_t here = step < count - i ? step : count - i;
    T* stretch = sink.open(out + i * positions, here * positions);
    for (int64_t r = 0; r < here; ++r) {
      const T* map = maps + (i + r) * s.in.maps_strides.filter;
      if (s.find_peak) {
        peak[i + r] = find_peak_dense<T, A>(map, positions);
      }
      mask_map(s, peak[i + r], map, 1, stretch + r * positions, 1);
    }
    sink.close();
  }
}

// The first `held` lanes of `masks`, and those of `more` from its first one on.
template <typename A>
PICNN_FAST_HD Vector<A> join(const Vector<A>& masks, const Vector<A>& more, int64_t held) {
  using Index = IndexOf<A>;
  Index numbers[kLanes<A>];
  for (int l = 0; l < kLanes<A>; ++l) {
    numbers[l] = l;
  }
  const Vector<Index> lanes = load<Index>(numbers);
  const auto kept = static_cast<Index>(held);
  return shuffle<A>(masks, more, lanes + ((lanes >= kept) & (kLanes<A> - kept)));
}

// The same of maps that follow one another: whole aligned vectors, in which one map may end and the
// next begin. Peaks are found some maps ahead, and what they are found in is fetched still earlier:
// a loop that waits for memory would hold up what is written.
template <typename T, bool kStream>
void mask_adjoining(const TemplateMask<T>& s, const T* x, T* out, int64_t* peak, int64_t count) {
  using A = Accumulate<T>;
  constexpr int64_t kNumbers = kLanes<A>, kPreferred = Sink<T>::kPreferred;
  const PanelLayout& layout = s.layout;
  const int64_t positions = s.in.shape.positions;
  const int64_t some = kPreferred > positions ? kPreferred / positions : 1;
  const int64_t ahead = s.find_peak ? some : 0, reach = ahead * positions + 2 * kPreferred;
  const auto find = [&](int64_t i) {
    if (s.find_peak && i < count) {
      peak[i] = find_peak_dense<T, A>(x + i * positions, positions);
    }
  };
  for (int64_t i = 0; i < ahead; ++i) {
    find(i);
  }
  const auto over = reinterpret_cast<uintptr_t>(out) % (kNumbers * sizeof(T)) / sizeof(T);
  // Numbers of the vector at hand that are not written here, or belong to the next one.
  int64_t skipped = static_cast<int64_t>(over), held = skipped, at = 0;
  Vector<A> masks = {};
  const auto write = [&](const Vector<A>& by, int64_t from) {
    __builtin_prefetch(x + from + reach);
    const Vector<A> product = load<A>(x + from) * by;
    kStream ? stream_vector<A>(product, out + from) : store<A>(product, out + from);
  };
  const auto write_part = [&](int64_t from, int64_t begin, int64_t end) {
    A by[kNumbers];
    store<A>(masks, by);
    for (int64_t i = begin; i < end; ++i) {
      out[from + i] = masked<T, A>(x[from + i], by[i]);
    }
  };
  for (int64_t i = 0; i < count; ++i) {
    find(i + ahead);
    const A* mask = s.masks + layout.begin(peak[i]);
    for (int64_t segment = 0; segment < layout.segments; ++segment, mask += layout.per_segment) {
      int64_t p = 0;
      if (held != 0) {
        masks = join<A>(masks, load<A>(mask), held);
        p = kNumbers - held;
        if (p > layout.length) {
          held += layout.length;
          at += layout.length;
          continue;
        }
        skipped == 0 ? write(masks, at - held) : write_part(at - held, skipped, kNumbers);
        skipped = held = 0;
      }
      for (; p + kNumbers <= layout.length; p += kNumbers) {
        write(load<A>(mask + p), at + p);
      }
      if (p < layout.length) {
        masks = load<A>(mask + p);
        held = layout.length - p;
      }
      at += layout.length;
    }
  }
  write_part(at - held, skipped, held);
}

template <typename T>
void mask(const TemplateMask<T>& s, int64_t begin, int64_t end) {
  const MapPeaks<T>& in = s.in;
  const int64_t positions = in.shape.positions;
  const Strides from = in.maps_strides, to = s.out_strides;
  const bool dense = from.position == 1 && to.position == 1 && to.filter == positions;
  const bool adjoining = from.filter == positions && positions >= kLanes<Accumulate<T>>;
  Sink<T> sink(s.stream);
  for (int64_t unit = begin; unit < end; ++unit) {
    const Block block = block_of(in, unit);
    const T* maps = maps_of(in, block);
    T* out = s.out + block.sample * to.batch + block.first * to.filter;
    int64_t* peak = in.peak + block.sample * in.shape.filters + block.first;
    if (in.side_by_side) {
      const bool more = s.find_peak && unit + 1 < end;
      const T* next = more ? maps_of(in, block_of(in, unit + 1)) : nullptr;
      mask_side_by_side(s, maps, next, out, peak, block.count, sink);
    } else if (dense && adjoining) {
      s.stream ? mask_adjoining<T, true>(s, maps, out, peak, block.count)
               : mask_adjoining<T, false>(s, maps, out, peak, block.count);
    } else if (dense) {
      mask_dense_maps(s, maps, out, peak, block.count, sink);
    } else {
      for (int64_t i = 0; i < block.count; ++i) {
        const T* map = maps + i * from.filter;
        if (s.find_peak) {
          peak[i] = find_peak(map, from.position, positions);
        }
        mask_map(s, peak[i], map, from.position, out + i * to.filter, to.position);
      }
    }
  }
}

template <typename T>
constexpr TemplatesKernel<T> kernels_of() {
  TemplatesKernel<T> kernels{};
  kernels.peaks = peaks<T>;
  kernels.mask = mask<T>;
  return kernels;
}

constexpr picnn_fast::TemplatesKernels all_kernels() {
  return {kernels_of<float>(), kernels_of<double>(), kernels_of<Half>(), kernels_of<BFloat16>()};
}

}  // namespace
}  // namespace PICNN_FAST_NAMESPACE

namespace picnn_fast {
constexpr TemplatesKernels PICNN_FAST_KERNELS = PICNN_FAST_NAMESPACE::all_kernels();
}  // namespace picnn_fast
